"""Backward passes whose gradients, dense ones and those of rows, are clipped before they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.features.updates import GradientUpdate
from trilith.nn.anchored import dense_parameters
from trilith.nn.bridge import Bridge
from trilith.nn.exchange import Exchange
from trilith.nn.layouts import FusedLayouts

__all__ = ["ClippedBackward", "ClippedLayouts"]

Float32Array = npt.NDArray[np.float32]


class _OnDevice(Protocol):
    """Any embeddings."""

    @property
    def bridge(self) -> Bridge:
        """To where their vectors are."""


class _Embeddings(_OnDevice, Protocol):
    """`EmbeddingRows`, `EmbeddingBag` or `EmbeddingCollection`."""

    exchange: Exchange


class _Clipped(ABC):
    """The dense half of a clipped backward pass.

    Args:
        embeddings: Which know the device.
        module: The dense part.
        **options: Of `trilith.features.GradientUpdate`.
    """

    def __init__(self, embeddings: _OnDevice, module: nn.Module, **options: Any) -> None:
        self._parameters = dict(dense_parameters(module))
        self._embeddings = embeddings
        self.update = GradientUpdate(
            apply_dense=self._take_over, apply_sparse=self._push, read_dense=self._value, **options
        )

    @property
    def _bridge(self) -> Bridge:
        return self._embeddings.bridge

    def _to_host(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Float32Array | None]:
        return {name: None if each is None else self._bridge.to_host(each) for name, each in gradients.items()}

    def _take_over(self, gradients: Mapping[str, Float32Array]) -> None:
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            parameter.grad = self._bridge.to_device(np.ascontiguousarray(gradient)).view_as(parameter)

    @abstractmethod
    def _push(self, gradients: Mapping[str, Float32Array], step: int) -> None:
        """Take the clipped gradients of the embeddings to the cluster."""

    def _value(self, name: str) -> Float32Array:
        with torch.no_grad():
            return self._bridge.to_host(self._parameters[name])


class ClippedBackward(_Clipped):
    """Stands for `loss.backward()`: gradients of rows are held back, clipped with the dense ones, and pushed.

    A row's gradient counts once for each place where its id occurred. Afterwards the module's parameters have their
    clipped gradients, for `DenseOnPs.step`, `AllReduced.step` or a torch optimizer.

    Args:
        embeddings: Whose gradients backward applies.
        module: The dense part.
        **options: Of `trilith.features.GradientUpdate`: clip_type, clip_norm, sparse_clip_norm,
            sparse_norm_warmup_steps, dense_weight_decay, dense_reduce_mean, embedding_check.
    """

    def __init__(self, embeddings: _Embeddings, module: nn.Module, **options: Any) -> None:
        super().__init__(embeddings, module, **options)
        self._exchange = embeddings.exchange
        self._ids: dict[str, npt.NDArray[np.uint64]] = {}

    def __call__(
        self, loss: Tensor, *, batch_size: int | None = None, features: Mapping[str, npt.ArrayLike] | None = None
    ) -> None:
        """Go back from a loss.

        Args:
            loss: Of a batch.
            batch_size: Its samples, where dense gradients are to be divided by them.
            features: Its user embeddings by name, where gradients count only if they are there.
        """
        with self._exchange.hold() as held:
            loss.backward()
        rows = {table: np.concatenate([grads for _, grads in parts]) for table, parts in held.items()}
        self._ids = {table: np.concatenate([ids for ids, _ in parts]) for table, parts in held.items()}
        dense = self._to_host({name: each.grad for name, each in self._parameters.items()})
        self.update.step(dense, rows, batch_size=batch_size, features=features)

    def _push(self, gradients: Mapping[str, Float32Array], step: int) -> None:
        self._exchange.push({table: (self._ids[table], gradient) for table, gradient in gradients.items()})


class ClippedLayouts(_Clipped):
    """The same where embeddings are fused layouts: what is clipped are the layouts' gradients, before they are rows'.

    Args:
        layouts: Whose rows backward steps.
        module: The dense part.
        **options: As for `ClippedBackward`; clipped gradients are named after their layouts.
    """

    def __init__(self, layouts: FusedLayouts, module: nn.Module, **options: Any) -> None:
        super().__init__(layouts, module, **options)
        self._tensors: dict[str, Tensor] = {}

    def __call__(
        self,
        loss: Tensor,
        found: Mapping[str, Tensor | Sequence[Tensor]],
        *,
        batch_size: int | None = None,
        features: Mapping[str, npt.ArrayLike] | None = None,
    ) -> None:
        """Go back from a loss.

        Args:
            loss: Of a batch.
            found: Its layouts, as `FusedLayouts` gave them.
            batch_size: Its samples, where dense gradients are to be divided by them.
            features: Its user embeddings by name, where gradients count only if they are there.
        """
        self._tensors = {}
        for name, layout in found.items():
            several = {} if isinstance(layout, Tensor) else {f"{name}/{i}": each for i, each in enumerate(layout)}
            self._tensors.update(several or {name: layout})  # type: ignore[dict-item]
        wanted = [*self._parameters.values(), *self._tensors.values()]
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        given = self._to_host(dict(zip([*self._parameters, *self._tensors], grads, strict=True)))
        dense = {name: given[name] for name in self._parameters}
        self.update.step(dense, {name: given[name] for name in self._tensors}, batch_size=batch_size, features=features)

    def _push(self, gradients: Mapping[str, Float32Array], step: int) -> None:
        tensors = [self._tensors[name] for name in gradients]
        torch.autograd.backward(
            tensors, [self._bridge.to_device(np.ascontiguousarray(each)) for each in gradients.values()]
        )
        self._tensors = {}

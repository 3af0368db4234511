"""ClippedBackward: a backward pass whose gradients, dense ones and those of rows, are clipped before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.features.updates import GradientUpdate
from trilith.nn.bridge import Bridge
from trilith.nn.exchange import Exchange

__all__ = ["ClippedBackward"]

Float32Array = npt.NDArray[np.float32]


class _Embeddings(Protocol):
    """`Embedding`, `EmbeddingBag` or `EmbeddingCollection`."""

    exchange: Exchange
    bridge: Bridge


class ClippedBackward:
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
        self._exchange = embeddings.exchange
        self._parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._bridge = embeddings.bridge
        self._ids: dict[str, npt.NDArray[np.uint64]] = {}
        self.update = GradientUpdate(
            apply_dense=self._take_over, apply_sparse=self._push, read_dense=self._value, **options
        )

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
        dense = {
            name: None if each.grad is None else self._bridge.to_host(each.grad)
            for name, each in self._parameters.items()
        }
        self.update.step(dense, rows, batch_size=batch_size, features=features)

    def _take_over(self, gradients: Mapping[str, Float32Array]) -> None:
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            parameter.grad = self._bridge.to_device(np.ascontiguousarray(gradient)).view_as(parameter)

    def _push(self, gradients: Mapping[str, Float32Array], step: int) -> None:
        self._exchange.push({table: (self._ids[table], gradient) for table, gradient in gradients.items()})

    def _value(self, name: str) -> Float32Array:
        with torch.no_grad():
            return self._bridge.to_host(self._parameters[name])

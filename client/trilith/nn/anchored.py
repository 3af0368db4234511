"""Modules whose rows are elsewhere, and how torch's ways to move, freeze, copy and compile a module do without them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from trilith.nn.bridge import Bridge

__all__ = ["Anchored", "dense_parameters", "outside_graphs"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Anchored(nn.Module):
    """A module whose rows are in a cluster, and which torch knows by one parameter, `anchor`.

    What torch users decide by parameters thereby holds for the rows: `.to()` moves the vectors to a device or dtype;
    `requires_grad_(False)`, also of a module around this one, freezes the rows. In `eval()` a backward pass applies no
    gradients either. Optimizers find the anchor and leave it at zero; no `state_dict` holds it. Copies have the
    same rows.

    Args:
        bridge: To the device where the vectors shall be.
    """

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self._bridge = bridge
        # One element, not none: some norms and optimizers have no answer for a tensor without elements.
        self.anchor = nn.Parameter(torch.zeros(1, device=bridge.device))

    @property
    def bridge(self) -> Bridge:
        """To the device where the vectors are."""
        self._bridge = self._bridge.to(self.anchor.device)
        return self._bridge

    @property
    def trainable(self) -> bool:
        """Whether gradients are applied, in training mode; `requires_grad_` sets it too."""
        return self.anchor.requires_grad

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.anchor.requires_grad_(value)

    def _learns(self) -> bool:
        """Whether a forward pass of this moment is one of training."""
        return self.training and self.trainable and torch.is_grad_enabled()

    def _cast(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """float32 vectors in the module's dtype, as `.half()` or `.to(torch.bfloat16)` want them."""
        dtype = self.anchor.dtype
        return vectors if dtype == torch.float32 else tuple(each.to(dtype) for each in vectors)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}anchor"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key != f"{prefix}anchor"]


def dense_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters of a module by name, without the anchors of embeddings in it."""
    anchors = {id(each.anchor) for each in module.modules() if isinstance(each, Anchored)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in anchors:
            yield name, parameter


def outside_graphs(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have torch.compile break its graph around a method rather than go into numpy, kernels' addresses and sockets.

    As `torch.compiler.disable`, which however imports the compiler, for a second, also where nothing is compiled.
    """
    disabled: Callable[_P, _R] | None = None

    @functools.wraps(method)
    def eager(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return method(*args, **kwargs)
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return eager

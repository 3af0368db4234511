"""Tensors for the ops: which implementation a tensor gets, and its memory as an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.errors import InvalidRequestError

__all__ = ["apply", "array_of", "integers_on", "refuse_outside", "scale_gradient", "tensor_of", "use_native"]


def apply(function: Any, *arguments: Any) -> Any:
    """Run an autograd function, which torch does not type."""
    return function.apply(*arguments)


def use_native(native: bool | None, *tensors: Tensor) -> bool:
    """Whether torch's own operations do the work: as the caller says, else exactly where a tensor is not on the CPU."""
    return any(each.device.type != "cpu" for each in tensors) if native is None else native


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor's values on the host, without a copy where it is there."""
    return tensor.detach().cpu().contiguous().numpy()


def tensor_of(array: npt.NDArray[Any]) -> Tensor:
    """A tensor over the array's memory."""
    return torch.from_numpy(np.ascontiguousarray(array))


def integers_on(device: torch.device, values: Tensor | npt.NDArray[Any] | Sequence[int]) -> Tensor:
    """int64 on a device."""
    if isinstance(values, Tensor):
        return values.to(device, torch.int64)
    return torch.as_tensor(np.asarray(values).astype(np.int64), device=device)


def refuse_outside(what: str, indices: Tensor, count: int) -> None:
    """Raise for an index outside 0..count - 1; on a GPU this waits for the indices."""
    bad = (indices < 0) | (indices >= count)
    if bool(bad.any()):
        raise InvalidRequestError(f"{what} {int(indices[bad].reshape(-1)[0])} is outside 0..{count - 1}")


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.scale, None


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    """The tensor itself, whose gradient is multiplied by `scale` on its way back."""
    scaled: Tensor = apply(_Scaled, tensor, scale)
    return scaled

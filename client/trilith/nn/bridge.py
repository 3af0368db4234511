"""Moving rows and gradients between host arrays, which travel, and the device the model computes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.errors import InvalidRequestError

__all__ = ["Bridge", "pick_device"]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; "auto" or None is CUDA where there is one, else the CPU.

    Raises:
        InvalidRequestError: CUDA was asked for and there is none.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequestError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequestError(f"device {device!r}: this machine has no CUDA device; use 'cpu' or 'auto'")
    return chosen


def _pinned(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, pin_memory=True)


def _synchronize(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()


class Bridge:
    """Copies float32 arrays to a device and back; on the CPU arrays and tensors share their memory.

    With CUDA both ways go through pinned host buffers, so that the copy to the device overlaps with the host's work.

    Args:
        device: Where the model computes.
        pinned: Whether to go through pinned buffers; by default exactly with CUDA.
        allocate: Makes a pinned float32 tensor of a shape. Tests without a GPU pass their own.
        synchronize: Waits until the device's queued work is done.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool | None = None,
        allocate: Callable[[tuple[int, ...]], Tensor] = _pinned,
        synchronize: Callable[[torch.device], None] = _synchronize,
    ) -> None:
        self.device = device
        self._pinned = device.type == "cuda" if pinned is None else pinned
        self._allocate = allocate
        self._synchronize = synchronize

    def to(self, device: torch.device) -> Bridge:
        """The bridge to a device: this one, if it leads there, else a new one."""
        same = self.device.type == device.type and self.device.index in (None, device.index)
        return self if same else Bridge(device)

    def to_device(self, rows: npt.NDArray[Any]) -> Tensor:
        """Return rows, or int64 indices or lengths, as a tensor on the device."""
        if not rows.flags.writeable:
            rows = rows.copy()  # torch has no read-only tensors
        host = torch.from_numpy(rows)
        if not self._pinned or host.dtype != torch.float32:
            return host.to(self.device)
        staged = self._allocate(tuple(rows.shape))
        staged.copy_(host)
        return staged.to(self.device, non_blocking=True)

    def to_host(self, values: Tensor) -> npt.NDArray[np.float32]:
        """Return a tensor of the device as a C-contiguous array, complete when this returns."""
        values = values.detach().to(torch.float32).contiguous()
        if self._pinned:
            staged = self._allocate(tuple(values.shape))
            staged.copy_(values, non_blocking=True)
            self._synchronize(self.device)
            values = staged
        array: npt.NDArray[Any] = values.cpu().numpy()
        return array

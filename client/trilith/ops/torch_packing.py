"""`trilith.ops.packing` for tensors of any device: what an all-reduce takes and gives back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops.packing import ALIGN, aligned_starts

__all__ = ["aligned_flat_concat", "aligned_flat_split"]


def aligned_flat_concat(inputs: Sequence[Tensor], scale: float | Tensor = 1.0, *, align: int = ALIGN) -> Tensor:
    """float32: the tensors one after another, each scaled and at a multiple of `align` floats, zeros between."""
    starts, total = aligned_starts([each.numel() for each in inputs], align)
    flat = torch.zeros(total, dtype=torch.float32, device=inputs[0].device if inputs else None)
    for start, each in zip(starts, inputs, strict=True):
        flat[start : start + each.numel()] = each.reshape(-1) * scale
    return flat


def aligned_flat_split(inputs: Sequence[Tensor], flat: Tensor, *, align: int = ALIGN) -> list[Tensor]:
    """Views of `flat` with the shapes of `inputs`, where `aligned_flat_concat` put them."""
    starts, total = aligned_starts([each.numel() for each in inputs], align)
    if flat.shape != (total,):
        raise InvalidRequestError(f"flat has shape {tuple(flat.shape)}, the inputs make ({total},)")
    return [flat[start : start + each.numel()].view(each.shape) for start, each in zip(starts, inputs, strict=True)]

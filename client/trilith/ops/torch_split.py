"""`trilith.ops.split` for tensors: gradients flow through the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import split
from trilith.ops.torch_bridge import apply, array_of, integers_on, refuse_outside, tensor_of, use_native
from trilith.ops.torch_ragged import RaggedTensor, as_splits

__all__ = ["ragged_split_by_indices", "split_by_indices"]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, tensor: Tensor, num_splits: int) -> tuple[Tensor, ...]:
        ctx.indices, ctx.num_splits = array_of(indices), num_splits
        return tuple(map(tensor_of, split.split_by_indices(ctx.indices, array_of(tensor), num_splits)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = split.split_by_indices_gradient(ctx.indices, [array_of(each) for each in grads], ctx.num_splits)
        return None, tensor_of(joined), None


def split_by_indices(
    indices: Tensor, tensor: Tensor, num_splits: int, *, native: bool | None = None
) -> tuple[Tensor, ...]:
    """Per split its rows in order; see `trilith.ops.split.split_by_indices`.

    Args:
        indices: int64[n].
        tensor: float32 or int64 [n, ...].
        num_splits: How many splits there are.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, tensor):
        if tensor.dtype == torch.float32:
            return apply(_Split, indices, tensor, num_splits)  # type: ignore[no-any-return]
        return tuple(map(tensor_of, split.split_by_indices(array_of(indices), array_of(tensor), num_splits)))
    wanted = integers_on(tensor.device, indices)
    if num_splits < 1 or wanted.shape != tensor.shape[:1]:
        raise InvalidRequestError(
            f"{tuple(wanted.shape)} indices for {tuple(tensor.shape)} rows and {num_splits} splits"
        )
    refuse_outside("index", wanted, num_splits)
    order = torch.argsort(wanted, stable=True)
    pieces = torch.split(tensor[order], torch.bincount(wanted, minlength=num_splits).tolist())
    return tuple(pieces)


def ragged_split_by_indices(
    indices: Tensor, values: Tensor, row_splits: Tensor, num_splits: int, *, native: bool | None = None
) -> tuple[list[RaggedTensor], list[RaggedTensor]]:
    """Per split its values, and their positions among all; see `trilith.ops.split.ragged_split_by_indices`.

    Args:
        indices: int64[n].
        values: float32 or int64 [n].
        row_splits: int64[rows + 1] of the values.
        num_splits: How many splits there are.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if values.ndim != 1:
        raise InvalidRequestError(f"values have shape {tuple(values.shape)}, they must be one-dimensional")
    splits = as_splits("row_splits", row_splits, values.numel(), values.device)
    moved = split_by_indices(indices, values, num_splits, native=native)
    every = torch.arange(values.numel(), device=values.device)
    places = split_by_indices(indices, every, num_splits, native=native)
    starts = [torch.searchsorted(each, splits) for each in places]
    return (
        [RaggedTensor(*each) for each in zip(moved, starts, strict=True)],
        [RaggedTensor(*each) for each in zip(places, starts, strict=True)],
    )

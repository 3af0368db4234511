"""`trilith.ops.reduce` for tensors: gradients flow to the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import reduce
from trilith.ops.torch_bridge import apply, array_of, integers_on, refuse_outside, tensor_of, use_native
from trilith.ops.torch_ragged import as_splits, value_rowids

__all__ = [
    "fused_reduce_and_split",
    "fused_reduce_sum_and_split",
    "fused_sorted_segment_sum",
    "reduce_mean",
    "reduce_sqrtn",
    "reduce_sum",
]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rowids: Any, values: Tensor, rows: int) -> Tensor:
        ctx.rowids = rowids
        return tensor_of(reduce.reduce_sum(rowids, array_of(values), rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, tensor_of(reduce.reduce_sum_gradient(ctx.rowids, array_of(grads[0]))), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rowids: Any, values: Tensor, rows: int) -> Tensor:
        ctx.rowids = rowids
        return tensor_of(reduce.reduce_mean(rowids, array_of(values), rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, tensor_of(reduce.reduce_mean_gradient(ctx.rowids, array_of(grads[0]))), None


class _Sqrtn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rowids: Any, values: Tensor, rows: int) -> Tensor:
        ctx.rowids = rowids
        ctx.save_for_backward(values)
        return tensor_of(reduce.reduce_sqrtn(rowids, array_of(values), rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return None, tensor_of(reduce.reduce_sqrtn_gradient(ctx.rowids, array_of(values), array_of(grads[0]))), None


def _reduction(
    function: Any,
    native_sum: Callable[[Tensor, Tensor, int], Tensor],
    id_indices: Tensor,
    values: Tensor,
    rows: int,
    native: bool | None,
) -> Tensor:
    if not use_native(native, values):
        return apply(function, array_of(id_indices), values, rows)  # type: ignore[no-any-return]
    places = integers_on(values.device, id_indices)
    if places.ndim == 2 and places.shape[1] >= 1:
        places = places[:, 0]
    if values.ndim != 2 or places.shape != values.shape[:1]:
        raise InvalidRequestError(f"{tuple(places.shape)} places for {tuple(values.shape)} rows")
    refuse_outside("row", places, rows)
    return native_sum(places, values, rows)


def _add_up(places: Tensor, values: Tensor, rows: int) -> Tensor:
    return values.new_zeros(rows, values.shape[1]).index_add(0, places, values)


def _average(places: Tensor, values: Tensor, rows: int) -> Tensor:
    return _add_up(places, values, rows) * (1 / torch.bincount(places, minlength=rows).to(values.dtype))[:, None]


def _root(places: Tensor, values: Tensor, rows: int) -> Tensor:
    squares = _add_up(places, values * values, rows)
    # The root of zero has no gradient; a constant in its place has one of zero.
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def reduce_sum(id_indices: Tensor, id_values: Tensor, rows: int, *, native: bool | None = None) -> Tensor:
    """float32[rows, d]; see `trilith.ops.reduce.reduce_sum`.

    Args:
        id_indices: int64[n] or [n, 1].
        id_values: float32[n, d].
        rows: Number of bags.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    return _reduction(_Sum, _add_up, id_indices, id_values, rows, native)


def reduce_mean(id_indices: Tensor, id_values: Tensor, rows: int, *, native: bool | None = None) -> Tensor:
    """float32[rows, d], NaN for an empty bag; arguments as for `reduce_sum`."""
    return _reduction(_Mean, _average, id_indices, id_values, rows, native)


def reduce_sqrtn(id_indices: Tensor, id_values: Tensor, rows: int, *, native: bool | None = None) -> Tensor:
    """float32[rows, d], roots of sums of squares; arguments as for `reduce_sum`."""
    return _reduction(_Sqrtn, _root, id_indices, id_values, rows, native)


def fused_reduce_sum_and_split(
    id_indices: Tensor, id_values: Tensor, rows: int, split_dims: Sequence[int], *, native: bool | None = None
) -> tuple[Tensor, ...]:
    """`reduce_sum`, cut into columns of the widths `split_dims`."""
    if id_values.ndim != 2 or id_values.shape[1] != sum(split_dims):
        raise InvalidRequestError(f"rows of shape {tuple(id_values.shape)} are not cut by {list(split_dims)}")
    pieces = torch.split(reduce_sum(id_indices, id_values, rows, native=native), list(split_dims), dim=1)
    return tuple(pieces)


def fused_sorted_segment_sum(
    indices: Sequence[Tensor], values: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, native: bool | None = None
) -> list[Tensor]:
    """Per item float32[shapes[i]]; see `trilith.ops.reduce.fused_sorted_segment_sum`."""
    if not len(indices) == len(values) == len(shapes):
        raise InvalidRequestError(f"{len(indices)} indices, {len(values)} values and {len(shapes)} shapes are no items")
    results = []
    for i, (places, rows, shape) in enumerate(zip(indices, values, shapes, strict=True)):
        if places.ndim != 1 or rows.ndim < 1 or not len(shape):
            raise InvalidRequestError(f"item {i}: indices must be (n,), values and shape have at least one dimension")
        if (places.numel() == 0) != (rows.numel() == 0):
            raise InvalidRequestError(f"item {i}: of indices and values only one is empty")
        if bool((places[1:] < places[:-1]).any()):
            raise InvalidRequestError(f"indices[{i}] do not ascend")
        flat = (
            rows.reshape(places.numel(), -1) if rows.numel() else rows.new_zeros(0, int(torch.Size(shape[1:]).numel()))
        )
        results.append(reduce_sum(places, flat, int(shape[0]), native=native).reshape(tuple(shape)))
    return results


def fused_reduce_and_split(
    row_splits: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    slice_dims: Sequence[Sequence[int]],
    *,
    native: bool | None = None,
) -> list[Tensor]:
    """float32[B, width] piece by piece, table by table; see `trilith.ops.reduce.fused_reduce_and_split`."""
    if not len(row_splits) == len(embeddings) == len(slice_dims):
        raise InvalidRequestError(
            f"{len(row_splits)} row splits, {len(embeddings)} embeddings and {len(slice_dims)} slice dims are no tables"
        )
    if len({len(each) for each in row_splits}) > 1:
        raise InvalidRequestError(f"the tables have {[len(each) - 1 for each in row_splits]} rows, not one number")
    results: list[Tensor] = []
    for splits, rows, dims in zip(row_splits, embeddings, slice_dims, strict=True):
        places = value_rowids(as_splits("row_splits", splits, rows.shape[0], rows.device))
        results += fused_reduce_sum_and_split(places, rows, splits.numel() - 1, dims, native=native)
    return results

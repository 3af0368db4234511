"""`trilith.ops.shared_buffer` for tensors: gradients flow from the buffer to the vectors that filled it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import shared_buffer
from trilith.ops.shared_buffer import SharedBuffer, finalize_shared_tensor
from trilith.ops.torch_bridge import apply, array_of, integers_on, refuse_outside, tensor_of, use_native
from trilith.ops.torch_ragged import as_splits, distinct_in_rows

__all__ = ["UniqueKeyTensors", "fill_with_offset_map", "finalize_shared_tensor", "unique_key_with_value_and_offset"]


class UniqueKeyTensors(NamedTuple):
    """The distinct ids of R tables and where they occur; see `trilith.ops.shared_buffer.UniqueKeys`.

    Attributes:
        unique_key: int64[u].
        unique_key_split: int64[R + 1].
        value_offset: int64[n].
        value_offset_split: int64[u + 1].
        dims: int64[R].
        size: Floats in the buffer.
        value_buffer: None if it was not wanted.
    """

    unique_key: Tensor
    unique_key_split: Tensor
    value_offset: Tensor
    value_offset_split: Tensor
    dims: Tensor
    size: int
    value_buffer: SharedBuffer[Tensor] | None


def unique_key_with_value_and_offset(
    values: Tensor,
    row_splits: Tensor,
    dims: Sequence[int],
    *,
    generate_buffer: bool = True,
    native: bool | None = None,
) -> UniqueKeyTensors:
    """Find the distinct ids of every table, and where in a buffer of all occurrences' vectors they occur.

    Args:
        values: int64[n], ids, table after table.
        row_splits: int64[R + 1] of the ids.
        dims: R floats per vector.
        generate_buffer: Whether to make the buffer.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, values):
        plain = shared_buffer.unique_key_with_value_and_offset(
            array_of(values), array_of(row_splits), dims, generate_buffer=False
        )
        keys = UniqueKeyTensors(
            tensor_of(plain.unique_key),
            tensor_of(plain.unique_key_split),
            tensor_of(plain.value_offset),
            tensor_of(plain.value_offset_split),
            tensor_of(plain.dims),
            plain.size,
            None,
        )
    else:
        keys = _unique(integers_on(values.device, values), row_splits, dims)
    if not generate_buffer:
        return keys
    return keys._replace(value_buffer=SharedBuffer(torch.empty(keys.size, dtype=torch.float32, device=values.device)))


def _unique(ids: Tensor, row_splits: Tensor, dims: Sequence[int]) -> UniqueKeyTensors:
    splits = as_splits("row_splits", row_splits, ids.numel(), ids.device)
    if len(dims) != splits.numel() - 1 or min(dims, default=1) < 1:
        raise InvalidRequestError(
            f"{len(dims)} dims for {splits.numel() - 1} rows of keys, or not all at least 1: {list(dims)}"
        )
    widths = torch.tensor(list(dims), dtype=torch.int64, device=ids.device)
    distinct = distinct_in_rows(ids, splits)
    floats = widths.repeat_interleave(splits.diff())
    begins = floats.cumsum(0) - floats
    offsets = begins[torch.argsort(distinct.numbers, stable=True)]
    ends = distinct.counts.cumsum(0)
    offset_splits = torch.cat([ends.new_zeros(1), ends])
    size = int(floats.sum())
    return UniqueKeyTensors(distinct.values, distinct.row_splits, offsets, offset_splits, widths, size, None)


class _Fill(torch.autograd.Function):
    """Vectors written into the buffer, in place, by the kernel; the others' places are none of its business."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, value: Tensor, pos: Any, pos_splits: Any, keys: Any) -> Tensor:
        ctx.pos, ctx.pos_splits, ctx.keys = pos, pos_splits, keys
        ctx.floats = value.numel()
        view = SharedBuffer(buffer.detach().numpy())
        shared_buffer.fill_with_offset_map(pos, pos_splits, array_of(value), keys._replace(value_buffer=view))
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = shared_buffer.fill_with_offset_map_gradient(ctx.pos, ctx.pos_splits, array_of(grads[0]), ctx.keys)
        whole = np.zeros(ctx.floats, np.float32)
        whole[: summed.size] = summed
        return grads[0], tensor_of(whole), None, None, None


def fill_with_offset_map(
    pos: Tensor, pos_splits: Tensor, value: Tensor, keys: UniqueKeyTensors, *, native: bool | None = None
) -> SharedBuffer[Tensor]:
    """Copy vectors to every place where their ids occur; their gradients are the sums over those places.

    Args:
        pos: int64[m], numbers of distinct ids, table after table.
        pos_splits: int64[R + 1] of `pos`.
        value: float32[...], the vectors of `pos` one after another; more is accepted.
        keys: Whose buffer is filled. Places nobody fills stay uninitialised.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.

    Returns:
        The buffer.
    """
    if keys.value_buffer is None:
        raise InvalidRequestError("the keys were found without a buffer; generate_buffer=True makes one")
    buffer = keys.value_buffer
    if not use_native(native, value, buffer.values):
        plain = shared_buffer.UniqueKeys(
            array_of(keys.unique_key),
            array_of(keys.unique_key_split),
            array_of(keys.value_offset),
            array_of(keys.value_offset_split),
            array_of(keys.dims),
            keys.size,
            None,
        )
        buffer.values = apply(_Fill, buffer.values, value, array_of(pos), array_of(pos_splits), plain)
        return buffer
    places, sources = _places(pos, pos_splits, value, keys)
    buffer.values.index_put_((places,), value.reshape(-1)[sources])
    return buffer


def _places(pos: Tensor, pos_splits: Tensor, value: Tensor, keys: UniqueKeyTensors) -> tuple[Tensor, Tensor]:
    """int64[floats to write] twice: where each goes, and which float of `value` it is."""
    device = keys.value_offset.device
    numbers = integers_on(device, pos)
    splits = as_splits("pos_splits", pos_splits, numbers.numel(), device)
    if splits.numel() != keys.dims.numel() + 1:
        raise InvalidRequestError(f"{splits.numel() - 1} rows of positions for {keys.dims.numel()} dims")
    refuse_outside("pos", numbers, keys.unique_key.numel())
    dims = keys.dims.repeat_interleave(splits.diff())
    if value.numel() < int(dims.sum()):
        raise InvalidRequestError(
            f"value: expected {int(dims.sum())} floats for {numbers.numel()} positions, actual {value.numel()}"
        )
    begins = dims.cumsum(0) - dims
    # One entry for every occurrence of every element, then one for every float of it.
    counts = keys.value_offset_split.diff()[numbers]
    element = torch.arange(numbers.numel(), device=device).repeat_interleave(counts)
    turn = torch.arange(element.numel(), device=device) - (counts.cumsum(0) - counts)[element]
    offsets = keys.value_offset[keys.value_offset_split[numbers[element]] + turn]
    widths = dims[element]
    wide = offsets + widths > keys.size
    if bool(wide.any()):
        raise InvalidRequestError(
            f"pos {int(numbers[element[wide]][0])} is an id of another table with shorter vectors: it would pass the"
            " buffer's end"
        )
    occurrence = torch.arange(element.numel(), device=device).repeat_interleave(widths)
    column = torch.arange(occurrence.numel(), device=device) - (widths.cumsum(0) - widths)[occurrence]
    return offsets[occurrence] + column, begins[element[occurrence]] + column

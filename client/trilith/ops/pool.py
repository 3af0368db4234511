"""Bags of rows combined by a kernel, where nothing is learned: in serving, in data, in layouts of slices.

`trilith.nn.pooling` does the same for tensors whose gradients go back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.combiners import FIRST, MAX, MEAN, SQRTN, Combiner
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, as_index, copy_floats, load_u64
from trilith.ops.vectors import add_plain, set_larger, set_scaled, set_zero

__all__ = ["pool_rows"]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_ONE = np.float32(1.0)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def pool_bags(rows: int, splits: int, bags: int, dim: int, combiner: int, out: int, stride: int) -> None:
    """Make one vector of each bag; zeros of an empty one.

    Args:
        rows: Address of float32[n, dim], bag after bag.
        splits: Address of int64[bags + 1].
        bags: Number of bags.
        dim: Floats per row.
        combiner: SUM, MEAN, SQRTN or MAX.
        out: Address of the first vector, float32[dim], written.
        stride: Bytes from one vector to the next.
    """
    end = as_index(load_u64(splits, 0))
    for bag in range(bags):
        start, end = end, as_index(load_u64(splits, bag + 1))
        target = out + stride * bag
        if end == start:
            set_zero(target, dim)
            continue
        copy_floats(target, rows + 4 * dim * start, dim)
        if end == start + 1:
            continue
        for row in range(start + 1, end):
            if combiner == MAX:
                set_larger(target, rows + 4 * dim * row, dim)
            else:
                add_plain(target, rows + 4 * dim * row, dim)
        count = np.float32(end - start)
        if combiner == MEAN:
            set_scaled(target, target, dim, _ONE / count)
        elif combiner == SQRTN:
            set_scaled(target, target, dim, _ONE / np.sqrt(count))


@kernel("void(int64, int64, int64, int64, int64, int64)")
def place_bags(rows: int, splits: int, bags: int, dim: int, width: int, out: int) -> None:
    """Put the first rows of each bag side by side, zeros behind them.

    Args:
        rows: Address of float32[n, dim], bag after bag.
        splits: Address of int64[bags + 1].
        bags: Number of bags.
        dim: Floats per row.
        width: Rows of the result per bag.
        out: Address of float32[bags, width, dim], written.
    """
    end = as_index(load_u64(splits, 0))
    for bag in range(bags):
        start, end = end, as_index(load_u64(splits, bag + 1))
        target = out + 4 * dim * width * bag
        floats = dim * min(end - start, width)
        copy_floats(target, rows + 4 * dim * start, floats)
        set_zero(target + 4 * floats, dim * width - floats)


def pool_rows(
    rows: Float32Array, splits: Int64Array, combiner: Combiner, out: Float32Array | None = None
) -> Float32Array:
    """Make one vector of each bag of rows; zeros of an empty one.

    Args:
        rows: float32[n, dim], bag after bag, C-contiguous.
        splits: int64[b + 1], C-contiguous, from 0 to n.
        combiner: How.
        out: float32[b, dim], or [b, n, dim] for the first n, written; pooled vectors may lie apart.

    Returns:
        `out`, or a new array of that shape.
    """
    _check(rows, splits)
    bags, dim = splits.size - 1, rows.shape[1]
    shape = bags, *combiner.shape(dim)
    if out is None:
        out = np.empty(shape, np.float32)
    target = out[:1] if bags and combiner.code != FIRST else out
    if out.shape != shape or out.dtype != np.float32 or not target.flags.c_contiguous:
        raise InvalidRequestError(
            f"out is {out.dtype}{list(out.shape)}, expected float32{list(shape)} of whole rows in C order"
        )
    if not out.flags.writeable:
        raise InvalidRequestError("out is read-only")
    if combiner.code == FIRST:
        place_bags(address_of(rows), address_of(splits), bags, dim, combiner.n, address_of(out))
    else:
        pool_bags(address_of(rows), address_of(splits), bags, dim, combiner.code, address_of(out), out.strides[0])
    return out


def _check(rows: Float32Array, splits: Int64Array) -> None:
    """Refuse what the kernels would read wrongly; that splits ascend, the caller knows."""
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous:
        raise InvalidRequestError(f"rows are {rows.dtype}{list(rows.shape)}, expected C-contiguous float32[n, dim]")
    if splits.ndim != 1 or splits.size < 1 or splits.dtype != np.int64 or not splits.flags.c_contiguous:
        raise InvalidRequestError(f"splits are {splits.dtype}{list(splits.shape)}, expected C-contiguous int64[b + 1]")
    if splits[0] != 0 or splits[-1] > len(rows):
        raise InvalidRequestError(f"splits go from {splits[0]} to {splits[-1]}, expected from 0 to at most {len(rows)}")

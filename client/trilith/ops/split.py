"""Splitting rows by a shard number each, order kept; and back, which is the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, as_index, copy_floats, load_u32, load_u64, prefetch, store_u32, store_u64
from trilith.ops.ragged import Int64Array, RaggedArray, as_floats, as_integers, as_splits

__all__ = ["ragged_split_by_indices", "split_by_indices", "split_by_indices_gradient"]

_AHEAD = 16
_U1 = np.uint64(1)


@kernel("int64(int64, int64, int64, int64, int64)")
def place_by_index(indices: int, n: int, splits: int, bounds: int, places: int) -> int:
    """Arrange elements by index, keeping their order within an index.

    Args:
        indices: Address of int64[n].
        n: Number of elements, below 2^32.
        splits: Number of splits.
        bounds: Address of uint64[splits + 2], written: bounds[s]..bounds[s + 1] are the places of split s.
        places: Address of uint32[n], written: the place of each element, a permutation.

    Returns:
        The first element whose index is outside 0..splits - 1; n if there is none.
    """
    for s in range(splits + 2):
        store_u64(bounds, s, np.uint64(0))
    for i in range(n):
        split = load_u64(indices, i)
        if split >= np.uint64(splits):
            return i
        slot = as_index(split) + 2
        store_u64(bounds, slot, load_u64(bounds, slot) + _U1)
    for s in range(2, splits + 2):
        store_u64(bounds, s, load_u64(bounds, s) + load_u64(bounds, s - 1))
    # bounds[s + 1] is now the start of split s and moves to its end.
    for i in range(n):
        slot = as_index(load_u64(indices, i)) + 1
        place = load_u64(bounds, slot)
        store_u64(bounds, slot, place + _U1)
        store_u32(places, i, np.uint32(place))
    return n


@kernel("void(int64, int64, int64, int64, int64)")
def scatter_words(source: int, places: int, n: int, words: int, out: int) -> None:
    """Move row i to its place.

    Args:
        source: Address of n rows.
        places: Address of uint32[n].
        n: Number of rows.
        words: 32-bit words per row.
        out: Address of the rows, written.
    """
    for i in range(n):
        copy_floats(out + 4 * words * as_index(load_u32(places, i)), source + 4 * words * i, words)


@kernel("void(int64, int64, int64, int64, int64)")
def gather_words(source: int, places: int, n: int, words: int, out: int) -> None:
    """Fetch row i from its place.

    Args:
        source: Address of the rows.
        places: Address of uint32[n].
        n: Number of rows.
        words: 32-bit words per row.
        out: Address of n rows, written.
    """
    for i in range(n):
        if i + _AHEAD < n:
            prefetch(source + 4 * words * as_index(load_u32(places, i + _AHEAD)))
        copy_floats(out + 4 * words * i, source + 4 * words * as_index(load_u32(places, i)), words)


def split_by_indices(
    indices: npt.ArrayLike, tensor: npt.NDArray[Any] | Sequence[Any], num_splits: int
) -> list[npt.NDArray[Any]]:
    """Cut rows into splits.

    Args:
        indices: int[n], the split of each row.
        tensor: float32 or int64 [n, ...].
        num_splits: How many splits there are.

    Returns:
        Per split its rows in order, views of one array.
    """
    rows = _rows(tensor)
    places, bounds = _places(indices, rows.shape[0], num_splits)
    out = np.empty_like(rows)
    words = int(np.prod(rows.shape[1:])) * (rows.dtype.itemsize // 4)
    scatter_words(address_of(rows), address_of(places), rows.shape[0], words, address_of(out))
    return [out[bounds[s] : bounds[s + 1]] for s in range(num_splits)]


def split_by_indices_gradient(
    indices: npt.ArrayLike, grads: Sequence[npt.ArrayLike], num_splits: int
) -> npt.NDArray[np.float32]:
    """Bring the gradients of the splits back into the order of the rows.

    Args:
        indices: int[n], as given to `split_by_indices`.
        grads: Per split float32[rows of it, ...]; a split without rows may have any shape without values.
        num_splits: How many splits there are.

    Returns:
        float32[n, ...].
    """
    if len(grads) != num_splits:
        raise InvalidRequestError(f"{len(grads)} gradients for {num_splits} splits")
    wanted = as_integers("indices", indices, shape=(-1,))
    places, bounds = _places(wanted, wanted.size, num_splits)
    arrays = [as_floats(f"grads[{s}]", grad) for s, grad in enumerate(grads)]
    tails = {array.shape[1:] for array in arrays if array.size}
    tails = tails or {array.shape[1:] for array in arrays if array.ndim > 1} or {()}
    if len(tails) > 1:
        raise InvalidRequestError(f"the gradients' rows differ in shape: {sorted(tails)}")
    tail = tails.pop()
    for s, array in enumerate(arrays):
        rows = bounds[s + 1] - bounds[s]
        if (array.shape[0] if array.size else 0) != rows and int(np.prod(tail)):
            raise InvalidRequestError(f"grads[{s}] has {len(array)} rows, split {s} has {rows}")
    together = np.concatenate([np.empty((0, *tail), np.float32), *(array for array in arrays if array.size)])
    out = np.empty((wanted.size, *tail), np.float32)
    gather_words(address_of(together), address_of(places), wanted.size, int(np.prod(tail)), address_of(out))
    return out


def ragged_split_by_indices(
    indices: npt.ArrayLike, values: npt.NDArray[Any] | Sequence[Any], row_splits: npt.ArrayLike, num_splits: int
) -> tuple[list[RaggedArray], list[RaggedArray]]:
    """Cut a ragged array value by value; every split has all its rows.

    Args:
        indices: int[n], the split of each value.
        values: float32 or int64 [n].
        row_splits: int64[rows + 1] of the values.
        num_splits: How many splits there are.

    Returns:
        Per split its values, and their positions among all values.
    """
    flat = _rows(values)
    if flat.ndim != 1:
        raise InvalidRequestError(f"values have shape {flat.shape}, they must be one-dimensional")
    splits = as_splits("row_splits", row_splits, flat.size)
    chosen = as_integers("indices", indices, shape=(flat.size,))
    places, bounds = _places(chosen, flat.size, num_splits)
    moved = np.empty_like(flat)
    scatter_words(address_of(flat), address_of(places), flat.size, flat.dtype.itemsize // 4, address_of(moved))
    positions = np.empty(flat.size, np.int64)
    positions[places] = np.arange(flat.size)
    values_of, positions_of = [], []
    for s in range(num_splits):
        part = slice(bounds[s], bounds[s + 1])
        starts = np.searchsorted(positions[part], splits)
        values_of.append(RaggedArray(moved[part], starts))
        positions_of.append(RaggedArray(positions[part], starts))
    return values_of, positions_of


def _rows(tensor: Any) -> npt.NDArray[Any]:
    array = np.asarray(tensor)
    if array.ndim == 0:
        raise InvalidRequestError("a scalar has no rows to split")
    if array.dtype.kind == "f" and array.dtype.itemsize != 4:
        array = as_floats("tensor", array)
    elif array.dtype.kind in "iu" and array.dtype.itemsize < 4:
        array = array.astype(np.int64)
    elif array.dtype.kind not in "fiu":
        raise InvalidRequestError(f"rows are {array.dtype}, they must be numbers")
    return np.require(array, requirements=("C", "A"))


def _places(indices: npt.ArrayLike, n: int, num_splits: int) -> tuple[npt.NDArray[np.uint32], list[int]]:
    if num_splits < 1:
        raise InvalidRequestError(f"num_splits={num_splits} is below 1")
    wanted: Int64Array = as_integers("indices", indices, shape=(n,))
    places, bounds = np.empty(n, np.uint32), np.empty(num_splits + 2, np.uint64)
    bad = place_by_index(address_of(wanted), n, num_splits, address_of(bounds), address_of(places))
    if bad < n:
        raise InvalidRequestError(f"indices[{bad}]={wanted[bad]} is outside 0..{num_splits - 1}")
    return places, bounds[: num_splits + 1].tolist()

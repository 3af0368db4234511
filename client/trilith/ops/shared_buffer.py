"""One buffer for the vectors of a step: distinct ids with the places they occur at, rows written to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.dedup import FIRST
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import address_of, copy_floats, load_u32, load_u64, store_u64
from trilith.ops.ragged import Int64Array, as_floats, as_integers, as_splits
from trilith.ops.unique import distinct_in_rows
from trilith.ops.vectors import add_plain

__all__ = [
    "SharedBuffer",
    "UniqueKeys",
    "fill_with_offset_map",
    "fill_with_offset_map_gradient",
    "finalize_shared_tensor",
    "finalize_shared_tensor_gradient",
    "unique_key_with_value_and_offset",
]

Float32Array = npt.NDArray[np.float32]

_POSITION = np.uint32(FIRST - 1)


class SharedBuffer:
    """Uninitialised float32[size] that lives for one step: fills write into it, in any order, `finalize` ends it."""

    def __init__(self, values: Float32Array) -> None:
        self.size = values.size
        self._values: Float32Array | None = values

    @property
    def values(self) -> Float32Array:
        """float32[size]."""
        if self._values is None:
            raise InvalidRequestError("the buffer was finalized before; it lives for one step")
        return self._values

    def finalize(self) -> Float32Array:
        """Give the values away."""
        values = self.values
        self._values = None
        return values


class UniqueKeys(NamedTuple):
    """The distinct ids of R tables and where they occur.

    Attributes:
        unique_key: int64[u], table after table, by first occurrence.
        unique_key_split: int64[R + 1] of `unique_key`.
        value_offset: int64[n], id after id where in the buffer the vectors of its occurrences begin, ascending.
        value_offset_split: int64[u + 1] of `value_offset`.
        dims: int64[R], floats per vector.
        size: Floats in the buffer.
        value_buffer: None if it was not wanted.
    """

    unique_key: Int64Array
    unique_key_split: Int64Array
    value_offset: Int64Array
    value_offset_split: Int64Array
    dims: Int64Array
    size: int
    value_buffer: SharedBuffer | None


@inlined
def _index(value: Any) -> int:
    return np.int64(value)  # type: ignore[return-value]


@kernel("void(int64, int64, int64, int64, int64, int64)")
def list_offsets(splits: int, rows: int, dims: int, numbers: int, cursors: int, offsets: int) -> None:
    """List where the occurrences of each distinct id begin.

    Args:
        splits: Address of uint64[rows + 1].
        rows: Number of rows.
        dims: Address of uint64[rows].
        numbers: Address of uint32[n], the number of each occurrence's id.
        cursors: Address of uint64[u]: where the list of each id begins; moved to its end.
        offsets: Address of uint64[n], written.
    """
    at = np.uint64(0)
    for row in range(rows):
        dim = load_u64(dims, row)
        for i in range(_index(load_u64(splits, row)), _index(load_u64(splits, row + 1))):
            number = _index(load_u32(numbers, i) & _POSITION)
            cursor = load_u64(cursors, number)
            store_u64(offsets, _index(cursor), at)
            store_u64(cursors, number, cursor + np.uint64(1))
            at += dim


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def fill_places(
    pos: int, splits: int, rows: int, dims: int, offsets: int, offset_splits: int, values: int, size: int, buffer: int
) -> int:
    """Copy each vector to every place of its id.

    Args:
        pos: Address of uint64[n], numbers of ids.
        splits: Address of uint64[rows + 1] of `pos`.
        rows: Number of rows.
        dims: Address of uint64[rows].
        offsets: Address of uint64[...], places id after id.
        offset_splits: Address of uint64[u + 1].
        values: Address of the vectors, one after another.
        size: Floats in the buffer.
        buffer: Address of float32[size], written.

    Returns:
        The first element of `pos` whose vector would reach past the buffer; -1 if there is none.
    """
    for row in range(rows):
        dim = _index(load_u64(dims, row))
        for i in range(_index(load_u64(splits, row)), _index(load_u64(splits, row + 1))):
            number = _index(load_u64(pos, i))
            for k in range(_index(load_u64(offset_splits, number)), _index(load_u64(offset_splits, number + 1))):
                offset = _index(load_u64(offsets, k))
                if offset + dim > size:
                    return i
                copy_floats(buffer + 4 * offset, values, dim)
            values += 4 * dim
    return -1


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def sum_places(
    pos: int, splits: int, rows: int, dims: int, offsets: int, offset_splits: int, grads: int, size: int, out: int
) -> int:
    """Sum the gradients at every place of an id.

    Args:
        pos: Address of uint64[n], numbers of ids.
        splits: Address of uint64[rows + 1] of `pos`.
        rows: Number of rows.
        dims: Address of uint64[rows].
        offsets: Address of uint64[...], places id after id.
        offset_splits: Address of uint64[u + 1].
        grads: Address of float32[size].
        size: Floats in the buffer.
        out: Address of the sums, zeros, one after another; added to.

    Returns:
        The first element of `pos` whose vector would reach past the buffer; -1 if there is none.
    """
    for row in range(rows):
        dim = _index(load_u64(dims, row))
        for i in range(_index(load_u64(splits, row)), _index(load_u64(splits, row + 1))):
            number = _index(load_u64(pos, i))
            for k in range(_index(load_u64(offset_splits, number)), _index(load_u64(offset_splits, number + 1))):
                offset = _index(load_u64(offsets, k))
                if offset + dim > size:
                    return i
                add_plain(out, grads + 4 * offset, dim)
            out += 4 * dim
    return -1


def unique_key_with_value_and_offset(
    values: npt.ArrayLike, row_splits: npt.ArrayLike, dims: Sequence[int], *, generate_buffer: bool = True
) -> UniqueKeys:
    """Find the distinct ids of every table, and where in a buffer of all occurrences' vectors they occur.

    Args:
        values: int64[n], ids, table after table.
        row_splits: int64[R + 1] of the ids.
        dims: R floats per vector.
        generate_buffer: Whether to make the buffer.
    """
    ids = as_integers("values", values, shape=(-1,))
    splits = as_splits("row_splits", row_splits, ids.size)
    widths = _dims(dims, splits.size - 1, "rows of keys")
    distinct = distinct_in_rows(ids, splits)
    offset_splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(distinct.counts, dtype=np.int64)])
    offsets, cursors = np.empty(ids.size, np.int64), offset_splits[:-1].copy()
    list_offsets(
        address_of(splits),
        widths.size,
        address_of(widths),
        address_of(distinct.numbers),
        address_of(cursors),
        address_of(offsets),
    )
    size = int(widths @ np.diff(splits))
    buffer = SharedBuffer(np.empty(size, np.float32)) if generate_buffer else None
    return UniqueKeys(distinct.values, distinct.row_splits, offsets, offset_splits, widths, size, buffer)


def fill_with_offset_map(
    pos: npt.ArrayLike, pos_splits: npt.ArrayLike, value: npt.ArrayLike, keys: UniqueKeys
) -> SharedBuffer:
    """Copy vectors to every place where their ids occur.

    Args:
        pos: int64[m], numbers of distinct ids, table after table.
        pos_splits: int64[R + 1] of `pos`.
        value: float32[...], the vectors of `pos` one after another; more is accepted.
        keys: Whose buffer is filled. Places nobody fills stay uninitialised.

    Returns:
        The buffer.
    """
    if keys.value_buffer is None:
        raise InvalidRequestError("the keys were found without a buffer; generate_buffer=True makes one")
    numbers, splits, needed = _positions(pos, pos_splits, keys)
    vectors = as_floats("value", value, shape=(-1,))
    if vectors.size < needed:
        raise InvalidRequestError(
            f"value: expected {needed} floats for {numbers.size} positions, actual {vectors.size}"
        )
    bad = fill_places(
        address_of(numbers),
        address_of(splits),
        keys.dims.size,
        address_of(keys.dims),
        address_of(keys.value_offset),
        address_of(keys.value_offset_split),
        address_of(vectors),
        keys.size,
        address_of(keys.value_buffer.values),
    )
    _refuse_wide(bad, numbers)
    return keys.value_buffer


def fill_with_offset_map_gradient(
    pos: npt.ArrayLike, pos_splits: npt.ArrayLike, grad: npt.ArrayLike, keys: UniqueKeys
) -> Float32Array:
    """Sum the buffer's gradient over the places of each id: the gradient of `value` in `fill_with_offset_map`.

    Args:
        pos: int64[m], as given to the fill.
        pos_splits: int64[R + 1] of `pos`.
        grad: float32[size of the buffer].
        keys: What was filled.

    Returns:
        float32[...], per element of `pos` its sum, one after another.
    """
    numbers, splits, needed = _positions(pos, pos_splits, keys)
    grads = as_floats("grad", grad, shape=(keys.size,))
    out = np.zeros(needed, np.float32)
    bad = sum_places(
        address_of(numbers),
        address_of(splits),
        keys.dims.size,
        address_of(keys.dims),
        address_of(keys.value_offset),
        address_of(keys.value_offset_split),
        address_of(grads),
        keys.size,
        address_of(out),
    )
    _refuse_wide(bad, numbers)
    return out


def finalize_shared_tensor(handles: Sequence[SharedBuffer], shape: Sequence[int] = (-1,)) -> Float32Array:
    """Turn a filled buffer into an array, after which it is gone.

    Args:
        handles: The same buffer, as every fill returned it.
        shape: Of the array; one -1 is worked out.
    """
    if not handles or any(handle is not handles[0] for handle in handles):
        raise InvalidRequestError("the handles must be one buffer, repeated")
    try:
        return handles[0].finalize().reshape(tuple(shape))
    except InvalidRequestError:
        raise
    except ValueError as error:
        raise InvalidRequestError(f"{handles[0].size} floats do not have shape {tuple(shape)}: {error}") from None


def finalize_shared_tensor_gradient(handles: int, grad: npt.ArrayLike) -> list[Float32Array]:
    """The gradient of each of `handles` handles: the array's own."""
    array = as_floats("grad", grad)
    return [array] * handles


def _dims(dims: Sequence[int], rows: int, what: str) -> Int64Array:
    widths = as_integers("dims", dims, shape=(-1,))
    if widths.size != rows:
        raise InvalidRequestError(f"{widths.size} dims for {rows} {what}")
    if (widths < 1).any():
        raise InvalidRequestError(f"dims {widths.tolist()} are not all at least 1")
    return widths


def _positions(pos: npt.ArrayLike, pos_splits: npt.ArrayLike, keys: UniqueKeys) -> tuple[Int64Array, Int64Array, int]:
    numbers = as_integers("pos", pos, shape=(-1,))
    splits = as_splits("pos_splits", pos_splits, numbers.size)
    if splits.size - 1 != keys.dims.size:
        raise InvalidRequestError(f"{splits.size - 1} rows of positions for {keys.dims.size} dims")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= keys.unique_key.size):
        bad = int(((numbers < 0) | (numbers >= keys.unique_key.size)).argmax())
        raise InvalidRequestError(
            f"pos[{bad}]={numbers[bad]} is outside 0..{keys.unique_key.size - 1}, the distinct ids"
        )
    return numbers, splits, int(keys.dims @ np.diff(splits))


def _refuse_wide(bad: int, numbers: Int64Array) -> None:
    if bad >= 0:
        raise InvalidRequestError(
            f"pos[{bad}]={numbers[bad]} is an id of another table with shorter vectors: it would pass the buffer's end"
        )

"""One buffer for the vectors of a step: distinct ids with the places they occur at, rows written to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.dedup import FIRST
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import address_of, as_index, copy_floats, load_u32, load_u64, store_u64
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

_A = TypeVar("_A", bound=Any)

_POSITION = np.uint32(FIRST - 1)


class SharedBuffer(Generic[_A]):
    """Uninitialised float32[size] that lives for one step: fills write into it, in any order, `finalize` ends it."""

    def __init__(self, values: _A) -> None:
        self._values: _A | None = values

    @property
    def values(self) -> _A:
        """float32[size]: an array, or a tensor with the history of the fills so far."""
        if self._values is None:
            raise InvalidRequestError("the buffer was finalized before; it lives for one step")
        return self._values

    @values.setter
    def values(self, values: _A) -> None:
        self._values = values

    def finalize(self) -> _A:
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
    value_buffer: SharedBuffer[Float32Array] | None


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
        for i in range(as_index(load_u64(splits, row)), as_index(load_u64(splits, row + 1))):
            number = as_index(load_u32(numbers, i) & _POSITION)
            cursor = load_u64(cursors, number)
            store_u64(offsets, as_index(cursor), at)
            store_u64(cursors, number, cursor + np.uint64(1))
            at += dim


def _over_places(name: str, move: Callable[[int, int, int], None]) -> Any:
    """Make a kernel: `move(vector, place, dim)` for each vector and every place of its id."""

    @kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)", variant=name)
    def run(
        pos: int,
        splits: int,
        rows: int,
        dims: int,
        offsets: int,
        offset_splits: int,
        vectors: int,
        size: int,
        buffer: int,
    ) -> int:
        """Go over vectors and places.

        Args:
            pos: Address of uint64[n], numbers of ids.
            splits: Address of uint64[rows + 1] of `pos`.
            rows: Number of rows.
            dims: Address of uint64[rows].
            offsets: Address of uint64[...], places id after id.
            offset_splits: Address of uint64[u + 1].
            vectors: Address of the vectors, one after another.
            size: Floats in the buffer.
            buffer: Address of float32[size].

        Returns:
            The first element of `pos` whose vector would reach past the buffer; -1 if there is none.
        """
        for row in range(rows):
            dim = as_index(load_u64(dims, row))
            for i in range(as_index(load_u64(splits, row)), as_index(load_u64(splits, row + 1))):
                number = as_index(load_u64(pos, i))
                first, last = load_u64(offset_splits, number), load_u64(offset_splits, number + 1)
                for k in range(as_index(first), as_index(last)):
                    offset = as_index(load_u64(offsets, k))
                    if offset + dim > size:
                        return i
                    move(vectors, buffer + 4 * offset, dim)
                vectors += 4 * dim
        return -1

    return run


@inlined
def _copy_there(vector: int, place: int, dim: int) -> None:
    copy_floats(place, vector, dim)


fill_places = _over_places("fill_places", _copy_there)
"""Copy each vector to every place of its id."""

sum_places = _over_places("sum_places", add_plain)
"""Add what is at every place of an id onto its vector."""


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
) -> SharedBuffer[Float32Array]:
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
    _visit(fill_places, numbers, splits, keys, vectors, keys.value_buffer.values)
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
    _visit(sum_places, numbers, splits, keys, out, grads)
    return out


def finalize_shared_tensor(handles: Sequence[SharedBuffer[_A]], shape: Sequence[int] = (-1,)) -> _A:
    """Turn a filled buffer into an array, or a tensor, after which it is gone.

    Args:
        handles: The same buffer, as every fill returned it.
        shape: Of the array; one -1 is worked out.
    """
    if not handles or any(handle is not handles[0] for handle in handles):
        raise InvalidRequestError("the handles must be one buffer, repeated")
    values = handles[0].finalize()
    try:
        found: _A = values.reshape(tuple(shape))
    except (ValueError, RuntimeError) as error:
        raise InvalidRequestError(f"{len(values)} floats do not have shape {tuple(shape)}: {error}") from None
    return found


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


def _visit(
    run: Any, numbers: Int64Array, splits: Int64Array, keys: UniqueKeys, vectors: Float32Array, buffer: Float32Array
) -> None:
    """Go over vectors and the places of their ids with `fill_places` or `sum_places`."""
    bad = run(
        address_of(numbers),
        address_of(splits),
        keys.dims.size,
        address_of(keys.dims),
        address_of(keys.value_offset),
        address_of(keys.value_offset_split),
        address_of(vectors),
        keys.size,
        address_of(buffer),
    )
    if bad >= 0:
        raise InvalidRequestError(
            f"pos[{bad}]={numbers[bad]} is an id of another table with shorter vectors: it would pass the buffer's end"
        )

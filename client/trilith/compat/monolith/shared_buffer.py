"""One buffer for the vectors of a step: distinct ids with the places they occur at, rows written to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.dedup import FIRST
from trilith.ops.ragged import Int64Array, as_floats, as_integers, as_splits
from trilith.ops.unique import distinct_in_rows

__all__ = [
    "SharedBuffer",
    "UniqueKeys",
    "fill_with_offset_map",
    "fill_with_offset_map_gradient",
    "finalize_shared_tensor",
    "unique_key_with_value_and_offset",
]

Float32Array = npt.NDArray[np.float32]


class SharedBuffer:
    """Uninitialised float32[size] that lives for one step: fills write into it, in any order, `finalize` ends it."""

    def __init__(self, size: int) -> None:
        self._values: Float32Array | None = np.empty(size, np.float32)

    @property
    def values(self) -> Float32Array:
        """float32[size]."""
        if self._values is None:
            raise InvalidRequestError("the buffer was finalized before; it lives for one step")
        return self._values

    def finalize(self) -> Float32Array:
        """Give the values away."""
        values, self._values = self.values, None
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
    widths = as_integers("dims", dims, shape=(-1,))
    if widths.size != splits.size - 1:
        raise InvalidRequestError(f"{widths.size} dims for {splits.size - 1} rows of keys")
    if (widths < 1).any():
        raise InvalidRequestError(f"dims {widths.tolist()} are not all at least 1")
    distinct = distinct_in_rows(ids, splits)
    each = np.repeat(widths, np.diff(splits))
    order = np.argsort(distinct.numbers & np.uint32(FIRST - 1), kind="stable")
    return UniqueKeys(
        distinct.values,
        distinct.row_splits,
        (np.cumsum(each) - each)[order],
        np.concatenate([np.zeros(1, np.int64), np.cumsum(distinct.counts, dtype=np.int64)]),
        widths,
        int(each.sum()),
        SharedBuffer(int(each.sum())) if generate_buffer else None,
    )


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
    vectors = as_floats("value", value, shape=(-1,))
    needed, tables = _tables(pos, pos_splits, keys)
    if vectors.size < needed:
        raise InvalidRequestError(
            f"value: expected {needed} floats for {np.size(pos)} positions, actual {vectors.size}"
        )
    for part, dim, vector, places in tables:
        keys.value_buffer.values[places] = vectors[part].reshape(-1, dim)[vector]
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
    grads = as_floats("grad", grad, shape=(keys.size,))
    needed, tables = _tables(pos, pos_splits, keys)
    out = np.zeros(needed, np.float32)
    for part, dim, vector, places in tables:
        np.add.at(out[part].reshape(-1, dim), vector, grads[places])
    return out


def finalize_shared_tensor(handles: Sequence[SharedBuffer], shape: Sequence[int] = (-1,)) -> Float32Array:
    """Turn a filled buffer into an array, after which it is gone.

    Args:
        handles: The same buffer, as every fill returned it.
        shape: Of the array; one -1 is worked out.
    """
    if not handles or any(handle is not handles[0] for handle in handles):
        raise InvalidRequestError("the handles must be one buffer, repeated")
    values = handles[0].finalize()
    try:
        return values.reshape(tuple(shape))
    except ValueError as error:
        raise InvalidRequestError(f"{len(values)} floats do not have shape {tuple(shape)}: {error}") from None


def _tables(
    pos: npt.ArrayLike, pos_splits: npt.ArrayLike, keys: UniqueKeys
) -> tuple[int, Iterator[tuple[slice, int, Int64Array, Int64Array]]]:
    """The floats that `pos` stands for; per table their part, floats per vector, which vector, and where it goes."""
    numbers = as_integers("pos", pos, shape=(-1,))
    splits = as_splits("pos_splits", pos_splits, numbers.size)
    if splits.size - 1 != keys.dims.size:
        raise InvalidRequestError(f"{splits.size - 1} rows of positions for {keys.dims.size} dims")
    outside = (numbers < 0) | (numbers >= keys.unique_key.size)
    if outside.any():
        bad = int(outside.argmax())
        raise InvalidRequestError(
            f"pos[{bad}]={numbers[bad]} is outside 0..{keys.unique_key.size - 1}, the distinct ids"
        )
    ends = np.cumsum(keys.dims * np.diff(splits))

    def walk() -> Iterator[tuple[slice, int, Int64Array, Int64Array]]:
        for table, dim in enumerate(keys.dims.tolist()):
            chosen = numbers[splits[table] : splits[table + 1]]
            firsts = keys.value_offset_split[chosen]
            counts = keys.value_offset_split[chosen + 1] - firsts
            vector = np.repeat(np.arange(chosen.size), counts)
            place = np.arange(vector.size) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
            offsets = keys.value_offset[place]
            if offsets.size and offsets.max() + dim > keys.size:
                bad = int(chosen[vector[offsets.argmax()]])
                raise InvalidRequestError(
                    f"pos {bad} is an id of another table with shorter vectors: it would pass the buffer's end"
                )
            part = slice(int(ends[table] - dim * chosen.size), int(ends[table]))
            yield part, dim, vector, offsets[:, None] + np.arange(dim)

    return int(ends[-1]) if ends.size else 0, walk()

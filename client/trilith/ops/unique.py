"""Distinct values of ragged rows, in order of first occurrence: what occurs where, and how often."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.ops.dedup import FIRST, GROUP, find_distinct
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import address_of, as_index, load_u32, load_u64, store_u32, store_u64
from trilith.ops.ragged import Int64Array

__all__ = ["Distinct", "distinct_in_rows", "slot_count"]

_POSITION = np.uint32(FIRST - 1)
_FIRST = np.uint32(FIRST)


class Distinct(NamedTuple):
    """The distinct values of every row.

    Attributes:
        values: int64[u], row after row, within a row by first occurrence.
        row_splits: int64[rows + 1] of `values`.
        numbers: uint32[n], per input value its place in `values`, plus `FIRST` where it occurs first.
        counts: uint32[u], occurrences of each.
    """

    values: Int64Array
    row_splits: Int64Array
    numbers: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.uint32]


@inlined
def slot_count(n: int) -> int:
    """Slots of a hash table for n values: a power of two, at most half of them used, so that few values collide."""
    size = 4
    while size < 2 * n:
        size *= 2
    return size


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def find_distinct_in_rows(
    values: int, splits: int, rows: int, slots: int, uniques: int, unique_splits: int, numbers: int, counts: int
) -> int:
    """Give every distinct value of every row a number, counting through the rows.

    Args:
        values: Address of uint64[n].
        splits: Address of uint64[rows + 1].
        rows: Number of rows.
        slots: Address of uint32[s + GROUP], written: scratch; s is `slot_count` of the longest row.
        uniques: Address of uint64[n], written: the distinct values.
        unique_splits: Address of uint64[rows + 1], written.
        numbers: Address of uint32[n], written: per value its number, plus FIRST where it occurs first in its row.
        counts: Address of uint32[n], written: occurrences of each distinct value.

    Returns:
        How many distinct values there are.
    """
    found = 0
    for row in range(rows):
        store_u64(unique_splits, row, np.uint64(found))
        start, end = as_index(load_u64(splits, row)), as_index(load_u64(splits, row + 1))
        distinct = find_distinct(
            values + 8 * start,
            end - start,
            slots,
            slot_count(end - start) - 1,
            uniques + 8 * found,
            numbers + 4 * start,
        )
        for i in range(start, end):
            number = load_u32(numbers, i)
            place = np.uint32((number & _POSITION) + np.uint32(found))
            before = load_u32(counts, as_index(place)) if number & _FIRST == 0 else np.uint32(0)
            store_u32(counts, as_index(place), np.uint32(before + np.uint32(1)))
            store_u32(numbers, i, np.uint32(place | (number & _FIRST)))
        found += distinct
    store_u64(unique_splits, rows, np.uint64(found))
    return found


def distinct_in_rows(values: Int64Array, row_splits: Int64Array) -> Distinct:
    """Find the distinct values of every row.

    Args:
        values: int64[n], n below 2^31.
        row_splits: int64[rows + 1], checked.
    """
    n, rows = values.size, row_splits.size - 1
    longest = int(np.diff(row_splits).max(initial=0))
    slots = np.empty(slot_count(longest) + GROUP, np.uint32)
    uniques, numbers, counts = np.empty(n, np.int64), np.empty(n, np.uint32), np.empty(n, np.uint32)
    splits = np.empty(rows + 1, np.int64)
    found = find_distinct_in_rows(
        address_of(values),
        address_of(row_splits),
        rows,
        address_of(slots),
        address_of(uniques),
        address_of(splits),
        address_of(numbers),
        address_of(counts),
    )
    return Distinct(uniques[:found], splits, numbers, counts[:found])

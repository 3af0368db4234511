"""Kernels of the sample ops: which rows of a ragged column hold wanted ids, and how strings compare with operands.

A ragged column is values and int64 row splits. Ids are compared as bit patterns (uint64), so signed and unsigned
columns share the kernels. Whoever calls passes addresses and keeps the arrays alive.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u8, load_u64, store_u8, store_u64

__all__ = ["best_ranks", "count_matches", "match_affixes", "rank_strings"]

# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


@inlined
def _find(wanted: int, m: int, value: np.uint64) -> int:
    """Index of `value` in the ascending uint64[m] at `wanted`, -1 if it is not there."""
    if m == 0 or value < load_u64(wanted, 0) or value > load_u64(wanted, m - 1):
        return -1
    low, high = 0, m
    while low < high:
        middle = (low + high) // 2
        if load_u64(wanted, middle) < value:
            low = middle + 1
        else:
            high = middle
    return low if load_u64(wanted, low) == value else -1


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def count_matches(columns: int, k: int, rows: int, wanted: int, m: int, seen: int, counts: int) -> None:
    """Count how many distinct wanted ids each row holds, in all its columns together.

    Args:
        columns: Address of uint64[k, 4], per column the address of its values (uint64), that of its splits
            (int64[rows + 1]), and which bits of a value are the id: (value >> shift) & mask.
        k: Number of columns.
        rows: Number of rows.
        wanted: Address of uint64[m], ascending and unique.
        m: Number of wanted ids.
        seen: Address of int64[m], zeros; written.
        counts: Address of int64[rows], written.
    """
    for row in range(rows):
        count = 0
        for column in range(k):
            values = _int64(load_u64(columns, 4 * column))
            splits = _int64(load_u64(columns, 4 * column + 1))
            shift, mask = load_u64(columns, 4 * column + 2), load_u64(columns, 4 * column + 3)
            for i in range(_int64(load_u64(splits, row)), _int64(load_u64(splits, row + 1))):
                place = _find(wanted, m, (load_u64(values, i) >> shift) & mask)
                if place >= 0 and _int64(load_u64(seen, place)) != row + 1:
                    store_u64(seen, place, np.uint64(row + 1))
                    count += 1
        store_u64(counts, row, np.uint64(count))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def best_ranks(values: int, splits: int, rows: int, listed: int, ranks: int, m: int, best: int, where: int) -> None:
    """Find the best-ranked value of each row.

    Args:
        values: Address of uint64[splits[rows]].
        splits: Address of int64[rows + 1].
        rows: Number of rows.
        listed: Address of uint64[m], ascending and unique: the values that have a rank.
        ranks: Address of int64[m], each below m: their ranks; 0 is the best.
        m: Number of ranked values.
        best: Address of int64[rows], written: the smallest rank of a row's values, m if none has a rank.
        where: Address of int64[rows], written: index into `values` of the first value with it, or of the row's first
            value if none has a rank.
    """
    for row in range(rows):
        start = _int64(load_u64(splits, row))
        found, place = m, start
        for i in range(start, _int64(load_u64(splits, row + 1))):
            at = _find(listed, m, load_u64(values, i))
            if at >= 0 and _int64(load_u64(ranks, at)) < found:
                found, place = _int64(load_u64(ranks, at)), i
        store_u64(best, row, np.uint64(found))
        store_u64(where, row, np.uint64(place))


@inlined
def _compare(left: int, left_size: int, right: int, right_size: int) -> int:
    """Below, equal to or above zero, as the bytes at `left` sort against those at `right`."""
    for i in range(min(left_size, right_size)):
        a, b = load_u8(left, i), load_u8(right, i)
        if a != b:
            return -1 if a < b else 1
    return left_size - right_size


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def rank_strings(
    data: int, starts: int, sizes: int, rows: int, operands: int, bounds: int, m: int, below: int, equal: int
) -> None:
    """Place strings among sorted operands, bytewise.

    Args:
        data: Address that `starts` count from.
        starts: Address of int64[rows], where each string begins.
        sizes: Address of int64[rows], bytes of each string.
        rows: Number of strings.
        operands: Address of the operands' bytes, one behind another, ascending and unique.
        bounds: Address of int64[m + 1], where each operand begins.
        m: Number of operands.
        below: Address of int64[rows], written: how many operands sort before the string.
        equal: Address of uint8[rows], written: 1 where the string is an operand.
    """
    for row in range(rows):
        string, size = data + _int64(load_u64(starts, row)), _int64(load_u64(sizes, row))
        low, high = 0, m
        same = np.uint8(0)
        while low < high:
            middle = (low + high) // 2
            begin = _int64(load_u64(bounds, middle))
            order = _compare(operands + begin, _int64(load_u64(bounds, middle + 1)) - begin, string, size)
            if order == 0:
                same = np.uint8(1)
            if order < 0:
                low = middle + 1
            else:
                high = middle
        store_u64(below, row, np.uint64(low))
        store_u8(equal, row, same)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def match_affixes(
    data: int, starts: int, sizes: int, rows: int, operands: int, bounds: int, m: int, at_end: int, out: int
) -> None:
    """Say which strings begin or end with one of the operands.

    Args:
        data: Address that `starts` count from.
        starts: Address of int64[rows], where each string begins.
        sizes: Address of int64[rows], bytes of each string.
        rows: Number of strings.
        operands: Address of the operands' bytes, one behind another.
        bounds: Address of int64[m + 1], where each operand begins.
        m: Number of operands.
        at_end: 1 to compare ends, 0 to compare beginnings.
        out: Address of uint8[rows], written: 1 where an operand matches; the empty one always does.
    """
    for row in range(rows):
        string, size = data + _int64(load_u64(starts, row)), _int64(load_u64(sizes, row))
        found = np.uint8(0)
        for k in range(m):
            begin = _int64(load_u64(bounds, k))
            length = _int64(load_u64(bounds, k + 1)) - begin
            if length <= size and _compare(string + (size - length) * at_end, length, operands + begin, length) == 0:
                found = np.uint8(1)
                break
        store_u8(out, row, found)

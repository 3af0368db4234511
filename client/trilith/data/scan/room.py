"""Memory for what a scan finds: of about the right size for every column."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from trilith.data.blocks import Blocks
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, load_f32, load_u64, store_f32, store_u64

__all__ = ["Room", "lay_out", "settle"]

_FIRST_GUESS = 4
_MARGIN = 1.08
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


class Room:
    """Gives columns memory for as many values per row as the last scan found. Any number of threads may ask.

    Args:
        widths: int64[columns], bytes of a value.
    """

    def __init__(self, widths: npt.NDArray[np.int64]) -> None:
        self._widths = widths
        self._expected = np.full(widths.size, _FIRST_GUESS, np.float32)
        self._blocks = Blocks()

    def take(self, rows: int, most: int, head: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Memory for a scan.

        Args:
            rows: Rows that there are.
            most: Values that no column exceeds.
            head: Bytes in front of the first column.

        Returns:
            The memory, content undefined; and int64[3, columns], of each column how many values it has room for, its
            address, and its place in the memory, in values.
        """
        columns = np.empty((3, self._widths.size), np.int64)
        size = lay_out(
            address_of(self._expected),
            address_of(self._widths),
            self._widths.size,
            max(rows, 1),
            most,
            head,
            address_of(columns),
        )
        memory = self._blocks.take(size)
        columns[1] += address_of(memory)
        return memory, columns

    def fits(self, counts: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], rows: int) -> bool:
        """Whether columns had room for all values; what is taken next has room for as many.

        Args:
            counts: int64[columns or more], values that were found.
            columns: What `take` gave.
            rows: Rows that there are.
        """
        return settle(
            address_of(counts), address_of(columns), self._widths.size, max(rows, 1), address_of(self._expected)
        )

    def keep(self, memory: npt.NDArray[np.uint8]) -> None:
        """Give memory again when no result of a scan holds it any more."""
        self._blocks.keep(memory)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def lay_out(expected: int, widths: int, columns: int, rows: int, most: int, head: int, out: int) -> int:
    """Place columns one behind another, each at a multiple of 64 bytes and with 64 bytes behind it.

    Args:
        expected: Address of float32[columns], values of a row.
        widths: Address of int64[columns], bytes of a value.
        columns: How many.
        rows: At least 1.
        most: Values that no column exceeds.
        head: Bytes in front of the first column.
        out: Address of int64[3, columns], written: capacities, places in bytes, places in values.

    Returns:
        Bytes of everything.
    """
    at = (head + 63) & ~63
    for c in range(columns):
        width = _int64(load_u64(widths, c))
        capacity = min(_int64(load_f32(expected, c) * rows * _MARGIN), most) + 8
        store_u64(out, c, np.uint64(capacity))
        store_u64(out, columns + c, np.uint64(at))
        store_u64(out, 2 * columns + c, np.uint64(at // width))
        at += (capacity * width + 127) & ~63
    return at


@kernel("boolean(int64, int64, int64, int64, int64)")
def settle(counts: int, capacities: int, columns: int, rows: int, expected: int) -> bool:
    """Remember how many values a row has; whether no column has more than its capacity.

    Args:
        counts: Address of int64[columns].
        capacities: Address of int64[columns].
        columns: How many.
        rows: At least 1.
        expected: Address of float32[columns], written.
    """
    fits = True
    for c in range(columns):
        count = _int64(load_u64(counts, c))
        fits = fits and count <= _int64(load_u64(capacities, c))
        store_f32(expected, c, np.float32(count / rows))
    return fits

"""Rows added onto the rows they belong to: the walk under sums, squares, products and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, as_index, load_u64, prefetch
from trilith.ops.ragged import Int64Array, as_floats, as_integers
from trilith.ops.vectors import add_plain, add_squares, set_product

__all__ = ["add_rows_at", "add_squares_at", "check_rows", "multiply_rows_at", "sum_rows_at"]

_AHEAD = 16


def _over_rows(name: str, step: Callable[[int, int, int], None], *, back: bool = False) -> Any:
    """Make a kernel: for every row i, `step` from row i onto row rows[i], or `back` from there onto row i."""

    @kernel("void(int64, int64, int64, int64, int64)", variant=name)
    def run(rows: int, n: int, own: int, dim: int, others: int) -> None:
        """Go over rows.

        Args:
            rows: Address of uint64[n].
            n: Number of rows.
            own: Address of float32[n, dim].
            dim: Floats per row.
            others: Address of float32[any, dim], the rows that `rows` counts.
        """
        for i in range(n):
            if i + _AHEAD < n:
                address = others + 4 * dim * as_index(load_u64(rows, i + _AHEAD))
                for line in range(0, 4 * dim, 64):
                    prefetch(address + line)
            other = others + 4 * dim * as_index(load_u64(rows, i))
            if back:
                step(own + 4 * dim * i, other, dim)
            else:
                step(other, own + 4 * dim * i, dim)

    return run


add_rows_at = _over_rows("add_rows_at", add_plain)
"""Add each row of `own` onto the row it belongs to."""

add_squares_at = _over_rows("add_squares_at", add_squares)
"""Add the squares of each row of `own` onto the row it belongs to."""

multiply_rows_at = _over_rows("multiply_rows_at", set_product, back=True)
"""Multiply each row of `own` by the row it belongs to."""


def check_rows(places: Int64Array, rows: int) -> None:
    """Raise for a place outside 0..rows - 1."""
    if places.size and (places.min() < 0 or places.max() >= rows):
        bad = int(((places < 0) | (places >= rows)).argmax())
        raise InvalidRequestError(f"row {places[bad]} is outside 0..{rows - 1}")


def sum_rows_at(rows: npt.ArrayLike, values: npt.ArrayLike, count: int) -> npt.NDArray[np.float32]:
    """Zeros, float32[count, d], onto whose row rows[i] the row values[i] is added.

    Args:
        rows: int64 of any shape, in 0..count - 1.
        values: float32[*rows.shape, d].
        count: Number of rows of the result.
    """
    places, grads = as_integers("rows", rows).reshape(-1), as_floats("values", values)
    check_rows(places, count)
    dim = grads.shape[-1]
    out = np.zeros((count, dim), np.float32)
    add_rows_at(address_of(places), places.size, address_of(grads), dim, address_of(out))
    return out

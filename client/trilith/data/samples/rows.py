"""Ragged rows, vectorised: one position of every row, rows with values behind them, priorities of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.samples.kernels import best_ranks
from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.ops.ragged import Ragged

__all__ = [
    "INVALID_LABEL",
    "Priorities",
    "appended",
    "at",
    "integers",
    "joined",
    "matrix_rows",
    "with_first",
]

INVALID_LABEL = np.finfo(np.float32).min
"""Lowest finite float32: a label that says nothing."""

Int64Array = npt.NDArray[np.int64]


def at(rows: Ragged[Any], index: int, missing: Any) -> npt.NDArray[Any]:
    """[n]: value `index` of every row, `missing` where a row is too short."""
    found = np.full(len(rows.row_splits) - 1, missing, rows.values.dtype)
    long = rows.lengths > index
    found[long] = rows.values[rows.row_splits[:-1][long] + index]
    return found


def with_first(rows: Ragged[Any], values: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> Ragged[Any]:
    """The rows with `values[i]` as their first value where `where[i]`; empty rows stay empty."""
    changed = rows.values.copy()
    where = where & (rows.lengths > 0)
    changed[rows.row_splits[:-1][where]] = values[where]
    return Ragged(changed, rows.row_splits)


def appended(rows: Ragged[Any], matrix: npt.NDArray[Any], where: npt.NDArray[np.bool_] | None = None) -> Ragged[Any]:
    """The rows with the rows of `matrix` behind them.

    Args:
        rows: n rows.
        matrix: [n, k].
        where: bool[n], which rows grow; all by default.
    """
    if where is None:
        return joined(rows, matrix_rows(matrix))
    return joined(rows, Ragged.of_lengths(matrix[where].ravel(), where * np.int64(matrix.shape[1])))


def joined(left: Ragged[Any], right: Ragged[Any]) -> Ragged[Any]:
    """Row by row the values of `left`, then those of `right`."""
    lengths = left.lengths + right.lengths
    ends = np.cumsum(lengths)
    values = np.empty(int(lengths.sum()), np.result_type(left.values, right.values))
    starts = ends - lengths
    for rows, places in ((left, starts), (right, starts + left.lengths)):
        used = np.arange(rows.row_splits[0], rows.row_splits[-1])
        values[used + np.repeat(places - rows.row_splits[:-1], rows.lengths)] = rows.values[used]
    return Ragged.of_lengths(values, lengths)


def matrix_rows(matrix: npt.NDArray[Any]) -> Ragged[Any]:
    """The n rows of a matrix [n, k] of any dtype, each k long."""
    n, width = matrix.shape
    return Ragged(matrix.ravel(), np.arange(n + 1) * width)


class Priorities:
    """An order of preference among integers, the first being the best.

    Args:
        listed: The integers; of repeats the first counts.
    """

    def __init__(self, listed: Sequence[int]) -> None:
        distinct = np.array(list(dict.fromkeys(listed)), np.int64)
        order = np.argsort(distinct.view(np.uint64))
        self._count = distinct.size
        self._values = np.ascontiguousarray(distinct[order])
        self._ranks = np.ascontiguousarray(order, np.int64)

    @classmethod
    def parse(cls, text: str, name: str) -> Priorities:
        """Of a text such as "2,7,0".

        Args:
            text: Integers with commas between them.
            name: Of the argument, for messages.
        """
        return cls(integers(text, name))

    def __len__(self) -> int:
        return self._count

    @property
    def listed(self) -> Int64Array:
        """int64[len(self)]: the integers that have a priority."""
        return self._values

    def best(self, rows: Ragged[Any]) -> tuple[Int64Array, Int64Array]:
        """The best listed value of every row.

        Args:
            rows: n rows of integers.

        Returns:
            int64[n], its rank from 0, `len(self)` where no value of a row is listed; and int64[n], the value itself, in
            that case the row's first, and 0 for an empty row.
        """
        n = len(rows.row_splits) - 1
        values = np.ascontiguousarray(rows.values, np.int64)
        splits = np.ascontiguousarray(rows.row_splits, np.int64)
        ranks, where = np.empty(n, np.int64), np.empty(n, np.int64)
        best_ranks(
            address_of(values),
            address_of(splits),
            n,
            address_of(self._values),
            address_of(self._ranks),
            self._count,
            address_of(ranks),
            address_of(where),
        )
        chosen = np.zeros(n, np.int64)
        filled = np.diff(splits) > 0
        chosen[filled] = values[where[filled]]
        return ranks, chosen


def integers(text: str, name: str) -> list[int]:
    """The integers of a text such as "2,7,0"; blanks and empty parts are skipped.

    Args:
        text: To read.
        name: Of the argument, for messages.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequestError(f"{name} is {text!r}; it must be integers with commas between them") from None

"""New values of fields as the tables of the kernels that write records."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import LineField, Wire
from trilith.data.records import PADDING
from trilith.data.scan.result import Scalars
from trilith.data.scan.schema import LINE_NUMBERS
from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.ops.ragged import Ragged

__all__ = ["Changes", "Column"]

Column = npt.NDArray[Any] | Scalars | Ragged[Any]
"""New values: an array or `Scalars` with one value per record, or a `Ragged` for a list."""


class Changes:
    """New fields as the tables of the kernels; keeps the arrays that the tables point to.

    Args:
        rows: Records that get them.

    Attributes:
        drop_top: uint8[128]: 1 for fields of the message that are replaced.
        drop_line: uint8[256]: 1 for fields of LineId that are.
        top: New fields of the message, as for `encode.put_fields`.
        line: New fields of LineId.
        room: int64[rows], bytes that the new fields of each record take at most.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.drop_top = np.zeros(128, np.uint8)
        self.drop_line = np.zeros(LINE_NUMBERS, np.uint8)
        self.top: list[list[int]] = []
        self.line: list[list[int]] = []
        self.room = np.full(rows, 32, np.int64)
        self._kept: list[npt.NDArray[Any]] = []

    def add_line(self, about: LineField, values: Column) -> None:
        """Replace a field of LineId."""
        if isinstance(values, Ragged) != about.repeated:
            wanted = "a Ragged: it is a list" if about.repeated else "one value per record: it is no list"
            raise InvalidRequestError(f"LineId.{about.name} takes {wanted}")
        if about.number >= LINE_NUMBERS:
            raise InvalidRequestError(f"LineId.{about.name} has number {about.number}; those below 256 are known")
        self.drop_line[about.number] = 1
        what = f"LineId.{about.name}"
        self.line.append(self.field(about.number, about.wire, about.dtype, values, about.packed, what))

    def add_top(
        self, number: int, wire: Wire, dtype: np.dtype[Any], values: Column, *, packed: bool, what: str
    ) -> None:
        """Replace a field of the message."""
        self.drop_top[number] = 1
        self.top.append(self.field(number, wire, dtype, values, packed, what))

    def field(
        self, number: int, wire: Wire, dtype: np.dtype[Any], values: Column, packed: bool, what: str
    ) -> list[int]:
        """A row of a table: a field of any message."""
        rows = len(values.values) if isinstance(values, Scalars) else len(values)
        if rows != self.rows:
            raise InvalidRequestError(f"{what}: {rows} rows of new values for {self.rows} records")
        splits = flags = 0
        if isinstance(values, Ragged):
            row_splits = self.keep(np.ascontiguousarray(values.row_splits, np.int64))
            if row_splits[0] or row_splits[-1] > len(values.values) or bool((np.diff(row_splits) < 0).any()):
                raise InvalidRequestError(f"{what}: row_splits do not rise from 0 to the number of values")
            splits = address_of(row_splits)
            flat, sizes = self._encoded(wire, dtype, values.values)
            together = np.concatenate([[0], np.cumsum(sizes)])
            self.room += 16 + np.diff(together[row_splits])
        else:
            if isinstance(values, Scalars):
                flags = address_of(self.keep(np.ascontiguousarray(values.present).view(np.uint8)))
                values = values.values
            flat, sizes = self._encoded(wire, dtype, values)
            self.room += sizes
        return [number, int(wire), address_of(flat), splits, flags, int(packed)]

    def keep(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Have an array live as long as the tables."""
        self._kept.append(array)
        return array

    def _encoded(
        self, wire: Wire, dtype: np.dtype[Any], values: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Values as the kernel takes them, and how many bytes each may need."""
        if wire is Wire.BYTES:
            strings = [each.encode() if isinstance(each, str) else each for each in values]
            lengths = np.fromiter(map(len, strings), np.int64, len(strings))
            text = self.keep(np.frombuffer(b"".join((*strings, bytes(PADDING))), np.uint8))
            ends = np.cumsum(lengths)
            spans = np.stack([address_of(text) + ends - lengths, lengths], axis=1)
            return self.keep(np.ascontiguousarray(spans)), lengths + 16
        typed = np.asarray(values)
        if wire in (Wire.FIXED32, Wire.FIXED64):
            flat = typed.astype(dtype, copy=False)
        elif wire is Wire.ZIGZAG:
            signed = typed.astype(np.int64)
            flat = (signed << 1) ^ (signed >> 63)
        else:
            flat = typed.astype(np.uint64 if typed.dtype == np.uint64 else np.int64)
        return self.keep(np.ascontiguousarray(flat)), np.full(len(typed), 16, np.int64)

"""What a scan of records found, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.records import Records
from trilith.ops.ragged import Ragged

__all__ = ["Scalars", "Scan", "byte_strings"]


@dataclass(slots=True, eq=False)
class Scan:
    """What one scan found.

    Attributes:
        records: The records that were read: all of them, or without those that were skipped.
        text: uint8[size], the buffer that spans of byte strings are of.
        skipped: How many records were skipped.
        splits: Per column int64[rows + 1].
        values: Per column its values; spans int64[m, 2] of (offset in `text`, length) for byte strings.
        cells: uint64[cells, rows].
        present: uint8[cells, rows].
        seen: uint8[rows, names].
    """

    records: Records
    text: npt.NDArray[np.uint8]
    skipped: int
    splits: list[npt.NDArray[np.int64]]
    values: list[npt.NDArray[Any]]
    cells: npt.NDArray[np.uint64]
    present: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.uint8]

    def take(self, rows: npt.NDArray[np.bool_]) -> Scan:
        """Some of the rows, by a mask."""
        parts = [Ragged(*each).take(rows) for each in zip(self.values, self.splits, strict=True)]
        return Scan(
            records=self.records.take(rows),
            text=self.text,
            skipped=self.skipped + int(rows.size - rows.sum()),
            splits=[part.row_splits for part in parts],
            values=[part.values for part in parts],
            cells=self.cells[:, rows],
            present=self.present[:, rows],
            seen=self.seen[rows],
        )

    def strings(self, column: int) -> npt.NDArray[np.object_]:
        """object[m]: the byte strings of a column."""
        spans = self.values[column]
        return byte_strings(self.text, spans[:, 0], spans[:, 1])


def byte_strings(
    text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.object_]:
    """object[m] of bytes: pieces of a buffer."""
    data = text.data
    out = np.empty(len(starts), np.object_)
    out[:] = [bytes(data[s : s + n]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Scalars:
    """One scalar field of all records.

    Attributes:
        values: [rows]; the field's default where it is unset.
        present: bool[rows], whether it is set.
    """

    values: npt.NDArray[Any]
    present: npt.NDArray[np.bool_]

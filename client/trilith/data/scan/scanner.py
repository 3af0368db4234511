"""Runs a scan: memory of about the right size, another pass where it was too small, odd records set right, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.records import PADDING, Kind, Records
from trilith.data.scan.examples import scan_examples
from trilith.data.scan.instances import scan_instances
from trilith.data.scan.plan import BLOCK_ROWS, Slot
from trilith.data.scan.schema import Fields, Schema
from trilith.data.scan.wire import CODES
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of

__all__ = ["OnError", "Scan", "Scanner", "bounds_of", "byte_strings", "damage", "replace_payloads", "scanner"]

OnError: TypeAlias = Literal["raise", "skip"]

_KERNELS: dict[Kind, Callable[[int], int]] = {Kind.INSTANCE: scan_instances, Kind.EXAMPLE: scan_examples}
_MARGIN = 1.08
_FIRST_GUESS = 4
_MAX_LENGTH = 2**31 - 1


@dataclass(slots=True, eq=False)
class Scan:
    """What one scan found.

    Attributes:
        records: The records that were read: all of them, or without those that were skipped.
        skipped: How many records were skipped.
        splits: int64[columns, rows + 1].
        values: Per column its values; spans int64[m, 2] of (offset in the buffer, length) for byte strings.
        cells: uint64[cells, rows].
        present: uint8[cells, rows].
        seen: uint8[rows, names].
    """

    records: Records
    skipped: int
    splits: npt.NDArray[np.int64]
    values: list[npt.NDArray[Any]]
    cells: npt.NDArray[np.uint64]
    present: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.uint8]

    def strings(self, column: int) -> npt.NDArray[np.object_]:
        """object[m]: the byte strings of a column."""
        spans = self.values[column]
        return byte_strings(self.records, spans[:, 0], spans[:, 1])


def byte_strings(
    records: Records, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.object_]:
    """object[m] of bytes: pieces of the buffer."""
    data = records.buffer.data
    out = np.empty(len(starts), np.object_)
    out[:] = [bytes(data[s : s + n]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return out


class Scanner:
    """Reads records of one kind into columns.

    Remembers how many values a record has, so that the next chunk finds memory of about the right size. Any number of
    threads may scan at once.
    """

    def __init__(self, kind: Kind, fields: Fields) -> None:
        self.schema = Schema(kind, fields)
        self._mean = np.full(len(self.schema.columns), float(_FIRST_GUESS))

    def scan(self, records: Records, *, on_error: OnError = "raise", promote: bool = True) -> Scan:
        """Read records.

        Args:
            records: Of this scanner's kind.
            on_error: Raise `DataError` for the first damaged record, or leave damaged records out.
            promote: Let reserved features of Examples stand for the fields they name.
        """
        if records.kind != self.schema.kind:
            raise InvalidRequestError(f"this scanner reads records of kind {self.schema.kind}, not {records.kind}")
        if on_error not in ("raise", "skip"):
            raise InvalidRequestError(f"on_error={on_error!r} is neither 'raise' nor 'skip'")
        skipped = 0
        flags = np.full(len(records), int(promote), np.uint8)
        while True:
            scan, status, places = self._once(records, flags)
            if status is None:
                scan.skipped = skipped
                return scan
            bad = np.flatnonzero(status < 0)
            if bad.size:
                if on_error == "raise":
                    raise damage(records, int(bad[0]), status, places)
                skipped += bad.size
                keep = status >= 0
                records, flags, status = records.take(keep), flags[keep], status[keep]
            odd = np.flatnonzero(status > 0)
            if odd.size:
                records, unreadable = self._set_right(records, odd, flags)
                if unreadable:
                    if on_error == "raise":
                        row, reason = unreadable[0]
                        raise DataError(f"{records.where(row)}: {reason}")
                    skipped += len(unreadable)
                    keep = np.ones(len(records), np.bool_)
                    keep[[row for row, _ in unreadable]] = False
                    records, flags = records.take(keep), flags[keep]

    def _set_right(
        self, records: Records, odd: npt.NDArray[np.int64], flags: npt.NDArray[np.uint8]
    ) -> tuple[Records, list[tuple[int, str]]]:
        """Let the protobuf library rewrite records whose parts must be merged; rows it cannot read, and why."""
        from trilith.data.convert import message_of, promote

        payloads, unreadable = [], []
        for row in odd.tolist():
            payload = records.payload(row)
            try:
                message: Any = message_of(payload, records.kind)
                if flags[row] and records.kind is Kind.EXAMPLE:
                    promote(message)
                payload = message.SerializeToString(deterministic=True)
            except (DecodeError, DataError) as error:
                unreadable.append((row, f"no sound {self.schema.kind}: {error}"))
            payloads.append(payload)
        flags[odd] = 0
        return replace_payloads(records, odd, payloads), unreadable

    def _once(
        self, records: Records, flags: npt.NDArray[np.uint8]
    ) -> tuple[Scan, npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]:
        schema, rows, columns = self.schema, len(records), len(self.schema.columns)
        offsets, lengths = bounds_of(records)
        cursors = np.zeros(columns + 8, np.int64)
        block = np.empty((BLOCK_ROWS, columns + 8), np.int64)
        splits = np.empty((columns, rows + 1), np.int64)
        cells = np.zeros((schema.cells, rows), np.uint64)
        present = np.zeros((schema.cells, rows), np.uint8)
        status, places = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        plan = np.zeros(Slot.SIZE, np.int64)
        plan[Slot.ROWS] = rows
        plan[Slot.BUFFER] = address_of(records.buffer)
        plan[Slot.OFFSETS], plan[Slot.LENGTHS] = address_of(offsets), address_of(lengths)
        plan[Slot.NAMES], plan[Slot.MASK] = address_of(schema.lookup.table), schema.lookup.mask
        plan[Slot.NAME_COUNT], plan[Slot.RESERVED] = len(schema.names), schema.reserved
        plan[Slot.MEMBERS] = address_of(schema.members)
        plan[Slot.SLOTS] = address_of(schema.slot_table) if schema.slot_columns else 0
        plan[Slot.CONVERT] = int(schema.fields.slots_as_v2)
        plan[Slot.TOP], plan[Slot.LINE] = address_of(schema.top), address_of(schema.line)
        plan[Slot.COLUMNS], plan[Slot.CURSORS] = columns, address_of(cursors)
        plan[Slot.CELLS], plan[Slot.PRESENT] = address_of(cells), address_of(present)
        plan[Slot.SPLITS], plan[Slot.BLOCK] = address_of(splits), address_of(block)
        plan[Slot.STATUS], plan[Slot.PLACES] = address_of(status), address_of(places)
        plan[Slot.PROMOTE] = address_of(flags)
        plan[Slot.LABEL], plan[Slot.WEIGHT] = schema.label_column, schema.weight_cell
        plan[Slot.EVERY_V1], plan[Slot.EVERY_V2] = schema.every
        capacities = np.ceil(self._mean * rows * _MARGIN).astype(np.int64) + 8
        while True:
            memory, regions = _regions(schema.columns, capacities)
            seen = np.zeros((rows, len(schema.names)), np.uint8)
            addresses = regions + address_of(memory)
            plan[Slot.CAPACITIES], plan[Slot.REGIONS] = address_of(capacities), address_of(addresses)
            plan[Slot.SEEN] = address_of(seen)
            troubled = _KERNELS[schema.kind](address_of(plan))
            counts = cursors[:columns].copy()
            if not (counts > capacities).any():
                break
            capacities = np.maximum(counts, capacities)
            cursors[:], present[:], status[:] = 0, 0, 0
        if rows:
            np.divide(counts, rows, out=self._mean)
        values = [
            _view(memory, int(start), int(count), dtype)
            for start, count, dtype in zip(regions, counts, schema.columns, strict=True)
        ]
        scan = Scan(records, 0, splits, values, cells, present, seen)
        return scan, status if troubled else None, places


def bounds_of(records: Records) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and lengths as kernels take them; a kernel would read wherever they point, so that is checked."""
    offsets, lengths = np.ascontiguousarray(records.offsets), np.ascontiguousarray(records.lengths)
    if not offsets.size:
        return offsets, lengths
    room = records.buffer.size - PADDING
    if int(offsets.min()) < 0 or int(lengths.min()) < 0 or bool((lengths > room - offsets).any()):
        raise InvalidRequestError(f"records point outside their buffer of {records.buffer.size} bytes with padding")
    return offsets, lengths


def _regions(
    columns: Sequence[np.dtype[np.generic]], capacities: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """One block for the values of all columns, and where in it each begins."""
    widths = np.array([16 if dtype == np.object_ else dtype.itemsize for dtype in columns], np.int64)
    sizes = (capacities * widths + 64 + 63) & ~63
    ends = np.cumsum(sizes)
    return np.empty(int(ends[-1]) if ends.size else 0, np.uint8), ends - sizes


def _view(memory: npt.NDArray[np.uint8], start: int, count: int, dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    if dtype == np.object_:
        return memory[start : start + 16 * count].view(np.int64).reshape(count, 2)
    return memory[start : start + count * dtype.itemsize].view(dtype)


def damage(records: Records, row: int, status: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> DataError:
    """The error that says which record is damaged, where and how."""
    return DataError(
        f"{records.where(row)}: no sound {records.kind}: {CODES[int(status[row])]}, at byte {int(places[row])} of "
        f"{int(records.lengths[row])}"
    )


def replace_payloads(records: Records, rows: npt.NDArray[np.int64], payloads: Sequence[bytes]) -> Records:
    """The same records, some with other payloads, which go into a new buffer behind a copy of the old one."""
    fresh = Records.of(payloads, records.kind)
    size = records.buffer.size
    offsets, lengths = records.offsets.copy(), records.lengths.copy()
    offsets[rows], lengths[rows] = fresh.offsets + size, fresh.lengths
    return records.replace(buffer=np.concatenate([records.buffer, fresh.buffer]), offsets=offsets, lengths=lengths)


@functools.lru_cache(maxsize=256)
def scanner(kind: Kind, fields: Fields) -> Scanner:
    """The scanner for some fields; asking again gives the same one, which knows the sizes of its last chunk."""
    return Scanner(kind, fields)

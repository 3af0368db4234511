"""Runs a scan: memory of about the right size, another pass where it was too small, odd records set right, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.choices import OnError, check_on_error
from trilith.data.messages import HINT, is_tf_example, message_of, promote
from trilith.data.records import PADDING, Kind, Records, measure_payloads
from trilith.data.scan.batches import measure_batch, scan_batch, scan_line_ids
from trilith.data.scan.examples import scan_examples
from trilith.data.scan.instances import scan_instances
from trilith.data.scan.plan import BLOCK_ROWS, Slot
from trilith.data.scan.result import Scan
from trilith.data.scan.room import Room, lay_out, settle
from trilith.data.scan.row_scan import scan_rows
from trilith.data.scan.rows import Rows
from trilith.data.scan.schema import Fields, Schema
from trilith.data.scan.wire import CODES
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_proto import example_pb2

__all__ = [
    "BatchScan",
    "BatchScanner",
    "LineIdScanner",
    "Scanner",
    "bounds_of",
    "damage",
    "replace_payloads",
    "run_kernel",
    "scanner",
    "warm_kernels",
]

_KERNELS: dict[Kind, Callable[[int], int]] = {Kind.INSTANCE: scan_instances, Kind.EXAMPLE: scan_examples}
_GIVEN = np.array([
    Slot.ROWS, Slot.BUFFER, Slot.OFFSETS, Slot.LENGTHS, Slot.BLOCK, Slot.PROMOTE, Slot.LISTS,
])  # fmt: skip
_CLEARED = np.array([
    Slot.CURSORS, Slot.STATUS, Slot.PLACES, Slot.FOLLOWERS, Slot.CELLS, Slot.PRESENT, Slot.SEEN,
])  # fmt: skip
_SPLITS, _CAPACITIES, _REGIONS = int(Slot.SPLITS), int(Slot.CAPACITIES), int(Slot.REGIONS)


class Scanner:
    """Reads records of one kind into columns.

    Remembers how many values a record has, so that the next chunk finds memory of about the right size. Any number of
    threads may scan at once.

    Args:
        kind: Of the records.
        fields: What is wanted.
        fids: What fids come as; see `Schema`.
    """

    def __init__(self, kind: Kind, fields: Fields, fids: npt.DTypeLike = np.uint64) -> None:
        self.schema = Schema(kind, fields, fids)
        self._kernel = _KERNELS.get(kind, scan_batch)
        self._room = Room(self.schema.widths)

    def scan(self, records: Records, *, on_error: OnError = "raise", promote: bool = True) -> Scan:
        """Read records.

        Args:
            records: Of this scanner's kind.
            on_error: Raise `DataError` for the first damaged record, or leave damaged records out.
            promote: Let reserved features of Examples stand for the fields they name.
        """
        if records.kind != self.schema.kind:
            raise InvalidRequestError(f"this scanner reads records of kind {self.schema.kind}, not {records.kind}")
        check_on_error(on_error)
        if isinstance(records, Rows) and (found := scan_rows(self.schema, records, promote=promote)) is not None:
            return found
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
                        hint = f"; {HINT}" if is_tf_example(records.payload(row)) else ""
                        raise DataError(f"{records.where(row)}: {reason}{hint}")
                    skipped += len(unreadable)
                    keep = np.ones(len(records), np.bool_)
                    keep[[row for row, _ in unreadable]] = False
                    records, flags = records.take(keep), flags[keep]

    def _set_right(
        self, records: Records, odd: npt.NDArray[np.int64], flags: npt.NDArray[np.uint8]
    ) -> tuple[Records, list[tuple[int, str]]]:
        """Let the protobuf library rewrite records whose parts must be merged; rows it cannot read, and why."""
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
        found = run_kernel(self._kernel, self.schema, records, len(records), flags, self._room)
        return found.scan, found.status if found.troubled else None, found.places


class LineIdScanner(Scanner):
    """Reads records that are bare LineIds; their kind says instance, the smallest message with a LineId inside."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(Kind.INSTANCE, Fields(line_id=tuple(names)))
        self._kernel = scan_line_ids


@dataclass(slots=True, eq=False)
class _Run:
    scan: Scan
    troubled: int
    status: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    lists: npt.NDArray[np.int64]


def run_kernel(
    kernel: Callable[[int], int],
    schema: Schema,
    records: Records,
    rows: int,
    flags: npt.NDArray[np.uint8],
    room: Room,
) -> _Run:
    """Scan once, and once more if a column turned out longer than expected.

    Args:
        kernel: Which.
        schema: What to read.
        records: The records.
        rows: Rows to make room for.
        flags: uint8[records]: whether to promote reserved features.
        room: Where memory comes from.
    """
    columns, names, n = len(schema.columns), len(schema.names), len(records)
    offsets, lengths, total = bounds_of(records)
    words = (columns + 8, n, n, names + 1, schema.cells * rows, -(-schema.cells * rows // 8), -(-rows * names // 8))
    places = list(accumulate(words, initial=0))
    cleared = np.zeros(places[-1], np.int64)
    cursors, status, troubles, _, cells, present, seen = (cleared[a:b] for a, b in pairwise(places))
    lists = np.full((max(names, 1), 3), -1, np.int64)
    block = np.empty((BLOCK_ROWS, columns + 8), np.int64)
    plan = schema.plan.copy()
    given: tuple[npt.NDArray[Any], ...] = (records.buffer, offsets, lengths, block, flags, lists)
    plan[_GIVEN] = [rows, *(address_of(each) for each in given)]
    base = address_of(cleared)
    plan[_CLEARED] = [base + 8 * place for place in places[:-1]]
    head = 8 * columns * (rows + 1)
    while True:
        # No value takes less than a byte, whatever the last chunk was like.
        memory, found = room.take(rows, total, head)
        splits = memory[:head].view(np.int64).reshape(columns, rows + 1)
        if schema.kind is Kind.EXAMPLE_BATCH:
            splits[...] = 0  # lists may be shorter than the longest, or absent
        plan[_SPLITS], plan[_CAPACITIES] = address_of(memory), address_of(found)
        plan[_REGIONS] = address_of(found) + 8 * columns
        troubled = kernel(address_of(plan))
        if room.fits(cursors, found, rows):
            break
        cleared[...] = 0
        lists[...] = -1
    room.keep(memory)
    typed = [_view(memory, dtype) for dtype in schema.dtypes]
    counts = cursors[:columns].tolist()
    scan = Scan(
        records=records,
        text=records.buffer,
        skipped=0,
        splits=list(splits),
        values=[
            typed[number][first : first + count]
            for number, first, count in zip(schema.dtype_numbers, found[2].tolist(), counts, strict=True)
        ],
        cells=cells.view(np.uint64).reshape(schema.cells, rows),
        present=present.view(np.uint8)[: schema.cells * rows].reshape(schema.cells, rows),
        seen=seen.view(np.uint8)[: rows * names].reshape(rows, names),
    )
    return _Run(scan, troubled, status, troubles, lists)


def _view(memory: npt.NDArray[np.uint8], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """A block as elements of a column; byte strings are spans."""
    return memory.view(np.int64).reshape(-1, 2) if dtype == np.object_ else memory.view(dtype)


class BatchScanner:
    """Reads ExampleBatches, one at a time, into columns."""

    def __init__(self, fields: Fields, fids: npt.DTypeLike = np.uint64) -> None:
        self.schema = Schema(Kind.EXAMPLE_BATCH, fields, fids)
        self._room = Room(self.schema.widths)

    def scan(self, records: Records, row: int = 0) -> BatchScan:
        """Read one ExampleBatch.

        Args:
            records: Of kind examplebatch.
            row: Which of them.
        """
        if records.kind is not Kind.EXAMPLE_BATCH:
            raise InvalidRequestError(f"records of kind {records.kind} are no ExampleBatches")
        records = records.take([row])
        while True:
            offsets, lengths, _ = bounds_of(records)
            sizes = np.zeros(3, np.int64)
            start = address_of(records.buffer) + int(offsets[0])
            code = measure_batch(start, start + int(lengths[0]), address_of(sizes))
            if code:
                raise damage(records, 0, np.array([code]), sizes[2:])
            batch_size, rows = max(int(sizes[0]), 0), int(sizes[1])
            found = run_kernel(scan_batch, self.schema, records, rows, np.ones(1, np.uint8), self._room)
            if found.status[0] < 0:
                raise damage(records, 0, found.status, found.places)
            if not found.status[0]:
                return BatchScan(found.scan, batch_size, found.lists)
            payload = example_pb2.ExampleBatch.FromString(records.payload(0)).SerializeToString(deterministic=True)
            records = replace_payloads(records, np.zeros(1, np.int64), [payload])


@dataclass(slots=True, eq=False)
class BatchScan:
    """What was found in an ExampleBatch.

    Attributes:
        scan: Columns; rows are features of a list, and a list may have fewer than the scan has rows.
        batch_size: Rows of the batch.
        lists: int64[names, 3]: features in the list of each name, -1 without one; its type (1 is SHARED); its id.
    """

    scan: Scan
    batch_size: int
    lists: npt.NDArray[np.int64]


def bounds_of(records: Records) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Offsets and lengths as kernels take them, and the bytes of all payloads.

    A kernel would read wherever they point, so that is checked.
    """
    offsets, lengths = np.ascontiguousarray(records.offsets), np.ascontiguousarray(records.lengths)
    room = records.buffer.size - PADDING
    total = measure_payloads(address_of(offsets), address_of(lengths), offsets.size, room)
    if total < 0:
        raise InvalidRequestError(f"records point outside their buffer of {records.buffer.size} bytes with padding")
    return offsets, lengths, total


def damage(records: Records, row: int, status: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> DataError:
    """The error that says which record is damaged, where and how."""
    hint = f"; {HINT}" if is_tf_example(records.payload(row)) else ""
    return DataError(
        f"{records.where(row)}: no sound {records.kind}: {CODES[int(status[row])]}, at byte {int(places[row])} of "
        f"{int(records.lengths[row])}{hint}"
    )


def replace_payloads(records: Records, rows: npt.NDArray[np.int64], payloads: Sequence[bytes]) -> Records:
    """The same records, some with other payloads, which go into a new buffer behind a copy of the old one."""
    fresh = Records.of(payloads, records.kind)
    size = records.buffer.size
    offsets, lengths = records.offsets.copy(), records.lengths.copy()
    offsets[rows], lengths[rows] = fresh.offsets + size, fresh.lengths
    return records.replace(buffer=np.concatenate([records.buffer, fresh.buffer]), offsets=offsets, lengths=lengths)


def warm_kernels() -> None:
    """Compile everything that reads records, or load it from the cache."""
    warm(scan_instances, scan_examples, scan_batch, measure_batch, scan_line_ids, lay_out, settle, measure_payloads)


@functools.lru_cache(maxsize=256)
def scanner(kind: Kind, fields: Fields) -> Scanner:
    """The scanner for some fields; asking again gives the same one, which knows the sizes of its last chunk."""
    return Scanner(kind, fields)

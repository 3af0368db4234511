"""Saved rows: EntryDump messages to and from arrays, for any table layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.formats.tfrecord import RecordBatch, concatenate
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.kernels import entries as kernels
from trilith_services.ps.engine.rows import Rows

if TYPE_CHECKING:
    from trilith_services.ps.engine.row_layout import RowLayout, SegmentLayout
    from trilith_services.ps.engine.table import Table

__all__ = [
    "EntryCodec",
    "compile_kernels",
    "decode_entries",
    "encode_entries",
    "entry_list",
    "extract_slot_from_entry",
    "iterate_table_and_apply",
]

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
_VARINT, _FIXED32 = 0, 5
_DUMPS = hash_table_pb2.SingleOptimizerDump.DESCRIPTOR.fields_by_name


@dataclass(frozen=True, slots=True, eq=False)
class EntryCodec:
    """How the rows of one layout are dumped.

    Attributes:
        layout: The layout.
        segments: int64[s, 3], the kernels' plan: see `kernels.entries`.
        fields: int64[f, 4], the same.
    """

    layout: RowLayout
    segments: npt.NDArray[np.int64]
    fields: npt.NDArray[np.int64]

    @classmethod
    def of(cls, layout: RowLayout) -> EntryCodec:
        """Make the plan for a layout; field numbers are those of the dump messages."""
        segments: list[tuple[int, int, int]] = []
        fields: list[tuple[int, int, int, int]] = []
        for segment in _dumped(layout):
            kind = _DUMPS[segment.kind]
            first, offset = len(fields), segment.state_offset
            for slot, floats in segment.slots:
                assert kind.message_type is not None
                field = kind.message_type.fields_by_name[slot]
                is_int = field.type == field.TYPE_INT64
                fields.append((field.number << 3 | (_VARINT if is_int else _FIXED32), floats, offset, int(is_int)))
                offset += floats
            segments.append((kind.number << 3 | 2, first, len(fields)))
        return cls(
            layout,
            np.array(segments, np.int64).reshape(-1, kernels.DUMP_COLUMNS),
            np.array(fields, np.int64).reshape(-1, kernels.FIELD_COLUMNS),
        )

    def encode(self, rows: Rows, *, with_id: bool = True) -> tuple[Bytes, Offsets]:
        """Write rows; returns uint8[total] and int64[n + 1] offsets of the messages in it."""
        n, dim = rows.weights.shape
        self._check(rows)
        # Tags and lengths take at most 20 bytes a segment, an int64 at most 10 in place of its two floats' 10.
        longest = 9 + 5 * dim + 5 * self.layout.state_floats + 20 * len(self.segments) + 12 + 6
        out = np.empty(n * longest, np.uint8)
        offsets = np.empty(n + 1, np.int64)
        kernels.encode_entries(
            address_of(self.segments),
            len(self.segments),
            address_of(self.fields),
            address_of(rows.ids),
            address_of(rows.weights),
            dim,
            address_of(rows.state),
            self.layout.state_floats,
            address_of(rows.last_update),
            n,
            with_id,
            address_of(out),
            address_of(offsets),
        )
        return out[: int(offsets[-1])], offsets

    def decode(self, batch: RecordBatch, *, with_id: bool = True, name: str = "entries") -> Rows:
        """Read rows.

        Args:
            batch: The messages.
            with_id: Whether every message must carry an id; else ids are 0.
            name: Of their file, for messages.

        Raises:
            CheckpointError: A message is damaged or of another layout; it is named by its number.
        """
        n, dim, state_floats = len(batch), self.layout.dim, self.layout.state_floats
        rows = Rows(
            np.zeros(n, np.uint64),
            np.empty((n, dim), np.float32),
            np.empty((n, state_floats), np.float32),
            np.empty(n, np.uint32),
        )
        odd = np.empty(n, np.bool_)
        scratch = np.empty(1, np.int64)
        kernels.decode_entries(
            address_of(self.segments),
            len(self.segments),
            address_of(self.fields),
            address_of(batch.buffer),
            address_of(batch.starts),
            address_of(batch.ends),
            n,
            with_id,
            self.layout.serving,
            address_of(rows.ids),
            address_of(rows.weights),
            dim,
            address_of(rows.state),
            state_floats,
            address_of(rows.last_update),
            address_of(odd),
            address_of(scratch),
        )
        # What the kernel does not take: another order of fields, packed floats, unknown fields, damage.
        for row in np.flatnonzero(odd).tolist():
            message = batch.buffer[batch.starts[row] : batch.ends[row]].tobytes()
            try:
                self._decode_one(message, rows, row, with_id)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: record {batch.first + row}: {error}") from None
        return rows

    def _decode_one(self, message: bytes, rows: Rows, row: int, with_id: bool) -> None:
        """Read any encoding of one message."""
        try:
            entry = hash_table_pb2.EntryDump.FromString(message)
        except DecodeError:
            raise CheckpointError(f"{len(message)} bytes that are no EntryDump") from None
        if with_id:
            if not entry.HasField("id"):
                raise CheckpointError("an EntryDump without id")
            rows.ids[row] = entry.id & 0xFFFFFFFFFFFFFFFF
        if len(entry.num) != self.layout.dim:
            raise CheckpointError(f"{len(entry.num)} weights, the table has {self.layout.dim}")
        rows.weights[row] = entry.num
        rows.last_update[row] = entry.last_update_ts_sec & 0xFFFFFFFF
        if not self.layout.serving:
            self._decode_state(entry, rows, row)

    def _decode_state(self, entry: hash_table_pb2.EntryDump, rows: Rows, row: int) -> None:
        dumped = _dumped(self.layout)
        dumps = list(entry.opt.dump)
        if not dumps and not self.layout.state_floats:
            return
        if len(dumps) != len(dumped):
            raise CheckpointError(f"optimizer state of {len(dumps)} segments, the table has it for {len(dumped)}")
        for index, (segment, dump) in enumerate(zip(dumped, dumps, strict=True)):
            found = dump.WhichOneof("type")
            if found != segment.kind:
                raise CheckpointError(f"dump {index} is of optimizer {found}, the table has {segment.kind}")
            at = segment.state_offset
            for slot, floats in segment.slots:
                rows.state[row, at : at + floats] = _slot_values(getattr(dump, found), found, slot, floats)
                at += floats

    def _check(self, rows: Rows) -> None:
        if self.layout.serving:
            raise InvalidRequestError("a serving table has no optimizer state to dump")
        n = rows.ids.size
        shapes = (rows.weights.shape, rows.state.shape, rows.last_update.shape)
        wanted = ((n, self.layout.dim), (n, self.layout.state_floats), (n,))
        if shapes != wanted:
            raise InvalidRequestError(f"rows of shapes {shapes}, the layout has {wanted}")


def _slot_values(dump: object, kind: str, slot: str, floats: int) -> npt.NDArray[np.float32]:
    """float32[floats] of one field of an optimizer's dump."""
    value = getattr(dump, slot)
    if isinstance(value, int):
        return np.array([value], np.int64).view(np.float32)
    if isinstance(value, float):
        if not dump.HasField(slot):  # type: ignore[attr-defined]
            raise CheckpointError(f"{kind} without {slot}")
        value = [value]
    if len(value) != floats:
        raise CheckpointError(f"{len(value)} values of {kind}.{slot}, the table has {floats}")
    return np.array(value, np.float32)


def _dumped(layout: RowLayout) -> list[SegmentLayout]:
    """The segments that dump something: a moving average has no message, a serving row no optimizers."""
    return [segment for segment in layout.segments if segment.kind in _DUMPS]


def compile_kernels() -> None:
    """Compile or load what dumping rows runs; a PS that serves reads none."""
    warm(kernels.encode_entries)


def encode_entries(layout: RowLayout, rows: Rows, *, with_id: bool = True) -> tuple[Bytes, Offsets]:
    """Write rows as EntryDumps: uint8[total], and int64[n + 1] offsets of the messages in it."""
    return EntryCodec.of(layout).encode(rows, with_id=with_id)


def entry_list(layout: RowLayout, rows: Rows, *, with_id: bool = True) -> list[bytes]:
    """Write rows as EntryDumps, each a bytes object."""
    buffer, offsets = encode_entries(layout, rows, with_id=with_id)
    data, bounds = buffer.tobytes(), offsets.tolist()
    return [data[bounds[i] : bounds[i + 1]] for i in range(len(bounds) - 1)]


def decode_entries(layout: RowLayout, entries: Iterable[bytes], *, with_id: bool = True) -> Rows:
    """Read serialized EntryDumps; CheckpointError names the one that is damaged or of another layout."""
    buffer, offsets = concatenate(entries)
    batch = RecordBatch(buffer, offsets[:-1], offsets[1:], 0)
    return EntryCodec.of(layout).decode(batch, with_id=with_id)


def extract_slot_from_entry(entries: Iterable[bytes], *, fid_v2: bool = True) -> npt.NDArray[np.int64]:
    """int64[n]: the slot in the id of each serialized EntryDump, by the rule of v2 ids or of v1."""
    ids = [hash_table_pb2.EntryDump.FromString(entry).id & 0xFFFFFFFFFFFFFFFF for entry in entries]
    fids = np.array(ids, np.uint64)
    slots = (fids >> np.uint64(48)) & np.uint64(0x7FFF) if fid_v2 else fids >> np.uint64(54)
    return slots.astype(np.int64)


def iterate_table_and_apply(
    table: Table, function: Callable[[list[bytes]], object], *, limit: int = 1000, nshards: int = 4
) -> None:
    """Call `function` on every chunk of the table's rows, serialized with their ids, until it returns False.

    Args:
        table: A training table.
        function: Takes up to `limit` EntryDumps, at least one.
        limit: Rows per chunk.
        nshards: Parts in which the table is walked.
    """
    for part in range(nshards):
        offset = 0
        while True:
            rows, offset = table.scan(part, nshards, limit, offset)
            if len(rows) and function(entry_list(table.layout, rows)) is False:
                return
            if len(rows) < limit:
                break

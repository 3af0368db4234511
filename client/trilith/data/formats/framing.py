"""The frames of records in a stream: splitting a buffer into records, and writing records with their frames.

A stream is records one after another, each behind a header that four flags describe; there is no checksum and no mark
to find the next record by, so behind a damaged header the rest of a stream is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilith.data.formats import framing_kernels as kernels
from trilith.data.records import PADDING, Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of

__all__ = ["MAX_PAYLOAD", "Framing", "Scratch", "explain", "frame_records", "split_all", "split_frames"]

MAX_PAYLOAD = (1 << 31) - 1
"""Bytes of the largest payload: what protobuf accepts."""

_LAGRANGEX, _PREFIX, _SORT_ID, _KAFKA_DUMP = 1, 2, 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What stands in front of every payload; the payload's length always does.

    Attributes:
        lagrangex_header: Eight bytes with the payload's type and data source key; the other flags do not count.
        kafka_dump_prefix: Eight or sixteen bytes that Kafka dumps begin with.
        has_sort_id: A string that the records were once sorted by.
        kafka_dump: Eight bytes that Kafka dumps have behind the sort id.
    """

    lagrangex_header: bool = False
    kafka_dump_prefix: bool = False
    has_sort_id: bool = False
    kafka_dump: bool = False

    @property
    def flags(self) -> int:
        """The flags as kernels take them."""
        if self.lagrangex_header:
            return _LAGRANGEX
        return _PREFIX * self.kafka_dump_prefix + _SORT_ID * self.has_sort_id + _KAFKA_DUMP * self.kafka_dump

    def header_bytes(self, sort_id: bytes = b"") -> int:
        """Bytes that `frame_records` puts in front of each payload."""
        if self.lagrangex_header:
            return 16
        return 16 * self.kafka_dump_prefix + (8 + len(sort_id)) * self.has_sort_id + 8 * self.kafka_dump + 8


class Scratch:
    """Where `split_frames` writes what it finds; one per reader, used again for every buffer.

    Attributes:
        starts: int64[capacity], where each frame begins in the buffer.
        offsets: int64[capacity], where each payload begins.
        lengths: int64[capacity], bytes of each payload.
        keys: uint32[capacity], data source keys.
        types: uint8[capacity], payload types.
        found: Records found.
        used: Bytes that they and their frames take.
        status: What of `trilith.data.formats.framing_kernels` says why the kernel stopped.
        need: Bytes that the record behind them takes with its frame, as far as its header is there.
    """

    def __init__(self, capacity: int = 1 << 15) -> None:
        self.capacity = capacity
        self.starts = np.empty(capacity, np.int64)
        self.offsets = np.empty(capacity, np.int64)
        self.lengths = np.empty(capacity, np.int64)
        self.keys = np.zeros(capacity, np.uint32)
        self.types = np.zeros(capacity, np.uint8)
        self.result = np.zeros(4, np.int64)
        self.found = self.used = self.status = self.need = 0
        self.addresses = tuple(
            address_of(each) for each in (self.starts, self.offsets, self.lengths, self.keys, self.types, self.result)
        )

    def take_result(self) -> None:
        """Read what a kernel left in `result`."""
        self.found, self.used, self.status, self.need = self.result.tolist()


def split_frames(
    buffer: npt.NDArray[np.uint8], begin: int, end: int, framing: Framing, scratch: Scratch, limit: int = MAX_PAYLOAD
) -> None:
    """Find the whole records in `buffer[begin:end]`, as many as `scratch` holds; positions are relative to `begin`.

    Args:
        buffer: uint8[size].
        begin: Where a record begins.
        end: Where the data ends.
        framing: What stands in front of payloads.
        scratch: Written.
        limit: Bytes of the longest payload or sort id that is believed.
    """
    kernels.find_frames(
        address_of(buffer) + begin, end - begin, framing.flags, scratch.capacity, limit, *scratch.addresses
    )
    scratch.take_result()


def split_all(data: bytes, framing: Framing, kind: Kind | str, *, source: str = "(memory)") -> Records:
    """All records of bytes that hold nothing else.

    Raises:
        DataError: The bytes end inside a record, or a header is damaged.
    """
    buffer = np.frombuffer(data + bytes(PADDING), np.uint8)
    scratch = Scratch(max(1, len(data) // 8))
    split_frames(buffer, 0, len(data), framing, scratch)
    if scratch.status != kernels.WHOLE or scratch.used != len(data):
        where = f"{source}: record {scratch.found}, byte {scratch.used}"
        raise DataError(f"{where}: {explain(scratch.status, len(data) - scratch.used, scratch.need)}")
    n = scratch.found
    return Records(
        kind=Kind(kind),
        buffer=buffer,
        offsets=scratch.offsets[:n],
        lengths=scratch.lengths[:n],
        source_keys=scratch.keys[:n],
        numbers=np.arange(n),
        positions=scratch.starts[:n],
        sources=(source,),
        source_index=np.zeros(n, np.int32),
    )


def explain(status: int, left: int, need: int) -> str:
    """What a status means where no more data comes.

    Args:
        status: What of `trilith.data.formats.framing_kernels` says why the kernel stopped.
        left: Bytes behind the whole records.
        need: Bytes that the next record would take, as far as its header tells.
    """
    match status:
        case kernels.POISONED:
            return f"the length is 0x{kernels.POISON:x}, the mark of a broken record"
        case kernels.PAYLOAD_TOO_LONG:
            return f"the header claims a payload longer than {MAX_PAYLOAD} bytes; are the framing flags right?"
        case kernels.SORT_ID_TOO_LONG:
            return f"the header claims a sort id longer than {MAX_PAYLOAD} bytes; are the framing flags right?"
        case kernels.BAD_LENGTH:
            return "the checksum of the length does not match"
        case kernels.BAD_PAYLOAD:
            return "the checksum of the payload does not match"
        case _:
            return f"the data ends inside the record: {left} bytes are left, it takes {need} or more"


def frame_records(
    records: Records, framing: Framing, *, sort_id: bytes = b"", payload_type: int = 0
) -> npt.NDArray[np.uint8]:
    """Records with their frames, one after another; header fields nobody asked for are zero.

    Args:
        records: Their `source_keys` go into a lagrangex header.
        framing: What stands in front of payloads.
        sort_id: What every record gets where the framing has one.
        payload_type: What every record gets in a lagrangex header.

    Returns:
        uint8[sum of lengths + n * framing.header_bytes(sort_id)].
    """
    if not 0 <= payload_type <= 0xFF:
        raise InvalidRequestError(f"payload_type={payload_type} is outside 0..255: a header has one byte for it")
    n = len(records)
    offsets = np.ascontiguousarray(records.offsets)
    lengths = np.ascontiguousarray(records.lengths)
    heads = (records.source_keys & np.uint32(0xFFFFFF00)).astype(np.uint64) | np.uint64(payload_type)
    sort = np.frombuffer(sort_id, np.uint8)
    framed = np.empty(records.payload_bytes + n * framing.header_bytes(sort_id), np.uint8)
    kernels.write_frames(
        address_of(records.buffer),
        address_of(offsets),
        address_of(lengths),
        address_of(heads),
        n,
        framing.flags,
        address_of(sort),
        sort.size,
        address_of(framed),
    )
    return framed

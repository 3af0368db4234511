"""Kernels that write and read saved rows (EntryDump messages) by the thousand.

One pair of kernels serves every table: what stands in a row's dump comes in as a plan, two small tables of numbers.

    segments  int64[s, 3]: tag byte of the segment's message in SingleOptimizerDump, and its range of `fields`
    fields    int64[f, 4]: tag byte, count, offset into the row's state, and whether it is one int64 rather than floats

Reading takes what writing makes (and the reference system makes the same bytes): fields in order, floats unpacked. Any
other encoding of the same message is left to the protobuf library.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u8, load_u32, load_u64, store_u8, store_u32, store_u64
from trilith_services.ps.engine.kernels.varints import put_varint, varint_size

__all__ = ["DUMP_COLUMNS", "FIELD_COLUMNS", "decode_entries", "encode_entries"]

DUMP_COLUMNS, FIELD_COLUMNS = 3, 4

# Tags of EntryDump, and the tag of OptimizerDump.dump.
_ID, _NUM, _OPT, _TIME, _DUMP = 0x09, 0x15, 0x1A, 0x20, 0x0A
_SEVEN = np.uint64(7)
_LOW = np.uint64(0x7F)
_MORE = np.uint64(0x80)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


@inlined
def _entry(table: int, row: int, columns: int, column: int) -> int:
    return _int64(load_u64(table, row * columns + column))


@inlined
def _put_floats(at: int, tag: int, source: int, count: int) -> int:
    """Write `count` floats, each behind its tag."""
    for i in range(count):
        store_u8(at, 5 * i, np.uint8(tag))
        store_u32(at + 5 * i + 1, 0, load_u32(source, i))
    return at + 5 * count


@inlined
def _payload_size(fields: int, first: int, last: int, state: int) -> int:
    """Bytes of one segment's optimizer message."""
    size = 0
    for field in range(first, last):
        if _entry(fields, field, FIELD_COLUMNS, 3):
            size += 1 + varint_size(load_u64(state + 4 * _entry(fields, field, FIELD_COLUMNS, 2), 0))
        else:
            size += 5 * _entry(fields, field, FIELD_COLUMNS, 1)
    return size


@inlined
def _put_payload(at: int, fields: int, first: int, last: int, state: int) -> int:
    for field in range(first, last):
        tag = _entry(fields, field, FIELD_COLUMNS, 0)
        source = state + 4 * _entry(fields, field, FIELD_COLUMNS, 2)
        if _entry(fields, field, FIELD_COLUMNS, 3):
            store_u8(at, 0, np.uint8(tag))
            at = put_varint(at + 1, load_u64(source, 0))
        else:
            at = _put_floats(at, tag, source, _entry(fields, field, FIELD_COLUMNS, 1))
    return at


@inlined
def _single_size(payload: int) -> int:
    """Bytes of a SingleOptimizerDump around a payload of that size."""
    return 1 + varint_size(np.uint64(payload)) + payload


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean, int64, int64)")
def encode_entries(
    segments: int,
    segment_count: int,
    fields: int,
    ids: int,
    weights: int,
    dim: int,
    states: int,
    state_floats: int,
    times: int,
    n: int,
    with_id: bool,
    out: int,
    offsets: int,
) -> None:
    """Write rows as EntryDump messages, one after another.

    Args:
        segments: Address of int64[segment_count, 3], see the module.
        segment_count: Segments that dump something.
        fields: Address of int64[f, 4], see the module.
        ids: Address of uint64[n].
        weights: Address of float32[n, dim].
        dim: Weights per row.
        states: Address of float32[n, state_floats].
        state_floats: Floats of optimizer state per row.
        times: Address of uint32[n].
        n: Number of rows.
        with_id: Whether the messages carry ids.
        out: Address of bytes for the longest possible messages, written.
        offsets: Address of int64[n + 1], written: where each message begins in `out`.
    """
    at = out
    for row in range(n):
        store_u64(offsets, row, np.uint64(at - out))
        state = states + 4 * state_floats * row
        if with_id:
            store_u8(at, 0, np.uint8(_ID))
            store_u64(at + 1, 0, load_u64(ids, row))
            at += 9
        at = _put_floats(at, _NUM, weights + 4 * dim * row, dim)
        size = 0
        for segment in range(segment_count):
            first = _entry(segments, segment, DUMP_COLUMNS, 1)
            last = _entry(segments, segment, DUMP_COLUMNS, 2)
            size += _single_size(_single_size(_payload_size(fields, first, last, state)))
        store_u8(at, 0, np.uint8(_OPT))
        at = put_varint(at + 1, np.uint64(size))
        for segment in range(segment_count):
            first = _entry(segments, segment, DUMP_COLUMNS, 1)
            last = _entry(segments, segment, DUMP_COLUMNS, 2)
            payload = _payload_size(fields, first, last, state)
            store_u8(at, 0, np.uint8(_DUMP))
            at = put_varint(at + 1, np.uint64(_single_size(payload)))
            store_u8(at, 0, np.uint8(_entry(segments, segment, DUMP_COLUMNS, 0)))
            at = put_varint(at + 1, np.uint64(payload))
            at = _put_payload(at, fields, first, last, state)
        store_u8(at, 0, np.uint8(_TIME))
        at = put_varint(at + 1, np.uint64(load_u32(times, row)))
    store_u64(offsets, n, np.uint64(at - out))


@inlined
def _take_varint(at: int, end: int, target: int) -> int:
    """Read a varint into the uint64 at `target`; returns where it ends, -1 if it is cut off or too long."""
    value = np.uint64(0)
    shift = np.uint64(0)
    for i in range(10):
        if at + i >= end:
            return -1
        byte = np.uint64(load_u8(at, i))
        value |= (byte & _LOW) << shift
        if byte < _MORE:
            store_u64(target, 0, value)
            return at + i + 1
        shift += _SEVEN
    return -1


@inlined
def _take_header(at: int, end: int, tag: int, scratch: int) -> int:
    """Step over the tag and length of a message that lies whole before `end`; -1 if there is another thing.

    The message's end is left in the int64 at `scratch`.
    """
    if at >= end or _int64(load_u8(at, 0)) != tag:
        return -1
    at = _take_varint(at + 1, end, scratch)
    if at < 0 or load_u64(scratch, 0) > np.uint64(end - at):
        return -1
    store_u64(scratch, 0, np.uint64(at + _int64(load_u64(scratch, 0))))
    return at


@inlined
def _take_floats(at: int, end: int, tag: int, target: int, count: int) -> int:
    """Read `count` floats, each behind its tag; -1 if there are other things."""
    if end - at < 5 * count:
        return -1
    wrong = 0
    for i in range(count):
        wrong |= _int64(load_u8(at, 5 * i)) ^ tag
        store_u32(target, i, load_u32(at + 5 * i + 1, 0))
    return -1 if wrong else at + 5 * count


@inlined
def _take_segment(at: int, end: int, segments: int, segment: int, fields: int, state: int, scratch: int) -> int:
    at = _take_header(at, end, _DUMP, scratch)
    if at < 0:
        return -1
    end = _int64(load_u64(scratch, 0))
    at = _take_header(at, end, _entry(segments, segment, DUMP_COLUMNS, 0), scratch)
    if at < 0 or _int64(load_u64(scratch, 0)) != end:
        return -1
    for field in range(_entry(segments, segment, DUMP_COLUMNS, 1), _entry(segments, segment, DUMP_COLUMNS, 2)):
        tag = _entry(fields, field, FIELD_COLUMNS, 0)
        target = state + 4 * _entry(fields, field, FIELD_COLUMNS, 2)
        if _entry(fields, field, FIELD_COLUMNS, 3):
            if at >= end or _int64(load_u8(at, 0)) != tag:
                return -1
            at = _take_varint(at + 1, end, target)
        else:
            at = _take_floats(at, end, tag, target, _entry(fields, field, FIELD_COLUMNS, 1))
        if at < 0:
            return -1
    return at if at == end else -1


@inlined
def _take_entry(
    at: int,
    end: int,
    segments: int,
    segment_count: int,
    fields: int,
    with_id: bool,
    skip_state: bool,
    fid: int,
    weights: int,
    dim: int,
    state: int,
    time: int,
    scratch: int,
) -> bool:
    """Read one message; False if it is not of the form that `encode_entries` writes."""
    if with_id:
        if end - at < 9 or _int64(load_u8(at, 0)) != _ID:
            return False
        store_u64(fid, 0, load_u64(at + 1, 0))
        at += 9
    at = _take_floats(at, end, _NUM, weights, dim)
    if at < 0:
        return False
    at = _take_header(at, end, _OPT, scratch)
    if at < 0:
        return False
    dumps_end = _int64(load_u64(scratch, 0))
    if skip_state:
        at = dumps_end
    for segment in range(0 if skip_state else segment_count):
        at = _take_segment(at, dumps_end, segments, segment, fields, state, scratch)
        if at < 0:
            return False
    if at != dumps_end or at >= end or _int64(load_u8(at, 0)) != _TIME:
        return False
    at = _take_varint(at + 1, end, scratch)
    store_u32(time, 0, np.uint32(load_u64(scratch, 0) & np.uint64(0xFFFFFFFF)))
    return at == end


@kernel(
    "void(int64, int64, int64, int64, int64, int64, int64, boolean, boolean, int64, int64, int64, int64, int64, int64,"
    " int64, int64)"
)
def decode_entries(
    segments: int,
    segment_count: int,
    fields: int,
    data: int,
    starts: int,
    ends: int,
    n: int,
    with_id: bool,
    skip_state: bool,
    ids: int,
    weights: int,
    dim: int,
    states: int,
    state_floats: int,
    times: int,
    odd: int,
    scratch: int,
) -> None:
    """Read EntryDump messages that have the form `encode_entries` gives them, and say which have not.

    Args:
        segments: Address of int64[segment_count, 3], see the module.
        segment_count: Segments that dump something.
        fields: Address of int64[f, 4], see the module.
        data: Address of the messages' bytes.
        starts: Address of int64[n]: where each message begins in `data`.
        ends: Address of int64[n]: where it ends.
        n: Number of messages.
        with_id: Whether the messages carry ids.
        skip_state: Ignore optimizer state.
        ids: Address of uint64[n], written if `with_id`.
        weights: Address of float32[n, dim], written.
        dim: Weights per row.
        states: Address of float32[n, state_floats], written.
        state_floats: Floats of optimizer state per row.
        times: Address of uint32[n], written.
        odd: Address of uint8[n], written: 1 where the message has another form, and its row is undefined.
        scratch: Address of one int64, written.
    """
    for row in range(n):
        fine = _take_entry(
            data + _int64(load_u64(starts, row)),
            data + _int64(load_u64(ends, row)),
            segments,
            segment_count,
            fields,
            with_id,
            skip_state,
            ids + 8 * row,
            weights + 4 * dim * row,
            dim,
            states + 4 * state_floats * row,
            times + 4 * row,
            scratch,
        )
        store_u8(odd, row, np.uint8(0 if fine else 1))

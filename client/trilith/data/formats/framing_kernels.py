"""Kernels of record framing: writing many small records at once, and walking them.

A TFRecord is its length (uint64, little-endian), the masked CRC-32C of those eight bytes, the payload, and the
payload's masked CRC-32C. The checksum is Intel's slicing-by-8: eight table lookups for eight bytes, on any machine.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u8, load_u32, load_u64, store_u8, store_u32, store_u64

__all__ = [
    "BAD_LENGTH",
    "BAD_PAYLOAD",
    "CRC_TABLES",
    "FRAME_BYTES",
    "PAYLOAD_TOO_LONG",
    "POISON",
    "POISONED",
    "SORT_ID_TOO_LONG",
    "TFRECORD_HEAD",
    "WHOLE",
    "find_frames",
    "frame_tfrecords",
    "walk_tfrecords",
    "write_frames",
]

FRAME_BYTES = 16
TFRECORD_HEAD = 12
"""Bytes in front of a TFRecord's payload; four more follow it."""
# What `walk_tfrecords` and `find_frames` found where they stopped.
WHOLE, BAD_LENGTH, BAD_PAYLOAD, POISONED, PAYLOAD_TOO_LONG, SORT_ID_TOO_LONG = 0, 1, 2, 3, 4, 5
POISON = 0xFEFEFEFE
"""The payload length with which producers mark a broken record."""

_BYTE = np.uint64(0xFF)
_WORD = np.uint64(0xFFFFFFFF)
_MASK_DELTA = np.uint64(0xA282EAD8)
_EIGHT = np.uint64(8)
_ZERO = np.uint64(0)
_POISON = np.uint64(POISON)
_KEY = np.uint64(0xFFFFFF00)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


def _tables() -> npt.NDArray[np.uint32]:
    """uint32[8, 256]: row k is the CRC-32C (reflected polynomial 0x82F63B78) of a byte followed by k zero bytes."""
    tables = np.zeros((8, 256), np.uint32)
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1).astype(np.uint32)
    tables[0] = crc
    for row in range(1, 8):
        tables[row] = (tables[row - 1] >> np.uint32(8)) ^ tables[0][tables[row - 1] & np.uint32(0xFF)]
    return tables


CRC_TABLES = _tables()


@inlined
def _table(tables: int, row: int, word: np.uint64, shift: int) -> np.uint64:
    return np.uint64(load_u32(tables, row * 256 + _int64((word >> np.uint64(shift)) & _BYTE)))


@inlined
def _masked_crc(tables: int, address: int, size: int) -> np.uint64:
    """TFRecord's masked CRC-32C of `size` bytes."""
    crc = _WORD
    words = size // 8
    for i in range(words):
        word = load_u64(address, i) ^ crc
        crc = (
            _table(tables, 7, word, 0)
            ^ _table(tables, 6, word, 8)
            ^ _table(tables, 5, word, 16)
            ^ _table(tables, 4, word, 24)
            ^ _table(tables, 3, word, 32)
            ^ _table(tables, 2, word, 40)
            ^ _table(tables, 1, word, 48)
            ^ _table(tables, 0, word, 56)
        )
    for i in range(words * 8, size):
        crc = (crc >> _EIGHT) ^ _table(tables, 0, crc ^ np.uint64(load_u8(address, i)), 0)
    crc = crc ^ _WORD
    return (((crc >> np.uint64(15)) | (crc << np.uint64(17))) + _MASK_DELTA) & _WORD


@inlined
def _copy(to: int, source: int, size: int) -> None:
    words = size // 8
    for i in range(words):
        store_u64(to, i, load_u64(source, i))
    for i in range(words * 8, size):
        store_u8(to, i, load_u8(source, i))


@kernel("void(int64, int64, int64, int64, int64)")
def frame_tfrecords(tables: int, payload: int, offsets: int, n: int, out: int) -> None:
    """Frame records that stand one after another.

    Args:
        tables: Address of CRC_TABLES.
        payload: Address of the records' bytes.
        offsets: Address of int64[n + 1]: record i is payload[offsets[i]:offsets[i + 1]].
        n: Number of records.
        out: Address of uint8[offsets[n] - offsets[0] + 16 * n], written.
    """
    for i in range(n):
        start = _int64(load_u64(offsets, i))
        size = _int64(load_u64(offsets, i + 1)) - start
        store_u64(out, 0, np.uint64(size))
        store_u32(out + 8, 0, np.uint32(_masked_crc(tables, out, 8)))
        _copy(out + 12, payload + start, size)
        store_u32(out + 12 + size, 0, np.uint32(_masked_crc(tables, payload + start, size)))
        out += size + FRAME_BYTES


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def walk_tfrecords(tables: int, data: int, size: int, limit: int, starts: int, ends: int, result: int) -> None:
    """Find and check the whole records at the beginning of a buffer.

    Args:
        tables: Address of CRC_TABLES.
        data: Address of the framed bytes.
        size: Number of bytes.
        limit: Most records to find.
        starts: Address of int64[limit], written: where each payload begins.
        ends: Address of int64[limit], written: where it ends.
        result: Address of int64[3], written: records found, bytes they take with their framing, and WHOLE (the rest, if
            any, is the beginning of a record), BAD_LENGTH or BAD_PAYLOAD (of the record after those found).
    """
    at = _int64(0)
    found = _int64(0)
    status = WHOLE
    while found < limit and size - at >= FRAME_BYTES:
        if _masked_crc(tables, data + at, 8) != np.uint64(load_u32(data + at + 8, 0)):
            status = BAD_LENGTH
            break
        claimed = load_u64(data + at, 0)
        if claimed > np.uint64(size - at - FRAME_BYTES):
            break
        length = _int64(claimed)
        start = at + 12
        if _masked_crc(tables, data + start, length) != np.uint64(load_u32(data + start + length, 0)):
            status = BAD_PAYLOAD
            break
        store_u64(starts, found, np.uint64(start))
        store_u64(ends, found, np.uint64(start + length))
        found += 1
        at = start + length + 4
    store_u64(result, 0, np.uint64(found))
    store_u64(result, 1, np.uint64(at))
    store_u64(result, 2, np.uint64(status))


# ---- records behind headers of flags --------------------------------------------------------------------------------


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def find_frames(
    data: int,
    size: int,
    flags: int,
    capacity: int,
    limit: int,
    starts: int,
    offsets: int,
    lengths: int,
    keys: int,
    types: int,
    result: int,
) -> None:
    """Find the whole records at the beginning of a buffer.

    Every length is compared with what is left before it is added to anything, so no sum can wrap.

    Args:
        data: Address of the framed bytes.
        size: Number of bytes.
        flags: `Framing.flags`.
        capacity: Most records to find.
        limit: Bytes of the longest payload or sort id that is believed.
        starts: Address of int64[capacity], written: where each frame begins.
        offsets: Address of int64[capacity], written: where each payload begins.
        lengths: Address of int64[capacity], written: bytes of each payload.
        keys: Address of uint32[capacity]; written with a lagrangex header, else left alone.
        types: Address of uint8[capacity]; written with a lagrangex header, else left alone.
        result: Address of int64[4], written: records found, bytes they take, WHOLE or why the next record is none, and
            the bytes that it takes, as far as its header is there.
    """
    start = _int64(0)
    found = _int64(0)
    status = WHOLE
    need = _int64(8)
    head = _ZERO
    while found < capacity:
        at = start
        need = _int64(8)
        if flags & 1:
            need = _int64(16)
            if size - at < 16:
                break
            head = load_u64(data + at, 0)
            at += 8
        elif flags:
            aggregate = _ZERO
            if flags & 2:
                if size - at < 8:
                    break
                aggregate = load_u64(data + at, 0)
                at += 8 if aggregate != _ZERO else 16
                if at > size:
                    need = _int64(16)
                    break
            if flags & 4:
                sort_size = aggregate
                if aggregate == _ZERO:
                    if size - at < 8:
                        need = at + 8 - start
                        break
                    sort_size = load_u64(data + at, 0)
                    at += 8
                if sort_size > np.uint64(limit):
                    status = SORT_ID_TOO_LONG
                    break
                need = at + _int64(sort_size) + 8 - start
                if sort_size > np.uint64(size - at):
                    break
                at += _int64(sort_size)
            if flags & 8:
                need = at + 16 - start
                if size - at < 16:
                    break
                at += 8
        need = at + 8 - start
        if size - at < 8:
            break
        claimed = load_u64(data + at, 0)
        at += 8
        if claimed == _POISON:
            status = POISONED
            break
        if claimed > np.uint64(limit):
            status = PAYLOAD_TOO_LONG
            break
        length = _int64(claimed)
        need = at + length - start
        if length > size - at:
            break
        store_u64(starts, found, np.uint64(start))
        store_u64(offsets, found, np.uint64(at))
        store_u64(lengths, found, claimed)
        if flags & 1:
            store_u32(keys, found, np.uint32(head & _KEY))
            store_u8(types, found, np.uint8(head & _BYTE))
        found += 1
        start = at + length
        need = _int64(8)
    store_u64(result, 0, np.uint64(found))
    store_u64(result, 1, np.uint64(start))
    store_u64(result, 2, np.uint64(status))
    store_u64(result, 3, np.uint64(need))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def write_frames(
    buffer: int, offsets: int, lengths: int, heads: int, n: int, flags: int, sort: int, sort_size: int, out: int
) -> None:
    """Write payloads behind their headers.

    Args:
        buffer: Address of the payloads' buffer.
        offsets: Address of int64[n].
        lengths: Address of int64[n].
        heads: Address of uint64[n]: lagrangex headers.
        n: Number of records.
        flags: `Framing.flags`.
        sort: Address of the sort id that all records get.
        sort_size: Its bytes.
        out: Address of what is written.
    """
    for i in range(n):
        length = load_u64(lengths, i)
        if flags & 1:
            store_u64(out, 0, load_u64(heads, i))
            out += 8
        if flags & 2:
            store_u64(out, 0, _ZERO)
            store_u64(out, 1, _ZERO)
            out += 16
        if flags & 4:
            store_u64(out, 0, np.uint64(sort_size))
            _copy(out + 8, sort, sort_size)
            out += 8 + sort_size
        if flags & 8:
            store_u64(out, 0, _ZERO)
            out += 8
        store_u64(out, 0, length)
        _copy(out + 8, buffer + _int64(load_u64(offsets, i)), _int64(length))
        out += 8 + _int64(length)

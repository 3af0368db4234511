"""Kernels of parameter sync: rows gathered by id, and ids as the varints of a packed protobuf field."""

from __future__ import annotations

from typing import cast

import numpy as np

from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import copy_floats, load_u8, load_u64, store_u8, store_u64
from trilith_services.ps.engine.kernels.index import READ_GROUP, get
from trilith_services.ps.engine.kernels.plan import DIM, SERVING, WORDS
from trilith_services.ps.engine.kernels.read import probe_group, read_row
from trilith_services.ps.engine.kernels.varints import put_varint

__all__ = ["drop_repeats", "gather_rows", "pack_ids", "unpack_ids"]

_SEVEN = np.uint64(7)
_LOW = np.uint64(0x7F)
_MORE = np.uint64(0x80)
_MOST = 10  # bytes of a varint
_ZERO, _BITS56 = np.uint64(0), np.uint64(56)
_LOW28, _HIGH28 = np.uint64(0x000000000FFFFFFF), np.uint64(0x00FFFFFFF0000000)
_LOW14, _HIGH14 = np.uint64(0x00003FFF00003FFF), np.uint64(0x0FFFC0000FFFC000)
_LOW7, _HIGH7 = np.uint64(0x007F007F007F007F), np.uint64(0x3F803F803F803F80)
_MARKS = np.uint64(0x8080808080808080)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def gather_rows(
    stripes: int,
    ids: int,
    n: int,
    plan: int,
    segments: int,
    work: int,
    found: int,
    weights: int,
    missing: int,
) -> int:
    """Read the raw weights of the ids that have rows, one after another without gaps.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS].
        ids: Address of uint64[n].
        n: Number of ids.
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        work: Address of scratch memory, see `read.work_bytes`.
        found: Address of uint64[n], written: ids that have a row.
        weights: Address of float32[n, dim], written: their weights, decoded where the table stores them compressed.
        missing: Address of uint64[n], written: ids that have none.

    Returns:
        How many ids have a row.
    """
    dim = get(plan, DIM)
    serving = get(plan, SERVING) != 0
    size = 4 * get(plan, WORDS)
    present = 0
    absent = 0
    for first in range(0, n, READ_GROUP):
        count = min(READ_GROUP, n - first)
        probe_group(stripes, ids + 8 * first, count, size, work)
        for t in range(count):
            row = get(work, t)
            key = load_u64(ids, first + t)
            if row == 0:
                store_u64(missing, absent, key)
                absent += 1
            else:
                store_u64(found, present, key)
                if serving:
                    read_row(plan, segments, row, weights + 4 * dim * present)
                else:
                    copy_floats(weights + 4 * dim * present, row, dim)
                present += 1
    return present


@inlined
def _spread(value: np.uint64) -> np.uint64:
    """The low 56 bits, seven to a byte, each byte marked as one that another follows."""
    value = (value & _LOW28) | ((value & _HIGH28) << np.uint64(4))
    value = (value & _LOW14) | ((value & _HIGH14) << np.uint64(2))
    value = (value & _LOW7) | ((value & _HIGH7) << np.uint64(1))
    return value | _MARKS


@kernel("int64(int64, int64, int64)")
def pack_ids(ids: int, n: int, out: int) -> int:
    """Write ids as varints.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        out: Address of uint8[10 * n], written.

    Returns:
        How many bytes were written.
    """
    at = out
    for i in range(n):
        value = load_u64(ids, i)
        rest = value >> _BITS56
        if rest == _ZERO:
            at = put_varint(at, value)
        else:  # as good as every hashed id: nine bytes, or ten
            store_u64(at, 0, _spread(value))
            if rest < _MORE:
                store_u8(at, 8, np.uint8(rest))
                at += 9
            else:
                store_u8(at, 8, np.uint8(rest))  # its highest bit is the mark
                store_u8(at, 9, np.uint8(1))
                at += 10
    return at - out


@kernel("int64(int64, int64, int64)")
def unpack_ids(data: int, size: int, ids: int) -> int:
    """Read varints.

    Args:
        data: Address of uint8[size].
        size: Bytes to read.
        ids: Address of uint64[size], written.

    Returns:
        How many there were; -1 if one is cut off or too long.
    """
    count = _int64(0)
    value = np.uint64(0)
    shift = np.uint64(0)
    length = 0
    for i in range(size):
        byte = np.uint64(load_u8(data, i))
        value |= (byte & _LOW) << shift
        length += 1
        if byte < _MORE:
            store_u64(ids, count, value)
            count += 1
            value = np.uint64(0)
            shift = np.uint64(0)
            length = 0
        else:
            if length == _MOST:
                return -1
            shift += _SEVEN
    return -1 if length else count


@kernel("int64(int64, int64, int64, int64, int64)")
def drop_repeats(ids: int, n: int, recent: int, mask: int, out: int) -> int:
    """Leave out ids that came not long before: a small memory finds most repeats, at a fraction of what all cost.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        recent: Address of uint64[mask + 1] zeros, written: scratch.
        mask: A power of two minus one.
        out: Address of uint64[n], written: every id at least once.

    Returns:
        How many were written.
    """
    kept = np.int64(0)
    for i in range(n):
        key = load_u64(ids, i)
        value = mix64(key)
        place = np.int64(value & np.uint64(mask))
        # One id's hash is 0, which looks like an empty place: it is always kept.
        if load_u64(recent, place) != value or value == _ZERO:
            store_u64(recent, place, value)
            store_u64(out, kept, key)
            kept += 1
    return int(kept)

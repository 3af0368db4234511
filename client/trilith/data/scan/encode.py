"""Copies of Instances and Examples with labels, weight or LineId fields replaced, written without message objects."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.examples import first_bytes
from trilith.data.scan.features import ODD, read_named
from trilith.data.scan.fields import check_line_id
from trilith.data.scan.wire import (
    BYTES,
    copy_bytes,
    find_name,
    i64_at,
    put_i64,
    read_length,
    read_tag,
    skip_field,
    wire_type,
)
from trilith.ops.jit import kernel, part
from trilith.ops.memory import load_u8, load_u32, load_u64, store_u8, store_u32, store_u64

__all__ = ["Edit", "put_fields", "put_varint", "rewrite_records", "varint_size"]

if TYPE_CHECKING:
    _uint8: Any
    _uint64: Any
else:
    _uint8 = np.uint8
    _uint64 = np.uint64


class Edit(IntEnum):
    """Places in the block of int64 that tells `rewrite_records` what to do."""

    ROWS = 0
    BUFFER = 1
    """uint8[...]: the records' buffer."""
    OFFSETS = 2
    """int64[rows]."""
    LENGTHS = 3
    """int64[rows]."""
    LINE_FIELD = 4
    """Number of the field that is the LineId; 0 if the LineId stays."""
    DROP_TOP = 5
    """uint8[128]: 1 for fields of the message to leave out."""
    DROP_LINE = 6
    """uint8[256]: 1 for fields of LineId to leave out."""
    TOP = 7
    """int64[fields, 6]: new fields of the message, see `_put_fields`."""
    TOP_COUNT = 8
    LINE = 9
    """int64[fields, 6]: new fields of LineId."""
    LINE_COUNT = 10
    NAMES = 11
    """Names of reserved features to leave out, as for `wire.find_name`; 0 if there is none."""
    MASK = 12
    LINE_NAME = 13
    """Number of the name of the reserved feature that holds a LineId, -1 if none."""
    LINE_TABLE = 14
    """int64[256]: the scanner's table of LineId, nothing wanted."""
    SCRATCH = 15
    """uint8[...]: room for one LineId."""
    OUT = 16
    """uint8[...], written."""
    OUT_OFFSETS = 17
    """int64[rows], written."""
    OUT_LENGTHS = 18
    """int64[rows], written."""
    STATUS = 19
    """int64[rows], zeros, written."""
    PLACES = 20
    """int64[rows], written."""
    PROMOTE = 21
    """uint8[rows]: whether reserved features of an Example stand for its fields."""
    SIZE = 22


(
    _ROWS,
    _BUFFER,
    _OFFSETS,
    _LENGTHS,
    _LINE_FIELD,
    _DROP_TOP,
    _DROP_LINE,
    _TOP,
    _TOP_COUNT,
    _LINE,
    _LINE_COUNT,
    _NAMES,
    _MASK,
    _LINE_NAME,
    _LINE_TABLE,
    _SCRATCH,
    _OUT,
    _OUT_OFFSETS,
    _OUT_LENGTHS,
    _STATUS,
    _PLACES,
    _PROMOTE,
) = range(int(Edit.SIZE))

_NAMED = 1 << 3 | 2


@part(inline=False)
def put_varint(out: int, value: np.uint64) -> int:
    """Write a varint; the position behind it."""
    while value > _uint64(127):
        store_u8(out, 0, _uint8(value & _uint64(127) | _uint64(128)))
        value >>= _uint64(7)
        out += 1
    store_u8(out, 0, _uint8(value))
    return out + 1


@part()
def _put_value(out: int, element: int, values: int, index: int) -> int:
    """Write one value without its tag; the position behind it."""
    wire = wire_type(element)
    if wire == 0:
        return put_varint(out, load_u64(values, index))
    if wire == 1:
        store_u64(out, 0, load_u64(values, index))
        return out + 8
    if wire == 5:
        store_u32(out, 0, load_u32(values, index))
        return out + 4
    start, size = i64_at(values, 2 * index), i64_at(values, 2 * index + 1)
    out = put_varint(out, _uint64(size))
    copy_bytes(out, start, size)
    return out + size


@part(inline=False)
def put_fields(out: int, fields: int, count: int, row: int) -> int:
    """Write the new fields of a row.

    Args:
        out: Where to write.
        fields: Address of int64[count, 6]: field number; element; address of its values, 8 bytes each for varints, 16
            bytes (address, length) for byte strings; address of int64 splits, 0 for a scalar; address of uint8 flags of
            the rows that have the scalar, 0 for all; whether to pack a list.
        count: Number of fields.
        row: Number of the row.

    Returns:
        The position behind them.
    """
    for f in range(count):
        number, element = i64_at(fields, 6 * f), i64_at(fields, 6 * f + 1)
        values, splits = i64_at(fields, 6 * f + 2), i64_at(fields, 6 * f + 3)
        flags, packed = i64_at(fields, 6 * f + 4), i64_at(fields, 6 * f + 5)
        tag = _uint64(number << 3 | wire_type(element))
        if splits == 0:
            if flags == 0 or load_u8(flags, row) != _uint8(0):
                out = _put_value(put_varint(out, tag), element, values, row)
            continue
        first, last = i64_at(splits, row), i64_at(splits, row + 1)
        if packed and element != BYTES:
            if first == last:
                continue
            out = put_varint(out, _uint64(number << 3 | 2))
            size = 0
            wire = wire_type(element)
            if wire == 0:
                for i in range(first, last):
                    size += varint_size(load_u64(values, i))
            else:
                size = (last - first) * (8 if wire == 1 else 4)
            out = put_varint(out, _uint64(size))
            for i in range(first, last):
                out = _put_value(out, element, values, i)
        else:
            for i in range(first, last):
                out = _put_value(put_varint(out, tag), element, values, i)
    return out


@part()
def varint_size(value: np.uint64) -> int:
    """How many bytes a varint takes."""
    size = 1
    while value > _uint64(127):
        value >>= _uint64(7)
        size += 1
    return size


@part(inline=False)
def copy_line_id(p: int, end: int, out: int, drop: int) -> int:
    """Copy a sound LineId without some fields; the position behind the copy."""
    while p < end:
        start = p
        tag, p = read_tag(p, end)
        p = skip_field(tag, p, end, 1)
        number = tag >> 3
        if number >= 256 or load_u8(drop, number) == _uint8(0):
            copy_bytes(out, start, p - start)
            out += p - start
    return out


@kernel("int64(int64)")
def rewrite_records(edit: int) -> int:
    """Copy records with some fields left out and others added; fields that stay keep their bytes.

    Args:
        edit: Address of the block, int64[Edit.SIZE].

    Returns:
        How many records have a status other than 0; what was written of those means nothing.
    """
    buffer, line_field = i64_at(edit, _BUFFER), i64_at(edit, _LINE_FIELD)
    drop_top, drop_line = i64_at(edit, _DROP_TOP), i64_at(edit, _DROP_LINE)
    names, scratch = i64_at(edit, _NAMES), i64_at(edit, _SCRATCH)
    out = i64_at(edit, _OUT)
    troubled = 0
    for row in range(i64_at(edit, _ROWS)):
        start = buffer + i64_at(i64_at(edit, _OFFSETS), row)
        end = start + i64_at(i64_at(edit, _LENGTHS), row)
        begin = out
        status = 0
        line = scratch
        has_line = 0
        replaced = 0
        kept = start  # everything from here on is to be copied
        place = start
        p = start
        while p < end:
            place = p
            tag, p = read_tag(p, end)
            if p < 0:
                break
            number = tag >> 3
            leave = 0
            if names and tag == _NAMED and load_u8(i64_at(edit, _PROMOTE), row) != _uint8(0):
                size, p = read_length(p, end)
                if p < 0:
                    break
                stop = p + size
                odd, name, name_size, kind, value, value_end = read_named(p, stop, 2, 1)
                if odd < 0:
                    p = odd
                    break
                p = stop
                found = find_name(name, name_size, names, i64_at(edit, _MASK))
                if found >= 0:
                    leave = 1
                    if odd or replaced & 1 << found:
                        status = ODD
                    replaced |= 1 << found
                    if found == i64_at(edit, _LINE_NAME) and kind == 6:
                        at, at_end = first_bytes(value, value_end)
                        if at >= 0:
                            p = check_line_id(at, at_end, i64_at(edit, _LINE_TABLE))
                            if p < 0:
                                break
                            p = stop
                            line = copy_line_id(at, at_end, scratch, drop_line)
                            replaced |= 256
                            has_line = 1
            elif number == line_field and tag & 7 == 2:
                leave = 1
                size, p = read_length(p, end)
                if p < 0:
                    break
                checked = check_line_id(p, p + size, i64_at(edit, _LINE_TABLE))
                if checked < 0:
                    p = checked
                    break
                has_line = 1
                if replaced & 256 == 0:  # pieces of one message that lie apart are one message
                    line = copy_line_id(p, p + size, line, drop_line)
                p += size
            else:
                p = skip_field(tag, p, end, 0)
                if p < 0:
                    break
                leave = 1 if number < 128 and load_u8(drop_top, number) != _uint8(0) else 0
            if leave:
                copy_bytes(out, kept, place - kept)
                out += place - kept
                kept = p
        if p >= 0:
            copy_bytes(out, kept, end - kept)
            out += end - kept
            if line_field:
                line = put_fields(line, i64_at(edit, _LINE), i64_at(edit, _LINE_COUNT), row)
                if has_line or line > scratch:
                    out = put_varint(out, _uint64(line_field << 3 | 2))
                    out = put_varint(out, _uint64(line - scratch))
                    copy_bytes(out, scratch, line - scratch)
                    out += line - scratch
            out = put_fields(out, i64_at(edit, _TOP), i64_at(edit, _TOP_COUNT), row)
        else:
            status = p
        if status:
            out = begin
            put_i64(i64_at(edit, _STATUS), row, status)
            put_i64(i64_at(edit, _PLACES), row, place - start)
            troubled += 1
        put_i64(i64_at(edit, _OUT_OFFSETS), row, begin - i64_at(edit, _OUT))
        put_i64(i64_at(edit, _OUT_LENGTHS), row, out - begin)
    return troubled

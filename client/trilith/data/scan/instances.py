"""The scan of Instances: one pass over each record, features in their usual form without a second look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.fields import (
    append_bulk,
    begin_row,
    end_rows,
    read_field,
    read_line_id,
    read_list,
    read_list_field,
    row_start,
)
from trilith.data.scan.plan import REPEATED, WANTED, Slot
from trilith.data.scan.wire import (
    AHEAD,
    BAD_PACKED,
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    VARINT32,
    append_fids,
    byte_at,
    check_varints,
    convert_line,
    find_name,
    find_next_name,
    i64_at,
    put_i64,
    read_length,
    read_tag,
    run_of_slot,
    skip_field,
)
from trilith.ops.jit import kernel, part
from trilith.ops.memory import copy_line, load_u8, load_u16, load_u64, prefetch, store_u8

__all__ = [
    "check_label_tag",
    "read_feature",
    "read_other",
    "restart_values",
    "scan_instances",
]

if TYPE_CHECKING:
    _int64: Any
    _uint64: Any
    _uint8: Any
else:
    _int64 = np.int64
    _uint64 = np.uint64
    _uint8 = np.uint8

_ROWS, _BUFFER, _OFFSETS, _LENGTHS = int(Slot.ROWS), int(Slot.BUFFER), int(Slot.OFFSETS), int(Slot.LENGTHS)
_NAMES, _MASK, _NAME_COUNT, _MEMBERS = int(Slot.NAMES), int(Slot.MASK), int(Slot.NAME_COUNT), int(Slot.MEMBERS)
_TEXTS, _FOLLOWERS = int(Slot.TEXTS), int(Slot.FOLLOWERS)
_SLOTS, _CONVERT, _TOP, _SEEN = int(Slot.SLOTS), int(Slot.CONVERT), int(Slot.TOP), int(Slot.SEEN)
_CURSORS, _CAPACITIES, _REGIONS = int(Slot.CURSORS), int(Slot.CAPACITIES), int(Slot.REGIONS)
_STATUS, _PLACES, _EVERY_V2 = int(Slot.STATUS), int(Slot.PLACES), int(Slot.EVERY_V2)

_NO_SLOT = 0xFFFF
_MEMBER_COUNT = 17

# Tags of fields that are read in a way of their own.
_FID = 1 << 3 | 2
_LINE_ID = 5 << 3 | 2
_LABEL_TAG = 7 << 3 | 2
_FEATURE = 9 << 3 | 2


@part()
def _element(kind: int) -> int:
    """How the values of a field of Feature are written; lists of lists by their elements."""
    if kind in (2, 6):
        return FIXED64
    if kind in (3, 7):
        return FIXED32
    if kind in (4, 8):
        return VARINT
    return BYTES


@part()
def _column_of(plan: int, number: int, kind: int) -> int:
    """The entry of MEMBERS for a value of a named feature."""
    return i64_at(i64_at(plan, _MEMBERS), number * _MEMBER_COUNT + kind)


@part(inline=False)
def restart_values(number: int, row: int, plan: int) -> None:
    """Forget what an earlier feature of the same name and row had, fids excepted: those add up.

    Args:
        number: Number of the name.
        row: Number of the record.
        plan: Address of the plan.
    """
    for kind in (3, 4, 5, 7, 8, 9):
        entry = _column_of(plan, number, kind)
        if entry >= 0:
            put_i64(i64_at(plan, _CURSORS), entry >> 8, row_start(plan, row, entry >> 8))


@part()
def _note(number: int, kind: int, row: int, plan: int) -> None:
    """Mark a named feature as present in a row."""
    at = row * i64_at(plan, _NAME_COUNT) + number
    seen = i64_at(plan, _SEEN)
    if load_u8(seen, at) != _uint8(0):
        restart_values(number, row, plan)
    store_u8(seen, at, _uint8(kind))


@part(inline=False)
def _collect(p: int, end: int, kind: int, element: int, column: int, row: int, plan: int) -> None:
    """Append one kind of value of a Feature that was checked before.

    Args:
        p: Where the Feature begins.
        end: Where it ends.
        kind: Number of the values' field.
        element: How they are written.
        column: Where they go.
        row: Number of the record.
        plan: Address of the plan.
    """
    entry = element | REPEATED | WANTED | column << 16
    while p < end:
        tag, p = read_tag(p, end)
        if tag >> 3 != kind:
            p = skip_field(tag, p, end, 1)
        elif kind <= 5:
            p = read_list_field(entry, tag, p, end, row, plan, 1)
        elif tag & 7 == 2:
            size, p = read_length(p, end)
            p = read_list(element, column, p, p + size, plan, 2)
        else:
            p = skip_field(tag, p, end, 1)


@part(inline=False)
def read_feature(p: int, end: int, row: int, plan: int) -> int:
    """Read a Feature in any form: its name anywhere, lists in pieces, lists of lists.

    Args:
        p: Where it begins.
        end: Where it ends.
        row: Number of the record.
        plan: Address of the plan.

    Returns:
        `end`, or a code.
    """
    start = p
    name, name_size = p, 0
    first = 255
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        kind = tag >> 3
        if tag == 10:
            name_size, name = read_length(p, end)
            p = name + name_size if name >= 0 else name
        elif 2 <= kind <= 5:
            p = read_list_field(_element(kind) | REPEATED, tag, p, end, row, plan, 1)
            first = min(first, kind)
        elif 6 <= kind <= 9 and tag & 7 == 2:
            size, p = read_length(p, end)
            if p >= 0:
                p = read_list(_element(kind), -1, p, p + size, plan, 2)
            first = min(first, kind)
        else:
            p = skip_field(tag, p, end, 1)
        if p < 0:
            return p
    every = i64_at(plan, _EVERY_V2)
    if every >= 0:
        _collect(start, end, 2, FIXED64, every, row, plan)
    number = find_name(name, name_size, i64_at(plan, _NAMES), i64_at(plan, _MASK))
    if number < 0:
        return end
    _note(number, first, row, plan)
    for kind in (2, 6, 3, 7, 4, 8, 5, 9):
        entry = _column_of(plan, number, kind)
        if entry >= 0:
            _collect(start, end, kind, entry & 255, entry >> 8, row, plan)
    return end


@part()
def _plain_feature(
    p: int, end: int, previous: int, row: int, plan: int, cursors: int, capacities: int, regions: int, every: int
) -> tuple[int, int]:
    """Read a Feature that is a name and one packed list.

    Returns:
        `end`, a code, or 0 if the Feature has another form; the number of its name, or `previous` if nobody wants it.
    """
    name_size = byte_at(p + 1)
    name = p + 2
    q = name + name_size
    tag = byte_at(q)
    if byte_at(p) != 10 or name_size > 127 or end - q < 2 or (tag != 18 and tag != 26 and tag != 34):
        return 0, previous
    size, q = read_length(q + 1, end)
    if q < 0 or size != end - q:
        return 0, previous
    number = find_next_name(
        previous,
        name,
        name_size,
        i64_at(plan, _NAMES),
        i64_at(plan, _MASK),
        i64_at(plan, _TEXTS),
        i64_at(plan, _FOLLOWERS),
    )
    kind = tag >> 3
    if kind == 2:
        if size & 7:
            return BAD_PACKED, previous
        if every >= 0:
            append_fids(FIXED64, every, q, size, cursors, capacities, regions)
    if number >= 0:
        _note(number, kind, row, plan)
        entry = _column_of(plan, number, kind)
        if entry >= 0:
            if kind == 2:
                append_fids(FIXED64, entry >> 8, q, size, cursors, capacities, regions)
                return end, number
            return append_bulk(entry, q, end, plan), number
        previous = number
    if kind == 4:
        return check_varints(q, end), previous
    if kind == 3 and size & 3:
        return BAD_PACKED, previous
    return end, previous


@part()
def _spread_fids(p: int, end: int, plan: int) -> int:
    """Append flat v1 fids to the columns of their slots; `end`, or a code."""
    if (end - p) & 7:
        return BAD_PACKED
    slots = i64_at(plan, _SLOTS)
    convert = i64_at(plan, _CONVERT)
    cursors = i64_at(plan, _CURSORS)
    capacities = i64_at(plan, _CAPACITIES)
    regions = i64_at(plan, _REGIONS)
    while p < end:
        # Fids of one slot mostly come together: up to eight at a time.
        count = min(run_of_slot(p), (end - p) >> 3)
        column = _int64(load_u16(slots, _int64(load_u64(p, 0) >> _uint64(54))))
        if column != _NO_SLOT:
            cursor = i64_at(cursors, column)
            if count <= i64_at(capacities, column) - cursor:
                target = i64_at(regions, column) + 8 * cursor
                if convert:
                    convert_line(target, p)
                else:
                    copy_line(target, p)
                prefetch(target + 128)
            prefetch(p + AHEAD)
            put_i64(cursors, column, cursor + count)
        p += 8 * count
    return p


@part(inline=False)
def check_label_tag(p: int, end: int, row: int, plan: int) -> int:
    """Check a LabelTag, of which nothing is kept.

    Args:
        p: Where it begins.
        end: Where it ends.
        row: Number of the record.
        plan: Address of the plan.

    Returns:
        `end`, or a code.
    """
    while p < end:
        tag, p = read_tag(p, end)
        if p >= 0:
            p = read_field(VARINT32 if tag >> 3 == 1 else FIXED32, tag, p, end, row, plan, 1)
        if p < 0:
            return p
    return p


@part(inline=False)
def read_other(tag: int, p: int, end: int, row: int, plan: int) -> int:
    """Read any field of an Instance but a feature; the position behind its value, or a code."""
    if tag == _LINE_ID:
        size, p = read_length(p, end)
        return read_line_id(p, p + size, row, plan, 1) if p >= 0 else p
    number = tag >> 3
    entry = i64_at(i64_at(plan, _TOP), number) if number < 128 else 0
    if number == 1 and i64_at(plan, _SLOTS):
        stop = p + 8
        begin = p
        if tag == _FID:
            size, begin = read_length(p, end)
            if begin < 0:
                return begin
            stop = begin + size
        if tag & 7 <= 2 and tag & 7 and stop <= end:
            after = _spread_fids(begin, stop, plan)
            if after < 0 or not entry & WANTED:
                return after
    if tag == _LABEL_TAG:
        size, p = read_length(p, end)
        return check_label_tag(p, p + size, row, plan) if p >= 0 else p
    return read_field(entry, tag, p, end, row, plan, 0)


@kernel("int64(int64)")
def scan_instances(plan: int) -> int:
    """Read the wanted fields of Instances into columns and cells.

    Args:
        plan: Address of the plan, int64[Slot.SIZE].

    Returns:
        How many records have a status other than 0.
    """
    rows = i64_at(plan, _ROWS)
    buffer = i64_at(plan, _BUFFER)
    cursors, capacities, regions = i64_at(plan, _CURSORS), i64_at(plan, _CAPACITIES), i64_at(plan, _REGIONS)
    every = i64_at(plan, _EVERY_V2)
    troubled = 0
    for row in range(rows):
        begin_row(plan, row)
        previous = -1
        start = buffer + i64_at(i64_at(plan, _OFFSETS), row)
        end = start + i64_at(i64_at(plan, _LENGTHS), row)
        p = start
        while p < end:
            place = p
            tag, p = read_tag(p, end)
            if tag == _FEATURE and p >= 0:
                size, p = read_length(p, end)
                if p >= 0:
                    stop = p + size
                    after, previous = _plain_feature(p, stop, previous, row, plan, cursors, capacities, regions, every)
                    p = after if after else read_feature(p, stop, row, plan)
            elif p >= 0:
                p = read_other(tag, p, end, row, plan)
            if p < 0:
                put_i64(i64_at(plan, _STATUS), row, p)
                put_i64(i64_at(plan, _PLACES), row, place - start)
                troubled += 1
                break
    end_rows(plan)
    return troubled

"""The scan of Examples: one pass over each record; reserved features take the place of the fields they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.features import EMPTY, ODD, keep_feature, plain_list, read_members, read_named
from trilith.data.scan.fields import (
    begin_row,
    check_line_id,
    end_rows,
    read_field,
    read_line_id,
    read_list,
    row_start,
    set_cell,
)
from trilith.data.scan.plan import Slot
from trilith.data.scan.wire import (
    FIXED32,
    append_fids,
    byte_at,
    check_utf8,
    find_next_name,
    i64_at,
    put_i64,
    read_length,
    read_tag,
    skip_field,
    varint,
)
from trilith.ops.jit import kernel, part
from trilith.ops.memory import load_u8, load_u32, store_u8

__all__ = [
    "check_raw",
    "check_raw_features",
    "first_bytes",
    "first_float",
    "forget_feature",
    "scan_examples",
]

if TYPE_CHECKING:
    _uint8: Any
    _uint64: Any
else:
    _uint8 = np.uint8
    _uint64 = np.uint64

_ROWS, _BUFFER, _OFFSETS, _LENGTHS = int(Slot.ROWS), int(Slot.BUFFER), int(Slot.OFFSETS), int(Slot.LENGTHS)
_NAMES, _MASK, _NAME_COUNT, _MEMBERS = int(Slot.NAMES), int(Slot.MASK), int(Slot.NAME_COUNT), int(Slot.MEMBERS)
_TOP, _SEEN, _CURSORS, _RESERVED = int(Slot.TOP), int(Slot.SEEN), int(Slot.CURSORS), int(Slot.RESERVED)
_STATUS, _PLACES, _PROMOTE = int(Slot.STATUS), int(Slot.PLACES), int(Slot.PROMOTE)
_TEXTS, _FOLLOWERS, _EVERY_V1 = int(Slot.TEXTS), int(Slot.FOLLOWERS), int(Slot.EVERY_V1)
_CAPACITIES, _REGIONS = int(Slot.CAPACITIES), int(Slot.REGIONS)
_LABEL, _WEIGHT, _LINE = int(Slot.LABEL), int(Slot.WEIGHT), int(Slot.LINE)

_MEMBER_COUNT = 17
_NAMED = 1 << 3 | 2
_RAW = 2 << 3 | 2
_LINE_ID = 100 << 3 | 2
_ONE = _uint64(0x3F800000)


@part(inline=False)
def forget_feature(number: int, row: int, plan: int) -> None:
    """Forget what an earlier feature of the same name and row had: the last one counts."""
    members = i64_at(plan, _MEMBERS)
    for kind in range(1, _MEMBER_COUNT):
        entry = i64_at(members, number * _MEMBER_COUNT + kind)
        if entry >= 0:
            put_i64(i64_at(plan, _CURSORS), entry >> 8, row_start(plan, row, entry >> 8))


@part()
def _note(number: int, kind: int, row: int, plan: int) -> int:
    """Mark a feature as present; 0 if it already was."""
    at = row * i64_at(plan, _NAME_COUNT) + number
    seen = i64_at(plan, _SEEN)
    fresh = 1
    if load_u8(seen, at) != _uint8(0):
        forget_feature(number, row, plan)
        fresh = 0
    store_u8(seen, at, _uint8(kind))
    return fresh


@part(inline=False)
def first_bytes(p: int, end: int) -> tuple[int, int]:
    """Where the first byte string of a BytesList begins and ends; -1 if there is none."""
    while p < end:
        tag, p = read_tag(p, end)
        if tag == 10:
            size, p = read_length(p, end)
            return p, p + size
        p = skip_field(tag, p, end, 3)
    return -1, -1


@part(inline=False)
def first_float(p: int, end: int) -> tuple[int, int]:
    """Where the first value of a FloatList lies, and 1; anything and 0 if there is none."""
    while p < end:
        tag, p = read_tag(p, end)
        if tag == 10:
            size, p = read_length(p, end)
            if size:
                return p, 1
        elif tag == 13:
            return p, 1
        else:
            p = skip_field(tag, p, end, 3)
    return p, 0


@part(inline=False)
def check_raw(p: int, end: int) -> int:
    """Check a NamedRawFeature, of which nothing is kept; `end` or a code."""
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        if tag == 10:
            size, p = read_length(p, end)
            if p >= 0:
                p = check_utf8(p, p + size)
        elif tag == 18:
            size, p = read_length(p, end)
            if p >= 0:
                p = check_raw_features(p, p + size)
        else:
            p = skip_field(tag, p, end, 1)
        if p < 0:
            return p
    return p


@part(inline=False)
def check_raw_features(p: int, end: int) -> int:
    """Check a RawFeature; `end` or a code."""
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        if tag == 10:
            size, p = read_length(p, end)
            if p >= 0:
                status, _, _, _ = read_members(p, p + size, 3)
                p = status if status < 0 else p + size
        else:
            p = skip_field(tag, p, end, 2)
        if p < 0:
            return p
    return p


@part()
def _plain_named(p: int, end: int) -> tuple[int, int, int, int, int]:
    """A NamedFeature as producers write it: name, one list, ids.

    Returns:
        The list's number, or 0 for any other form; the name's place and size; where the list begins and ends.
    """
    name_size = byte_at(p + 1)
    name = p + 2
    q = name + name_size
    if byte_at(p) != 10 or name_size > 127 or end - q < 2 or byte_at(q) != 18:
        return 0, name, 0, p, p
    size, q = read_length(q + 1, end)
    if q < 0:
        return 0, name, 0, p, p
    kind, start, stop = plain_list(q, q + size)
    if kind == 0:
        return 0, name, 0, p, p
    while stop < end:
        tag = byte_at(stop)
        if tag != 24 and tag != 48:
            return 0, name, 0, p, p
        _, stop = varint(stop + 1, end)
        if stop < 0:
            return 0, name, 0, p, p
    return kind, name, name_size, start, q + size


@kernel("int64(int64)")
def scan_examples(plan: int) -> int:
    """Read the wanted fields of Examples into columns and cells.

    Args:
        plan: Address of the plan, int64[Slot.SIZE].

    Returns:
        How many records have a status other than 0.
    """
    rows = i64_at(plan, _ROWS)
    buffer = i64_at(plan, _BUFFER)
    names, mask = i64_at(plan, _NAMES), i64_at(plan, _MASK)
    reserved = i64_at(plan, _RESERVED)
    top = i64_at(plan, _TOP)
    texts, followers, members = i64_at(plan, _TEXTS), i64_at(plan, _FOLLOWERS), i64_at(plan, _MEMBERS)
    cursors, capacities, regions = i64_at(plan, _CURSORS), i64_at(plan, _CAPACITIES), i64_at(plan, _REGIONS)
    only_columns = i64_at(plan, _EVERY_V1) < 0
    troubled = 0
    for row in range(rows):
        begin_row(plan, row)
        previous = -1
        start = buffer + i64_at(i64_at(plan, _OFFSETS), row)
        end = start + i64_at(i64_at(plan, _LENGTHS), row)
        promote = load_u8(i64_at(plan, _PROMOTE), row) != _uint8(0)
        status = 0
        promoted = 0
        own, own_end, own_place = -1, -1, 0
        line, line_end, line_place = -1, -1, 0
        labels, labels_end = -1, -1
        weight = -1
        p = start
        while p < end:
            place = p
            tag, p = read_tag(p, end)
            if p < 0:
                break
            if tag == _NAMED:
                size, p = read_length(p, end)
                if p < 0:
                    break
                stop = p + size
                kind, name, name_size, value, value_end = _plain_named(p, stop)
                odd = 0
                if kind == 0:
                    odd, name, name_size, kind, value, value_end = read_named(p, stop, 2, 1)
                    if odd < 0:
                        p = odd
                        break
                p = stop
                number = find_next_name(previous, name, name_size, names, mask, texts, followers)
                if number < 0:
                    checked = check_utf8(name, name + name_size)
                    if checked < 0:
                        p = checked
                        break
                else:
                    previous = number
                    if kind <= 2 and number < reserved and only_columns and odd == 0 and byte_at(value) == 10:
                        # By far the most frequent case: a feature with one packed list of fids.
                        size, run = read_length(value + 1, value_end)
                        if run >= 0 and run + size == value_end and size & 7 == 0 and value < value_end:
                            _note(number, kind, row, plan)
                            entry = i64_at(members, number * _MEMBER_COUNT + kind)
                            if entry >= 0:
                                append_fids(entry & 255, entry >> 8, run, size, cursors, capacities, regions)
                            continue
                    fresh = _note(number, kind, row, plan)
                    if odd:
                        status = ODD
                    if number >= reserved and promote and promoted != 7:
                        # Labels of two features add up, and only the library keeps count of that.
                        if fresh == 0:
                            status = ODD
                        which = number - reserved
                        promoted |= 1 << which
                        if which == 0:
                            if kind == 6:
                                line, line_end = first_bytes(value, value_end)
                                line_place = place
                        elif which == 1:
                            if kind == 3:
                                labels, labels_end = value, value_end
                        else:
                            weight = 0
                            if kind == 3:
                                at, there = first_float(value, value_end)
                                if there:
                                    weight = at
                if kind != EMPTY:
                    checked = keep_feature(number, kind, value, value_end, plan, 3)
                    if checked < 0:
                        p = checked
                        break
            elif tag == _LINE_ID:
                if own >= 0:
                    status = ODD
                size, p = read_length(p, end)
                if p < 0:
                    break
                own, own_end, own_place = p, p + size, place
                p += size
            elif tag == _RAW:
                size, p = read_length(p, end)
                if p >= 0:
                    p = check_raw(p, p + size)
                if p < 0:
                    break
            else:
                field = tag >> 3
                entry = i64_at(top, field) if field < 128 else 0
                p = read_field(entry, tag, p, end, row, plan, 0)
                if p < 0:
                    break
        if p >= 0 and own >= 0:
            # Even one that a reserved feature replaces must be sound; what it set is set anew or taken back.
            place = own_place
            p = (
                read_line_id(own, own_end, row, plan, 1)
                if line < 0
                else check_line_id(own, own_end, i64_at(plan, _LINE))
            )
        if p >= 0 and line >= 0:
            place = line_place
            p = read_line_id(line, line_end, row, plan, 0)
        if p < 0:
            status = p
        else:
            if labels >= 0 and i64_at(plan, _LABEL) >= 0:
                read_list(FIXED32, i64_at(plan, _LABEL), labels, labels_end, plan, 3)
            if weight >= 0 and i64_at(plan, _WEIGHT) >= 0:
                set_cell(plan, i64_at(plan, _WEIGHT), row, _uint64(load_u32(weight, 0)) if weight else _ONE)
        if status != 0:
            put_i64(i64_at(plan, _STATUS), row, status)
            put_i64(i64_at(plan, _PLACES), row, place - start)
            troubled += 1
    end_rows(plan)
    return troubled

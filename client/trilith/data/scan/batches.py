"""The scan of an ExampleBatch: columns lie together on the wire, so it goes list by list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.examples import check_raw
from trilith.data.scan.features import EMPTY, ODD, keep_feature, plain_list, read_members
from trilith.data.scan.fields import begin_row, end_rows, read_line_id
from trilith.data.scan.plan import Slot
from trilith.data.scan.wire import check_utf8, find_name, i64_at, put_i64, read_length, read_tag, skip_field, varint
from trilith.ops.jit import kernel, part
from trilith.ops.memory import store_u8

__all__ = [
    "forget_list",
    "list_header",
    "measure_batch",
    "read_features",
    "scan_batch",
    "scan_line_ids",
]

if TYPE_CHECKING:
    _int64: Any
    _uint8: Any
    _uint64: Any
else:
    _int64 = np.int64
    _uint8 = np.uint8
    _uint64 = np.uint64

_ROWS, _BUFFER, _OFFSETS, _LENGTHS = int(Slot.ROWS), int(Slot.BUFFER), int(Slot.OFFSETS), int(Slot.LENGTHS)
_NAMES, _MASK, _NAME_COUNT, _MEMBERS = int(Slot.NAMES), int(Slot.MASK), int(Slot.NAME_COUNT), int(Slot.MEMBERS)
_SEEN, _CURSORS, _SPLITS, _LISTS = int(Slot.SEEN), int(Slot.CURSORS), int(Slot.SPLITS), int(Slot.LISTS)
_STATUS, _PLACES = int(Slot.STATUS), int(Slot.PLACES)

_MEMBER_COUNT = 17
_LIST = 1 << 3 | 2
_RAW_LIST = 2 << 3 | 2
_BATCH_SIZE = 3 << 3
_TYPE = 3 << 3
_ID = 4 << 3


@part(inline=False)
def _int32(value: np.uint64) -> int:
    return _int64(value << _uint64(32)) >> 32  # type: ignore[no-any-return]


@part(inline=False)
def list_header(p: int, end: int) -> tuple[int, int, int, int, int, int]:
    """Read everything of a NamedFeatureList but its features.

    Returns:
        `end` or a code; where its name begins, its size; its type; its id; how many features it has.
    """
    name, name_size, kind, number, features = p, 0, 0, 0, 0
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p, 0, 0, 0, 0, 0
        if tag == 10:
            name_size, name = read_length(p, end)
            p = name if name < 0 else check_utf8(name, name + name_size)
        elif tag == 18:
            size, p = read_length(p, end)
            p = p if p < 0 else p + size
            features += 1
        elif tag in (_TYPE, _ID):
            value, p = varint(p, end)
            if tag == _TYPE:
                kind = _int32(value)
            else:
                number = _int32(value)
        else:
            p = skip_field(tag, p, end, 1)
        if p < 0:
            return p, 0, 0, 0, 0, 0
    return p, name, name_size, kind, number, features


@kernel("int64(int64, int64, int64)")
def measure_batch(p: int, end: int, out: int) -> int:
    """Find out how many rows an ExampleBatch has.

    Args:
        p: Where it begins.
        end: Where it ends.
        out: Address of int64[3], written: batch_size, most features in a list, where the trouble lies.

    Returns:
        0, or a code.
    """
    start = p
    put_i64(out, 0, 0)
    put_i64(out, 1, 0)
    while p < end:
        place = p
        tag, p = read_tag(p, end)
        if p >= 0:
            if tag == _LIST:
                size, p = read_length(p, end)
                if p >= 0:
                    p, _, _, _, _, features = list_header(p, p + size)
                    put_i64(out, 1, max(i64_at(out, 1), features))
            elif tag == _BATCH_SIZE:
                value, p = varint(p, end)
                put_i64(out, 0, _int32(value))
            else:
                p = skip_field(tag, p, end, 0)
        if p < 0:
            put_i64(out, 2, place - start)
            return p
    return 0


@part(inline=False)
def read_features(p: int, end: int, number: int, plan: int) -> int:
    """Read the features of a list; 0, `ODD` or a code.

    Args:
        p: Where the list begins; it was checked by `list_header`.
        end: Where it ends.
        number: Number of its name, -1 if nobody asked for it.
        plan: Address of the plan.
    """
    status = 0
    row = 0
    rows = i64_at(plan, _ROWS)
    names = i64_at(plan, _NAME_COUNT)
    while p < end:
        tag, p = read_tag(p, end)
        if tag != 18:
            p = skip_field(tag, p, end, 1)
            continue
        size, p = read_length(p, end)
        stop = p + size
        kind, value, value_end = plain_list(p, stop)
        if kind == 0 or kind > 6:
            found, kind, value, value_end = read_members(p, stop, 2)
            if found < 0:
                return found
            if found == ODD and number >= 0:
                status = ODD
        p = stop
        if kind != EMPTY:
            checked = keep_feature(number, kind, value, value_end, plan, 3)
            if checked < 0:
                return checked
        row += 1
        if number >= 0:
            store_u8(i64_at(plan, _SEEN), (row - 1) * names + number, _uint8(kind))
            for member in range(1, _MEMBER_COUNT):
                entry = i64_at(i64_at(plan, _MEMBERS), number * _MEMBER_COUNT + member)
                if entry >= 0:
                    column = entry >> 8
                    cursor = i64_at(i64_at(plan, _CURSORS), column)
                    put_i64(i64_at(plan, _SPLITS), column * (rows + 1) + row, cursor)
    return status


@kernel("int64(int64)")
def scan_batch(plan: int) -> int:
    """Read the wanted lists of one ExampleBatch into columns.

    Args:
        plan: Address of the plan, int64[Slot.SIZE]. ROWS is the most features in any list, OFFSETS and LENGTHS have one
            element, SPLITS holds zeros and is written up to the features of each list.

    Returns:
        0, `ODD` or a code.
    """
    start = i64_at(plan, _BUFFER) + i64_at(i64_at(plan, _OFFSETS), 0)
    end = start + i64_at(i64_at(plan, _LENGTHS), 0)
    names, mask = i64_at(plan, _NAMES), i64_at(plan, _MASK)
    lists = i64_at(plan, _LISTS)
    rows = i64_at(plan, _ROWS)
    status = 0
    p = start
    while p < end:
        place = p
        tag, p = read_tag(p, end)
        if p < 0:
            break
        if tag == _LIST:
            size, p = read_length(p, end)
            stop = p + size
            p, name, name_size, kind, list_id, features = list_header(p, stop)
            number = find_name(name, name_size, names, mask)
            if number >= 0:
                if i64_at(lists, 3 * number) >= 0:
                    # A second list of one name: the last one counts.
                    forget_list(number, plan)
                put_i64(lists, 3 * number, features)
                put_i64(lists, 3 * number + 1, kind)
                put_i64(lists, 3 * number + 2, list_id)
            found = read_features(stop - size, stop, number, plan)
            if found < 0:
                p = found
                break
            status |= found
        elif tag == _RAW_LIST:
            size, p = read_length(p, end)
            if p >= 0:
                p = check_raw(p, p + size)
        else:
            p = skip_field(tag, p, end, 0)
        if p < 0:
            break
    if p < 0:
        status = p
    put_i64(i64_at(plan, _STATUS), 0, status)
    put_i64(i64_at(plan, _PLACES), 0, place - start if start < end else rows)
    return status


@part(inline=False)
def forget_list(number: int, plan: int) -> None:
    """Take back what a list of this name left."""
    rows = i64_at(plan, _ROWS)
    names = i64_at(plan, _NAME_COUNT)
    for row in range(rows):
        store_u8(i64_at(plan, _SEEN), row * names + number, _uint8(0))
    for member in range(1, _MEMBER_COUNT):
        entry = i64_at(i64_at(plan, _MEMBERS), number * _MEMBER_COUNT + member)
        if entry >= 0:
            column = entry >> 8
            put_i64(i64_at(plan, _CURSORS), column, 0)
            for row in range(rows + 1):
                put_i64(i64_at(plan, _SPLITS), column * (rows + 1) + row, 0)


@kernel("int64(int64)")
def scan_line_ids(plan: int) -> int:
    """Read the wanted fields of LineIds.

    Args:
        plan: Address of the plan, int64[Slot.SIZE].

    Returns:
        How many LineIds have a status other than 0.
    """
    troubled = 0
    for row in range(i64_at(plan, _ROWS)):
        begin_row(plan, row)
        start = i64_at(plan, _BUFFER) + i64_at(i64_at(plan, _OFFSETS), row)
        p = read_line_id(start, start + i64_at(i64_at(plan, _LENGTHS), row), row, plan, 0)
        if p < 0:
            put_i64(i64_at(plan, _STATUS), row, p)
            put_i64(i64_at(plan, _PLACES), row, 0)
            troubled += 1
    end_rows(plan)
    return troubled

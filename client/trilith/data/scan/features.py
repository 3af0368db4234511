"""Features as Examples and ExampleBatches hold them: one of sixteen kinds of value."""

from __future__ import annotations

from trilith.data.scan.fields import append_bulk, check_lists, read_list
from trilith.data.scan.plan import Slot
from trilith.data.scan.wire import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    byte_at,
    check_utf8,
    i64_at,
    read_length,
    read_tag,
    skip_field,
)
from trilith.ops.jit import part

__all__ = [
    "EMPTY",
    "ODD",
    "check_value",
    "element_of",
    "keep_feature",
    "keep_value",
    "member_wire",
    "plain_list",
    "read_members",
    "read_named",
]

_MEMBERS, _EVERY_V1, _EVERY_V2 = int(Slot.MEMBERS), int(Slot.EVERY_V1), int(Slot.EVERY_V2)
_MEMBER_COUNT = 17

ODD = 1
"""Status of a message whose parts the protobuf library must merge: a feature or a value that occurs twice."""
EMPTY = 255
"""Kind of a feature that holds nothing."""


@part(inline=False)
def element_of(kind: int) -> int:
    """How the values of a list are written, by its number in Feature; lists of lists by their elements."""
    if kind in (1, 2, 7, 16, 4, 9):
        return FIXED64
    if kind in (3, 8):
        return FIXED32
    if kind in (5, 10):
        return VARINT
    return BYTES


@part()
def member_wire(kind: int) -> int:
    """The wire type of a member of Feature, -1 if there is no such member."""
    if 1 <= kind <= 11 or kind == 15 or kind == 16:
        return 2
    if kind == 12:
        return 0
    if kind == 13:
        return 5
    return 1 if kind == 14 else -1


@part(inline=False)
def read_members(p: int, end: int, depth: int) -> tuple[int, int, int, int]:
    """Find what a Feature holds.

    Args:
        p: Where it begins.
        end: Where it ends.
        depth: How many messages enclose its fields, itself included.

    Returns:
        0, `ODD` or a code; the number of the member, 255 for none; where its value begins and ends.
    """
    kind, start, stop = EMPTY, p, p
    status = 0
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p, 0, 0, 0
        number = tag >> 3
        begin = p
        p = skip_field(tag, p, end, depth)
        if p < 0:
            return p, 0, 0, 0
        if member_wire(number) == tag & 7:
            if kind != EMPTY:
                status = ODD
            if tag & 7 == 2:
                _, begin = read_length(begin, end)
                if number < 15 or number == 16:
                    # What is not kept must be sound all the same: the library reads it before it drops it.
                    checked = check_value(number, begin, p, depth + 1)
                    if checked < 0:
                        return checked, 0, 0, 0
            kind, start, stop = number, begin, p
    return status, kind, start, stop


@part(inline=False)
def check_value(kind: int, p: int, end: int, depth: int) -> int:
    """Check a list, or list of lists, of a Feature; `end` or a code."""
    element = element_of(kind)
    if kind <= 6:
        return read_list(element, -1, p, end, 0, depth)
    return check_lists(element, p, end, 0, depth)


@part()
def plain_list(p: int, end: int) -> tuple[int, int, int]:
    """A Feature that is one list without anything else: its number, where it begins and ends; 0 in any other form."""
    tag = byte_at(p)
    if end - p < 2 or tag & 7 != 2 or tag > 50:
        return 0, p, p
    size, p = read_length(p + 1, end)
    if p < 0 or p + size != end or tag < 8:
        return 0, p, p
    return tag >> 3, p, end


@part(inline=False)
def keep_value(kind: int, column_entry: int, p: int, end: int, plan: int, depth: int) -> int:
    """Append the values of a list to a column.

    Args:
        kind: Number of the list in Feature, 1 to 6.
        column_entry: Its entry in MEMBERS, `NOWHERE` to check it only.
        p: Where the list begins.
        end: Where it ends.
        plan: Address of the plan.
        depth: How many messages enclose the list's fields, the list included.

    Returns:
        `end`, or a code.
    """
    if column_entry < 0:
        return read_list(element_of(kind), -1, p, end, plan, depth)
    if end - p >= 2 and byte_at(p) == 10 and kind != 6:
        # The usual form: one packed run.
        size, run = read_length(p + 1, end)
        if run >= 0 and run + size == end:
            return append_bulk(column_entry, run, end, plan)
    return read_list(column_entry & 255, column_entry >> 8, p, end, plan, depth)


@part()
def keep_feature(number: int, kind: int, p: int, end: int, plan: int, depth: int) -> int:
    """Keep the values of a feature, or check them; `end` or a code.

    Args:
        number: Number of its name, -1 if nobody asked for it.
        kind: Number of the member it holds.
        p: Where the member begins.
        end: Where it ends.
        plan: Address of the plan.
        depth: How many messages enclose the member's fields, the member included.
    """
    if kind > 6:
        return end  # nothing that a column can hold; `read_members` checked it
    if kind <= 2:
        every = i64_at(plan, _EVERY_V1 if kind == 1 else _EVERY_V2)
        if every >= 0:
            checked = read_list(FIXED64, every, p, end, plan, depth)
            if checked < 0:
                return checked
    entry = -1
    if number >= 0:
        entry = i64_at(i64_at(plan, _MEMBERS), number * _MEMBER_COUNT + kind)
    return keep_value(kind, entry, p, end, plan, depth)


@part(inline=False)
def read_named(p: int, end: int, feature_field: int, depth: int) -> tuple[int, int, int, int, int, int]:
    """Find name and value of a NamedFeature in any form.

    Args:
        p: Where it begins.
        end: Where it ends.
        feature_field: Number of the field with the Feature.
        depth: How many messages enclose its fields, itself included.

    Returns:
        0, `ODD` or a code; where the name begins, its size; the member's number; where its value begins and ends.
    """
    name, name_size = p, 0
    kind, start, stop = EMPTY, p, p
    features = status = 0
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p, 0, 0, 0, 0, 0
        if tag == 10:
            name_size, name = read_length(p, end)
            if name < 0:
                return name, 0, 0, 0, 0, 0
            p = check_utf8(name, name + name_size)
        elif tag == feature_field << 3 | 2:
            size, p = read_length(p, end)
            if p < 0:
                return p, 0, 0, 0, 0, 0
            found, kind, start, stop = read_members(p, p + size, depth + 1)
            if found < 0:
                return found, 0, 0, 0, 0, 0
            features += 1
            if found == ODD or features > 1:
                status = ODD
            p += size
        else:
            p = skip_field(tag, p, end, depth)
        if p < 0:
            return p, 0, 0, 0, 0, 0
    return status, name, name_size, kind, start, stop

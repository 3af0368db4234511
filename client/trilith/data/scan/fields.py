"""Fields as every message has them: scalars into cells, lists into columns, a LineId by its table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.plan import BLOCK_ROWS, REPEATED, WANTED, Slot
from trilith.data.scan.wire import (
    BAD_PACKED,
    BYTES,
    TRUNCATED,
    append_run,
    append_span,
    check_varints,
    decoded,
    i64_at,
    long_varint,
    put_i64,
    read_length,
    read_tag,
    skip_field,
    varint,
    wire_type,
)
from trilith.ops.jit import part
from trilith.ops.memory import copy_line, load_u32, load_u64, store_u8, store_u64

__all__ = [
    "append_bulk",
    "begin_row",
    "check_line_id",
    "check_lists",
    "end_rows",
    "read_field",
    "read_line_id",
    "read_list",
    "read_list_field",
    "row_start",
    "set_cell",
    "write_splits",
]

if TYPE_CHECKING:
    _uint64: Any
    _uint8: Any
else:
    _uint64 = np.uint64
    _uint8 = np.uint8

_BUFFER, _ROWS, _CELLS, _PRESENT, _LINE = (
    int(each) for each in (Slot.BUFFER, Slot.ROWS, Slot.CELLS, Slot.PRESENT, Slot.LINE)
)
_CURSORS, _CAPACITIES, _REGIONS = int(Slot.CURSORS), int(Slot.CAPACITIES), int(Slot.REGIONS)
_COLUMNS, _SPLITS, _BLOCK = int(Slot.COLUMNS), int(Slot.SPLITS), int(Slot.BLOCK)


@part()
def set_cell(plan: int, cell: int, row: int, value: np.uint64) -> None:
    """Write a scalar of a row and mark it as present."""
    at = cell * i64_at(plan, _ROWS) + row
    store_u64(i64_at(plan, _CELLS), at, value)
    store_u8(i64_at(plan, _PRESENT), at, _uint8(1))


@part(inline=False)
def read_list_field(entry: int, tag: int, p: int, end: int, row: int, plan: int, depth: int) -> int:
    """Read a field that is a list of scalars: packed, or one value of it.

    Args:
        entry: What the table says about the field.
        tag: The field's tag.
        p: Where its value begins.
        end: Where the message ends.
        row: Number of the record.
        plan: Address of the plan.
        depth: How many messages enclose the message.

    Returns:
        The position behind the value, or a code.
    """
    element = entry & 255
    wanted = entry & WANTED
    kind = tag & 7
    single = wire_type(element)
    if kind != single and kind != 2:
        return skip_field(tag, p, end, depth)
    stop = p
    if kind == 2:
        size, p = read_length(p, end)
        if p < 0:
            return p
        stop = p + size
        if element == BYTES:
            if wanted:
                append_span(
                    entry >> 16,
                    p - i64_at(plan, _BUFFER),
                    size,
                    i64_at(plan, _CURSORS),
                    i64_at(plan, _CAPACITIES),
                    i64_at(plan, _REGIONS),
                )
            return stop
    elif kind == 0:
        _, stop = long_varint(p, end)
        if stop < 0:
            return stop
    else:
        stop = p + (8 if kind == 1 else 4)
        if stop > end:
            return TRUNCATED
    if wanted:
        return append_run(
            element,
            entry >> 16,
            p,
            stop,
            i64_at(plan, _CURSORS),
            i64_at(plan, _CAPACITIES),
            i64_at(plan, _REGIONS),
        )
    if single == 0:
        return check_varints(p, stop)
    return BAD_PACKED if (stop - p) % (4 if single == 5 else 8) else stop


@part()
def read_field(entry: int, tag: int, p: int, end: int, row: int, plan: int, depth: int) -> int:
    """Read a field by its entry in TOP or LINE; the position behind its value, or a code."""
    if entry & REPEATED:
        return read_list_field(entry, tag, p, end, row, plan, depth)
    element = entry & 255
    if not entry & WANTED or tag & 7 != wire_type(element):
        return skip_field(tag, p, end, depth)
    kind = tag & 7
    cell = entry >> 16
    if kind == 0:
        value, p = varint(p, end)
        if p >= 0:
            set_cell(plan, cell, row, decoded(value, element))
        return p
    if kind == 2:
        size, p = read_length(p, end)
        if p < 0:
            return p
        set_cell(plan, cell, row, _uint64(p - i64_at(plan, _BUFFER)))
        set_cell(plan, cell + 1, row, _uint64(size))
        return p + size
    if kind == 1:
        if end - p < 8:
            return TRUNCATED
        set_cell(plan, cell, row, load_u64(p, 0))
        return p + 8
    if end - p < 4:
        return TRUNCATED
    set_cell(plan, cell, row, _uint64(load_u32(p, 0)))
    return p + 4


@part(inline=False)
def read_line_id(p: int, end: int, row: int, plan: int, depth: int) -> int:
    """Read the fields of a LineId.

    Args:
        p: Where it begins.
        end: Where it ends.
        row: Number of the record.
        plan: Address of the plan.
        depth: How many messages enclose the LineId, itself included.

    Returns:
        `end`, or a code.
    """
    table = i64_at(plan, _LINE)
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        number = tag >> 3
        entry = i64_at(table, number) if number < 256 else 0
        p = read_field(entry, tag, p, end, row, plan, depth)
        if p < 0:
            return p
    return p


@part(inline=False)
def check_line_id(p: int, end: int, table: int) -> int:
    """Check a LineId of which nothing is kept.

    Args:
        p: Where it begins.
        end: Where it ends.
        table: Address of the table of its fields.

    Returns:
        `end`, or a code.
    """
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        number = tag >> 3
        entry = i64_at(table, number) & ~WANTED if number < 256 else 0
        p = read_field(entry, tag, p, end, 0, 0, 1)
        if p < 0:
            return p
    return p


@part()
def append_bulk(entry: int, p: int, end: int, plan: int) -> int:
    """Append a run to the column of an entry of MEMBERS; `end`, or a code."""
    return append_run(
        entry & 255,
        entry >> 8,
        p,
        end,
        i64_at(plan, _CURSORS),
        i64_at(plan, _CAPACITIES),
        i64_at(plan, _REGIONS),
    )


@part(inline=False)
def read_list(element: int, column: int, p: int, end: int, plan: int, depth: int) -> int:
    """Read a message whose field 1 is a list of scalars, such as FidList.

    Args:
        element: How a value is written.
        column: Where values go, or -1 to check the message only.
        p: Where the message begins.
        end: Where it ends.
        plan: Address of the plan.
        depth: How many messages enclose the fields, the list included.

    Returns:
        `end`, or a code.
    """
    entry = element | REPEATED
    if column >= 0:
        entry |= WANTED | column << 16
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        if tag >> 3 == 1:
            p = read_list_field(entry, tag, p, end, 0, plan, depth)
        else:
            p = skip_field(tag, p, end, depth)
        if p < 0:
            return p
    return p


@part(inline=False)
def check_lists(element: int, p: int, end: int, plan: int, depth: int) -> int:
    """Check a message whose field 1 is a list of lists, such as FidLists.

    Args:
        element: How a value is written.
        p: Where the message begins.
        end: Where it ends.
        plan: Address of the plan.
        depth: How many messages enclose the fields, the outer list included.

    Returns:
        `end`, or a code.
    """
    while p < end:
        tag, p = read_tag(p, end)
        if p < 0:
            return p
        if tag == 10:
            size, p = read_length(p, end)
            if p >= 0:
                p = read_list(element, -1, p, p + size, plan, depth + 1)
        else:
            p = skip_field(tag, p, end, depth)
        if p < 0:
            return p
    return p


@part(inline=False)
def write_splits(plan: int, first: int, count: int) -> None:
    """Write the splits of some rows, column by column: whole lines at a time rather than one value per column.

    Args:
        plan: Address of the plan.
        first: Number of the first row.
        count: Rows in the block.
    """
    columns = i64_at(plan, _COLUMNS)
    block = i64_at(plan, _BLOCK)
    out = i64_at(plan, _SPLITS)
    stride = i64_at(plan, _ROWS) + 1
    for column in range(columns):
        target = out + 8 * (column * stride + first)
        for r in range(count):
            store_u64(target, r, load_u64(block, r * (columns + 8) + column))


@part()
def begin_row(plan: int, row: int) -> None:
    """Remember how many values each column has as a row begins."""
    slot = row % BLOCK_ROWS
    if slot == 0 and row:
        write_splits(plan, row - BLOCK_ROWS, BLOCK_ROWS)
    columns = i64_at(plan, _COLUMNS)
    block = i64_at(plan, _BLOCK) + 8 * slot * (columns + 8)
    cursors = i64_at(plan, _CURSORS)
    for c in range(0, columns, 8):
        copy_line(block + 8 * c, cursors + 8 * c)


@part()
def row_start(plan: int, row: int, column: int) -> int:
    """How many values a column had as the row began."""
    columns = i64_at(plan, _COLUMNS)
    return i64_at(i64_at(plan, _BLOCK), (row % BLOCK_ROWS) * (columns + 8) + column)


@part()
def end_rows(plan: int) -> None:
    """Write the splits that are still in the block, and the last one."""
    rows = i64_at(plan, _ROWS)
    columns = i64_at(plan, _COLUMNS)
    if rows:
        first = (rows - 1) // BLOCK_ROWS * BLOCK_ROWS
        write_splits(plan, first, rows - first)
    out = i64_at(plan, _SPLITS)
    cursors = i64_at(plan, _CURSORS)
    for column in range(columns):
        put_i64(out, column * (rows + 1) + rows, i64_at(cursors, column))

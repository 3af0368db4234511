"""The scan of rows of columns: what a scan of their bytes would find, without making any."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.fids import v1_to_v2
from trilith.data.line_ids import LineField
from trilith.data.messages import INSTANCE_WEIGHT, LINE_ID
from trilith.data.scan import wire
from trilith.data.scan.plan import NOWHERE
from trilith.data.scan.result import Scan
from trilith.data.scan.rows import LABEL, NO_TEXT, ColumnType, RowColumn, Rows, line_field_of, merged, packed_text
from trilith.data.scan.schema import Schema
from trilith.ops.ragged import Ragged

__all__ = ["scan_rows"]

_ONE = np.float32(1).view(np.uint32)


def scan_rows(schema: Schema, rows: Rows, *, promote: bool) -> Scan | None:
    """Read the columns that a schema wants, sharing their memory; None where only the bytes tell.

    Args:
        schema: Of Examples.
        rows: Any number.
        promote: Let reserved features stand for the fields they name.
    """
    if schema.every[0] >= 0 or any(column.name == LINE_ID for column in rows.columns):
        return None  # the order of all features' fids matters, or a LineId in bytes
    n = len(rows)
    scan = Scan(
        records=rows,
        text=NO_TEXT,
        skipped=0,
        splits=[],
        values=[],
        cells=np.zeros((schema.cells, n), np.uint64),
        present=np.zeros((schema.cells, n), np.uint8),
        seen=np.zeros((len(schema.names), n), np.uint8).T,  # a name at a time is looked at
    )
    parts: dict[int, list[Ragged[Any]]] = defaultdict(list)
    texts: list[tuple[RowColumn, int | None, int]] = []  # byte strings: the column, and the values or cell they go to
    for column in rows.columns:
        there: Any = slice(None) if column.there is None else column.there
        field = line_field_of(column.name)
        if field is not None:
            cell = schema.line_cells.get(field.name)
            if cell is not None:
                scan.present[cell, there] = 1
                if column.type is ColumnType.BYTES:
                    texts.append((column, None, cell))
                else:
                    scan.cells[cell, there] = _bits(field, column.lists.values)
        elif column.name == LABEL:
            if schema.label_column >= 0:
                labels = column.lists.values.astype(np.float64).astype(np.float32)
                parts[schema.label_column].append(Ragged(labels, column.lists.row_splits))
        elif (number := schema.name_numbers.get(column.name)) is not None:
            scan.seen[there, number] = column.type.member
            entry = int(schema.members[number, column.type.member])
            if entry != NOWHERE and column.type is ColumnType.BYTES:
                texts.append((column, entry >> 8, -1))
            elif entry != NOWHERE:
                convert = entry & 255 == wire.V1_TO_V2
                values = v1_to_v2(column.lists.values) if convert else column.lists.values
                parts[entry >> 8].append(Ragged(values.view(schema.columns[entry >> 8]), column.lists.row_splits))
            if column.name == INSTANCE_WEIGHT and promote and schema.weight_cell >= 0:
                scan.present[schema.weight_cell, there] = 1
                scan.cells[schema.weight_cell, there] = _weights(column)[there]
    if texts:
        scan.text, spans = packed_text([column for column, _, _ in texts])
        for (column, place, cell), found in zip(texts, spans, strict=True):
            if place is not None:
                parts[place].append(Ragged(found, column.lists.row_splits))
            else:
                there = slice(None) if column.there is None else column.there
                scan.cells[cell, there], scan.cells[cell + 1, there] = found.T.view(np.uint64)
    none = np.zeros(n + 1, np.int64)
    for place, dtype in enumerate(schema.columns):
        spanned = dtype == np.object_
        element: npt.DTypeLike = np.int64 if spanned else dtype
        made = merged(parts.get(place) or [Ragged(np.empty((0, 2) if spanned else 0, element), none)], element)
        scan.values.append(made.values)
        scan.splits.append(made.row_splits)
    return scan


def _bits(field: LineField, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of a column as the cells of a scalar of LineId hold them."""
    stored = (values != 0 if field.is_bool else values).astype(field.dtype)
    return stored.view({1: np.uint8, 4: np.uint32}.get(stored.itemsize, np.uint64))


def _weights(column: RowColumn) -> npt.NDArray[np.uint32]:
    """uint32[rows]: what a feature says of the weight of each row, as bits: its first float, else 1."""
    weights = np.full(len(column.lists), _ONE)
    if column.type is ColumnType.FLOAT:
        full = column.lists.lengths > 0
        weights[full] = column.lists.values[column.lists.row_splits[:-1][full]].view(np.uint32)
    return weights

"""The Arrow IPC file of a checkpoint that holds a sliding occurrence filter: its cells in use, block by block.

Columns: `block` uint16, `cell` uint32, `value` uint16; the schema's metadata carry the filter's shape and state words.
Only cells in use are written: a filter's capacity is large and mostly untouched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from trilith.checkpoint import FileRecord
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith_services.ps.checkpoint.damage import as_damage, checked_batches
from trilith_services.ps.checkpoint.row_files import open_arrow, write_arrow
from trilith_services.ps.engine.filters import SlidingFilter
from trilith_services.ps.engine.kernels.filters import EXTRA_CELLS, SLIDING_WORDS

__all__ = ["load_filter", "write_filter"]

FORMAT = "trilith-filter"
VERSION = 1
_COLUMNS = [("block", pa.uint16()), ("cell", pa.uint32()), ("value", pa.uint16())]


def write_filter(folder: Folder, name: str, table: str, occurrence_filter: SlidingFilter) -> FileRecord:
    """Write the filter while it goes on counting; each block is one moment."""
    state = occurrence_filter.export_state()
    metadata = {
        "trilith.format": FORMAT,
        "trilith.version": str(VERSION),
        "trilith.shape": json.dumps(_shape(occurrence_filter)),
        "trilith.state": json.dumps(state.tolist()),
    }
    schema = pa.schema(
        [
            pa.field("block", pa.uint16(), nullable=False),
            pa.field("cell", pa.uint32(), nullable=False),
            pa.field("value", pa.uint16(), nullable=False),
        ],
        metadata=metadata,
    )
    return write_arrow(folder, name, schema, _batches(occurrence_filter, schema), kind="filter", table=table)


def _batches(occurrence_filter: SlidingFilter, schema: Any) -> Iterator[Any]:
    for block in range(occurrence_filter.blocks):
        cells, _ = occurrence_filter.export_block(block)
        used = np.flatnonzero(cells)
        if used.size:
            yield pa.record_batch(
                [
                    pa.array(np.full(used.size, block, np.uint16)),
                    pa.array(used.astype(np.uint32)),
                    pa.array(cells[used]),
                ],
                schema=schema,
            )


def load_filter(folder: Folder, name: str, occurrence_filter: SlidingFilter) -> None:
    """Make the filter what the file holds.

    Raises:
        CheckpointError: The file is damaged or of a filter of another shape; the filter is unchanged.
    """
    where = folder.path(name)
    with open_arrow(folder, name) as reader:
        with as_damage(where):
            metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            if metadata.get("trilith.format") != FORMAT or metadata.get("trilith.version") != str(VERSION):
                raise CheckpointError(f"{where}: not a file of format {FORMAT!r}, version {VERSION}")
            columns = [(field.name, field.type) for field in reader.schema]
            if columns != _COLUMNS:
                raise CheckpointError(f"{where}: its columns are {columns}, not those of a filter")
            ours, theirs = _shape(occurrence_filter), json.loads(metadata["trilith.shape"])
            if ours != theirs:
                raise CheckpointError(f"{where}: a filter of {theirs}; the table's has {ours}")
            state = np.array(json.loads(metadata["trilith.state"]), np.int64)
            if state.shape != (SLIDING_WORDS + occurrence_filter.blocks,):
                raise CheckpointError(f"{where}: a state of {state.shape} words")
        # Zeroed address space: memory is used where cells are written.
        cells = np.zeros((occurrence_filter.blocks, occurrence_filter.total + EXTRA_CELLS), np.uint16)
        elements = state[SLIDING_WORDS:]
        elements[:] = 0
        for batch in checked_batches(reader, where):
            with as_damage(where):
                block, cell, value = (batch.column(i).to_numpy() for i in range(3))
                cells[block, cell] = value
                elements += np.bincount(block, minlength=occurrence_filter.blocks)
    try:
        occurrence_filter.import_all(state, cells)
    except InvalidRequestError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None


def _shape(occurrence_filter: SlidingFilter) -> dict[str, int]:
    return {
        "capacity": occurrence_filter.capacity,
        "splits": occurrence_filter.split_num,
        "blocks": occurrence_filter.blocks,
        "cells": occurrence_filter.total,
    }

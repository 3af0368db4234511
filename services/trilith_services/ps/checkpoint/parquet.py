"""Export of a checkpoint to Parquet: rows with their optimizer slots as columns of their own, to analyse elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trilith.checkpoint import Manifest, hold
from trilith.folder import Folder
from trilith_services.ps.checkpoint import row_files, variable_files
from trilith_services.ps.checkpoint.damage import as_damage
from trilith_services.ps.checkpoint.row_files import RowFile
from trilith_services.ps.engine.rows import Rows

__all__ = ["export"]


def export(
    path: str, manifest: Manifest, target: str, tables: Sequence[str], *, variables: bool = True
) -> Iterator[int]:
    """Write tables below the directory `target`; files appear there whole.

    Args:
        path: The checkpoint.
        manifest: Its manifest.
        target: Directory, any fsspec URL.
        tables: Names of the tables to export.
        variables: Write variables.parquet too.

    Yields:
        Rows written since the last time.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    with hold(path):
        yield from _export(path, manifest, target, tables, variables)


def _export(path: str, manifest: Manifest, target: str, tables: Sequence[str], variables: bool) -> Iterator[int]:
    source, sink = Folder(path), Folder(target)
    for part in manifest.parts:
        for file in part.files:
            if file.kind != "rows" or file.table not in tables:
                continue
            row_files.check_file(source, file)
            with row_files.open_rows(source, file.name) as opened:
                with as_damage(source.path(file.name)):
                    schema = _schema(opened)
                with (
                    sink.child(quote(file.table, safe="")).create(f"part-{part.shard_index:05d}.parquet") as handle,
                    pq.ParquetWriter(handle, schema, compression="zstd") as writer,
                ):
                    for rows in opened.batches():
                        with as_damage(source.path(file.name)):
                            batch = _batch(opened, rows, schema)
                        writer.write_batch(batch)
                        yield rows.ids.size
    if variables:
        _export_variables(source, manifest, sink)


def _slots(opened: RowFile) -> Iterator[tuple[str, int, int, bool]]:
    """Column name, first state float, number of floats, and whether these are the words of an int64."""
    for number, segment in enumerate(opened.layout):
        at = segment["state_offset"]
        for name, floats in segment["slots"]:
            column = name if len(opened.layout) == 1 else f"{number}.{name}"
            yield column, at, floats, name == "global_step"
            at += floats


def _schema(opened: RowFile) -> Any:
    fields = [pa.field("id", pa.uint64()), pa.field("weights", pa.list_(pa.float32(), opened.dim))]
    for name, _, floats, is_integer in _slots(opened):
        scalar = pa.int64() if is_integer else pa.float32()
        fields.append(pa.field(name, scalar if is_integer or floats == 1 else pa.list_(pa.float32(), floats)))
    return pa.schema([*fields, pa.field("last_update", pa.timestamp("s", tz="UTC"))])


def _batch(opened: RowFile, rows: Rows, schema: Any) -> Any:
    columns = [
        pa.array(rows.ids),
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows.weights).reshape(-1)), opened.dim),
    ]
    for _, at, floats, is_integer in _slots(opened):
        values = np.ascontiguousarray(rows.state[:, at : at + floats]).reshape(-1)
        if is_integer:
            columns.append(pa.array(values.view(np.int64)))
        elif floats == 1:
            columns.append(pa.array(values))
        else:
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), floats))
    columns.append(pa.array(rows.last_update.astype(np.int64)).cast(schema.field("last_update").type))
    return pa.record_batch(columns, schema=schema)


def _export_variables(source: Folder, manifest: Manifest, sink: Folder) -> None:
    states = list(variable_files.read_parts(source, manifest.parts, check=True))
    if not states:
        return
    states.sort(key=lambda state: (state.spec.name, state.spec.partition))
    table = pa.table(
        {
            "name": [state.spec.name for state in states],
            "partition": pa.array([state.spec.partition for state in states], pa.uint32()),
            "values": pa.array([state.values for state in states], pa.large_list(pa.float32())),
            "state": pa.array([state.state for state in states], pa.large_list(pa.float32())),
        }
    )
    with sink.create("variables.parquet") as handle:
        pq.write_table(table, handle, compression="zstd")

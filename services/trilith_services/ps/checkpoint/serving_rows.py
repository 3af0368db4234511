"""From a checkpoint to what serving needs of it: rows without optimizer state, and dense values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np

from trilith import checkpoint
from trilith.folder import Folder
from trilith.shard import Float32Array
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint import row_files, snapshot, variable_files
from trilith_services.ps.engine.row_layout import serving_config
from trilith_services.ps.engine.store import Store

__all__ = ["dense_values", "serving_tables", "write_serving_rows"]


def serving_tables(path: str) -> dict[str, ps_pb2.TableConfig]:
    """Config by name under which a checkpoint's tables are served."""
    manifest, folder = checkpoint.read_manifest(path), Folder(path)
    found: dict[str, ps_pb2.TableConfig] = {}
    for part in manifest.parts:
        for file in part.files:
            if file.kind == "rows" and file.table not in found:
                with row_files.open_rows(folder, file.name) as rows:
                    found[file.table] = serving_config(rows.config)
    return found


def dense_values(path: str) -> dict[str, Float32Array]:
    """Values by name of a checkpoint's dense variables, flat."""
    manifest, folder = checkpoint.read_manifest(path), Folder(path)
    # One shard has all partitions of a variable as one.
    states = list(variable_files.read_parts(folder, manifest.parts, check=True))
    return {state.spec.name: state.values for state in variable_files.place(states, 0, 1)}


def write_serving_rows(
    path: str, target: str, tables: Mapping[str, ps_pb2.TableConfig], *, index: int = 0, count: int = 1
) -> int:
    """Write the rows that shard `index` of `count` serves into the directory `target`, compressed as they are served.

    It becomes a complete checkpoint, as of one PS that has these rows only: `trilith serving ps --rows` restores it.

    Returns:
        How many rows.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    manifest, folder = checkpoint.read_manifest(path), Folder(path)
    with closing(Store()) as store:
        for config in tables.values():
            store.put_table(store.new_table(config))
        for part in snapshot.parts_for(manifest, index, count):
            for file in part.files:
                if file.kind == "rows" and file.table in tables:
                    row_files.check_file(folder, file)
                    with row_files.open_rows(folder, file.name) as rows_file:
                        for rows in rows_file.batches():
                            mine = (
                                rows if part.shard_count == count else rows.take(rows.ids % np.uint64(count) == index)
                            )
                            store.table(file.table).assign(mine.ids, mine.weights)
        store.global_step(set_to=manifest.global_step)
        response = snapshot.save_shard(store, target)
        checkpoint.write_manifest(target, [checkpoint.part_of(0, 1, response)])
        return sum(file.rows for file in response.files if file.table)

"""Writes golden files for a format that is about to be released: `python -m tests.golden.write DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from tests.golden import samples
from trilith import checkpoint
from trilith.routing import owners, partition_owner
from trilith.shard import IdPart, Write
from trilith.tables import RandomUniform, table_config
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.reference.entry_files import save_table, save_tables
from trilith_services.ps.reference.filter_shards import save_filter

__all__ = ["routing", "write_all"]

COUNTS = (1, 2, 3, 7, 16, 1000)
NAMES = ("bias", "w", "tower/0/kernel", "")


def routing() -> dict[str, object]:
    """Who owns what, by number of PS."""
    return {
        "ids": {str(count): owners(samples.IDS, count).tolist() for count in COUNTS},
        "partitions": {
            name: {str(count): [partition_owner(name, p, count) for p in range(4)] for count in COUNTS}
            for name in NAMES
        },
    }


def new_rows() -> list[dict[str, object]]:
    """What rows are before their first write."""
    found = []
    for seed, low, high in ((0, -0.05, 0.05), (2**64 - 1, -1.0, 1.0), (12345, 0.0, 3.0)):
        spec = table_config("t", dim=5, initializer=RandomUniform(low, high), seed=seed)
        table = Table(spec.proto)
        table.reinitialize(samples.IDS, request_time=0)
        weights = table.export_rows(samples.IDS)[1].weights
        found.append({"seed": str(seed), "low": low, "high": high, "weights": weights.astype(float).tolist()})
    return found


def seeds() -> dict[str, str]:
    """The seed that a table's name gives it."""
    return {name: str(table_config(name, dim=1).proto.seed) for name in ("user", "item/x:1")}


def write_checkpoint(path: Path) -> None:
    """Save a cluster of two PS."""
    parts = []
    for index in range(samples.CHECKPOINT_SHARDS):
        store = LocalShard(index=index, count=samples.CHECKPOINT_SHARDS, threads=1)
        store.create_tables(samples.checkpoint_configs())
        for table in store.tables.values():
            rows = samples.rows_of(table)
            mine = owners(rows.ids, samples.CHECKPOINT_SHARDS) == index
            table.import_rows(Rows(rows.ids[mine], rows.weights[mine], rows.state[mine], rows.last_update[mine]))
        waiting = np.array([1 << 17 | index, 3 << 17 | index], np.uint64)
        store.table("rare").assign(waiting, np.ones((2, 1), np.float32))
        for name, values in samples.VARIABLES.items():
            if partition_owner(name, 0, samples.CHECKPOINT_SHARDS) == index:
                store.create_variables([samples.variable_spec(name)], [values])
        store.global_step(set_to=samples.CHECKPOINT_STEP, write=Write())
        saved = store.save(str(path))
        parts.append(checkpoint.part_of(index, samples.CHECKPOINT_SHARDS, saved, finished_unix_s=1_700_000_000.0))
        assert store.contains(IdPart("rare", waiting)).sum() == 0, "still below its threshold"
        store.close()
    checkpoint.write_manifest(str(path), parts, clock=lambda: 1_700_000_000.0)


def write_all(directory: Path) -> None:
    """Write every golden file."""
    directory.mkdir(parents=True)
    sealed = {
        "messages": {name: data.hex() for name, data in samples.messages().items()},
        "routing": routing(),
        "new_rows": new_rows(),
        "seeds": seeds(),
    }
    (directory / "values.json").write_text(json.dumps(sealed, indent=1) + "\n")
    tables = {}
    for name, spec in samples.specs().items():
        tables[name] = Table(spec.proto)
        tables[name].import_rows(samples.rows_of(tables[name]))
        save_table(tables[name], str(directory / "entries" / name), parallel=2 if name == "adam" else 1)
    save_tables(tables, str(directory / "entries" / "several"))
    save_filter(samples.sliding_filter(), str(directory / "entries" / "filter"))
    write_checkpoint(directory / "checkpoint")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))

"""Vectors of the exchange between workers; ranks are threads of this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.conformance.configs import floats, hash_table_config
from tests.ranks import Rank, Ranks, on_every_rank
from trilith import connect
from trilith.tables import HashTableConfig
from trilith.tables.all_to_all import AllToAllTables
from trilith.tables.factories import create_tables

__all__ = ["OPS"]

Json = Mapping[str, Any]


def config_of(slot: Json) -> HashTableConfig:
    """One segment of zeros, stepped by SGD."""
    segment = {"dim": slot["dim"], "opt": {"type": "sgd"}}
    return hash_table_config({"segments": [segment], "learning_rates": [slot.get("lr", 1.0)]})


def sync_all_to_all(inputs: Json) -> Any:
    """Every rank looks its ids up, steps, and looks them up again."""
    ranks = Ranks(inputs["ranks"])

    def work(rank: int) -> tuple[Any, Any]:
        with connect("local://") as client:
            configs = {name: config_of(slot) for name, slot in inputs["slots"].items()}
            create_tables(client, configs)
            dims = {name: client.table(name).dim for name in configs}
            tables = AllToAllTables(client, dims, Rank(ranks, rank))
            asked = inputs["ids"][rank]
            reorder = tables.reorder({name: np.array(each, np.int64) for name, each in asked.items()})
            rows, exchanged = tables.lookup(reorder)
            before = {name: rows[name] for name in asked}
            grads = {
                name: np.asarray(floats(each), np.float32).reshape(-1, dims[name])
                for name, each in inputs["grads"][rank].items()
            }
            options = {name: inputs[name] for name in ("scale", "global_step") if name in inputs}
            tables.apply_gradients(grads, exchanged, **options)
            ranks.barrier.wait()
            rows, _ = tables.lookup(reorder)
            return before, {name: rows[name] for name in asked}

    return [list(each) for each in zip(*on_every_rank([ranks], work), strict=True)]


OPS = {"sync_all_to_all": sync_all_to_all}

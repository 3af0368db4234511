"""Vectors of the exchange between workers; ranks are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.conformance.configs import floats, hash_table_config
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


class _Ranks:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=300)
        self.mail: list[list[Any]] = [[None] * size for _ in range(size)]


class _Rank:
    def __init__(self, ranks: _Ranks, rank: int) -> None:
        self.rank, self.size, self._ranks = rank, ranks.size, ranks

    def all_to_all(self, values: Any, sent: Any, received: Any) -> Any:
        for to, chunk in enumerate(np.split(values, np.cumsum(sent)[:-1])):
            self._ranks.mail[to][self.rank] = chunk
        self._ranks.barrier.wait()
        got = list(self._ranks.mail[self.rank])
        self._ranks.barrier.wait()
        assert [each.size for each in got] == received.tolist()
        return np.concatenate(got)


def sync_all_to_all(inputs: Json) -> Any:
    """Every rank looks its ids up, steps, and looks them up again."""
    size = inputs["ranks"]
    ranks = _Ranks(size)
    before: list[Any] = [None] * size
    after: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with connect("local://") as client:
                configs = {name: config_of(slot) for name, slot in inputs["slots"].items()}
                create_tables(client, configs)
                dims = {name: client.table(name).dim for name in configs}
                tables = AllToAllTables(client, dims, _Rank(ranks, rank))
                asked = inputs["ids"][rank]
                reorder = tables.reorder({name: np.array(each, np.int64) for name, each in asked.items()})
                rows, exchanged = tables.lookup(reorder)
                before[rank] = {name: rows[name] for name in asked}
                grads = {
                    name: np.asarray(floats(each), np.float32).reshape(-1, dims[name])
                    for name, each in inputs["grads"][rank].items()
                }
                options = {name: inputs[name] for name in ("scale", "global_step") if name in inputs}
                tables.apply_gradients(grads, exchanged, **options)
                ranks.barrier.wait()
                rows, _ = tables.lookup(reorder)
                after[rank] = {name: rows[name] for name in asked}
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    return [before, after]


OPS = {"sync_all_to_all": sync_all_to_all}

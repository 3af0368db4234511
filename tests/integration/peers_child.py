"""One rank of a test of workers that hold the rows themselves: makes the calls it is told, says what they gave."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch.distributed

from trilith.errors import TrilithError
from trilith.nn import EmbeddingCollection, Feature
from trilith.peers import PeerClient, connect_peers
from trilith.tables import Adagrad, RandomUniform, Sgd

TABLES: dict[str, dict[str, Any]] = {
    "a": {"dim": 3, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1.0, 1.0)},
    "b": {"dim": 5, "optimizer": Adagrad(learning_rate=0.2), "initializer": RandomUniform(-1.0, 1.0)},
}


def batch(rank: int, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A rank's ids and gradients of a step."""
    rng = np.random.default_rng([rank, step])
    made = {}
    for name, table in TABLES.items():
        ids = rng.zipf(1.4, 40 + 7 * rank).astype(np.int64)
        made[name] = (ids, rng.standard_normal((ids.size, table["dim"])).astype(np.float32))
    return made


def main(rank: int, size: int, meeting: str, calls: list[tuple[Any, ...]], pipe: Connection) -> None:
    """Make the calls, and send what each gave."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    with connect_peers(threads=1) as client:
        for name, table in TABLES.items():
            client.table(name, **table)
        pipe.send([CALLS[call](client, rank, *arguments) for call, *arguments in calls])
    torch.distributed.destroy_process_group()


def train(client: PeerClient, rank: int, steps: int) -> None:
    for step in range(steps):
        client.apply_gradients(batch(rank, step), global_step=step, request_time=step + 1)


def lookup(client: PeerClient, rank: int, ids: list[int]) -> dict[str, Any]:
    return dict(client.lookup(dict.fromkeys(TABLES, ids)))


def save(client: PeerClient, rank: int, path: str) -> int:
    client.global_step(advance=7)
    return client.save(path if rank == 0 else "somewhere/else")


def restore(client: PeerClient, rank: int, path: str) -> int:
    return client.restore(path)


def variables(client: PeerClient, rank: int) -> dict[str, Any]:
    client.create_variables({f"w{i}": np.full((2, 2), i, np.float32) for i in range(6)}, optimizer=Sgd())
    client.assign_variables({"w3": np.arange(4, dtype=np.float32).reshape(2, 2)})
    return client.pull_variables()[0]


def refuse(client: PeerClient, rank: int) -> str:
    """Rank 0 has a NaN: it alone is told, and the others' gradients count."""
    rows = np.full((1, 3), np.nan if rank == 0 else 1.0, np.float32)
    try:
        client.apply_gradients({"a": ([77], rows)})
    except TrilithError as error:
        return type(error).__name__
    return ""


def module(client: PeerClient, rank: int, prefetch: int, push: int) -> list[float]:
    """Step one row of "a" through a module; its first value before every step."""
    collection = EmbeddingCollection(client, {"f": Feature(client.table("a"), "sum")}, async_push=push)
    seen = []
    batches = [{"f": np.array([[5]], np.uint64)}] * 6
    with collection.prefetch(batches, prefetch, ids=lambda each: each) as ahead:
        for _, fetched in ahead:
            rows = collection(fetched.result())["f"]
            seen.append(rows[0, 0].item())
            rows.sum().backward()
    collection.drain()
    collection.close()
    return seen


def rows_here(client: PeerClient, rank: int) -> int:
    return sum(table.rows for shard in client.stats() for table in shard.tables)


CALLS = {
    "train": train,
    "lookup": lookup,
    "save": save,
    "restore": restore,
    "variables": variables,
    "refuse": refuse,
    "module": module,
    "rows_here": rows_here,
}

"""One rank of a test of workers that hold the rows themselves: makes the calls it is told, says what they gave."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed

from trilith.data.parse.sharding import FeatureFids
from trilith.errors import TrilithError
from trilith.nn import EmbeddingCollection, Feature, FusedLayouts
from trilith.nn.reduction import FUSIONS, average_gradients
from trilith.ops.layout_config import OutConfig, OutType, SliceConfig
from trilith.ops.ragged import Ragged
from trilith.peers import PeerClient, connect_peers
from trilith.tables import Adagrad, Fp32, HashTableConfig, RandomUniform, Sgd, table_config
from trilith.tables.config import Segment
from trilith.tables.factories import create_partitioned_tables
from trilith.tables.partitioned import PartitionedFeature

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


def module(client: PeerClient, rank: int, prefetch: int, push: int, queue: int = 0) -> list[float]:
    """Step one row of "a" through a module; its first value before every step."""
    collection = EmbeddingCollection(client, {"f": Feature(client.table("a"), "sum")}, async_push=push)
    seen = []
    batches = [{"f": np.array([[5]], np.uint64)}] * 6
    with collection.prefetch(batches, prefetch, ids=lambda each: each, lookup_queue=queue) as ahead:
        for _, fetched in ahead:
            rows = collection(fetched.result())["f"]
            seen.append(rows[0, 0].item())
            rows.sum().backward()
    collection.drain()
    collection.close()
    return seen


def write(client: PeerClient, rank: int) -> dict[str, Any]:
    """Set and add rows of ids that all ranks name; the rows afterwards, and what resetting two of them says."""
    for verb in ("assign", "assign_add"):
        made = batch(rank, 50)
        getattr(client, verb)({name: (ids % 20 + 100, rows) for name, (ids, rows) in made.items()}, request_time=9)
    rows = dict(client.lookup(dict.fromkeys(TABLES, range(100, 120))))
    return {**rows, "reset": client.reinitialize("a", [101, 500 + rank, 102]).tolist()}


def average(client: PeerClient, rank: int) -> list[list[Any]]:
    """Means of gradients over all ranks, by every way they may travel."""
    given = [torch.full((3,), float(rank + 1)), None, torch.tensor([[60000.0]])]
    means = [
        average_gradients(given, fusion=fusion, float16=float16) for fusion in FUSIONS for float16 in (False, True)
    ]
    return [[None if each is None else each.tolist() for each in tensors] for tensors in means]


def layouts(client: PeerClient, rank: int, lookups_ahead: int) -> list[Any]:
    """Steps through fused layouts of two features; what each saw."""
    features, shapes = layout_features()
    module = FusedLayouts(create_partitioned_tables(client, features, shapes, prefix="layouts/"))
    sharded = [module.tables.shard(layout_batch(rank, step), 5) for step in range(3)]
    seen = []
    with module.prefetch(sharded, lookups_ahead, sharded=lambda each: each) as ahead:
        for _, fetched in ahead:
            tensors = module(fetched.result())
            seen.append({name: each.detach().numpy().copy() for name, each in tensors.items()})
            sum(each.sum() for each in tensors.values()).backward()
    module.drain()
    return seen


def layout_features() -> tuple[dict[str, PartitionedFeature], dict[str, OutConfig]]:
    def feature(combiner: str) -> PartitionedFeature:
        table = table_config("t", segments=[Segment(3, RandomUniform(-1.0, 1.0), Adagrad(learning_rate=0.1), Fp32())])
        config = HashTableConfig(table.proto.hash_table, [0.1])
        return PartitionedFeature(config=config, slice_dims=(1, 2), combiner=combiner)

    features = {"x": feature("mean"), "y": feature("first(2)")}
    return features, {
        "bias": OutConfig(slices=(SliceConfig("x", 0, 1),), out_type=OutType.CONCAT),
        "seq": OutConfig(slices=(SliceConfig("y", 1, 3),), out_type=OutType.CONCAT),
    }


def layout_batch(rank: int, step: int) -> dict[str, FeatureFids]:
    rng = np.random.default_rng([rank, step])
    return {
        name: FeatureFids(Ragged.of([rng.integers(1, 30, rng.integers(0, 5)).tolist() for _ in range(5)]))
        for name in ("x", "y")
    }


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
    "write": write,
    "layouts": layouts,
    "average": average,
}

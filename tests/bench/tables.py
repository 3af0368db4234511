"""Many tables: a training step of many features through merged tables, and what a PS pays for a thousand tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.bench.draws import Zipf
from tests.bench.harness import Benchmark, Context, Entry, higher, interleave, lower
from tests.bench.processes import EXPERIMENTS, parameter_servers

__all__ = ["BENCHMARKS"]

_SERVERS = 2
_DIM = 16
_TIMEOUT_S = 120.0  # the first table may have to wait for a compiler


def step(context: Context) -> list[Entry]:
    """Lookup and optimizer step of one id per feature and sample, all features drawing from the same ids.

    Two PS, against `np.take` of the same rows of one array.
    """
    sizes = context.sizes
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)  # read when grpc is imported, below
    import trilith
    from trilith.tables import Adagrad, HashTableConfig, Zeros
    from trilith.tables.config import Segment
    from trilith.tables.factories import create_merged_tables
    from trilith_proto.hash_table_pb2 import EmbeddingHashTableConfig

    rows = sizes.rpc_rows
    names = [f"f{number:02d}" for number in range(sizes.train_features)]
    array = np.random.default_rng(7).random((rows, _DIM), np.float32)
    grads = {name: np.full((sizes.step_batch, _DIM), 1e-3, np.float32) for name in names}
    zipf = Zipf(rows, sizes.zipf_exponent)
    proto = EmbeddingHashTableConfig(initial_capacity=rows)
    proto.cuckoo.SetInParent()
    proto.entry_config.segments.append(Segment(_DIM, Zeros(), Adagrad()).as_proto())
    config = HashTableConfig(proto, [0.05])
    context.progress("starting PS", 0, 1)
    with parameter_servers(_SERVERS) as (address, _), trilith.connect(address, timeout_s=_TIMEOUT_S) as client:
        tables = create_merged_tables(client, dict.fromkeys(names, config))
        for start in range(0, rows, sizes.batch):
            context.progress("filling the table", start, rows)
            part = np.arange(start, min(start + sizes.batch, rows))
            tables.assign({names[0]: (part, array[part])})

        def draw() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
            return {name: zipf.draw(sizes.step_batch) for name in names}

        def take() -> Callable[[], object]:
            return partial(array.take, np.concatenate(list(draw().values())), axis=0)

        def both() -> Callable[[], object]:
            ids = draw()

            def work() -> None:
                tables.lookup(ids)
                tables.apply_gradients({name: (ids[name], grads[name]) for name in names})

            return work

        seconds = interleave(context, "take and step in turn", sizes.rpc_calls, take, both)
    count = len(names) * sizes.step_batch
    rates = [count / float(np.median(each)) for each in seconds]
    return [higher("tables.step", rates[1], rates[0], "ids/s", 0.12)]


def many(context: Context) -> list[Entry]:
    """Empty tables on one PS: memory of each, and time to create one when there are many against when there are few."""
    count = context.sizes.many_tables
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)  # read when grpc is imported, below
    import trilith
    from trilith.tables import Adagrad

    context.progress("starting PS", 0, 1)
    with parameter_servers(1) as (address, _), trilith.connect(address, timeout_s=_TIMEOUT_S) as client:

        def resident() -> int:
            return sum(int(shard.resident_bytes) for shard in client.stats())

        client.table("warm", dim=_DIM, optimizer=Adagrad())
        before = resident()
        seconds = []
        for number in range(count):
            context.progress("creating tables", number, count)
            started = time.perf_counter()
            client.table(f"t{number:04d}", dim=_DIM, optimizer=Adagrad())
            seconds.append(time.perf_counter() - started)
        size = (resident() - before) / count
        if sum(len(shard.tables) for shard in client.stats()) != count + 1:
            raise AssertionError("tables are missing")
    tenth = max(1, count // 10)
    first, last = (1e3 * float(np.median(part)) for part in (seconds[:tenth], seconds[-tenth:]))
    return [
        lower("tables.many.create", last, first, "ms a table", None),
        lower("tables.many.bytes", size, float(64 << 10), "bytes a table", 1.0),
    ]


BENCHMARKS = (
    Benchmark(("tables.step",), step),
    Benchmark(("tables.many.create", "tables.many.bytes"), many),
)

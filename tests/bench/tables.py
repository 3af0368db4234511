"""A training step of many features through merged tables on two PS, against `np.take` of the same rows of one array."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.bench.draws import Zipf
from tests.bench.harness import Benchmark, Context, Entry, higher, interleave
from tests.bench.processes import EXPERIMENTS, parameter_servers

__all__ = ["BENCHMARKS"]

_SERVERS = 2
_DIM = 16
_TIMEOUT_S = 120.0  # the first table may have to wait for a compiler


def step(context: Context) -> list[Entry]:
    """Lookup and optimizer step of one id per feature and sample, all features drawing from the same ids."""
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


BENCHMARKS = (Benchmark(("tables.step",), step),)

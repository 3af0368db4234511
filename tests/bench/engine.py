"""The engine against `np.take`: what finding and stepping rows costs beyond reading them from an array.

`take` is `np.take(W, rows, axis=0, out=buf, mode="clip")` over W float32[rows, dim] made by NumPy in the plain way,
with a fresh uniform batch each time. NumPy's memory starts 16 bytes past a page, so a row of 64 bytes lies on two cache
lines where the engine's lies on one. An aligned W is therefore faster; `engine.lookup.d16` measures by how much and
says so in a note below the table. The ratios stay those against the plain array, which is what people have.

One thread; tables without a pool; ids all present; times are medians.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from tests.bench.draws import Keys, spread
from tests.bench.harness import Benchmark, Context, Crew, Entry, Seconds, Side, higher, interleave, lower
from trilith.tables import Adagrad, Adam, Zeros, table_config
from trilith_services.ps.engine.table import Table

__all__ = ["BENCHMARKS"]

Float32Array = npt.NDArray[np.float32]

_FILL = 65_536
_STALL_STEP_S = 0.002  # between two steps of the table whose lookups are timed


def make_table(optimizer: Any, dim: int, rows: int = 1) -> Table:
    """A compiled table with room for `rows`."""
    config = table_config("bench", dim=dim, optimizer=optimizer, initializer=Zeros(), initial_capacity=rows)
    table = Table(config.proto)
    table.compile()
    return table


def make_array(rows: int, dim: int) -> Float32Array:
    """W: plain NumPy memory."""
    return np.random.default_rng(7).random((rows, dim), np.float32)


def fill(context: Context, table: Table, keys: Keys, array: Float32Array) -> None:
    """Give every key the row of `array` with its number."""
    for start in range(0, len(array), _FILL):
        context.progress("filling the table", start, len(array))
        table.assign(keys.ids[start : start + _FILL], array[start : start + _FILL], request_time=1)
    if len(table) != len(array):
        raise AssertionError(f"{len(table)} rows instead of {len(array)}")


class _Take:
    """The reference side."""

    def __init__(self, array: Float32Array, keys: Keys, batch: int) -> None:
        self._array, self._keys, self._batch = array, keys, batch
        self.out = np.empty((batch, array.shape[1]), np.float32)

    def __call__(self) -> Callable[[], object]:
        rows, _ = self._keys.uniform(self._batch)
        return partial(np.take, self._array, rows, axis=0, out=self.out, mode="clip")


def _rate(batch: int, seconds: Seconds) -> float:
    return batch / float(np.median(seconds))


def lookup(context: Context, *, dim: int, target: float, align: bool) -> list[Entry]:
    """`Table.lookup` into a given array."""
    sizes = context.sizes
    keys = Keys(sizes.rows)
    array = make_array(sizes.rows, dim)
    table = make_table(Adagrad(), dim, sizes.rows)
    fill(context, table, keys, array)
    out = np.empty((sizes.batch, dim), np.float32)

    def candidate() -> Callable[[], object]:
        _, ids = keys.uniform(sizes.batch)
        return partial(table.lookup, ids, out)

    rows, ids = keys.uniform(sizes.batch)
    np.testing.assert_array_equal(table.lookup(ids), array[rows])
    sides: list[Side] = [_Take(array, keys, sizes.batch), candidate]
    if align:
        sides.append(_Take(_aligned(array), keys, sizes.batch))
    seconds = interleave(context, "lookup and take in turn", sizes.batches, *sides)
    take, found = (_rate(sizes.batch, each) for each in seconds[:2])
    if align:
        gain = _rate(sizes.batch, seconds[2]) / take
        context.note(
            f"take from a W aligned to 2 MiB is {gain:.2f} times as fast as from NumPy's own (dim {dim}); against that "
            f"one engine.lookup.d{dim} would be {found / take / gain:.3f}"
        )
    return [higher(f"engine.lookup.d{dim}", found, take, "ids/s", target)]


def _aligned(array: Float32Array) -> Float32Array:
    """A copy that starts on a boundary of 2 MiB, in memory that numpy has allocated and advised as it does any."""
    boundary = 2 << 20
    memory = np.empty(array.nbytes + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    copy = memory[start : start + array.nbytes].view(np.float32).reshape(array.shape)
    copy[:] = array
    return copy


def step(context: Context, *, optimizer: str, target: float, dim: int = 16) -> list[Entry]:
    """`Table.apply_gradients`: find the rows, step weights and state."""
    sizes = context.sizes
    keys = Keys(sizes.rows)
    array = make_array(sizes.rows, dim)
    table = make_table({"adagrad": Adagrad, "adam": Adam}[optimizer](), dim, sizes.rows)
    fill(context, table, keys, array)
    grads = np.random.default_rng(8).normal(size=(sizes.batch, dim)).astype(np.float32)

    def candidate() -> Callable[[], object]:
        _, ids = keys.uniform(sizes.batch)
        return partial(table.apply_gradients, ids, grads, request_time=2)

    take, steps = interleave(
        context, "steps and take in turn", sizes.batches, _Take(array, keys, sizes.batch), candidate
    )
    _check_stepped(table, keys, array)
    rates = _rate(sizes.batch, steps), _rate(sizes.batch, take)
    return [higher(f"engine.{optimizer}.d{dim}", *rates, "ids/s", target)]


def _check_stepped(table: Table, keys: Keys, array: Float32Array) -> None:
    rows, ids = keys.uniform(1000)
    found = table.lookup(ids)
    if not np.isfinite(found).all() or not (found != array[rows]).any():
        raise AssertionError("the rows were not stepped")
    if len(table) != len(array):
        raise AssertionError("ids that were thought to be present have been inserted")


def threads(context: Context) -> list[Entry]:
    """Two threads that call one table, against two threads that each take: what sharing a table costs.

    Every round times take and table on one thread and on two; each thread has batches of its own.
    """
    sizes = context.sizes
    dim = 16
    keys = Keys(sizes.rows)
    array = make_array(sizes.rows, dim)
    table = make_table(Adagrad(), dim, sizes.rows)
    fill(context, table, keys, array)
    outs = [np.empty((sizes.batch, dim), np.float32) for _ in range(2)]
    grads = np.random.default_rng(8).normal(size=(sizes.batch, dim)).astype(np.float32)

    def take(thread: int) -> Callable[[], object]:
        batches = [keys.uniform(sizes.batch)[0] for _ in range(sizes.thread_batches)]
        return lambda: [np.take(array, rows, axis=0, out=outs[thread], mode="clip") for rows in batches]

    def find(thread: int) -> Callable[[], object]:
        batches = [keys.uniform(sizes.batch)[1] for _ in range(sizes.thread_batches)]
        return lambda: [table.lookup(ids, outs[thread]) for ids in batches]

    def apply(thread: int) -> Callable[[], object]:
        del thread
        batches = [keys.uniform(sizes.batch)[1] for _ in range(sizes.thread_batches)]

        def work() -> None:
            for ids in batches:
                table.apply_gradients(ids, grads, request_time=2)

        return work

    tasks = {"take": take, "lookup": find, "apply": apply}
    seconds = {name: np.empty((2, sizes.thread_rounds)) for name in tasks}
    with Crew(2) as crew:
        for round_ in range(-2, sizes.thread_rounds):
            context.progress("one thread and two in turn", max(round_, 0), sizes.thread_rounds)
            for name, task in tasks.items():
                for count in (1, 2):
                    passed = crew.run(*(task(thread) for thread in range(count)))
                    if round_ >= 0:
                        seconds[name][count - 1, round_] = passed
    speedups = {name: float(2 * np.median(one) / np.median(two)) for name, (one, two) in seconds.items()}
    return [
        higher(f"engine.threads.{name}", speedups[name], speedups["take"], "x on two threads", 0.85)
        for name in ("lookup", "apply")
    ]


def grow(context: Context) -> list[Entry]:
    """A table that starts with room for one row and takes steps on new ids only.

    Rows start as zeros: drawing random ones would make all batches longer and growing look cheaper. Memory is what
    the process has gained when the first table is full, with kernels and scratch arrays there before.
    """
    sizes = context.sizes
    dim = 16
    grads = np.random.default_rng(8).normal(size=(sizes.batch, dim)).astype(np.float32)
    warm = make_table(Adagrad(), dim)
    warm.apply_gradients(spread(0, sizes.batch), grads, request_time=1)
    del warm
    best: tuple[float, float] | None = None
    per_row = 0.0
    process = psutil.Process()
    for run in range(sizes.grow_runs):
        before = process.memory_info().rss
        table = make_table(Adagrad(), dim)
        seconds = []
        for start in range(0, sizes.rows, sizes.batch):
            context.progress(f"growing, run {run + 1} of {sizes.grow_runs}", start, sizes.rows)
            ids = spread(start, min(start + sizes.batch, sizes.rows))
            started = time.perf_counter()
            table.apply_gradients(ids, grads[: ids.size], request_time=1)
            seconds.append(time.perf_counter() - started)
        if len(table) != sizes.rows:
            raise AssertionError(f"{len(table)} rows instead of {sizes.rows}")
        if run == 0:
            per_row = (process.memory_info().rss - before) / sizes.rows
        longest, median = max(seconds), float(np.median(seconds))
        if best is None or longest / median < best[0] / best[1]:
            best = longest, median
        del table
    assert best is not None
    return [
        lower("engine.grow.stall", 1e3 * best[0], 1e3 * best[1], "ms a batch", 20.0),
        lower("engine.grow.bytes", per_row, 8.0 + 4 * dim + 4 * dim, "bytes a row", 1.35),
    ]


def stall(context: Context) -> list[Entry]:
    """Small lookups of a table that is exported, or swept, against those of one beside which another table is.

    So the second thread costs the first as much time on both sides, and what is left is what the lookups wait for the
    table itself. Rows are stepped now and then, since only a writer that waits makes readers wait for readers. The
    worse of the two kinds of work counts.
    """
    sizes = context.sizes
    dim = 16
    keys = Keys(sizes.stall_rows)
    array = make_array(sizes.stall_rows, dim)
    table, other = (make_table(Adagrad(), dim, sizes.stall_rows) for _ in range(2))
    for each in (table, other):
        fill(context, each, keys, array)
    out = np.empty((sizes.small_ids, dim), np.float32)
    grads = np.random.default_rng(8).normal(size=(sizes.small_ids, dim)).astype(np.float32)

    def export(busy: Table) -> None:
        for s in range(busy.stripes):
            busy.export_stripe(s)

    def sweep(busy: Table) -> None:
        busy.evict(2)

    def measure(work: Callable[[Table], None], busy: Table) -> list[float]:
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                work(busy)

        def train() -> None:
            while not ended.wait(_STALL_STEP_S):
                table.apply_gradients(keys.uniform(sizes.small_ids)[1], grads, request_time=2)

        threads = [threading.Thread(target=each) for each in (run, train)]
        for thread in threads:
            thread.start()
        seconds = []
        for _ in range(sizes.stall_lookups):
            ids = keys.uniform(sizes.small_ids)[1]
            started = time.perf_counter()
            table.lookup(ids, out)
            seconds.append(time.perf_counter() - started)
        ended.set()
        for thread in threads:
            thread.join()
        return seconds

    found: list[tuple[float, float]] = []
    for work in (export, sweep):
        own: list[float] = []
        others: list[float] = []
        for round_ in range(sizes.stall_rounds):
            context.progress(f"lookups beside {work.__name__}", round_, sizes.stall_rounds)
            own += measure(work, table)
            others += measure(work, other)
        found.append((float(np.percentile(own, 99)), float(np.percentile(others, 99))))
        context.note(
            f"lookups of {sizes.small_ids} ids, 99th percentile: {1e3 * found[-1][0]:.2f} ms while the table is at its "
            f"{work.__name__}, {1e3 * found[-1][1]:.2f} ms while another one is"
        )
    worst = max(found, key=lambda pair: pair[0] / pair[1])
    return [lower("engine.stall.export", 1e3 * worst[0], 1e3 * worst[1], "ms a lookup", 5.0)]


BENCHMARKS = (
    Benchmark(("engine.lookup.d8",), partial(lookup, dim=8, target=0.5, align=False)),
    Benchmark(("engine.lookup.d16",), partial(lookup, dim=16, target=0.5, align=True)),
    Benchmark(("engine.lookup.d64",), partial(lookup, dim=64, target=0.5, align=False)),
    Benchmark(("engine.adagrad.d16",), partial(step, optimizer="adagrad", target=0.25)),
    Benchmark(("engine.adam.d16",), partial(step, optimizer="adam", target=0.2)),
    Benchmark(("engine.threads.lookup", "engine.threads.apply"), threads),
    Benchmark(("engine.grow.stall", "engine.grow.bytes"), grow),
    Benchmark(("engine.stall.export",), stall),
)

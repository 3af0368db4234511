"""`trilith bench`: drive any cluster, and check the values it answers with.

The load uses a table of its own per dim, `trilith_bench_d<dim>`, stepped by SGD with learning rate 1 on gradients of
-1. So all values are whole numbers that float32 holds exactly, and do not depend on the order in which threads step: a
row is its start value plus how often its id occurred.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilith.discovery.urls import CLUSTER_FORMS
from trilith.discovery.zk_url import redact
from trilith_services.commands import output
from trilith_services.commands.flags import Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.progress import Progress

    from trilith.client import Client, Table

__all__ = ["register"]

CHUNK = 65_536
BATCHES = 16  # different ones per thread, drawn before the clock starts
CHECK_EVERY = 32  # calls between two checks of an answer while the clock runs


class Verb(StrEnum):
    """What a call does."""

    lookup = "lookup"
    apply = "apply"
    step = "step"
    assign = "assign"


def register(app: typer.Typer) -> None:
    """Add the `bench` command."""
    app.command()(bench)


def bench(
    address: Annotated[str, typer.Argument(metavar="CLUSTER", help=f"{CLUSTER_FORMS}, or local:// (no network).")],
    verb: Annotated[
        Verb, typer.Option(help="What a call does; step is a lookup, then gradients of the same ids.")
    ] = Verb.lookup,
    ids: Annotated[int, typer.Option(metavar="N", help="Rows to choose from; created first.", min=1)] = 1_000_000,
    dim: Annotated[int, typer.Option(metavar="N", help="Floats per row.", min=1)] = 16,
    batch: Annotated[int, typer.Option(metavar="N", help="Ids per call.", min=1)] = 65_536,
    zipf: Annotated[
        float, typer.Option(metavar="EXPONENT", help="Zipf exponent of the ids; 0: all alike.", min=0.0)
    ] = 1.05,
    threads: Annotated[int, typer.Option(metavar="N", help="Calls in flight.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(metavar="SECONDS", help="How long to measure.", min=0.1)] = 10.0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Deadline of a call.", min=0.1)] = 30.0,
    as_json: Json = False,
) -> None:
    """Measure a cluster: ids/s, and latency of a call (p50, p99), while checking the values it answers with.

    Rows are created before and deleted after; a small empty table stays. Exit status 1 if a value was wrong.
    """
    import trilith
    from trilith.tables import Sgd

    load = _Load(verb=verb, count=ids, dim=dim, batch=batch, zipf=zipf, threads=threads, seconds=seconds)
    notes = output.console(stderr=True)
    with trilith.connect(address, timeout_s=timeout) as client, output.progress(notes) as progress:
        table = client.table(f"trilith_bench_d{dim}", dim=dim, optimizer=Sgd(learning_rate=1.0))
        try:
            load.fill(table, progress)
            load.run(table, progress)
            load.check_all(table, progress)
        finally:
            load.remove(client, table, progress)
    result = {"cluster": redact(address), **load.result()}
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _show(result)
    if result["wrong_values"]:
        raise typer.Exit(1)


@dataclass(slots=True, kw_only=True)
class _Load:
    """One measurement: its ids, what their rows must be, and what was seen."""

    verb: Verb
    count: int
    dim: int
    batch: int
    zipf: float
    threads: int
    seconds: float
    _salt: int = field(default_factory=lambda: secrets.randbits(63))
    _steps: npt.NDArray[np.int64] | None = None
    _latencies: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _elapsed: float = 0.0
    _checked: int = 0
    _wrong: int = 0

    # ---- what is expected --------------------------------------------------------------------------------------------

    def _ids(self, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Distinct 64-bit ids, unlike those of any other run."""
        import numpy as np

        spread = np.uint64(0x9E3779B97F4A7C15)  # odd, so no two ranks meet
        return (ranks.astype(np.uint64) + np.uint64(self._salt)) * spread

    def _start(self, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32[n, dim]: the values that rows are given, whole numbers within ±1000."""
        import numpy as np

        columns = np.arange(self.dim, dtype=np.int64)
        return ((ranks[:, None] * 31 + columns * 7) % 2001 - 1000).astype(np.float32)

    def _draw(self, seed: int) -> list[npt.NDArray[np.int64]]:
        import numpy as np

        random = np.random.default_rng(seed)
        if not self.zipf:
            return [random.integers(0, self.count, self.batch) for _ in range(BATCHES)]
        weights = np.arange(1, self.count + 1, dtype=np.float64) ** -self.zipf
        bounds = np.cumsum(weights)
        return [np.searchsorted(bounds, random.random(self.batch) * bounds[-1]) for _ in range(BATCHES)]

    # ---- what is done ------------------------------------------------------------------------------------------------

    def fill(self, table: Table, progress: Progress) -> None:
        """Give every row its start value."""
        import numpy as np

        task = progress.add_task("creating rows", total=self.count)
        for ranks in self._chunks():
            table.assign(self._ids(ranks), self._start(ranks))
            progress.advance(task, ranks.size)
        self._steps = np.zeros(self.count, np.int64)

    def run(self, table: Table, progress: Progress) -> None:
        """Call until the time is over, from all threads."""
        task = progress.add_task(f"{self.verb.value} x {self.threads}", total=round(self.seconds))
        ready = threading.Barrier(self.threads + 1)
        stop = threading.Event()
        with ThreadPoolExecutor(self.threads, "bench") as pool:
            futures = [pool.submit(self._drive, table, number, ready, stop) for number in range(self.threads)]
            try:
                ready.wait()
                started = time.perf_counter()
                while (passed := time.perf_counter() - started) < self.seconds:
                    if any(future.done() for future in futures):
                        break  # one has failed
                    progress.update(task, completed=int(passed))
                    time.sleep(min(0.1, self.seconds - passed))
            except threading.BrokenBarrierError:
                started = time.perf_counter()
            finally:
                stop.set()
            for future in futures:
                future.result()
            self._elapsed = time.perf_counter() - started
            progress.update(task, completed=round(self.seconds))

    def _drive(self, table: Table, number: int, ready: threading.Barrier, stop: threading.Event) -> None:
        import numpy as np

        try:
            batches = self._draw(number)
            arrays = [(ranks, self._ids(ranks)) for ranks in batches]
            grads = np.full((self.batch, self.dim), -1.0, np.float32)
            values = [self._start(ranks) for ranks in batches] if self.verb is Verb.assign else []
            table.lookup(arrays[0][1])  # connections and buffers are there before the clock starts
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        latencies: list[float] = []
        calls = np.zeros(BATCHES, np.int64)
        while not stop.is_set():
            turn = len(latencies) % BATCHES
            ranks, ids = arrays[turn]
            rows = None
            before = time.perf_counter()
            if self.verb in {Verb.lookup, Verb.step}:
                rows = table.lookup(ids)
            if self.verb in {Verb.apply, Verb.step}:
                table.apply_gradients(ids, grads)
            elif self.verb is Verb.assign:
                table.assign(ids, values[turn])
            latencies.append(time.perf_counter() - before)
            calls[turn] += 1
            if rows is not None and len(latencies) % CHECK_EVERY == 1:
                self._check_answer(ranks, rows)
        with self._lock:
            self._latencies += latencies
            if self.verb in {Verb.apply, Verb.step}:
                for ranks, times in zip(batches, calls.tolist(), strict=True):
                    assert self._steps is not None
                    self._steps += times * np.bincount(ranks, minlength=self.count)

    def _check_answer(self, ranks: npt.NDArray[np.int64], rows: npt.NDArray[np.float32]) -> None:
        """While others step, a row has taken a whole number of steps from its start, the same in every column."""
        import numpy as np

        steps = rows - self._start(ranks)
        right = (steps == steps[:, :1]) & (steps >= 0) & (steps == np.floor(steps))
        if self.verb is Verb.lookup:
            right &= steps == 0
        self._count_checks(right)

    def check_all(self, table: Table, progress: Progress) -> None:
        """Read every row back: it must be its start value plus how often its id occurred."""
        import numpy as np

        assert self._steps is not None
        task = progress.add_task("checking all rows", total=self.count)
        for ranks in self._chunks():
            want = self._start(ranks) + self._steps[ranks, None].astype(np.float32)
            # Beyond 2^24 float32 leaves the whole numbers out one by one.
            exact = np.broadcast_to(self._steps[ranks, None] < (1 << 24) - 1000, want.shape)
            self._count_checks((table.lookup(self._ids(ranks)) == want)[exact])
            progress.advance(task, ranks.size)

    def _count_checks(self, right: npt.NDArray[np.bool_]) -> None:
        with self._lock:
            self._checked += right.size
            self._wrong += int(right.size - right.sum())

    def remove(self, client: Client, table: Table, progress: Progress) -> None:
        """Delete this run's rows."""
        task = progress.add_task("deleting rows", total=self.count)
        for ranks in self._chunks():
            client.erase(table.name, self._ids(ranks))
            progress.advance(task, ranks.size)

    def _chunks(self) -> list[npt.NDArray[np.int64]]:
        import numpy as np

        return [np.arange(at, min(at + CHUNK, self.count)) for at in range(0, self.count, CHUNK)]

    def result(self) -> dict[str, Any]:
        """Figures, by name."""
        import numpy as np

        calls = len(self._latencies)
        p50, p99 = np.percentile(self._latencies, [50, 99]) * 1e3 if calls else (float("nan"), float("nan"))
        return {
            "verb": self.verb.value,
            "ids": self.count,
            "dim": self.dim,
            "batch": self.batch,
            "zipf": self.zipf,
            "threads": self.threads,
            "seconds": round(self._elapsed, 3),
            "calls": calls,
            "ids_per_s": round(calls * self.batch / self._elapsed),
            "p50_ms": round(float(p50), 3),
            "p99_ms": round(float(p99), 3),
            "checked_values": self._checked,
            "wrong_values": self._wrong,
        }


def _show(result: dict[str, Any]) -> None:
    grid = output.grid("verb", ">ids/s", ">p50", ">p99", ">calls", ">values checked", ">wrong")
    wrong = result["wrong_values"]
    grid.add_row(
        result["verb"],
        output.count(result["ids_per_s"]),
        f"{result['p50_ms']:.2f} ms",
        f"{result['p99_ms']:.2f} ms",
        output.count(result["calls"]),
        output.count(result["checked_values"]),
        f"[{'bold red' if wrong else 'green'}]{output.count(wrong)}[/]",
    )
    skew = f"Zipf({result['zipf']:g})" if result["zipf"] else "uniform"
    console = output.console()
    console.print(
        f"{result['cluster']}: {output.count(result['batch'])} of {output.count(result['ids'])} ids a call, {skew}, "
        f"dim {result['dim']}, {result['threads']} in flight, {result['seconds']:.1f} s",
        soft_wrap=True,
    )
    console.print(grid)

"""The benchmark program's frame: what a benchmark is, fair timing, processes, the printed table and the JSON file.

Every benchmark runs in a process of its own, so that none inherits another's memory, allocator or threads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from tests.bench.sizes import Sizes

__all__ = [
    "Benchmark",
    "Context",
    "Crew",
    "Entry",
    "Failed",
    "Seconds",
    "Side",
    "higher",
    "interleave",
    "lower",
    "run_all",
    "show",
    "write_json",
]

Seconds: TypeAlias = npt.NDArray[np.float64]

Side: TypeAlias = Callable[[], Callable[[], object]]
"""One thing that is timed: the outer call draws a fresh batch, off the clock; what it returns is put on the clock."""

_WARM_ROUNDS = 3
_TRACEBACK_LINES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the result.

    Attributes:
        name: Unique.
        value: What was measured.
        unit: Of value and reference.
        reference: The same of what it is measured against, in the same run.
        ratio: value / reference.
        target: Bound on the ratio; None where there is none.
        better: Whether a higher or a lower ratio is better.
    """

    name: str
    value: float
    unit: str
    reference: float
    ratio: float
    target: float | None
    better: Literal["higher", "lower"]

    @property
    def met(self) -> bool | None:
        """Whether the ratio keeps its target."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target


def higher(name: str, value: float, reference: float, unit: str, target: float | None) -> Entry:
    """An entry where more is better."""
    return Entry(
        name=name, value=value, unit=unit, reference=reference, ratio=value / reference, target=target, better="higher"
    )


def lower(name: str, value: float, reference: float, unit: str, target: float | None) -> Entry:
    """An entry where less is better."""
    return Entry(
        name=name, value=value, unit=unit, reference=reference, ratio=value / reference, target=target, better="lower"
    )


class Context:
    """What a running benchmark is given: its sizes, and where it says how far it is and what is worth knowing."""

    def __init__(self, sizes: Sizes, pipe: Connection) -> None:
        self.sizes = sizes
        self._pipe = pipe
        self._said = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far the benchmark is."""
        now = time.monotonic()
        if now - self._said > 0.1 or done in (0, total):
            self._said = now
            self._pipe.send(("progress", what, done, total))

    def note(self, text: str) -> None:
        """Print a line below the table."""
        self._pipe.send(("note", text))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Figures that are measured together.

    Attributes:
        names: Of the entries that `run` returns.
        run: A function at the top of a module: a fresh process calls it.
    """

    names: tuple[str, ...]
    run: Callable[[Context], list[Entry]]


@dataclass(frozen=True, slots=True)
class Failed:
    """A benchmark that gave no figures."""

    names: tuple[str, ...]
    reason: str


def interleave(context: Context, what: str, rounds: int, *sides: Side) -> list[Seconds]:
    """Time the sides in turn, a fresh batch each time, some rounds unmeasured first.

    Who goes first changes from round to round.

    Returns:
        Per side float64[rounds] seconds.
    """
    seconds = [np.empty(rounds) for _ in sides]
    for round_ in range(-_WARM_ROUNDS, rounds):
        context.progress(what, max(round_, 0), rounds)
        for turn in range(len(sides)):
            side = (turn + round_) % len(sides)
            work = sides[side]()
            started = time.perf_counter()
            work()
            passed = time.perf_counter() - started
            if round_ >= 0:
                seconds[side][round_] = passed
    context.progress(what, rounds, rounds)
    return seconds


class Crew:
    """Threads that start together; used as a context manager."""

    def __init__(self, threads: int) -> None:
        self._tasks: list[Callable[[], object] | None] = [None] * threads
        self._spans = [(0.0, 0.0)] * threads
        self._begin = threading.Barrier(threads + 1)
        self._end = threading.Barrier(threads + 1)
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]

    def __enter__(self) -> Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._begin.abort()
        for thread in self._threads:
            thread.join()

    def run(self, *tasks: Callable[[], object]) -> float:
        """Run up to one task per thread at the same time; seconds from the first start to the last end."""
        count = len(tasks)
        self._tasks = [*tasks, *[None] * (len(self._threads) - count)]
        self._begin.wait()
        self._end.wait()
        if self._failure is not None:
            raise self._failure
        return max(end for _, end in self._spans[:count]) - min(start for start, _ in self._spans[:count])

    def _work(self, index: int) -> None:
        while True:
            try:
                self._begin.wait()
            except threading.BrokenBarrierError:
                return
            task = self._tasks[index]
            try:
                started = time.perf_counter()
                if task is not None:
                    task()
                self._spans[index] = (started, time.perf_counter())
            except BaseException as error:
                self._failure = error
            self._end.wait()


# ---- running ---------------------------------------------------------------------------------------------------------


def run_all(
    benchmarks: Sequence[Benchmark], sizes: Sizes, prefixes: Sequence[str], console: Console
) -> tuple[list[Entry], list[str], list[Failed]]:
    """Run the benchmarks with a name that is one of `prefixes` or lies below one (all, if there are none).

    Returns:
        Entries, notes, and what failed.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    failed: list[Failed] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[name]}", style="bold"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        for benchmark in benchmarks:
            wanted = [name for name in benchmark.names if _selected(name, prefixes)]
            if not wanted:
                continue
            task = progress.add_task("starting", name=wanted[0], total=None)
            try:
                found = _in_process(
                    benchmark,
                    sizes,
                    lambda what, done, total, task=task: progress.update(  # type: ignore[misc]
                        task, description=what, completed=done, total=total
                    ),
                    notes.append,
                )
            except BenchmarkError as error:
                failed.append(Failed(tuple(wanted), str(error)))
                progress.console.print(f"[red]{wanted[0]} failed[/red]")
            else:
                kept = [entry for entry in found if _selected(entry.name, prefixes)]
                entries += kept
                for entry in kept:
                    progress.console.print(_line(entry), highlight=False)
            progress.remove_task(task)
    return entries, notes, failed


class BenchmarkError(Exception):
    """A benchmark's process raised or died; the text says what it said."""


def _selected(name: str, prefixes: Sequence[str]) -> bool:
    return not prefixes or any(name == prefix or name.startswith(f"{prefix.rstrip('.')}.") for prefix in prefixes)


def _in_process(
    benchmark: Benchmark, sizes: Sizes, progress: Callable[[str, int, int], None], note: Callable[[str], None]
) -> list[Entry]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(benchmark, sizes, theirs), name=benchmark.names[0])
    process.start()
    theirs.close()
    try:
        while True:
            try:
                kind, *content = ours.recv()
            except EOFError:
                process.join()
                raise BenchmarkError(f"the process ended with status {process.exitcode}") from None
            if kind == "progress":
                progress(*content)
            elif kind == "note":
                note(*content)
            elif kind == "error":
                raise BenchmarkError(content[0])
            else:
                return list(content[0])
    finally:
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()


def _child(benchmark: Benchmark, sizes: Sizes, pipe: Connection) -> None:
    try:
        pipe.send(("entries", benchmark.run(Context(sizes, pipe))))
    except BaseException:
        pipe.send(("error", "\n".join(traceback.format_exc().splitlines()[-_TRACEBACK_LINES:])))
    finally:
        pipe.close()


# ---- showing ---------------------------------------------------------------------------------------------------------


def _amount(value: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def _bound(entry: Entry) -> str:
    if entry.target is None:
        return "-"
    return f"{'≥' if entry.better == 'higher' else '≤'} {entry.target:g}"


def _line(entry: Entry) -> str:
    return f"{entry.name:<24} {_amount(entry.value):>8} {entry.unit:<16} ratio {entry.ratio:<7.3f} {_bound(entry)}"


def show(entries: Sequence[Entry], notes: Sequence[str], failed: Sequence[Failed], console: Console) -> None:
    """Print the table, the notes and what failed."""
    table = RichTable(title="Against references measured in the same run")
    table.add_column("figure", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("reference", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for entry in entries:
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[entry.met]
        row = (_amount(entry.value), _amount(entry.reference), entry.unit, f"{entry.ratio:.3f}", _bound(entry), verdict)
        table.add_row(entry.name, *row)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    for failure in failed:
        console.print(f"[red]failed[/red]: {', '.join(failure.names)}", highlight=False)
        console.print(failure.reason, markup=False, highlight=False)


def write_json(entries: Sequence[Entry], path: Path) -> None:
    """Write the entries as a list of objects, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    fresh.replace(path)

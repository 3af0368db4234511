"""A whole pipeline: what a second thread is worth, and the memory it takes while a large file streams through."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from tests.bench.harness import Benchmark, Context, Crew, Entry, higher, interleave, lower
from trilith.data.formats.framing import Framing, frame_records
from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.specs import Dense, Extra, Label, Slot, Sparse
from trilith.data.pipeline.dataset import Dataset, read
from trilith.data.records import Kind, Records
from trilith.data.samples.filters import FilterByValue
from trilith.data.scan.scanner import Scanner
from trilith.data.scan.schema import Element, Fields
from trilith.ops.memory import tune_allocator
from trilith_proto.proto_parser_pb2 import Instance

__all__ = ["BENCHMARKS"]

_FRAMING = Framing(has_sort_id=True)
_MEGABYTE = 1 << 20
_DISTINCT = 512
_BATCH = 512
# Growth is given in units of what is allowed, so that the ratio's bound is 1.
_ALLOWED_MB = 300.0


def _records() -> Records:
    """Instances of 2 to 4 KB: 20 slots of flat fids, 20 named features of up to 20 fids, dense features, a LineId."""
    random = np.random.default_rng(0)
    payloads = []
    for row in range(_DISTINCT):
        instance = Instance(label=[float(row % 2), 0.5], instance_weight=1.0)
        for slot in range(1, 21):
            ids = random.integers(0, 1 << 48, int(random.integers(1, 8)))
            instance.fid.extend((ids | (slot << 54)).tolist())
        for number in range(20):
            ids = random.integers(0, 1 << 48, int(random.integers(1, 21)))
            instance.feature.add(name=f"feature_{number}", fid=(ids | ((100 + number) << 48)).tolist())
        for number in range(3):
            instance.feature.add(name=f"dense_{number}", float_value=random.random(8).tolist())
        line = instance.line_id
        line.uid, line.req_time, line.item_id = row, 1_700_000_000 + row, 7 * row
        line.actions.extend([1, 2 + row % 3])
        payloads.append(instance.SerializeToString())
    return Records.of(payloads, Kind.INSTANCE)


def _spec() -> ParseSpec:
    slots: dict[str, object] = {f"slot_{slot}": Slot(slot) for slot in range(1, 21)}
    named: dict[str, object] = {f"feature_{number}": Sparse() for number in range(20)}
    dense: dict[str, object] = {f"dense_{number}": Dense(8) for number in range(3)}
    return ParseSpec(
        {**slots, **named, **dense, "label": Label(2), "uid": Extra(), "actions": Extra(2)}  # type: ignore[dict-item]
    )


def _pipeline(path: str, threads: int | None = None) -> Dataset:
    """Read, filter, parse, batch, prefetch; with the defaults if `threads` is None."""
    dataset = (
        read(path, kind=Kind.INSTANCE, framing=_FRAMING)
        .filter(FilterByValue("uid", "ge", _DISTINCT // 8))
        .parse(_spec())
        .batch(_BATCH)
    )
    return dataset.prefetch() if threads is None else dataset.prefetch(4, threads=threads)


def _fields() -> Fields:
    """What the pipeline's parser has scanned."""
    return Fields(
        named=tuple((f"feature_{number}", Element.FID) for number in range(20))
        + tuple((f"dense_{number}", Element.FLOAT) for number in range(3)),
        slots=tuple(range(1, 21)),
        slots_as_v2=True,
    )


def threads(context: Context) -> list[Entry]:
    """What a second thread is worth to a pipeline, against what it is worth to bare scanning of the same records.

    That reads and scans them file by file, in threads that share nothing: what a second core gives on this machine to
    work on as much memory, which on some is little. All four take turns.
    """
    sizes = context.sizes
    records = _records()
    framed = frame_records(records, _FRAMING).tobytes()
    copies = max(2, sizes.pipeline_records // _DISTINCT)
    tune_allocator()  # as a worker does; every side gains
    with tempfile.TemporaryDirectory(prefix="trilith-bench-") as folder, Crew(2) as crew:
        paths = [Path(folder) / f"instances-{part}.pb" for part in range(2)]
        for path, part in zip(paths, (copies // 2, copies - copies // 2), strict=True):
            path.write_bytes(framed * part)
        scanners = [Scanner(Kind.INSTANCE, _fields()) for _ in range(2)]

        def pipeline(count: int) -> Callable[[], Callable[[], object]]:
            def fresh() -> Callable[[], object]:
                iterator = iter(_pipeline(f"{folder}/*.pb", count))

                def work() -> None:
                    rows = sum(len(batch["label"]) for batch in iterator)
                    if rows != copies * (_DISTINCT - _DISTINCT // 8):
                        raise AssertionError(f"{rows} rows of {copies} x {_DISTINCT} records")

                return work

            return fresh

        def scan(thread: int, count: int) -> None:
            for path in paths[thread::count]:
                for chunk in read(str(path), kind=Kind.INSTANCE, framing=_FRAMING).chunks():
                    scanners[thread].scan(chunk)

        def scanning(count: int) -> Callable[[], Callable[[], object]]:
            return lambda: partial(crew.run, *(partial(scan, thread, count) for thread in range(count)))

        sides = (pipeline(2), pipeline(1), scanning(2), scanning(1))
        two, one, scan_two, scan_one = map(np.median, interleave(context, "threads", sizes.pipeline_rounds, *sides))
    context.note(f"the pipeline gives {copies * _DISTINCT / float(two):,.0f} records/s on two threads")
    return [
        higher("data.pipeline.threads", float(one / two), float(scan_one / scan_two), "x on two threads", 0.85),
    ]


def memory(context: Context) -> list[Entry]:
    """Resident growth while a file streams through, behind the first batches; the file is a pipe, never on disk."""
    records = _records()
    framed = frame_records(records, _FRAMING).tobytes()
    copies = context.sizes.pipeline_megabytes * _MEGABYTE // len(framed) + 1
    process = psutil.Process()
    with _piped(framed, copies) as path:
        with iter(_pipeline(path)) as batches:
            for _ in range(2):  # kernels are compiled and loaded
                next(batches)
            before = highest = process.memory_info().rss
            for number, batch in enumerate(batches):
                highest = max(highest, process.memory_info().rss)
                if number % 64 == 0:
                    context.progress("memory", number * _BATCH, copies * _DISTINCT)
                del batch
    grown = (highest - before) / _MEGABYTE
    return [lower("data.pipeline.memory", max(grown, 0.1), _ALLOWED_MB, "MB", 1.0)]


@contextmanager
def _piped(block: bytes, copies: int) -> Iterator[str]:
    """The path of a named pipe into which a thread writes a block again and again."""
    with tempfile.TemporaryDirectory(prefix="trilith-bench-") as folder:
        path = str(Path(folder) / "instances.pb")
        os.mkfifo(path)

        def write() -> None:
            try:
                with open(path, "wb", buffering=0) as sink:
                    for _ in range(copies):
                        sink.write(block)
            except BrokenPipeError:
                pass  # the reader failed and says so itself

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        yield path
        writer.join(timeout=60)


BENCHMARKS = (Benchmark(("data.pipeline.threads",), threads), Benchmark(("data.pipeline.memory",), memory))

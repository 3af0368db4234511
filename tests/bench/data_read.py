"""Reading records: the frames of a file found, against reading nothing but its bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.bench.harness import Benchmark, Context, Entry, higher, interleave
from trilith.data.formats.framing import Framing, frame_records
from trilith.data.formats.readers import open_records
from trilith.data.formats.reading import BLOCK_BYTES
from trilith.data.records import Records

__all__ = ["BENCHMARKS"]

_FRAMING = Framing(has_sort_id=True)
_CHUNK = 4096


def _write(path: Path, records: int) -> int:
    """Records of 600 to 1400 bytes; the size of the file."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, records, _CHUNK):
            sizes = random.integers(600, 1400, min(_CHUNK, records - start)).tolist()
            payloads = Records.of([random.bytes(size) for size in sizes], "instance")
            file.write(frame_records(payloads, _FRAMING, sort_id=b"0123456789abcdef").data)
    return path.stat().st_size


def read(context: Context) -> list[Entry]:
    """`open_records` gives chunks of buffer and offsets; the reference fills one buffer of the same size over and over.

    Both find the file in the page cache.
    """
    sizes = context.sizes
    with tempfile.TemporaryDirectory(prefix="trilith-bench-") as folder:
        path = Path(folder) / "records.pb"
        size = _write(path, sizes.data_records)

        def records() -> Callable[[], object]:
            def work() -> None:
                with open_records(str(path), framing=_FRAMING) as reader:
                    found = sum(map(len, reader))
                if found != sizes.data_records:
                    raise AssertionError(f"{found} of {sizes.data_records} records")

            return work

        def plain() -> Callable[[], object]:
            def work() -> None:
                target = memoryview(bytearray(BLOCK_BYTES))
                with path.open("rb", buffering=0) as file:
                    while file.readinto(target):
                        pass

            return work

        ours, theirs = interleave(context, "read", sizes.data_rounds, records, plain)
    rates = [size / float(np.median(each)) / 1e9 for each in (ours, theirs)]
    return [higher("data.read", *rates, "GB/s", 0.5)]


BENCHMARKS = (Benchmark(("data.read",), read),)

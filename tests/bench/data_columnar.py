"""Columnar files: Parquet and CSV into the arrays of batches, against bare pyarrow into NumPy.

Rows of 8 id columns, 4 floats, a label and, in Parquet, a list of ids. pyarrow reads the same columns in batches of as
many rows, checks nothing, and gives every column as an array; CSV columns as the types that it finds. Both sides find
the files in the page cache, take turns, and read CSV on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

import trilith.data
from tests.bench.harness import Benchmark, Context, Entry, higher, interleave
from trilith.data import Dense, Label, Sparse
from trilith.data.formats.reading import BLOCK_BYTES

__all__ = ["BENCHMARKS"]

_IDS = [f"id{number}" for number in range(8)]
_FLOATS = [f"x{number}" for number in range(4)]
_BATCH = 4096
_SPEC = {**dict.fromkeys(_IDS, Sparse()), **dict.fromkeys(_FLOATS, Dense()), "label": Label()}


def _write(folder: Path, rows: int) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    table = pa.table(
        {name: random.integers(0, 1 << 40, rows) for name in _IDS}
        | {name: random.random(rows, np.float32) for name in _FLOATS}
        | {"label": random.integers(0, 2, rows)}
    )
    pa_csv.write_csv(table, folder / "rows.csv")
    splits = np.concatenate([[0], np.cumsum(random.integers(0, 6, rows))])
    seen = pa.ListArray.from_arrays(pa.array(splits, pa.int32()), random.integers(0, 1 << 40, splits[-1]))
    pq.write_table(table.append_column("seen", seen), folder / "rows.parquet", row_group_size=1 << 17)
    return folder / "rows.parquet", folder / "rows.csv"


def _arrays(batch: pa.RecordBatch) -> int:
    for column in batch.columns:
        if pa.types.is_list(column.type):
            column.offsets.to_numpy()
            column = column.flatten()
        column.to_numpy(zero_copy_only=False)
    return int(batch.num_rows)


def _bare_parquet(path: Path) -> int:
    with pq.ParquetFile(path) as file:
        return sum(_arrays(batch) for batch in file.iter_batches(_BATCH))


def _bare_csv(path: Path) -> int:
    options = pa_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    with pa_csv.open_csv(path, read_options=options) as reader:
        return sum(map(_arrays, reader))


def columnar(context: Context) -> list[Entry]:
    """`read(...).parse(...).batch(4096)` against pyarrow alone; both count the rows that they gave."""
    sizes = context.sizes
    entries = []
    with tempfile.TemporaryDirectory(prefix="trilith-bench-") as folder:
        parquet, csv = _write(Path(folder), sizes.columnar_rows)
        for path, bare, spec in (
            (parquet, _bare_parquet, {**_SPEC, "seen": Sparse()}),
            (csv, _bare_csv, _SPEC),
        ):
            samples = trilith.data.read(path).parse(spec).batch(_BATCH)

            def side(read: Callable[[], int]) -> Callable[[], Callable[[], object]]:
                def work() -> None:
                    if (found := read()) != sizes.columnar_rows:
                        raise AssertionError(f"{found} of {sizes.columnar_rows} rows")

                return lambda: work

            ours, theirs = interleave(
                context,
                path.name,
                sizes.columnar_rounds,
                side(lambda samples=samples: sum(len(batch["label"]) for batch in samples.iterate())),  # type: ignore[misc]
                side(lambda bare=bare, path=path: bare(path)),  # type: ignore[misc]
            )
            rates = [sizes.columnar_rows / float(np.median(each)) / 1e6 for each in (ours, theirs)]
            entries.append(higher(f"data.columnar.{path.suffix[1:]}", *rates, "M rows/s", 0.5))
    return entries


BENCHMARKS = (Benchmark(("data.columnar.parquet", "data.columnar.csv"), columnar),)

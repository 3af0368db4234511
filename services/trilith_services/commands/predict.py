"""`trilith predict`: a job's predictions for samples, to a file or standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Protocol

import typer

from trilith.errors import InvalidRequestError
from trilith_services.commands import output
from trilith_services.commands.flags import LogFlags, expanded
from trilith_services.commands.jobs import BatchSize, DataFlags, Job, RunFlags, check_trained

if TYPE_CHECKING:
    import numpy as np

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(predict))


def predict(
    *,
    job: Job,
    run: RunFlags,
    data: Annotated[
        str,
        typer.Option(metavar="DATA", help="A path or glob, kafka://TOPIC, or - for standard input; needs no labels."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where predictions go: a .parquet or .jsonl file, or - for JSON lines on standard output.",
        ),
    ],
    batch_size: BatchSize = 512,
    form: DataFlags,
    logs: LogFlags,
) -> None:
    """Write a job's predictions: a row for each sample in the order of the data, a column for each label.

    The model is that of the job's cluster, or of its newest checkpoint; `--set resume=CHECKPOINT` takes another one.
    """
    if to != "-" and Path(to).suffix not in (".parquet", ".jsonl"):
        raise InvalidRequestError(f"--output {to}: it must end in .parquet or .jsonl, or be -")
    if not Path(to).absolute().parent.is_dir():
        raise InvalidRequestError(f"--output {to}: there is no directory {Path(to).parent}")
    found = run.job(job)
    identity = found.run.identity()
    if identity.world_size > 1:
        raise InvalidRequestError(f"this is one of {identity.world_size} workers; predict runs in one process")
    logs.setup()
    check_trained(found)
    samples = 0
    with found, _writer(to, list(found.task.labels) or ["score"]) as writer:
        for columns in found.predict(form.read(data, batch_size)):
            writer.write(columns)
            samples += len(next(iter(columns.values())))
    typer.echo(f"predict: {output.plural(samples, 'sample')} to {'standard output' if to == '-' else to}", err=True)


class _Writer(Protocol):
    """Takes predictions batch by batch."""

    def write(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write a batch's, by label float32[b]."""

    def close(self) -> None:
        """No more come."""


@contextmanager
def _writer(to: str, labels: list[str]) -> Iterator[_Writer]:
    """What writes a file, which appears when it is whole; or to standard output."""
    if to == "-":
        yield _JsonLines(sys.stdout)
        return
    path = Path(to)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = _Parquet(part, labels) if path.suffix == ".parquet" else _JsonLines(part.open("w", encoding="utf-8"))
        try:
            yield writer
        finally:
            writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _JsonLines:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        for row in zip(*(each.tolist() for each in columns.values()), strict=True):
            self._file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, labels: list[str]) -> None:
        self._path, self._labels = path, labels
        self._writer: Any = None

    def write(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(dict(columns))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        import numpy as np

        if self._writer is None:
            self.write({name: np.zeros(0, np.float32) for name in self._labels})
        self._writer.close()

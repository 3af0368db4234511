"""What readers of rows of columns have in common: Parquet and CSV files as Examples and ExampleBatches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from trilith.data.choices import OnError
from trilith.data.formats.reading import BLOCK_BYTES, Losses, Position, RecordReader, UnfitColumnsError
from trilith.data.line_ids import LineField, Wire
from trilith.data.records import Kind, Records
from trilith.data.scan.rows import LABEL, Column, ColumnType, RowColumn, Rows, line_field_of
from trilith.errors import DataError, InvalidRequestError

__all__ = ["OPTIONS", "ColumnarReader", "line_id_type"]

OPTIONS = ("kind", "columns", "batch_size", "drop_remainder", "block_bytes", "start", "on_error")
"""What a `ColumnarReader` takes of `ReadOptions`."""

_BOUNDS = {Wire.VARINT32: (-(2**31), 2**31 - 1), Wire.UNSIGNED32: (0, 2**32 - 1)}


class ColumnarReader(RecordReader):
    """Rows of columns as records; a subclass opens the file and gives rows by number.

    Examples are `Rows`, which see. In an ExampleBatch every column is a list of features, its id the column's index. A
    column that nothing was said about and that has no value yet is no feature.

    Args: as `trilith.data.formats.readers.open_records` takes them.
    """

    def __init__(
        self,
        path: str,
        *,
        kind: Kind,
        columns: Sequence[Column] | None = None,
        batch_size: int = 512,
        drop_remainder: bool = True,
        block_bytes: int = BLOCK_BYTES,
        start: Position | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if kind is Kind.INSTANCE:
            raise InvalidRequestError(f"{path}: columns become 'example' or 'examplebatch', not 'instance'")
        if batch_size < 1:
            raise InvalidRequestError(f"batch_size={batch_size}: a batch has at least one row")
        self.kind = kind
        self.losses = Losses()
        self._name = path
        self._block = block_bytes
        self._batch_size = batch_size
        self._drop_remainder = drop_remainder
        self._skip_damage = on_error == "skip"
        self._rows = start.records if start is not None else 0
        self._pending: Rows | None = None
        self._declared = columns is not None
        with ExitStack() as undo:
            available = self._open()
            self.available = available
            undo.callback(self.close)
            self.columns = tuple(self._all()) if columns is None else tuple(columns)
            self._check(available)
            self._fields = [_line_field(path, each) if kind is Kind.EXAMPLE else None for each in self.columns]
            self._batches = self._read(self._rows)
            undo.pop_all()

    def _check(self, available: Mapping[str, str]) -> None:
        """Refuse columns that the file cannot give."""
        names = [column.name for column in self.columns]
        for name in names:
            if name not in available:
                raise UnfitColumnsError(f"{self._name}: no column {name!r}; there are {list(available)}")
            if available[name]:
                raise UnfitColumnsError(f"{self._name}: {available[name]}")
            if names.count(name) > 1:
                raise InvalidRequestError(f"{self._name}: column {name!r} is asked for twice")

    @property
    def position(self) -> Position:
        """Behind the last chunk given out."""
        return Position(self._rows)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._batches = iter(())
        self._pending = None

    @abstractmethod
    def _open(self) -> dict[str, str]:
        """Open the file; returns the columns that it has, each with why it cannot be read, if so."""

    @abstractmethod
    def _all(self) -> list[Column]:
        """What is read if nothing is asked for."""

    @abstractmethod
    def _read(self, first: int) -> Iterator[Rows]:
        """The rows in order from row `first`, in chunks."""

    def _lost(self, row: int, count: int, reason: object) -> None:
        """Raise, or count, the loss of rows."""
        message = f"{self._name}: record {row}, byte 0: {reason}"
        if not self._skip_damage:
            raise DataError(message)
        self.losses.add(message, 0)
        self.losses.records += count - 1

    def _found(self, numbers: Any, columns: list[RowColumn], bad: Mapping[int, str]) -> Iterator[Rows]:
        """Rows without those that are damaged: all of them, or those in front of the first and then an error.

        Args:
            numbers: int64[n], which rows of the file they are.
            columns: What they hold.
            bad: What is wrong with rows, by index.
        """
        rows = Rows(columns=columns, numbers=numbers, sources=(self._name,))
        bad = {**self._odd_lines(columns), **bad} if self.kind is Kind.EXAMPLE else bad
        if not bad:
            yield rows
            return
        if not self._skip_damage:
            first = min(bad)
            if first:
                yield rows.take(slice(0, first))
            self._lost(int(rows.numbers[first]), 1, bad[first])
        keep = np.ones(len(rows), np.bool_)
        keep[list(bad)] = False
        for row in sorted(bad):
            self._lost(int(rows.numbers[row]), 1, bad[row])
        yield rows.take(keep)

    def __next__(self) -> Records:
        if self.kind is Kind.EXAMPLE:
            for rows in self._batches:
                if len(rows):
                    self._rows = int(rows.numbers[-1]) + 1
                    return rows
            raise StopIteration
        for rows in self._batches:
            whole: Any = rows if self._pending is None else Records.concatenate([self._pending, rows])
            used = len(whole) - len(whole) % self._batch_size
            self._pending = whole.take(slice(used, None))
            if used:
                return self._batched(whole, np.arange(0, used, self._batch_size), self._batch_size)
        rest, self._pending = self._pending, None
        if rest is None or not len(rest) or self._drop_remainder:
            raise StopIteration
        return self._batched(rest, np.zeros(1, np.int64), len(rest))

    def _batched(self, rows: Rows, starts: Any, size: int) -> Records:
        self._rows = int(rows.numbers[starts[-1] + size - 1]) + 1
        return rows.batches(starts, size, self.kind)

    def _odd_lines(self, columns: Sequence[RowColumn]) -> dict[int, str]:
        """Rows whose values a field of LineId does not take, and why."""
        bad: dict[int, str] = {}
        for column in columns:
            if (field := line_field_of(column.name)) is not None:
                for row, reason in _odd_line_values(field, column).items():
                    bad.setdefault(row, f"column {column.name!r} {reason}")
        return bad


def _odd_line_values(field: LineField, column: RowColumn) -> dict[int, str]:
    lengths, values = column.lists.lengths, column.lists.values
    odd = np.flatnonzero(lengths != 1)
    if odd.size:
        return {int(row): f"has {lengths[row]} values; line_id.{field.name} takes one" for row in odd}
    if column.type is ColumnType.BYTES:
        strings = enumerate(column.strings())
        return {row: "holds bytes that are no UTF-8" for row, each in strings if not _is_text(each)}
    if field.wire in _BOUNDS:
        lowest, highest = _BOUNDS[field.wire]
        odd = np.flatnonzero((values < lowest) | (values > highest))
        reason = f"has a value outside {lowest}..{highest}, what line_id.{field.name} takes"
        return {int(row): reason for row in odd}
    return {}


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def line_id_type(name: str) -> ColumnType | None:
    """What a column that fills a field of LineId is read as; None for a label or feature."""
    field = line_field_of(name)
    if field is None:
        return None
    return {"f": ColumnType.FLOAT, "O": ColumnType.BYTES}.get(field.dtype.kind, ColumnType.INT)


def _line_field(path: str, column: Column) -> str | None:
    """The LineId field that a column fills; None for a label or feature."""
    if column.name == LABEL and column.type not in (ColumnType.FLOAT, ColumnType.INT):
        raise InvalidRequestError(f"{path}: column {LABEL!r} is the label: it is read as float, not {column.type}")
    expected, field = line_id_type(column.name), line_field_of(column.name)
    if field is None:
        return None
    if column.type != expected:
        raise InvalidRequestError(
            f"{path}: column {column.name!r} fills line_id.{field.name}: read it as {expected}, not {column.type}"
        )
    return field.name

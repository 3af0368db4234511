"""Rows of named columns as Examples and ExampleBatches: what Parquet and CSV have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.choices import OnError
from trilith.data.formats.column_types import Column, ColumnType, taken
from trilith.data.formats.readers import BLOCK_BYTES, Losses, Position, RecordReader, UnfitColumnsError
from trilith.data.line_ids import LineField, Wire, line_field, line_fields
from trilith.data.ragged import Ragged
from trilith.data.records import PADDING, Kind, Records
from trilith.data.samples.rewrite import Changes
from trilith.data.scan.compose import compose_batch, compose_examples
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of
from trilith_proto import example_pb2

__all__ = ["LABEL", "Column", "ColumnType", "ColumnarReader", "Rows", "line_id_type"]

LABEL = "__LABEL__"
_LABEL_FIELD = 101
_FIRST_ID = 10_000

_MEMBERS = {
    ColumnType.INT: "int64_list",
    ColumnType.FID_V1: "fid_v1_list",
    ColumnType.FID_V2: "fid_v2_list",
    ColumnType.FLOAT: "float_list",
    ColumnType.BYTES: "bytes_list",
}
_WIRES: dict[ColumnType, tuple[Wire, npt.DTypeLike]] = {
    ColumnType.INT: (Wire.VARINT, np.int64),
    ColumnType.FID_V1: (Wire.FIXED64, np.uint64),
    ColumnType.FID_V2: (Wire.FIXED64, np.uint64),
    ColumnType.FLOAT: (Wire.FIXED32, np.float32),
    ColumnType.BYTES: (Wire.BYTES, np.object_),
}
_BOUNDS = {Wire.VARINT32: (-(2**31), 2**31 - 1), Wire.UNSIGNED32: (0, 2**32 - 1)}


@dataclass(slots=True, eq=False)
class Rows:
    """Some rows of a file.

    Attributes:
        numbers: int64[n], which rows of the file they are; rows that were skipped are not among them.
        columns: The columns that they have, each with its number among those of the file's reader.
        lists: Per column its values: uint64, int64, float32, or byte strings.
    """

    numbers: npt.NDArray[np.int64]
    columns: list[tuple[int, Column]]
    lists: list[Ragged[Any]]

    def __len__(self) -> int:
        return self.numbers.size

    def take(self, rows: slice | npt.NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        mask = np.zeros(len(self), np.bool_)
        mask[rows] = True
        return Rows(self.numbers[mask], self.columns, [taken(each, mask) for each in self.lists])


class ColumnarReader(RecordReader):
    """Rows of columns as records; a subclass opens the file and gives rows by number.

    An Example takes `__LABEL__` as its label, and a column `__NAME__` whose inner name in lower case is a scalar of
    LineId as that field, which takes exactly one value per row; all others are named features, their ids 10000 plus the
    column's index. In an ExampleBatch every column is a list of features, its id the column's index. A column that
    nothing was said about and that has no value yet is no feature.

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
            self._fields = [_line_id_field(path, each) if kind is Kind.EXAMPLE else None for each in self.columns]
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

    def _sound(self, rows: Rows, bad: Mapping[int, str]) -> Iterator[Rows]:
        """Rows without those that are damaged: all of them, or those in front of the first and then an error.

        Args:
            rows: Some rows.
            bad: What is wrong, by index.
        """
        bad = {**self._odd_lines(rows), **bad} if self.kind is Kind.EXAMPLE else bad
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
                    return self._numbered(self._examples(rows), rows.numbers)
            raise StopIteration
        for rows in self._batches:
            whole = rows if self._pending is None else _joined(self._pending, rows)
            used = len(whole) - len(whole) % self._batch_size
            self._pending = whole.take(slice(used, None))
            if used:
                self._rows = int(whole.numbers[used - 1]) + 1
                starts = np.arange(0, used, self._batch_size)
                return self._numbered(self._example_batches(whole, starts, self._batch_size), whole.numbers[starts])
        rest, self._pending = self._pending, None
        if rest is None or not len(rest) or self._drop_remainder:
            raise StopIteration
        self._rows = int(rest.numbers[-1]) + 1
        return self._numbered(self._example_batches(rest, np.zeros(1, np.int64), len(rest)), rest.numbers[:1])

    def _numbered(self, records: Records, numbers: npt.NDArray[Any]) -> Records:
        return replace(records, numbers=numbers.astype(np.int64), positions=np.zeros(len(records), np.int64))

    def _examples(self, rows: Rows) -> Records:
        lists = _Lists(len(rows))
        changes = lists.changes
        for (index, column), given in zip(rows.columns, rows.lists, strict=True):
            field = self._fields[index]
            if field is not None:
                changes.add_line(line_field(field), _line_values(line_field(field), given))
            elif column.name == LABEL:
                labels = Ragged(np.asarray(given.values, np.float64), given.row_splits)
                changes.add_top(_LABEL_FIELD, Wire.FIXED32, np.dtype(np.float32), labels, packed=True, what=LABEL)
            else:
                lists.add(column, given, example_pb2.NamedFeature, _FIRST_ID + index)
        line, top = np.array(sorted(changes.line), np.int64), np.array(changes.top, np.int64)
        buffer, scratch, feature = lists.room()
        offsets, lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        compose_examples(
            len(rows),
            *lists.tables(),
            address_of(line),
            len(line),
            address_of(top),
            len(top),
            address_of(scratch),
            address_of(feature),
            address_of(buffer),
            address_of(offsets),
            address_of(lengths),
        )
        return self._made(buffer, offsets, lengths)

    def _example_batches(self, rows: Rows, starts: npt.NDArray[np.int64], size: int) -> Records:
        """ExampleBatches of `size` rows each."""
        lists = _Lists(len(rows))
        for (index, column), given in zip(rows.columns, rows.lists, strict=True):
            lists.add(column, given, example_pb2.NamedFeatureList, index)
        buffer, scratch, features = lists.room()
        tables, used = lists.tables(), 0
        offsets, lengths = np.empty(starts.size, np.int64), np.empty(starts.size, np.int64)
        for number, start in enumerate(starts.tolist()):
            spaces = address_of(scratch), address_of(features), address_of(buffer) + used
            offsets[number] = used
            lengths[number] = compose_batch(start, start + size, *tables, *spaces)
            used += int(lengths[number])
        return self._made(buffer, offsets, lengths)

    def _made(
        self, buffer: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> Records:
        empty = Records.of([b""] * len(offsets), self.kind, source=self._name)
        return empty.replace(buffer=buffer, offsets=offsets, lengths=lengths)

    def _odd_lines(self, rows: Rows) -> dict[int, str]:
        """Rows whose values a field of LineId does not take, and why."""
        bad: dict[int, str] = {}
        for (index, column), given in zip(rows.columns, rows.lists, strict=True):
            if (name := self._fields[index]) is not None:
                field = line_field(name)
                for row, reason in _odd_line_values(field, given).items():
                    bad.setdefault(row, f"column {column.name!r} {reason}")
        return bad


def _odd_line_values(field: LineField, given: Ragged[Any]) -> dict[int, str]:
    lengths = given.lengths
    odd = np.flatnonzero(lengths != 1)
    if odd.size:
        return {int(row): f"has {lengths[row]} values; line_id.{field.name} takes one" for row in odd}
    if given.values.dtype == np.object_:
        return {row: "holds bytes that are no UTF-8" for row, each in enumerate(given.values) if not _is_text(each)}
    if field.wire in _BOUNDS:
        lowest, highest = _BOUNDS[field.wire]
        odd = np.flatnonzero((given.values < lowest) | (given.values > highest))
        reason = f"has a value outside {lowest}..{highest}, what line_id.{field.name} takes"
        return {int(row): reason for row in odd}
    return {}


def _line_values(field: LineField, given: Ragged[Any]) -> npt.NDArray[Any]:
    """What a column gives a field of LineId: one value for every row."""
    return given.values != 0 if field.is_bool else given.values


def _joined(first: Rows, second: Rows) -> Rows:
    """Rows behind others, of which a column may have had another type or no values at all."""
    columns: list[tuple[int, Column]] = []
    lists: list[Ragged[Any]] = []
    parts: dict[int, list[tuple[Column, Ragged[Any]] | None]] = {}
    for place, rows in enumerate((first, second)):
        for (index, column), given in zip(rows.columns, rows.lists, strict=True):
            parts.setdefault(index, [None, None])[place] = column, given
    for index in sorted(parts):
        found = [each for each in parts[index] if each is not None]
        types = {ColumnType(column.type) for column, _ in found}
        # Of integers and something else they are the something else; ids of 64 bits keep their bits.
        wider = types - {ColumnType.INT} if len(types) > 1 else types
        kind = ColumnType.FLOAT if ColumnType.FLOAT in wider else next(iter(wider))
        dtype = np.dtype(_WIRES[kind][1])
        made = []
        for rows, each in zip((first, second), parts[index], strict=True):
            empty: Ragged[Any] = Ragged(np.empty(0, dtype), np.zeros(len(rows) + 1, np.int64))
            given = empty if each is None else each[1]
            made.append(Ragged(given.values.astype(dtype, copy=False), given.row_splits))
        columns.append((index, Column(found[0][0].name, kind)))
        values = np.concatenate([each.values for each in made])
        lists.append(Ragged.of_lengths(values, np.concatenate([each.lengths for each in made])))
    return Rows(np.concatenate([first.numbers, second.numbers]), columns, lists)


class _Lists:
    """Columns as the tables of `compose_examples` and `compose_batch`.

    Attributes:
        changes: Keeps what the tables point to, and takes other fields of the rows.
    """

    def __init__(self, rows: int) -> None:
        self.changes = Changes(rows)
        self._lists: list[list[int]] = []
        self._frames: list[list[int]] = []

    def add(self, column: Column, given: Ragged[Any], message: Any, number: int) -> None:
        """Add a column, which is in messages of a kind, with the column's name and a number."""
        column_type = ColumnType(column.type)
        wire, dtype = _WIRES[column_type]
        self._lists.append(self.changes.field(1, wire, np.dtype(dtype), given, True, column.name))
        head, tail = message(name=column.name).SerializeToString(), message(id=number).SerializeToString()
        text = [self.changes.keep(np.frombuffer(each + bytes(PADDING), np.uint8)) for each in (head, tail)]
        member = example_pb2.Feature.DESCRIPTOR.fields_by_name[_MEMBERS[column_type]].number
        self._frames.append([address_of(text[0]), len(head), address_of(text[1]), len(tail), member])
        self.changes.room += len(head) + len(tail) + 32

    def tables(self) -> tuple[int, int, int]:
        """Addresses of lists and frames, and their number."""
        tables = [self.changes.keep(np.array(each, np.int64)) for each in (self._lists, self._frames)]
        return address_of(tables[0]), address_of(tables[1]), len(self._lists)

    def room(self) -> list[npt.NDArray[np.uint8]]:
        """Room for all rows, for one list, and for the features of one column."""
        most, total = int(self.changes.room.max(initial=0)), int(self.changes.room.sum())
        return [np.empty(size + 2 * PADDING, np.uint8) for size in (total, most, total)]


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def line_id_type(name: str) -> ColumnType | None:
    """What a column that fills a field of LineId is read as; None for a label or feature."""
    if name == LABEL or not (name.startswith("__") and name.endswith("__") and len(name) > 4):
        return None
    field = line_fields().get(name[2:-2].lower())
    if field is None or field.repeated:
        return None
    return {"f": ColumnType.FLOAT, "O": ColumnType.BYTES}.get(field.dtype.kind, ColumnType.INT)


def _line_id_field(name: str, column: Column) -> str | None:
    """The LineId field that a column fills; None for a label or feature."""
    if column.name == LABEL:
        if column.type not in (ColumnType.FLOAT, ColumnType.INT):
            raise InvalidRequestError(f"{name}: column {LABEL!r} is the label: it is read as float, not {column.type}")
        return None
    expected = line_id_type(column.name)
    if expected is None:
        return None
    field = column.name[2:-2].lower()
    if column.type != expected:
        raise InvalidRequestError(
            f"{name}: column {column.name!r} fills line_id.{field}: read it as {expected}, not {column.type}"
        )
    return field

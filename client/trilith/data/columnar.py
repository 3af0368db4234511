"""Rows of named columns as Examples and ExampleBatches: what Parquet and CSV have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trilith.data.choices import OnError
from trilith.data.line_ids import LineField, Wire, line_field, line_fields
from trilith.data.ragged import Ragged
from trilith.data.readers import BLOCK_BYTES, Losses, Position, RecordReader
from trilith.data.records import PADDING, Kind, Records
from trilith.data.rewrite import Changes
from trilith.data.scan.compose import compose_batch, compose_examples
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of
from trilith_proto import example_pb2

__all__ = ["LABEL", "Column", "ColumnType", "ColumnarReader", "check_column", "column_of", "ragged_column"]

LABEL = "__LABEL__"
_LABEL_FIELD = 101
_FIRST_ID = 10_000

Values = npt.NDArray[Any] | list[bytes]


class ColumnType(StrEnum):
    """What a column's values become."""

    INT = "int"
    FID_V1 = "fid_v1"
    FID_V2 = "fid_v2"
    FLOAT = "float"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Column:
    """One column to read.

    Attributes:
        name: Its name; of a nested column's path the first component.
        type: What its values become.
    """

    name: str
    type: ColumnType | str

    def __post_init__(self) -> None:
        if self.type not in set(ColumnType):
            raise InvalidRequestError(
                f"column {self.name!r}: type {self.type!r} is none of {[str(each) for each in ColumnType]}"
            )


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


def column_of(name: str, stored: pa.DataType) -> Column:
    """A column by the type it is stored as.

    Raises:
        InvalidRequestError: Nothing can be made of that type.
    """
    leaf = _leaf(stored)
    if pa.types.is_integer(leaf) or pa.types.is_boolean(leaf):
        return Column(name, ColumnType.INT)
    if pa.types.is_floating(leaf):
        return Column(name, ColumnType.FLOAT)
    if _is_bytes(leaf):
        return Column(name, ColumnType.BYTES)
    raise InvalidRequestError(f"column {name!r} is stored as {stored}: only integers, floats and bytes can be read")


def check_column(column: Column, stored: pa.DataType) -> None:
    """Refuse what a stored type cannot become."""
    leaf = _leaf(stored)
    match column.type:
        case ColumnType.FID_V1 | ColumnType.FID_V2:
            fits = leaf in (pa.int64(), pa.uint64())
        case ColumnType.INT:
            fits = pa.types.is_integer(leaf) or pa.types.is_boolean(leaf)
        case ColumnType.FLOAT:
            fits = pa.types.is_floating(leaf)
        case _:
            fits = _is_bytes(leaf)
    if not fits:
        raise InvalidRequestError(f"column {column.name!r} is stored as {stored}: it cannot be read as {column.type}")


def _is_bytes(leaf: pa.DataType) -> bool:
    return any(
        check(leaf)
        for check in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    )


def _leaf(stored: pa.DataType) -> pa.DataType:
    while True:
        if pa.types.is_list(stored) or pa.types.is_large_list(stored) or pa.types.is_fixed_size_list(stored):
            stored = stored.value_type
        elif pa.types.is_struct(stored) and stored.num_fields == 1:
            stored = stored.field(0).type
        elif pa.types.is_dictionary(stored):
            stored = stored.value_type
        else:
            return stored


def ragged_column(array: pa.Array, column_type: ColumnType | str) -> tuple[Values, npt.NDArray[np.int64]]:
    """A column's values and int64[n + 1] row splits; a null is no value, and lists of lists are one list."""
    values, splits = _flattened(array)
    match column_type:
        case ColumnType.BYTES:
            return values.cast(pa.large_binary()).to_pylist(), splits
        case ColumnType.FLOAT:
            return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False), splits
        case ColumnType.INT:
            return values.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False), splits
        case _:
            return values.to_numpy(zero_copy_only=False).view(np.uint64), splits


def _flattened(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    stored = array.type
    if pa.types.is_dictionary(stored):
        return _flattened(array.dictionary_decode())
    if pa.types.is_struct(stored):
        return _flattened(array.flatten()[0])
    if pa.types.is_list(stored) or pa.types.is_large_list(stored) or pa.types.is_fixed_size_list(stored):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        values, inner = _flattened(array.flatten())
        return values, inner[_splits(lengths)]
    present = array.is_valid().to_numpy(zero_copy_only=False)
    return array.drop_null(), _splits(present)


def _splits(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    splits = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


class ColumnarReader(RecordReader):
    """Rows of columns as records; a subclass opens the file and gives batches of columns by row number.

    An Example takes `__LABEL__` as its label, and a column `__NAME__` whose inner name in lower case is a scalar of
    LineId as that field, which takes exactly one value per row; all others are named features, their ids 10000 plus the
    column's index. In an ExampleBatch every column is a list of features, its id the column's index.

    Args: as `trilith.data.readers.open_records` takes them.
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
        self._pending: pa.RecordBatch | None = None
        with ExitStack() as undo:
            schema = self._open()
            undo.callback(self.close)
            self.columns = tuple(self._all(schema) if columns is None else columns)
            self._check(schema)
            self._batches = self._read(self._rows)
            self._fields = [_line_id_field(path, each) for each in self.columns] if kind is Kind.EXAMPLE else None
            undo.pop_all()

    def _check(self, schema: pa.Schema) -> None:
        """Refuse columns that the file cannot give."""
        names = [column.name for column in self.columns]
        for name in names:
            if name not in schema.names:
                raise InvalidRequestError(f"{self._name}: no column {name!r}; there are {schema.names}")
            if names.count(name) > 1:
                raise InvalidRequestError(f"{self._name}: column {name!r} is asked for twice")

    def _all(self, schema: pa.Schema) -> list[Column]:
        """What is read if nothing is asked for."""
        return [column_of(field.name, field.type) for field in schema]

    @property
    def position(self) -> Position:
        """Behind the last chunk given out."""
        return Position(self._rows)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._batches = iter(())
        self._pending = None

    @abstractmethod
    def _open(self) -> pa.Schema:
        """Open the file; returns the columns that it has."""

    @abstractmethod
    def _read(self, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of the columns in order from row `first`, each with the number of its first row."""

    def _lost(self, row: int, count: int, reason: object) -> None:
        """Raise, or count, the loss of rows."""
        message = f"{self._name}: record {row}, byte 0: {reason}"
        if not self._skip_damage:
            raise DataError(message)
        self.losses.add(message, 0)
        self.losses.records += count - 1

    def __next__(self) -> Records:
        if self._fields is not None:
            for first, batch in self._batches:
                if batch.num_rows:
                    self._rows = first + batch.num_rows
                    return self._numbered(self._examples(first, batch, self._fields), first + np.arange(batch.num_rows))
            raise StopIteration
        for first, batch in self._batches:
            whole = batch if self._pending is None else pa.concat_batches([self._pending, batch])
            first = first + batch.num_rows - whole.num_rows
            used = whole.num_rows - whole.num_rows % self._batch_size
            self._pending = whole.slice(used)
            if used:
                self._rows = first + used
                starts = np.arange(0, used, self._batch_size)
                return self._numbered(self._example_batches(whole, starts, self._batch_size), first + starts)
        rest, self._pending = self._pending, None
        if rest is None or not rest.num_rows or self._drop_remainder:
            raise StopIteration
        first, self._rows = self._rows, self._rows + rest.num_rows
        return self._numbered(self._example_batches(rest, np.zeros(1, np.int64), rest.num_rows), np.array([first]))

    def _numbered(self, records: Records, numbers: npt.NDArray[Any]) -> Records:
        return replace(records, numbers=numbers.astype(np.int64), positions=np.zeros(len(records), np.int64))

    def _examples(self, first: int, batch: pa.RecordBatch, fields: Sequence[str | None]) -> Records:
        rows = batch.num_rows
        lists = _Lists(rows)
        changes = lists.changes
        for index, (column, field) in enumerate(zip(self.columns, fields, strict=True)):
            values, splits = ragged_column(batch.column(index), column.type)
            if field is not None:
                found = self._line_values(first, line_field(field), column, values, splits)
                changes.add_line(line_field(field), found)
            elif column.name == LABEL:
                labels = Ragged(np.asarray(values, np.float64), splits)
                changes.add_top(_LABEL_FIELD, Wire.FIXED32, np.dtype(np.float32), labels, packed=True, what=LABEL)
            else:
                lists.add(column, values, splits, example_pb2.NamedFeature, _FIRST_ID + index)
        line, top = np.array(sorted(changes.line), np.int64), np.array(changes.top, np.int64)
        buffer, scratch, feature = lists.room()
        offsets, lengths = np.empty(rows, np.int64), np.empty(rows, np.int64)
        compose_examples(
            rows,
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

    def _example_batches(self, rows: pa.RecordBatch, starts: npt.NDArray[np.int64], size: int) -> Records:
        """ExampleBatches of `size` rows each."""
        lists = _Lists(rows.num_rows)
        for index, column in enumerate(self.columns):
            lists.add(column, *ragged_column(rows.column(index), column.type), example_pb2.NamedFeatureList, index)
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

    def _line_values(
        self, first: int, field: LineField, column: Column, values: Values, splits: npt.NDArray[np.int64]
    ) -> npt.NDArray[Any]:
        """What a column gives a field of LineId: one value for every row, of which the field takes all."""
        numbers: npt.NDArray[Any] = np.asarray(values, object if isinstance(values, list) else None)
        wrong = np.flatnonzero(np.diff(splits) != 1)
        reason = (
            ""
            if not wrong.size
            else f"has {splits[wrong[0] + 1] - splits[wrong[0]]} values; line_id.{field.name} takes one"
        )
        if not wrong.size and isinstance(values, list):
            wrong = np.flatnonzero([not _is_text(each) for each in values])
            reason = "holds bytes that are no UTF-8"
        elif not wrong.size and field.wire in _BOUNDS:
            lowest, highest = _BOUNDS[field.wire]
            wrong = np.flatnonzero((numbers < lowest) | (numbers > highest))
            reason = f"has a value outside {lowest}..{highest}, what line_id.{field.name} takes"
        if wrong.size:
            where = f"{self._name}: record {first + int(wrong[0])}, byte 0"
            raise DataError(f"{where}: column {column.name!r} {reason}")
        return numbers != 0 if field.is_bool else numbers


class _Lists:
    """Columns as the tables of `compose_examples` and `compose_batch`.

    Attributes:
        changes: Keeps what the tables point to, and takes other fields of the rows.
    """

    def __init__(self, rows: int) -> None:
        self.changes = Changes(rows)
        self._lists: list[list[int]] = []
        self._frames: list[list[int]] = []

    def add(self, column: Column, values: Values, splits: npt.NDArray[np.int64], message: Any, number: int) -> None:
        """Add a column, which is in messages of a kind, with the column's name and a number."""
        column_type = ColumnType(column.type)
        wire, dtype = _WIRES[column_type]
        given: Ragged[Any] = Ragged(values, splits)  # type: ignore[arg-type]
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


def _line_id_field(name: str, column: Column) -> str | None:
    """The LineId field that a column fills; None for a label or feature."""
    if column.name == LABEL:
        if column.type not in (ColumnType.FLOAT, ColumnType.INT):
            raise InvalidRequestError(f"{name}: column {LABEL!r} is the label: it is read as float, not {column.type}")
        return None
    if not (column.name.startswith("__") and column.name.endswith("__") and len(column.name) > 4):
        return None
    field = line_fields().get(column.name[2:-2].lower())
    if field is None or field.repeated:
        return None
    expected = {"f": ColumnType.FLOAT, "O": ColumnType.BYTES}.get(field.dtype.kind, ColumnType.INT)
    if column.type != expected:
        raise InvalidRequestError(
            f"{name}: column {column.name!r} fills line_id.{field.name}: read it as {expected}, not {column.type}"
        )
    return field.name

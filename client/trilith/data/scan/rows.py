"""Records that are rows of columns: Examples whose bytes are written only where somebody asks for bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import LineField, Wire, line_fields
from trilith.data.records import PADDING, Kind, Records, gather_payloads, joined_sources
from trilith.data.scan.changes import Changes
from trilith.data.scan.compose import compose_batch, compose_examples
from trilith.data.scan.result import Scalars, byte_strings
from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.ops.ragged import Ragged, singles
from trilith_proto import example_pb2

__all__ = ["LABEL", "NO_TEXT", "Column", "ColumnType", "RowColumn", "Rows", "line_field_of", "merged", "packed_text"]

LABEL = "__LABEL__"
_LABEL_FIELD = 101
_FIRST_ID = 10_000

NO_TEXT = np.zeros(PADDING, np.uint8)
"""The text of columns that hold numbers."""


class ColumnType(StrEnum):
    """What a column's values become."""

    INT = "int"
    FID_V1 = "fid_v1"
    FID_V2 = "fid_v2"
    FLOAT = "float"
    BYTES = "bytes"

    @property
    def member(self) -> int:
        """The number of the list in an Example's feature that holds such values."""
        return _MEMBERS[self]

    @property
    def wire(self) -> Wire:
        """How a value is written."""
        return _WIRES[self][0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What a value is; object for byte strings, which columns hold as spans of their text."""
        return np.dtype(_WIRES[self][1])


_MEMBERS = {
    each: example_pb2.Feature.DESCRIPTOR.fields_by_name[f"{'int64' if each == 'int' else each}_list"].number
    for each in ColumnType
}
_WIRES: dict[ColumnType, tuple[Wire, npt.DTypeLike]] = {
    ColumnType.INT: (Wire.VARINT, np.int64),
    ColumnType.FID_V1: (Wire.FIXED64, np.uint64),
    ColumnType.FID_V2: (Wire.FIXED64, np.uint64),
    ColumnType.FLOAT: (Wire.FIXED32, np.float32),
    ColumnType.BYTES: (Wire.BYTES, np.object_),
}


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


@functools.cache
def line_field_of(name: str) -> LineField | None:
    """The field of LineId that a column `__NAME__` fills; None for a label or feature."""
    if name == LABEL or not (name.startswith("__") and name.endswith("__") and len(name) > 4):
        return None
    field = line_fields().get(name[2:-2].lower())
    return None if field is None or field.repeated else field


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RowColumn:
    """One column of some rows.

    Attributes:
        name: Its name.
        type: What its values are.
        number: Its place among the columns of its file.
        lists: The values of each row: uint64, int64, float32, or spans int64[m, 2] of (offset in `text`, length).
        text: uint8[size] with `PADDING` bytes at its end, what spans are of.
        there: bool[rows], which rows have the column at all; None if all have.
    """

    name: str
    type: ColumnType
    number: int
    lists: Ragged[Any]
    text: npt.NDArray[np.uint8]
    there: npt.NDArray[np.bool_] | None = None

    def take(self, rows: Any) -> RowColumn:
        """The column in some of the rows, by indices, a mask, or a slice."""
        return RowColumn(
            name=self.name,
            type=self.type,
            number=self.number,
            lists=_taken(self.lists, rows),
            text=self.text,
            there=None if self.there is None else self.there[rows],
        )

    def strings(self) -> npt.NDArray[np.object_]:
        """object[m]: the byte strings of all rows."""
        return byte_strings(self.text, self.lists.values[:, 0], self.lists.values[:, 1])


class Rows(Records):
    """Rows of columns, each of which is an Example.

    It takes `__LABEL__` as its label, and a column `__NAME__` whose inner name in lower case is a scalar of LineId as
    that field, of which every row has exactly one value; all others are named features, their ids 10000 plus the
    column's number. Parsers and sample ops read the columns; the bytes are made when they are first asked for.

    Args:
        columns: What the rows hold, by number; no two with the same name in any row.
        numbers: int64[n], number of each row in its file, from 0.
        sources: Names of files.
        source_index: int32[n]: the file of each row.
    """

    __slots__ = ("_bytes", "columns")

    columns: tuple[RowColumn, ...]
    _bytes: Records | None

    def __init__(
        self,
        *,
        columns: Iterable[RowColumn],
        numbers: npt.NDArray[np.int64],
        sources: tuple[str, ...],
        source_index: npt.NDArray[np.int32] | None = None,
    ) -> None:
        n = numbers.size
        given = {
            "columns": tuple(columns),
            "_bytes": None,
            "kind": Kind.EXAMPLE,
            "source_keys": np.zeros(n, np.uint32),
            "numbers": numbers,
            "positions": np.zeros(n, np.int64),
            "sources": sources,
            "source_index": np.zeros(n, np.int32) if source_index is None else source_index,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """The columns, without bytes made of them."""
        given = {name: getattr(self, name) for name in ("columns", "numbers", "sources", "source_index")}
        return partial(Rows, **given), ()

    # Fields of Records whose values are made late.

    @property
    def buffer(self) -> npt.NDArray[np.uint8]:
        """See `Records`."""
        return self.encoded().buffer

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """See `Records`."""
        return self.encoded().offsets

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """See `Records`."""
        return self.encoded().lengths

    def encoded(self) -> Records:
        """The same records as bytes, the very ones that the protobuf library writes."""
        if self._bytes is None:
            object.__setattr__(self, "_bytes", _examples(self))
        assert self._bytes is not None
        return self._bytes

    def take(self, rows: npt.ArrayLike | slice) -> Rows:
        """See `Records`."""
        chosen: Any = rows if isinstance(rows, slice) else np.asarray(rows)
        if not isinstance(chosen, slice) and chosen.dtype != np.bool_:
            chosen = chosen.astype(np.int64, copy=False)
        return Rows(
            columns=[column.take(chosen) for column in self.columns],
            numbers=self.numbers[chosen],
            sources=self.sources,
            source_index=self.source_index[chosen],
        )

    def renumbered(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """See `Records`."""
        return Rows(columns=self.columns, numbers=numbers, sources=self.sources, source_index=self.source_index)

    @classmethod
    def _joined(cls, parts: Sequence[Rows]) -> Rows:
        """See `Records.concatenate`; a column keeps its type and number where these differ from part to part."""
        sources, index = joined_sources(parts)
        found: dict[tuple[int, str, ColumnType], dict[int, RowColumn]] = {}
        for place, part in enumerate(parts):
            for column in part.columns:
                found.setdefault((column.number, column.name, column.type), {})[place] = column
        sizes = [len(part) for part in parts]
        return Rows(
            columns=[_joined(found[key], sizes) for key in sorted(found)],
            numbers=np.concatenate([part.numbers for part in parts]),
            sources=sources,
            source_index=index,
        )

    def batches(self, starts: npt.NDArray[np.int64], size: int, kind: Kind = Kind.EXAMPLE_BATCH) -> Records:
        """ExampleBatches of `size` rows each, from the rows at `starts` on; every column is a list, its id its number.

        A column that was of several types is of the widest. `kind` is what to call them.
        """
        lists = _Lists(len(self))
        for number in sorted({column.number for column in self.columns}):
            lists.add(_widened([each for each in self.columns if each.number == number]), number)
        buffer, scratch, features = lists.room()
        tables, used = lists.tables(), 0
        offsets, lengths = np.empty(starts.size, np.int64), np.empty(starts.size, np.int64)
        for place, start in enumerate(starts.tolist()):
            spaces = address_of(scratch), address_of(features), address_of(buffer) + used
            offsets[place] = used
            lengths[place] = compose_batch(start, start + size, *tables, *spaces)
            used += int(lengths[place])
        first = self.take(starts)
        return first.replace(buffer=buffer, offsets=offsets, lengths=lengths, kind=kind)


def _taken(lists: Ragged[Any], rows: Any) -> Ragged[Any]:
    """Some rows of lists; a slice shares the memory of the values."""
    if len(lists.values) == len(lists) and lists.uniform(1):
        values = lists.values[rows]
        return Ragged(values, singles(len(values)))
    splits = lists.row_splits
    if isinstance(rows, slice):
        start, stop, step = rows.indices(len(lists))
        if step == 1:
            cut = splits[start : max(start, stop) + 1]
            return Ragged(lists.values[cut[0] : cut[-1]], cut - cut[0])
        rows = np.arange(start, stop, step)
    return lists.take(rows)


def _joined(parts: dict[int, RowColumn], sizes: list[int]) -> RowColumn:
    """A column of several parts, by their number, which have so many rows; rows of other parts do not have it."""
    some = next(iter(parts.values()))
    kept: list[npt.NDArray[Any]] = []
    text = NO_TEXT
    if some.type is ColumnType.BYTES:
        text, spans = packed_text(list(parts.values()))
        kept = spans
    else:
        kept = [part.lists.values for part in parts.values()]
    splits, last = [np.zeros(1, np.int64)], 0
    for place, size in enumerate(sizes):
        part = parts.get(place)
        splits.append(np.full(size, last) if part is None else part.lists.row_splits[1:] + last)
        last += 0 if part is None else int(part.lists.row_splits[-1])
    there = None
    if len(parts) < len(sizes) or any(part.there is not None for part in parts.values()):
        flags: list[Any] = [False if part is None else part.there for part in map(parts.get, range(len(sizes)))]
        there = np.concatenate(
            [
                np.full(size, each is None) if each is None or each is False else each
                for size, each in zip(sizes, flags, strict=True)
            ]
        )
    lists = Ragged(np.concatenate(kept), np.concatenate(splits))
    return replace(some, lists=lists, text=text, there=there)


def packed_text(columns: Sequence[RowColumn]) -> tuple[npt.NDArray[np.uint8], list[npt.NDArray[np.int64]]]:
    """The texts of columns in one buffer that holds nothing else, and the spans of each column's values there."""
    spans = [np.ascontiguousarray(each.lists.values.T) for each in columns]
    total = sum(int(lengths.sum()) for _, lengths in spans)
    text = np.zeros(total + PADDING, np.uint8)
    used, moved = 0, []
    for column, (starts, lengths) in zip(columns, spans, strict=True):
        ends = used + np.cumsum(lengths)
        gather_payloads(
            address_of(column.text), address_of(starts), address_of(lengths), lengths.size, address_of(text) + used
        )
        moved.append(np.stack([ends - lengths, lengths], axis=1))
        used = int(ends[-1]) if ends.size else used
    return text, moved


def merged(parts: Sequence[Ragged[Any]], dtype: npt.DTypeLike) -> Ragged[Any]:
    """Lists of which each row's values are in one of several; all become values of one dtype."""
    filled = [part for part in parts if len(part.values)]
    if len(filled) <= 1:
        only = (filled or parts)[0]
        return Ragged(only.values.astype(dtype, copy=False), only.row_splits)
    lengths = np.sum([part.lengths for part in filled], axis=0)
    values = np.empty((int(lengths.sum()), *filled[0].values.shape[1:]), dtype)
    for part in filled:
        values[np.repeat(part.lengths > 0, lengths)] = part.values
    return Ragged.of_lengths(values, lengths)


def _widened(columns: list[RowColumn]) -> RowColumn:
    """Of a column's types the widest: integers and something else are the something else; ids keep their bits."""
    types = {column.type for column in columns}
    wider = types - {ColumnType.INT} if len(types) > 1 else types
    kind = ColumnType.FLOAT if ColumnType.FLOAT in wider else next(iter(wider))
    if len(types) == 1:
        return columns[0]
    return replace(columns[0], type=kind, lists=merged([each.lists for each in columns], kind.dtype))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _examples(rows: Rows) -> Records:
    lists = _Lists(len(rows))
    changes = lists.changes
    for column in rows.columns:
        field = line_field_of(column.name)
        if field is not None:
            values = column.strings() if column.type is ColumnType.BYTES else column.lists.values
            changes.add_line(field, _line_values(field, values, column.there))
        elif column.name == LABEL:
            labels = Ragged(np.asarray(column.lists.values, np.float64), column.lists.row_splits)
            changes.add_top(_LABEL_FIELD, Wire.FIXED32, np.dtype(np.float32), labels, packed=True, what=LABEL)
        else:
            lists.add(column)
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
    return rows.replace(buffer=buffer, offsets=offsets, lengths=lengths)


def _line_values(field: LineField, values: npt.NDArray[Any], there: npt.NDArray[np.bool_] | None) -> Any:
    """What a column gives a field of LineId."""
    values = values != 0 if field.is_bool else values
    if there is None:
        return values
    spread = np.full(there.size, b"" if values.dtype == np.object_ else 0, values.dtype)
    spread[there] = values
    return Scalars(spread, there)


class _Lists:
    """Columns as the tables of `compose_examples` and `compose_batch`.

    Attributes:
        changes: Keeps what the tables point to, and takes other fields of the rows.
    """

    def __init__(self, rows: int) -> None:
        self.changes = Changes(rows)
        self._lists: list[list[int]] = []
        self._frames: list[list[int]] = []

    def add(self, column: RowColumn, list_id: int | None = None) -> None:
        """Add a column, as a NamedFeature of each row, or as a NamedFeatureList with a given id."""
        changes = self.changes
        lists = column.lists
        if column.type is ColumnType.BYTES:
            lists = Ragged(column.strings(), lists.row_splits)
        entry = changes.field(1, column.type.wire, column.type.dtype, lists, True, column.name)
        if column.there is not None and list_id is None:
            entry[4] = address_of(changes.keep(np.ascontiguousarray(column.there)))
        self._lists.append(entry)
        message = example_pb2.NamedFeature if list_id is None else example_pb2.NamedFeatureList
        number = _FIRST_ID + column.number if list_id is None else list_id
        head, tail = message(name=column.name).SerializeToString(), message(id=number).SerializeToString()
        text = [changes.keep(np.frombuffer(each + bytes(PADDING), np.uint8)) for each in (head, tail)]
        self._frames.append([address_of(text[0]), len(head), address_of(text[1]), len(tail), column.type.member])
        changes.room += len(head) + len(tail) + 32

    def tables(self) -> tuple[int, int, int]:
        """Addresses of lists and frames, and their number."""
        tables = [self.changes.keep(np.array(each, np.int64)) for each in (self._lists, self._frames)]
        return address_of(tables[0]), address_of(tables[1]), len(self._lists)

    def room(self) -> list[npt.NDArray[np.uint8]]:
        """Room for all rows, for one list, and for the features of one column."""
        most, total = int(self.changes.room.max(initial=0)), int(self.changes.room.sum())
        return [np.empty(size + 2 * PADDING, np.uint8) for size in (total, most, total)]

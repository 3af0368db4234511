"""ArrowRows: records that are rows of an Arrow table, and stay Arrow's until somebody asks for anything else."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trilith.data.formats.column_types import column_of, hashes_of, numbers_of, texts_of, unreadable
from trilith.data.formats.columnar import line_id_type
from trilith.data.records import Kind
from trilith.data.scan.rows import LABEL, NO_TEXT, ColumnType, RowColumn, Rows
from trilith.errors import DataError

__all__ = ["ArrowRows", "plain_table"]

_NAME = "(arrow)"


class ArrowRows(Rows):
    """Rows of an Arrow table, each of which is an Example, as `Rows` are.

    A part of the table shares its memory, where it is a slice. Parsers and sample ops see its columns as those of a
    Parquet file; whoever takes Arrow's columns by name gets them as they are.

    Args:
        table: With plain types, see `plain_table`.
        numbers: int64[n], number of each row in its pass over the data, from 0.
        hashed: Whether parsers see strings as ids, by `trilith.data.hash_strings`; otherwise as bytes.
    """

    __slots__ = ("_made", "hashed", "table")

    table: pa.Table
    hashed: bool
    _made: tuple[RowColumn, ...] | None

    def __init__(self, table: pa.Table, numbers: npt.NDArray[np.int64], *, hashed: bool = True) -> None:
        n = table.num_rows
        given = {
            "table": table,
            "hashed": hashed,
            "_made": None,
            "_bytes": None,
            "kind": Kind.EXAMPLE,
            "source_keys": np.zeros(n, np.uint32),
            "numbers": numbers,
            "positions": np.zeros(n, np.int64),
            "sources": (_NAME,),
            "source_index": np.zeros(n, np.int32),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.table.column_names)

    def column(self, name: str) -> pa.Array:
        """One column, in one piece."""
        return _whole(self.table.column(name))

    @property
    def columns(self) -> tuple[RowColumn, ...]:  # type: ignore[override]
        """The columns that an Example can hold.

        Raises:
            DataError: A value does not fit, such as a number beyond float32.
        """
        if self._made is None:
            made = [self._column(number, name) for number, name in enumerate(self.table.column_names)]
            object.__setattr__(self, "_made", tuple(each for each in made if each is not None))
        assert self._made is not None
        return self._made

    def _column(self, number: int, name: str) -> RowColumn | None:
        array = self.column(name)
        if unreadable(name, array.type) or (found := column_of(name, array.type)) is None:
            return None
        line = line_id_type(name)
        kind = ColumnType.FLOAT if name == LABEL else line or ColumnType(found.type)
        text, odd = NO_TEXT, dict[int, str]()
        if kind is ColumnType.BYTES and self.hashed and line is None:
            kind, lists = ColumnType.FID_V2, hashes_of(array)
        elif kind is ColumnType.BYTES:
            text, lists = texts_of(array)
        else:
            lists, odd = numbers_of(array, kind)
            if odd and kind is ColumnType.INT and line is None:
                kind = ColumnType.FID_V2  # ids of 64 bits
                lists, odd = numbers_of(array, kind)
        if odd:
            row = min(odd)
            raise DataError(f"{self.where(row)}: column {name!r}: {odd[row]}")
        return RowColumn(name=name, type=kind, number=number, lists=lists, text=text)

    def take(self, rows: npt.ArrayLike | slice) -> ArrowRows:
        """See `Records`; a slice copies nothing."""
        chosen: Any = rows
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                table = self.table.slice(start, max(0, stop - start))
                return ArrowRows(table, self.numbers[start : max(start, stop)], hashed=self.hashed)
            chosen = np.arange(start, stop, step)
        chosen = np.asarray(chosen)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64, copy=False)
        return ArrowRows(self.table.take(pa.array(chosen)), self.numbers[chosen], hashed=self.hashed)

    def renumbered(self, numbers: npt.NDArray[np.int64]) -> ArrowRows:
        """See `Records`."""
        return ArrowRows(self.table, numbers, hashed=self.hashed)

    @classmethod
    def _joined(cls, parts: Any) -> Rows:
        """See `Records.concatenate`; tables of different columns become `Rows`."""
        if any(not each.table.schema.equals(parts[0].table.schema) for each in parts):
            return Rows._joined(parts)
        table = pa.concat_tables([each.table for each in parts]).combine_chunks()
        return ArrowRows(table, np.concatenate([each.numbers for each in parts]), hashed=parts[0].hashed)

    def __reduce__(self) -> tuple[Any, ...]:
        """These rows alone, whatever the table is a part of."""
        return partial(ArrowRows.unpacked, self.packed()), ()

    def packed(self) -> dict[str, Any]:
        """As plain values that `unpacked` takes: the table as a stream of Arrow's."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as out:
            out.write_table(self.table)
        stream = sink.getvalue().to_pybytes()
        return {"stream": stream, "numbers": self.numbers.tobytes(), "hashed": self.hashed}

    @staticmethod
    def unpacked(packed: Any) -> ArrowRows:
        """What `packed` was called of."""
        table = pa.ipc.open_stream(packed["stream"]).read_all()
        return ArrowRows(table, np.frombuffer(packed["numbers"], np.int64), hashed=packed["hashed"])


def plain_table(table: pa.Table) -> pa.Table:
    """A table without types that Arrow's own functions, or older versions of it, cannot cut and join.

    Views become offsets, runs are written out, and extension types are what they are stored as; all else is the same
    memory.
    """
    columns = {}
    for place, field in enumerate(table.schema):
        kind = _plain(field.type)
        if kind != field.type:
            columns[place] = table.column(place), pa.field(field.name, kind)
    for place, (column, field) in columns.items():
        chunks = [_cast(chunk, field.type) for chunk in column.chunks]
        table = table.set_column(place, field, pa.chunked_array(chunks, field.type))
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list_view(kind):
        return pa.list_(_plain(kind.value_type))
    if types.is_large_list_view(kind):
        return pa.large_list(_plain(kind.value_type))
    if types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    if types.is_run_end_encoded(kind) or types.is_dictionary(kind):
        value = _plain(kind.value_type)
        if types.is_dictionary(kind) and value == kind.value_type:
            return kind
        return value
    return kind


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    return array if array.type == kind else array.cast(kind)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

"""Parquet files as Examples or ExampleBatches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trilith.data.formats.column_types import check_column, column_of, numbers_of, texts_of, unreadable
from trilith.data.formats.columnar import OPTIONS, ColumnarReader
from trilith.data.formats.compression import Compression, effective_compression
from trilith.data.formats.reading import ReadOptions, UnfitColumnsError
from trilith.data.formats.streams import open_file
from trilith.data.scan.rows import LABEL, NO_TEXT, Column, ColumnType, RowColumn, Rows
from trilith.errors import DataError, InvalidRequestError

__all__ = ["ParquetReader", "open_reader"]

_MOST_ROWS = 1 << 16
"""Of a chunk; fewer where rows are long."""
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
"""What pyarrow raises for files that are none, or damaged."""


def open_reader(path: str, file_format: str, options: ReadOptions) -> ParquetReader:
    """Open a Parquet file."""
    if effective_compression("", compression=options.compression) is not Compression.NONE:
        raise InvalidRequestError(
            f"{path}: compression={options.compression!r}: a Parquet file says itself how it is compressed"
        )
    return ParquetReader(path, **options.some(*OPTIONS))


class ParquetReader(ColumnarReader):
    """Rows of a Parquet file, row group after row group; a damaged group costs its own rows only.

    Timestamps and dates are seconds since 1970 in UTC.
    """

    def _open(self) -> dict[str, str]:
        self._handle = open_file(self._name)
        try:
            self._file = pq.ParquetFile(self._handle, page_checksum_verification=True)
            schema = self._file.schema_arrow
            self._schema = {field.name: field.type for field in schema}
            self._total = self._file.metadata.num_rows
        except _DAMAGE as error:
            self._handle.close()
            raise DataError(f"{self._name}: record 0, byte 0: no Parquet file: {error}") from None
        self._taken = 0
        available = {name: unreadable(name, stored) for name, stored in self._schema.items()}
        for name in {name for name in schema.names if schema.names.count(name) > 1}:
            available[name] = f"{schema.names.count(name)} columns are called {name!r}: which is to be read?"
        return available

    def _all(self) -> list[Column]:
        readable = [(name, stored) for name, stored in self._schema.items() if not (self.available or {})[name]]
        return [column for name, stored in readable if (column := column_of(name, stored)) is not None]

    def _check(self, available: Mapping[str, str]) -> None:
        super()._check(available)
        for column in self.columns:
            try:
                check_column(column, self._schema[column.name])
            except InvalidRequestError as error:
                raise UnfitColumnsError(f"{self._name}: {error}") from None

    @property
    def progress(self) -> tuple[int, int | None]:
        """Rows taken so far, and how many there are."""
        return self._taken, self._total

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()
        self._handle.close()

    def _read(self, first: int) -> Iterator[Rows]:
        names = [column.name for column in self.columns]
        begin = 0
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            at, end = begin, begin + rows
            begin = end
            if end <= first:
                self._taken = end
                continue
            size = self._file.metadata.row_group(group).total_byte_size // max(rows, 1)
            chunk = min(max(self._block // max(size, 1), 1), _MOST_ROWS)
            batches = self._file.iter_batches(chunk, row_groups=[group], columns=names)
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    row, at = at, at + batch.num_rows
                    self._taken = at
                    if at <= first:
                        continue
                    cut: Any = batch.slice(max(0, first - row)).select(names)
                    made = self._made_of(max(row, first), cut)
                except _DAMAGE as error:
                    self._lost(max(at, first), end - max(at, first), f"row group {group} is damaged: {error}")
                    break
                yield from self._found(*made)

    def _made_of(self, first: int, batch: pa.RecordBatch) -> tuple[Any, list[RowColumn], dict[int, str]]:
        """Numbers and columns of the rows of a batch, and what is wrong with which of them."""
        columns: list[RowColumn] = []
        bad: dict[int, str] = {}
        for index, (name, kind) in enumerate((each.name, ColumnType(each.type)) for each in self.columns):
            array = batch.column(index)
            text, odd = NO_TEXT, dict[int, str]()
            if kind is ColumnType.BYTES:
                text, lists = texts_of(array)
            else:
                lists, odd = numbers_of(array, kind)
            if odd and not self._declared and name != LABEL and self._fields[index] is None:
                kind = ColumnType.FID_V2  # nobody asked for int64; ids of 64 bits are no damage
                lists, odd = numbers_of(array, kind)
            columns.append(RowColumn(name=name, type=kind, number=index, lists=lists, text=text))
            for row, reason in odd.items():
                bad.setdefault(row, f"column {name!r}: {reason}")
        return first + np.arange(batch.num_rows), columns, bad

"""Parquet files as Examples or ExampleBatches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trilith.data.formats.column_types import Column, ColumnType, check_column, column_of, ragged_column, unreadable
from trilith.data.formats.columnar import LABEL, ColumnarReader, Rows
from trilith.data.formats.readers import UnfitColumnsError
from trilith.data.formats.streams import open_file
from trilith.data.ragged import Ragged
from trilith.errors import DataError, InvalidRequestError

__all__ = ["ParquetReader"]

_ROWS = 1024
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
"""What pyarrow raises for files that are none, or damaged."""


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
            batches = self._file.iter_batches(_ROWS, row_groups=[group], columns=names)
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
                yield from self._sound(*made)

    def _made_of(self, first: int, batch: pa.RecordBatch) -> tuple[Rows, dict[int, str]]:
        """Rows of a batch, and what is wrong with which of them."""
        columns: list[tuple[int, Column]] = []
        lists: list[Ragged[Any]] = []
        bad: dict[int, str] = {}
        for index, column in enumerate(self.columns):
            array = batch.column(index)
            given, odd = ragged_column(array, column.type)
            if odd and not self._declared and column.name != LABEL and self._fields[index] is None:
                # Nobody asked for int64; ids of 64 bits are no damage.
                column = Column(column.name, ColumnType.FID_V2)
                given, odd = ragged_column(array, column.type)
            columns.append((index, column))
            lists.append(given)
            bad |= {row: f"column {column.name!r}: {reason}" for row, reason in odd.items() if row not in bad}
        return Rows(first + np.arange(batch.num_rows), columns, lists), bad

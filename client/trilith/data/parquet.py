"""Parquet files as Examples or ExampleBatches, and samples as Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trilith.data.columnar import Column, ColumnarReader, ColumnType, check_column, column_of
from trilith.data.readers import BLOCK_BYTES, OnError, Position
from trilith.data.records import Kind
from trilith.data.streams import open_file
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Column", "ColumnType", "ParquetReader"]

_ROWS = 1024


class ParquetReader(ColumnarReader):
    """Rows of a Parquet file, row group after row group; a damaged group costs its own rows only.

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
        with ExitStack() as undo:
            self._handle = undo.enter_context(open_file(path))
            try:
                self._file = pq.ParquetFile(self._handle, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: record 0, byte 0: no Parquet file: {error}") from None
            schema = self._file.schema_arrow
            if columns is None:
                columns = [column_of(field.name, field.type) for field in schema]
            for column in columns:
                if column.name not in schema.names:
                    raise InvalidRequestError(f"{path}: no column {column.name!r}; there are {schema.names}")
                check_column(column, schema.field(column.name).type)
            self._total = self._file.metadata.num_rows
            self._taken = 0
            super().__init__(
                path,
                kind=kind,
                columns=columns,
                batch_size=batch_size,
                drop_remainder=drop_remainder,
                start=start or Position(),
                on_error=on_error,
            )
            undo.pop_all()

    @property
    def progress(self) -> tuple[int, int | None]:
        """Rows taken so far, and how many there are."""
        return self._taken, self._total

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()
        self._handle.close()

    def _read(self, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        names = [column.name for column in self.columns]
        begin = 0
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            at, end = begin, begin + rows
            begin = end
            if end <= first:
                self._taken = end
                continue
            try:
                for batch in self._file.iter_batches(_ROWS, row_groups=[group], columns=names):
                    row, at = at, at + batch.num_rows
                    self._taken = at
                    if at > first:
                        cut: Any = batch.slice(max(0, first - row)).select(names)
                        yield max(row, first), cut
            except (pa.ArrowException, OSError) as error:
                self._lost(max(at, first), end - max(at, first), f"row group {group} is damaged: {error}")

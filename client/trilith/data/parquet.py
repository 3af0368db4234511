"""Parquet files as Examples or ExampleBatches, and samples as Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trilith.data.columnar import ColumnarReader, check_column
from trilith.data.streams import open_file
from trilith.errors import DataError

__all__ = ["ParquetReader"]

_ROWS = 1024


class ParquetReader(ColumnarReader):
    """Rows of a Parquet file, row group after row group; a damaged group costs its own rows only."""

    def _open(self) -> pa.Schema:
        self._handle = open_file(self._name)
        try:
            self._file = pq.ParquetFile(self._handle, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            self._handle.close()
            raise DataError(f"{self._name}: record 0, byte 0: no Parquet file: {error}") from None
        self._total = self._file.metadata.num_rows
        self._taken = 0
        return self._file.schema_arrow

    def _check(self, schema: pa.Schema) -> None:
        super()._check(schema)
        for column in self.columns:
            check_column(column, schema.field(column.name).type)

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

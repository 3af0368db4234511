"""CSV files with a header line as Examples or ExampleBatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from trilith.data.columnar import Column, ColumnarReader, ColumnType
from trilith.data.streams import open_file
from trilith.errors import DataError

__all__ = ["CsvReader"]

_STORED = {
    ColumnType.INT: pa.int64(),
    ColumnType.FID_V1: pa.uint64(),
    ColumnType.FID_V2: pa.uint64(),
    ColumnType.FLOAT: pa.float32(),
    ColumnType.BYTES: pa.binary(),
}


class CsvReader(ColumnarReader):
    """Rows of a CSV file; an empty cell is no value.

    Cells are read as text and turned into numbers here, so that a bad cell is known by its row and, when skipped, costs
    one row.
    """

    def _open(self) -> pa.Schema:
        with open_file(self._name) as handle:
            schema = self._parser(handle, None).schema
        self._handle: Any = open_file(self._name)
        self._size = self._handle.seek(0, 2)
        self._handle.seek(0)
        return schema

    def _all(self, schema: pa.Schema) -> list[Column]:
        return super()._all([field for field in schema if field.type != pa.null()])

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes taken so far, and how many there are."""
        return (self._size if self._handle.closed else self._handle.tell()), self._size

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._handle.close()

    def _parser(self, handle: Any, names: Sequence[str] | None) -> pa_csv.CSVStreamingReader:
        self._bad_lines: list[Any] = []
        convert = pa_csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False, null_values=[""])
        if names is not None:
            convert.column_types = dict.fromkeys(names, pa.binary())
            convert.include_columns = list(names)
        try:
            return pa_csv.open_csv(
                pa.PythonFile(handle, mode="r"),
                read_options=pa_csv.ReadOptions(block_size=self._block, use_threads=False),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=self._invalid),
                convert_options=convert,
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._name}: record 0, byte 0: no CSV file: {error}") from None

    def _invalid(self, row: Any) -> str:
        self._bad_lines.append(row)
        return "skip"

    def _read(self, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        names = [column.name for column in self.columns]
        reader = self._parser(self._handle, names)
        row = 0
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                self._report_lines(row)
                return
            except (pa.ArrowException, OSError) as error:
                self._lost(row, 1, error)
                return
            count = batch.num_rows
            if row + count > first:
                skipped = max(0, first - row)
                yield from self._converted(row + skipped, batch.slice(skipped))
                self._report_lines(row + count)
            row += count

    def _report_lines(self, row: int) -> None:
        """Report lines in front of a row whose number of cells is wrong; they are no rows."""
        lines, self._bad_lines = self._bad_lines, []
        for line in lines:
            text = str(line.text)[:80]
            cells = f"{line.actual_columns} cells where {line.expected_columns} are due"
            self._lost(row, 1, f"line {line.number} of the file has {cells}: {text!r}")

    def _converted(self, row: int, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
        try:
            yield row, self._typed(batch)
        except pa.ArrowException:
            # One row at a time: at most one block per damage, and every other row survives.
            for index in range(batch.num_rows):
                try:
                    typed = self._typed(batch.slice(index, 1))
                except pa.ArrowException as error:
                    self._lost(row + index, 1, error)
                    continue
                yield row + index, typed

    def _typed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = [self._cells(batch.column(index), column) for index, column in enumerate(self.columns)]
        return pa.RecordBatch.from_arrays(arrays, [column.name for column in self.columns])

    def _cells(self, cells: pa.Array, column: Column) -> pa.Array:
        stored = _STORED[ColumnType(column.type)]
        if stored == pa.binary():
            return cells
        try:
            return cells.cast(pa.string()).cast(stored)
        except pa.ArrowException as error:
            raise pa.ArrowInvalid(f"column {column.name!r}: {error}") from None

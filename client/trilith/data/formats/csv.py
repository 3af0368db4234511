"""CSV files as Examples or ExampleBatches."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from trilith.data.formats.columnar import OPTIONS, ColumnarReader, line_id_type
from trilith.data.formats.compression import Compression, bare_name, compression_of, decompressing
from trilith.data.formats.csv_cells import Cells, guess_type
from trilith.data.formats.reading import ReadOptions
from trilith.data.formats.streams import ByteStream, open_stream
from trilith.data.formats.text import Utf8Stream, is_odd, restored
from trilith.data.records import Kind
from trilith.data.scan.rows import LABEL, NO_TEXT, Column, ColumnType, RowColumn, Rows
from trilith.errors import DataError, InvalidRequestError

__all__ = ["CsvForm", "CsvReader", "open_reader"]

_FOREIGN = (b"<html", b"<!doctype", b"<?xml", b"{")
_NO_VALUE = ["", "NULL", "null", "\\N"]  # as databases write what is not there
_OTHER_DELIMITERS = "\t;|"


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvForm:
    """How a CSV file is written.

    Attributes:
        compression: Of the file.
        delimiter: What stands between cells: one character.
        header: Names of the columns of a file without a header line; None where its first line has them.
        list_separator: What stands between the values of a cell; None where a cell is one value.
        encoding: Of the text, by a name that Python knows; None is UTF-8, or UTF-16 or UTF-32 behind their mark.
    """

    compression: Compression = Compression.NONE
    delimiter: str = ","
    header: tuple[str, ...] | None = None
    list_separator: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or ord(self.delimiter) > 127 or self.delimiter in '"\r\n':
            raise InvalidRequestError(f"delimiter={self.delimiter!r}: give one ASCII character, such as ',' or '\\t'")
        if self.list_separator is not None and self.list_separator in ("", self.delimiter):
            raise InvalidRequestError(f"list_separator={self.list_separator!r}: give something else than the delimiter")
        if self.header is not None and (not self.header or len(set(self.header)) < len(self.header)):
            raise InvalidRequestError(f"header={list(self.header)}: give every column a name of its own")


def open_reader(path: str, file_format: str, options: ReadOptions) -> CsvReader:
    """Open a CSV file."""
    compression = compression_of(path, file_format, **options.some("compression", "use_snappy"))
    form = CsvForm(
        compression=compression,
        delimiter=options.delimiter or ("\t" if bare_name(path).endswith((".tsv", ".tab")) else ","),
        header=None if options.header is None else tuple(options.header),
        list_separator=options.list_separator,
        encoding=options.encoding,
    )
    return CsvReader(path, form=form, **options.some(*OPTIONS))


class CsvReader(ColumnarReader):
    """Rows of a CSV file; an empty cell is no value, and so are `NULL` and its like without quotes.

    Cells are read as text and turned into numbers here, so that a bad cell is known by its row and, when skipped, costs
    one row. A column that nothing was said about is what its first values are: integers, floats or bytes; integers may
    become floats later on, and what is no number then is damage.

    Args: as `ColumnarReader` takes them, and
        form: How the file is written.
    """

    def __init__(self, path: str, *, form: CsvForm | None = None, **options: Any) -> None:
        self._form = form or CsvForm()
        super().__init__(path, **options)

    def _open(self) -> dict[str, str]:
        form = self._form
        self._stream: ByteStream = decompressing(open_stream(self._name), form.compression)
        try:
            self._text = Utf8Stream(self._stream, form.encoding)
            self._lines, names = (0, list(form.header)) if form.header is not None else self._header()
        except (DataError, InvalidRequestError) as error:
            self._stream.close()
            raise type(error)(f"{self._name}: record 0, byte 0: {error}") from None
        except OSError as error:
            self._stream.close()
            raise DataError(f"{self._name}: record 0, byte 0: reading failed: {error}") from error
        self._names = names
        self._guessed: list[ColumnType | None] = []
        return dict.fromkeys(names, "")

    def _header(self) -> tuple[int, list[str]]:
        """Lines up to the end of the header, and the names in it."""
        lines = 0
        while (line := self._text.readline()) and not line.strip():
            lines += 1
        if self._text.damage is not None and not line.endswith((b"\n", b"\r")):
            raise self._text.damage
        if not line:
            raise DataError("no CSV file: it is empty, without even a header line; header=[...] names columns of one")
        while line.count(b'"') % 2 and (more := self._text.readline()):  # a name may have a line break
            line += more
        if line.lstrip().lower().startswith(_FOREIGN):
            raise DataError(f"no CSV file: it begins with {line.lstrip()[:20]!r}")
        if b"\0" in line:
            raise DataError("no CSV file, or one in another encoding: its header has zero bytes; encoding='utf-16-le'?")
        if self._text.odd and is_odd(line):
            raise DataError(
                f"the header is no {self._text.encoding.upper()}: give its encoding, such as encoding='latin-1' or "
                f"encoding='gbk'"
            )
        (names,) = csv.reader(io.StringIO(line.decode()), delimiter=self._form.delimiter)
        return lines + line.count(b"\n"), names

    def _all(self) -> list[Column]:
        types = [line_id_type(name) if self.kind is Kind.EXAMPLE else None for name in self._names]
        self._guessed = [
            ColumnType.FLOAT if name == LABEL else each for name, each in zip(self._names, types, strict=True)
        ]
        return [Column(name, each or ColumnType.BYTES) for name, each in zip(self._names, self._guessed, strict=True)]

    def _check(self, available: Mapping[str, str]) -> None:
        doubled = sorted({name for name in self._names if self._names.count(name) > 1})
        if doubled:
            raise InvalidRequestError(f"{self._name}: two columns are called {doubled[0]!r}; header=[...] renames them")
        try:
            super()._check(available)
        except InvalidRequestError as error:
            others = [each for each in _OTHER_DELIMITERS if len(self._names) == 1 and each in self._names[0]]
            if not others:
                raise
            raise type(error)(f"{error}; is it delimiter={others[0]!r}?") from None

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes taken so far, as they are stored, and how many there are."""
        return self._stream.raw_bytes, self._stream.raw_size

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._stream.close()

    def _parser(self, wanted: Sequence[str]) -> pa_csv.CSVStreamingReader | None:
        """A reader of the rows; None if there are none."""
        self._bad_lines: list[Any] = []
        if not self._text.more():
            return None
        return pa_csv.open_csv(
            pa.PythonFile(self._text, mode="r"),
            read_options=pa_csv.ReadOptions(block_size=self._block, use_threads=False, column_names=self._names),
            parse_options=pa_csv.ParseOptions(
                delimiter=self._form.delimiter, newlines_in_values=True, invalid_row_handler=self._invalid
            ),
            convert_options=pa_csv.ConvertOptions(
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=_NO_VALUE,
                check_utf8=False,
                column_types=dict.fromkeys(self._names, pa.binary()),
                include_columns=list(wanted),
            ),
        )

    def _invalid(self, row: Any) -> str:
        self._bad_lines.append(row)
        return "skip"

    def _read(self, first: int) -> Iterator[Rows]:
        row = 0
        try:
            reader = self._parser([column.name for column in self.columns])
            while reader is not None:
                batch = reader.read_next_batch()
                if row + batch.num_rows > first or None in self._guessed or ColumnType.INT in self._guessed:
                    columns, bad = self._typed(batch)  # what columns are is found from the first row on
                    if row + batch.num_rows > first:
                        skipped = max(0, first - row)
                        if skipped:
                            columns = [each.take(slice(skipped, None)) for each in columns]
                            bad = {index - skipped: reason for index, reason in bad.items() if index >= skipped}
                        yield from self._found(np.arange(row + skipped, row + batch.num_rows), columns, bad)
                        self._report_lines(row + batch.num_rows)
                row += batch.num_rows
        except StopIteration:
            pass
        except (pa.ArrowException, OSError, ValueError) as error:
            self._report_lines(row)
            if not (isinstance(error, pa.ArrowInvalid) and str(error).startswith("Empty CSV file")):
                self._lost(row, 1, f"{error}; the rest of the file is lost")
        self._report_lines(row)
        if (damage := self._text.damage) is not None:
            self._text.damage = None
            self._lost(row, 1, f"{damage}; the rest of the file is lost")

    def _report_lines(self, row: int) -> None:
        """Report lines in front of a row whose number of cells is wrong; they are no rows."""
        lines, self._bad_lines = self._bad_lines, []
        for line in lines:
            text = restored(str(line.text)[:80].encode()).decode(errors="backslashreplace")
            cells = f"{line.actual_columns} cells where {line.expected_columns} are due"
            number = "a line" if line.number is None else f"line {line.number + self._lines}"
            self._lost(row, 1, f"{number} of the file has {cells}: {text!r}")

    def _typed(self, batch: pa.RecordBatch) -> tuple[list[RowColumn], dict[int, str]]:
        """Columns of a batch of cells, and what is wrong with which of its rows."""
        columns: list[RowColumn] = []
        bad: dict[int, str] = {}
        for index, (name, kind) in enumerate((each.name, ColumnType(each.type)) for each in self.columns):
            cells = Cells(batch.column(index), self._form.list_separator, odd=self._text.odd)
            if not self._declared:
                guess = guess_type(cells, self._guessed[index])
                self._guessed[index] = guess
                if guess is None:
                    continue
                kind = guess
            text, odd = NO_TEXT, dict[int, str]()
            if kind is ColumnType.BYTES:
                text, lists = cells.texts()
            else:
                lists, odd = cells.read(kind)
            if self._text.odd and self._form.encoding is not None:
                odd = {**odd, **cells.odd_texts(self._form.encoding)}
            if odd and not self._declared and kind is ColumnType.INT and self._fields[index] is None:
                wide, still = cells.read(ColumnType.FID_V2)
                if len(still) < len(odd):  # nobody asked for int64; ids of 64 bits are no damage
                    kind, lists, odd = ColumnType.FID_V2, wide, still
            columns.append(RowColumn(name=name, type=kind, number=index, lists=lists, text=text))
            hint = "" if self._declared else f"; Column({name!r}, 'bytes') reads the column as text"
            for place, reason in odd.items():
                bad.setdefault(place, f"column {name!r}: {reason}{hint}")
        return columns, bad

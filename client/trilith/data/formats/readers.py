"""Every format that records are stored in, and `open_records`, which opens a file of any of them.

A reader is an iterator of `Records`; its `position` after a chunk, or the position of any record of the chunk, is where
another reader goes on.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from typing import Self

from trilith.data.blocks import Blocks
from trilith.data.choices import Choice, OnError, check_on_error
from trilith.data.formats.compression import Compression, bare_name
from trilith.data.formats.framing import Framing
from trilith.data.formats.reading import BLOCK_BYTES, Losses, Position, ReadOptions, RecordReader
from trilith.data.formats.streams import NoSuchFileError, open_file, read_once
from trilith.data.formats.text import check_encoding
from trilith.data.records import Kind, Records
from trilith.data.scan.rows import Column
from trilith.errors import DataError, InvalidRequestError

__all__ = ["FileFormat", "marked_format", "named_format", "open_records"]


class FileFormat(Choice):
    """How records are stored, a line each: the word, the module of this folder whose `open_reader` opens such a file.

    Attributes:
        module: Where `open_reader(path, format, options)` is.
        endings: What names of such files end in, in front of the ending of a compression.
        mark: What such files begin with, if no other does.
        columnar: Whether records are rows of columns, which become Examples.
    """

    module: str
    endings: tuple[str, ...]
    mark: bytes
    columnar: bool

    # Records one after another, each behind the header that a `Framing` describes.
    RECORDS = "records", "framed"
    TFRECORD = "tfrecord", "framed", (".tfrecord", ".tfrecords")
    PARQUET = "parquet", "parquet", (".parquet", ".pq"), b"PAR1", True
    CSV = "csv", "csv", (".csv", ".tsv", ".tab"), b"", True

    def __new__(
        cls, word: str, module: str = "", endings: tuple[str, ...] = (), mark: bytes = b"", columnar: bool = False
    ) -> Self:
        """One line of the table."""
        made = str.__new__(cls, word)
        made._value_ = word
        made.module, made.endings, made.mark, made.columnar = module, endings, mark, columnar
        return made


def open_records(
    path: str | os.PathLike[str],
    *,
    kind: Kind | str | None = None,
    format: FileFormat | str | None = None,  # noqa: A002 - what a file's format is called
    framing: Framing | None = None,
    compression: Compression | str | int | None = None,
    use_snappy: bool | None = None,
    columns: Sequence[Column] | None = None,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
    list_separator: str | None = None,
    encoding: str | None = None,
    batch_size: int = 512,
    drop_remainder: bool = True,
    block_bytes: int = BLOCK_BYTES,
    blocks: Blocks | None = None,
    start: Position | None = None,
    on_error: OnError = "raise",
) -> RecordReader:
    """Open one file for reading as chunks of records, in order. Kafka topics have a reader of their own, `KafkaReader`.

    What can be read is given out before a damage is reported. After a damaged header the rest of a file of records is
    lost; a TFRecord whose payload's checksum is wrong costs only itself, and so does a row of a CSV file with a bad
    cell. A file that ends inside a record is damaged, too, and so is a compressed stream that ends too early.

    Args:
        path: A path or any URL that fsspec knows; the empty string is standard input ("records" and "tfrecord").
        kind: What the payloads are: "instance" by default. From Parquet and CSV the readers make "example", their
            default, or "examplebatch" ("plaintext": the same bytes as "examplebatch").
        format: How records are stored; left out, the name's ending says it (`.parquet`, `.csv`, `.tsv`, `.tfrecord`),
            or the mark of a Parquet file, and "records" are all others.
        framing: "records": what stands in front of payloads; nothing but the length, if left out.
        compression: All formats but Parquet: None leaves it to the name's ending (`.snappy`, `.gz`, `.zst`, `.zz`), and
            of TFRecord and CSV files also to their first bytes.
        use_snappy: "records" and "tfrecord": as `effective_compression` takes it.
        columns: Parquet and CSV: what to read and as what; all columns by their own types, if left out.
        delimiter: CSV: what stands between cells; left out, a tab for `.tsv` and `.tab`, else a comma.
        header: CSV: the names of all columns of a file whose first line does not have them.
        list_separator: CSV: what stands between the values of a cell, in all columns; left out, a cell is one value.
        encoding: CSV: of the text, such as "latin-1", "gbk" or "utf-16-le"; left out, UTF-8, or what a mark at the
            beginning says.
        batch_size: Parquet and CSV with "examplebatch": rows of each batch.
        drop_remainder: Parquet and CSV with "examplebatch": whether a last batch that is not full is dropped.
        block_bytes: Bytes of a chunk's buffer; a longer record gets a buffer of its own size.
        blocks: "records" and "tfrecord": where buffers come from; readers of one file after another may share them.
        start: Where to begin; the position of another reader of the same file.
        on_error: "raise" a DataError that names file, record and byte; or "skip" what is damaged, count it in `losses`
            and log it. A file of which nothing can be read, or that is gone, is one loss.

    Raises:
        InvalidRequestError: The file cannot be opened, or the arguments do not go together.
    """
    path = os.fspath(path)
    file_format = _format_of(path) if format is None else FileFormat(format)
    check_on_error(on_error)
    check_encoding(encoding)
    if header is not None and (isinstance(header, str) or not isinstance(header, Iterable)):
        raise InvalidRequestError(f"header={header!r}: give a list of names, such as header=['label', 'user']")
    form = {"delimiter": delimiter, "header": header, "list_separator": list_separator, "encoding": encoding}
    if file_format is not FileFormat.CSV and (given := [name for name, each in form.items() if each is not None]):
        raise InvalidRequestError(f"{path}: {given[0]} is for CSV files; this one is read as {file_format}")
    if not file_format.columnar and columns is not None:
        raise InvalidRequestError(f"{path}: columns are for Parquet and CSV files; this one is read as {file_format}")
    options = ReadOptions(
        kind=Kind(kind or (Kind.EXAMPLE if file_format.columnar else Kind.INSTANCE)),
        framing=framing,
        compression=compression,
        use_snappy=use_snappy,
        columns=columns,
        delimiter=delimiter,
        header=header,
        list_separator=list_separator,
        encoding=encoding,
        batch_size=batch_size,
        drop_remainder=drop_remainder,
        block_bytes=block_bytes,
        blocks=blocks,
        start=start or Position(),
        on_error=on_error,
    )
    # Loaded here, as pyarrow takes a while and most files need none.
    module = importlib.import_module(f"trilith.data.formats.{file_format.module}")
    try:
        reader: RecordReader = module.open_reader(path, file_format, options)
    except (DataError, NoSuchFileError) as error:
        if on_error == "raise":
            raise
        return _Unread(options.kind, str(error), columnar=file_format.columnar)
    return reader


def named_format(path: str) -> FileFormat | None:
    """How the records of a file are stored, if its name says so."""
    return next((each for each in FileFormat if each.endings and bare_name(path).endswith(each.endings)), None)


def marked_format(head: bytes) -> FileFormat | None:
    """How the records of a file that begins so are stored, if that says it."""
    return next((each for each in FileFormat if each.mark and head.startswith(each.mark)), None)


def _format_of(path: str) -> FileFormat:
    """How the records of a file are stored, from its name or the mark that it begins with."""
    named = named_format(path)
    if named is not None or "://" in path or read_once(path):
        return named or FileFormat.RECORDS
    try:
        with open_file(path) as file:
            return marked_format(file.read(8)) or FileFormat.RECORDS
    except (InvalidRequestError, OSError):  # whoever reads it will say so
        return FileFormat.RECORDS


class _Unread(RecordReader):
    """A file of which nothing can be read, which is skipped: one loss, no records."""

    def __init__(self, kind: Kind, reason: str, *, columnar: bool) -> None:
        self.kind = kind
        self.losses = Losses()
        self.losses.add(f"{reason}; the file is lost", 0)
        self.available = {} if columnar else None

    def __next__(self) -> Records:
        raise StopIteration

    @property
    def position(self) -> Position:
        """The beginning."""
        return Position()

    @property
    def progress(self) -> tuple[int, int | None]:
        """Nothing of nothing."""
        return 0, 0

    def close(self) -> None:
        """Nothing is open."""

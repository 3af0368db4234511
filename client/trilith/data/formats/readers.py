"""Readers: files of any format as chunks of records, from any position, damage reported or counted.

`open_records` is the way in. A reader is an iterator of `Records`; its `position` after a chunk, or the position of any
record of the chunk, is where another reader goes on.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from trilith.data.blocks import Blocks
from trilith.data.choices import Choice, OnError, check_on_error
from trilith.data.formats import framing_kernels as kernels
from trilith.data.formats.compression import Compression, compression_of, decompressing, effective_compression
from trilith.data.formats.framing import MAX_PAYLOAD, Framing, Scratch, explain, split_frames
from trilith.data.formats.streams import ByteStream, NoSuchFileError, open_file, open_stream, read_once, stream_name
from trilith.data.formats.text import check_encoding
from trilith.data.records import PADDING, Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of

if TYPE_CHECKING:
    from trilith.data.scan.rows import Column

__all__ = [
    "BLOCK_BYTES",
    "FileFormat",
    "Losses",
    "Position",
    "RecordReader",
    "StreamReader",
    "UnfitColumnsError",
    "named_format",
    "open_records",
    "position_of",
]

BLOCK_BYTES = 2 << 20
"""Bytes of a chunk's buffer, if no record is longer: as much as stays in the processor's cache."""

_LOG = logging.getLogger(__name__)
_KEPT_MESSAGES = 10
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".zz", ".zlib", ".snappy", ".bz2", ".xz")


class FileFormat(Choice):
    """How records are stored."""

    RECORDS = "records"
    """One after another, each behind the header that a `Framing` describes."""
    TFRECORD = "tfrecord"
    PARQUET = "parquet"
    CSV = "csv"


_ENDINGS = {
    ".parquet": FileFormat.PARQUET,
    ".pq": FileFormat.PARQUET,
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
    ".tab": FileFormat.CSV,
    ".tfrecord": FileFormat.TFRECORD,
    ".tfrecords": FileFormat.TFRECORD,
}


class UnfitColumnsError(InvalidRequestError):
    """A file does not have a column that is to be read, or not as what is wanted."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two records of a file, or of a topic's partitions.

    Attributes:
        records: Records in front of it, those skipped as damaged included.
        offset: Uncompressed bytes in front of it; 0 in formats that have no bytes to count (Parquet, CSV, Kafka).
        partitions: Kafka: the next offset of each (topic, partition).
    """

    records: int = 0
    offset: int = 0
    partitions: tuple[tuple[str, int, int], ...] = ()


@dataclass(slots=True)
class Losses:
    """What a reader with on_error="skip" passed over.

    Attributes:
        records: Damaged records; where the rest of a file is lost, that counts as one, as nobody can know the number.
        bytes: Uncompressed bytes not given out, as far as they could be read.
        messages: The first few reasons, each with file, record and byte.
    """

    records: int = 0
    bytes: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str, size: int) -> None:
        """Count one loss."""
        self.records += 1
        self.bytes += size
        if len(self.messages) < _KEPT_MESSAGES:
            self.messages.append(message)
            more = "; more of this file are counted only" if len(self.messages) == _KEPT_MESSAGES else ""
            _LOG.warning("skipped: %s%s", message, more)


class RecordReader(Protocol):
    """An iterator of chunks; a context manager that closes its file."""

    kind: Kind
    losses: Losses
    available: Mapping[str, str] | None = None
    """Columns that the file has, each with why it cannot be read, if so; None where a format has no columns."""

    def __iter__(self) -> Iterator[Records]:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def __next__(self) -> Records: ...

    @property
    @abstractmethod
    def position(self) -> Position:
        """Behind the last chunk given out."""

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int | None]:
        """Bytes of the file (rows, for Parquet) taken so far, and how many there are, where that is known."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; harmless when repeated."""


def position_of(records: Records, index: int) -> Position:
    """Where a reader starts so that record `index` of a chunk of a file comes first."""
    return Position(int(records.numbers[index]), int(records.positions[index]))


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
    columnar = file_format in (FileFormat.PARQUET, FileFormat.CSV)
    kind = Kind(kind or (Kind.EXAMPLE if columnar else Kind.INSTANCE))
    check_on_error(on_error)
    check_encoding(encoding)
    if header is not None and (isinstance(header, str) or not isinstance(header, Iterable)):
        raise InvalidRequestError(f"header={header!r}: give a list of names, such as header=['label', 'user']")
    form = {"delimiter": delimiter, "header": header, "list_separator": list_separator, "encoding": encoding}
    if file_format is not FileFormat.CSV and (given := [name for name, each in form.items() if each is not None]):
        raise InvalidRequestError(f"{path}: {given[0]} is for CSV files; this one is read as {file_format}")
    if not columnar and columns is not None:
        raise InvalidRequestError(f"{path}: columns are for Parquet and CSV files; this one is read as {file_format}")
    if file_format is FileFormat.PARQUET and effective_compression("", compression=compression) is not Compression.NONE:
        raise InvalidRequestError(
            f"{path}: compression={compression!r}: a Parquet file says itself how it is compressed"
        )
    start = start or Position()
    try:
        if not columnar:
            stored = compression_of(path, file_format, compression=compression, use_snappy=use_snappy)
            return StreamReader(
                decompressing(open_stream(path), stored),
                name=stream_name(path),
                kind=kind,
                framing=None if file_format is FileFormat.TFRECORD else framing or Framing(),
                block_bytes=block_bytes,
                blocks=blocks,
                start=start,
                on_error=on_error,
            )
        options: dict[str, Any] = {
            "kind": kind,
            "columns": columns,
            "batch_size": batch_size,
            "drop_remainder": drop_remainder,
            "block_bytes": block_bytes,
            "start": start,
            "on_error": on_error,
        }
        if file_format is FileFormat.PARQUET:
            from trilith.data.formats.parquet import ParquetReader

            return ParquetReader(path, **options)
        from trilith.data.formats.csv import CsvForm, CsvReader

        csv_form = CsvForm(
            compression=compression_of(path, file_format, compression=compression, use_snappy=use_snappy),
            delimiter=delimiter or ("\t" if _bare(path).endswith((".tsv", ".tab")) else ","),
            header=None if header is None else tuple(header),
            list_separator=list_separator,
            encoding=encoding,
        )
        return CsvReader(path, form=csv_form, **options)
    except (DataError, NoSuchFileError) as error:
        if on_error == "raise":
            raise
        return _Unread(kind, str(error), columnar=columnar)


def _bare(path: str) -> str:
    """A name in lower case without the ending of its compression."""
    name = path.partition("::")[0].lower() if "://" in path else path.lower()
    ending = next((each for each in _COMPRESSED if name.endswith(each)), "")
    return name.removesuffix(ending)


def named_format(path: str) -> FileFormat | None:
    """How the records of a file are stored, if its name says so."""
    return next((each for ending, each in _ENDINGS.items() if _bare(path).endswith(ending)), None)


def _format_of(path: str) -> FileFormat:
    """How the records of a file are stored, from its name or the mark that it begins with."""
    named = named_format(path)
    if named is not None or "://" in path or read_once(path):
        return named or FileFormat.RECORDS
    try:
        with open_file(path) as file:
            return FileFormat.PARQUET if file.read(4) == b"PAR1" else FileFormat.RECORDS
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


class StreamReader(RecordReader):
    """Framed records of a stream.

    A buffer that nobody holds any more is filled again, so a consumer that lets go of chunks costs no new memory.

    Args:
        stream: Uncompressed bytes, at their beginning; closed with the reader.
        name: For messages.
        kind: What the payloads are.
        framing: What stands in front of payloads; None reads TFRecords.
        block_bytes: Bytes of a buffer.
        blocks: Where buffers come from.
        start: Where to begin.
        on_error: What to do about damage.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        name: str,
        kind: Kind,
        framing: Framing | None,
        block_bytes: int = BLOCK_BYTES,
        blocks: Blocks | None = None,
        start: Position | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if block_bytes < 1:
            stream.close()
            raise InvalidRequestError(f"block_bytes={block_bytes}: a buffer holds at least one byte")
        self.kind = kind
        self.losses = Losses()
        self._stream = stream
        self._name = name
        self._framing = framing
        self._block = block_bytes
        self._skip_damage = on_error == "skip"
        self._scratch = Scratch()
        self._blocks = blocks or Blocks()
        self._buffer = np.empty(0, np.uint8)
        self._begin = self._end = 0
        start = start or Position()
        self._records, self._offset = start.records, start.offset
        self._more = True
        self._damage: str | None = None
        if (passed := stream.skip(start.offset)) < start.offset:
            stream.close()
            raise InvalidRequestError(f"{name}: cannot start at byte {start.offset}: it has only {passed}")

    @property
    def position(self) -> Position:
        """Behind the last chunk given out."""
        return Position(self._records, self._offset)

    @property
    def progress(self) -> tuple[int, int | None]:
        """Stored bytes taken so far, and how many there are, where that is known."""
        return self._stream.raw_bytes, self._stream.raw_size

    def close(self) -> None:
        """Close the stream; what was given out stays valid."""
        self._more = False
        self._begin = self._end = 0
        self._stream.close()

    def __next__(self) -> Records:
        need = 1
        while True:
            if self._end - self._begin >= need or not self._more:
                self._split()
                if self._scratch.found:
                    return self._chunk()
                if self._scratch.status != kernels.WHOLE:
                    self._damaged()
                    continue
                need = max(self._scratch.need, self._end - self._begin + 1)
                if not self._more:
                    self._finish()
                    self._stream.close()
                    raise StopIteration
            self._fill(need)

    # ---- finding records -------------------------------------------------------------------------------------------

    def _split(self) -> None:
        if self._framing is not None:
            split_frames(self._buffer, self._begin, self._end, self._framing, self._scratch)
            return
        scratch = self._scratch
        offsets, lengths, result = scratch.addresses[1], scratch.addresses[2], scratch.addresses[5]
        kernels.walk_tfrecords(
            address_of(kernels.CRC_TABLES),
            address_of(self._buffer) + self._begin,
            self._end - self._begin,
            scratch.capacity,
            offsets,
            lengths,
            result,
        )
        scratch.found, scratch.used, scratch.status, _ = scratch.result.tolist()
        found = slice(0, scratch.found)
        scratch.lengths[found] -= scratch.offsets[found]
        np.subtract(scratch.offsets[found], kernels.TFRECORD_HEAD, out=scratch.starts[found])
        scratch.need = self._tfrecord_bytes(self._begin + scratch.used)
        if scratch.status == kernels.WHOLE and scratch.need - kernels.FRAME_BYTES > MAX_PAYLOAD:
            scratch.status = kernels.PAYLOAD_TOO_LONG

    def _tfrecord_bytes(self, at: int) -> int:
        """Bytes of the TFRecord at `at` of the buffer, as far as its length is there."""
        if self._end - at < kernels.FRAME_BYTES:  # only then was its checksum looked at
            return kernels.FRAME_BYTES
        return kernels.FRAME_BYTES + int.from_bytes(self._buffer[at : at + 8].tobytes(), "little")

    def _chunk(self) -> Records:
        scratch = self._scratch
        n = scratch.found
        framed = self._framing is not None and self._framing.lagrangex_header
        records = Records(
            kind=self.kind,
            buffer=self._buffer,
            offsets=scratch.offsets[:n] + self._begin,
            lengths=scratch.lengths[:n].copy(),
            source_keys=scratch.keys[:n].copy() if framed else np.zeros(n, np.uint32),
            numbers=np.arange(self._records, self._records + n),
            positions=scratch.starts[:n] + self._offset,
            sources=(self._name,),
            source_index=np.zeros(n, np.int32),
        )
        self._advance(n, scratch.used)
        return records

    def _advance(self, records: int, size: int) -> None:
        self._records += records
        self._begin += size
        self._offset += size

    # ---- damage ----------------------------------------------------------------------------------------------------

    def _hint(self) -> str:
        """What to say of a file of which not even the first record can be read."""
        if self._records:
            return ""
        what = "TFRecord" if self._framing is None else "format 'records' with this framing"
        return f" (read as {what}; `trilith data inspect` guesses how a file is stored)"

    def _where(self) -> str:
        return f"{self._name}: record {self._records}, byte {self._offset}"

    def _damaged(self) -> None:
        """Report the record at the beginning of the data; pass over it, or over all that is left."""
        scratch = self._scratch
        left = self._end - self._begin
        message = f"{self._where()}: {explain(scratch.status, left, scratch.need)}{self._hint()}"
        if not self._skip_damage:
            raise DataError(message)
        if scratch.status == kernels.BAD_PAYLOAD:
            self.losses.add(message, scratch.need)
            self._advance(1, scratch.need)
            return
        self.losses.add(f"{message}; the rest of the file is lost", left + self._drain())
        self._records += 1
        self._offset += left
        self._begin = self._end
        self._damage = None

    def _drain(self) -> int:
        """Pass over what is left of the stream behind the data at hand; how many bytes that was."""
        self._more = False
        try:
            drained = self._stream.skip(1 << 62)
        except (DataError, OSError):  # it is lost in any case
            drained = 0
        self._offset += drained
        return drained

    def _finish(self) -> None:
        """Report what is wrong with the end of the stream, if anything."""
        left = self._end - self._begin
        if self._damage is None and not left:
            return
        reason = self._damage or explain(kernels.WHOLE, left, self._scratch.need)
        message = f"{self._where()}: {reason}{self._hint()}"
        if not self._skip_damage:
            raise DataError(message)
        self.losses.add(message, left)
        self._advance(1, left)
        self._damage = None

    # ---- filling buffers -------------------------------------------------------------------------------------------

    def _fill(self, need: int) -> None:
        """Read more behind the data at hand, in a new buffer if this one has no room for a record of `need` bytes."""
        room = self._buffer.size - PADDING - self._end
        if room <= 0 or (self._begin and self._begin + need > self._buffer.size - PADDING):
            self._renew(need)
        view = self._buffer.data[self._end : self._buffer.size - PADDING]
        self._end += self._read(view)

    def _read(self, target: memoryview) -> int:
        try:
            got = self._stream.readinto(target)
        except DataError as error:
            self._damage, self._more = str(error), False
            return 0
        except OSError as error:  # not the file's fault, and no reason to skip anything
            raise DataError(f"{self._where()}: reading failed: {error}") from error
        self._more = got > 0
        return got

    def _renew(self, need: int) -> None:
        """Move the data at hand to the beginning of a buffer that nobody holds.

        A header may claim anything, so the buffer only doubles with the bytes that are really there.
        """
        kept = self._end - self._begin
        buffer = self._blocks.take(max(self._block, min(need, 2 * kept)) + PADDING)
        self._blocks.keep(buffer)
        buffer[:kept] = self._buffer[self._begin : self._end]
        self._buffer = buffer
        self._begin, self._end = 0, kept

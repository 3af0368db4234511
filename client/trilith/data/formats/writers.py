"""Writers: chunks of records into files of any format and compression; a file appears whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from google.protobuf.message import DecodeError

from trilith.data.formats.compression import Compression, Sink, compressing, effective_compression
from trilith.data.formats.framing import Framing, frame_records
from trilith.data.formats.readers import FileFormat, named_format
from trilith.data.formats.streams import STDIN
from trilith.data.formats.tfrecord import frame_records as frame_tfrecords
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith.folder import Folder, absolute
from trilith_proto import example_pb2

if TYPE_CHECKING:
    from trilith.data.scan.rows import Column

__all__ = ["RecordsWriter", "open_writer"]

_LABEL = "__LABEL__"
_WEIGHT = "instance_weight"
_MEMBERS = {
    "int64_list": "int",
    "fid_v1_list": "fid_v1",
    "fid_v2_list": "fid_v2",
    "float_list": "float",
    "bytes_list": "bytes",
}


class RecordsWriter(Protocol):
    """Takes chunks of records; a context manager that finishes the file, or leaves none if its body raises."""

    def write(self, records: Records) -> None:
        """Append some records."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> None: ...


def open_writer(
    path: str | os.PathLike[str],
    *,
    format: FileFormat | str | None = None,  # noqa: A002 - what a file's format is called
    framing: Framing | None = None,
    compression: Compression | str | int | None = None,
    sort_id: bytes = b"",
    payload_type: int = 0,
    columns: Sequence[Column] | None = None,
) -> RecordsWriter:
    """Open a file for records.

    Args:
        path: A path or any URL that fsspec knows; the empty string is standard output ("records" and "tfrecord").
        format: "records", "tfrecord" or "parquet"; left out, what the name ends in, as `open_records` reads it.
        framing: "records": what stands in front of payloads; nothing but the length, if left out.
        compression: "records" and "tfrecord": None leaves it to the name, whose ending `.snappy` means snappy.
        sort_id: "records": what every record gets where the framing has one.
        payload_type: "records": what every record gets in a lagrangex header.
        columns: "parquet": features to write and their types; those of the first chunk, if left out. Examples only.

    Raises:
        InvalidRequestError: The file cannot be written, or the arguments do not go together.
    """
    path = os.fspath(path)
    file_format = (named_format(path) or FileFormat.RECORDS) if format is None else FileFormat(format)
    if file_format is FileFormat.CSV:
        raise InvalidRequestError("records are not written as csv, which has no lists: choose parquet")
    if file_format is FileFormat.PARQUET:
        return _ParquetWriter(path, columns)
    effective = effective_compression(path, compression=compression)
    if file_format is FileFormat.TFRECORD:
        return _StreamWriter(path, effective, None, b"", 0)
    return _StreamWriter(path, effective, framing or Framing(), sort_id, payload_type)


class _File:
    """A file that is there once it is whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: IO[bytes]

    def __enter__(self) -> Self:
        if self._path == STDIN:
            self._file = sys.stdout.buffer
        else:
            folder, _, name = absolute(self._path).rpartition("/")
            try:
                self._file = self._stack.enter_context(Folder(folder or "/").create(name))
            except OSError as error:
                raise InvalidRequestError(f"{self._path}: cannot be written: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> None:
        if kind is None:
            try:
                self._finish()
            except BaseException as error:
                self._stack.__exit__(type(error), error, error.__traceback__)
                raise
        if self._path == STDIN:
            self._file.flush()
        self._stack.__exit__(kind, value, traceback)

    def _finish(self) -> None:
        """Write what is pending."""


class _StreamWriter(_File):
    """Framed records, or TFRecords where there is no framing."""

    def __init__(
        self, path: str, compression: Compression, framing: Framing | None, sort_id: bytes, payload_type: int
    ) -> None:
        super().__init__(path)
        self._compression = compression
        self._framing = framing
        self._sort_id = sort_id
        self._payload_type = payload_type
        self._sink: Sink

    def __enter__(self) -> Self:
        super().__enter__()
        self._sink = compressing(self._file, self._compression)
        return self

    def write(self, records: Records) -> None:
        """Append some records."""
        if self._framing is not None:
            framed = frame_records(records, self._framing, sort_id=self._sort_id, payload_type=self._payload_type)
        else:
            packed = records.compact()
            framed = frame_tfrecords(packed.buffer, np.append(packed.offsets, packed.payload_bytes))
        self._sink.write(framed.data)

    def _finish(self) -> None:
        self._sink.finish()


class _ParquetWriter(_File):
    """Examples as rows: labels, scalars of the line id, and features as lists."""

    def __init__(self, path: str, columns: Sequence[Column] | None) -> None:
        if path == STDIN:
            raise InvalidRequestError("parquet cannot be written to standard output: name a file")
        super().__init__(path)
        self._columns = None if columns is None else list(columns)
        self._writer: Any = None

    def write(self, records: Records) -> None:
        """Append some Examples, or the rows of ExampleBatches."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        examples = _parse(records)
        if self._columns is None:
            self._columns = _columns_of(examples)
        fields = [pa.field(column.name, _stored(column)) for column in self._columns]
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, pa.schema(fields), write_page_checksum=True, compression="zstd")
        rows = [{each.name: each.feature for each in example.named_feature} for example in examples]
        arrays = [
            pa.array(
                [_cell(records, index, example, rows[index], column) for index, example in enumerate(examples)],
                field.type,
            )
            for column, field in zip(self._columns, fields, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)))

    def _finish(self) -> None:
        if self._writer is None:
            raise InvalidRequestError(f"{self._path}: no records were written, so the columns are unknown")
        self._writer.close()


def _parse(records: Records) -> list[example_pb2.Example]:
    if records.kind is not Kind.EXAMPLE:
        raise InvalidRequestError(f"parquet takes records of kind 'example', not {str(records.kind)!r}: convert them")
    examples = []
    for index in range(len(records)):
        try:
            examples.append(example_pb2.Example.FromString(records.payload(index)))
        except DecodeError as error:
            raise DataError(f"{records.where(index)}: cannot be parsed as example: {error}") from None
    return examples


def _columns_of(examples: Sequence[example_pb2.Example]) -> list[Column]:
    """A column for everything that some Example has."""
    from trilith.data.line_ids import line_fields
    from trilith.data.scan.rows import Column

    found: dict[str, Column] = {}
    if any(example.label for example in examples):
        found[_LABEL] = Column(_LABEL, "float")
    if any(example.instance_weight for example in examples):
        found[_WEIGHT] = Column(_WEIGHT, "float")
    for name, field in line_fields().items():
        if not field.repeated and any(example.line_id.HasField(name) for example in examples):  # type: ignore[arg-type]
            column = f"__{name.upper()}__"
            found[column] = Column(column, {"f": "float", "O": "bytes"}.get(field.dtype.kind, "int"))
    for example in examples:
        for each in example.named_feature:
            member = each.feature.WhichOneof("type")
            if member in _MEMBERS and not (each.name.startswith("__") and each.name.endswith("__")):
                found.setdefault(each.name, Column(each.name, _MEMBERS[member]))
    return list(found.values())


def _stored(column: Column) -> Any:
    import pyarrow as pa

    values = {"float": pa.float32(), "bytes": pa.binary()}.get(str(column.type), pa.int64())
    return values if _scalar(column) else pa.list_(values)


def _scalar(column: Column) -> str | None:
    """The LineId field that a column holds."""
    from trilith.data.line_ids import line_fields

    name = column.name[2:-2].lower() if column.name.startswith("__") and column.name.endswith("__") else ""
    field = line_fields().get(name)
    return name if field is not None and not field.repeated else None


def _cell(records: Records, index: int, example: example_pb2.Example, features: Any, column: Column) -> Any:
    name = _scalar(column)
    if name is not None:
        value = getattr(example.line_id, name)
        return _signed(value) if isinstance(value, int) else value.encode() if isinstance(value, str) else value
    if column.name == _LABEL:
        return list(example.label)
    if column.name == _WEIGHT and column.name not in features:
        return [example.instance_weight]
    if column.name not in features:
        return []
    feature = features[column.name]
    member = feature.WhichOneof("type")
    if member is None:
        return []
    if _MEMBERS.get(member) != str(column.type):
        raise DataError(f"{records.where(index)}: feature {column.name!r} is a {member}; the column is {column.type}")
    values = list(getattr(feature, member).value)
    return [_signed(value) for value in values] if member.startswith("fid") else values


def _signed(value: int) -> int:
    """An unsigned value's bits as int64."""
    return value - (1 << 64) if value >= 1 << 63 else int(value)

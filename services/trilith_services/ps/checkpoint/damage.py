"""What stands in a file is not trusted: whatever reading it raises becomes a CheckpointError that names the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from google.protobuf.message import DecodeError

from trilith.errors import CheckpointError, TrilithError

__all__ = ["as_damage", "checked_batches", "refuse_compressed", "whole_number"]

_DAMAGE = (
    pa.ArrowException,
    DecodeError,
    struct.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    OSError,
)


@contextmanager
def as_damage(where: str) -> Iterator[None]:
    """Raise what reading the file `where` raises as CheckpointError; errors of this tree pass as they are."""
    try:
        yield
    except TrilithError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {error}") from None


def whole_number(value: Any, most: int, what: str) -> int:
    """`value` if it is an integer from 0 to `most`.

    Raises:
        ValueError: It is not; `what` names it.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{what}={value!r} is not between 0 and {most}")
    return value


def checked_batches(reader: Any, where: str) -> Iterator[Any]:
    """The record batches of an opened Arrow file, each with buffers as long as it says and without nulls."""
    for number in range(reader.num_record_batches):
        with as_damage(f"{where}: record batch {number}"):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if _nulls(column):
                    raise ValueError(f"nulls in column {name!r}")
        yield batch


def _nulls(column: Any) -> int:
    if pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        return int(column.null_count) + _nulls(column.flatten())
    return int(column.null_count)


# ---- compression -----------------------------------------------------------------------------------------------------

_MAGIC = b"ARROW1"
_MOST_METADATA = 16 << 20
_BLOCK = struct.Struct("<qi4xq")  # offset, bytes of metadata, bytes of body


def refuse_compressed(source: Any, where: str) -> None:
    """See from its metadata that no record batch of an Arrow IPC file is compressed: none that this tree writes is.

    A few bytes can hold gigabytes so, which a reader would have to hold before it knows what they are.

    Raises:
        CheckpointError: One is, or the file is no Arrow file.
    """
    with as_damage(where):
        size = source.size()
        if size < 2 * len(_MAGIC) + 6:
            raise ValueError(f"{size} bytes are no Arrow file")
        source.seek(size - len(_MAGIC) - 4)
        tail = source.read(len(_MAGIC) + 4)
        (length,) = struct.unpack_from("<i", tail)
        if tail[4:] != _MAGIC or not 0 < length <= min(size - len(tail), _MOST_METADATA):
            raise ValueError("not an Arrow file")
        source.seek(size - len(tail) - length)
        footer = _Table.root(source.read(length))
        if footer.vector(2, _BLOCK.size):
            raise ValueError("dictionaries, which no file of a checkpoint has")
        for at in footer.vector(3, _BLOCK.size):
            offset, metadata, _ = _BLOCK.unpack_from(footer.data, at)
            if offset < 0 or not 8 < metadata <= _MOST_METADATA:
                raise ValueError(f"a record batch of {metadata} bytes of metadata at {offset}")
            source.seek(offset)
            raw = source.read(metadata)
            prefix = 8 if raw[:4] == b"\xff\xff\xff\xff" else 4
            batch = _Table.root(raw[prefix:]).table(2)
            if batch is not None and batch.field(3):
                raise ValueError("compressed record batches, which no file of a checkpoint has")
        source.seek(0)


class _Table:
    """A flatbuffer's table: enough of the format to find a field."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self._at = at
        self._vtable = at - struct.unpack_from("<i", data, at)[0]
        if self._vtable < 0:
            raise ValueError("a table without fields")
        (self._fields,) = struct.unpack_from("<H", data, self._vtable)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def field(self, number: int) -> int:
        """Where the field is, 0 if it is not there."""
        slot = 4 + 2 * number
        if slot + 2 > self._fields:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, self._vtable + slot)
        return self._at + offset if offset else 0

    def table(self, number: int) -> _Table | None:
        """The table that the field refers to."""
        at = self.field(number)
        return _Table(self.data, at + struct.unpack_from("<I", self.data, at)[0]) if at else None

    def vector(self, number: int, stride: int) -> range:
        """Where the elements of the field's vector are."""
        at = self.field(number)
        if not at:
            return range(0)
        start = at + struct.unpack_from("<I", self.data, at)[0]
        (count,) = struct.unpack_from("<I", self.data, start)
        if start + 4 + count * stride > len(self.data):
            raise ValueError(f"a list of {count} in {len(self.data)} bytes")
        return range(start + 4, start + 4 + count * stride, stride)

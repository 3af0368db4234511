"""The fields of LineId, read off its descriptor: number, type on the wire, dtype in a batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import FieldDescriptor

from trilith.errors import InvalidRequestError
from trilith_proto.line_id_pb2 import LineId

__all__ = ["LineField", "Wire", "line_field", "line_fields"]


class Wire(IntEnum):
    """How a scalar is written; the scanner's kernels know these numbers."""

    FIXED64 = 1
    FIXED32 = 2
    VARINT = 3
    VARINT32 = 4
    BOOL = 5
    BYTES = 6
    ZIGZAG = 7
    UNSIGNED32 = 8


_WIRES = {
    FieldDescriptor.TYPE_FIXED64: Wire.FIXED64,
    FieldDescriptor.TYPE_SFIXED64: Wire.FIXED64,
    FieldDescriptor.TYPE_DOUBLE: Wire.FIXED64,
    FieldDescriptor.TYPE_FIXED32: Wire.FIXED32,
    FieldDescriptor.TYPE_SFIXED32: Wire.FIXED32,
    FieldDescriptor.TYPE_FLOAT: Wire.FIXED32,
    FieldDescriptor.TYPE_INT64: Wire.VARINT,
    FieldDescriptor.TYPE_UINT64: Wire.VARINT,
    FieldDescriptor.TYPE_INT32: Wire.VARINT32,
    FieldDescriptor.TYPE_ENUM: Wire.VARINT32,
    FieldDescriptor.TYPE_UINT32: Wire.UNSIGNED32,
    FieldDescriptor.TYPE_SINT32: Wire.ZIGZAG,
    FieldDescriptor.TYPE_SINT64: Wire.ZIGZAG,
    FieldDescriptor.TYPE_BOOL: Wire.BOOL,
    FieldDescriptor.TYPE_STRING: Wire.BYTES,
    FieldDescriptor.TYPE_BYTES: Wire.BYTES,
}

_STORED: dict[int, np.dtype[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: np.dtype(np.float64),
    FieldDescriptor.TYPE_FLOAT: np.dtype(np.float32),
    FieldDescriptor.TYPE_FIXED64: np.dtype(np.uint64),
    FieldDescriptor.TYPE_UINT64: np.dtype(np.uint64),
    FieldDescriptor.TYPE_FIXED32: np.dtype(np.uint32),
    FieldDescriptor.TYPE_SFIXED32: np.dtype(np.int32),
    FieldDescriptor.TYPE_BOOL: np.dtype(np.bool_),
    FieldDescriptor.TYPE_STRING: np.dtype(np.object_),
    FieldDescriptor.TYPE_BYTES: np.dtype(np.object_),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LineField:
    """One field of LineId.

    Attributes:
        name: Its name.
        number: Its number on the wire.
        wire: How a value is written.
        dtype: What a value is: uint64, int64, uint32 and int32 of fixed width only, float32, float64, bool, or object
            for bytes.
        repeated: Whether it holds a list.
        packed: Whether a writer packs the list.
        marked: Whether the field has options, which is how actions and pre_actions are told from special_strategies.
        default: Value of an unset scalar.
    """

    name: str
    number: int
    wire: Wire
    dtype: np.dtype[Any]
    repeated: bool
    packed: bool
    marked: bool
    default: int | float | bool | bytes

    @property
    def is_bool(self) -> bool:
        """Whether it is a truth value, which no batch can hold."""
        return self.dtype == np.bool_

    @property
    def batch_dtype(self) -> npt.DTypeLike:
        """The dtype in a parsed batch: int64 for every integer, float32 for every float, object for strings."""
        if self.is_bool:
            raise InvalidRequestError(f"LineId.{self.name} is a bool, which a parsed batch cannot hold")
        if self.dtype.kind == "O":
            return np.object_
        return np.float32 if self.dtype.kind == "f" else np.int64


@functools.cache
def line_fields() -> dict[str, LineField]:
    """Every field of LineId by name."""
    return {field.name: _describe(field) for field in LineId.DESCRIPTOR.fields if field.type in _WIRES}


def line_field(name: str) -> LineField:
    """One field of LineId; an unknown name is refused."""
    try:
        return line_fields()[name]
    except KeyError:
        raise InvalidRequestError(f"{name!r} is not a field of LineId; it has {sorted(line_fields())}") from None


def _describe(field: FieldDescriptor) -> LineField:
    dtype = _STORED.get(field.type, np.dtype(np.int64))
    repeated = isinstance(field.default_value, list)
    default = np.zeros(1, dtype)[0].item() if repeated else field.default_value
    if not default and dtype.kind == "O":
        default = b""
    return LineField(
        name=field.name,
        number=field.number,
        wire=_WIRES[field.type],
        dtype=dtype,
        repeated=repeated,
        packed=repeated and field.GetOptions().packed,
        marked=field.has_options,
        default=default.encode() if isinstance(default, str) else default,
    )

"""Any message with a payload: its header by the protobuf library, its payload by hand.

After megabytes have gone through the caches every step in Python takes ten times as long as in a loop, and a lookup
takes these on both sides: so there are few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from trilith.errors import InvalidRequestError
from trilith.ops.memory import make_writable, new_bytes, write_bytes
from trilith_proto import ps_pb2

__all__ = [
    "FLOAT16",
    "FLOAT32",
    "PAYLOAD_TAG",
    "UINT32",
    "UINT64",
    "Payload",
    "Shape",
    "allocate",
    "cut",
    "float_dtype",
    "head_of",
    "pack",
    "parse",
    "payload_head",
    "read_varint",
    "unpack",
    "varint",
]

_M = TypeVar("_M", bound=Message)

Payload: TypeAlias = tuple[bytes, int]
"""What ends in a payload, and where it starts there."""

Shape: TypeAlias = int | tuple[int, int]

PAYLOAD_TAG = 15 << 3 | 2
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")
UINT64, UINT32 = np.dtype("<u8"), np.dtype("<u4")


def varint(value: int) -> bytes:
    """Encode a number as protobuf does."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def head_of(header: Message, size: int) -> bytes:
    """Everything that comes before a payload of `size` bytes."""
    return header.SerializeToString() + payload_head(size)


def payload_head(size: int) -> bytes:
    """The tag and the length of a payload of `size` bytes."""
    return bytes((PAYLOAD_TAG,)) + varint(size) if size else b""


def allocate(head: bytes, size: int) -> bytes:
    """Make a message of which only the payload, `size` bytes, is still to be written."""
    data = new_bytes(len(head) + size)
    write_bytes(data, head)
    return data


def pack(header: Message, *arrays: npt.NDArray[Any]) -> bytes:
    """Encode `header` with the bytes of `arrays` (little-endian, C-contiguous), one after another, as its payload."""
    return b"".join((head_of(header, sum(array.nbytes for array in arrays)), *(array.data for array in arrays)))


def unpack(kind: type[_M], data: bytes) -> tuple[_M, Payload]:
    """Split an encoded message into the message without its payload, and that.

    Raises:
        InvalidRequestError: `data` is not such a message.
    """
    end, start = _find_payload(data)
    if end >= 0:
        return parse(kind, data[:end]), (data, start)
    message = parse(kind, data)
    loose: bytes = message.payload  # type: ignore[attr-defined]
    message.ClearField("payload")
    return message, (loose, 0)


def parse(kind: type[_M], head: bytes) -> _M:
    """Decode a message; InvalidRequestError if it is none."""
    try:
        return kind.FromString(head)
    except DecodeError:
        raise InvalidRequestError(f"{len(head)} bytes are not a {kind.DESCRIPTOR.name}") from None


def _find_payload(data: bytes) -> tuple[int, int]:
    """Return where the header ends and where the payload begins; -1, -1 where only the library can tell."""
    position, end = 0, len(data)
    try:
        while position < end:
            tag_start = position
            tag = data[position]
            position += 1
            if tag == PAYLOAD_TAG:
                size, position = read_varint(data, position)
                return (tag_start, position) if position + size == end else (-1, -1)
            if tag & 0x80:  # a field number above 15: not ours, but legal
                return -1, -1
            wire_type = tag & 7
            if wire_type == _LENGTH:
                size, position = read_varint(data, position)
                position += size
            elif wire_type == _VARINT:
                while data[position] & 0x80:
                    position += 1
                position += 1
            elif wire_type == _FIXED64:
                position += 8
            elif wire_type == _FIXED32:
                position += 4
            else:
                return -1, -1
    except IndexError:
        return -1, -1
    return (end, end) if position == end else (-1, -1)


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends; IndexError if it is cut off or longer than numbers are."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError(position)


def cut(
    what: str, payload: Payload, arrays: Sequence[tuple[np.dtype[Any], Shape]], *, writable: bool = False
) -> list[npt.NDArray[Any]]:
    """View a payload as arrays of the given types and shapes, which must fill it.

    Args:
        what: The message, for the error.
        payload: Where.
        arrays: Type and shape of each.
        writable: Nobody else has the payload.

    Raises:
        InvalidRequestError: The payload is larger or smaller.
    """
    content, start = payload
    views: list[npt.NDArray[Any]] = []
    try:
        for dtype, shape in arrays:
            view: npt.NDArray[Any] = np.ndarray(shape, dtype, content, start)
            if writable:
                make_writable(view)
            views.append(view)
            start += view.nbytes
    except (TypeError, ValueError):  # it ends before, or no memory would hold that
        start = -1
    if start != len(content):
        size = sum(dtype.itemsize * int(np.prod(shape, dtype=object)) for dtype, shape in arrays)
        raise InvalidRequestError(
            f"{what}: the payload has {len(content) - payload[1]} bytes, its header accounts for {size}"
        )
    return views


def float_dtype(kind: int) -> np.dtype[Any]:
    """What a message's FloatType stands for."""
    if kind == ps_pb2.FLOAT32:
        return FLOAT32
    if kind == ps_pb2.FLOAT16:
        return FLOAT16
    raise InvalidRequestError(f"rows_type={kind} is neither FLOAT32 (0) nor FLOAT16 (1)")

"""Any message with a payload: its header by the protobuf library, its payload by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from trilith.errors import InvalidRequestError
from trilith.ops.memory import new_bytes, writable_view
from trilith_proto import ps_pb2

__all__ = [
    "FLOAT16",
    "FLOAT32",
    "UINT32",
    "UINT64",
    "Bytes",
    "allocate",
    "cut",
    "float_dtype",
    "head_of",
    "pack",
    "parse",
    "read_varint",
    "split",
    "unpack",
    "varint",
]

_M = TypeVar("_M", bound=Message)
Bytes = npt.NDArray[np.uint8]

_PAYLOAD_TAG = 15 << 3 | 2
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
    return header.SerializeToString() + (bytes((_PAYLOAD_TAG,)) + varint(size) if size else b"")


def allocate(head: bytes, size: int) -> tuple[bytes, Bytes]:
    """Make a message of which only the payload, uint8[size], is still to be written, through the second result."""
    data = new_bytes(len(head) + size)
    view = writable_view(data)
    view.data[: len(head)] = head
    return data, view[len(head) :]


def pack(header: Message, *arrays: npt.NDArray[Any]) -> bytes:
    """Encode `header` with the bytes of `arrays` (little-endian, C-contiguous), one after another, as its payload."""
    return b"".join((head_of(header, sum(array.nbytes for array in arrays)), *(array.data for array in arrays)))


def unpack(kind: type[_M], data: bytes) -> tuple[_M, Bytes]:
    """Split an encoded message into its header and its payload.

    Returns:
        The message without its payload, and uint8[size], a read-only view of the payload in `data`.

    Raises:
        InvalidRequestError: `data` is not such a message.
    """
    head, payload = split(kind, data)
    return parse(kind, head), payload


def parse(kind: type[_M], head: bytes) -> _M:
    """Read a header with the library; InvalidRequestError if it is none."""
    try:
        return kind.FromString(head)
    except DecodeError:
        raise InvalidRequestError(f"{len(head)} bytes are not a {kind.DESCRIPTOR.name}") from None


def split(kind: type[Message], data: bytes, *, owned: bool = False) -> tuple[bytes, Bytes]:
    """Split an encoded message into the encoding of all else and the payload, writable if nobody else has `data`."""
    end, start = _find_payload(data)
    if end < 0:
        message = parse(kind, data)
        loose = message.payload  # type: ignore[attr-defined]
        message.ClearField("payload")
        return message.SerializeToString(), np.frombuffer(loose, np.uint8)
    if start == len(data):
        return data[:end], np.empty(0, np.uint8)
    return data[:end], writable_view(data)[start:] if owned else np.frombuffer(data, np.uint8, offset=start)


def _find_payload(data: bytes) -> tuple[int, int]:
    """Return where the header ends and where the payload begins; -1, -1 where only the library can tell."""
    position, end = 0, len(data)
    try:
        while position < end:
            tag_start = position
            tag = data[position]
            position += 1
            if tag == _PAYLOAD_TAG:
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
    """The number at `position`, and where it ends; IndexError if it is cut off."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def cut(what: str, payload: Bytes, arrays: Sequence[tuple[np.dtype[Any], int]]) -> list[npt.NDArray[Any]]:
    """View a payload as one-dimensional arrays of the given types and lengths, which must fill it."""
    size = sum([dtype.itemsize * count for dtype, count in arrays])
    if size != payload.size:
        raise InvalidRequestError(f"{what}: the payload has {payload.size} bytes, its header accounts for {size}")
    if len(arrays) == 1:
        return [payload.view(arrays[0][0])]
    views, start = [], 0
    for dtype, count in arrays:
        end = start + dtype.itemsize * count
        views.append(payload[start:end].view(dtype))
        start = end
    return views


def float_dtype(kind: int) -> np.dtype[Any]:
    """What a message's FloatType stands for."""
    if kind == ps_pb2.FLOAT32:
        return FLOAT32
    if kind == ps_pb2.FLOAT16:
        return FLOAT16
    raise InvalidRequestError(f"rows_type={kind} is neither FLOAT32 (0) nor FLOAT16 (1)")

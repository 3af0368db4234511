"""The messages that carry arrays, written and read without the protobuf library's copies.

A message with a `payload` (field 15, last) is its header, encoded by the library, then one tag, one length and the
bytes. Arrays are therefore written straight into the object that gRPC sends, and read as views of the one it received.
The bytes are those the library itself would write; a message laid out in any other legal way is read by the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from trilith.errors import InvalidRequestError
from trilith.ops.memory import new_bytes, writable_view
from trilith.shard import DensePart, Float32Array, FloatArray, IdPart, UpdatePart, Write
from trilith_proto import ps_pb2

__all__ = [
    "UpdateFrame",
    "UpdateLayout",
    "allocate",
    "new_lookup_response",
    "new_update_request",
    "pack",
    "pack_create_variables",
    "pack_dense_update",
    "pack_ids",
    "pack_lookup_request",
    "pack_pulled",
    "pack_statuses",
    "pack_update_request",
    "plain_update",
    "unpack",
    "unpack_create_variables",
    "unpack_dense_update",
    "unpack_ids",
    "unpack_lookup_request",
    "unpack_lookup_response",
    "unpack_pulled",
    "unpack_statuses",
    "unpack_update_request",
    "write_id",
]

_M = TypeVar("_M", bound=Message)
_Bytes = npt.NDArray[np.uint8]

_PAYLOAD_TAG = 15 << 3 | 2
_ALIGNMENT = 16
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")
_UINT64, _UINT32 = np.dtype("<u8"), np.dtype("<u4")


# ---- any message with a payload --------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def allocate(header: Message, size: int) -> tuple[bytes, _Bytes]:
    """Make the encoding of `header` with a payload of `size` bytes that are still to be written.

    Args:
        header: A message whose payload is not set.
        size: Bytes of payload.

    Returns:
        The message, and uint8[size], a writable view of its payload.
    """
    head = header.SerializeToString()
    if not size:
        return head, np.empty(0, np.uint8)
    head += bytes((_PAYLOAD_TAG,)) + _varint(size)
    data = new_bytes(len(head) + size)
    view = writable_view(data)
    view[: len(head)] = np.frombuffer(head, np.uint8)
    return data, view[len(head) :]


def pack(header: Message, *arrays: npt.NDArray[Any]) -> bytes:
    """Encode `header` with the bytes of `arrays` (little-endian, C-contiguous), one after another, as its payload."""
    data, payload = allocate(header, sum(array.nbytes for array in arrays))
    offset = 0
    for array in arrays:
        payload[offset : offset + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        offset += array.nbytes
    return data


def unpack(kind: type[_M], data: bytes, *, owned: bool = False) -> tuple[_M, _Bytes]:
    """Split an encoded message into its header and its payload.

    Args:
        kind: The message's class.
        data: Its encoding.
        owned: Nobody else holds `data`, so the payload may be written to.

    Returns:
        The message without its payload, and uint8[size], a view of the payload in `data`, writable if `owned`.

    Raises:
        InvalidRequestError: `data` is not such a message.
    """
    end, start = _find_payload(data)
    try:
        if end < 0:
            message = kind.FromString(data)
            loose = message.payload  # type: ignore[attr-defined]
            message.ClearField("payload")
            return message, np.frombuffer(loose, np.uint8)
        message = kind.FromString(data if end == len(data) else data[:end])
    except DecodeError:
        raise InvalidRequestError(f"{len(data)} bytes are not a {kind.DESCRIPTOR.name}") from None
    if start == len(data):
        return message, np.empty(0, np.uint8)
    return message, (writable_view(data)[start:] if owned else np.frombuffer(data, np.uint8, offset=start))


def _find_payload(data: bytes) -> tuple[int, int]:
    """Return where the header ends and where the payload begins; -1, -1 where only the library can tell."""
    position, end = 0, len(data)
    try:
        while position < end:
            tag_start = position
            tag = data[position]
            position += 1
            if tag == _PAYLOAD_TAG:
                size, position = _read_varint(data, position)
                return (tag_start, position) if position + size == end else (-1, -1)
            if tag & 0x80:  # a field number above 15: not ours, but legal
                return -1, -1
            wire_type = tag & 7
            if wire_type == _LENGTH:
                size, position = _read_varint(data, position)
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


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


class _Cutter:
    """Cuts typed arrays off the front of a payload; whoever cuts last checks that nothing is left."""

    def __init__(self, what: str, payload: _Bytes) -> None:
        self._what, self._payload, self._offset = what, payload, 0

    def cut(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        start = self._offset
        self._offset += count * dtype.itemsize
        if self._offset > self._payload.size:
            raise InvalidRequestError(
                f"{self._what}: the payload has {self._payload.size} bytes, its header asks for more than {start}"
            )
        return self._payload[start : self._offset].view(dtype)

    def done(self) -> None:
        if self._offset != self._payload.size:
            raise InvalidRequestError(
                f"{self._what}: the payload has {self._payload.size} bytes, its header accounts for {self._offset}"
            )


def _float_dtype(kind: int) -> np.dtype[Any]:
    if kind == ps_pb2.FLOAT32:
        return FLOAT32
    if kind == ps_pb2.FLOAT16:
        return FLOAT16
    raise InvalidRequestError(f"rows_type={kind} is neither FLOAT32 (0) nor FLOAT16 (1)")


# ---- lookup ----------------------------------------------------------------------------------------------------------


def pack_lookup_request(parts: Sequence[IdPart], *, float16: bool = False) -> bytes:
    """Encode a LookupRequest."""
    header = ps_pb2.LookupRequest(rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    for part in parts:
        header.tables.add(table=part.table, rows=part.ids.size)
    return pack(header, *(part.ids for part in parts))


def unpack_lookup_request(data: bytes) -> tuple[list[IdPart], list[int], bool]:
    """Decode a LookupRequest.

    Returns:
        The parts (ids are views of `data`), per part the dim the caller expects (0: any), and whether it wants float16.
    """
    header, payload = unpack(ps_pb2.LookupRequest, data)
    cutter = _Cutter("LookupRequest", payload)
    parts = [IdPart(batch.table, cutter.cut(_UINT64, batch.rows)) for batch in header.tables]
    cutter.done()
    return parts, [batch.dim for batch in header.tables], _float_dtype(header.rows_type) is FLOAT16


def new_lookup_response(
    incarnation: int, parts: Sequence[IdPart], dims: Sequence[int], *, float16: bool = False
) -> tuple[bytes, list[FloatArray]]:
    """Make a LookupResponse whose rows are still to be written.

    Returns:
        The message, and per part float32|float16 [n, dim], a writable, possibly unaligned view of its rows.
    """
    header = ps_pb2.LookupResponse(incarnation=incarnation, rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    dtype = FLOAT16 if float16 else FLOAT32
    size = 0
    for part, dim in zip(parts, dims, strict=True):
        header.tables.add(table=part.table, rows=part.ids.size, dim=dim)
        size += part.ids.size * dim * dtype.itemsize
    _align(header, size)
    data, payload = allocate(header, size)
    outs, offset = [], 0
    for part, dim in zip(parts, dims, strict=True):
        end = offset + part.ids.size * dim * dtype.itemsize
        outs.append(payload[offset:end].view(dtype).reshape(part.ids.size, dim))
        offset = end
    return data, outs


def _align(header: ps_pb2.LookupResponse, size: int) -> None:
    """Pad the header so that the payload starts at a multiple of 16 bytes; a bytes object's content does, too."""
    missing = -(header.ByteSize() + 1 + len(_varint(size))) % _ALIGNMENT
    if missing:
        # Two bytes of padding are its own tag and length.
        header.padding = bytes(missing - 2 if missing > 2 else missing - 2 + _ALIGNMENT)


def unpack_lookup_response(data: bytes) -> tuple[int, list[FloatArray]]:
    """Decode a LookupResponse that nobody else holds.

    Returns:
        The incarnation, and per table float32|float16 [n, dim], a view of `data`: aligned if the sender has padded
        the message, as Trilith's does, and writable unless the message is laid out in an unusual way.
    """
    header, payload = unpack(ps_pb2.LookupResponse, data, owned=True)
    cutter = _Cutter("LookupResponse", payload)
    dtype = _float_dtype(header.rows_type)
    rows = [cutter.cut(dtype, batch.rows * batch.dim).reshape(batch.rows, batch.dim) for batch in header.tables]
    cutter.done()
    return header.incarnation, rows


# ---- updates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpdateLayout:
    """What one table's part of an update will hold.

    Attributes:
        table: Table name.
        rows: Number of ids.
        dim: Floats per row.
        counts: Whether multiplicities travel.
        learning_rates: float32[segments], or None for the rates of the config.
    """

    table: str
    rows: int
    dim: int
    counts: bool = False
    learning_rates: Float32Array | None = None


class UpdateFrame(list[UpdatePart]):
    """Parts of an update, which may lie in the message that will carry them.

    Attributes:
        write: What was encoded with them.
        message: The encoded UpdateRequest, or None where the parts are ordinary arrays.
    """

    def __init__(self, parts: Sequence[UpdatePart], write: Write, message: bytes | None) -> None:
        super().__init__(parts)
        self.write = write
        self.message = message


def plain_update(layouts: Sequence[UpdateLayout], write: Write, *, float16: bool = False) -> UpdateFrame:
    """Make parts whose arrays are still to be written, for a shard in this process."""
    del float16  # saves bytes on a wire; here there is none
    return UpdateFrame(
        [
            UpdatePart(
                layout.table,
                np.empty(layout.rows, np.uint64),
                np.empty((layout.rows, layout.dim), np.float32),
                np.empty(layout.rows, np.uint32) if layout.counts else None,
                layout.learning_rates,
            )
            for layout in layouts
        ],
        write,
        None,
    )


def new_update_request(layouts: Sequence[UpdateLayout], write: Write, *, float16: bool = False) -> UpdateFrame:
    """Make an UpdateRequest whose arrays are still to be written; they are writable, possibly unaligned views of it."""
    dtype = FLOAT16 if float16 else FLOAT32
    header = _update_header(write, ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    size = 0
    for layout in layouts:
        header.tables.add(
            table=layout.table,
            rows=layout.rows,
            dim=layout.dim,
            counts=layout.counts,
            learning_rates=None if layout.learning_rates is None else layout.learning_rates.tolist(),
        )
        size += layout.rows * (8 + (4 if layout.counts else 0) + layout.dim * dtype.itemsize)
    data, payload = allocate(header, size)
    cutter = _Cutter("UpdateRequest", payload)
    parts = []
    for layout in layouts:
        ids = cutter.cut(_UINT64, layout.rows)
        counts = cutter.cut(_UINT32, layout.rows) if layout.counts else None
        values = cutter.cut(dtype, layout.rows * layout.dim).reshape(layout.rows, layout.dim)
        parts.append(UpdatePart(layout.table, ids, values, counts, layout.learning_rates))
    return UpdateFrame(parts, write, data)


def pack_update_request(parts: Sequence[UpdatePart], write: Write) -> bytes:
    """Encode an UpdateRequest; parts that already lie in one are not copied."""
    if isinstance(parts, UpdateFrame) and parts.message is not None and parts.write == write:
        return parts.message
    dtypes = {part.values.dtype for part in parts}
    if len(dtypes) > 1:
        raise InvalidRequestError(f"one update carries rows of one type, not of {sorted(map(str, dtypes))}")
    float16 = dtypes == {FLOAT16}
    layouts = [
        UpdateLayout(part.table, part.ids.size, part.values.shape[1], part.counts is not None, part.learning_rates)
        for part in parts
    ]
    frame = new_update_request(layouts, write, float16=float16)
    for into, part in zip(frame, parts, strict=True):
        into.ids[:] = part.ids
        into.values[:] = part.values
        if into.counts is not None and part.counts is not None:
            into.counts[:] = part.counts
    assert frame.message is not None
    return frame.message


def unpack_update_request(data: bytes) -> tuple[list[UpdatePart], Write]:
    """Decode an UpdateRequest; arrays are read-only views of `data`."""
    header, payload = unpack(ps_pb2.UpdateRequest, data)
    cutter = _Cutter("UpdateRequest", payload)
    dtype = _float_dtype(header.rows_type)
    parts = []
    for batch in header.tables:
        ids = cutter.cut(_UINT64, batch.rows)
        counts = cutter.cut(_UINT32, batch.rows) if batch.counts else None
        values = cutter.cut(dtype, batch.rows * batch.dim).reshape(batch.rows, batch.dim)
        rates = np.array(batch.learning_rates, np.float32) if batch.learning_rates else None
        parts.append(UpdatePart(batch.table, ids, values, counts, rates))
    cutter.done()
    write = Write(
        client_id=header.write.client_id,
        sequence=header.write.sequence,
        incarnation=header.incarnation,
        global_step=header.global_step,
        request_time=header.request_time,
        allow_non_finite=header.allow_non_finite,
        dedup=header.dedup,
    )
    return parts, write


def _update_header(write: Write, rows_type: ps_pb2.FloatType.ValueType) -> ps_pb2.UpdateRequest:
    return ps_pb2.UpdateRequest(
        rows_type=rows_type,
        write=write_id(write),
        global_step=write.global_step,
        request_time=write.request_time,
        incarnation=write.incarnation,
        allow_non_finite=write.allow_non_finite,
        dedup=write.dedup,
    )


def write_id(write: Write) -> ps_pb2.WriteId | None:
    """The identity of a write as it travels; None for a write without one."""
    return ps_pb2.WriteId(client_id=write.client_id, sequence=write.sequence) if write.client_id else None


# ---- ids and statuses ------------------------------------------------------------------------------------------------


def pack_ids(part: IdPart, write: Write) -> bytes:
    """Encode an IdsRequest."""
    header = ps_pb2.IdsRequest(
        table=part.table, write=write_id(write), incarnation=write.incarnation, request_time=write.request_time
    )
    return pack(header, part.ids)


def unpack_ids(data: bytes) -> tuple[IdPart, Write]:
    """Decode an IdsRequest; the ids are a read-only view of `data`."""
    header, payload = unpack(ps_pb2.IdsRequest, data)
    if payload.size % 8:
        raise InvalidRequestError(f"IdsRequest: {payload.size} bytes of payload are no whole number of uint64")
    write = Write(
        client_id=header.write.client_id,
        sequence=header.write.sequence,
        incarnation=header.incarnation,
        request_time=header.request_time,
    )
    return IdPart(header.table, payload.view(_UINT64)), write


def pack_statuses(incarnation: int, statuses: npt.NDArray[np.int8]) -> bytes:
    """Encode a StatusesResponse."""
    return pack(ps_pb2.StatusesResponse(incarnation=incarnation), statuses)


def unpack_statuses(data: bytes) -> tuple[int, npt.NDArray[np.int8]]:
    """Decode a StatusesResponse: the incarnation and int8[n]."""
    header, payload = unpack(ps_pb2.StatusesResponse, data)
    return header.incarnation, payload.view(np.int8)


# ---- dense variables -------------------------------------------------------------------------------------------------


def _cut_partitions(what: str, sizes: Sequence[int], payload: _Bytes) -> list[Float32Array]:
    cutter = _Cutter(what, payload)
    values = [cutter.cut(FLOAT32, size) for size in sizes]
    cutter.done()
    return values


def pack_create_variables(
    specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array], incarnation: int
) -> bytes:
    """Encode a CreateVariablesRequest."""
    return pack(ps_pb2.CreateVariablesRequest(variables=specs, incarnation=incarnation), *initial)


def unpack_create_variables(data: bytes) -> tuple[ps_pb2.CreateVariablesRequest, list[Float32Array]]:
    """Decode a CreateVariablesRequest: its header and the initial values, read-only views of `data`."""
    header, payload = unpack(ps_pb2.CreateVariablesRequest, data)
    return header, _cut_partitions("CreateVariablesRequest", [spec.size for spec in header.variables], payload)


def pack_dense_update(parts: Sequence[DensePart], write: Write, learning_rate: float) -> bytes:
    """Encode a DenseUpdateRequest."""
    header = ps_pb2.DenseUpdateRequest(
        write=write_id(write),
        global_step=write.global_step,
        incarnation=write.incarnation,
        learning_rate=learning_rate,
        allow_non_finite=write.allow_non_finite,
    )
    for part in parts:
        header.partitions.add(name=part.name, partition=part.partition, size=part.values.size)
    return pack(header, *(part.values for part in parts))


def unpack_dense_update(data: bytes) -> tuple[list[DensePart], Write, float]:
    """Decode a DenseUpdateRequest: its parts (read-only views of `data`), the write and the learning rate."""
    header, payload = unpack(ps_pb2.DenseUpdateRequest, data)
    values = _cut_partitions("DenseUpdateRequest", [ref.size for ref in header.partitions], payload)
    parts = [DensePart(ref.name, ref.partition, value) for ref, value in zip(header.partitions, values, strict=True)]
    write = Write(
        client_id=header.write.client_id,
        sequence=header.write.sequence,
        incarnation=header.incarnation,
        global_step=header.global_step,
        allow_non_finite=header.allow_non_finite,
    )
    return parts, write, header.learning_rate


def pack_pulled(
    incarnation: int, refs: Sequence[tuple[str, int]], values: Sequence[Float32Array], global_step: int
) -> bytes:
    """Encode a PullVariablesResponse."""
    header = ps_pb2.PullVariablesResponse(incarnation=incarnation, global_step=global_step)
    for (name, partition), value in zip(refs, values, strict=True):
        header.partitions.add(name=name, partition=partition, size=value.size)
    return pack(header, *values)


def unpack_pulled(data: bytes) -> tuple[int, list[Float32Array], int]:
    """Decode a PullVariablesResponse: incarnation, values (read-only views of `data`), global step."""
    header, payload = unpack(ps_pb2.PullVariablesResponse, data)
    values = _cut_partitions("PullVariablesResponse", [ref.size for ref in header.partitions], payload)
    return header.incarnation, values, header.global_step

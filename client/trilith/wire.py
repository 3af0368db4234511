"""The messages that carry arrays, written and read without the protobuf library's copies.

A message with a `payload` (field 15, last) is its header, encoded by the library, then one tag, one length and the
bytes. Arrays are therefore written straight into the object that gRPC sends, and read as views of the one it received.
The bytes are those the library itself would write; a message laid out in any other legal way is read by the library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
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


def _head(header: Message, size: int) -> bytes:
    """Everything that comes before a payload of `size` bytes."""
    return header.SerializeToString() + (bytes((_PAYLOAD_TAG,)) + _varint(size) if size else b"")


def _allocate(head: bytes, size: int) -> tuple[bytes, _Bytes]:
    """Make a message of which only the payload, uint8[size], is still to be written, through the second result."""
    data = new_bytes(len(head) + size)
    view = writable_view(data)
    view.data[: len(head)] = head
    return data, view[len(head) :]


def pack(header: Message, *arrays: npt.NDArray[Any]) -> bytes:
    """Encode `header` with the bytes of `arrays` (little-endian, C-contiguous), one after another, as its payload."""
    return b"".join((_head(header, sum(array.nbytes for array in arrays)), *(array.data for array in arrays)))


def unpack(kind: type[_M], data: bytes) -> tuple[_M, _Bytes]:
    """Split an encoded message into its header and its payload.

    Returns:
        The message without its payload, and uint8[size], a read-only view of the payload in `data`.

    Raises:
        InvalidRequestError: `data` is not such a message.
    """
    head, payload = _split(kind, data)
    return _parse(kind, head), payload


def _parse(kind: type[_M], head: bytes) -> _M:
    try:
        return kind.FromString(head)
    except DecodeError:
        raise InvalidRequestError(f"{len(head)} bytes are not a {kind.DESCRIPTOR.name}") from None


def _split(kind: type[Message], data: bytes, *, owned: bool = False) -> tuple[bytes, _Bytes]:
    """Split an encoded message into the encoding of all else and the payload, writable if nobody else has `data`."""
    end, start = _find_payload(data)
    if end < 0:
        message = _parse(kind, data)
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


def _cut(what: str, payload: _Bytes, arrays: Sequence[tuple[np.dtype[Any], int]]) -> list[npt.NDArray[Any]]:
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


def _float_dtype(kind: int) -> np.dtype[Any]:
    if kind == ps_pb2.FLOAT32:
        return FLOAT32
    if kind == ps_pb2.FLOAT16:
        return FLOAT16
    raise InvalidRequestError(f"rows_type={kind} is neither FLOAT32 (0) nor FLOAT16 (1)")


# ---- lookup ----------------------------------------------------------------------------------------------------------


# Training sends batches of the same tables, often of the same sizes, and a small lookup takes as long as its headers:
# they are kept, by everything they are made of.
_KEPT_HEADERS = 1024

_Sizes = tuple[tuple[str, int, int], ...]  # table, rows, dim


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_request_head(sizes: _Sizes, float16: bool) -> bytes:
    header = ps_pb2.LookupRequest(rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    for table, rows, dim in sizes:
        header.tables.add(table=table, rows=rows, dim=dim)
    return _head(header, sum(8 * rows for _, rows, _ in sizes))


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_request_fields(head: bytes) -> tuple[_Sizes, bool]:
    header = _parse(ps_pb2.LookupRequest, head)
    sizes = tuple((batch.table, batch.rows, batch.dim) for batch in header.tables)
    return sizes, _float_dtype(header.rows_type) is FLOAT16


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_response_head(incarnation: int, sizes: _Sizes, float16: bool) -> tuple[bytes, int]:
    header = ps_pb2.LookupResponse(incarnation=incarnation, rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    for table, rows, dim in sizes:
        header.tables.add(table=table, rows=rows, dim=dim)
    size = sum(rows * dim for _, rows, dim in sizes) * (2 if float16 else 4)
    # The payload shall start at a multiple of 16 bytes, as the content of a bytes object does.
    missing = -len(_head(header, size)) % _ALIGNMENT
    if missing:
        # Two bytes of padding are its own tag and length.
        header.padding = bytes(missing - 2 if missing > 2 else missing - 2 + _ALIGNMENT)
    return _head(header, size), size


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_response_fields(head: bytes) -> tuple[int, _Sizes, np.dtype[Any]]:
    header = _parse(ps_pb2.LookupResponse, head)
    sizes = tuple((batch.table, batch.rows, batch.dim) for batch in header.tables)
    return header.incarnation, sizes, _float_dtype(header.rows_type)


def pack_lookup_request(parts: Sequence[IdPart], *, float16: bool = False) -> bytes:
    """Encode a LookupRequest."""
    head = _lookup_request_head(tuple((part.table, part.ids.size, 0) for part in parts), float16)
    return b"".join((head, *[part.ids.data for part in parts]))


def unpack_lookup_request(data: bytes) -> tuple[list[IdPart], list[int], bool]:
    """Decode a LookupRequest.

    Returns:
        The parts (ids are views of `data`), per part the dim the caller expects (0: any), whether it wants float16.
    """
    head, payload = _split(ps_pb2.LookupRequest, data)
    sizes, float16 = _lookup_request_fields(head)
    arrays = _cut("LookupRequest", payload, [(_UINT64, rows) for _, rows, _ in sizes])
    parts = [IdPart(table, ids) for (table, _, _), ids in zip(sizes, arrays, strict=True)]
    return parts, [dim for _, _, dim in sizes], float16


def new_lookup_response(
    incarnation: int, parts: Sequence[IdPart], dims: Sequence[int], *, float16: bool = False
) -> tuple[bytes, list[FloatArray]]:
    """Make a LookupResponse whose rows are still to be written.

    Returns:
        The message, and per part float32|float16 [n, dim], a writable, possibly unaligned view of its rows.
    """
    sizes = tuple((part.table, part.ids.size, dim) for part, dim in zip(parts, dims, strict=True))
    head, size = _lookup_response_head(incarnation, sizes, float16)
    data, payload = _allocate(head, size)
    return data, _cut_rows("LookupResponse", payload, sizes, FLOAT16 if float16 else FLOAT32)


def unpack_lookup_response(data: bytes) -> tuple[int, list[FloatArray]]:
    """Decode a LookupResponse that nobody else holds.

    Returns:
        The incarnation, and per table float32|float16 [n, dim], a view of `data`: aligned if the sender has padded
        the message, as Trilith's does, and writable unless the message is laid out in an unusual way.
    """
    head, payload = _split(ps_pb2.LookupResponse, data, owned=True)
    incarnation, sizes, dtype = _lookup_response_fields(head)
    return incarnation, _cut_rows("LookupResponse", payload, sizes, dtype)


def _cut_rows(what: str, payload: _Bytes, sizes: _Sizes, dtype: np.dtype[Any]) -> list[FloatArray]:
    arrays = _cut(what, payload, [(dtype, rows * dim) for _, rows, dim in sizes])
    return [array.reshape(rows, dim) for array, (_, rows, dim) in zip(arrays, sizes, strict=True)]


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
    data, payload = _allocate(_head(header, size), size)
    arrays = iter(_cut("UpdateRequest", payload, _update_arrays(layouts, dtype)))
    parts = []
    for layout in layouts:
        ids = next(arrays)
        counts = next(arrays) if layout.counts else None
        values = next(arrays).reshape(layout.rows, layout.dim)
        parts.append(UpdatePart(layout.table, ids, values, counts, layout.learning_rates))
    return UpdateFrame(parts, write, data)


def _update_arrays(
    batches: Iterable[UpdateLayout | ps_pb2.TableBatch], dtype: np.dtype[Any]
) -> list[tuple[np.dtype[Any], int]]:
    arrays: list[tuple[np.dtype[Any], int]] = []
    for batch in batches:
        arrays.append((_UINT64, batch.rows))
        if batch.counts:
            arrays.append((_UINT32, batch.rows))
        arrays.append((dtype, batch.rows * batch.dim))
    return arrays


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
    arrays = iter(_cut("UpdateRequest", payload, _update_arrays(header.tables, _float_dtype(header.rows_type))))
    parts = []
    for batch in header.tables:
        ids = next(arrays)
        counts = next(arrays) if batch.counts else None
        values = next(arrays).reshape(batch.rows, batch.dim)
        rates = np.array(batch.learning_rates, np.float32) if batch.learning_rates else None
        parts.append(UpdatePart(batch.table, ids, values, counts, rates))
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
    return _cut(what, payload, [(FLOAT32, size) for size in sizes])


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

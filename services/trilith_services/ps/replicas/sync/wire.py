"""PushRequests in bytes: their arrays by kernels and copies, all else by the protobuf library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.errors import InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of, new_bytes, writable_view
from trilith.rpc.wire.payload import read_varint, varint
from trilith.shard import Float32Array, UInt64Array
from trilith_proto import parameter_sync_pb2, ps_pb2
from trilith_services.ps.engine.kernels import gather

if TYPE_CHECKING:
    from trilith_services.ps.engine.table import Table

__all__ = ["SIGNATURE", "Delta", "compile_kernels", "id_bytes", "pack_push", "pack_rows", "unpack_push"]

SIGNATURE = "hashtable_assign"
"""What the reference system calls the operation that a push is."""

_Scalar = TypeVar("_Scalar", bound=np.generic)

_NONE = np.empty(0, np.uint64)
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIDS, _EMBEDDINGS, _ERASED = 3, 4, 100
_TABLES = (3, 5)  # PushRequest.delta_hash_tables and .delta_multi_hash_tables
_MOST_ID_BYTES = 10


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes of one table.

    Attributes:
        table: Name.
        dim: Floats per row.
        ids: uint64[n].
        weights: float32[n, dim], raw; float32[0, dim] where they are not known yet.
        erased: uint64[m] ids that have no row.
        config: The table as it is in training; with the beginning of a copy.
        copy_begins: Rows that do not come from here on are dropped when the copy ends.
        copy_ends: The copy ends with these rows.
    """

    table: str
    dim: int
    ids: UInt64Array
    weights: Float32Array
    erased: UInt64Array = field(default_factory=lambda: _NONE)
    config: ps_pb2.TableConfig | None = None
    copy_begins: bool = False
    copy_ends: bool = False


def compile_kernels() -> None:
    """Compile or load what the functions below run."""
    warm(gather.pack_ids, gather.unpack_ids, gather.drop_repeats)


def id_bytes() -> int:
    """Bytes that an id takes at most."""
    return _MOST_ID_BYTES


def pack_push(header: parameter_sync_pb2.PushRequest, deltas: Sequence[Delta]) -> bytes:
    """Encode a PushRequest whose deltas come besides those of `header`."""
    pieces: list[bytes | memoryview] = [header.SerializeToString()]
    for delta in deltas:
        body = [*_head(delta), delta.weights.data.cast("B") if delta.weights.size else b""]
        pieces += [_tag(_TABLES[0], _LENGTH), varint(sum(map(len, body))), *body]
    return b"".join(pieces)


def pack_rows(
    header: parameter_sync_pb2.PushRequest, deltas: Sequence[Delta], tables: Sequence[Table]
) -> tuple[bytes, list[Delta]]:
    """Encode a PushRequest with the rows of `tables` as they are now.

    As a rule every id has its row, so the message is laid out for that and the rows are copied from their table to
    where they are sent from; otherwise it is written once more.

    Args:
        header: All but the deltas.
        deltas: Per table the ids to send, without weights.
        tables: Per delta the table.

    Returns:
        The message, and the deltas that are in it.
    """
    pieces: list[bytes | memoryview] = [header.SerializeToString()]
    starts: list[int] = []
    at = len(pieces[0])
    for delta in deltas:
        head = _head(delta)
        size = 4 * delta.dim * len(delta.ids)
        head = [_tag(_TABLES[0], _LENGTH), varint(sum(map(len, head)) + size), *head]
        pieces += head
        starts.append(at + sum(map(len, head)))
        at = starts[-1] + size
    message = new_bytes(at)
    view = writable_view(message)
    at, number = 0, 0
    for piece in pieces:
        while number < len(starts) and at == starts[number]:
            at += 4 * deltas[number].dim * len(deltas[number].ids)
            number += 1
        view.data[at : at + len(piece)] = piece
        at += len(piece)
    gathered = []
    for delta, table, start in zip(deltas, tables, starts, strict=True):
        size = 4 * delta.dim * len(delta.ids)
        room = view[start : start + size].view(np.float32).reshape(len(delta.ids), delta.dim)
        ids, weights, erased = table.gather(delta.ids, room)
        gathered.append(replace(delta, ids=ids, weights=weights, erased=erased))
    if any(len(delta.erased) for delta in gathered):
        return pack_push(header, gathered), gathered
    return message, gathered


def unpack_push(data: bytes) -> tuple[parameter_sync_pb2.PushRequest, list[Delta]]:
    """Decode a PushRequest: what is not a delta, and the deltas, whose weights are views of `data`.

    Raises:
        InvalidRequestError: `data` is no such message, or the arrays of a delta do not fit each other.
    """
    rest, bodies = _split(data, 0, len(data), _TABLES)
    try:
        header = parameter_sync_pb2.PushRequest.FromString(rest)
        return header, [_parse_delta(data, start, end) for _, start, end in bodies]
    except DecodeError:
        raise InvalidRequestError(f"{len(data)} bytes are not a PushRequest") from None


def _head(delta: Delta) -> list[bytes | memoryview]:
    """All of an encoded delta that comes before its weights."""
    header = parameter_sync_pb2.DeltaEmbeddingHashTable(unique_id=delta.table, dim_size=delta.dim)
    if delta.config is not None:
        header.config.CopyFrom(delta.config)
    if delta.copy_begins:
        header.copy_begins = True
    if delta.copy_ends:
        header.copy_ends = True
    pieces: list[bytes | memoryview] = [header.SerializeToString()]
    for number, ids in ((_FIDS, delta.ids), (_ERASED, delta.erased)):
        if len(ids):
            packed = np.empty(_MOST_ID_BYTES * len(ids), np.uint8)
            size = gather.pack_ids(address_of(ids), len(ids), address_of(packed))
            pieces += [_tag(number, _LENGTH), varint(size), packed[:size].data]
    if len(delta.ids):
        pieces += [_tag(_EMBEDDINGS, _LENGTH), varint(4 * delta.dim * len(delta.ids))]
    return pieces


def _parse_delta(data: bytes, start: int, end: int) -> Delta:
    rest, arrays = _split(data, start, end, (_FIDS, _EMBEDDINGS, _ERASED))
    header = parameter_sync_pb2.DeltaEmbeddingHashTable.FromString(rest)
    # What an encoder that does not pack has written one by one.
    ids = [np.array(header.fids, np.int64).view(np.uint64)] if header.fids else []
    erased = [np.array(header.erased, np.int64).view(np.uint64)] if header.erased else []
    floats = [np.array(header.embeddings, np.float32)] if header.embeddings else []
    for number, first, last in arrays:
        if number == _EMBEDDINGS:
            if (last - first) % 4:
                raise InvalidRequestError(f"table {header.unique_id!r}: {last - first} bytes are no whole floats")
            floats.append(np.frombuffer(data, np.uint8, last - first, first).view(np.float32))
        else:
            (ids if number == _FIDS else erased).append(_unpack_ids(header.unique_id, data, first, last))
    joined, weights = _join(ids, np.uint64), _join(floats, np.float32)
    dim = header.dim_size
    if dim < 0 or len(joined) * dim != len(weights):
        raise InvalidRequestError(
            f"table {header.unique_id!r}: {len(joined)} ids of dim_size={dim} come with {len(weights)} floats"
        )
    return Delta(
        header.unique_id,
        dim,
        joined,
        weights.reshape(len(joined), dim),
        _join(erased, np.uint64),
        header.config if header.HasField("config") else None,
        header.copy_begins,
        header.copy_ends,
    )


def _unpack_ids(table: str, data: bytes, start: int, end: int) -> UInt64Array:
    packed = np.frombuffer(data, np.uint8, end - start, start)
    ids = np.empty(len(packed), np.uint64)
    count = gather.unpack_ids(address_of(packed), len(packed), address_of(ids)) if len(packed) else 0
    if count < 0:
        raise InvalidRequestError(f"table {table!r}: its ids are damaged")
    return ids[:count]


def _join(pieces: Sequence[npt.NDArray[_Scalar]], kind: type[_Scalar]) -> npt.NDArray[_Scalar]:
    if not pieces:
        return np.empty(0, kind)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _split(data: bytes, start: int, end: int, wanted: Iterable[int]) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Take the length-delimited fields of the `wanted` numbers out of an encoded message.

    Returns:
        The message without them, and per field its number and where its content begins and ends in `data`.
    """
    found, rest = [], []
    at = start
    try:
        while at < end:
            first = at
            key, at = read_varint(data, at)
            number, kind = key >> 3, key & 7
            if kind == _LENGTH:
                size, content = read_varint(data, at)
                at = content + size
            elif kind == _VARINT:
                _, at = read_varint(data, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            else:
                at = end + 1
            if at > end:
                raise InvalidRequestError(f"field {number} of a PushRequest is cut off or of an unknown kind")
            if kind == _LENGTH and number in wanted:
                found.append((number, content, at))
            else:
                rest.append(data[first:at])
    except IndexError:
        raise InvalidRequestError("a PushRequest is cut off") from None
    return b"".join(rest), found


def _tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)

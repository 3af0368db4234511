"""IdsRequest and StatusesResponse: verbs that carry only ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.rpc.wire.payload import UINT64, cut, pack, unpack
from trilith.rpc.wire.update import unpack_write, write_id
from trilith.shard import ANY_WRITE, IdPart, Write
from trilith_proto import ps_pb2

__all__ = ["pack_ids", "pack_statuses", "unpack_ids", "unpack_statuses"]


def pack_ids(part: IdPart, write: Write = ANY_WRITE) -> bytes:
    """Encode an IdsRequest."""
    header = ps_pb2.IdsRequest(
        table=part.table, write=write_id(write), incarnation=write.incarnation, request_time=write.request_time
    )
    return pack(header, part.ids)


def unpack_ids(data: bytes) -> tuple[IdPart, Write]:
    """Decode an IdsRequest; the ids are a read-only view of `data`."""
    header, payload = unpack(ps_pb2.IdsRequest, data)
    size = len(payload[0]) - payload[1]
    if size % 8:
        raise InvalidRequestError(f"IdsRequest: {size} bytes of payload are no whole number of uint64")
    (ids,) = cut("IdsRequest", payload, [(UINT64, size // 8)])
    write = unpack_write(header.write, header.incarnation, request_time=header.request_time)
    return IdPart(header.table, ids), write


def pack_statuses(incarnation: int, statuses: npt.NDArray[np.int8]) -> bytes:
    """Encode a StatusesResponse."""
    return pack(ps_pb2.StatusesResponse(incarnation=incarnation), statuses)


def unpack_statuses(data: bytes) -> tuple[int, npt.NDArray[np.int8]]:
    """Decode a StatusesResponse: the incarnation and int8[n]."""
    header, (content, start) = unpack(ps_pb2.StatusesResponse, data)
    return header.incarnation, np.frombuffer(content, np.int8, offset=start)

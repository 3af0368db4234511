"""UpdateRequest: gradients, new weights or increments, and the identity of a write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trilith.errors import InvalidRequestError
from trilith.rpc.wire.payload import (
    FLOAT16,
    FLOAT32,
    UINT32,
    UINT64,
    Shape,
    allocate,
    cut,
    float_dtype,
    head_of,
    unpack,
)
from trilith.shard import UpdateFrame, UpdateLayout, UpdatePart, Write
from trilith_proto import ps_pb2

__all__ = [
    "new_update_request",
    "pack_update_request",
    "unpack_update_request",
    "unpack_write",
    "write_id",
]


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
    data = allocate(head_of(header, size), size)
    payload = data, len(data) - size
    arrays = iter(cut("UpdateRequest", payload, _update_arrays(layouts, dtype), writable=True))
    parts = []
    for layout in layouts:
        ids = next(arrays)
        counts = next(arrays) if layout.counts else None
        values = next(arrays)
        parts.append(UpdatePart(layout.table, ids, values, counts, layout.learning_rates))
    return UpdateFrame(parts, write, data)


def _update_arrays(
    batches: Iterable[UpdateLayout | ps_pb2.TableBatch], dtype: np.dtype[Any]
) -> list[tuple[np.dtype[Any], Shape]]:
    arrays: list[tuple[np.dtype[Any], Shape]] = []
    for batch in batches:
        arrays.append((UINT64, batch.rows))
        if batch.counts:
            arrays.append((UINT32, batch.rows))
        arrays.append((dtype, (batch.rows, batch.dim)))
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
    arrays = iter(cut("UpdateRequest", payload, _update_arrays(header.tables, float_dtype(header.rows_type))))
    parts = []
    for batch in header.tables:
        ids = next(arrays)
        counts = next(arrays) if batch.counts else None
        values = next(arrays)
        rates = np.array(batch.learning_rates, np.float32) if batch.learning_rates else None
        parts.append(UpdatePart(batch.table, ids, values, counts, rates))
    write = unpack_write(
        header.write,
        header.incarnation,
        global_step=header.global_step,
        advance=header.advance,
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
        advance=write.advance,
        request_time=write.request_time,
        incarnation=write.incarnation,
        allow_non_finite=write.allow_non_finite,
        dedup=write.dedup,
    )


def write_id(write: Write) -> ps_pb2.WriteId | None:
    """The identity of a write as it travels; None for a write without one."""
    if not write.client_id:
        return None
    return ps_pb2.WriteId(
        client_id=write.client_id,
        sequence=write.sequence,
        lowest_open=write.lowest_open,
        client_started=write.client_started,
        origin=write.origin,
    )


def unpack_write(identity: ps_pb2.WriteId, incarnation: int, **options: Any) -> Write:
    """A write by its identity as it travelled; `options` are its other attributes."""
    return Write(
        client_id=identity.client_id,
        sequence=identity.sequence,
        lowest_open=identity.lowest_open,
        client_started=identity.client_started,
        origin=identity.origin,
        incarnation=incarnation,
        **options,
    )

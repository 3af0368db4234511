"""LookupRequest and LookupResponse."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from trilith.shard import FloatArray, IdPart
from trilith.wire.payload import FLOAT16, FLOAT32, UINT64, Payload, allocate, cut, float_dtype, head_of, parse, split
from trilith_proto import ps_pb2

__all__ = ["new_lookup_response", "pack_lookup_request", "unpack_lookup_request", "unpack_lookup_response"]

_ALIGNMENT = 16

# Training sends batches of the same tables, often of the same sizes, and a small lookup takes as long as its headers:
# they are kept, by everything they are made of.
_KEPT_HEADERS = 1024

_Sizes = tuple[tuple[str, int, int], ...]  # table, rows, dim


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_request_head(sizes: _Sizes, float16: bool) -> bytes:
    header = ps_pb2.LookupRequest(rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    for table, rows, dim in sizes:
        header.tables.add(table=table, rows=rows, dim=dim)
    return head_of(header, sum(8 * rows for _, rows, _ in sizes))


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_request_fields(head: bytes) -> tuple[_Sizes, bool]:
    header = parse(ps_pb2.LookupRequest, head)
    sizes = tuple((batch.table, batch.rows, batch.dim) for batch in header.tables)
    return sizes, float_dtype(header.rows_type) is FLOAT16


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_response_head(incarnation: int, sizes: _Sizes, float16: bool) -> tuple[bytes, int]:
    header = ps_pb2.LookupResponse(incarnation=incarnation, rows_type=ps_pb2.FLOAT16 if float16 else ps_pb2.FLOAT32)
    for table, rows, dim in sizes:
        header.tables.add(table=table, rows=rows, dim=dim)
    size = sum(rows * dim for _, rows, dim in sizes) * (2 if float16 else 4)
    # The payload shall start at a multiple of 16 bytes, as the content of a bytes object does.
    missing = -len(head_of(header, size)) % _ALIGNMENT
    if missing:
        # Two bytes of padding are its own tag and length.
        header.padding = bytes(missing - 2 if missing > 2 else missing - 2 + _ALIGNMENT)
    return head_of(header, size), size


@functools.lru_cache(_KEPT_HEADERS)
def _lookup_response_fields(head: bytes) -> tuple[int, _Sizes, np.dtype[Any]]:
    header = parse(ps_pb2.LookupResponse, head)
    sizes = tuple((batch.table, batch.rows, batch.dim) for batch in header.tables)
    return header.incarnation, sizes, float_dtype(header.rows_type)


def pack_lookup_request(parts: Sequence[IdPart], *, float16: bool = False) -> bytes:
    """Encode a LookupRequest."""
    head = _lookup_request_head(tuple([(part.table, part.ids.size, 0) for part in parts]), float16)
    return b"".join([head, *[part.ids.data for part in parts]])


def unpack_lookup_request(data: bytes) -> tuple[list[IdPart], list[int], bool]:
    """Decode a LookupRequest.

    Returns:
        The parts (ids are views of `data`), per part the dim the caller expects (0: any), whether it wants float16.
    """
    head, payload = split(ps_pb2.LookupRequest, data)
    sizes, float16 = _lookup_request_fields(head)
    arrays = cut("LookupRequest", payload, [(UINT64, rows) for _, rows, _ in sizes])
    parts = [IdPart(table, ids) for (table, _, _), ids in zip(sizes, arrays, strict=True)]
    return parts, [dim for _, _, dim in sizes], float16


def new_lookup_response(
    incarnation: int, parts: Sequence[IdPart], dims: Sequence[int], *, float16: bool = False
) -> tuple[bytes, list[FloatArray]]:
    """Make a LookupResponse whose rows are still to be written.

    Returns:
        The message, and per part float32|float16 [n, dim], a writable, possibly unaligned view of its rows.
    """
    sizes = tuple([(part.table, part.ids.size, dim) for part, dim in zip(parts, dims, strict=True)])
    head, size = _lookup_response_head(incarnation, sizes, float16)
    data = allocate(head, size)
    return data, _cut_rows((data, len(head)), sizes, FLOAT16 if float16 else FLOAT32)


def unpack_lookup_response(data: bytes) -> tuple[int, list[FloatArray]]:
    """Decode a LookupResponse that nobody else holds.

    Returns:
        The incarnation, and per table float32|float16 [n, dim], a writable view of `data`, aligned if the sender has
        padded the message, as Trilith's does.
    """
    head, payload = split(ps_pb2.LookupResponse, data)
    incarnation, sizes, dtype = _lookup_response_fields(head)
    return incarnation, _cut_rows(payload, sizes, dtype)


def _cut_rows(payload: Payload, sizes: _Sizes, dtype: np.dtype[Any]) -> list[FloatArray]:
    shapes = [(dtype, (rows, dim)) for _, rows, dim in sizes]
    return cut("LookupResponse", payload, shapes, writable=True)

"""Messages of dense variables."""

from __future__ import annotations

from collections.abc import Sequence

from trilith.rpc.wire.payload import FLOAT32, Payload, cut, pack, unpack
from trilith.rpc.wire.update import unpack_write, write_id
from trilith.shard import ANY_WRITE, DensePart, Float32Array, Write
from trilith_proto import ps_pb2

__all__ = [
    "pack_create_variables",
    "pack_dense_update",
    "pack_pulled",
    "unpack_create_variables",
    "unpack_dense_update",
    "unpack_pulled",
]


def _cut_partitions(what: str, sizes: Sequence[int], payload: Payload) -> list[Float32Array]:
    return cut(what, payload, [(FLOAT32, size) for size in sizes])


def pack_create_variables(
    specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array], write: Write = ANY_WRITE
) -> bytes:
    """Encode a CreateVariablesRequest."""
    header = ps_pb2.CreateVariablesRequest(variables=specs, write=write_id(write), incarnation=write.incarnation)
    return pack(header, *initial)


def unpack_create_variables(data: bytes) -> tuple[ps_pb2.CreateVariablesRequest, list[Float32Array]]:
    """Decode a CreateVariablesRequest: its header and the initial values, read-only views of `data`."""
    header, payload = unpack(ps_pb2.CreateVariablesRequest, data)
    return header, _cut_partitions("CreateVariablesRequest", [spec.size for spec in header.variables], payload)


def pack_dense_update(parts: Sequence[DensePart], write: Write, *, learning_rate: float = 0.0) -> bytes:
    """Encode a DenseUpdateRequest."""
    header = ps_pb2.DenseUpdateRequest(
        write=write_id(write),
        global_step=write.global_step,
        advance=write.advance,
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
    write = unpack_write(
        header.write,
        header.incarnation,
        global_step=header.global_step,
        advance=header.advance,
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

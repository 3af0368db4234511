"""Files of a sliding filter: one per split, each a TFRecord file of a meta record and chunks of cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from trilith.data.formats.tfrecord import RecordWriter
from trilith.errors import CheckpointError
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.kernels import filters as kernels
from trilith_services.ps.reference.shard_files import (
    create_file,
    find_shard_files,
    read_payloads,
    shard_file_name,
)

if TYPE_CHECKING:
    from trilith_services.ps.engine.filters import SlidingFilter

__all__ = ["read_filter_meta", "restore_filter", "save_filter"]

_CHUNK = 10_000
_FILL = 1.2
# An empty cell in a serialized HashFilterSplitDataDump: the tag of `data`, and 0.
_EMPTY_CELL = b"\x10\x00"

_M = TypeVar("_M", bound=Message)


def save_filter(sliding: SlidingFilter, base: str) -> None:
    """Write `<base>-NNNNN-of-NNNNN`, one file per split.

    With fewer splits than blocks (a filter has at least 5 blocks) file i holds blocks i, i + splits, ... in order.
    """
    shared = _shared_meta(sliding)
    for split in range(sliding.split_num):
        with create_file(shard_file_name(base, split, sliding.split_num)) as file:
            writer = RecordWriter(file)
            for block in range(split, sliding.blocks, sliding.split_num):
                cells, elements = sliding.export_block(block)
                meta = hash_table_pb2.HashFilterSplitMetaDump(
                    failure_count=0,
                    total_size=sliding.total,
                    num_elements=elements,
                    fill_rate=_FILL,
                    sliding_hash_filter_meta=shared,
                )
                writer.write_all([meta.SerializeToString()])
                for offset in range(0, cells.size, _CHUNK):
                    writer.write_all([_chunk(cells, offset)])
            writer.close()


def restore_filter(sliding: SlidingFilter, base: str) -> None:
    """Read what `save_filter` wrote; the filter is unchanged if anything is missing, damaged or of another shape."""
    files = find_shard_files(base)
    if len(files) != sliding.split_num:
        raise CheckpointError(f"{base}: {len(files)} files, and this filter has split_num={sliding.split_num}")
    cells = np.zeros((sliding.blocks, sliding.total + kernels.EXTRA_CELLS), np.uint16)
    state = np.zeros(kernels.SLIDING_WORDS + sliding.blocks, np.int64)
    for split, name in enumerate(files):
        payloads = read_payloads(name)
        for block in range(split, sliding.blocks, sliding.split_num):
            meta = _parse(next(payloads, None), hash_table_pb2.HashFilterSplitMetaDump, name)
            _check_meta(sliding, meta, name)
            _read_cells(payloads, cells[block], name)
            shared = meta.sliding_hash_filter_meta
            state[: kernels.SLIDING_WORDS] = shared.head, shared.head_increment, shared.failure_count
            state[kernels.SLIDING_WORDS + block] = meta.num_elements
        if next(payloads, None) is not None:
            raise CheckpointError(f"{name}: more records than this filter has cells")
    sliding.import_all(state, cells)


def read_filter_meta(name: str) -> hash_table_pb2.HashFilterSplitMetaDump:
    """The first record of one filter file."""
    return _parse(next(read_payloads(name), None), hash_table_pb2.HashFilterSplitMetaDump, name)


def _shared_meta(sliding: SlidingFilter) -> hash_table_pb2.SlidingHashFilterMetaDump:
    state = sliding.export_state()
    return hash_table_pb2.SlidingHashFilterMetaDump(
        split_num=sliding.split_num,
        max_forward_step=2,
        max_backward_step=sliding.blocks - 2,
        max_step=kernels.SLIDING_STEPS,
        head=int(state[kernels.HEAD]),
        head_increment=int(state[kernels.MOVES]) & 0xFFFFFFFF,
        failure_count=int(state[kernels.SLIDING_FAILURES]),
    )


def _chunk(cells: npt.NDArray[np.uint16], offset: int) -> bytes:
    """A serialized HashFilterSplitDataDump of the cells from `offset` on."""
    data = cells[offset : offset + _CHUNK]
    if not data.any():
        return _empty_chunk(offset, data.size)
    return hash_table_pb2.HashFilterSplitDataDump(offset=offset, data=data.tolist()).SerializeToString()


def _empty_chunk(offset: int, size: int) -> bytes:
    """The same of `size` empty cells. Most of a large filter is such chunks, and most of the time went into them."""
    return hash_table_pb2.HashFilterSplitDataDump(offset=offset).SerializeToString() + _EMPTY_CELL * size


def _check_meta(sliding: SlidingFilter, meta: hash_table_pb2.HashFilterSplitMetaDump, name: str) -> None:
    shared = meta.sliding_hash_filter_meta
    wanted = {
        "split_num": (shared.split_num, sliding.split_num),
        "max_forward_step": (shared.max_forward_step, 2),
        "max_backward_step": (shared.max_backward_step, sliding.blocks - 2),
        "max_step": (shared.max_step, kernels.SLIDING_STEPS),
        "total_size": (meta.total_size, sliding.total),
    }
    for field, (found, wants) in wanted.items():
        if found != wants:
            raise CheckpointError(f"{name}: {field}={found}, and this filter has {wants}")
    if not 0 <= shared.head < sliding.blocks:
        raise CheckpointError(f"{name}: head={shared.head} of {sliding.blocks} blocks")
    if not 0 <= meta.num_elements <= sliding.block_capacity:
        raise CheckpointError(f"{name}: {meta.num_elements} elements in a block of {sliding.block_capacity}")


def _read_cells(payloads: Iterator[bytes], cells: npt.NDArray[np.uint16], name: str) -> None:
    at = 0
    while at < cells.size:
        payload = next(payloads, None)
        due = min(_CHUNK, cells.size - at)
        # Empty cells are left alone: parsing takes time, and writing zeros commits memory.
        if payload is not None and payload == _empty_chunk(at, due):
            at += due
            continue
        chunk = _parse(payload, hash_table_pb2.HashFilterSplitDataDump, name)
        data = np.asarray(chunk.data, np.uint32)
        if chunk.offset != at or not data.size or at + data.size > cells.size or data.max() > 0xFFFF:
            raise CheckpointError(f"{name}: cells {chunk.offset} to {chunk.offset + data.size} where {at} was due")
        cells[at : at + data.size] = data
        at += data.size


def _parse(payload: bytes | None, kind: type[_M], name: str) -> _M:
    if payload is None:
        raise CheckpointError(f"{name}: ends before a {kind.__name__}")
    try:
        return kind.FromString(payload)
    except DecodeError:
        raise CheckpointError(f"{name}: a record is no {kind.__name__}") from None

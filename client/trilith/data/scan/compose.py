"""Examples and ExampleBatches written of columns, without message objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.scan.encode import put_fields, put_varint, varint_size
from trilith.data.scan.wire import copy_bytes, i64_at, put_i64
from trilith.ops.jit import kernel, part
from trilith.ops.memory import load_u8

__all__ = ["compose_batch", "compose_examples"]

if TYPE_CHECKING:
    _uint8: Any
    _uint64: Any
else:
    _uint8 = np.uint8
    _uint64 = np.uint64

_NAMED = 1 << 3 | 2
_FEATURE = 2 << 3 | 2
_LINE_ID = 100 << 3 | 2
_BATCH_SIZE = 3 << 3


@part()
def put_list(out: int, fields: int, row: int, member: int, scratch: int) -> int:
    """Write a Feature that holds one list, as field 2 of what it is in; the position behind it.

    Args:
        out: Where to write.
        fields: Address of int64[6]: the list, as for `put_fields`.
        row: Number of the row.
        member: Number of the list in Feature.
        scratch: Address of room for the list, and 64 bytes.
    """
    size = put_fields(scratch, fields, 1, row) - scratch
    out = put_varint(out, _uint64(_FEATURE))
    out = put_varint(out, _uint64(1 + varint_size(_uint64(size)) + size))
    out = put_varint(out, _uint64(member << 3 | 2))
    out = put_varint(out, _uint64(size))
    copy_bytes(out, scratch, size)
    return out + size


@part()
def put_named(out: int, begin: int, size: int, frame: int) -> int:
    """Write features with what stands in front of and behind them, as field 1; the position behind them.

    Args:
        out: Where to write.
        begin: Where the features are.
        size: Their bytes.
        frame: Address of int64[5]: address and length of what stands in front, and of what stands behind.
    """
    head_size, tail_size = i64_at(frame, 1), i64_at(frame, 3)
    out = put_varint(out, _uint64(_NAMED))
    out = put_varint(out, _uint64(head_size + size + tail_size))
    copy_bytes(out, i64_at(frame, 0), head_size)
    copy_bytes(out + head_size, begin, size)
    copy_bytes(out + head_size + size, i64_at(frame, 2), tail_size)
    return out + head_size + size + tail_size


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def compose_batch(
    first: int, last: int, lists: int, frames: int, count: int, scratch: int, features: int, out: int
) -> int:
    """Write some rows of columns as one ExampleBatch.

    Args:
        first: Number of the first row.
        last: Number of the row behind the last.
        lists: Address of int64[count, 6], as for `compose_examples`.
        frames: Address of int64[count, 5], as there, of a NamedFeatureList each.
        count: Number of columns.
        scratch: Address of room for one list, and 64 bytes.
        features: Address of room for all features of a column, and 64 bytes.
        out: Address of room for the batch, and 64 bytes; written.

    Returns:
        Bytes of the batch.
    """
    begin = out
    for f in range(count):
        end = features
        for row in range(first, last):
            end = put_list(end, lists + 48 * f, row, i64_at(frames, 5 * f + 4), scratch)
        out = put_named(out, features, end - features, frames + 40 * f)
    out = put_varint(out, _uint64(_BATCH_SIZE))
    return put_varint(out, _uint64(last - first)) - begin


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def compose_examples(
    rows: int,
    lists: int,
    frames: int,
    count: int,
    line: int,
    line_count: int,
    top: int,
    top_count: int,
    scratch: int,
    feature: int,
    out: int,
    offsets: int,
    lengths: int,
) -> None:
    """Write Examples of columns, one behind another.

    Args:
        rows: Number of Examples.
        lists: Address of int64[count, 6]: the list of each named feature, as for `put_fields`; its flags say which rows
            have the feature.
        frames: Address of int64[count, 5]: address and length of what stands in front of a feature in its
            NamedFeature, and of what stands behind; the number of the list in Feature.
        count: Number of named features.
        line: Address of int64[line_count, 6], fields of LineId.
        line_count: Their number.
        top: Address of int64[top_count, 6], fields of the Example behind its LineId.
        top_count: Their number.
        scratch: Address of room for one list or LineId, and 64 bytes.
        feature: Address of room for one feature, and 64 bytes.
        out: Address of room for all, and 64 bytes; written.
        offsets: Address of int64[rows], written.
        lengths: Address of int64[rows], written.
    """
    begin = out
    for row in range(rows):
        start = out
        for f in range(count):
            flags = i64_at(lists, 6 * f + 4)
            if flags != 0 and load_u8(flags, row) == _uint8(0):
                continue
            end = put_list(feature, lists + 48 * f, row, i64_at(frames, 5 * f + 4), scratch)
            out = put_named(out, feature, end - feature, frames + 40 * f)
        if line_count:
            size = put_fields(scratch, line, line_count, row) - scratch
            out = put_varint(out, _uint64(_LINE_ID))
            out = put_varint(out, _uint64(size))
            copy_bytes(out, scratch, size)
            out += size
        out = put_fields(out, top, top_count, row)
        put_i64(offsets, row, start - begin)
        put_i64(lengths, row, out - start)

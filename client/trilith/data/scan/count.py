"""How many named features each record has, wanted or not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.data.records import Kind, Records
from trilith.data.scan.wire import i64_at, put_i64, read_tag, skip_field
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of

__all__ = ["count_named"]

_TAGS = {Kind.EXAMPLE: 1 << 3 | 2, Kind.INSTANCE: 9 << 3 | 2}
"""Of the repeated field that holds the named features."""


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _count_fields(buffer: int, offsets: int, lengths: int, rows: int, wanted: int, counts: int) -> None:
    """Count a field in each of some messages; one that is damaged is counted as far as it can be read."""
    for row in range(rows):
        p = buffer + i64_at(offsets, row)
        end = p + i64_at(lengths, row)
        found = 0
        while 0 <= p < end:
            tag, p = read_tag(p, end)
            if p < 0:
                break
            p = skip_field(tag, p, end, 0)
            if p >= 0 and tag == wanted:
                found += 1
        put_i64(counts, row, found)


def count_named(records: Records) -> npt.NDArray[np.int64]:
    """int64[n]: named features of each of some Examples or Instances, which were found sound before."""
    offsets, lengths = np.ascontiguousarray(records.offsets), np.ascontiguousarray(records.lengths)
    counts = np.empty(len(records), np.int64)
    _count_fields(
        address_of(records.buffer),
        address_of(offsets),
        address_of(lengths),
        len(records),
        _TAGS[records.kind],
        address_of(counts),
    )
    return counts

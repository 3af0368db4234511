"""Slow, plain twins of the kernels: each is the definition of right for the compiled function of its name."""

from __future__ import annotations

import numpy as np

# ==== trilith.ops.dedup: splitting a batch by owner, and putting it together again ====================================


def split_distinct(ids, shards):
    """Per shard: distinct ids by first occurrence, and how often each occurs."""
    owned = [{} for _ in range(shards)]
    for each in ids.tolist():
        counts = owned[each % shards]
        counts[each] = counts.get(each, 0) + 1
    return [list(counts) for counts in owned], [list(counts.values()) for counts in owned]


def split_by_owner(ids, shards):
    """Per shard: its ids in order, repeats included."""
    return [[each for each in ids.tolist() if each % shards == s] for s in range(shards)]


def gather_rows(ids, row_of):
    """Row i for ids[i]."""
    return np.stack([row_of[each] for each in ids.tolist()]) if ids.size else None


def summed_rows(ids, values):
    """By id: the float32 sum of its rows, added up in input order."""
    sums = {}
    for each, row in zip(ids.tolist(), values, strict=True):
        sums[each] = row.copy() if each not in sums else np.float32(sums[each] + row)
    return sums


def last_rows(ids, values):
    """By id: the last of its rows."""
    return dict(zip(ids.tolist(), values, strict=True))

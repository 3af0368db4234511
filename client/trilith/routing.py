"""Who owns what: ids by unsigned value, partitions of dense variables by a checksum of the name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.shard import UInt64Array

__all__ = ["MAX_PARTITION_FLOATS", "OWNER_RULE", "owners", "partition_owner", "partition_sizes"]

OWNER_RULE = "mod"
"""The owner of an id is its value as an unsigned 64-bit number, modulo the number of PS."""

MAX_PARTITION_FLOATS = 1 << 20
"""Dense variables over 4 MiB are cut into one partition per PS."""


def owners(ids: UInt64Array, count: int) -> npt.NDArray[np.int64]:
    """int64[n]: the shard that owns each id, uint64[n], among `count` shards."""
    return (ids % np.uint64(count)).astype(np.int64)


def partition_sizes(floats: int, count: int) -> list[int]:
    """Floats in each partition of a variable, on a cluster of `count` PS.

    Sizes differ by at most one, the larger ones first; a partition is never empty unless the variable is.
    """
    parts = min(count, max(floats, 1)) if floats > MAX_PARTITION_FLOATS else 1
    return [floats // parts + (part < floats % parts) for part in range(parts)]


def partition_owner(name: str, partition: int, count: int) -> int:
    """The shard that owns a partition of a dense variable."""
    import google_crc32c

    return int((google_crc32c.value(name.encode()) + partition) % count)

"""Standby PS: started beyond the number a cluster needs, they wait for a place to become free, and take it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trilith.discovery import PS
from trilith.discovery.record import ClusterRecord
from trilith.discovery.zk_directory import ZooKeeperDirectory
from trilith.routing import OWNER_RULE

__all__ = ["wait_for_place"]

log = logging.getLogger(__name__)

_POLL_S = 0.1


def wait_for_place(
    directory: ZooKeeperDirectory,
    count: int,
    *,
    after_s: float,
    cancelled: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
) -> int | None:
    """Wait until a shard has had no PS for a while, and claim its place, for as long as the directory is open.

    Of N + R that wait, the first N get places and the cluster serves; the others stand by until one of those is gone
    for longer than a restart takes.

    Args:
        directory: Where PS register; stays open while the place is kept.
        count: Shards in the cluster.
        after_s: For how long a shard must have had no PS.
        cancelled: Waits so many seconds; true when waiting shall end.
        clock: Seconds.

    Returns:
        The shard's index; None if cancelled.

    Raises:
        ClusterMismatchError: The cluster is recorded with another number of PS.
    """
    directory.agree(ClusterRecord(num_ps=count, owner_rule=OWNER_RULE), "this standby PS")
    log.info("standing by", extra={"shards": count})
    empty_since: dict[int, float] = {}
    while True:
        registered = directory.query(PS)
        now = clock()
        for index in range(count):
            if index in registered:
                empty_since.pop(index, None)
            elif now - empty_since.setdefault(index, now) >= after_s and directory.claim(PS, index):
                if index not in directory.query(PS):
                    log.info("taking a place", extra={"index": index})
                    return index
                directory.unclaim(PS, index)
        if cancelled(_POLL_S):
            return None

"""String queues on the cluster: what workers take their share of the work from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from trilith.cluster import Cluster
from trilith.errors import InvalidRequestError
from trilith.shard import Dequeued, Shard

__all__ = ["QUEUE_SHARD", "Queues"]

_T = TypeVar("_T")

QUEUE_SHARD = 0
"""The PS that holds all queues, so that dequeuing from several of them is one step."""


class Queues:
    """The queues of a cluster, by name; first in, first out. Thread-safe.

    A dequeued element is leased to a worker. It is handed out again when the lease lapses before the worker
    acknowledges it or holds its leases, so none is lost with a worker. Queues are part of checkpoints.
    """

    def __init__(self, cluster: Cluster) -> None:
        """Use `Client.queues`."""
        self._cluster = cluster

    def _call(self, call: Callable[[Shard], _T]) -> _T:
        return self._cluster.fan_out([QUEUE_SHARD], lambda _, shard: call(shard))[QUEUE_SHARD]

    def create(self, name: str, elements: Iterable[str] = (), *, capacity: int = 0) -> bool:
        """Create a queue.

        Args:
            name: Any text.
            elements: What it holds at first.
            capacity: Most elements it may hold, leased ones included; 0 is 100,000.

        Returns:
            Whether this call created it; one that exists keeps what it holds.
        """
        _check_number(f"queue {name!r}: capacity", capacity)
        write, first = self._cluster.write(QUEUE_SHARD), _strings(elements)
        return self._call(lambda shard: shard.create_queue(name, first, write, capacity=capacity))

    def enqueue(self, name: str, elements: Iterable[str]) -> None:
        """Append elements, all or, with QueueFullError, none."""
        write, more = self._cluster.write(QUEUE_SHARD), _strings(elements)
        self._call(lambda shard: shard.enqueue(name, more, write))

    def dequeue(self, names: str | Sequence[str], worker: str, *, lease_s: float, claim: str = "") -> Dequeued:
        """Take the next element.

        Args:
            names: Queues; the first that has an element gives it.
            worker: Who takes it: a name that no other worker has.
            lease_s: Seconds until it is handed out again; 0 consumes it at once.
            claim: Take this very element if it waits or is this worker's already.
        """
        _check_seconds(lease_s)
        write = self._cluster.write(QUEUE_SHARD)
        queues = [names] if isinstance(names, str) else list(names)
        return self._call(lambda shard: shard.dequeue(queues, worker, write, lease_s=lease_s, claim=claim))

    def acknowledge(self, worker: str, lease: int, *, queue: str = "", elements: Iterable[str] = ()) -> bool:
        """Say that a leased element is done.

        Args:
            worker: Who leased it.
            lease: The lease.
            queue: Where `elements` go, at the same moment.
            elements: What came of the element, if anything.

        Returns:
            Whether the lease was still held; if not, nothing was done, and another worker may be at the element.
        """
        _check_number("lease", lease)
        write, more = self._cluster.write(QUEUE_SHARD), _strings(elements)
        return self._call(lambda shard: shard.acknowledge(worker, lease, write, queue=queue, elements=more))

    def hold_leases(self, worker: str, lease_s: float) -> int:
        """Prolong a worker's leases; returns how many it has."""
        return self._hold(worker, lease_s)

    def release_leases(self, worker: str) -> int:
        """Hand out again, at once, what a worker has leased: it stops or died. Returns how many elements those are."""
        return self._hold(worker, 0.0)

    def _hold(self, worker: str, lease_s: float) -> int:
        _check_seconds(lease_s)
        write = self._cluster.write(QUEUE_SHARD)
        return self._call(lambda shard: shard.hold_leases(worker, lease_s, write))


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63:
        raise InvalidRequestError(f"{what}={value!r} is no whole number from 0 to {2**63 - 1}")


def _check_seconds(value: Any) -> None:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise InvalidRequestError(f"lease_s={value!r}; finite seconds from 0 are needed")


def _strings(elements: Iterable[str]) -> list[str]:
    if isinstance(elements, str):
        raise InvalidRequestError(f"elements={elements!r} is one string; a sequence of them is needed")
    return list(elements)

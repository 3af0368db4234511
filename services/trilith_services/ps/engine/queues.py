"""Queues of strings that workers share: who has leased which element, and what waits."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trilith.errors import InvalidRequestError, QueueFullError, UnknownQueueError
from trilith.shard import Dequeued
from trilith_services.ps.engine.budget import MemoryBudget

__all__ = ["DEFAULT_CAPACITY", "LeasedQueues", "QueueState"]

DEFAULT_CAPACITY = 100_000
_POINTER = 8  # bytes of a place in a queue


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue as a checkpoint keeps it.

    Attributes:
        name: Of the queue.
        capacity: Most elements it may hold.
        waiting: Elements in order.
        leased: (lease, worker, seconds it was given for, element) of those that workers are at.
    """

    name: str
    capacity: int
    waiting: tuple[str, ...]
    leased: tuple[tuple[int, str, float, str], ...]


@dataclass(slots=True)
class _Lease:
    number: int
    queue: _Queue
    worker: str
    element: str
    seconds: float
    ends: float


class _Queue:
    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self.waiting: deque[str] = deque()
        self.leased = 0

    def check_room(self, more: int) -> None:
        held = len(self.waiting) + self.leased
        if held + more > self.capacity:
            raise QueueFullError(
                f"queue {self.name!r} holds {held} elements; {more} more would exceed its capacity of {self.capacity}"
            )


class LeasedQueues:
    """First in, first out; an element is with one worker at a time, and none is lost with a worker.

    A dequeued element is leased. Acknowledging it in time removes it; a lease that lapses puts it back at the front. So
    every element is worked on at least once, and by one worker only as long as workers keep their leases. Thread-safe.
    """

    def __init__(self, budget: MemoryBudget | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make an empty set of queues; `budget` is what elements are charged to, `clock` gives seconds."""
        self._budget = budget if budget is not None else MemoryBudget(0)
        self._bytes = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._queues: dict[str, _Queue] = {}
        self._leases: dict[int, _Lease] = {}
        self._numbers = itertools.count(1)

    def create(self, name: str, elements: Iterable[str] = (), capacity: int = 0) -> bool:
        """Create a queue holding `elements`; False if it exists, which then stays as it is."""
        if not name:
            raise InvalidRequestError("a queue needs a name")
        if not 0 <= capacity < 2**63:
            raise InvalidRequestError(f"queue {name!r}: capacity={capacity} is outside 0..{2**63 - 1}")
        first = list(elements)
        with self._lock:
            if name in self._queues:
                return False
            queue = _Queue(name, capacity or DEFAULT_CAPACITY)
            queue.check_room(len(first))
            self._take(name, first)
            queue.waiting.extend(first)
            self._queues[name] = queue
            return True

    def enqueue(self, name: str, elements: Sequence[str]) -> None:
        """Append elements, all or, with QueueFullError or MemoryLimitError, none."""
        with self._lock:
            queue = self._find(name)
            queue.check_room(len(elements))
            self._take(name, elements)
            queue.waiting.extend(elements)

    def dequeue(self, names: Sequence[str], worker: str, lease_s: float, claim: str = "") -> Dequeued:
        """See `Shard.dequeue`."""
        if not names:
            raise InvalidRequestError("dequeue needs the name of a queue")
        _check_seconds(lease_s)
        with self._lock:
            queues = [self._find(name) for name in names]
            self._end_lapsed()
            if claim:
                return self._claim(queues, worker, lease_s, claim)
            for queue in queues:
                if queue.waiting:
                    return self._give(queue, queue.waiting.popleft(), worker, lease_s)
            return Dequeued(exhausted=not any(queue.leased for queue in queues))

    def _claim(self, queues: Sequence[_Queue], worker: str, lease_s: float, claim: str) -> Dequeued:
        for lease in self._leases.values():
            if lease.worker == worker and lease.element == claim and lease.queue in queues:
                lease.seconds, lease.ends = lease_s, self._clock() + lease_s
                return Dequeued(lease.queue.name, claim, lease.number)
        for queue in queues:
            if claim in queue.waiting:
                queue.waiting.remove(claim)
                return self._give(queue, claim, worker, lease_s)
        return Dequeued()

    def _give(self, queue: _Queue, element: str, worker: str, lease_s: float) -> Dequeued:
        if lease_s == 0:
            self._give_up([element])
            return Dequeued(queue.name, element)
        number = next(self._numbers)
        self._leases[number] = _Lease(number, queue, worker, element, lease_s, self._clock() + lease_s)
        queue.leased += 1
        return Dequeued(queue.name, element, number)

    def acknowledge(self, worker: str, lease: int, name: str = "", elements: Sequence[str] = ()) -> bool:
        """See `Shard.acknowledge`."""
        with self._lock:
            held = self._leases.get(lease)
            if held is None or held.worker != worker:
                return False
            if elements:
                target = self._find(name)
                target.check_room(len(elements) - (target is held.queue))
                self._take(name, elements)
                target.waiting.extend(elements)
            self._give_up([held.element])
            self._drop(held)
            return True

    def hold(self, worker: str, lease_s: float) -> int:
        """See `Shard.hold_leases`."""
        _check_seconds(lease_s)
        with self._lock:
            mine = [lease for lease in self._leases.values() if lease.worker == worker]
            if lease_s == 0:
                self._give_back(mine)
            for lease in mine:
                lease.seconds, lease.ends = lease_s, self._clock() + lease_s
            return len(mine)

    def _end_lapsed(self) -> None:
        now = self._clock()
        self._give_back([lease for lease in self._leases.values() if lease.ends <= now])

    def _give_back(self, leases: Sequence[_Lease]) -> None:
        for lease in reversed(leases):  # the oldest lease comes first again
            lease.queue.waiting.appendleft(lease.element)
            self._drop(lease)

    def _drop(self, lease: _Lease) -> None:
        del self._leases[lease.number]
        lease.queue.leased -= 1

    def _take(self, name: str, elements: Sequence[str]) -> None:
        """Account for elements, or refuse them."""
        size = _bytes(elements)
        if size:
            self._budget.take(size, f"queue {name!r}: {len(elements)} elements")
            self._bytes += size

    def _give_up(self, elements: Sequence[str]) -> None:
        size = _bytes(elements)
        self._budget.add(-size)
        self._bytes -= size

    def _find(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            raise UnknownQueueError(f"no queue {name!r}; this PS has {sorted(self._queues)}")
        return queue

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def export(self) -> list[QueueState]:
        """Every queue as it is now."""
        with self._lock:
            return [
                QueueState(
                    name=queue.name,
                    capacity=queue.capacity,
                    waiting=tuple(queue.waiting),
                    leased=tuple(
                        (lease.number, lease.worker, lease.seconds, lease.element)
                        for lease in self._leases.values()
                        if lease.queue is queue
                    ),
                )
                for queue in self._queues.values()
            ]

    def replace(self, states: Iterable[QueueState]) -> None:
        """Put what a checkpoint holds in the place of everything; leases begin anew, as their workers may live."""
        with self._lock:
            now = self._clock()
            self._queues.clear()
            self._leases.clear()
            for state in states:
                queue = self._queues[state.name] = _Queue(state.name, state.capacity)
                queue.waiting.extend(state.waiting)
                queue.leased = len(state.leased)
                for number, worker, seconds, element in state.leased:
                    self._leases[number] = _Lease(number, queue, worker, element, seconds, now + seconds)
            self._numbers = itertools.count(max(self._leases, default=0) + 1)
            size = sum(_bytes(queue.waiting) for queue in self._queues.values())
            size += _bytes([lease.element for lease in self._leases.values()])
            self._budget.add(size - self._bytes)
            self._bytes = size


def _bytes(elements: Iterable[str]) -> int:
    """What elements take, about."""
    return sum([sys.getsizeof(element) + _POINTER for element in elements])


def _check_seconds(lease_s: float) -> None:
    if not 0 <= lease_s < math.inf:
        raise InvalidRequestError(f"lease_s={lease_s}; finite seconds from 0 are needed")

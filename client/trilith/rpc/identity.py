"""Identity: how one client's writes to one shard are named, so that a repeated one is not done twice."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque

from trilith.shard import Ticket, Write

__all__ = ["OPEN_WRITES", "Identity"]

OPEN_WRITES = 1 << 16
"""Beyond so many younger writes an open one counts as given up, and a shard that has not done it never will."""

_IDLE_S = 1800.0  # well below the hour after which a shard takes an unknown id for one that it has forgotten
# Goes on while the machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class _Open(Ticket):
    """One sequence that may be sent, or sent again: until it is closed, or the last `Write` that holds it is gone."""

    __slots__ = ("_closed", "_sequence")

    def __init__(self, closed: deque[int], sequence: int) -> None:
        self._closed: deque[int] | None = closed
        self._sequence = sequence

    def close(self) -> None:
        closed, self._closed = self._closed, None
        if closed is not None:
            closed.append(self._sequence)  # no lock: this may run in the middle of anything, as `__del__`

    def __del__(self) -> None:
        self.close()


class Identity:
    """One client at one shard: an id, and sequences from 1 of which it knows those still open. Thread-safe."""

    def __init__(self, origin: int, shard_time: float = 0.0) -> None:
        """Take an id.

        Args:
            origin: The shard's index.
            shard_time: Unix seconds by the shard's clock; 0: it did not say.
        """
        self._origin = origin
        self._lock = threading.Lock()
        self.renew(shard_time)

    @property
    def shard_time(self) -> float:
        """Unix seconds by the shard's clock, about; 0: unknown. Takes no lock, which a fork may have left held."""
        return self._offset + time.clock_gettime(_CLOCK) if self._offset else 0.0

    def renew(self, shard_time: float) -> None:
        """Take another id: the shard may have forgotten the one there was. Writes named so far keep theirs."""
        with self._lock:
            self._offset = shard_time - time.clock_gettime(_CLOCK) if shard_time else 0.0
            self._take(time.clock_gettime(_CLOCK))

    def _take(self, now: float) -> None:
        self._client_id = secrets.randbits(63) | 1
        self._started = int(1e6 * (self._offset + now)) if self._offset else 0
        self._used = now
        self._next = 1
        self._open: dict[int, None] = {}  # in ascending order
        self._closed: deque[int] = deque()

    def write(
        self,
        *,
        incarnation: int = 0,
        global_step: int = 0,
        advance: int = 0,
        request_time: int = 0,
        allow_non_finite: bool = False,
    ) -> Write:
        """Name the next write."""
        now = time.clock_gettime(_CLOCK)
        with self._lock:
            if now - self._used > _IDLE_S:
                self._take(now)
            self._used = now
            sequence, self._next = self._next, self._next + 1
            self._open[sequence] = None
            while self._closed:
                self._open.pop(self._closed.popleft(), None)
            lowest = next(iter(self._open))
            while sequence - lowest >= OPEN_WRITES:
                del self._open[lowest]
                lowest = next(iter(self._open))
            return Write(
                client_id=self._client_id,
                sequence=sequence,
                lowest_open=lowest,
                client_started=self._started,
                origin=self._origin,
                incarnation=incarnation,
                global_step=global_step,
                advance=advance,
                request_time=request_time,
                allow_non_finite=allow_non_finite,
                ticket=_Open(self._closed, sequence),
            )

"""Kept: connections that calls share, few at a time, opened by whoever needs one first and closed when idle."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from trilith.errors import DeadlineExceededError
from trilith.runtime.forks import renew_in_children

__all__ = ["Kept"]

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(slots=True, eq=False)
class _Slot(Generic[_V]):
    """One connection, or the attempt to make it; `used` is when it was last given back, by the monotonic clock."""

    value: Future[_V] = field(default_factory=Future)
    users: int = 0
    used: float = 0.0


class Kept(Generic[_K, _V]):
    """Connections by key. Thread-safe; nobody waits for a connection that is made for another key.

    Those that nobody uses are closed after a while, and when there are too many, the longest unused first.
    """

    def __init__(
        self, make: Callable[[_K, float], _V], close: Callable[[_V], None], *, most: int = 16, idle_s: float = 60.0
    ) -> None:
        """Begin without any.

        Args:
            make: Connects, within so many seconds.
            close: Ends a connection; must not wait for long.
            most: To be kept when nobody uses them.
            idle_s: Seconds without use after which one is closed.
        """
        self._make, self._close = make, close
        self._most, self._idle_s = most, idle_s
        self._slots: OrderedDict[_K, _Slot[_V]] = OrderedDict()  # the last used last
        self.after_fork()
        renew_in_children(self)

    def after_fork(self) -> None:
        """Whoever held the lock, or was about to connect, is not in this process; connections renew themselves."""
        self._lock = threading.Lock()
        self._sweeper: threading.Timer | None = None
        for key, slot in list(self._slots.items()):
            slot.users = 0
            if not slot.value.done():
                del self._slots[key]

    def __len__(self) -> int:
        with self._lock:
            return len(self._slots)

    @contextmanager
    def use(self, key: _K, timeout_s: float) -> Iterator[_V]:
        """The connection of a key, which stays open as long as the body needs it.

        Raises:
            DeadlineExceededError: Another caller's attempt to connect takes longer than this one has time for.
            TrilithError: What connecting raised, here or for another who wanted the same.
        """
        with self._lock:
            slot = self._slots.get(key)
            mine = slot is None
            if slot is None:
                slot = self._slots[key] = _Slot()
            self._slots.move_to_end(key)
            slot.users += 1
        try:
            if mine:
                self._connect(key, slot, timeout_s)
            try:
                value = slot.value.result(timeout_s)
            except TimeoutError as error:
                if slot.value.done():  # it is what connecting raised
                    raise
                raise DeadlineExceededError(f"{key}: not connected within {timeout_s:g} s") from error
            yield value
        finally:
            self._give_back(slot)

    def _connect(self, key: _K, slot: _Slot[_V], timeout_s: float) -> None:
        try:
            slot.value.set_result(self._make(key, timeout_s))
        except BaseException as error:  # noqa: BLE001 - told to all who wait
            with self._lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
            slot.value.set_exception(error)

    def _give_back(self, slot: _Slot[_V]) -> None:
        with self._lock:
            slot.users -= 1
            slot.used = time.monotonic()
            idle = [key for key, each in self._slots.items() if not each.users]
            gone = [self._slots.pop(key) for key in idle[: max(len(self._slots) - self._most, 0)]]
            self._sweep_later()
        self._end(gone)

    def _sweep_later(self) -> None:
        if self._sweeper is None and self._slots:
            self._sweeper = threading.Timer(self._idle_s, self._sweep)
            self._sweeper.daemon = True
            self._sweeper.start()

    def _sweep(self) -> None:
        """Close what was not used for a while."""
        with self._lock:
            self._sweeper = None
            before = time.monotonic() - self._idle_s
            idle = [key for key, each in self._slots.items() if not each.users and each.used <= before]
            gone = [self._slots.pop(key) for key in idle]
            self._sweep_later()
        self._end(gone)

    def _end(self, gone: list[_Slot[_V]]) -> None:
        for each in gone:
            self._close(each.value.result())

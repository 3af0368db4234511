"""Connections: one to each process that the console asks, opened when it is first asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["Connections"]

K = TypeVar("K", bound=Hashable)
C = TypeVar("C")


class Connections(Generic[K, C]):
    """Connections by key. Thread-safe."""

    def __init__(self, connect: Callable[[K], C], disconnect: Callable[[C], None]) -> None:
        """Begin without any; neither function may wait."""
        self._connect, self._disconnect = connect, disconnect
        self._lock = threading.Lock()
        self._open: dict[K, C] = {}

    def get(self, key: K) -> C:
        """The connection of a key."""
        with self._lock:
            if key not in self._open:
                self._open[key] = self._connect(key)
            return self._open[key]

    def keep(self, keys: Iterable[K]) -> None:
        """Close all but the connections of these keys."""
        wanted = set(keys)
        with self._lock:
            gone = [self._open.pop(key) for key in self._open.keys() - wanted]
        for connection in gone:
            self._disconnect(connection)

    def close(self) -> None:
        """Close every connection."""
        self.keep([])

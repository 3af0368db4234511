"""Rooms: two kinds of visitors to one thing, any number of one kind at a time, never both kinds."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Room", "two_rooms"]


class Room:
    """A context manager: inside, visitors of this room are alone or among themselves.

    Who has to wait holds up later arrivals of both rooms, so neither kind can keep the other out. Entering takes about
    a microsecond.
    """

    def __init__(self, occupied: threading.Lock, turnstile: threading.Lock) -> None:
        self._occupied = occupied
        self._turnstile = turnstile
        self._mutex = threading.Lock()
        self._visitors = 0

    def __enter__(self) -> None:
        with self._turnstile, self._mutex:
            if self._visitors == 0:
                self._occupied.acquire()
            self._visitors += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            self._visitors -= 1
            if self._visitors == 0:
                self._occupied.release()


def two_rooms() -> tuple[Room, Room]:
    """Two rooms that exclude each other."""
    occupied, turnstile = threading.Lock(), threading.Lock()
    return Room(occupied, turnstile), Room(occupied, turnstile)

"""Clock: the time that a shard goes by, and the times that callers give it."""

from __future__ import annotations

from collections.abc import Callable

from trilith.times import check_ahead, whole_seconds

__all__ = ["Clock"]


class Clock:
    """Unix seconds, of which a shard has one source."""

    def __init__(self, source: Callable[[], float]) -> None:
        self._source = source

    def __call__(self) -> float:
        """Now, by this clock."""
        return self._source()

    def at(self, given: int, what: str = "request_time") -> int:
        """The Unix seconds that a caller gave, or this clock's if it gave 0; never far ahead of this clock."""
        now = self._source()
        if given == 0 and type(given) is int:
            return int(now)
        seconds = whole_seconds(given, what)
        check_ahead(seconds, now, what)
        return seconds

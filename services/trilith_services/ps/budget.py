"""MemoryBudget: what the tables of one PS may use together."""

from __future__ import annotations

import threading

__all__ = ["MemoryBudget"]

_SOFT_SHARE = 0.9


class MemoryBudget:
    """A running total of bytes in use against a hard limit; thread-safe.

    Attributes:
        limit: Bytes; 0 means none.
        soft_limit: Bytes from which a PS evicts what may be evicted; 0 means none.
        used: Bytes in use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.soft_limit = int(limit * _SOFT_SHARE)
        self.used = 0
        self._lock = threading.Lock()

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes stay within the limit."""
        return self.limit == 0 or self.used + size <= self.limit

    def add(self, size: int) -> None:
        """Account for `size` more bytes (fewer if negative)."""
        with self._lock:
            self.used += size

    @property
    def above_soft_limit(self) -> bool:
        """Whether it is time to evict."""
        return self.soft_limit > 0 and self.used > self.soft_limit

"""MemoryBudget: what one PS may use for what it keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["MemoryBudget"]

_SOFT_SHARE = 0.9


class MemoryBudget:
    """A running total of bytes in use against a hard limit; thread-safe.

    Attributes:
        limit: Bytes; 0 means none.
        soft_limit: Bytes from which a PS evicts what may be evicted; 0 means none.
        used: Bytes in use.
        reclaim: Gives back to the machine what freed rows use, and takes it off the account, before a request is
            refused for want of memory.
        free: Says how many bytes that would be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.soft_limit = int(limit * _SOFT_SHARE)
        self.used = 0
        self.reclaim: Callable[[], None] = lambda: None
        self.free: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes stay within the limit."""
        return self.limit == 0 or self.used + size <= self.limit

    def make_room(self, size: int) -> bool:
        """Whether `size` more bytes stay within the limit, perhaps once the memory of freed rows is given back."""
        if not self.has_room(size) and self.used + size - self.free() <= self.limit:
            self.reclaim()
        return self.has_room(size)

    def add(self, size: int) -> None:
        """Account for `size` more bytes (fewer if negative)."""
        with self._lock:
            self.used += size

    @property
    def above_soft_limit(self) -> bool:
        """Whether it is time to evict: freed rows are there for new ones."""
        return 0 < self.soft_limit < self.used and self.soft_limit < self.used - self.free()

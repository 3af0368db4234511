"""MemoryBudget: what one PS may use for what it keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trilith.errors import MemoryLimitError

__all__ = ["MemoryBudget"]

_SOFT_SHARE = 0.9


class MemoryBudget:
    """A running total of bytes in use against a hard limit; thread-safe.

    Attributes:
        limit: Bytes; 0 means none.
        soft_limit: Bytes from which a PS evicts what may be evicted; 0 means none.
        reserved: Bytes kept for writes under way.
        reclaim: Gives back to the machine what freed rows use, and takes it off the account, before a request is
            refused for want of memory.
        free: Says how many bytes that would be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.soft_limit = int(limit * _SOFT_SHARE)
        self.reserved = 0
        self._charged = 0
        self._others: list[Callable[[], int]] = []
        self.reclaim: Callable[[], None] = lambda: None
        self.free: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._charged + sum([other() for other in self._others])

    def watch(self, other: Callable[[], int]) -> None:
        """Count what `other` says that it uses: quickly, since it is asked with every write, and itself bounded."""
        self._others.append(other)

    def take(self, size: int, what: str) -> None:
        """Account for `size` more bytes, for good.

        Raises:
            MemoryLimitError: They exceed the limit; `what` says who needs them.
        """
        if not self.reserve(size) and not (self.make_room(size) and self.reserve(size)):
            raise MemoryLimitError(
                f"{what}: {size} more bytes are needed, but {self.used} of the {self.limit} bytes of this PS are in "
                "use; nothing was changed"
            )
        self.add(size)
        self.release(size)

    def reserve(self, size: int, *, wait: bool = False) -> bool:
        """Keep `size` more bytes for a write until `release`, unless they would exceed the limit.

        Args:
            size: Bytes.
            wait: Wait for other writes that keep what is missing and may not need it. A write reserves once, for all
                that it does, so none that waits keeps anything.

        Returns:
            Whether they are kept.
        """
        with self._lock:
            while self.limit and self.used + self.reserved + size > self.limit:
                if not wait or self.used + size > self.limit:
                    return False
                self._released.wait()
            self.reserved += size
        return True

    def make_room(self, size: int) -> bool:
        """Give the memory of freed rows back if `size` more bytes fit then; returns whether it was done."""
        if self.used + size - self.free() > self.limit:
            return False
        self.reclaim()
        return True

    def release(self, size: int) -> None:
        """Keep `size` bytes no longer: the write has ended, and what it used is accounted for."""
        with self._lock:
            self.reserved -= size
            self._released.notify_all()

    def add(self, size: int) -> None:
        """Account for `size` more bytes (fewer if negative)."""
        with self._lock:
            self._charged += size

    @property
    def above_soft_limit(self) -> bool:
        """Whether it is time to evict: freed rows are there for new ones."""
        return 0 < self.soft_limit < self.used and self.soft_limit < self.used - self.free()

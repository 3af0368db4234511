"""MemoryBudget: what one PS may use for what it keeps; and the room that writes of rows hold in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trilith.errors import MemoryLimitError
from trilith.shard import UInt64Array

__all__ = ["GrowingTable", "MemoryBudget", "RowWrite", "room_for"]

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


class GrowingTable(Protocol):
    """What `room_for` asks of a table."""

    name: str

    def new_rows(self, write: RowWrite) -> int:
        """How many rows a write may add at most."""

    def expect(self, rows: int, *, all_new: bool) -> int:
        """Count `rows` among those that writes under way may add; returns the bytes they take at most."""

    def unexpect(self, rows: int) -> None:
        """Undo `expect`: the write has ended."""


@dataclass(frozen=True, slots=True)
class RowWrite:
    """One table's part of a write that may add rows.

    Attributes:
        table: Whose rows.
        ids: uint64[n].
        counts: uint32[n] occurrences each id stands for, or None for one each.
        passed: Whether the table's filter has let all ids through, or is not asked.
    """

    table: GrowingTable
    ids: UInt64Array
    counts: npt.NDArray[np.uint32] | None = None
    passed: bool = False


@contextmanager
def room_for(budget: MemoryBudget, writes: Sequence[RowWrite]) -> Iterator[None]:
    """Hold the room that writes of rows need together, before the first row changes.

    Raises:
        MemoryLimitError: They do not fit, whatever other writes under way come to need.
    """
    if budget.limit == 0:
        yield
        return
    rows: dict[GrowingTable, int] = {}  # several parts may be of one table
    for write in writes:
        rows[write.table] = rows.get(write.table, 0) + len(write.ids)
    with _expected(rows, all_new=True) as size:
        if budget.reserve(size):
            try:
                yield
            finally:
                budget.release(size)
            return
    # Look more closely: most ids may have rows.
    rows = dict.fromkeys(rows, 0)
    for write in writes:
        rows[write.table] += write.table.new_rows(write)
    rows = {table: count for table, count in rows.items() if count}
    for again in (False, True):
        with _expected(rows, all_new=False) as size:
            if not rows or budget.reserve(size, wait=True):
                try:
                    yield
                finally:
                    budget.release(size)
                return
        if again or not budget.make_room(size):
            break
    names = ", ".join(repr(table.name) for table in rows)
    raise MemoryLimitError(
        f"table {names}: {sum(rows.values())} new rows need {size} bytes, but {budget.used} of the "
        f"{budget.limit} bytes of this PS are in use; nothing was written"
    )


@contextmanager
def _expected(rows: dict[GrowingTable, int], *, all_new: bool) -> Iterator[int]:
    """Within it so many rows by table are among those that writes under way may add; gives the bytes they take."""
    taken: list[tuple[GrowingTable, int]] = []
    try:
        size = 0
        for table, count in rows.items():
            size += table.expect(count, all_new=all_new)
            taken.append((table, count))
        yield size
    finally:
        for table, count in taken:
            table.unexpect(count)

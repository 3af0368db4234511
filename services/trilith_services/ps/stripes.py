"""Stripes: the memory of one table, the locks over it, and how a batch of ids is walked through both."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of
from trilith.shard import UInt64Array
from trilith_services.ps.arena import HUGE_PAGE, Mapping
from trilith_services.ps.kernels import index, rows
from trilith_services.ps.row_layout import RowLayout

__all__ = ["STRIPES", "Batch", "Stripes", "group", "work_memory"]

_BITS = 5
STRIPES = 1 << _BITS
_PER_LOCK = 4  # neighbouring stripes that share a lock, since a kernel call for fewer ids is mostly overhead
_LOCKS = STRIPES // _PER_LOCK
_SMALL = 1024  # up to here one kernel call under all locks is the fastest
_PIECE_BYTES = 512 << 10  # a batch is worked on in pieces whose rows stay in the second-level cache
_PARALLEL = 16384  # from here a batch is worth two threads
_HUGE_BYTES = 4 * HUGE_PAGE  # rows or slots of one stripe beyond which huge pages pay
_FIRST_SLOTS = 16
_MAX_ROWS = (1 << 32) - 2  # row numbers are 32 bits wide

Batch = tuple[int, int, int, int]
"""Addresses of starts, hashes, grouped ids and positions, as `index.group_by_stripe` describes them."""


class _Scratch(threading.local):
    """One thread's memory for grouping a batch and for kernels' own use, grown as needed."""

    def __init__(self) -> None:
        self.room = 0
        self.starts = np.zeros(STRIPES + 1, np.int64)
        self.work = np.empty(0, np.uint8)
        self.batch: Batch = (0, 0, 0, 0)
        self.arrays = np.empty((3, 0), np.uint64)


_SCRATCH = _Scratch()


def group(ids: UInt64Array) -> Batch:
    """Group ids by stripe; the result is good until this thread's next call."""
    if len(ids) > _SCRATCH.room:
        _SCRATCH.room = 1 << max(10, (len(ids) - 1).bit_length())
        _SCRATCH.arrays = np.empty((3, _SCRATCH.room), np.uint64)
        start, step = address_of(_SCRATCH.arrays), 8 * _SCRATCH.room
        _SCRATCH.batch = address_of(_SCRATCH.starts), start, start + step, start + 2 * step
    starts, hashes, grouped, positions = _SCRATCH.batch
    index.group_by_stripe(address_of(ids), len(ids), _BITS, hashes, grouped, positions, starts)
    return _SCRATCH.batch


def work_memory(dim: int) -> int:
    """Address of this thread's scratch memory for kernels over rows of `dim` weights."""
    if _SCRATCH.work.size < rows.work_bytes(dim):
        _SCRATCH.work = np.empty(rows.work_bytes(dim), np.uint8)
    return address_of(_SCRATCH.work)


class Stripes:
    """The rows of one table, spread over stripes by the high bits of the ids' hashes.

    A stripe is an index and a range of the table's row arena. Neighbouring stripes share a lock; whoever needs several
    locks takes them in ascending order. Rows never move: the arena's address space is reserved at the start, and only
    an index is rebuilt as it grows, one stripe at a time.

    Attributes:
        columns: int64[STRIPES, index.COLUMNS], what the kernels know of each stripe.
        address: Of `columns`.
    """

    def __init__(self, layout: RowLayout, initial_rows: int, pool: Executor | None) -> None:
        self._layout = layout
        self._pool = pool
        self._piece = max(1024, min(16384, _PIECE_BYTES // (4 * layout.dim)))
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self.columns = np.zeros((STRIPES, index.COLUMNS), np.int64)
        self.address = address_of(self.columns)
        self._reserved = _reserved_bytes()
        self._max_rows = min(self._reserved // layout.stride, _MAX_ROWS)
        self._indexes: list[Mapping] = []
        self._reset(-(-initial_rows // STRIPES))

    def __len__(self) -> int:
        return int(self.columns[:, index.SIZE].sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows and indexes in use."""
        rows_bytes = int(self.columns[:, index.USED].sum()) * self._layout.stride
        return rows_bytes + 16 * int(self.slots.sum())

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """int64[STRIPES]: slots of each index."""
        slots: npt.NDArray[np.int64] = self.columns[:, index.MASK] + 1
        return slots

    @property
    def freed_rows(self) -> int:
        """Rows that will be used again before the arena grows."""
        return int(self.columns[:, index.FREED].sum())

    def growth_bytes(self, new_rows: int) -> int:
        """Index memory that `new_rows` more rows, evenly spread, will add."""
        if new_rows == 0:
            return 0
        full = self.columns[:, index.SIZE] + new_rows // STRIPES + 1 > self.columns[:, index.LIMIT]
        return 16 * int(self.slots[full].sum())

    def clear(self) -> None:
        """Drop every row and give the memory back; all locks are held."""
        self._reset(0)

    # ---- walking batches -----------------------------------------------------------------------------------------

    def read(self, ids: UInt64Array, work: Callable[[Batch, int, int, int], int]) -> int:
        """Run `work(batch, offset, first, last)` over all stripes under their locks; returns the sum of its results.

        `batch` is a grouped piece of the ids, whose positions count from `offset` in the whole; the call shall handle
        stripes first..last - 1. Large batches run on two threads, each with its own stripes, so that one id is always
        in one.
        """
        if len(ids) <= _SMALL:
            with self.all_locks():
                return work(group(ids), 0, 0, STRIPES)
        if self._pool is None or len(ids) < _PARALLEL:
            return self._walk(ids, work, 0, _LOCKS)
        other = self._pool.submit(self._walk, ids, work, _LOCKS // 2, _LOCKS)
        try:
            mine = self._walk(ids, work, 0, _LOCKS // 2)
        finally:
            theirs = other.result()
        return mine + theirs

    def write(self, ids: UInt64Array, work: Callable[[Batch, int, int, int, int], int]) -> None:
        """As `read`, for kernels that may need a larger index: `work(batch, offset, first, last, begin)`.

        It returns -1 when done, else the position in the grouped piece to begin from when that position's stripe has
        grown.
        """

        def grow_as_needed(batch: Batch, offset: int, first: int, last: int) -> int:
            begin = 0
            while (begin := work(batch, offset, first, last, begin)) >= 0:
                self._grow(int(np.searchsorted(_SCRATCH.starts, begin, "right")) - 1)
            return 0

        self.read(ids, grow_as_needed)

    def _walk(self, ids: UInt64Array, work: Callable[[Batch, int, int, int], int], first: int, last: int) -> int:
        """Work on the stripes of locks first..last - 1, piece by piece."""
        total = 0
        for offset in range(0, len(ids), self._piece):
            batch = group(ids[offset : offset + self._piece])
            busy: list[int] = []
            for number in range(first, last):
                # Pass by stripes that somebody is in, and come back to them.
                if not self._locks[number].acquire(blocking=False):
                    busy.append(number)
                    continue
                try:
                    total += work(batch, offset, number * _PER_LOCK, (number + 1) * _PER_LOCK)
                finally:
                    self._locks[number].release()
            for number in busy:
                with self._locks[number]:
                    total += work(batch, offset, number * _PER_LOCK, (number + 1) * _PER_LOCK)
        return total

    @contextmanager
    def all_locks(self) -> Iterator[None]:
        """Hold every lock."""
        for lock in self._locks:
            lock.acquire()
        try:
            yield
        finally:
            for lock in self._locks:
                lock.release()

    def lock(self, s: int) -> threading.Lock:
        """The lock over stripe `s`."""
        return self._locks[s // _PER_LOCK]

    # ---- growth --------------------------------------------------------------------------------------------------

    def _reset(self, rows_per_stripe: int) -> None:
        self._arena = Mapping(self._reserved * STRIPES)
        self.columns[:] = 0
        self._indexes = []
        for s in range(STRIPES):
            slots = _FIRST_SLOTS
            while slots * _max_load(s) < rows_per_stripe:
                slots *= 2
            self.columns[s, index.ARENA] = self._arena.address + s * self._reserved
            self._indexes.append(Mapping(16 * slots))
            self._use_index(s, slots)

    def _grow(self, s: int) -> None:
        """Double the index of stripe `s`, whose lock is held; rows stay where they are."""
        if self.columns[s, index.SIZE] >= self._max_rows:
            raise MemoryLimitError(f"stripe {s} holds {self._max_rows} rows, all that its address space holds")
        slots = int(self.columns[s, index.MASK]) + 1
        old, larger = self._indexes[s], Mapping(32 * slots)
        if larger.size >= _HUGE_BYTES:
            larger.advise_huge()
        index.rebuild_index(old.address, slots - 1, larger.address, 2 * slots - 1)
        self._indexes[s] = larger
        self._use_index(s, 2 * slots)

    def _use_index(self, s: int, slots: int) -> None:
        limit = min(int(slots * _max_load(s)), self._max_rows)
        self.columns[s, index.INDEX] = self._indexes[s].address
        self.columns[s, index.MASK] = slots - 1
        self.columns[s, index.LIMIT] = limit
        # The rows that this index will take beyond those it has.
        start, end = limit // 2 * self._layout.stride, limit * self._layout.stride
        if end >= _HUGE_BYTES:
            self._arena.advise_huge(s * self._reserved + start, end - start)


def _max_load(s: int) -> float:
    """Fill at which stripe `s` grows: spread over 0.5..0.75, so that a table's stripes do not all grow in one batch."""
    return 0.5 + 0.25 * (s + 1) / STRIPES


def _reserved_bytes() -> int:
    """Address space for one stripe's rows: its share of twice the machine's memory, which no table can outgrow."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return -(-2 * memory // STRIPES // HUGE_PAGE) * HUGE_PAGE

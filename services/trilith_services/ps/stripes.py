"""Stripes: the memory of one table, the locks over it, and how a batch of ids is walked through both."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of
from trilith.shard import UInt64Array
from trilith_services.ps.arena import HUGE_PAGE, Arena, Mapping
from trilith_services.ps.kernels import index
from trilith_services.ps.kernels.index import STRIPES
from trilith_services.ps.kernels.sweep import rebuild_index
from trilith_services.ps.rooms import two_rooms
from trilith_services.ps.row_layout import RowLayout
from trilith_services.ps.touched import Touched

__all__ = ["Batch", "Stripes", "group", "work_memory"]

_PER_LOCK = 4  # neighbouring stripes that share a lock, since a kernel call for fewer ids is mostly overhead
_LOCKS = STRIPES // _PER_LOCK
_SMALL = 1024  # up to here one kernel call under all locks is the fastest
_READ_PIECE, _READ_BYTES = 16384, 2 << 20  # ids, or bytes of them, read before writers get their turn: 1 to 3 ms
_PIECE_BYTES = 512 << 10  # a batch is written in pieces whose gradients stay in the second-level cache
_PARALLEL = 16384  # from here a batch is worth two threads
_HUGE_BYTES = 2 * HUGE_PAGE  # rows or slots of one stripe beyond which huge pages pay
_FIRST_SLOTS = 16
_TIME_BYTES = 4
_MAX_ROWS = 1 << 29  # of a stripe; a slot has bits for twice as many row numbers
_STASH_PART = 512  # a stash has room for one in so many slots, ten times what chance puts there in a full index
_FIRST_STASH = 8
_DELETED_PART = 8  # one slot in so many may be a deleted one
_SHAPE = [index.SLOTS, index.STASH_ROOM]  # columns that say how large an index is

Batch = tuple[int, int, int]
"""Addresses of starts, hashes and positions, as `index.group_by_stripe` describes them."""


class _Scratch(threading.local):
    """One thread's memory for grouping a batch and for kernels' own use, grown as needed."""

    def __init__(self) -> None:
        self.room = 0
        self.starts = np.zeros(STRIPES + 1, np.int64)
        self.work, self.work_at = np.empty(0, np.uint8), 0
        self.batch: Batch = (0, 0, 0)
        self.unsorted_at = 0
        self.arrays = np.empty((3, 0), np.uint64)


_SCRATCH = _Scratch()


def group(ids: UInt64Array) -> Batch:
    """Group ids by stripe; the result is good until this thread's next call."""
    if len(ids) > _SCRATCH.room:
        _SCRATCH.room = 1 << max(10, (len(ids) - 1).bit_length())
        _SCRATCH.arrays = np.empty((3, _SCRATCH.room), np.uint64)
        start, step = address_of(_SCRATCH.arrays), 8 * _SCRATCH.room
        _SCRATCH.batch = address_of(_SCRATCH.starts), start, start + step
        _SCRATCH.unsorted_at = start + 2 * step
    starts, hashes, positions = _SCRATCH.batch
    index.group_by_stripe(address_of(ids), len(ids), _SCRATCH.unsorted_at, hashes, positions, starts)
    return _SCRATCH.batch


def work_memory(size: int) -> int:
    """Address of `size` bytes of this thread's scratch memory for kernels."""
    if _SCRATCH.work.size < size:
        _SCRATCH.work = np.empty(size, np.uint8)
        _SCRATCH.work_at = address_of(_SCRATCH.work)
    return _SCRATCH.work_at


class Stripes:
    """The rows of one table, spread over stripes by the high bits of the ids' hashes.

    A stripe is an index and a part each of the table's arenas of weights, of optimizer states and of times. Readers and
    writers take turns, piece by piece; readers need nothing more, writers the locks of the stripes they change.
    Neighbouring stripes share a lock. Rows never move: the arenas' address space is reserved at the start, and only an
    index is rebuilt as it grows, one stripe at a time.

    Attributes:
        columns: int64[STRIPES, index.COLUMNS], what the kernels know of each stripe.
        address: Of `columns`.
        reading: To be held while rows or indexes are read.
        touched: Is told which ids were written to, once they have been; None while nobody wants to know.
    """

    def __init__(self, layout: RowLayout, initial_rows: int, pool: Executor | None) -> None:
        self._layout = layout
        self._pool = pool
        self.touched: Touched | None = None
        self._piece = max(1024, min(16384, _PIECE_BYTES // (4 * layout.dim)))
        self._read_piece = max(_READ_PIECE, _READ_BYTES // (4 * layout.dim))
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self.reading, self._writing = two_rooms()
        self.columns = np.zeros((STRIPES, index.COLUMNS), np.int64)
        self.address = address_of(self.columns)
        self._max_rows = min(_reserved_bytes() // self.row_bytes - 1, _MAX_ROWS)
        self._indexes: list[Mapping] = []
        self._reset(-(-initial_rows // STRIPES))

    def __len__(self) -> int:
        return int(self.columns[:, index.SIZE].sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows, their times and indexes in use."""
        rows_bytes = int(self.columns[:, index.USED].sum()) * self.row_bytes
        slots, stash = self.columns[:, _SHAPE].sum(axis=0)
        return rows_bytes + _index_bytes(int(slots), int(stash))

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """int64[STRIPES]: places where each index can lead to a row."""
        places: npt.NDArray[np.int64] = self.columns[:, _SHAPE].sum(axis=1)
        return places

    @property
    def freed_rows(self) -> int:
        """Rows that will be used again before the arena grows."""
        return int(self.columns[:, index.FREED].sum())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, its state and its time."""
        return self._layout.row_bytes + self._layout.state_bytes + _TIME_BYTES

    def growth_bytes(self, new_rows: int) -> int:
        """Index memory that `new_rows` more rows, evenly spread, will add."""
        if new_rows == 0:
            return 0
        full = self.columns[:, index.SIZE] + new_rows // STRIPES + 1 > self.columns[:, index.LIMIT]
        return 8 * int(self.columns[full, index.SLOTS].sum())

    def clear(self) -> None:
        """Drop every row and give the memory back; the caller is `writing`."""
        self._reset(0)
        if (touched := self.touched) is not None:
            touched.add_all()

    # ---- walking batches -----------------------------------------------------------------------------------------

    def read(self, ids: UInt64Array, work: Callable[[int, int, int], int]) -> int:
        """Run `work(address, count, offset)` over pieces of the ids while nobody writes; returns the sum of its
        results.

        `address` is that of uint64[count] ids, which stand at `offset` in the whole. Readers do not disturb each other.
        Two threads share a large batch.
        """
        if self._pool is None or len(ids) < _PARALLEL:
            return self._read(ids, work, 0, len(ids))
        half = len(ids) // 2
        other = self._pool.submit(self._read, ids, work, half, len(ids))
        try:
            mine = self._read(ids, work, 0, half)
        finally:
            theirs = other.result()
        return mine + theirs

    def _read(self, ids: UInt64Array, work: Callable[[int, int, int], int], start: int, end: int) -> int:
        total = 0
        address = address_of(ids)
        for offset in range(start, end, self._read_piece):
            with self.reading:
                total += work(address + 8 * offset, min(self._read_piece, end - offset), offset)
        return total

    def write(self, ids: UInt64Array, work: Callable[[Batch, int, int, int, int], int]) -> None:
        """Run `work(batch, offset, first, last, begin)` over all stripes under their locks, while nobody reads.

        `batch` is a grouped piece of the ids, whose positions count from `offset` in the whole; the call shall handle
        stripes first..last - 1, from grouped position `begin` on. It returns -1 when done, else the position to begin
        from again when that position's stripe has grown. Large batches run on two threads, each with its own stripes,
        so that one id is always in one and the order of its steps does not depend on threads.
        """
        try:
            if self._pool is None or len(ids) < _PARALLEL:
                self._write(ids, work, 0, _LOCKS)
                return
            other = self._pool.submit(self._write, ids, work, _LOCKS // 2, _LOCKS)
            try:
                self._write(ids, work, 0, _LOCKS // 2)
            finally:
                other.result()
        finally:
            # After the rows have changed and before the caller answers, also if only some of them did.
            if (touched := self.touched) is not None:  # looked up once: it may be taken away at any time
                touched.add(ids)

    def _write(self, ids: UInt64Array, work: Callable[[Batch, int, int, int, int], int], first: int, last: int) -> None:
        """Work on the stripes of locks first..last - 1, piece by piece."""
        for offset in range(0, len(ids), self._piece):
            batch = group(ids[offset : offset + self._piece])
            with self._writing:
                if len(ids) <= _SMALL:
                    with self._locked(range(_LOCKS)):
                        self._grow_as_needed(batch, offset, 0, STRIPES, work)
                    return
                busy: list[int] = []
                for number in range(first, last):
                    # Pass by stripes that somebody is in, and come back to them.
                    if not self._locks[number].acquire(blocking=False):
                        busy.append(number)
                        continue
                    try:
                        self._grow_as_needed(batch, offset, number * _PER_LOCK, (number + 1) * _PER_LOCK, work)
                    finally:
                        self._locks[number].release()
                for number in busy:
                    with self._locks[number]:
                        self._grow_as_needed(batch, offset, number * _PER_LOCK, (number + 1) * _PER_LOCK, work)

    def _grow_as_needed(
        self, batch: Batch, offset: int, first: int, last: int, work: Callable[[Batch, int, int, int, int], int]
    ) -> None:
        begin = 0
        while (begin := work(batch, offset, first, last, begin)) >= 0:
            self._grow(int(np.searchsorted(_SCRATCH.starts, begin, "right")) - 1)

    @contextmanager
    def writing(self, s: int | None = None) -> Iterator[None]:
        """Be the only one to touch stripe `s`, or any stripe."""
        numbers = range(_LOCKS) if s is None else [s // _PER_LOCK]
        with self._writing, self._locked(numbers):
            yield

    @contextmanager
    def _locked(self, numbers: Iterable[int]) -> Iterator[None]:
        """Hold locks, taken in ascending order so that callers never wait for each other in a circle."""
        held = [self._locks[number] for number in numbers]
        for lock in held:
            lock.acquire()
        try:
            yield
        finally:
            for lock in held:
                lock.release()

    # ---- growth --------------------------------------------------------------------------------------------------

    def _reset(self, rows_per_stripe: int) -> None:
        sizes = self._layout.row_bytes, self._layout.state_bytes, _TIME_BYTES
        rows, states, times = self._arenas = [Arena(STRIPES, self._max_rows, size) for size in sizes]
        self.columns[:] = 0
        self._indexes = []
        for s in range(STRIPES):
            slots = _FIRST_SLOTS
            while slots * _max_load(s) < rows_per_stripe:
                slots *= 2
            self.columns[s, [index.ROWS, index.ROW_BYTES]] = rows.address(s), rows.item_bytes
            self.columns[s, [index.STATES, index.STATE_BYTES]] = states.address(s), states.item_bytes
            self.columns[s, index.TIMES] = times.address(s)
            self._indexes.append(self._plan_index(self.columns[s], s, slots, 0))
            self._advise(s)

    def _grow(self, s: int) -> None:
        """Rebuild the index of stripe `s`, whose lock is held, so that a row can be added; rows stay where they are."""
        old = self.columns[s]
        if old[index.SIZE] >= self._max_rows:
            raise MemoryLimitError(f"stripe {s} holds {self._max_rows} rows, all that its address space holds")
        slots = int(old[index.SLOTS])
        # A half empty index whose stash is full is one whose ids were made to collide: twice the slots would not help.
        if old[index.DELETED] < old[index.MOST_DELETED] and 2 * old[index.SIZE] >= old[index.LIMIT]:
            slots *= 2
        stashed = int(old[index.STASHED])
        new = old.copy()
        while True:
            mapping = self._plan_index(new, s, slots, 2 * stashed)
            rebuild_index(address_of(old), s, address_of(new))
            stashed = int(new[index.STASHED])
            if stashed < new[index.STASH_ROOM]:
                break
        self._indexes[s] = mapping
        old[:] = new
        self._advise(s)

    def _plan_index(self, columns: npt.NDArray[np.int64], s: int, slots: int, stash: int) -> Mapping:
        """Memory for an empty index of stripe `s`, which `columns` describes from now on."""
        room = max(slots // _STASH_PART, stash, _FIRST_STASH)
        mapping = Mapping(_index_bytes(slots, room))
        if mapping.size >= _HUGE_BYTES:
            mapping.advise_huge()
        columns[index.INDEX] = mapping.address
        columns[_SHAPE] = slots, room
        columns[index.LIMIT] = min(int(slots * _max_load(s)), self._max_rows)
        columns[index.MOST_DELETED] = slots // _DELETED_PART
        return mapping

    def _advise(self, s: int) -> None:
        """Ask for huge pages for the rows that the index of stripe `s` has room for."""
        limit = int(self.columns[s, index.LIMIT])
        if limit * self.row_bytes >= _HUGE_BYTES:
            for arena in self._arenas:
                arena.advise_huge(s, limit)


def _index_bytes(slots: int, stash: int) -> int:
    return 8 * slots + index.STASH_ENTRY * stash


def _max_load(s: int) -> float:
    """Fill at which stripe `s` grows: spread over 0.6..0.7, so that a table's stripes do not all grow in one batch."""
    return 0.6 + 0.1 * (s + 1) / STRIPES


def _reserved_bytes() -> int:
    """Address space for one stripe's rows: its share of twice the machine's memory, which no table can outgrow."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return -(-2 * memory // STRIPES // HUGE_PAGE) * HUGE_PAGE

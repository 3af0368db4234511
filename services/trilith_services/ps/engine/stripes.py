"""Stripes: the locks over the memory of one table, and how a batch of ids is walked through both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from trilith.ops.memory import address_of
from trilith.shard import UInt64Array
from trilith_services.ps.engine.group_lock import group_lock
from trilith_services.ps.engine.kernels import index
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.sweep import drop_freed, move_rows, sort_freed
from trilith_services.ps.engine.row_layout import RowLayout
from trilith_services.ps.engine.scratch import SCRATCH, Batch, group
from trilith_services.ps.engine.stripe_memory import StripeMemory, max_load
from trilith_services.ps.engine.touched import Touched

__all__ = ["RANGE", "Scan", "Stripes"]

RANGE = 4096
"""Places of an index that whoever goes through a whole stripe looks at in one turn: up to half a millisecond."""

_PER_LOCK = 4  # neighbouring stripes that share a lock, since a kernel call for fewer ids is mostly overhead
_LOCKS = STRIPES // _PER_LOCK
_SMALL = 1024  # up to here one kernel call under all locks is the fastest
_READ_PIECE, _READ_BYTES = 16384, 2 << 20  # ids, or bytes of them, read before writers get their turn: 1 to 3 ms
_PIECE_BYTES = 512 << 10  # a batch is written in pieces whose gradients stay in the second-level cache
_PARALLEL = 16384  # from here a batch is worth two threads
_STEP = 512  # places of an index that is rebuilt, copied with every write
_GIVEN_BACK = 8 << 20  # bytes of rows given back to the machine in one turn
_TRIES = 3  # times that a stripe is gone through range by range while it is rebuilt under whoever does so


@dataclass(eq=False, slots=True)
class Scan:
    """Somebody who goes through a stripe range by range.

    Attributes:
        stripe: Which.
        erased: Ids that were erased or evicted meanwhile, uint64[n] each. Whoever created their rows again may have
            done so behind or before the scan.
    """

    stripe: int
    erased: list[UInt64Array] = field(default_factory=list)


class Stripes(StripeMemory):
    """The rows of one table, spread over stripes by the high bits of the ids' hashes.

    A stripe is an index and a part each of the table's arenas of weights, of optimizer states and of times. Readers and
    writers take turns, piece by piece; readers need nothing more, writers the locks of the stripes they change.
    Neighbouring stripes share a lock. Addresses of rows hold for a turn.

    Nobody is kept waiting while a stripe as a whole is gone through: sweeps, copies and `compact` go by ranges of
    places. Sorting a stripe's freed row numbers takes one turn of 2 ns a number.

    Attributes:
        reading: To be held while rows or indexes are read.
        piece: Ids that are written in one turn at most.
        touched: Is told which ids were written to, once they have been; None while nobody wants to know.
    """

    def __init__(self, layout: RowLayout, initial_rows: int, pool: Executor | None) -> None:
        super().__init__(layout, initial_rows)
        self._pool = pool
        self.touched: Touched | None = None
        self.piece = max(1024, min(16384, _PIECE_BYTES // (4 * layout.dim)))
        self._read_piece = max(_READ_PIECE, _READ_BYTES // (4 * layout.dim))
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self.reading, self._writing = group_lock()
        self._scans: set[Scan] = set()

    def clear(self) -> None:
        """Drop every row; the caller is `writing`, and lets `unmap` give the memory back afterwards."""
        self._dropped += [self._arenas, self._memory]
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
        for offset in range(0, len(ids), self.piece):
            if self._dropped:
                self.unmap()
            batch = group(ids[offset : offset + self.piece])
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
            self.unmap()

    def _grow_as_needed(
        self, batch: Batch, offset: int, first: int, last: int, work: Callable[[Batch, int, int, int, int], int]
    ) -> None:
        begin = 0
        try:
            while (begin := work(batch, offset, first, last, begin)) >= 0:
                self._grow(int(np.searchsorted(SCRATCH.starts, begin, "right")) - 1, batch)
            if self._rebuilds:
                for s in list(self._rebuilds):
                    if first <= s < last:
                        self._step(s, self._rebuilds[s], _STEP, batch)
        except BaseException:
            # Rows have changed that a new index may not have heard of.
            for s in list(self._rebuilds):
                if first <= s < last:
                    self._cancel(s)
            raise

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

    # ---- going through a stripe ----------------------------------------------------------------------------------

    @contextmanager
    def scanning(self, s: int) -> Iterator[Scan]:
        """Be told of the ids of stripe `s` that are erased meanwhile; a turn sees those of all earlier turns."""
        scan = Scan(s)
        self._scans.add(scan)
        try:
            yield scan
        finally:
            self._scans.discard(scan)

    def note_erased(self, ids: UInt64Array, first: int, last: int) -> None:
        """Tell those who go through stripes first..last - 1; by whoever erases, in the same turn."""
        if self._scans:
            for scan in list(self._scans):
                if first <= scan.stripe < last:
                    scan.erased.append(ids.copy())

    def sweep(self, s: int, look: Callable[[int, int], bool], work: Callable[[int, int], None]) -> None:
        """Run `work(begin, end)`, which may erase rows, over all places of stripe `s`, from the last to the first.

        Where `look(begin, end)` says that there is nothing to do, only writers wait meanwhile; else the caller has the
        range for itself. Others have their turns between. If the index is rebuilt, it is gone through again.
        """
        for attempt in range(_TRIES):
            with self.reading:
                generation, end = self._generations[s], int(self.places[s])
                # The stash comes whole, with the last slots.
                begin = max(0, int(self.columns[s, index.SLOTS]) - RANGE)
            while True:
                if attempt == _TRIES - 1:
                    begin = 0
                with self.reading:
                    if generation != self._generations[s]:
                        break
                    found = look(begin, end)
                if found:
                    with self.writing(s):
                        if generation != self._generations[s]:
                            break
                        self._cancel(s)
                        work(begin, end)
                if begin == 0:
                    return
                begin, end = max(0, begin - RANGE), begin

    def compact(self, least: float) -> int:
        """Move rows together and give what is behind them back to the machine; returns how many bytes.

        Args:
            least: Share of a stripe's rows that must be free for the stripe to be looked at.
        """
        before = self.memory_bytes
        for s in range(STRIPES):
            self._close_up(s, least)
            self._shrink(s)
            self.unmap()
        return before - self.memory_bytes

    def _close_up(self, s: int, least: float) -> None:
        """Move the rows of stripe `s` to the lowest numbers, and give the memory behind them back."""
        columns, address = self.columns[s], self.address + 8 * index.COLUMNS * s
        with self.writing(s):
            self._cancel(s)
            generation, used, size = self._generations[s], int(columns[index.USED]), int(columns[index.SIZE])
            bound = size + size // 64
            if used <= bound or used - bound < least * used:
                return
            high = int(sort_freed(address, bound))
        place = 0
        for _ in range(_TRIES):
            while place < self.places[s]:
                with self.writing(s):
                    self._cancel(s)
                    if generation != self._generations[s]:
                        return
                    end = place + RANGE
                    moved = int(move_rows(address, place, end, bound, high))
                    if moved < 0:
                        high = int(sort_freed(address, bound))
                        if high == columns[index.FREED]:
                            return  # new rows have taken all the room there was
                        continue
                    high, place = moved, end
            with self.writing(s):
                if generation != self._generations[s]:
                    return
                high, place = int(sort_freed(address, bound)), 0
                if int(columns[index.SIZE]) == bound - (int(columns[index.FREED]) - high):
                    break  # every number up to the bound is a row's or free, so no row has a higher one
        else:
            return
        self._give_back(s, generation, bound)

    def _give_back(self, s: int, generation: int, bound: int) -> None:
        """Give row numbers above `bound`, none of which is a row's, back to the machine."""
        columns, address = self.columns[s], self.address + 8 * index.COLUMNS * s
        step = max(1, _GIVEN_BACK // self.row_bytes)
        used = -1
        while True:
            with self.writing(s):
                now = int(columns[index.USED])
                if generation != self._generations[s] or used not in (-1, now):
                    break  # somebody has begun to use them again
                used = max(bound, now - step)
                high = int(sort_freed(address, used))
                freed = int(columns[index.FREED])
                if int(columns[index.SIZE]) != used - (freed - high):
                    break
                drop_freed(address, high)
                columns[index.USED] = used
                for arena in self._arenas[:-1]:
                    arena.discard(s, used + 1, now)
                self._arenas[-1].discard(s, freed - high + 1, freed)
            if used == bound:
                return

    def _shrink(self, s: int) -> None:
        """Rebuild an index that is far too large for its rows."""
        wanted = self.least_slots
        while wanted * max_load(s) <= 2 * int(self.columns[s, index.USED]):
            wanted *= 2
        if 2 * wanted > self.columns[s, index.SLOTS]:
            return
        with self.writing(s):
            if s in self._rebuilds or 2 * self.columns[s, index.USED] > wanted:
                return
            self._begin(s, wanted)
            rebuild = self._rebuilds[s]
        while self._rebuilds.get(s) is rebuild:
            with self.writing(s):
                if self._rebuilds.get(s) is rebuild:
                    self._step(s, rebuild, RANGE)

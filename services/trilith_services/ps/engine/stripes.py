"""Stripes: the memory of one table, the locks over it, and how a batch of ids is walked through both."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of
from trilith.runtime.machine import commits_strictly
from trilith.shard import UInt64Array
from trilith_services.ps.engine.arena import HUGE_PAGE, Arena, Mapping
from trilith_services.ps.engine.group_lock import two_rooms
from trilith_services.ps.engine.kernels import index
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.sweep import copy_places, drop_freed, match_index, move_rows, sort_freed
from trilith_services.ps.engine.row_layout import RowLayout
from trilith_services.ps.engine.touched import Touched

__all__ = ["RANGE", "Batch", "Scan", "Stripes", "group", "work_memory"]

RANGE = 4096
"""Places of an index that whoever goes through a whole stripe looks at in one turn: up to half a millisecond."""

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
# Address space that a table begins with, and how often more a stripe gets that fills its part. Where the machine counts
# every reserved byte as used, a table begins small.
_FIRST_RESERVED, _MORE_RESERVED = 1 << 30, 8
_FIRST_COUNTED, _MORE_COUNTED = 1 << 20, 4
_STASH_PART = 512  # a stash has room for one in so many slots, ten times what chance puts there in a full index
_FIRST_STASH = 8
_DELETED_PART = 9  # one slot in so many may be a deleted one, and one more of them while the index is rebuilt
_SPLIT_SLOTS = 8192  # an index of more slots is rebuilt piece by piece, one of fewer in 0.1 ms
_LATE = 17 / 16  # how far beyond its limit an index may fill until that is done
_STEP, _STEP_PER_ROW = 512, 32  # places copied with every write, and for every row that it added
_HEAP_BYTES = 128 << 10  # an index of fewer bytes comes from the heap: a mapping takes whole pages
_GIVEN_BACK = 8 << 20  # bytes of rows given back to the machine in one turn
_TRIES = 3  # times that a stripe is gone through range by range while it is rebuilt under whoever does so
_SHAPE = [index.SLOTS, index.STASH_ROOM]  # columns that say how large an index is
_LINE = 64  # bytes of a cache line, which slots are aligned to
_USE = [index.USED, *_SHAPE]
_FREE_BYTES = 4

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


@dataclass(eq=False, slots=True)
class _Rebuild:
    """An index that is being filled, beside the one that it will replace.

    Attributes:
        columns: int64[COLUMNS] that describe it.
        memory: Keeps it.
        place: Those of the old index below it have been copied; what changed in them since, too.
        size: Rows of the stripe when it was last looked at.
    """

    columns: npt.NDArray[np.int64]
    memory: object
    place: int
    size: int


class Stripes:
    """The rows of one table, spread over stripes by the high bits of the ids' hashes.

    A stripe is an index and a part each of the table's arenas of weights, of optimizer states and of times. Readers and
    writers take turns, piece by piece; readers need nothing more, writers the locks of the stripes they change.
    Neighbouring stripes share a lock. Addresses of rows hold for a turn.

    Nobody is kept waiting while a stripe as a whole is gone through. A large index is rebuilt by those who write, a
    few places with every write, while it fills to a sixteenth beyond its limit; only one whose ids were made to
    collide, or that one batch fills so far, is rebuilt in one turn (about 90 ns a row). Sweeps, copies and `compact` go
    by ranges of places. Sorting a stripe's freed row numbers takes one turn of 2 ns a number.

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
        self._generations = [0] * STRIPES
        self._scans: set[Scan] = set()
        self._rebuilds: dict[int, _Rebuild] = {}
        self._dropped: list[object] = []  # memory that is unmapped after the turn in which it was replaced
        self._least_slots = _FIRST_SLOTS
        self._reset(-(-initial_rows // STRIPES))
        self._least_slots = int(self.columns[:, index.SLOTS].min())

    def __len__(self) -> int:
        return int(self.columns[:, index.SIZE].sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows, their times and indexes in use; rows that were freed and not given back count.

        Four bytes for each freed row's number do not: they are there only until `compact`.
        """
        used, slots, stash = self.columns[:, _USE].sum(axis=0).tolist()
        size = used * self.row_bytes + _index_bytes(slots, stash)
        if self._rebuilds:
            for rebuild in list(self._rebuilds.values()):
                size += _index_bytes(*rebuild.columns[_SHAPE].tolist())
        return int(size)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """int64[STRIPES]: places where each index can lead to a row."""
        places: npt.NDArray[np.int64] = self.columns[:, _SHAPE].sum(axis=1)
        return places

    @property
    def freed_rows(self) -> int:
        """Rows that will be used again before the arena grows, or given back by `compact`."""
        return int(self.columns[:, index.FREED].sum())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, its state and its time."""
        return self._layout.row_bytes + self._layout.state_bytes + _TIME_BYTES

    def growth_bytes(self, new_rows: int) -> int:
        """Index memory that `new_rows` more rows, spread by chance, will add at most."""
        if new_rows == 0:
            return 0
        mean = new_rows / STRIPES
        most = min(new_rows, int(mean + 5 * math.sqrt(mean)) + 1)
        # Copied: others go on meanwhile, and while `clear` makes new indexes some have no limit, and no rows to come.
        rows, limits = self.columns[:, index.SIZE] + most, self.columns[:, index.LIMIT].copy()
        if (rows <= limits).all():  # as before most writes, each of which asks
            return 0
        filled = np.where(limits > 0, rows / np.maximum(limits, 1), 1.0)
        times = np.exp2(np.ceil(np.log2(np.maximum(filled, 1.0))))  # an index grows to twice its size, again and again
        return 8 * int((self.columns[:, index.SLOTS] * (times - 1)).sum())

    def generation(self, s: int) -> int:
        """Changes whenever the places of stripe `s` change their meaning; for one turn."""
        return self._generations[s]

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
        for offset in range(0, len(ids), self._piece):
            if self._dropped:
                self.unmap()
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
            self.unmap()

    def _grow_as_needed(
        self, batch: Batch, offset: int, first: int, last: int, work: Callable[[Batch, int, int, int, int], int]
    ) -> None:
        begin = 0
        try:
            while (begin := work(batch, offset, first, last, begin)) >= 0:
                self._grow(int(np.searchsorted(_SCRATCH.starts, begin, "right")) - 1, batch)
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

    def unmap(self) -> None:
        """Give back memory that was replaced: not in the turn in which that happened, since it can take long."""
        self._dropped.clear()

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
        wanted = self._least_slots
        while wanted * _max_load(s) <= 2 * int(self.columns[s, index.USED]):
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

    # ---- growth --------------------------------------------------------------------------------------------------

    def _reset(self, rows_per_stripe: int) -> None:
        counted = commits_strictly()
        self._more = _MORE_COUNTED if counted else _MORE_RESERVED
        reserved = (_FIRST_COUNTED if counted else _FIRST_RESERVED) // STRIPES // self.row_bytes
        room = min(_MAX_ROWS, max(reserved, 5 * rows_per_stripe // 2, _FIRST_SLOTS))
        self._room = [room] * STRIPES
        sizes = self._layout.row_bytes, self._layout.state_bytes, _TIME_BYTES, _FREE_BYTES
        self._arenas = [Arena(STRIPES, room, size) for size in sizes]
        self._rebuilds.clear()
        self.columns[:] = 0
        self.columns[:, index.ROW_BYTES], self.columns[:, index.STATE_BYTES] = sizes[:2]
        self._memory: list[object] = []
        for s in range(STRIPES):
            slots = _FIRST_SLOTS
            while slots * _max_load(s) < rows_per_stripe:
                slots *= 2
            self._point(s)
            self._memory.append(_plan_index(self.columns[s], slots, 0))
            self._generations[s] += 1
            self._set_limits(s)
            self._advise(s)

    def _point(self, s: int) -> None:
        """Say where the rows of stripe `s` are."""
        rows, states, times, free = self._arenas
        self.columns[s, [index.ROWS, index.STATES, index.TIMES, index.FREE]] = (
            rows.address(s),
            states.address(s),
            times.address(s),
            free.address(s),
        )

    def _make_room(self, s: int, rows: int) -> None:
        """Reserve address space for so many rows of stripe `s`; what it has moves there, page by page."""
        if rows <= self._room[s]:
            return
        room = min(_MAX_ROWS, max(rows, self._more * self._room[s]))
        try:
            for arena in self._arenas:
                arena.grow(s, room, int(self.columns[s, index.USED]))
        finally:
            self._point(s)
        self._room[s] = room

    def _set_limits(self, s: int) -> None:
        """Set the limits of the index of stripe `s`, at which it is rebuilt; while it is, they are further off."""
        slots, rebuilt = int(self.columns[s, index.SLOTS]), s in self._rebuilds
        limit = _most_rows(s, slots) if rebuilt else int(slots * _max_load(s))
        self.columns[s, index.LIMIT] = min(limit, self._room[s])
        self.columns[s, index.MOST_DELETED] = slots // (_DELETED_PART - rebuilt)

    def _grow(self, s: int, batch: Batch) -> None:
        """Begin or finish to rebuild the index of stripe `s`, whose lock is held, so that a row can be added."""
        old = self.columns[s]
        rebuild = self._rebuilds.get(s)
        if rebuild is not None and rebuild.columns[index.SLOTS] >= old[index.SLOTS]:
            self._step(s, rebuild, int(old[index.SLOTS]), batch)
            if self._memory[s] is rebuild.memory:
                return
        self._cancel(s)
        if old[index.SIZE] >= _MAX_ROWS:
            raise MemoryLimitError(f"stripe {s} holds {_MAX_ROWS} rows, all that an index can lead to")
        slots = int(old[index.SLOTS])
        # A half empty index whose stash is full is one whose ids were made to collide: twice the slots would not help.
        if old[index.DELETED] < old[index.MOST_DELETED] and 2 * old[index.SIZE] >= old[index.LIMIT]:
            slots *= 2
        if rebuild is None and slots > _SPLIT_SLOTS and old[index.STASHED] < old[index.STASH_ROOM]:
            self._begin(s, slots)
            return
        stash = 0
        while True:
            new = old.copy()
            memory = _plan_index(new, slots, stash)
            copy_places(address_of(old), s, address_of(new), 0, int(self.places[s]))
            if new[index.STASHED] < new[index.STASH_ROOM]:
                break
            stash = 2 * int(new[index.STASHED])
        self._adopt(s, new, memory)

    def _begin(self, s: int, slots: int) -> None:
        """Begin to rebuild the index of stripe `s` with so many slots; until that is done it may fill to its limits."""
        new = self.columns[s].copy()
        memory = _plan_index(new, slots, 0)
        self._rebuilds[s] = _Rebuild(new, memory, 0, int(new[index.SIZE]))
        self._set_limits(s)

    def _step(self, s: int, rebuild: _Rebuild, places: int, batch: Batch | None = None) -> None:
        """Go on with a rebuild: `places` more, and more for rows that `batch` has added or erased."""
        old, new = address_of(self.columns[s]), address_of(rebuild.columns)
        size, slots = int(self.columns[s, index.SIZE]), int(self.columns[s, index.SLOTS])
        if size != rebuild.size and batch is not None:
            first, last = (int(at) for at in _SCRATCH.starts[s : s + 2])
            match_index(old, new, batch[1] + 8 * first, last - first)
            places += _STEP_PER_ROW * max(0, size - rebuild.size)
            rebuild.size = size
        end = min(slots, rebuild.place + places)
        copy_places(old, s, new, rebuild.place, end)
        rebuild.place = end
        if end < slots:
            return
        copy_places(old, s, new, slots, int(self.places[s]))
        del self._rebuilds[s]
        if rebuild.columns[index.STASHED] < rebuild.columns[index.STASH_ROOM]:
            self._adopt(s, rebuild.columns, rebuild.memory)
        else:
            self._dropped.append(rebuild.memory)  # its stash is too small: at its limits `_grow` makes another one

    def _adopt(self, s: int, new: npt.NDArray[np.int64], memory: object) -> None:
        """Lead to the rows of stripe `s` by another index."""
        self._make_room(s, min(_most_rows(s, int(new[index.SLOTS])), _MAX_ROWS))
        used = [index.INDEX, index.SLOTS, index.STASHED, index.STASH_ROOM, index.DELETED]
        self.columns[s, used] = new[used]
        self._dropped.append(self._memory[s])
        self._memory[s] = memory
        self._generations[s] += 1
        self._set_limits(s)
        self._advise(s)

    def _cancel(self, s: int) -> None:
        """Give up a rebuild that the caller does not keep up to date."""
        if (rebuild := self._rebuilds.pop(s, None)) is not None:
            self._dropped.append(rebuild.memory)
            self._set_limits(s)

    def _advise(self, s: int) -> None:
        """Ask for huge pages for the rows that the index of stripe `s` has room for."""
        limit = int(self.columns[s, index.LIMIT])
        if limit * self.row_bytes >= _HUGE_BYTES:
            for arena in self._arenas[:-1]:
                arena.advise_huge(s, limit)


def _plan_index(columns: npt.NDArray[np.int64], slots: int, stash: int) -> object:
    """Memory for an empty index, which `columns` describe from now on."""
    room = max(slots // _STASH_PART, stash, _FIRST_STASH)
    size = _index_bytes(slots, room)
    memory: object
    if size < _HEAP_BYTES:
        memory = heap = np.zeros(size + _LINE, np.uint8)
        start = address_of(heap)
        address = start + -start % _LINE
    else:
        memory = mapping = Mapping(size)
        address = mapping.address
        if size >= _HUGE_BYTES:
            mapping.advise_huge()
    columns[_SHAPE] = slots, room
    columns[[index.INDEX, index.STASHED, index.DELETED]] = address, 0, 0
    return memory


def _index_bytes(slots: int, stash: int) -> int:
    return 8 * slots + index.STASH_ENTRY * stash


def _max_load(s: int) -> float:
    """Fill at which stripe `s` grows: spread over 0.6..0.7, so that a table's stripes do not all grow in one batch."""
    return 0.6 + 0.1 * (s + 1) / STRIPES


def _most_rows(s: int, slots: int) -> int:
    """Rows to which an index of stripe `s` may fill while it is rebuilt."""
    return int(slots * _max_load(s) * _LATE)

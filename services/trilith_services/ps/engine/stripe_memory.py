"""StripeMemory: the rows and indexes of one table's stripes, and how they grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of
from trilith.runtime.machine import commits_strictly
from trilith_services.ps.engine.arena import HUGE_PAGE, Arena, MappedMemory
from trilith_services.ps.engine.kernels import index
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.sweep import copy_places, match_index
from trilith_services.ps.engine.row_layout import RowLayout
from trilith_services.ps.engine.scratch import SCRATCH, Batch

__all__ = ["StripeMemory", "max_load"]

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
_HEAP_BYTES = 128 << 10  # an index of fewer bytes comes from the heap: a mapping takes whole pages
_SHAPE = [index.SLOTS, index.STASH_ROOM]  # columns that say how large an index is
_LINE = 64  # bytes of a cache line, which slots are aligned to
_USE = [index.USED, *_SHAPE]
_FREE_BYTES = 4
_STEP_PER_ROW = 32  # places of an index that is rebuilt, copied for every row that a write added


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


class StripeMemory:
    """An index for each stripe of a table, and its part of the table's arenas of weights, of states and of times.

    The caller holds the locks. A large index is rebuilt by those who write, a few places with every write, while it
    fills to a sixteenth beyond its limit; only one whose ids were made to collide, or that one batch fills so far, is
    rebuilt in one turn (about 90 ns a row).

    Attributes:
        columns: int64[STRIPES, index.COLUMNS], what the kernels know of each stripe.
        address: Of `columns`.
        least_slots: Of an index: no smaller one is made.
    """

    def __init__(self, layout: RowLayout, initial_rows: int) -> None:
        self._layout = layout
        self.columns = np.zeros((STRIPES, index.COLUMNS), np.int64)
        self.address = address_of(self.columns)
        self._generations = [0] * STRIPES
        self._rebuilds: dict[int, _Rebuild] = {}
        self._dropped: list[object] = []  # memory that is unmapped after the turn in which it was replaced
        self.least_slots = _FIRST_SLOTS
        self._reset(-(-initial_rows // STRIPES))
        self.least_slots = int(self.columns[:, index.SLOTS].min())

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

    def unmap(self) -> None:
        """Give back memory that was replaced: not in the turn in which that happened, since it can take long."""
        self._dropped.clear()

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
            while slots * max_load(s) < rows_per_stripe:
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
        limit = _most_rows(s, slots) if rebuilt else int(slots * max_load(s))
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
            first, last = (int(at) for at in SCRATCH.starts[s : s + 2])
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
        memory = mapped = MappedMemory(size)
        address = mapped.address
        if size >= _HUGE_BYTES:
            mapped.advise_huge()
    columns[_SHAPE] = slots, room
    columns[[index.INDEX, index.STASHED, index.DELETED]] = address, 0, 0
    return memory


def _index_bytes(slots: int, stash: int) -> int:
    return 8 * slots + index.STASH_ENTRY * stash


def max_load(s: int) -> float:
    """Fill at which stripe `s` grows: spread over 0.6..0.7, so that a table's stripes do not all grow in one batch."""
    return 0.6 + 0.1 * (s + 1) / STRIPES


def _most_rows(s: int, slots: int) -> int:
    """Rows to which an index of stripe `s` may fill while it is rebuilt."""
    return int(slots * max_load(s) * _LATE)

"""Records in a random order that depends on a seed alone."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from trilith.data.pipeline.stages import Stage, State
from trilith.data.records import Records
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, load_u64, store_u64

__all__ = ["Shuffling"]

_DRAINED = 1024
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


class Shuffling:
    """Records in a random order: a buffer is kept full, and each record that comes takes the place of one that goes.

    What goes is a pure function of seed and count, so the order does not depend on chunks or threads.

    Args:
        upstream: Where records come from.
        size: Records of the buffer.
        seed: Decides the order.
    """

    def __init__(self, upstream: Stage, size: int, seed: int) -> None:
        self._upstream = upstream
        self._size = size
        self._seed = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
        self._drawn = 0
        # The record of slot s is row `_row[s]` of segment `_segment[s]`. Segments are chunks as they came, and are
        # packed again when most of their records have gone, so that a record does not keep a whole buffer alive.
        self._segments: dict[int, Records] = {}
        self._alive: dict[int, int] = {}
        self._newest = 0
        self._used = 0
        self._segment = np.empty(0, np.int64)
        self._row = np.empty(0, np.int64)

    def __next__(self) -> Records:
        while True:
            chunk = next(self._upstream, None)
            if chunk is None:
                return self._drain()
            if len(chunk):
                gone, rows = self._exchange(chunk)
                if gone.size:
                    return self._gather(gone, rows)

    def _exchange(self, chunk: Records) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Put a chunk's records into the buffer; the segments and rows of what they push out, in order."""
        self._newest += 1
        self._segments[self._newest], self._alive[self._newest] = chunk, len(chunk)
        room = min(self._size - self._used, len(chunk))
        if room:
            self._reserve(self._used + room)
            self._segment[self._used : self._used + room] = self._newest
            self._row[self._used : self._used + room] = np.arange(room)
            self._used += room
        count = len(chunk) - room
        gone, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        slots = self._draw(count, self._size)
        exchange(
            address_of(self._segment),
            address_of(self._row),
            address_of(slots),
            count,
            self._newest,
            room,
            address_of(gone),
            address_of(rows),
        )
        return gone, rows

    def _reserve(self, slots: int) -> None:
        if slots > self._segment.size:
            size = min(max(slots, 2 * self._segment.size, 1024), self._size)
            self._segment = np.resize(self._segment, size)
            self._row = np.resize(self._row, size)

    def _drain(self) -> Records:
        """Some of what is left."""
        count = min(self._used, _DRAINED)
        if not count:
            raise StopIteration
        slots = self._draw(count, np.arange(self._used, self._used - count, -1))
        gone, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        drain(
            address_of(self._segment),
            address_of(self._row),
            self._used,
            address_of(slots),
            count,
            address_of(gone),
            address_of(rows),
        )
        self._used -= count
        return self._gather(gone, rows)

    def _draw(self, count: int, below: Any) -> npt.NDArray[np.int64]:
        """int64[count] random numbers, each from 0 to below its `below`."""
        counters = np.arange(self._drawn, self._drawn + count, dtype=np.uint64)
        self._drawn += count
        return (_mixed(self._seed, counters) % np.asarray(below, np.uint64)).astype(np.int64)

    def _gather(self, gone: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Records:
        numbers, inverse = np.unique(gone, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        bounds = np.searchsorted(inverse[order], np.arange(numbers.size + 1))
        parts = []
        for index, number in enumerate(numbers.tolist()):
            chosen = order[bounds[index] : bounds[index + 1]]
            parts.append(self._segments[number].take(rows[chosen]))
            self._leave(number, chosen.size)
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        return Records.concatenate(parts).take(place)

    def _leave(self, number: int, count: int) -> None:
        """Take note that records of a segment are gone, and pack it if most are."""
        alive = self._alive[number] = self._alive[number] - count
        if not alive:
            del self._segments[number], self._alive[number]
        elif 2 * alive <= len(self._segments[number]):
            slots = self._slots_of(number)
            self._segments[number] = self._segments[number].take(self._row[slots]).compact()
            self._row[slots] = np.arange(slots.size)

    def _slots_of(self, number: int) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self._segment[: self._used] == number)

    def state(self) -> State:
        """See `Stage`; as dear as the buffer is large."""
        buffered = None
        if self._used:
            place = np.empty(self._used, np.int64)
            parts, packed = [], 0
            for number, segment in self._segments.items():
                slots = self._slots_of(number)
                parts.append(segment.take(self._row[slots]))
                place[slots] = np.arange(packed, packed + slots.size)
                packed += slots.size
            buffered = Records.concatenate(parts).take(place)
        return {"drawn": self._drawn, "buffer": buffered, "upstream": self._upstream.state()}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._drawn = state["drawn"]
        buffered: Records | None = state["buffer"]
        if buffered is not None:
            n = self._used = len(buffered)
            self._newest = 1
            self._segments, self._alive = {1: buffered}, {1: n}
            self._segment, self._row = np.ones(n, np.int64), np.arange(n)
        self._upstream.restore(state["upstream"])

    def close(self) -> None:
        """See `Stage`."""
        self._segments, self._alive, self._used = {}, {}, 0
        self._upstream.close()


def _mixed(seed: np.uint64, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Random bits for each counter: the finalizer of SplitMix64 over the counter's place in the seed's sequence."""
    with np.errstate(over="ignore"):
        bits = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + seed * np.uint64(0xD1342543DE82EF95)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def exchange(segment: int, row: int, slots: int, n: int, number: int, first: int, gone: int, rows: int) -> None:
    """Put rows `first`, `first` + 1, ... of segment `number` into slots, one after another.

    Args:
        segment: Address of int64[size], the segment of each slot's record; written.
        row: Address of int64[size], its row there; written.
        slots: Address of int64[n], the slot that each row goes to.
        n: How many.
        number: Of the segment that comes.
        first: Its first row.
        gone: Address of int64[n], written: the segment of what each row pushes out.
        rows: Address of int64[n], written: its row there.
    """
    for i in range(n):
        slot = _int64(load_u64(slots, i))
        store_u64(gone, i, load_u64(segment, slot))
        store_u64(rows, i, load_u64(row, slot))
        store_u64(segment, slot, np.uint64(number))
        store_u64(row, slot, np.uint64(first + i))


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def drain(segment: int, row: int, used: int, slots: int, n: int, gone: int, rows: int) -> None:
    """Take records out of slots, each time filling the hole with the last one.

    Args:
        segment: Address of int64[used], the segment of each slot's record; written.
        row: Address of int64[used], its row there; written.
        used: Records there are.
        slots: Address of int64[n]; the i-th is below `used` - i.
        n: How many.
        gone: Address of int64[n], written: the segments of what was taken.
        rows: Address of int64[n], written: their rows.
    """
    for i in range(n):
        slot, last = _int64(load_u64(slots, i)), used - 1 - i
        store_u64(gone, i, load_u64(segment, slot))
        store_u64(rows, i, load_u64(row, slot))
        store_u64(segment, slot, load_u64(segment, last))
        store_u64(row, slot, load_u64(row, last))

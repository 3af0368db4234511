"""Touched: which ids of a table have changed, between two looks of whoever sends them on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from trilith.ops.dedup import split_distinct
from trilith.ops.memory import address_of
from trilith.shard import UInt64Array
from trilith_services.ps.engine.kernels.gather import drop_repeats

__all__ = ["Touched", "distinct"]

_FIRST_ROOM = 1024
_MOST_ROOM = 1 << 20  # ids written down before every repeat among them is looked for
_MOST_RECENT = 1 << 16  # ids that are compared with: half a megabyte, which the second-level cache holds


class Touched:
    """Ids in the order of the writes, repeats among them or not; thread-safe.

    Writing down costs a copy of the ids, a few percent of a step. Only a writer that finds the room full pays for
    dropping the repeats, so a table that changes faster than it is looked at slows down and takes no more memory. If
    more than `most` distinct ids come together, they are forgotten and the whole table counts as changed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._ids = np.empty(_FIRST_ROOM, np.uint64)
        self._used = 0
        self._distinct: list[UInt64Array] = []
        self._everything = False
        self._account: Callable[[int], None] | None = None
        self._charged = 0

    def charge_to(self, account: Callable[[int], None] | None) -> None:
        """Tell `account` from now on how many more bytes this takes, or fewer; None: take all off again."""
        with self._lock:
            if self._account is not None:
                self._account(-self._charged)
            self._account, self._charged = account, 0
            self._charge()

    def _charge(self) -> None:
        if self._account is not None:
            size = self._ids.nbytes + sum(ids.nbytes for ids in self._distinct)
            self._account(size - self._charged)
            self._charged = size

    def add(self, ids: UInt64Array) -> None:
        """Note that the rows of `ids`, uint64[n], have been written or deleted."""
        with self._lock:
            if self._everything:
                return
            end = self._used + len(ids)
            if end > len(self._ids):
                self._make_room(len(ids))
                self._charge()
                end = self._used + len(ids)
            if not self._everything:
                self._ids[self._used : end] = ids
                self._used = end

    def add_all(self) -> None:
        """Note that every row may have changed."""
        with self._lock:
            self._forget()

    def take(self) -> tuple[UInt64Array, bool]:
        """The ids since the last time, uint64[n], and whether every other row may have changed too.

        Most repeats are left out, not all: finding the last of them costs more than sending their rows again.
        """
        with self._lock:
            pieces = [*self._distinct, self._ids[: self._used]]
            everything = self._everything
            room = max(_FIRST_ROOM, min(_MOST_ROOM, 1 << self._used.bit_length()))
            self._ids, self._used = np.empty(room, np.uint64), 0
            self._distinct, self._everything = [], False
            self._charge()
        pieces[-1] = _without_repeats(pieces[-1])
        return pieces[-1] if len(pieces) == 1 else np.concatenate(pieces), everything

    def _make_room(self, count: int) -> None:
        needed = self._used + count
        if needed <= _MOST_ROOM:
            ids = np.empty(1 << (needed - 1).bit_length(), np.uint64)
            ids[: self._used] = self._ids[: self._used]
            self._ids = ids
            return
        self._distinct.append(distinct(self._ids[: self._used]))
        self._used = 0
        if sum(map(len, self._distinct)) + count > self._most:
            self._distinct = [distinct(*self._distinct)]
            if len(self._distinct[0]) + count > self._most:
                self._forget()
                return
        self._ids = np.empty(max(count, _MOST_ROOM), np.uint64)

    def _forget(self) -> None:
        self._everything = True
        self._distinct, self._used = [], 0


def _without_repeats(ids: UInt64Array) -> UInt64Array:
    recent = np.zeros(min(_MOST_RECENT, 1 << max(6, (2 * len(ids)).bit_length())), np.uint64)
    kept = np.empty(len(ids), np.uint64)
    count = drop_repeats(address_of(ids), len(ids), address_of(recent), len(recent) - 1, address_of(kept))
    return kept[:count]


def distinct(*pieces: UInt64Array) -> UInt64Array:
    """uint64[n]: every id of the pieces once."""
    ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return split_distinct(ids, 1).ids if len(ids) else ids

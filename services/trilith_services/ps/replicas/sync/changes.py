"""ChangeLog: the touched ids of all tables in batches, which every target reads at a pace of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trilith.shard import UInt64Array
from trilith_services.ps.engine.touched import distinct

__all__ = ["ChangeLog", "Changes"]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What was touched between two moments; `number` is one higher than the last batch's, or the last of `merged`."""

    number: int
    since: float
    ids: Mapping[str, UInt64Array]
    whole: frozenset[str]
    merged: bool = False

    @property
    def rows(self) -> int:
        return sum(map(len, self.ids.values()))


@dataclass(frozen=True, slots=True)
class Changes:
    """What a target has not read yet.

    Attributes:
        cursor: Where to go on.
        ids: Per table uint64[n].
        whole: Tables of which anything may have changed.
        since: Unix seconds; no change in it is older.
        until: Every change acknowledged before this time is in it, or was read before.
        batch: Number of the batch that `ids` are, as everybody reads them; -1: they are of several.
    """

    cursor: int
    ids: Mapping[str, UInt64Array]
    whole: frozenset[str]
    since: float
    until: float
    batch: int = -1


class ChangeLog:
    """Batches of touched ids, kept until every target has read them; thread-safe.

    If more than `most` ids wait, all batches become one, in which each id stands once: a target that has read some of
    it reads those ids again, which does no harm. If that is still too much it is dropped, and whoever has not read it
    is told that whole tables have changed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._news = threading.Condition()
        self._batches: deque[_Batch] = deque()
        self._next = 0
        self._first = 0  # cursors below it have missed something
        self._tables: set[str] = set()
        self._until = 0.0
        self._ended = False

    def append(
        self, ids: Mapping[str, UInt64Array], whole: Iterable[str], tables: Iterable[str], since: float, until: float
    ) -> None:
        """Add what was touched between two moments; `tables` are all there are."""
        with self._news:
            self._tables = set(tables)
            self._until = until
            touched = {name: given for name, given in ids.items() if len(given)}
            batch = _Batch(self._next, since, touched, frozenset(whole))
            if batch.ids or batch.whole:
                self._batches.append(batch)
                self._next += 1
                if sum(waiting.rows for waiting in self._batches) > self._most:
                    self._shrink()
            self._news.notify_all()

    def end(self) -> None:
        """Wake whoever waits, for good."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wake(self) -> None:
        """Let everybody look whether there is something to do."""
        with self._news:
            self._news.notify_all()

    def join(self) -> tuple[int, set[str]]:
        """The cursor of a target that begins now, and the tables that it has to be given whole."""
        with self._news:
            return self._next, set(self._tables)

    @property
    def tables(self) -> set[str]:
        """Names of the tables whose changes are noted."""
        with self._news:
            return set(self._tables)

    def wait(self, cursor: int, timeout_s: float) -> None:
        """Return when there is something after `cursor`, somebody calls `wake`, or the time is over."""
        with self._news:
            if not self._ended and cursor == self._next:
                self._news.wait(timeout_s)

    def read(self, cursor: int) -> Changes:
        """What came after `cursor`."""
        with self._news:
            if cursor < self._first:
                return Changes(self._next, {}, frozenset(self._tables), self._until, self._until)
            batches = [batch for batch in self._batches if batch.number >= cursor]
            after, until = self._next, self._until
        names = {name for batch in batches for name in batch.ids}
        found = {name: [batch.ids[name] for batch in batches if name in batch.ids] for name in sorted(names)}
        ids = {name: pieces[0] if len(pieces) == 1 else distinct(*pieces) for name, pieces in found.items()}
        whole = frozenset(name for batch in batches for name in batch.whole)
        # A batch that others were merged into is another than the one whose number it has.
        number = batches[0].number if len(batches) == 1 and not batches[0].merged else -1
        return Changes(after, ids, whole, batches[0].since if batches else until, until, number)

    def waiting(self, cursor: int) -> tuple[int, float]:
        """How many ids come after `cursor`, about, and since when the first of them has waited; 0 for nothing."""
        with self._news:
            batches = [batch for batch in self._batches if batch.number >= cursor]
            return sum(batch.rows for batch in batches), batches[0].since if batches else 0.0

    def forget(self, cursor: int) -> None:
        """Drop what comes before `cursor`; nobody will ask for it."""
        with self._news:
            while self._batches and self._batches[0].number < cursor:
                self._batches.popleft()

    def _shrink(self) -> None:
        names = {name for batch in self._batches for name in batch.ids}
        ids = {name: distinct(*(b.ids[name] for b in self._batches if name in b.ids)) for name in names}
        whole = frozenset(name for batch in self._batches for name in batch.whole)
        merged = _Batch(self._next - 1, self._batches[0].since, ids, whole, merged=True)
        self._batches.clear()
        if merged.rows > self._most // 2:
            self._first = self._next
        else:
            self._batches.append(merged)

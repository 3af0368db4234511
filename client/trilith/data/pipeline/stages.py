"""The steps that a dataset's iterator is made of, each with a position that can be saved.

Before batching, what flows are chunks of records (any number of records, also none), and a position counts records, so
it does not matter where one chunk ends and the next begins. A state is a nested dict of plain values and `Records`; it
is cheap to take, is never changed afterwards, and says where a stage is behind the last element it gave out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from trilith.data.records import Records

__all__ = [
    "Batching",
    "Ending",
    "Noticing",
    "Picking",
    "Repeating",
    "Replayed",
    "Skipping",
    "Stage",
    "State",
    "Stepping",
    "Striding",
    "Taking",
]

log = logging.getLogger(__name__)

State: TypeAlias = Mapping[str, Any]


class Stage(Protocol):
    """An iterator with a position. Used by one thread at a time."""

    def __next__(self) -> Any: ...

    def state(self) -> State:
        """Where it is behind the last element given out."""

    def restore(self, state: State) -> None:
        """Go there; only before the first element is asked for."""

    def close(self) -> None:
        """Let go of files and threads; harmless when repeated."""


class _Step:
    """A stage behind another one whose position is the other one's."""

    def __init__(self, upstream: Stage) -> None:
        self._upstream = upstream

    def state(self) -> State:
        """See `Stage`."""
        return self._upstream.state()

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._upstream.restore(state)

    def close(self) -> None:
        """See `Stage`."""
        self._upstream.close()


class Stepping(_Step):
    """Every element through a function that remembers nothing."""

    def __init__(self, upstream: Stage, function: Callable[[Any], Any]) -> None:
        super().__init__(upstream)
        self._function = function

    def __next__(self) -> Any:
        return self._function(next(self._upstream))


class _Counting(_Step):
    """A stage whose position is the other one's and a number of elements."""

    def __init__(self, upstream: Stage) -> None:
        super().__init__(upstream)
        self._count = 0

    def state(self) -> State:
        """See `Stage`."""
        return {"count": self._count, "upstream": self._upstream.state()}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._count = state["count"]
        self._upstream.restore(state["upstream"])


def _size(element: Any, *, records: bool) -> int:
    return len(element) if records else 1


class Taking(_Counting):
    """The first `limit` records, or elements."""

    def __init__(self, upstream: Stage, limit: int, *, records: bool) -> None:
        super().__init__(upstream)
        self._limit = limit
        self._records = records

    def __next__(self) -> Any:
        if self._count >= self._limit:
            self._upstream.close()
            raise StopIteration
        element = next(self._upstream)
        rest = self._limit - self._count
        if self._records and len(element) > rest:
            element = element.take(slice(0, rest))
        self._count += _size(element, records=self._records)
        return element


class Skipping(_Counting):
    """What comes behind the first `limit` records, or elements."""

    def __init__(self, upstream: Stage, limit: int, *, records: bool) -> None:
        super().__init__(upstream)
        self._limit = limit
        self._records = records

    def __next__(self) -> Any:
        while True:
            element = next(self._upstream)
            rest = self._limit - self._count
            if rest <= 0:
                return element
            self._count += min(rest, _size(element, records=self._records))
            if self._records and len(element) > rest:
                return element.take(slice(rest, None))


class Striding(_Counting):
    """Every `count`-th record, from the `index`-th on.

    Args:
        upstream: Where records come from.
        index: The first.
        count: From one to the next.
        rank: Whether the share is a rank's, which others may wait for: it is said when there is nothing in it.
    """

    def __init__(self, upstream: Stage, index: int, count: int, *, rank: bool = False) -> None:
        super().__init__(upstream)
        self._index = index
        self._stride = count
        self._rank = rank

    def __next__(self) -> Records:
        try:
            records: Records = next(self._upstream)
        except StopIteration:
            if self._rank and self._count <= self._index:
                log.warning("share %d of %d is empty: %d records are all", self._index, self._stride, self._count)
            raise
        first = (self._index - self._count) % self._stride
        self._count += len(records)
        return records.take(slice(first, None, self._stride))


class Ending(_Step):
    """The very elements of a stage, and a call when there are no more."""

    def __init__(self, upstream: Stage, ended: Callable[[], None]) -> None:
        super().__init__(upstream)
        self._ended = ended

    def __next__(self) -> Any:
        try:
            return next(self._upstream)
        except StopIteration:
            self._ended()
            raise


class Noticing(_Step):
    """The very elements of a stage of records; says in the log when there were none.

    Args:
        upstream: Where records come from.
        what: How to call it.
    """

    def __init__(self, upstream: Stage, what: str) -> None:
        super().__init__(upstream)
        self._what = what
        self._given = False

    def __next__(self) -> Any:
        try:
            records: Records = next(self._upstream)
        except StopIteration:
            if not self._given:
                log.warning("%s is empty: its files hold no records", self._what)
            raise
        self._given = self._given or len(records) > 0
        return records

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._given = True  # before
        super().restore(state)


class Picking(_Counting):
    """Every `count`-th element, from the `index`-th on."""

    def __init__(self, upstream: Stage, index: int, count: int) -> None:
        super().__init__(upstream)
        self._index = index
        self._stride = count

    def __next__(self) -> Any:
        while True:
            element = next(self._upstream)
            self._count += 1
            if (self._count - 1 - self._index) % self._stride == 0:
                return element


class Repeating:
    """A stage again and again.

    Args:
        make: Makes the stage of an epoch.
        epochs: How many; None is without end.
    """

    def __init__(self, make: Callable[[int], Stage], epochs: int | None) -> None:
        self._make = make
        self._epochs = epochs
        self._epoch = 0
        self._given = False
        self._current: Stage | None = None

    def __next__(self) -> Any:
        while self._epochs is None or self._epoch < self._epochs:
            if self._current is None:
                self._current, self._given = self._make(self._epoch), False
            try:
                element = next(self._current)
            except StopIteration:
                self._current.close()
                self._current = None
                self._epoch += 1
                if not self._given and self._epochs is None:
                    raise  # without end, nothing again and again would hang
                continue
            self._given = True
            return element
        raise StopIteration

    def state(self) -> State:
        """See `Stage`."""
        inner = None if self._current is None else self._current.state()
        return {"epoch": self._epoch, "given": self._given, "inner": inner}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._epoch = state["epoch"]
        if state["inner"] is not None:
            self._current = self._make(self._epoch)
            self._current.restore(state["inner"])
            self._given = state["given"]

    def close(self) -> None:
        """See `Stage`."""
        if self._current is not None:
            self._current.close()
            self._current = None
        self._epochs = 0


class Batching:
    """Batches of exactly `size` records; the last one may be smaller, or is dropped."""

    def __init__(self, upstream: Stage, size: int, *, drop_remainder: bool) -> None:
        self._upstream = upstream
        self._size = size
        self._drop = drop_remainder
        self._chunk: Records | None = None
        self._at = 0

    def __next__(self) -> Records:
        parts, have = [], 0
        while have < self._size:
            if self._chunk is None:
                self._chunk, self._at = next(self._upstream, None), 0
                if self._chunk is None:
                    break
            start, self._at = self._at, min(self._at + self._size - have, len(self._chunk))
            if self._at > start:
                parts.append(self._chunk.take(slice(start, self._at)))
                have += self._at - start
            if self._at == len(self._chunk):
                self._chunk = None
        if not parts or (have < self._size and self._drop):
            raise StopIteration
        return parts[0] if len(parts) == 1 else Records.concatenate(parts)

    def state(self) -> State:
        """See `Stage`."""
        rest = None if self._chunk is None else self._chunk.take(slice(self._at, None))
        return {"rest": rest, "upstream": self._upstream.state()}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._chunk, self._at = state["rest"], 0
        self._upstream.restore(state["upstream"])

    def close(self) -> None:
        """See `Stage`."""
        self._chunk = None
        self._upstream.close()


class Replayed:
    """A stage of records whose own state is dear: it is taken now and then, and records since then are counted.

    Going there means restoring the last such state and letting the stage give those records again.

    Args:
        stage: Gives the same records from the same state, in whatever chunks.
        every: Records between two states.
    """

    def __init__(self, stage: Stage, every: int) -> None:
        self._stage = stage
        self._every = every
        self._base: State | None = None
        self._since = 0
        self._behind = 0

    def __next__(self) -> Records:
        if not self._behind and (self._base is None or self._since >= self._every):
            self._base, self._since = self._stage.state(), 0
        while True:
            records: Records = next(self._stage)
            if len(records) > self._behind or not self._behind:
                records = records.take(slice(self._behind, None)) if self._behind else records
                self._behind = 0
                self._since += len(records)
                return records
            self._behind -= len(records)

    def state(self) -> State:
        """See `Stage`."""
        return {"base": self._stage.state() if self._base is None else self._base, "since": self._since}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._stage.restore(state["base"])
        self._base = state["base"]
        self._since = self._behind = state["since"]

    def close(self) -> None:
        """See `Stage`."""
        self._stage.close()

"""Overlap of a training step with its communication: batches fetched ahead, updates sent behind, values read one ahead.

What it costs is staleness, which is bounded. With `prefetch` batches fetched ahead and at most `async_push` updates on
their way, the rows of a batch lack at most the last `prefetch + async_push` updates of this worker; those of other
workers are never ordered. A queue between two fetches of a batch adds its depth and one. Values read by `Ahead` lack at
most the last `1 + async_push`. Depth 0 is the exact order, in the caller's thread.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from trilith.errors import ClosedError, InvalidRequestError
from trilith.runtime.forks import renew_in_children

__all__ = ["Ahead", "Fetch", "Lane", "Pending", "Place", "Placed", "Prefetcher", "Pusher"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_S = TypeVar("_S")

_POLL_S = 0.1

Place: TypeAlias = Callable[[], dict[str, Any]]
"""A place among items, cheap to keep: makes the state from which an iterator goes on behind it."""


@runtime_checkable
class Placed(Protocol):
    """Items that know where they are, such as those of `trilith.data.DatasetIterator`."""

    def position(self) -> Place:
        """Behind the last item that was taken."""

    def follow(self, place: Callable[[], Place]) -> None:
        """Have `state_dict` say where `place` says that a loop is, for which items are taken ahead."""


def _nowhere() -> dict[str, Any]:
    raise InvalidRequestError(
        "these items have no place to go on from; prefetch the iterator of a dataset, samples.iterate(), itself"
    )


class Fetch(Generic[_R]):
    """The outcome of a fetch: its value, or the error that it ended with."""

    __slots__ = ("_error", "_value")

    def __init__(self, call: Callable[[], _R]) -> None:
        """Do it now."""
        self._value: _R | None = None
        self._error: BaseException | None = None
        try:
            self._value = call()
        except BaseException as error:  # noqa: BLE001 - raised where the value is asked for
            self._error = error

    def result(self) -> _R:
        """The value; raises what the fetch raised."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Lane:
    """Calls made one after another by one thread, in the order in which they were given.

    Fetches and pushes of a loop that share a lane overlap with its computation, and yet what each sees depends on the
    loop's order alone: such runs are reproducible, to the bit where the computation is.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Pending[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        renew_in_children(self)

    def after_fork(self) -> None:
        """What was on its way is the parent's."""
        self._calls = queue.SimpleQueue()
        self._thread = None

    def submit(self, call: Callable[[], _R]) -> Pending[_R]:
        """Have `call` made when those before it are."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trilith-lane", daemon=True)
            self._thread.start()
        pending: Pending[_R] = Pending()
        self._calls.put((call, pending))
        return pending

    def drain(self) -> None:
        """Wait until all calls so far are made; their errors are with whoever asks for their results."""
        if self._thread is not None:
            self.submit(lambda: None).result()

    def close(self) -> None:
        """End the thread after the calls that were given."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (found := self._calls.get()) is not None:
            call, pending = found
            pending.settle(Fetch(call))


class Pending(Generic[_R]):
    """The outcome of a call that may not have been made yet."""

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._outcome: Fetch[_R] | None = None

    def settle(self, outcome: Fetch[_R]) -> None:
        """Know the outcome."""
        self._outcome = outcome
        self._settled.set()

    def result(self) -> _R:
        """Wait; the value, or what the call raised."""
        self._settled.wait()
        assert self._outcome is not None
        return self._outcome.result()


class Prefetcher(Generic[_T, _R]):
    """Goes over items, each with what `fetch` gave for it, fetched up to `depth` items ahead by one thread.

    An item's fetch begins when the item `depth` places before it is taken, not earlier. Used as a context manager or
    closed, so that its thread ends when the loop is left early. Of items that are `Placed`, `state_dict` says where the
    loop is, whatever has been taken ahead of it, and so does that of the items themselves.

    Args:
        items: Read by the thread.
        fetch: Called with each item, in order.
        depth: 0 fetches in the caller's thread, when the item is taken.
        background: Without, the fetches are made in the caller's thread, `depth` ahead all the same: the staleness is
            then not the most there can be but exact, and runs are reproducible.
        lane: Makes the fetches, in order with what else it is given; items are then taken in the caller's thread.
    """

    def __init__(
        self,
        items: Iterable[_T],
        fetch: Callable[[_T], _R],
        depth: int,
        *,
        background: bool = True,
        lane: Lane | None = None,
    ) -> None:
        _check_depth("prefetch", depth)
        self._items = iter(items)
        self._fetch = fetch
        self._depth = depth
        self._follows: Callable[[], Place] | None = None
        self._placed = next((each for each in (self._items, items) if isinstance(each, Placed)), None)
        self._place: Place = _nowhere
        if self._placed is not None:
            self._place = self._placed.position()
            self._placed.follow(self._loop_place)
        self._ready: queue.SimpleQueue[tuple[_T, Fetch[_R] | Pending[_R], Place] | BaseException | None] = (
            queue.SimpleQueue()
        )
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lane = lane
        if depth and background and lane is None:
            self._thread = threading.Thread(target=self._run, name="trilith-prefetch", daemon=True)
            self._thread.start()
            renew_in_children(self)

    def after_fork(self) -> None:
        """The items are the parent's, whose thread is amid them: a child that goes on with them is told."""
        self._ready = queue.SimpleQueue()
        self._ready.put(
            ClosedError("this process was forked while batches were fetched ahead; prefetch after the fork")
        )
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[tuple[_T, Fetch[_R] | Pending[_R]]]:
        """Items in order, with their fetches; an error of `items` is raised in its place."""
        if self._thread is None:
            yield from self._in_this_thread()
            return
        while not self._closed.is_set():
            found = self._ready.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            self._room.release()
            item, fetched, self._place = found
            yield item, fetched

    def _in_this_thread(self) -> Iterator[tuple[_T, Fetch[_R] | Pending[_R]]]:
        ahead: deque[tuple[_T, Fetch[_R] | Pending[_R], Place]] = deque()
        for taken in self._items:
            if self._closed.is_set():
                return
            ahead.append(self._fetched(taken))
            if len(ahead) > self._depth:
                item, fetched, self._place = ahead.popleft()
                yield item, fetched
        for item, fetched, self._place in ahead:
            yield item, fetched

    def _fetched(self, item: _T) -> tuple[_T, Fetch[_R] | Pending[_R], Place]:
        """The item last taken, with its fetch and the place behind it."""
        place = _nowhere if self._placed is None else self._placed.position()
        if self._lane is not None:
            return item, self._lane.submit(lambda: self._fetch(item)), place
        return item, Fetch(lambda: self._fetch(item)), place

    def position(self) -> Place:
        """Behind the item last given out; making a state of it is an error where the items do not know their places."""
        return self._place

    def follow(self, place: Callable[[], Place]) -> None:
        """See `Placed`."""
        self._follows = place

    def state_dict(self) -> dict[str, Any]:
        """What the items' `state_dict` would be had only those been taken that were given to the loop."""
        return self._loop_place()()

    def _loop_place(self) -> Place:
        return self.position() if self._follows is None else self._follows()

    def _run(self) -> None:
        try:
            for item in self._items:
                # How many fetches there are depends on how many items were taken, not on when the end comes: fetches
                # in which several processes take part need that.
                while not self._room.acquire(timeout=_POLL_S):
                    if self._closed.is_set():
                        return
                self._ready.put(self._fetched(item))
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that reads
            self._ready.put(error)

    def close(self) -> None:
        """End the thread, when it is `depth` ahead; what it has fetched is forgotten."""
        self._closed.set()
        self._ready.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def then(self, follow: Callable[[_R], _S], depth: int) -> Prefetcher[_T, _S]:
        """Go over the same items, each with what `follow` gave for what was fetched for it, `depth` of them ahead.

        Closing what is returned closes both, and both have then fetched as much as was taken asks for.
        """
        return _Followed(self, follow, depth)

    def __enter__(self) -> Prefetcher[_T, _R]:
        """Return the prefetcher itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class _Followed(Prefetcher[_T, _S]):
    """A second fetch for each item of a prefetcher, in a thread of its own."""

    def __init__(self, before: Prefetcher[_T, _R], follow: Callable[[_R], _S], depth: int) -> None:
        self._before = before
        self._pairs = Prefetcher(before, lambda pair: follow(pair[1].result()), depth)

    def __iter__(self) -> Iterator[tuple[_T, Fetch[_S] | Pending[_S]]]:
        for (item, _), fetched in self._pairs:
            yield item, fetched

    def position(self) -> Place:
        """Behind the item last given out."""
        return self._pairs.position()

    def follow(self, place: Callable[[], Place]) -> None:
        """See `Placed`."""
        self._pairs.follow(place)

    def state_dict(self) -> dict[str, Any]:
        """See `Prefetcher`."""
        return self._pairs.state_dict()

    def close(self) -> None:
        """End both threads, the later one first: it is where the items that were taken have brought it."""
        self._pairs.close()
        self._before.close()


class Pusher:
    """Makes calls one after another in a thread of its own, with at most `depth` not finished.

    An error is raised, as it was, by the next `push` or `drain`. What was pushed after the call that failed is dropped,
    unless a lane makes the calls.

    Args:
        depth: 0 makes every call at once, in the caller's thread.
        background: Without, calls wait until `depth` more were pushed and are then made in the caller's thread: they
            are then late by exactly that much, and runs are reproducible.
        lane: Makes the calls, in order with what else it is given.
    """

    def __init__(self, depth: int = 0, *, background: bool = True, lane: Lane | None = None) -> None:
        _check_depth("async_push", depth)
        self.depth = depth
        self._background = background
        self._lane = lane
        self._on_lane: deque[Pending[object]] = deque()
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if depth:
            renew_in_children(self)

    def after_fork(self) -> None:
        """A child begins with nothing on its way: what was is the parent's."""
        self._waiting.clear()
        self._on_lane.clear()
        self._changed = threading.Condition()
        self._unfinished, self._error, self._closed, self._thread = 0, None, False, None

    def push(self, call: Callable[[], object]) -> None:
        """Have `call` made; waits while `depth` are not finished."""
        if self._lane is not None:
            self._push_on_lane(self._lane, call)
        elif self.depth == 0:
            call()
        elif self._background:
            self._push(call)
        else:
            self._waiting.append(call)
            while len(self._waiting) > self.depth:
                self._call_oldest()

    def _push_on_lane(self, lane: Lane, call: Callable[[], object]) -> None:
        self._on_lane.append(lane.submit(call))
        while len(self._on_lane) > self.depth:
            self._on_lane.popleft().result()

    def _push(self, call: Callable[[], object]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished < self.depth or self._error is not None)
            self._raise()
            self._waiting.append(call)
            self._unfinished += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trilith-push", daemon=True)
                self._thread.start()

    def drain(self) -> None:
        """Wait until every call is finished."""
        while self._on_lane:
            self._on_lane.popleft().result()
        if self.depth and not self._background:
            while self._waiting:
                self._call_oldest()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished == 0 or self._error is not None)
            self._raise()

    def close(self) -> None:
        """End the thread after the call that it makes; what waits is dropped. A later push begins anew."""
        self._on_lane.clear()
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._unfinished = 0
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._error, self._closed = None, None, False

    def _call_oldest(self) -> None:
        try:
            self._waiting.popleft()()
        except BaseException:
            self._waiting.clear()
            raise

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                call = self._waiting.popleft()
            outcome = Fetch(call)
            with self._changed:
                if self._closed:
                    return
                self._unfinished -= 1
                try:
                    outcome.result()
                except BaseException as error:  # noqa: BLE001 - raised in the thread that pushes
                    self._error = error
                    self._unfinished -= len(self._waiting)
                    self._waiting.clear()
                self._changed.notify_all()


class Ahead(Generic[_R]):
    """A value that is read during one step for the next; the first step reads its own.

    Args:
        read: Gives the present value.
        background: Without, the value for the next step is read in the caller's thread, when the present one is taken.
        lane: Reads, in order with what else it is given.
    """

    def __init__(self, read: Callable[[], _R], *, background: bool = True, lane: Lane | None = None) -> None:
        self._read = read
        self._background = background
        self._lane = lane
        self._next: Fetch[_R] | Pending[_R] | None = None
        self._thread: threading.Thread | None = None
        renew_in_children(self)

    def after_fork(self) -> None:
        """A child reads anew."""
        self._thread = self._next = None

    def take(self) -> _R:
        """The value that was read during the last step; begins to read the next one."""
        self._join()
        if self._next is None:
            self._next = Fetch(self._read)
        now, self._next = self._next, None
        if self._lane is not None:
            self._next = self._lane.submit(self._read)
        elif self._background:
            self._thread = threading.Thread(target=self._begin, name="trilith-ahead", daemon=True)
            self._thread.start()
        else:
            self._begin()
        return now.result()

    def forget(self) -> None:
        """Read anew at the next `take`."""
        self._join()
        self._next = None

    def _begin(self) -> None:
        self._next = Fetch(self._read)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _check_depth(name: str, depth: int) -> None:
    if depth < 0:
        raise InvalidRequestError(f"{name}={depth} is below 0")

"""Threads of a pipeline: functions run over elements ahead of the consumer, results in order, memory bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from trilith.data.pipeline.stages import Stage, State

__all__ = ["Helpers", "Overlapping", "Prefetching"]


class _Thread(threading.Thread):
    """A thread of a pipeline; ends with the process."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        super().__init__(target=target, args=args, name=f"trilith-data-{target.__name__.strip('_')}", daemon=True)

    def wait(self) -> None:
        """Join, unless a pipeline's thread asks: the garbage collector may close a pipeline in any of them."""
        if not isinstance(threading.current_thread(), _Thread):
            self.join()


class _Task:
    """A function of one element, run by whoever claims it first."""

    __slots__ = ("_claim", "_element", "_error", "_function", "_result", "_unfinished", "state")

    def __init__(self, function: Callable[[Any], Any], element: Any, state: State) -> None:
        self._function = function
        self._element = element
        self._claim = threading.Lock()
        self._unfinished = threading.Lock()
        self._unfinished.acquire()
        self._result: Any = None
        self._error: BaseException | None = None
        self.state = state

    def run(self) -> bool:
        """Do it, unless somebody else has begun; whether this call did."""
        if not self._claim.acquire(blocking=False):
            return False
        try:
            self._result = self._function(self._element)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error
        self._element = None
        self._unfinished.release()
        return True

    @property
    def done(self) -> bool:
        return not self._unfinished.locked()

    def result(self) -> Any:
        with self._unfinished:
            pass
        if self._error is not None:
            raise self._error
        return self._result


class Helpers:
    """Threads that run tasks beside the thread that drives a pipeline. They end with `close`."""

    def __init__(self, count: int) -> None:
        """Start `count` threads when there is something to do."""
        self._count = count
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[_Thread] = []

    @property
    def count(self) -> int:
        """How many threads there are beside the driving one."""
        return self._count

    def offer(self, task: _Task) -> None:
        """Have a task run by whoever is free."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()
            if len(self._threads) < self._count:
                self._threads.append(_Thread(self._work))
                self._threads[-1].start()

    def help(self) -> bool:
        """Run a task of any stage in the caller's thread; False if there is none."""
        with self._changed:
            task = self._tasks.popleft() if self._tasks else None
        if task is None:
            return False
        task.run()
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks:
                    if self._closed:
                        return
                    self._changed.wait()
                task = self._tasks.popleft()
            task.run()
            del task

    def close(self) -> None:
        """End the threads; tasks that nobody has begun are dropped."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.wait()


class Overlapping:
    """Every element of a stage through a function that remembers nothing, several at a time, results in order.

    The driving thread works, too: rather than wait for a result it runs what nobody has begun, also of other stages.

    Args:
        upstream: Where elements come from.
        function: Of one element.
        helpers: Other threads.
    """

    def __init__(self, upstream: Stage, function: Callable[[Any], Any], helpers: Helpers) -> None:
        self._upstream = upstream
        self._function = function
        self._helpers = helpers
        self._window = helpers.count + 2
        self._ahead: deque[_Task] = deque()
        self._ended: BaseException | None = None
        self._state: State | None = None

    def __next__(self) -> Any:
        if self._state is None:
            self._state = self._upstream.state()
        while len(self._ahead) < self._window and self._ended is None:
            try:
                element = next(self._upstream)
            except BaseException as error:  # noqa: BLE001 - raised when what came before has been given out
                self._ended = error
                break
            task = _Task(self._function, element, self._upstream.state())
            del element
            self._ahead.append(task)
            self._helpers.offer(task)
        if not self._ahead:
            ended, self._ended = self._ended, StopIteration()
            assert ended is not None
            raise ended
        task = self._ahead.popleft()
        if not task.run():
            while not task.done and self._helpers.help():
                pass
        result = task.result()
        self._state = task.state
        return result

    def state(self) -> State:
        """See `Stage`."""
        return self._upstream.state() if self._state is None else self._state

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._upstream.restore(state)

    def close(self) -> None:
        """See `Stage`."""
        self._ahead.clear()
        self._ended = StopIteration()
        self._upstream.close()


class _Channel:
    """What the driving thread and the consumer share: elements with their states, and whether to go on."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._ready: deque[tuple[Any, State | None, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    def put(self, element: Any, state: State | None, error: BaseException | None = None) -> bool:
        """Wait for room; False if nobody wants any more."""
        with self._changed:
            while len(self._ready) >= self._depth and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return False
            self._ready.append((element, state, error))
            self._changed.notify_all()
            return True

    def get(self) -> tuple[Any, State | None, BaseException | None]:
        with self._changed:
            while not self._ready and not self._stopped:
                self._changed.wait()
            if not self._ready:
                return None, None, StopIteration()
            got = self._ready.popleft()
            self._changed.notify_all()
            return got

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()


def _drive(upstream: Stage, helpers: Helpers, channel: _Channel) -> None:
    """Run a pipeline into a channel until it ends or nobody wants any more."""
    try:
        while True:
            try:
                element = next(upstream)
                state = upstream.state()
            except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread, StopIteration too
                channel.put(None, None, error)
                return
            if not channel.put(element, state):
                return
            del element, state
    finally:
        upstream.close()
        helpers.close()


class Prefetching:
    """Elements of a stage, made ahead on threads of their own.

    Threads end when the elements do and on `close`.

    Args:
        upstream: Where elements come from; driven by another thread from the first element on.
        helpers: Threads that `upstream` has for its functions.
        depth: Elements that may wait.
    """

    def __init__(self, upstream: Stage, helpers: Helpers, depth: int) -> None:
        self._upstream: Stage | None = upstream
        self._helpers = helpers
        self._channel = _Channel(depth)
        self._state: State | None = None
        self._thread: _Thread | None = None
        self._error: BaseException | None = None

    def __next__(self) -> Any:
        if self._error is not None:
            raise StopIteration
        thread = self._thread or self._start()
        element, state, error = self._channel.get()
        if error is not None:
            self._error = error
            self._join(thread)
            raise error
        self._state = state
        return element

    def _start(self) -> _Thread:
        upstream, self._upstream = self._upstream, None
        assert upstream is not None
        self._state = upstream.state()
        self._thread = _Thread(_drive, upstream, self._helpers, self._channel)
        self._thread.start()
        return self._thread

    def state(self) -> State:
        """See `Stage`: behind the last element given out, whatever has been made ahead."""
        if self._state is None:
            assert self._upstream is not None
            return self._upstream.state()
        return self._state

    def restore(self, state: State) -> None:
        """See `Stage`."""
        assert self._upstream is not None
        self._upstream.restore(state)

    def close(self) -> None:
        """See `Stage`; returns when the threads have ended."""
        if self._error is None:
            self._error = StopIteration()
        self._channel.stop()
        if self._upstream is not None:
            self._upstream.close()
            self._helpers.close()
        if self._thread is not None:
            self._join(self._thread)

    def _join(self, thread: _Thread) -> None:
        thread.wait()
        self._helpers.close()

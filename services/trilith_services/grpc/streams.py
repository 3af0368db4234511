"""The server's side of streamed calls: a thread for each open stream, turns for those that have something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from trilith.errors import OverloadedError, UnavailableError
from trilith.rpc.remote import ERROR_KEY
from trilith.rpc.streams import FULL_KEY

__all__ = ["Streams"]


class Streams:
    """All streams of one server.

    An open stream holds a thread, which costs little while it waits for a request. Working is limited: a request takes
    one of `workers` turns, or waits for one, or is refused if `max_queue` others wait already.
    """

    def __init__(self, *, most: int, workers: int, max_queue: int, refused: Callable[[], None]) -> None:
        """Allow `most` open streams; `refused` is told of every request turned away."""
        self._most = most
        self._max_queue, self._refused = max_queue, refused
        self._pool = ThreadPoolExecutor(most + 1, thread_name_prefix="rpc-stream")
        self._lock = threading.Lock()
        self._turns = workers
        self._given = threading.Condition(self._lock)
        self._idle: set[grpc.ServicerContext] = set()
        self._open = 0
        self._draining = False
        self.waiting = 0

    def handler(
        self,
        method: Callable[[Any, grpc.ServicerContext], Any],
        parse: Callable[[bytes], Any] | None,
        serialize: Callable[[Any], bytes] | None,
    ) -> Any:
        """A gRPC handler that answers every request of a stream in turn with `method`."""

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._opened(context):
                for request in requests:
                    self._begin(context)
                    try:
                        try:
                            reply = method(request, context)
                        finally:
                            self._give_turn()
                        yield reply
                    finally:
                        ending = self._end(context)
                    if ending:
                        return

        answer.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(answer, parse, serialize)

    @contextmanager
    def _opened(self, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            full = self._open >= self._most
            draining = self._draining
            if not full and not draining:
                self._open += 1
                self._idle.add(context)
        if draining:
            _refuse(context, UnavailableError("this server is stopping"))
        if full:
            context.set_trailing_metadata(((FULL_KEY, "full"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} streams are open already")
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self._idle.discard(context)

    def _begin(self, context: grpc.ServicerContext) -> None:
        """Take a turn, or wait for one."""
        refusal: UnavailableError | OverloadedError | None = None
        with self._lock:
            self._idle.discard(context)
            if self._draining:
                refusal = UnavailableError("this server is stopping")
            elif self._turns:
                self._turns -= 1
            elif self.waiting >= self._max_queue:
                refusal = OverloadedError(f"{self._max_queue} calls are waiting already")
            else:
                self.waiting += 1
                while not self._turns:
                    self._given.wait()
                self.waiting -= 1
                self._turns -= 1
        if refusal is not None:
            if isinstance(refusal, OverloadedError):
                self._refused()
            _refuse(context, refusal)

    def _give_turn(self) -> None:
        with self._lock:
            self._turns += 1
            if self.waiting:
                self._given.notify()

    def _end(self, context: grpc.ServicerContext) -> bool:
        with self._lock:
            self._idle.add(context)
            return self._draining

    def drain(self) -> None:
        """End idle streams now, the others after their present reply; their clients go on with another server."""
        with self._lock:
            self._draining = True
            idle = list(self._idle)
        for context in idle:
            context.cancel()

    def close(self) -> None:
        """Give the threads back."""
        self._pool.shutdown(wait=False)


def _refuse(context: grpc.ServicerContext, error: UnavailableError | OverloadedError) -> None:
    context.set_trailing_metadata(((ERROR_KEY, type(error).__name__),))
    context.abort(grpc.StatusCode[error.status], str(error))

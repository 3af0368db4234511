"""Calls over long-lived streams: what a call costs beyond its bytes is paid once a stream, not once a call."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

__all__ = ["FULL_KEY", "MAX_STREAMS", "StreamedMethod"]

FULL_KEY = "trilith-streams"
"""Trailing metadata of a stream that was refused because the server has no thread for one more."""
MAX_STREAMS = 8
"""Streams that one method keeps at most; further calls in flight are unary ones."""

_UNARY_S = 10.0  # how long a server without room for streams is left alone


class _CallError(grpc.RpcError):
    """What gRPC would have raised, had the call not been one of many on its stream."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


class _Stream:
    """One stream, used by one thread at a time: a request in, its reply out."""

    __slots__ = ("_replies", "_requests", "expired")

    def __init__(self, method: Any) -> None:
        self.expired = False
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        requests: Iterator[bytes | None] = iter(self._requests.get, None)
        self._replies = method(requests)
        # gRPC's thread that reads the requests ends with the stream.
        if not self._replies.add_callback(self._end_requests):
            self._end_requests()

    def _end_requests(self) -> None:
        self._requests.put(None)

    @property
    def usable(self) -> bool:
        return bool(self._replies.is_active())

    def call(self, request: bytes) -> bytes:
        self._requests.put(request)
        reply: bytes = next(self._replies)
        return reply

    def cancel(self) -> None:
        self._replies.cancel()


class _Watch:
    """Cancels streams whose call has passed its deadline: gRPC knows deadlines of whole streams only.

    One thread for the process; it sleeps until the earliest deadline that it knew when it last looked.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._deadlines: dict[_Stream, float] = {}
        self._wakes = math.inf
        self._thread: threading.Thread | None = None

    def add(self, stream: _Stream, deadline: float) -> None:
        with self._changed:
            self._deadlines[stream] = deadline
            if self._thread is None or not self._thread.is_alive():  # none yet, or none in this fork
                self._thread = threading.Thread(target=self._run, name="trilith-deadlines", daemon=True)
                self._thread.start()
            if deadline < self._wakes:
                self._wakes = deadline
                self._changed.notify()

    def remove(self, stream: _Stream) -> None:
        with self._changed:
            self._deadlines.pop(stream, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._wakes = min(self._deadlines.values(), default=math.inf)
                wait = self._wakes - time.monotonic()
                if wait > 0:
                    self._changed.wait(None if wait == math.inf else wait)
                now = time.monotonic()
                late = [stream for stream, deadline in self._deadlines.items() if deadline <= now]
                for stream in late:
                    del self._deadlines[stream]
                    stream.expired = True
            for stream in late:
                stream.cancel()


_WATCH = _Watch()


class StreamedMethod:
    """A method called like a unary one of gRPC, over streams where the server offers them.

    Measured with grpcio 1.85 on loopback: 256 ids and their rows take 0.2 ms instead of 0.46 ms. An error ends its
    stream; the next call opens another.
    """

    def __init__(self, unary: Any, stream: Any) -> None:
        """Call `stream`, or `unary` when there is none to be had.

        Args:
            unary: The channel's unary method.
            stream: The channel's streaming method, of the same messages.
        """
        self._unary = unary
        self._stream = stream
        self._lock = threading.Lock()
        self._idle: list[_Stream] = []
        self._open = 0
        self._unary_until = 0.0

    def __call__(self, request: bytes, *, timeout: float) -> bytes:
        """Send `request`, return the reply.

        Raises:
            grpc.RpcError: As a unary call would.
            ValueError: The channel was closed.
        """
        stream = self._take()
        if stream is None:
            return self._unary(request, timeout=timeout)  # type: ignore[no-any-return]
        deadline = time.monotonic() + timeout
        _WATCH.add(stream, deadline)
        try:
            reply = stream.call(request)
        except BaseException as error:
            _WATCH.remove(stream)
            self._drop(stream)
            if stream.expired:
                raise _CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer on the stream in time") from None
            if isinstance(error, StopIteration):
                raise _CallError(grpc.StatusCode.UNAVAILABLE, "the server ended the stream") from None
            if isinstance(error, grpc.RpcError) and self._refused(error):
                left = max(deadline - time.monotonic(), 0.001)
                return self._unary(request, timeout=left)  # type: ignore[no-any-return]
            raise
        _WATCH.remove(stream)
        with self._lock:
            self._idle.append(stream)
        return reply

    def _take(self) -> _Stream | None:
        with self._lock:
            while self._idle:
                stream = self._idle.pop()  # the warmest
                if stream.usable and not stream.expired:
                    return stream
                self._open -= 1
            if self._open >= MAX_STREAMS or time.monotonic() < self._unary_until:
                return None
            self._open += 1
        try:
            return _Stream(self._stream)
        except BaseException:
            with self._lock:
                self._open -= 1
            raise

    def _drop(self, stream: _Stream) -> None:
        with self._lock:
            self._open -= 1
        stream.cancel()

    def _refused(self, error: Any) -> bool:
        """Whether the server takes no (more) streams; it has not looked at the request then."""
        code = error.code()
        full = code is grpc.StatusCode.RESOURCE_EXHAUSTED and FULL_KEY in dict(error.trailing_metadata() or ())
        if full or code is grpc.StatusCode.UNIMPLEMENTED:
            self._unary_until = time.monotonic() + _UNARY_S
            return True
        return False

"""A gRPC server that takes on so much: bounded queue, health, draining; reflection where it is wanted.

A synchronous server on a thread pool. Measured against grpc.aio with uvloop, the three kinds called in turn by one
client, allocator tuned, two cores with other work on them (median milliseconds a call, so look at the ratios):

    reply                    threads   asyncio   asyncio, work on threads
    4 MB                         6.7       6.9       8.1
    4 MB, four in flight         7.0       7.5       6.8
    empty                       0.84      0.90      1.01
    empty, four in flight       0.77      0.81      0.79

Kernels must not block an event loop, so the fair comparison is the last column: asyncio buys nothing and costs a hop.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trilith.config import LARGEST_MESSAGE, MAX_MESSAGE_BYTES
from trilith.errors import InvalidRequestError, OverloadedError, UnavailableError
from trilith.rpc.remote import ERROR_KEY
from trilith.runtime.exposure import warn_if_exposed
from trilith_services.grpc.streams import Streams

__all__ = ["LIVE", "Limits", "Method", "Server"]

log = logging.getLogger(__name__)

LIVE = "live"
"""Health of the process itself, which serves also while what it is there for cannot be answered."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on.

    Attributes:
        threads: Calls worked on at once.
        max_queue: Calls that wait for a thread; one more is answered OverloadedError.
        max_message_bytes: Largest message accepted or sent.
        streams: Streams open at once; each holds a thread.
        drain_s: Seconds that calls in flight get to finish after SIGTERM.
        reflection: Whether services and messages are described to whoever asks, such as grpcurl.
    """

    threads: int = 8
    max_queue: int = 128
    max_message_bytes: int = MAX_MESSAGE_BYTES
    streams: int = 256
    drain_s: float = 10.0
    reflection: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_message_bytes <= LARGEST_MESSAGE:
            raise InvalidRequestError(f"max_message_bytes={self.max_message_bytes} is outside 1..{LARGEST_MESSAGE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        call: Takes (request, context), returns the reply.
        parse: From bytes to request; None hands the bytes over.
        serialize: From reply to bytes; None takes bytes as they are.
        control: Runs on threads of its own, beside the queue: it answers also when the server is overloaded. Quick.
        long: Runs on other threads of its own, where calls that take minutes wait for nobody but each other.
        stream: Every request of a stream is answered in turn; otherwise a call is one request.
    """

    call: Callable[[Any, grpc.ServicerContext], Any]
    parse: Callable[[bytes], Any] | None = None
    serialize: Callable[[Any], bytes] | None = None
    control: bool = False
    long: bool = False
    stream: bool = False


class _Pool(ThreadPoolExecutor):
    """A thread pool that knows how many calls wait."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self.waiting = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._lock:
            self.waiting += 1
        try:
            return super().submit(self._run, fn, *args, **kwargs)
        except BaseException:
            self._leave()
            raise

    def _run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._leave()
        return fn(*args, **kwargs)

    def _leave(self) -> None:
        with self._lock:
            self.waiting -= 1


@dataclass(frozen=True, slots=True)
class _Pools:
    """The threads of a server: for work, for quick calls about the server itself, and for those that take long."""

    work: _Pool
    control: _Pool
    long: _Pool

    def of(self, method: Method) -> _Pool:
        """Where a method runs."""
        return self.control if method.control else self.long if method.long else self.work


class _Dispatcher(grpc.GenericRpcHandler):
    """Finds a call's handler, before the call takes a place in the queue."""

    def __init__(
        self,
        service: str,
        methods: Mapping[str, Method],
        pools: _Pools,
        streams: Streams,
        max_queue: int,
        refused: Callable[[], None],
    ) -> None:
        self._max_queue, self._refused = max_queue, refused
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, method in methods.items():
            if method.stream:
                handler = streams.handler(method.call, method.parse, method.serialize)
            else:
                handler = _handler(method, pools.of(method))
            self._handlers[f"/{service}/{name}"] = handler
        self._queues = {
            f"/{service}/{name}": pools.of(method)
            for name, method in methods.items()
            if not method.control and not method.stream
        }
        # Refused on a control thread: the others are busy, or there would be no need to.
        self._overloaded = _handler(Method(call=self._refuse), pools.control)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        queue = self._queues.get(details.method)
        if queue is not None and queue.waiting >= self._max_queue:
            return self._overloaded
        return self._handlers.get(details.method)

    def _refuse(self, request: bytes, context: grpc.ServicerContext) -> None:
        del request
        self._refused()
        context.set_trailing_metadata(((ERROR_KEY, OverloadedError.__name__),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_queue} calls are waiting already")


def _handler(method: Method, pool: _Pool) -> grpc.RpcMethodHandler[Any, Any]:
    def on_pool(request: Any, context: grpc.ServicerContext) -> Any:
        return method.call(request, context)

    on_pool.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(on_pool, method.parse, method.serialize)


class Server:
    """A gRPC server of one or more services, with health. Starts NOT_SERVING."""

    def __init__(
        self,
        service: str,
        methods: Mapping[str, Method],
        *,
        beside: Mapping[str, Mapping[str, Method]] | None = None,
        limits: Limits | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a server; nothing listens yet.

        Args:
            service: Its name.
            methods: Of the service, by name.
            beside: Further services and their methods.
            limits: What the server takes on.
            refused: Told of every call turned away.
        """
        self.limits = limits = limits or Limits()
        services = {service: methods, **(beside or {})}
        self._services = tuple(services)
        self._pools = _Pools(_Pool(limits.threads, "rpc"), _Pool(4, "rpc-control"), _Pool(4, "rpc-long"))
        self._streams = Streams(
            most=limits.streams, workers=limits.threads, max_queue=limits.max_queue, refused=refused
        )
        self._health_pool = _Pool(2, "rpc-health")
        self._health = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=self._health_pool)
        self._server = grpc.server(
            self._pools.work,
            options=[
                ("grpc.max_send_message_length", limits.max_message_bytes),
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                # Two servers that share a port would each get half of the calls.
                ("grpc.so_reuseport", 0),
                # Clients probe silent connections.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.keepalive_permit_without_calls", 1),
                # A client that vanished must not keep its streams' threads.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        self._server.add_generic_rpc_handlers(
            tuple(
                _Dispatcher(name, own, self._pools, self._streams, limits.max_queue, refused)
                for name, own in services.items()
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if limits.reflection:
            reflection.enable_server_reflection(
                (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server, pool=self._health_pool
            )
        self._telling = threading.Lock()
        self._serving: bool | None = None
        self._health.set(LIVE, _SERVING)
        self.set_serving(False)

    @property
    def queued(self) -> int:
        """Calls that wait for a thread."""
        return self._pools.work.waiting + self._streams.waiting

    def listen(self, address: str) -> int:
        """Bind `address` (port 0: any free one) and answer; returns the port.

        Raises:
            UnavailableError: The address cannot be bound.
        """
        _check_free(address)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {address}: {error}") from None
        self._server.start()
        warn_if_exposed("gRPC", address.rpartition(":")[0], port)
        return port

    @property
    def serving(self) -> bool:
        """What health checks are told."""
        return bool(self._serving)

    def set_serving(self, serving: bool) -> None:
        """Tell health checks; saying the same again disturbs nobody."""
        with self._telling:
            if serving == self._serving:
                return
            self._serving = serving
            status = _SERVING if serving else _NOT_SERVING
            self._health.set("", status)
            for service in self._services:
                self._health.set(service, status)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, let those in flight finish for `grace_s` seconds, and end."""
        self._health.enter_graceful_shutdown()
        stopped = self._server.stop(grace_s)
        self._streams.drain()
        stopped.wait()
        for pool in (self._pools.work, self._pools.control, self._pools.long, self._health_pool):
            pool.shutdown(wait=False)
        self._streams.close()


def _check_free(address: str) -> None:
    """Say why an address cannot be bound: gRPC does not, and writes to stderr by itself."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {address}: {error.strerror or error}") from None

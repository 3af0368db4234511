"""What every server process does alike: it listens, gets ready, serves, leaves its directory, drains and lets go."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry

from trilith.discovery.addresses import advertised
from trilith.errors import TrilithError
from trilith_services.grpc.foreground import serve
from trilith_services.grpc.serve import Limits, Server
from trilith_services.http.metrics import MetricsServer
from trilith_services.listening import LOOPBACK

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask

__all__ = ["Announcement", "HttpSide", "ProcessOptions", "ServerProcess"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """How any server process runs.

    Attributes:
        limits: Threads, queue and messages.
        advertise: host:port to announce, port 0 for the one served on; empty: the host listened on, or this machine's
            if that is every interface.
        metrics_port: Port of GET /metrics; None: not served, 0: any free one.
        metrics_host: Where that port is.
    """

    limits: Limits = field(default_factory=Limits)
    advertise: str = ""
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK


_O = TypeVar("_O", bound=ProcessOptions)


class HttpSide(Protocol):
    """What a process answers over HTTP, beside gRPC."""

    port: int

    def stop(self) -> None:
        """End."""


class ServerProcess(ABC, Generic[_O]):
    """A server with what is behind it: in the foreground with `run`, or beside other things with `start` and `stop`."""

    def __init__(
        self,
        server: Server,
        options: _O,
        registry: CollectorRegistry,
        *,
        listed: ServingTask | None = None,
        number: int | None = None,
    ) -> None:
        """Nothing listens yet.

        Args:
            server: Answers the calls.
            options: How.
            registry: What is exported to whoever scrapes.
            listed: Where the process is announced; closed in the end.
            number: Of the process among those of `listed`; None: the directory gives one.
        """
        self._server = server
        self._registry = registry
        self._options = options
        self._announcement = Announcement(listed, number, where=lambda: self.address)
        self._http: HttpSide | None = None
        self._listening = ("", 0)
        self._stopping = threading.Event()

    @abstractmethod
    def _get_ready(self) -> None:
        """Get everything ready; afterwards calls are answered."""

    def _leave(self) -> None:
        """Be asked for nothing more; what is on its way is answered. `_get_ready` may still be at work."""
        self._announcement.withdraw()

    def _finish(self) -> None:
        """Let go of everything, after the last call."""
        self._announcement.close()
        http, self._http = self._http, None
        if http is not None:
            http.stop()

    def _open_http(self) -> HttpSide | None:
        """Answer over HTTP, from before the process is ready: metrics and health, where they are wanted."""
        options = self._options
        if options.metrics_port is None:
            return None
        return MetricsServer(
            self._registry, options.metrics_host, options.metrics_port, ready=lambda: self._server.serving
        )

    def prepare(self) -> None:
        """Answer over HTTP, and get everything ready; afterwards calls are answered."""
        started = time.perf_counter()
        self._http = self._open_http()
        self._get_ready()
        log.info("prepared", extra={"seconds": round(time.perf_counter() - started, 3)})

    @property
    def address(self) -> str:
        """Where others reach it, once it listens."""
        return advertised(*self._listening, self._options.advertise)

    def run(self, listen: str, *, bound: Callable[[int], None] = lambda port: None) -> int:
        """Serve until SIGTERM; returns the exit status."""

        def listening(port: int) -> None:
            self._listening = (listen, port)
            bound(port)

        return serve(
            self._server, listen, prepare=self.prepare, bound=listening, draining=self._stop, drained=self._finish
        )

    def start(self, listen: str = "127.0.0.1:0") -> int:
        """Prepare and serve on background threads; returns the port."""
        port = self._listen(listen)
        self._make_ready()
        return port

    def stop(self, grace_s: float = 0.0) -> None:
        """End what `start` began; calls in flight get `grace_s` seconds."""
        self._stop()
        self._server.stop(grace_s)
        self._finish()

    def _listen(self, listen: str) -> int:
        port = self._server.listen(listen)
        self._listening = (listen, port)
        return port

    def _make_ready(self) -> None:
        self.prepare()
        if not self._stopping.is_set():
            self._server.set_serving(True)

    def _stop(self) -> None:
        self._stopping.set()
        self._leave()


class Announcement:
    """What a serving directory says of one process, until that is withdrawn; thread-safe."""

    def __init__(self, task: ServingTask | None, number: int | None, *, where: Callable[[], str]) -> None:
        """Say nothing yet.

        Args:
            task: Where it is said; None: nowhere.
            number: Of the process among those of the task; None: the directory gives one.
            where: Its address, asked for when it is announced.
        """
        self._task = task
        self._number = number
        self._where = where
        self._address = ""
        self._withdrawn = False
        self._lock = threading.Lock()

    def announce(self, *, available: bool) -> None:
        """Announce that the process is there, and if `available` to be asked; not once it has been withdrawn."""
        with self._lock:
            if self._task is not None and not self._withdrawn:
                self._address = self._where()
                self._number = self._task.announce(self._number, self._address, available=available)

    def withdraw(self) -> None:
        """Take it back for good; a directory that is away is let be."""
        with self._lock:
            self._withdrawn = True
            if self._task is None or self._number is None or not self._address:
                return
            try:
                self._task.withdraw(self._number, self._address)
            except TrilithError as error:
                log.warning("could not deregister: %s", error)

    def close(self) -> None:
        """Release connections."""
        if self._task is not None:
            self._task.close()

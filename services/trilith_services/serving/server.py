"""One serving entry: its models behind gRPC and HTTP, put together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trilith.discovery.addresses import advertised
from trilith.errors import InvalidRequestError, TrilithError
from trilith_services.serve import Limits, Server, serve
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.models import Models
from trilith_services.serving.servicer import SERVICE, PredictionServicer

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask
    from trilith_services.serving.http import HttpServer
    from trilith_services.serving.replica_lists import ReplicaList

__all__ = ["Entry", "EntryOptions"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOptions:
    """How an entry runs.

    Attributes:
        limits: Threads, queue and messages.
        http: host:port of the HTTP form; empty: none.
        poll_s: Seconds between two looks for a newer export.
        deadline_s: Seconds that looking rows up may take, where the caller's deadline is later or missing.
        max_records: Most that a request may hold.
        threads: That standalone rows are read with; None: one per core.
        replica: Its number among the entries; None: one that ZooKeeper gives.
        advertise: host:port to announce, port 0 for the one served on; empty: the host listened on, or this machine's
            if that is every interface.
    """

    limits: Limits = field(default_factory=Limits)
    http: str = ""
    poll_s: float = 1.0
    deadline_s: float = 1.0
    max_records: int = 8192
    threads: int | None = None
    replica: int | None = None
    advertise: str = ""

    def __post_init__(self) -> None:
        for name in ("poll_s", "deadline_s", "max_records"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(f"{name}={getattr(self, name)} is not above 0")


class Entry:
    """Serves the exports of one directory: in the foreground with `run`, or beside other things with `start`."""

    def __init__(
        self,
        base: str,
        options: EntryOptions | None = None,
        *,
        replicas: ReplicaList | None = None,
        listed: ServingTask | None = None,
    ) -> None:
        """Put the parts together; nothing listens yet.

        Args:
            base: Directory or URL of the exports.
            options: How.
            replicas: Where distributed exports look rows up; closed in the end.
            listed: Where the entry is announced, for clients to ask; closed in the end.
        """
        self._options = options = options or EntryOptions()
        self.metrics = EntryMetrics()
        self.models = Models(
            base,
            listed=replicas,
            timeout_s=options.deadline_s,
            threads=options.threads,
            loaded=lambda loaded: self.metrics.loaded(loaded.manifest.version),
        )
        self.servicer = PredictionServicer(
            self.models, self.metrics, timeout_s=options.deadline_s, max_records=options.max_records
        )
        self.metrics.watch(self.servicer.status)
        self._server = Server(SERVICE, self.servicer.methods(), limits=options.limits, refused=self.metrics.refused)
        self._http: HttpServer | None = None
        self._listed = listed
        self._listening = ("", 0)
        self._announcing = threading.Lock()
        self._replica = options.replica
        self._preparing = True

    @property
    def http_port(self) -> int | None:
        """Where HTTP is answered, once `prepare` has begun."""
        return self._http.port if self._http is not None else None

    def prepare(self) -> None:
        """Answer HTTP, wait for the first export, and follow newer ones; afterwards there are scores to be had."""
        options = self._options
        if options.http:
            from trilith_services.serving.http import HttpServer, make_app

            self._http = HttpServer(make_app(self.servicer, self.metrics), options.http)
            self._http.start()
            log.info("http", extra={"port": self._http.port})
        self._announce(available=False)
        pause = threading.Event()
        while not self.models.refresh() and self._preparing:
            pause.wait(min(options.poll_s, 0.2))
        self.models.follow(options.poll_s)
        self._announce(available=True)

    def run(self, listen: str, *, bound: Callable[[int], None] = lambda port: None) -> int:
        """Serve until SIGTERM; returns the exit status."""

        def listening(port: int) -> None:
            self._listening = (listen, port)
            bound(port)

        return serve(
            self._server, listen, prepare=self.prepare, bound=listening, draining=self._leave, drained=self._finish
        )

    def start(self, listen: str = "127.0.0.1:0") -> int:
        """Prepare and serve on background threads; returns the port."""
        port = self._server.listen(listen)
        self._listening = (listen, port)
        self.prepare()
        self._server.set_serving(True)
        return port

    def stop(self, grace_s: float = 0.0) -> None:
        """End what `start` began; calls in flight get `grace_s` seconds."""
        self._leave()
        self._server.stop(grace_s)
        self._finish()

    def _announce(self, *, available: bool) -> None:
        with self._announcing:
            if self._listed is not None and self._preparing:
                address = advertised(*self._listening, self._options.advertise)
                self._replica = self._listed.announce(self._replica, address, available=available)

    def _leave(self) -> None:
        """Be asked for nothing more; what is on its way is answered."""
        with self._announcing:
            self._preparing = False
            if self._listed is None or self._replica is None:
                return
            try:
                self._listed.withdraw(self._replica, advertised(*self._listening, self._options.advertise))
            except TrilithError as error:
                log.warning("could not deregister: %s", error)

    def _finish(self) -> None:
        if self._http is not None:
            self._http.stop()
        self.models.close()
        if self._listed is not None:
            self._listed.close()

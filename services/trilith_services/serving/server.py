"""One serving entry: its models behind gRPC and HTTP, put together."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trilith.errors import InvalidRequestError
from trilith.runtime.waiting import Wait
from trilith_services.grpc.serve import Server
from trilith_services.grpc.server_process import HttpSide, ProcessOptions, ServerProcess
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.models import Models
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.servicer import SERVICE, PredictionServicer
from trilith_services.serving.unknown import UnknownPolicy
from trilith_services.serving.versions import VersionPolicy
from trilith_services.serving.warm_up import WarmUp

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask
    from trilith_services.serving.replica_lists import ReplicaList

__all__ = ["Entry", "EntryOptions"]

log = logging.getLogger(__name__)

_HEALTH_EVERY_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOptions(ProcessOptions):
    """How an entry runs.

    Attributes:
        http: host:port of the HTTP form, with metrics; empty: none.
        poll_s: Seconds between two looks for a newer export.
        deadline_s: Seconds that looking rows up may take, where the caller's deadline is later or missing.
        max_records: Most that a request may hold.
        threads: That standalone rows are read with; None: one per core.
        torch_threads: That torch computes a request with, in the whole process; None: as many as it likes.
        unknown: Whose features that the model does not know are refused.
        missing_refused: Whether records of JSON must have all features that are looked at.
        replica: Its number among the entries; None: one that ZooKeeper gives.
        version: Which versions of the export are loaded.
        warm_up: Requests that a version scores before it answers, beside those of its export.
    """

    http: str = ""
    poll_s: float = 1.0
    deadline_s: float = 1.0
    max_records: int = 8192
    threads: int | None = None
    torch_threads: int | None = None
    unknown: UnknownPolicy = UnknownPolicy.json
    missing_refused: bool = True
    replica: int | None = None
    version: VersionPolicy = field(default_factory=VersionPolicy)
    warm_up: tuple[PredictBody, ...] = ()

    def __post_init__(self) -> None:
        for name in ("poll_s", "deadline_s", "max_records"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(f"{name}={getattr(self, name)} is not above 0")


class Entry(ServerProcess[EntryOptions]):
    """Serves the exports of one directory."""

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
        self._base = base
        options = options or EntryOptions()
        self.metrics = EntryMetrics()
        self.models = Models(
            base,
            policy=options.version,
            warm_up=WarmUp(requests=options.warm_up, policy=options.unknown, missing_refused=options.missing_refused),
            listed=replicas,
            timeout_s=options.deadline_s,
            threads=options.threads,
            loaded=lambda loaded: self.metrics.loaded(),
        )
        self.servicer = PredictionServicer(
            self.models,
            self.metrics,
            timeout_s=options.deadline_s,
            max_records=options.max_records,
            unknown=options.unknown,
            missing_refused=options.missing_refused,
        )
        self.metrics.watch(self.servicer.status)
        server = Server(SERVICE, self.servicer.methods(), limits=options.limits, refused=self.metrics.refused)
        super().__init__(server, options, self.metrics.registry, listed=listed, number=options.replica)
        self._health = threading.Thread(target=self._watch_health, name="entry-health", daemon=True)

    @property
    def http_port(self) -> int | None:
        """Where HTTP is answered, once `prepare` has begun."""
        return self._http.port if self._http is not None else None

    def _open_http(self) -> HttpSide | None:
        options = self._options
        if not options.http:
            return super()._open_http()
        from trilith_services.http.server import HttpServer
        from trilith_services.serving.http import make_app

        http = HttpServer(make_app(self.servicer, self.metrics), options.http, drain_s=options.limits.drain_s)
        http.start()
        log.info("http", extra={"port": http.port})
        return http

    def _get_ready(self) -> None:
        """Wait for the first export, and follow newer ones; afterwards there are scores to be had."""
        options = self._options
        if options.torch_threads is not None:
            torch.set_num_threads(options.torch_threads)
        self._announcement.announce(available=False)
        with Wait(f"an export in {self._base} that can be served", most=None) as waiting:
            while not self.models.refresh() and not self._stopping.wait(min(options.poll_s, 0.2)):
                pass
            waiting.end(came=not self._stopping.is_set())
        self.models.follow(options.poll_s)
        self._announcement.announce(available=True)
        self._health.start()

    def _watch_health(self) -> None:
        """Let health checks know when there is a shard that nobody answers for, and when there is none any more."""
        ready = True
        while not self._stopping.wait(_HEALTH_EVERY_S):
            why = self.servicer.unready
            if why and ready:
                log.warning("not ready: %s", why)
            elif not why and not ready:
                log.info("ready again")
            ready = not why
            self._server.set_serving(ready)  # each time: whoever runs this process says so too, once it is prepared

    def _leave(self) -> None:
        if self._health.is_alive():
            self._health.join()
        super()._leave()

    def _finish(self) -> None:
        super()._finish()
        self.models.close()

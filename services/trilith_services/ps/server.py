"""One PS: its shard, the service in front of it, metrics and checkpoints, put together."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from trilith.discovery.addresses import advertised
from trilith.errors import InvalidRequestError
from trilith.remote import SERVICE
from trilith_services.ps.metrics import Metrics
from trilith_services.ps.servicer import ParameterServerServicer
from trilith_services.ps.sync.syncer import Syncer
from trilith_services.ps.sync.target import SyncOptions
from trilith_services.serve import Limits, Server, serve

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from trilith.discovery.serving import ServingTask
    from trilith_proto import ps_pb2
    from trilith_services.ps.checkpointer import Checkpointer
    from trilith_services.ps.membership import Membership
    from trilith_services.ps.store import Store

__all__ = ["REPLACED", "ParameterServer", "PsOptions"]

log = logging.getLogger(__name__)

REPLACED = 2
"""Exit status of a PS whose place another has taken: not to be started again, or it would take the place back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PsOptions:
    """How one PS runs, its shard apart.

    Attributes:
        limits: Threads, queue and messages.
        checkpoint_dir: Restored from before serving, written to afterwards; any fsspec URL; None: no checkpoints.
        checkpoint_every_s: Seconds between checkpoints; 0: only one at the end.
        checkpoint_keep: Complete checkpoints to keep.
        metrics_port: Port of GET /metrics; None: not served, 0: any free one.
        discovery: URL of the directory to register in; None: none.
        advertise: host:port to register, port 0 for the one served on; empty: the host listened on, or this machine's
            if that is every interface.
        sync: How serving replicas are kept fresh, if there are any.
        sync_to: Address by name of serving replicas known from the start.
    """

    limits: Limits = field(default_factory=Limits)
    checkpoint_dir: str | None = None
    checkpoint_every_s: float = 0.0
    checkpoint_keep: int = 3
    metrics_port: int | None = None
    discovery: str | None = field(default=None, repr=False)  # it may hold credentials
    advertise: str = ""
    sync: SyncOptions = field(default_factory=SyncOptions)
    sync_to: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.checkpoint_every_s < 0:
            raise InvalidRequestError(f"checkpoint_every_s={self.checkpoint_every_s} is below 0")
        if self.checkpoint_every_s and self.checkpoint_dir is None:
            raise InvalidRequestError("checkpoint_every_s needs a checkpoint_dir")


class ParameterServer:
    """Serves one Store: in the foreground with `run`, or beside other things with `start` and `stop`."""

    def __init__(self, store: Store, options: PsOptions | None = None, *, replicas: Sequence[ServingTask] = ()) -> None:
        """Put the parts together; nothing listens yet.

        Args:
            store: What is served.
            options: How.
            replicas: Where serving replicas are listed that come and go; closed in the end.
        """
        self._store = store
        self._options = options or PsOptions()
        self.metrics = Metrics()
        self.servicer = ParameterServerServicer(
            store, self.metrics, queued=lambda: self._server.queued, add_stats=self._add_stats
        )
        self.syncer = Syncer(store, self._options.sync)
        self._replicas = replicas
        self._server = Server(
            SERVICE, self.servicer.methods(), limits=self._options.limits, refused=self.metrics.refused
        )
        self._checkpointer: Checkpointer | None = None
        self._membership: Membership | None = None
        self._listening = ("", 0)
        self._replaced = False
        self._end: Callable[[], None] = lambda: None
        self._metrics_server: WSGIServer | None = None

    @property
    def metrics_port(self) -> int | None:
        """Where metrics are served, once `prepare` has begun."""
        return self._metrics_server.server_port if self._metrics_server else None

    def prepare(self) -> None:
        """Restore, compile, begin to write checkpoints, register; afterwards calls are answered."""
        options = self._options
        started = time.perf_counter()
        self.metrics.watch(self.servicer.stats)
        if options.metrics_port is not None:
            self._metrics_server = self.metrics.serve(options.metrics_port, ready=lambda: self.servicer.ready)
            log.info("metrics", extra={"port": self.metrics_port})
        if options.discovery is not None:
            from trilith_services.ps.membership import Membership

            self._membership = Membership(options.discovery, self._store, replaced=self._on_replaced)
            self._membership.join()  # first: a shard that does not fit need not restore
        self._store.compile()
        if options.checkpoint_dir is not None:
            from trilith_services.ps.checkpointer import Checkpointer, restore_newest

            restore_newest(self._store, options.checkpoint_dir)
            self._checkpointer = Checkpointer(
                self._store,
                options.checkpoint_dir,
                every_s=options.checkpoint_every_s,
                keep=options.checkpoint_keep,
                observe=self.metrics.checkpointed,
            )
        if self._checkpointer is not None:
            self._checkpointer.start()
        for name, address in options.sync_to.items():
            self.syncer.add(name, address)
        for replicas in self._replicas:
            self.syncer.follow(replicas)
        self.servicer.ready = True
        if self._membership is not None:
            self._membership.announce(advertised(*self._listening, options.advertise))
        log.info("prepared", extra={"seconds": round(time.perf_counter() - started, 3)})

    def run(self, listen: str, *, bound: Callable[[int], None] = lambda port: None) -> int:
        """Serve until SIGTERM, or until another process has registered as this shard; returns the exit status."""
        self._end = partial(os.kill, os.getpid(), signal.SIGTERM)

        def listening(port: int) -> None:
            self._listening = (listen, port)
            bound(port)

        status = serve(
            self._server, listen, prepare=self.prepare, bound=listening, draining=self._leave, drained=self._finish
        )
        return REPLACED if self._replaced else status

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

    def _on_replaced(self) -> None:
        """Do no harm from now on: what this process has is no longer the shard, and must not become a checkpoint."""
        log.error("another process has registered as this shard; leaving")
        self._replaced = True
        self.servicer.ready = False
        if self._checkpointer is not None:
            self._checkpointer.halt()
        self.syncer.stop()
        self._end()

    def _leave(self) -> None:
        if self._membership is not None:
            self._membership.leave()

    def _add_stats(self, stats: ps_pb2.StatsResponse) -> None:
        stats.sync_targets.extend(self.syncer.stats())

    def _finish(self) -> None:
        self.syncer.stop(flush_s=self._options.limits.drain_s)
        for replicas in self._replicas:
            replicas.close()
        if self._membership is not None:
            self._membership.close()
            self._membership = None
        if self._checkpointer is not None:
            self._checkpointer.stop(final=not self._replaced)
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
            self._metrics_server = None
        self._store.close()

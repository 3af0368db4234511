"""One PS: its shard, the service in front of it, metrics and checkpoints, put together."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from trilith.errors import InvalidRequestError
from trilith.folder import Folder
from trilith.verbs import SERVICE
from trilith_services.grpc.serve import Server
from trilith_services.grpc.server_process import ProcessOptions, ServerProcess
from trilith_services.ps.checkpoint.root import CheckpointRoot
from trilith_services.ps.process.metrics import Metrics
from trilith_services.ps.process.servicer import ParameterServerServicer
from trilith_services.ps.replicas.sync.options import SyncOptions
from trilith_services.ps.replicas.sync.syncer import Syncer

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask
    from trilith_proto import ps_pb2
    from trilith_services.ps.checkpoint.checkpointer import Checkpointer
    from trilith_services.ps.process.membership import Membership
    from trilith_services.ps.process.shard import LocalShard

__all__ = ["REPLACED", "ParameterServer", "PsOptions"]

log = logging.getLogger(__name__)

REPLACED = 2
"""Exit status of a PS whose place another has taken: not to be started again, or it would take the place back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PsOptions(ProcessOptions):
    """How one PS runs, its shard apart; `advertise` is what it registers.

    Attributes:
        checkpoint_dir: Restored from before serving, written to afterwards; any fsspec URL; None: no checkpoints.
        restore_from: Restored from before serving, and written to by those who train alone.
        checkpoint_every_s: Seconds between checkpoints; 0: only one at the end.
        checkpoint_keep: Complete checkpoints to keep.
        checkpoint_root: Directory or URL below which the calls Save and Restore may name checkpoints; None: the
            checkpoint_dir, or restore_from.
        checkpoint_anywhere: Whether they may name any path and URL. Whoever reaches the port then reads and writes as
            this process does.
        owned: Whether a client may shut the PS down: it is one run's own.
        discovery: URL of the directory to register in; None: none.
        sync: How serving replicas are kept fresh, if there are any.
        sync_to: Address by name of serving replicas known from the start.
    """

    checkpoint_dir: str | None = None
    restore_from: str | None = None
    checkpoint_every_s: float = 0.0
    checkpoint_keep: int = 3
    checkpoint_root: str | None = None
    checkpoint_anywhere: bool = False
    owned: bool = False
    discovery: str | None = field(default=None, repr=False)  # it may hold credentials
    sync: SyncOptions = field(default_factory=SyncOptions)
    sync_to: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.checkpoint_every_s < 0:
            raise InvalidRequestError(f"checkpoint_every_s={self.checkpoint_every_s} is below 0")
        if self.checkpoint_every_s and self.checkpoint_dir is None:
            raise InvalidRequestError("checkpoint_every_s needs a checkpoint_dir")
        if self.restore_from is not None and self.checkpoint_dir is not None:
            raise InvalidRequestError("checkpoint_dir is restored from already; give it or restore_from")


class ParameterServer(ServerProcess[PsOptions]):
    """Serves one shard."""

    def __init__(
        self, shard: LocalShard, options: PsOptions | None = None, *, replicas: Sequence[ServingTask] = ()
    ) -> None:
        """Put the parts together; nothing listens yet.

        Args:
            shard: What is served.
            options: How.
            replicas: Where serving replicas are listed that come and go; closed in the end.
        """
        self._shard = shard
        options = options or PsOptions()
        self.metrics = Metrics()
        self.servicer = ParameterServerServicer(
            shard,
            self.metrics,
            queued=lambda: self._server.queued,
            add_stats=self._add_stats,
            paths=CheckpointRoot(
                root=options.checkpoint_root or options.checkpoint_dir or options.restore_from,
                anywhere=options.checkpoint_anywhere,
            ),
            shut_down=self._shut_down if options.owned else None,
        )
        self.syncer = Syncer(shard, options.sync)
        self._replicas = replicas
        server = Server(SERVICE, self.servicer.methods(), limits=options.limits, refused=self.metrics.refused)
        super().__init__(server, options, self.metrics.registry)
        self.metrics.watch(self.servicer.stats)
        self._checkpointer: Checkpointer | None = None
        self._membership: Membership | None = None
        self._replaced = False
        self._saved = True
        self._end: Callable[[], None] = lambda: None

    def _get_ready(self) -> None:
        """Restore, compile, begin to write checkpoints, register."""
        options = self._options
        if options.discovery is not None:
            from trilith_services.ps.process.membership import Membership

            self._membership = Membership(options.discovery, self._shard, replaced=self._on_replaced)
            self._membership.join()  # first: a shard that does not fit need not restore
        if options.checkpoint_dir is not None:
            Folder(options.checkpoint_dir).check_writable()  # now, not when the first checkpoint is due
        self._shard.compile()
        if options.checkpoint_dir is not None:
            self._checkpointer = self._restore(options.checkpoint_dir)
            self._checkpointer.start()
        elif options.restore_from is not None:
            from trilith_services.ps.checkpoint.checkpointer import restore_newest

            restore_newest(self._shard, options.restore_from)
        for name, address in options.sync_to.items():
            self.syncer.add(name, address)
        for replicas in self._replicas:
            self.syncer.follow(replicas)
        self.servicer.ready = True
        if self._membership is not None and not self._stopping.is_set():
            self._membership.announce(self.address)

    def _restore(self, checkpoint_dir: str) -> Checkpointer:
        from trilith_services.ps.checkpoint.checkpointer import Checkpointer, restore_newest

        checkpointer = Checkpointer(
            self._shard,
            checkpoint_dir,
            every_s=self._options.checkpoint_every_s,
            keep=self._options.checkpoint_keep,
            observe=self.metrics.checkpointed,
            completed=self.metrics.completed,
        )
        checkpointer.register()
        restore_newest(self._shard, checkpoint_dir)
        return checkpointer

    def run(self, listen: str, *, bound: Callable[[int], None] = lambda port: None) -> int:
        """Serve until SIGTERM, or until another process has registered as this shard; returns the exit status.

        It is 1 if the last checkpoint could not be written.
        """
        self._end = partial(os.kill, os.getpid(), signal.SIGTERM)
        status = super().run(listen, bound=bound)
        return REPLACED if self._replaced else status or int(not self._saved)

    def _on_replaced(self) -> None:
        """Do no harm from now on: what this process has is no longer the shard, and must not become a checkpoint."""
        log.error("another process has registered as this shard; leaving")
        self._replaced = True
        self.servicer.ready = False
        self._server.set_serving(False)
        if self._checkpointer is not None:
            self._checkpointer.halt()
        self.syncer.stop()
        self._end()

    def _shut_down(self) -> None:
        log.info("the run whose own this is has ended; leaving")
        self._end()

    def _leave(self) -> None:
        if self._membership is not None:
            self._membership.leave()

    def _add_stats(self, stats: ps_pb2.StatsResponse) -> None:
        stats.sync_targets.extend(self.syncer.stats())
        own = self._checkpointer.last if self._checkpointer is not None else ("", 0.0)
        newest = max(own, self.servicer.saved, key=lambda saved: saved[1])
        stats.last_checkpoint, stats.last_checkpoint_time = newest

    def _finish(self) -> None:
        self.syncer.stop(flush_s=self._options.limits.drain_s)
        for replicas in self._replicas:
            replicas.close()
        if self._membership is not None:
            self._membership.close()
            self._membership = None
        if self._checkpointer is not None:
            self._saved = self._checkpointer.stop(final=not self._replaced)
        super()._finish()
        self._shard.close()

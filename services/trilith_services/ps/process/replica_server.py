"""One serving replica: its rows behind the ParameterServer's reading verbs, and the service that takes pushes."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trilith.errors import InvalidRequestError
from trilith.runtime.waiting import Wait
from trilith.verbs import SERVICE
from trilith_services.grpc.serve import Server
from trilith_services.grpc.server_process import ProcessOptions, ServerProcess
from trilith_services.ps.process.metrics import Metrics
from trilith_services.ps.process.replica_servicer import SYNC_SERVICE, ReplicaServicer
from trilith_services.ps.replicas.sync import wire

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask
    from trilith_services.ps.process.shard import LocalShard
    from trilith_services.ps.replicas.replica import Replica

__all__ = ["ReplicaOptions", "ReplicaServer"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions(ProcessOptions):
    """How one replica runs.

    Attributes:
        replica: Its number among the replicas of the shard.
        rows: Directory of exported rows, any fsspec URL, that are served until training sends newer ones; None: none.
        wait_s: Seconds to wait for the first full copy, where no rows were exported, before serving what there is;
            None: as long as it takes.
    """

    replica: int = 0
    rows: str | None = None
    wait_s: float | None = None

    def __post_init__(self) -> None:
        if self.wait_s is not None and self.wait_s < 0:
            raise InvalidRequestError(f"wait_s={self.wait_s} is below 0")


class ReplicaServer(ServerProcess[ReplicaOptions]):
    """Serves one Replica."""

    def __init__(
        self,
        replica: Replica[LocalShard],
        options: ReplicaOptions | None = None,
        *,
        listed: ServingTask | None = None,
    ) -> None:
        """Put the parts together; nothing listens yet.

        Args:
            replica: What is served.
            options: How.
            listed: Where the replica is announced, for training to fill and for entries to ask; closed in the end.
        """
        self._replica = replica
        options = options or ReplicaOptions()
        self.metrics = Metrics()
        self.servicer = ReplicaServicer(replica, self.metrics, queued=lambda: self._server.queued)
        server = Server(
            SERVICE,
            self.servicer.methods(),
            beside={SYNC_SERVICE: self.servicer.sync_methods()},
            limits=options.limits,
            refused=self.metrics.refused,
        )
        super().__init__(server, options, self.metrics.registry, listed=listed, number=options.replica)
        self.metrics.watch(self.servicer.stats)

    def _get_ready(self) -> None:
        """Compile, load exported rows or take pushes until they are complete; afterwards the rows are served."""
        options = self._options
        self._replica.store.compile()
        wire.compile_kernels()
        if options.rows is not None:
            self._replica.store.restore(options.rows)
        self.servicer.taking = True
        self._announcement.announce(available=False)
        if options.rows is None and not self._wait(options.wait_s):
            return
        self.servicer.ready = True
        self._announcement.announce(available=True)

    def _wait(self, wait_s: float | None) -> bool:
        """Wait for a full copy; False if the process is to end without it."""
        log.info("waiting for a full copy", extra={"seconds": wait_s})
        until = None if wait_s is None else time.monotonic() + wait_s
        with Wait(f"a full copy from the PS of shard {self._replica.store.index}", most=wait_s) as waiting:
            while not self._replica.complete.wait(0.05):
                if self._stopping.is_set():
                    waiting.end(came=False)
                    return False
                if until is not None and time.monotonic() >= until:
                    break
        return True

    def start(self, listen: str = "127.0.0.1:0") -> int:
        """Take pushes on background threads, and serve when there are rows; returns the port at once."""
        port = self._listen(listen)
        self._preparing = threading.Thread(target=self._make_ready, name="replica-prepare", daemon=True)
        self._preparing.start()
        return port

    def stop(self, grace_s: float = 0.0) -> None:
        """End what `start` began; calls in flight get `grace_s` seconds."""
        self._stopping.set()
        self._preparing.join()
        super().stop(grace_s)

    def _finish(self) -> None:
        super()._finish()
        self._replica.store.close()

"""What a serving replica answers: the ParameterServer verbs that read, and pushes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from trilith.errors import ReadOnlyError, UnavailableError
from trilith.shard import Write
from trilith.verbs import VERBS
from trilith_proto import parameter_sync_pb2, ps_pb2
from trilith_services.grpc.rpc import rpc
from trilith_services.grpc.serve import Method
from trilith_services.ps.process.servicer import ParameterServerServicer

if TYPE_CHECKING:
    from trilith_services.ps.process.metrics import Metrics
    from trilith_services.ps.process.shard import LocalShard
    from trilith_services.ps.replicas.replica import Replica

__all__ = ["SYNC_SERVICE", "ReplicaServicer"]

SYNC_SERVICE = parameter_sync_pb2.DESCRIPTOR.services_by_name["ParameterSync"].full_name


class ReplicaServicer(ParameterServerServicer):
    """The verbs that read, those that write refused; and Push, from when `taking` is set."""

    def __init__(self, replica: Replica[LocalShard], metrics: Metrics, *, queued: Callable[[], int]) -> None:
        super().__init__(replica.store, metrics, queued=queued, add_stats=self._add_replica)
        self._own["GlobalStep"] = self.global_step
        self._replica = replica
        self.taking = False

    def admit(self, method: str) -> None:
        """Pushes once kernels are compiled and exported rows are loaded; reads once there are rows; no writes."""
        if method == "Push" and not self.taking:
            raise UnavailableError("Push: this replica is still starting")
        if method == "Push" or VERBS[method].control:
            return
        if not VERBS[method].reads:
            raise ReadOnlyError(f"{method}: this is a serving replica; its rows change on the training PS only")
        super().admit(method)

    def sync_methods(self) -> dict[str, Method]:
        """The methods of ParameterSync."""
        return {"Push": Method(call=self.Push, serialize=parameter_sync_pb2.PushResponse.SerializeToString)}

    @rpc
    def Push(self, request: bytes, context: grpc.ServicerContext) -> parameter_sync_pb2.PushResponse:
        """Take changes."""
        reply = self._replica.push(request)
        self._metrics.carried("Push", reply.update_num, len(request), 0)
        return reply

    def global_step(self, *, advance: int | None, set_to: int | None, write: Write) -> int:
        """Read the step."""
        if advance is not None or set_to is not None:
            raise ReadOnlyError("GlobalStep: this is a serving replica; its step changes on the training PS only")
        return self._shard.global_step()

    def _add_replica(self, stats: ps_pb2.StatsResponse) -> None:
        stats.replica.CopyFrom(self._replica.stats)

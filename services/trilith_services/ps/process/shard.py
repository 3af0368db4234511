"""LocalShard: one shard in this process, whole: a store in memory with the files that it is saved to."""

from __future__ import annotations

from trilith.shard import ANY_WRITE, Write
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint import snapshot
from trilith_services.ps.engine.store import Store

__all__ = ["LocalShard"]


class LocalShard(Store):
    """Implements `trilith.shard.Shard`: what a PS process serves and `local://` embeds."""

    def save(self, path: str, write: Write = ANY_WRITE) -> ps_pb2.SaveResponse:
        """See `Shard.save`."""
        self._check_incarnation(write.incarnation)
        return self._sequences.once(write, lambda: snapshot.save_shard(self, path))[0]

    def restore(
        self,
        path: str,
        write: Write = ANY_WRITE,
        variables: ps_pb2.VariableSources | None = None,
        global_step: int | None = None,
    ) -> ps_pb2.RestoreResponse:
        """See `Shard.restore`."""

        def work() -> ps_pb2.RestoreResponse:
            # Not before: a repetition comes with the incarnation that the first one ended.
            self._check_incarnation(write.incarnation)
            return snapshot.restore_shard(self, path, variables, global_step)

        return self._sequences.once(write, work)[0]

"""DenseFeed: which dense variables a target lacks, in pieces that fit a message."""

from __future__ import annotations

import time
from collections.abc import Iterator

from trilith_proto import parameter_sync_pb2
from trilith_services.ps.engine.variables import Partition, Partitions

__all__ = ["DenseFeed"]


class DenseFeed:
    """Remembers, for one target, which version of each partition has arrived."""

    def __init__(self, variables: Partitions, every_s: float) -> None:
        self._variables = variables
        self._every_s = every_s
        self._sent: dict[tuple[str, int], tuple[Partition, int]] = {}
        self._last = -every_s

    def send_now(self) -> None:
        """Let what has changed be due at once."""
        self._last = -self._every_s

    @property
    def behind(self) -> bool:
        """Whether something has changed that the target lacks."""
        return not all(self._has(partition) for partition in self._variables)

    def due(self, message_bytes: int) -> Iterator[tuple[parameter_sync_pb2.DeltaVariable, bool]]:
        """The pieces of what has changed, and whether more follow; a partition counts as arrived once all are taken."""
        if time.monotonic() - self._last < self._every_s:
            return
        changed = [partition for partition in self._variables if not self._has(partition)]
        floats = max(1, message_bytes // 4)
        for number, partition in enumerate(changed):
            with partition.lock:
                values, version = partition.values.copy(), partition.version
            for start in range(0, values.size, floats):
                piece = values[start : start + floats]
                message = parameter_sync_pb2.DeltaVariable(spec=partition.spec, offset=start, values=piece.tobytes())
                yield message, number + 1 < len(changed) or start + floats < values.size
            self._sent[partition.spec.name, partition.spec.partition] = partition, version
        if changed:
            self._last = time.monotonic()

    def _has(self, partition: Partition) -> bool:
        known = self._sent.get((partition.spec.name, partition.spec.partition))
        return known is not None and known[0] is partition and known[1] == partition.version

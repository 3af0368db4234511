"""Timers of a client's calls, as histograms of this process for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import Histogram

from trilith.batches import Batches, TableInfo
from trilith.cluster import Cluster
from trilith.shard import FloatArray, IdPart, Shard

__all__ = ["EMBEDDING_LOOKUP", "TimedBatches"]

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)

EMBEDDING_LOOKUP = Histogram(
    "trilith_embedding_lookup_seconds",
    "What one PS took to answer its part of a lookup, retries and the way there and back included.",
    ["model_name", "ps"],
    buckets=_SECONDS,
)


class TimedBatches(Batches):
    """Batches whose lookups are timed, PS by PS."""

    def __init__(self, cluster: Cluster, info: Callable[[str], TableInfo], *, float16: bool | None = None) -> None:
        """As `Batches`; the timers are labelled with the model's name in the cluster's config."""
        super().__init__(cluster, info, float16=float16)
        name = cluster.config.model_name
        self._timers = [EMBEDDING_LOOKUP.labels(name, str(index)) for index in range(cluster.count)]

    def _lookup_on(
        self, index: int, shard: Shard, parts: list[IdPart], dims: list[int], left: float
    ) -> list[FloatArray]:
        started = time.perf_counter()
        try:
            return super()._lookup_on(index, shard, parts, dims, left)
        finally:
            self._timers[index].observe(time.perf_counter() - started)

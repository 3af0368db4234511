"""Timers of a client's calls, as histograms of this process for Prometheus."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from trilith.batches import Batches, TableInfo
from trilith.cluster import Cluster
from trilith.runtime.forks import renew_in_children
from trilith.shard import FloatArray, IdPart, Shard

__all__ = ["EMBEDDING_LOOKUP", "TimedBatches"]

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)


def _histogram(registry: CollectorRegistry | None) -> Histogram:
    return Histogram(
        "trilith_embedding_lookup_seconds",
        "What one PS took to answer its part of a lookup, retries and the way there and back included.",
        ["model_name", "ps"],
        buckets=_SECONDS,
        registry=registry,
    )


EMBEDDING_LOOKUP = _histogram(REGISTRY)


class TimedBatches(Batches):
    """Batches whose lookups are timed, PS by PS."""

    _process: ClassVar[int] = os.getpid()

    def __init__(self, cluster: Cluster, info: Callable[[str], TableInfo], *, float16: bool | None = None) -> None:
        """As `Batches`; the timers are labelled with the model's name in the cluster's config."""
        super().__init__(cluster, info, float16=float16)
        self._label()
        renew_in_children(self)

    def _label(self) -> None:
        name = self._cluster.config.model_name
        self._timers = [EMBEDDING_LOOKUP.labels(name, str(index)) for index in range(self._cluster.count)]

    def after_fork(self) -> None:
        """A child counts from nothing: another thread of the parent may have held a lock of its counts."""
        if TimedBatches._process != os.getpid():
            TimedBatches._process = os.getpid()
            vars(EMBEDDING_LOOKUP).update(vars(_histogram(None)))
        self._label()

    def _lookup_on(
        self, index: int, shard: Shard, parts: list[IdPart], dims: list[int], left: float
    ) -> list[FloatArray]:
        started = time.perf_counter()
        try:
            return super()._lookup_on(index, shard, parts, dims, left)
        finally:
            self._timers[index].observe(time.perf_counter() - started)

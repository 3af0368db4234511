"""Timers of a client's calls, as histograms of this process for Prometheus."""

from __future__ import annotations

import os
from typing import ClassVar

from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from trilith.runtime.forks import renew_in_children

__all__ = ["EMBEDDING_LOOKUP", "LookupTimers"]

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


class LookupTimers:
    """One timer for each PS of a cluster, labelled with a model's name."""

    _process: ClassVar[int] = os.getpid()

    def __init__(self, model_name: str, count: int) -> None:
        """Make timers for `count` PS."""
        self._model_name = model_name
        self._count = count
        self._label()
        renew_in_children(self)

    def _label(self) -> None:
        self._timers = [EMBEDDING_LOOKUP.labels(self._model_name, str(index)) for index in range(self._count)]

    def after_fork(self) -> None:
        """A child counts from nothing: another thread of the parent may have held a lock of its counts."""
        if LookupTimers._process != os.getpid():
            LookupTimers._process = os.getpid()
            vars(EMBEDDING_LOOKUP).update(vars(_histogram(None)))
        self._label()

    def observe(self, index: int, seconds: float) -> None:
        """Say what PS `index` took."""
        self._timers[index].observe(seconds)

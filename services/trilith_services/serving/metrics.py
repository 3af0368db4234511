"""Metrics of an entry, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from trilith_proto import serving_pb2
from trilith_services.grpc.calls import CallMetrics

__all__ = ["EntryMetrics"]

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class EntryMetrics(CallMetrics):
    """Counts what an entry does; thread-safe."""

    def __init__(self) -> None:
        """Make an empty registry."""
        super().__init__("trilith_serving_", ("calls", "Calls."), ("seconds", "Time to answer."), _BUCKETS)
        registry = self.registry
        self._started = time.monotonic()
        self._records = Counter("trilith_serving_records_total", "Records scored.", registry=registry)
        self._unknown = Counter(
            "trilith_serving_unknown_features_total",
            "Features in requests that the model does not know; left out.",
            ["form"],
            registry=registry,
        )
        self._refused = Counter("trilith_serving_refused_total", "Calls turned away.", registry=registry)
        self._loads = Counter("trilith_serving_model_loads_total", "Versions loaded.", registry=registry)
        ProcessCollector(registry=registry)

    def scored(self, records: int) -> None:
        """So many records were."""
        self._records.inc(records)

    def unknown(self, form: str, features: int) -> None:
        """So many features were left out of requests in a form, "json" or "records"."""
        self._unknown.labels(form).inc(features)

    def add_requests(self, status: serving_pb2.ModelStatusResponse) -> None:
        """Put into `status` what requests added up to."""
        status.uptime_seconds = time.monotonic() - self._started
        status.latency_bounds.extend(self.bounds)
        asked = [totals for method, totals in self.totals().items() if method.startswith("Predict")]
        status.requests = sum(totals.calls for totals in asked)
        status.failures = sum(totals.failures for totals in asked)
        status.request_seconds = sum(totals.seconds for totals in asked)
        none = [0] * (len(self.bounds) + 1)
        status.latency_buckets.extend(map(sum, zip(none, *(totals.buckets for totals in asked), strict=True)))
        status.records = int(next(iter(self._records.collect())).samples[0].value)

    def refused(self) -> None:
        """A call was turned away."""
        self._refused.inc()

    def loaded(self) -> None:
        """A version was loaded."""
        self._loads.inc()

    def watch(self, status: Callable[[], serving_pb2.ModelStatusResponse]) -> None:
        """Export an entry's status, read when somebody scrapes."""
        self.registry.register(_StatusCollector(status))


class _StatusCollector(Collector):
    """Versions, freshness and replicas."""

    def __init__(self, status: Callable[[], serving_pb2.ModelStatusResponse]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked before somebody scrapes."""
        return []

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        status = self._status()
        yield GaugeMetricFamily("trilith_serving_model_version", "Version in use.", status.model_version)
        loaded = GaugeMetricFamily(
            "trilith_serving_version_loaded", "1: the version in use; 0: another that is loaded.", labels=["version"]
        )
        records = CounterMetricFamily(
            "trilith_serving_version_records_total", "Records that a loaded version has scored.", labels=["version"]
        )
        for each in status.versions:
            if not each.error:
                loaded.add_metric([str(each.version)], float(each.in_use))
                records.add_metric([str(each.version)], each.records)
        yield from (loaded, records)
        yield GaugeMetricFamily(
            "trilith_serving_rows_as_of_seconds", "Up to when the rows are fresh, Unix seconds.", status.rows_as_of
        )
        yield GaugeMetricFamily(
            "trilith_serving_model_checkpoint_seconds",
            "When the model's checkpoint was written.",
            status.checkpoint_time,
        )
        healthy = GaugeMetricFamily("trilith_serving_replica_healthy", "1: it answers.", labels=["shard", "address"])
        failures = CounterMetricFamily(
            "trilith_serving_replica_failures_total", "Lookups that failed there.", labels=["shard", "address"]
        )
        for replica in status.replicas:
            healthy.add_metric([str(replica.shard), replica.address], float(replica.healthy))
            failures.add_metric([str(replica.shard), replica.address], replica.failures)
        yield healthy
        yield failures

"""Every metric a PS exports, in a registry of its own.

Names end in their unit, counters in `_total`; labels are few and bounded: methods, statuses, tables that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from trilith_proto import ps_pb2
from trilith_services.grpc.calls import CallMetrics

__all__ = ["Metrics"]

_S = TypeVar("_S")

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


class Metrics(CallMetrics):
    """Counts what a PS does; thread-safe."""

    def __init__(self) -> None:
        """Make an empty registry."""
        super().__init__(
            "trilith_ps_",
            ("requests", "Calls answered."),
            ("rpc_seconds", "Time spent in a servicer method, queueing excluded."),
            _BUCKETS,
        )
        registry = self.registry
        self._refused = Counter(
            "trilith_ps_refused_total", "Calls refused because the queue was full.", registry=registry
        )
        self._checkpoint_seconds = Histogram(
            "trilith_ps_checkpoint_seconds",
            "Time to write this PS's part of a checkpoint.",
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
            registry=registry,
        )
        self._checkpoint_bytes = Gauge(
            "trilith_ps_checkpoint_bytes", "Size of the last part written.", registry=registry
        )
        self._checkpoint_failures = Counter(
            "trilith_ps_checkpoint_failures_total", "Checkpoints that failed.", registry=registry
        )
        self._complete_time = Gauge(
            "trilith_ps_last_complete_checkpoint_time_seconds",
            "When the newest checkpoint of all PS became complete, Unix seconds; 0: none yet.",
            registry=registry,
        )
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def refused(self) -> None:
        """A call was refused because the queue was full."""
        self._refused.inc()

    def checkpointed(self, seconds: float, size: int, succeeded: bool) -> None:
        """A save of `size` bytes ended."""
        if succeeded:
            self._checkpoint_seconds.observe(seconds)
            self._checkpoint_bytes.set(size)
        else:
            self._checkpoint_failures.inc()

    def completed(self, time_s: float) -> None:
        """The newest complete checkpoint of all PS became so at `time_s`, Unix seconds."""
        self._complete_time.set(time_s)

    def add_methods(self, stats: ps_pb2.StatsResponse) -> None:
        """Put into `stats` what calls added up to, by method, with their times."""
        stats.latency_bounds.extend(self.bounds)
        for method, totals in self.totals().items():
            stats.requests[method] = totals.calls
            stats.methods.add(
                method=method,
                calls=totals.calls,
                failures=totals.failures,
                seconds=totals.seconds,
                buckets=totals.buckets,
            )

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        ids = CounterMetricFamily("trilith_ps_ids", "Ids in requests.", labels=["method"])
        size = CounterMetricFamily(
            "trilith_ps_message_bytes", "Bytes of messages that carry arrays.", labels=["method", "direction"]
        )
        for method, totals in self.totals().items():
            ids.add_metric([method], totals.ids)
            size.add_metric([method, "received"], totals.received)
            size.add_metric([method, "sent"], totals.sent)
        return [*super().collect(), ids, size]

    def watch(self, stats: Callable[[], ps_pb2.StatsResponse]) -> None:
        """Export a shard's own numbers, read when somebody scrapes."""
        self.registry.register(_ShardCollector(stats))


_TABLE_GAUGES: Mapping[str, tuple[str, Callable[[ps_pb2.TableStats], float]]] = {
    "trilith_ps_rows": ("Rows held in memory.", lambda table: table.rows),
    "trilith_ps_table_bytes": ("Memory of rows, index and filter.", lambda table: table.bytes),
    "trilith_ps_lookup_hit_ratio": (
        "Looked-up ids that had a row, of all.",
        lambda table: table.lookup_hits / table.lookup_ids if table.lookup_ids else 0.0,
    ),
    "trilith_ps_max_update_time_seconds": ("Newest update, in Unix seconds.", lambda table: table.max_update_time),
}
_TABLE_COUNTERS: Mapping[str, tuple[str, Callable[[ps_pb2.TableStats], float]]] = {
    "trilith_ps_lookup_ids_total": ("Ids looked up.", lambda table: table.lookup_ids),
    "trilith_ps_lookup_hits_total": ("Looked-up ids that had a row.", lambda table: table.lookup_hits),
    "trilith_ps_update_ids_total": ("Ids in writes.", lambda table: table.update_ids),
    "trilith_ps_filtered_ids_total": ("Ids that the occurrence filter kept out.", lambda table: table.filtered_ids),
    "trilith_ps_evicted_rows_total": ("Rows deleted because they expired.", lambda table: table.evicted_rows),
}
_SHARD_GAUGES: Mapping[str, tuple[str, Callable[[ps_pb2.StatsResponse], float]]] = {
    "trilith_ps_memory_bytes": (
        "Memory of tables with their filters, variables, queues and notes of writes: what the limit is about.",
        lambda stats: stats.memory_bytes,
    ),
    "trilith_ps_memory_limit_bytes": ("The limit on it; 0: none.", lambda stats: stats.memory_limit_bytes),
    "trilith_ps_queue_calls": ("Calls that wait for a thread.", lambda stats: stats.queued_requests),
    "trilith_ps_global_step": ("The model's step as this PS knows it.", lambda stats: stats.global_step),
    "trilith_ps_last_checkpoint_time_seconds": (
        "When the last checkpoint was written, in Unix seconds; 0: never.",
        lambda stats: stats.last_checkpoint_time,
    ),
}


_TARGET_GAUGES: Mapping[str, tuple[str, Callable[[ps_pb2.SyncTargetStats], float]]] = {
    "trilith_ps_sync_lag_seconds": (
        "Age of the oldest change that a serving replica lacks.",
        lambda target: target.lag_seconds,
    ),
    "trilith_ps_sync_lag_rows": ("Rows that a serving replica lacks.", lambda target: target.lag_rows),
    "trilith_ps_sync_copying": (
        "Whether it is being given whole tables.",
        lambda target: target.copying,
    ),
}
_TARGET_COUNTERS: Mapping[str, tuple[str, Callable[[ps_pb2.SyncTargetStats], float]]] = {
    "trilith_ps_sync_rows_total": ("Rows that a serving replica has acknowledged.", lambda target: target.rows),
    "trilith_ps_sync_erased_total": ("Deletions that it has acknowledged.", lambda target: target.erased),
    "trilith_ps_sync_bytes_total": ("Bytes of pushes that it has acknowledged.", lambda target: target.bytes),
    "trilith_ps_sync_pushes_total": ("Pushes that it has acknowledged.", lambda target: target.pushes),
    "trilith_ps_sync_failures_total": ("Pushes that failed and were sent again.", lambda target: target.failures),
    "trilith_ps_sync_copies_total": ("Full copies begun.", lambda target: target.copies),
}
_REPLICA_GAUGES: Mapping[str, tuple[str, Callable[[ps_pb2.ReplicaStats], float]]] = {
    "trilith_ps_replica_as_of_seconds": (
        "The replica holds what training had acknowledged at this Unix time; 0: not yet complete.",
        lambda replica: replica.as_of,
    ),
    "trilith_ps_replica_copying": ("Whether a full copy is under way.", lambda replica: replica.copying),
}
_REPLICA_COUNTERS: Mapping[str, tuple[str, Callable[[ps_pb2.ReplicaStats], float]]] = {
    "trilith_ps_replica_pushes_total": ("Pushes taken.", lambda replica: replica.pushes),
    "trilith_ps_replica_rows_total": ("Rows taken.", lambda replica: replica.rows),
    "trilith_ps_replica_erased_total": ("Deletions taken.", lambda replica: replica.erased),
}


class _ShardCollector(Collector):
    def __init__(self, stats: Callable[[], ps_pb2.StatsResponse]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """Say nothing: registering must not ask a shard that is still starting."""
        return []

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield from _families(GaugeMetricFamily, _SHARD_GAUGES, [stats])
        yield from _families(GaugeMetricFamily, _TABLE_GAUGES, stats.tables, table=lambda table: table.table)
        yield from _families(CounterMetricFamily, _TABLE_COUNTERS, stats.tables, table=lambda table: table.table)
        if targets := stats.sync_targets:
            yield from _families(GaugeMetricFamily, _TARGET_GAUGES, targets, target=lambda target: target.name)
            yield from _families(CounterMetricFamily, _TARGET_COUNTERS, targets, target=lambda target: target.name)
        if stats.HasField("replica"):
            yield from _families(GaugeMetricFamily, _REPLICA_GAUGES, [stats.replica])
            yield from _families(CounterMetricFamily, _REPLICA_COUNTERS, [stats.replica])


def _families(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    specs: Mapping[str, tuple[str, Callable[[_S], float]]],
    parts: Iterable[_S],
    **labels: Callable[[_S], str],
) -> Iterator[Metric]:
    """A family of samples for each of `specs`, one sample for each part, labelled."""
    for name, (text, value_of) in specs.items():
        family = kind(name, text, labels=list(labels))
        for part in parts:
            family.add_metric([label(part) for label in labels.values()], value_of(part))
        yield family

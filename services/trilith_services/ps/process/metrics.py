"""Every metric a PS exports, in a registry of its own.

Names end in their unit, counters in `_total`; labels are few and bounded: methods, statuses, tables that exist.
"""

from __future__ import annotations

import copy
import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from trilith_proto import ps_pb2
from trilith_services.grpc.listening import LOOPBACK, bind, warn_if_exposed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from wsgiref.simple_server import WSGIServer

__all__ = ["Metrics"]

log = logging.getLogger(__name__)

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


class _Tally:
    """What calls of one method added up to."""

    __slots__ = ("buckets", "ids", "received", "seconds", "sent", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.buckets = [0] * (len(_BUCKETS) + 1)
        self.seconds = 0.0
        self.ids = self.received = self.sent = 0


class Metrics:
    """Counts what a PS does; thread-safe. Implements `rpc.Observer`.

    What every call touches is counted in plain numbers under one lock and made into Prometheus samples when somebody
    scrapes: half a dozen of the library's counters would cost a small lookup as much as its rows.
    """

    def __init__(self) -> None:
        """Make an empty registry."""
        self.registry = CollectorRegistry()
        self._server: WSGIServer | None = None
        self._lock = threading.Lock()
        self._tallies: dict[str, _Tally] = {}
        self._refused = Counter(
            "trilith_ps_refused_total", "Calls refused because the queue was full.", registry=self.registry
        )
        self._checkpoint_seconds = Histogram(
            "trilith_ps_checkpoint_seconds",
            "Time to write this PS's part of a checkpoint.",
            buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self._checkpoint_bytes = Gauge(
            "trilith_ps_checkpoint_bytes", "Size of the last part written.", registry=self.registry
        )
        self._checkpoint_failures = Counter(
            "trilith_ps_checkpoint_failures_total", "Checkpoints that failed.", registry=self.registry
        )
        self._complete_time = Gauge(
            "trilith_ps_last_complete_checkpoint_time_seconds",
            "When the newest checkpoint of all PS became complete, Unix seconds; 0: none yet.",
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_CallCollector(self))

    def called(self, method: str, status: str, seconds: float) -> None:
        """See `rpc.Observer`."""
        bucket = bisect_left(_BUCKETS, seconds)
        with self._lock:
            tally = self._tally(method)
            tally.statuses[status] = tally.statuses.get(status, 0) + 1
            tally.buckets[bucket] += 1
            tally.seconds += seconds

    def carried(self, method: str, ids: int, received: int, sent: int) -> None:
        """A call of `method` carried so many ids, in a request of `received` bytes answered by `sent`."""
        with self._lock:
            tally = self._tally(method)
            tally.ids += ids
            tally.received += received
            tally.sent += sent

    def _tally(self, method: str) -> _Tally:
        tally = self._tallies.get(method)
        if tally is None:
            tally = self._tallies[method] = _Tally()
        return tally

    def tallies(self) -> dict[str, _Tally]:
        """A copy of what calls added up to, by method."""
        with self._lock:
            return copy.deepcopy(self._tallies)

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

    def requests(self) -> dict[str, int]:
        """Calls answered so far, by method."""
        with self._lock:
            return {method: sum(tally.statuses.values()) for method, tally in self._tallies.items()}

    def add_methods(self, stats: ps_pb2.StatsResponse) -> None:
        """Put into `stats` what calls added up to, by method, with their times."""
        stats.latency_bounds.extend(_BUCKETS)
        for method, tally in sorted(self.tallies().items()):
            calls = sum(tally.statuses.values())
            failures = calls - tally.statuses.get("OK", 0)
            stats.methods.add(
                method=method, calls=calls, failures=failures, seconds=tally.seconds, buckets=tally.buckets
            )

    def watch(self, stats: Callable[[], ps_pb2.StatsResponse]) -> None:
        """Export a shard's own numbers, read when somebody scrapes."""
        self.registry.register(_ShardCollector(stats))

    def serve(self, port: int, *, ready: Callable[[], bool], host: str = LOOPBACK) -> int:
        """Answer GET /metrics, and GET /healthz with 200 if `ready` and else 503, on a thread until `close`.

        Returns the port; `port` 0 takes any free one.

        Raises:
            UnavailableError: The address is taken, or not this machine's.
        """
        scrape = make_wsgi_app(self.registry)

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"] != "/healthz":
                return scrape(environ, start_response)
            status, body = ("200 OK", b"ok\n") if ready() else ("503 Service Unavailable", b"not serving\n")
            start_response(status, [("Content-Type", "text/plain")])
            return [body]

        server = ThreadingWSGIServer((host, port), _Silent, bind_and_activate=False)
        server.socket.close()  # one of IPv4
        server.socket = bind(host, port)
        server.server_name, server.server_port = host, server.socket.getsockname()[1]
        server.setup_environ()
        server.set_app(answer)
        self._server = server
        warn_if_exposed("metrics", host, server.server_port)
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        log.info("metrics", extra={"port": server.server_port})
        return server.server_port

    def close(self) -> None:
        """End `serve`, if it was called; harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class _Silent(WSGIRequestHandler):
    """Scrapes and health checks are no news."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name it overrides)
        """Say nothing."""


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


class _CallCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("trilith_ps_requests", "Calls answered.", labels=["method", "status"])
        seconds = HistogramMetricFamily(
            "trilith_ps_rpc_seconds", "Time spent in a servicer method, queueing excluded.", labels=["method"]
        )
        ids = CounterMetricFamily("trilith_ps_ids", "Ids in requests.", labels=["method"])
        size = CounterMetricFamily(
            "trilith_ps_message_bytes", "Bytes of messages that carry arrays.", labels=["method", "direction"]
        )
        edges = [*map(str, _BUCKETS), "+Inf"]
        for method, tally in sorted(self._metrics.tallies().items()):
            for status, calls in sorted(tally.statuses.items()):
                requests.add_metric([method, status], calls)
            cumulative = list(zip(edges, map(float, accumulate(tally.buckets)), strict=True))
            seconds.add_metric([method], cumulative, tally.seconds)
            ids.add_metric([method], tally.ids)
            size.add_metric([method, "received"], tally.received)
            size.add_metric([method, "sent"], tally.sent)
        return [requests, seconds, ids, size]


class _ShardCollector(Collector):
    def __init__(self, stats: Callable[[], ps_pb2.StatsResponse]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """Say nothing: registering must not ask a shard that is still starting."""
        return []

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, (text, value_of) in _SHARD_GAUGES.items():
            yield GaugeMetricFamily(name, text, value=value_of(stats))
        families: list[Metric] = []
        for name, (text, of_table) in _TABLE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["table"])
            for table in stats.tables:
                gauge.add_metric([table.table], of_table(table))
            families.append(gauge)
        for name, (text, of_table) in _TABLE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["table"])
            for table in stats.tables:
                counter.add_metric([table.table], of_table(table))
            families.append(counter)
        if stats.sync_targets:
            families += _of_targets(stats.sync_targets)
        if stats.HasField("replica"):
            for name, (text, of_replica) in _REPLICA_GAUGES.items():
                families.append(GaugeMetricFamily(name, text, value=of_replica(stats.replica)))
            for name, (text, of_replica) in _REPLICA_COUNTERS.items():
                families.append(CounterMetricFamily(name, text, value=of_replica(stats.replica)))
        yield from families


def _of_targets(targets: Iterable[ps_pb2.SyncTargetStats]) -> list[Metric]:
    families: list[Metric] = []
    for name, (text, of_target) in _TARGET_GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["target"])
        for target in targets:
            gauge.add_metric([target.name], of_target(target))
        families.append(gauge)
    for name, (text, of_target) in _TARGET_COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["target"])
        for target in targets:
            counter.add_metric([target.name], of_target(target))
        families.append(counter)
    return families

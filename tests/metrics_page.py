"""docs/metrics.md: every metric that a process exports, written from the registries themselves by `tests.reference`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry

import trilith.runtime.timers  # noqa: F401 (registers those of clients)
from trilith.estimator import Prometheus
from trilith_proto import ps_pb2, serving_pb2
from trilith_services.ps.process.metrics import Metrics
from trilith_services.serving.metrics import EntryMetrics

__all__ = ["METRICS_PAGE", "metrics_page"]

METRICS_PAGE = Path(__file__).resolve().parents[1] / "docs/metrics.md"

_HEAD = """# Metrics

<!-- Written by `make docs` from the program itself; `make lint` and the tests fail when it is stale. -->

`GET /metrics`, for Prometheus: of PS and serving replicas with `--metrics-port`, of an entry at its `--http`, of
a job's workers with `metrics_port` in its run. `deploy/monitoring` has recording rules, alerts and a dashboard. Times
are in seconds, moments in Unix seconds; a histogram has `_bucket`, `_sum` and `_count`.
"""


def metrics_page() -> str:
    """The page as it should be."""
    of_ps = Metrics()
    of_ps.called("Lookup", "OK", 0.1)
    # One of everything, so that everything is shown.
    stats = ps_pb2.StatsResponse(tables=[ps_pb2.TableStats(table="a")], sync_targets=[ps_pb2.SyncTargetStats(name="a")])
    stats.replica.as_of = 1
    of_ps.watch(lambda: stats)
    of_entry = EntryMetrics()
    of_entry.called("Predict", "OK", 0.1)
    status = serving_pb2.ModelStatusResponse()
    status.replicas.add()
    of_entry.watch(lambda: status)
    of_job = CollectorRegistry()
    Prometheus(of_job).register()
    parts = {
        "PS and serving replicas": of_ps.registry,
        "Entries": of_entry.registry,
        "Workers": REGISTRY,
        "Jobs with the callback `trilith.estimator.Prometheus`": of_job,
    }
    return "\n".join([_HEAD, *(f"## {title}\n\n{_table(registry)}" for title, registry in parts.items())])


def _table(registry: CollectorRegistry) -> str:
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |", *sorted(_rows(registry))]
    return "\n".join(lines) + "\n"


def _rows(registry: CollectorRegistry) -> Iterator[str]:
    declared = {
        name: getattr(collector, "_labelnames", ()) for collector, names in _collectors(registry) for name in names
    }
    for family in registry.collect():
        if family.name.startswith("trilith_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            shown = ", ".join(f"`{label}`" for label in sorted({*labels, *declared.get(family.name, ())}))
            yield f"| `{name}` | {family.type} | {shown} | {family.documentation} |"


def _collectors(registry: CollectorRegistry) -> list[tuple[object, list[str]]]:
    return list(registry._collector_to_names.items())  # metrics without a sample yet show their labels nowhere else

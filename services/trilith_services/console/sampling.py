"""From what processes count to what a person asks: rates, latencies, how far replicas are behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from trilith_proto import ps_pb2, serving_pb2
from trilith_services.console.schema import EntryServer, Latency, Replica, Shard, TableState, Totals
from trilith_services.console.serving_list import ServingProcess

__all__ = [
    "EntrySample",
    "PsSample",
    "Sample",
    "add_up",
    "entry_state",
    "missing_replicas",
    "quantile",
    "replica_state",
    "shard_state",
    "table_states",
]


_S = TypeVar("_S", ps_pb2.StatsResponse, serving_pb2.ModelStatusResponse)


@dataclass(frozen=True, slots=True)
class Sample(Generic[_S]):
    """What a process said at some moment, and what it had said at the look before.

    Attributes:
        at: Seconds of a monotonic clock.
        stats: Its numbers.
        before: The sample before, None if there is none of the same incarnation.
    """

    at: float
    stats: _S
    before: Sample[_S] | None = None

    def after(self, earlier: Sample[_S] | None) -> Sample[_S]:
        """This sample, counted from `earlier`, if that was the same process."""
        same = earlier is not None and earlier.stats.incarnation == self.stats.incarnation
        return Sample(self.at, self.stats, Sample(earlier.at, earlier.stats) if same and earlier else None)

    def rate(self, now: float, before: float) -> float:
        """Growth a second."""
        if self.before is None or self.at <= self.before.at:
            return 0.0
        return max(now - before, 0) / (self.at - self.before.at)


PsSample: TypeAlias = Sample[ps_pb2.StatsResponse]
EntrySample: TypeAlias = Sample[serving_pb2.ModelStatusResponse]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value below which that share of what was counted lies, evenly spread within each bucket.

    Args:
        bounds: Upper bounds of the buckets, ascending; the last bucket has none, and counts as its lower bound.
        counts: One more than bounds.
        share: 0 to 1.
    """
    total = sum(counts)
    if total == 0 or len(counts) != len(bounds) + 1:
        return None
    left = share * total
    for bucket, count in enumerate(counts):
        if count and left <= count:
            lower = bounds[bucket - 1] if bucket else 0.0
            upper = bounds[bucket] if bucket < len(bounds) else lower
            return lower + (upper - lower) * left / count
        left -= count
    return bounds[-1]


def _latencies(sample: PsSample) -> list[Latency]:
    stats = sample.stats
    earlier = {was.method: was for was in sample.before.stats.methods} if sample.before is not None else {}
    none = ps_pb2.MethodStats(buckets=[0] * (len(stats.latency_bounds) + 1))
    found = []
    for method in stats.methods:
        was = earlier.get(method.method, none if sample.before is not None else method)
        calls = method.calls - was.calls
        counts = [now - before for now, before in zip(method.buckets, was.buckets, strict=True)]
        times = [quantile(stats.latency_bounds, counts, share) for share in (0.5, 0.99)]
        found.append(
            Latency(
                method=method.method,
                calls_per_s=sample.rate(method.calls, was.calls),
                failures_per_s=sample.rate(method.failures, was.failures),
                mean_ms=1000 * (method.seconds - was.seconds) / calls if calls > 0 else None,
                p50_ms=None if times[0] is None else 1000 * times[0],
                p99_ms=None if times[1] is None else 1000 * times[1],
            )
        )
    return found


def _table_rates(sample: PsSample) -> dict[str, tuple[float, float]]:
    """Ids looked up and written a second, by table."""
    earlier = {was.table: was for was in sample.before.stats.tables} if sample.before is not None else {}
    rates = {}
    for table in sample.stats.tables:
        was = earlier.get(table.table, ps_pb2.TableStats() if sample.before is not None else table)
        rates[table.table] = (
            sample.rate(table.lookup_ids, was.lookup_ids),
            sample.rate(table.update_ids, was.update_ids),
        )
    return rates


def shard_state(index: int, address: str, sample: PsSample, answer: ps_pb2.DescribeResponse) -> Shard:
    """A PS that answered."""
    stats = sample.stats
    rates = _table_rates(sample).values()
    latencies = _latencies(sample)
    return Shard(
        index=index,
        address=address,
        alive=True,
        version=answer.version,
        incarnation=f"{stats.incarnation:016x}",
        uptime_s=stats.uptime_seconds,
        durability=answer.durability,
        restored_from=answer.restored_from,
        global_step=stats.global_step,
        rows=sum(table.rows for table in stats.tables),
        memory_bytes=stats.memory_bytes,
        memory_limit_bytes=stats.memory_limit_bytes,
        resident_bytes=stats.resident_bytes,
        queued=stats.queued_requests,
        calls_per_s=sum(latency.calls_per_s for latency in latencies),
        lookups_per_s=sum(lookups for lookups, _ in rates),
        updates_per_s=sum(updates for _, updates in rates),
        last_checkpoint=stats.last_checkpoint,
        last_checkpoint_unix_s=stats.last_checkpoint_time or None,
        latencies=latencies,
    )


def replica_state(
    shard: int,
    target: tuple[ps_pb2.SyncTargetStats, PsSample] | None,
    listed: ServingProcess | None,
    answered: PsSample | str,
) -> Replica:
    """A serving replica.

    Args:
        shard: Whose rows it holds.
        target: What the training PS says of it, and the sample that it said it in.
        listed: What the directory says of it; at least one of both does.
        answered: What it says itself, or why it does not.
    """
    push = target[0] if target is not None else None
    synced = 0.0
    if target is not None and target[1].before is not None:
        pushes = {push.name: push for push in target[1].before.stats.sync_targets}
        earlier = pushes.get(target[0].name)
        if earlier is not None and earlier.address == target[0].address:
            synced = target[1].rate(target[0].rows, earlier.rows)
    own = answered.stats if isinstance(answered, Sample) else None
    silent = answered if isinstance(answered, str) else ""
    return Replica(
        shard=shard,
        name=push.name if push is not None else (listed.name if listed is not None else ""),
        address=push.address if push is not None else (listed.address if listed is not None else ""),
        state=listed.state if listed is not None else "",
        alive=own is not None,
        error=(push.error if push is not None else "") or silent,
        rows=sum(table.rows for table in own.tables) if own is not None else 0,
        memory_bytes=own.memory_bytes if own is not None else 0,
        lookups_per_s=(
            sum(lookups for lookups, _ in _table_rates(answered).values()) if isinstance(answered, Sample) else 0.0
        ),
        lag_s=push.lag_seconds if push is not None else None,
        lag_rows=push.lag_rows if push is not None else None,
        copying=(push is not None and push.copying) or (own is not None and own.replica.copying),
        synced_per_s=synced,
        failures=push.failures if push is not None else 0,
        as_of_unix_s=(own.replica.as_of or None) if own is not None else None,
    )


def entry_state(listed: ServingProcess, answered: EntrySample | str) -> EntryServer:
    """A process that scores requests.

    Args:
        listed: What the directory says of it.
        answered: What it says itself, or why it does not.
    """
    name = f"{listed.server_type} {listed.name}"
    if isinstance(answered, str):
        return EntryServer(name=name, address=listed.address, state=listed.state, alive=False, error=answered)
    status = answered.stats
    was = answered.before.stats if answered.before is not None else status
    counts = [now - before for now, before in zip(status.latency_buckets, was.latency_buckets, strict=True)]
    times = [quantile(status.latency_bounds, counts, share) for share in (0.5, 0.99)]
    problem = _problem(status)
    return EntryServer(
        name=name,
        address=listed.address,
        state="degraded" if problem and status.model else listed.state,
        alive=True,
        uptime_s=status.uptime_seconds,
        model=status.model,
        mode=status.mode,
        model_version=status.model_version,
        model_step=status.model_step,
        checkpoint_unix_s=status.checkpoint_time or None,
        loaded_unix_s=status.loaded_time or None,
        rows_as_of_unix_s=status.rows_as_of or None,
        load_error=status.load_error,
        versions=[each.version for each in status.versions if not each.error],
        pinned=status.pinned,
        requests_per_s=answered.rate(status.requests, was.requests),
        failures_per_s=answered.rate(status.failures, was.failures),
        records_per_s=answered.rate(status.records, was.records),
        p50_ms=None if times[0] is None else 1000 * times[0],
        p99_ms=None if times[1] is None else 1000 * times[1],
        replicas=len(status.replicas),
        healthy_replicas=sum(replica.healthy for replica in status.replicas),
        problem=problem,
    )


def _problem(status: serving_pb2.ModelStatusResponse) -> str:
    """Why an entry cannot answer requests; empty if it can."""
    if not status.model:
        return status.load_error or "no model is loaded"
    shards: dict[int, list[serving_pb2.ReplicaStatus]] = {}
    for replica in status.replicas:
        shards.setdefault(replica.shard, []).append(replica)
    return "; ".join(
        f"shard {shard}: 0 of {len(known)} replicas answer ({', '.join(dict.fromkeys(one.error for one in known))})"
        for shard, known in sorted(shards.items())
        if not any(one.healthy for one in known)
    )


def missing_replicas(shards: int, replicas: Sequence[Replica], entries: Iterable[EntryServer]) -> list[Replica]:
    """A row for every shard that has no serving replica although rows are looked up at some."""
    if not replicas and not any(entry.mode == "distributed" for entry in entries):
        return []
    there = {replica.shard for replica in replicas}
    return [
        Replica(shard=shard, name="", address="", state="missing", alive=False, error="no serving replica is listed")
        for shard in range(shards)
        if shard not in there
    ]


def table_states(samples: Mapping[int, PsSample], count: int) -> list[TableState]:
    """Every table, the shards that answered added up.

    Args:
        samples: By shard index.
        count: How many shards there are.
    """
    tables: dict[str, dict[int, ps_pb2.TableStats]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    for index, sample in samples.items():
        by_table = _table_rates(sample)
        for table in sample.stats.tables:
            tables.setdefault(table.table, {})[index] = table
            rates.setdefault(table.table, []).append(by_table[table.table])
    return [
        TableState(
            name=name,
            rows=sum(part.rows for part in parts.values()),
            bytes=sum(part.bytes for part in parts.values()),
            hit_ratio=(
                sum(part.lookup_hits for part in parts.values()) / looked_up
                if (looked_up := sum(part.lookup_ids for part in parts.values()))
                else None
            ),
            lookups_per_s=sum(lookups for lookups, _ in rates[name]),
            updates_per_s=sum(updates for _, updates in rates[name]),
            filtered_ids=sum(part.filtered_ids for part in parts.values()),
            evicted_rows=sum(part.evicted_rows for part in parts.values()),
            newest_update_unix_s=max((part.max_update_time for part in parts.values()), default=0) or None,
            rows_by_shard=[parts[index].rows if index in parts else None for index in range(count)],
        )
        for name, parts in sorted(tables.items())
    ]


def add_up(shards: Sequence[Shard], replicas: Iterable[Replica]) -> Totals:
    """The whole cluster, as far as it answers."""
    p99 = [
        latency.p99_ms
        for shard in shards
        for latency in shard.latencies
        if latency.method == "Lookup" and latency.p99_ms is not None
    ]
    lags = [replica.lag_s for replica in replicas if replica.lag_s is not None]
    return Totals(
        shards=len(shards),
        alive=sum(shard.alive for shard in shards),
        global_step=max((shard.global_step for shard in shards), default=0),
        rows=sum(shard.rows for shard in shards),
        memory_bytes=sum(shard.memory_bytes for shard in shards),
        lookups_per_s=sum(shard.lookups_per_s for shard in shards),
        updates_per_s=sum(shard.updates_per_s for shard in shards),
        lookup_p99_ms=max(p99, default=None),
        lag_s=max(lags, default=None),
    )

"""`trilith top`: what the PS of a cluster are doing, live."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from trilith.discovery.zk_url import redact
from trilith_services.commands import output
from trilith_services.commands.flags import Address

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trilith_proto import ps_pb2
    from trilith_services.console.members import Members

__all__ = ["register"]

_CLUSTER_S = 10.0  # for the cluster to be there


def register(app: typer.Typer) -> None:
    """Add the `top` command."""
    app.command()(top)


def top(
    address: Address,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between looks; rates are over it.", min=0.1)
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per look.")] = False,
) -> None:
    """Show the shards of a cluster: rows, memory, rates, queue, last checkpoint; by PS and by table.

    A PS that does not answer is shown as such. Ctrl-C ends it. Exit status of --once: 1 if a PS did not answer.
    """
    from trilith_services.console.members import Members

    timeout_s = min(max(interval, 0.5), 2.0)
    with closing(Members(address, timeout_s=timeout_s, wait_s=_CLUSTER_S)) as members:
        _show(address, members, interval, once=once, as_json=as_json)


def _show(address: str, members: Members, interval: float, *, once: bool, as_json: bool) -> None:
    looks = _looks(members, interval)
    console = output.console()
    if as_json or once or not console.is_terminal:
        for look in looks:
            if as_json:
                typer.echo(json.dumps(look))
            else:
                console.print(_render(address, look, console.width))
            sys.stdout.flush()  # a pipe's reader wants each look when it is taken
            if once:
                raise typer.Exit(0 if all(shard["alive"] for shard in look["shards"]) else 1)
        return
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            for look in looks:
                live.update(_render(address, look, console.width), refresh=True)
    except KeyboardInterrupt:
        pass


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    stats: ps_pb2.StatsResponse | None
    identity: tuple[int, int] | None = None
    error: str = ""


def _looks(members: Members, interval: float) -> Iterator[dict[str, Any]]:
    """One description of the cluster per interval."""
    from trilith.errors import TrilithError

    identities: dict[int, tuple[int, int]] = {}  # by incarnation, which shard it says it is

    def ask(index: int) -> _Sample:
        shard = members.shards[index]
        stats = shard.stats()
        if stats.incarnation not in identities:
            answer = shard.describe()
            identities[answer.incarnation] = answer.shard_index, answer.shard_count
        return _Sample(time.monotonic(), stats, identities.get(stats.incarnation))

    def look() -> list[_Sample]:
        return [
            _Sample(time.monotonic(), None, error=str(answer)) if isinstance(answer, TrilithError) else answer
            for answer in members.each(range(members.count), ask).values()
        ]

    before = look()
    if not any(sample.stats for sample in before):
        yield _describe(members.addresses(), before, before)  # there is nothing to wait for
    while True:
        time.sleep(interval)
        now = look()
        yield _describe(members.addresses(), before, now)
        before = now


def _describe(hosts: Sequence[str], before: Sequence[_Sample], now: Sequence[_Sample]) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Any]] = {}
    for index, (host, old, new) in enumerate(zip(hosts, before, now, strict=True)):
        shard: dict[str, Any] = {"index": index, "address": host, "alive": new.stats is not None}
        shards.append(shard)
        if new.stats is None:
            shard["error"] = new.error
            continue
        stats = new.stats
        earlier = old.stats if old.stats is not None and old.stats.incarnation == stats.incarnation else None
        seconds = new.at - old.at
        if new.identity is not None and new.identity != (index, len(hosts)):
            shard["says"] = "shard {} of {}".format(*new.identity)
        shard |= {
            "incarnation": f"{stats.incarnation:016x}",
            "uptime_s": stats.uptime_seconds,
            "global_step": stats.global_step,
            "rows": sum(table.rows for table in stats.tables),
            "memory_bytes": stats.memory_bytes,
            "memory_limit_bytes": stats.memory_limit_bytes,
            "resident_bytes": stats.resident_bytes,
            "queued_requests": stats.queued_requests,
            "requests_per_s": _rate(sum(stats.requests.values()), earlier and sum(earlier.requests.values()), seconds),
            "last_checkpoint": stats.last_checkpoint,
            "last_checkpoint_unix_s": stats.last_checkpoint_time,
        }
        known = {table.table: table for table in earlier.tables} if earlier is not None else {}
        for table in stats.tables:
            was = known.get(table.table)
            entry = tables.setdefault(
                table.table,
                dict.fromkeys(
                    ("rows", "bytes", "lookup_ids", "lookup_hits", "lookups_per_s", "updates_per_s", "filtered_ids"), 0
                ),
            )
            entry["rows"] += table.rows
            entry["bytes"] += table.bytes
            entry["lookup_ids"] += table.lookup_ids
            entry["lookup_hits"] += table.lookup_hits
            entry["filtered_ids"] += table.filtered_ids
            entry["lookups_per_s"] += _rate(table.lookup_ids, was and was.lookup_ids, seconds)
            entry["updates_per_s"] += _rate(table.update_ids, was and was.update_ids, seconds)
    return {"unix_s": time.time(), "shards": shards, "tables": dict(sorted(tables.items()))}


def _rate(now: int, before: int | None, seconds: float) -> float:
    return 0.0 if before is None or seconds <= 0 else max(now - before, 0) / seconds


# What a narrow terminal leaves out first.
_DISPENSABLE = ("resident", "limit", "queue", "calls/s")
_LEFT = frozenset({"PS", "address", "up", "checkpoint"})


def _cells(shard: dict[str, Any], now: float) -> dict[str, str]:
    """A PS's row, by heading."""
    named = {"PS": str(shard["index"]), "address": shard["address"]}
    if not shard["alive"]:
        return named | {"up": "no answer"}
    saved = shard["last_checkpoint_unix_s"]
    return named | {
        "up": output.age(shard["uptime_s"]),
        "step": output.count(shard["global_step"]),
        "rows": output.count(shard["rows"]),
        "memory": output.size(shard["memory_bytes"]),
        "limit": output.size(shard["memory_limit_bytes"]) if shard["memory_limit_bytes"] else "none",
        "resident": output.size(shard["resident_bytes"]),
        "queue": output.count(shard["queued_requests"]),
        "calls/s": output.count(shard["requests_per_s"]),
        "checkpoint": f"{output.age(now - saved)} ago" if saved else "none",
    }


def _by_shard(look: dict[str, Any], width: int) -> RenderableType:
    rows = [_cells(shard, look["unix_s"]) for shard in look["shards"]]
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in max(rows, key=len)}
    for name in _DISPENSABLE:
        if sum(widths.values()) + 2 * (len(widths) - 1) > width:
            widths.pop(name, None)
    table = output.grid(*(name if name in _LEFT else f">{name}" for name in widths))
    for shard, row in zip(look["shards"], rows, strict=True):
        style = "green" if shard["alive"] else "bold red"
        table.add_row(*(Text(row.get(name, ""), style=style if name == "up" else "") for name in widths))
    return table


def _render(address: str, look: dict[str, Any], width: int) -> RenderableType:
    count = len(look["shards"])
    strange = [
        Text(
            f"{shard['address']} is {shard['says']}, not {shard['index']} of {count}: no client accepts that",
            "bold red",
        )
        for shard in look["shards"]
        if "says" in shard
    ]
    silent = [Text(shard["error"], "red") for shard in look["shards"] if "error" in shard]
    by_table = output.grid("table", ">rows", ">size", ">looked up/s", ">found", ">updated/s", ">filtered")
    for name, table in look["tables"].items():
        by_table.add_row(
            name,
            output.count(table["rows"]),
            output.size(table["bytes"]),
            output.count(table["lookups_per_s"]),
            f"{100 * table['lookup_hits'] / table['lookup_ids']:.1f} %" if table["lookup_ids"] else "-",
            output.count(table["updates_per_s"]),
            output.count(table["filtered_ids"]),
        )
    alive = sum(shard["alive"] for shard in look["shards"])
    title = Text.assemble((redact(address), "bold"), f"  {alive} of {count} PS answer")
    tables = by_table if look["tables"] else Text("no tables", style="dim")
    return Group(title, *strange, *silent, Text(), _by_shard(look, width), Text(), tables)

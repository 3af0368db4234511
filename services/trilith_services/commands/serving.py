"""`trilith serving`: the processes that answer while a model is trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilith_services.commands.entry import entry
from trilith_services.commands.flags import (
    Advertise,
    Listen,
    LogFlags,
    MemoryLimit,
    MetricsHost,
    MetricsPort,
    RowThreads,
    ServerFlags,
    ServingName,
    expanded,
)
from trilith_services.commands.versions import pin, status, versions, withdraw

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    serving = typer.Typer(
        name="serving", help="Serve a model: score requests, roll back, see what answers.", no_args_is_help=True
    )
    serving.command()(expanded(entry))
    serving.command()(expanded(ps))
    for command in (versions, pin, withdraw, status):
        serving.command()(command)
    app.add_typer(serving)


def ps(
    *,
    index: Annotated[int, typer.Option(metavar="N", help="Index of the shard, from 0.", min=0)] = 0,
    count: Annotated[int, typer.Option(metavar="N", help="Shards in the cluster.", min=1)] = 1,
    replica: Annotated[
        int, typer.Option(metavar="N", help="This replica's number among those of the shard.", min=0)
    ] = 0,
    listen: Listen = "127.0.0.1:7100",
    discovery: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Directory to announce the replica in, such as zk://host:2181/serving."),
    ] = None,
    advertise: Advertise = "",
    name: ServingName = "model",
    tables: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON list of table configs (TableConfig) for tables that shall be stored in another way than their "
            "training config says.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Directory or URL of exported rows, served until training sends newer ones."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long to wait for the first full copy before serving, without --rows; left out: until it "
            "is there.",
            min=0.0,
        ),
    ] = None,
    memory_limit: MemoryLimit = "0",
    threads: RowThreads = 0,
    server: ServerFlags,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    logs: LogFlags,
) -> None:
    """Hold the compressed rows of one shard, filled by its training PS, and answer lookups until SIGTERM."""
    from trilith.discovery.serving import ServingDirectory
    from trilith.ops.memory import tune_allocator
    from trilith_services import sizes
    from trilith_services.listening import reached_by_others
    from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
    from trilith_services.ps.process.shard import LocalShard
    from trilith_services.ps.replicas.replica import Replica, read_configs

    logs.setup(ps=index, replica=replica)
    tune_allocator()
    options = ReplicaOptions(
        limits=server.limits,
        replica=replica,
        advertise=advertise,
        rows=rows,
        wait_s=wait,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    )
    configs = read_configs(tables.read_text()) if tables is not None else []
    shard = LocalShard(
        index=index, count=count, memory_limit_bytes=sizes.memory_limit(memory_limit), threads=threads or None
    )
    listed = ServingDirectory(discovery, name).replicas(index) if discovery is not None else None
    process = ReplicaServer(Replica(shard, configs=configs), options, listed=listed)
    raise typer.Exit(process.run(listen, bound=reached_by_others(listen, advertise, discovery)))

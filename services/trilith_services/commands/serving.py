"""`trilith serving`: the processes that answer while a model is trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilith_services.commands.entry import entry
from trilith_services.commands.ps import LogFormat

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    serving = typer.Typer(name="serving", help="Serve a model.", no_args_is_help=True)
    serving.command()(ps)
    serving.command()(entry)
    app.add_typer(serving)


def ps(
    index: Annotated[int, typer.Option(help="Index of the shard, from 0.", min=0)] = 0,
    count: Annotated[int, typer.Option(help="Shards in the cluster.", min=1)] = 1,
    replica: Annotated[int, typer.Option(help="This replica's number among those of the shard.", min=0)] = 0,
    listen: Annotated[str, typer.Option(help="host:port to serve on; port 0 takes a free one.")] = "0.0.0.0:7100",
    discovery: Annotated[
        str | None,
        typer.Option(help="Directory to announce the replica in, such as zk://host:2181/serving."),
    ] = None,
    advertise: Annotated[
        str,
        typer.Option(help="host:port to announce, port 0 for the one served on; left out: this machine's address."),
    ] = "",
    name: Annotated[str, typer.Option(help="Serving model under which the directory lists it.")] = "model",
    tables: Annotated[
        Path | None,
        typer.Option(
            help="JSON list of table configs (TableConfig) for tables that shall be stored in another way than their "
            "training config says.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Directory or URL of exported rows, served until training sends newer ones."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait for the first full copy before serving, without --rows; left out: until it is there."
        ),
    ] = None,
    memory_limit: Annotated[str, typer.Option(help="Memory for rows, such as 512M or 16G; 0: no limit.")] = "0",
    threads: Annotated[int, typer.Option(help="Threads that work on rows; 0: one per core.", min=0)] = 0,
    rpc_threads: Annotated[int, typer.Option(help="Calls worked on at once.", min=1)] = 8,
    max_queue: Annotated[int, typer.Option(help="Calls that may wait; more are refused.", min=1)] = 128,
    max_message: Annotated[str, typer.Option(help="Largest message, such as 256M.")] = "256M",
    drain: Annotated[float, typer.Option(help="Seconds that calls get to finish after SIGTERM.", min=0.0)] = 10.0,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port; 0 takes a free one.", min=0, max=65535)
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="text (key=value) or json.")] = LogFormat.text,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Hold the compressed rows of one shard, filled by its training PS, and answer lookups until SIGTERM."""
    from trilith.discovery.serving import ServingDirectory
    from trilith.ops.memory import tune_allocator
    from trilith_services.logs import setup_logging
    from trilith_services.ps.replica import Replica, read_configs
    from trilith_services.ps.replica_server import ReplicaOptions, ReplicaServer
    from trilith_services.ps.store import Store
    from trilith_services.serve import Limits
    from trilith_services.sizes import parse_bytes

    setup_logging(log_format.value, level=log_level, role={"ps": index, "replica": replica})
    tune_allocator()
    options = ReplicaOptions(
        limits=Limits(
            threads=rpc_threads, max_queue=max_queue, max_message_bytes=parse_bytes(max_message), drain_s=drain
        ),
        replica=replica,
        advertise=advertise,
        rows=rows,
        wait_s=wait,
        metrics_port=metrics_port,
    )
    configs = read_configs(tables.read_text()) if tables is not None else []
    store = Store(index=index, count=count, memory_limit_bytes=parse_bytes(memory_limit), threads=threads or None)
    listed = ServingDirectory(discovery, name).replicas(index) if discovery is not None else None
    raise typer.Exit(ReplicaServer(Replica(store, configs=configs), options, listed=listed).run(listen))

"""`trilith serving entry`: the process that scores records."""

from __future__ import annotations

from typing import Annotated

import typer

from trilith_services.commands.ps import LogFormat

__all__ = ["entry"]


def entry(
    export: Annotated[str, typer.Option(help="Directory of exports, as `trilith export` was given; any fsspec URL.")],
    replicas: Annotated[
        list[str] | None,
        typer.Option(
            help="Where distributed exports look rows up: the URL of a directory, such as zk://host:2181/serving, or "
            "SHARD=host:port, once per replica; left out: the directory of --discovery."
        ),
    ] = None,
    discovery: Annotated[
        str | None,
        typer.Option(help="Directory to announce the entry in, for clients and consoles: zk://host:2181/serving."),
    ] = None,
    advertise: Annotated[
        str,
        typer.Option(help="host:port to announce, port 0 for the one served on; left out: this machine's address."),
    ] = "",
    replica: Annotated[
        int | None, typer.Option(help="This entry's number among the entries; left out: ZooKeeper gives one.", min=0)
    ] = None,
    name: Annotated[str, typer.Option(help="Serving model under which the directory lists processes.")] = "model",
    listen: Annotated[str, typer.Option(help="host:port for gRPC; port 0 takes a free one.")] = "0.0.0.0:7200",
    http: Annotated[str, typer.Option(help="host:port for JSON and metrics over HTTP; empty: none.")] = "0.0.0.0:7280",
    poll: Annotated[float, typer.Option(help="Seconds between two looks for a newer export.", min=0.05)] = 1.0,
    deadline: Annotated[float, typer.Option(help="Seconds that looking rows up may take.", min=0.001)] = 1.0,
    max_records: Annotated[int, typer.Option(help="Most records that a request may hold.", min=1)] = 8192,
    torch_threads: Annotated[int, typer.Option(help="Threads that one request computes with.", min=1)] = 1,
    threads: Annotated[
        int, typer.Option(help="Threads that standalone rows are read with; 0: one per core.", min=0)
    ] = 0,
    rpc_threads: Annotated[int, typer.Option(help="Calls worked on at once.", min=1)] = 8,
    max_queue: Annotated[int, typer.Option(help="Calls that may wait; more are refused.", min=1)] = 128,
    max_message: Annotated[str, typer.Option(help="Largest message, such as 64M.")] = "64M",
    drain: Annotated[float, typer.Option(help="Seconds that calls get to finish after SIGTERM.", min=0.0)] = 10.0,
    log_format: Annotated[LogFormat, typer.Option(help="text (key=value) or json.")] = LogFormat.text,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Score records with the newest export until SIGTERM; a newer export takes over without failing a request."""
    from trilith.discovery.serving import ServingDirectory
    from trilith.ops.memory import tune_allocator
    from trilith_services.logs import setup_logging
    from trilith_services.serve import Limits
    from trilith_services.serving.replica_lists import ListedReplicas, ReplicaList, open_replica_list
    from trilith_services.serving.server import Entry, EntryOptions
    from trilith_services.sizes import parse_bytes
    from trilith_services.worker.run import use_threads

    setup_logging(log_format.value, level=log_level, role={"entry": name})
    tune_allocator()
    use_threads(torch_threads)
    options = EntryOptions(
        limits=Limits(
            threads=rpc_threads, max_queue=max_queue, max_message_bytes=parse_bytes(max_message), drain_s=drain
        ),
        http=http,
        poll_s=poll,
        deadline_s=deadline,
        max_records=max_records,
        threads=threads or None,
        replica=replica,
        advertise=advertise,
    )
    directory = ServingDirectory(discovery, name) if discovery is not None else None
    rows: ReplicaList | None = ListedReplicas(directory) if directory is not None else None
    if replicas:
        rows = open_replica_list(replicas, name)
    listed = directory.entries() if directory is not None else None
    raise typer.Exit(Entry(export, options, replicas=rows, listed=listed).run(listen))

"""`trilith serving entry`: the process that scores records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trilith.runtime.extras import need
from trilith_services.commands.flags import (
    Advertise,
    Listen,
    LogFlags,
    RowThreads,
    ServerFlags,
    ServingName,
    address,
)
from trilith_services.options import like

__all__ = ["Missing", "Unknown", "entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFlags(ServerFlags):
    """What an entry takes on."""

    max_message: str = like(ServerFlags, "max_message", default="64M")


class Unknown(StrEnum):
    """In which requests features that the model does not know are refused; elsewhere they are left out and counted."""

    json = "json"
    refuse = "refuse"
    ignore = "ignore"


class Missing(StrEnum):
    """What becomes of features that a record in JSON leaves out."""

    refuse = "refuse"
    ignore = "ignore"


def entry(
    *,
    export: Annotated[
        str, typer.Option(metavar="DIR", help="Directory or URL of exports, as `trilith export` was given.")
    ],
    version: Annotated[
        str,
        typer.Option(
            metavar="latest|N|keep:N",
            help="Which versions are loaded: the newest; the one called N, and no other; or the N newest, of which "
            "requests may name one. See `trilith serving pin` for all entries of a directory.",
        ),
    ] = "latest",
    warm_up: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Requests, a line each as POST /v1/predict takes them, that every version scores before it answers, "
            "beside those that its export carries; a version that cannot is refused.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL|SHARD=HOST:PORT",
            help="Where distributed exports look rows up: a directory, such as zk://host:2181/serving, or one replica "
            "by its address, repeated for each; left out: the directory of --discovery.",
        ),
    ] = None,
    discovery: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Directory to announce the entry in, for clients and consoles, such as zk://host:2181/serving.",
        ),
    ] = None,
    advertise: Advertise = "",
    replica: Annotated[
        int | None,
        typer.Option(metavar="N", help="This entry's number among the entries; left out: ZooKeeper gives one.", min=0),
    ] = None,
    name: ServingName = "model",
    listen: Listen = "127.0.0.1:7200",
    http: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", callback=address, help="Address for JSON and metrics over HTTP; empty: none."
        ),
    ] = "127.0.0.1:7280",
    poll: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between two looks for a newer export.", min=0.05)
    ] = 1.0,
    deadline: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long looking rows up may take.", min=0.001)
    ] = 1.0,
    max_records: Annotated[int, typer.Option(metavar="N", help="Most records that a request may hold.", min=1)] = 8192,
    unknown_features: Annotated[
        Unknown,
        typer.Option(
            help="Features that the model does not know: json: refused in JSON, left out and counted in Examples and "
            "Instances; refuse: refused everywhere; ignore: left out and counted everywhere."
        ),
    ] = Unknown.json,
    missing_features: Annotated[
        Missing,
        typer.Option(
            help="Features that a record in JSON leaves out, though the model looks at them: refuse: told by name; "
            "ignore: empty, or zeros. In Examples and Instances, which often are logs, they always are."
        ),
    ] = Missing.refuse,
    torch_threads: Annotated[int, typer.Option(metavar="N", help="Threads that one request computes with.", min=1)] = 1,
    threads: RowThreads = 0,
    server: EntryFlags,
    logs: LogFlags,
) -> None:
    """Score records with the newest export until SIGTERM; another version takes over without failing a request."""
    need("torch", "safetensors", "fastapi", "uvicorn", extra="serving")
    from trilith.discovery.serving import ServingDirectory
    from trilith.ops.memory import tune_allocator
    from trilith_services.listening import reached_by_others
    from trilith_services.serving.replica_lists import ListedReplicas, ReplicaList, open_replica_list
    from trilith_services.serving.server import Entry, EntryOptions
    from trilith_services.serving.unknown import UnknownPolicy
    from trilith_services.serving.versions import VersionPolicy
    from trilith_services.serving.warm_up import read_warm_up

    policy = VersionPolicy.parse(version)
    logs.setup(entry=name)
    tune_allocator()
    options = EntryOptions(
        limits=server.limits,
        http=http,
        poll_s=poll,
        deadline_s=deadline,
        max_records=max_records,
        threads=threads or None,
        torch_threads=torch_threads,
        unknown=UnknownPolicy(unknown_features.value),
        replica=replica,
        missing_refused=missing_features is Missing.refuse,
        version=policy,
        warm_up=tuple(read_warm_up(warm_up.read_bytes(), str(warm_up))) if warm_up is not None else (),
        advertise=advertise,
    )
    directory = ServingDirectory(discovery, name) if discovery is not None else None
    rows: ReplicaList | None = ListedReplicas(directory) if directory is not None else None
    if replicas:
        rows = open_replica_list(replicas, name)
    listed = directory.entries() if directory is not None else None
    process = Entry(export, options, replicas=rows, listed=listed)
    raise typer.Exit(process.run(listen, bound=reached_by_others(listen, advertise, discovery)))

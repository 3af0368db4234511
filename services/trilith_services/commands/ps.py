"""`trilith ps`: one parameter server."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from trilith_services.commands.flags import (
    Advertise,
    CheckpointRoot,
    Listen,
    LogFlags,
    MemoryLimit,
    MetricsHost,
    MetricsPort,
    RowThreads,
    ServerFlags,
    expanded,
    size,
)

if TYPE_CHECKING:
    from trilith.discovery import Directory

__all__ = ["register"]

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(ps))


def ps(
    *,
    index: Annotated[
        int | None,
        typer.Option(metavar="N", help="This shard's index, from 0; left out: what the scheduler says, else 0.", min=0),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Shards in the cluster; left out: what the scheduler or the list says, else 1.", min=1
        ),
    ] = None,
    listen: Listen = "127.0.0.1:7000",
    discovery: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Directory to register in, such as zk://host:2181/trilith/demo."),
    ] = None,
    advertise: Advertise = "",
    standby: Annotated[
        bool,
        typer.Option("--standby", help="Wait until some shard of a zk:// cluster has no PS, and become that shard."),
    ] = False,
    standby_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="How long a shard must have had no PS before a standby takes its place.", min=0.0
        ),
    ] = 15.0,
    checkpoint_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory or URL to restore from, and to write checkpoints to.")
    ] = None,
    restore_from: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Directory or URL to restore from where those who train write the checkpoints, such as a job's "
            "model_dir; this PS writes none of its own accord.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Time between checkpoints; 0: only at an orderly stop, so that a PS that is killed loses everything.",
            min=0.0,
        ),
    ] = 0.0,
    checkpoint_keep: Annotated[int, typer.Option(metavar="N", help="Complete checkpoints to keep.", min=1)] = 3,
    checkpoint_root: CheckpointRoot = None,
    checkpoint_anywhere: Annotated[
        bool,
        typer.Option(
            "--checkpoint-anywhere",
            help="Let clients save to and restore from any path and URL that this process can reach: for networks "
            "where everybody may do what it may.",
        ),
    ] = False,
    owned: Annotated[
        bool,
        typer.Option(
            "--owned",
            help="This PS is one run's own: a client may shut it down, as a job does at its end with "
            "shut_down_ps=true. For networks where nobody else reaches it.",
        ),
    ] = False,
    memory_limit: MemoryLimit = "0",
    threads: RowThreads = 0,
    server: ServerFlags,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    sync_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL|NAME=HOST:PORT",
            help="Serving replicas to keep fresh: a directory of those that come and go, such as "
            "zk://host:2181/serving, or one by its address. May be repeated.",
        ),
    ] = None,
    sync_every: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Time from one push of what has changed to the next.", min=0.1),
    ] = 1.0,
    sync_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            callback=size,
            help="Memory for ids that have changed and are still to be sent, for each table and for all replicas "
            "together; where more changes, whole tables are sent again and again.",
        ),
    ] = "64M",
    sync_name: Annotated[
        str, typer.Option(metavar="NAME", help="Serving model whose replicas the directory lists.")
    ] = "model",
    logs: LogFlags,
) -> None:
    """Serve one shard until SIGTERM."""
    from trilith.discovery.serving import ServingDirectory
    from trilith.errors import InvalidRequestError
    from trilith.ops.memory import tune_allocator
    from trilith_services import sizes
    from trilith_services.listening import reached_by_others
    from trilith_services.ps.process.server import ParameterServer, PsOptions
    from trilith_services.ps.process.shard import LocalShard
    from trilith_services.ps.replicas.sync.options import SyncOptions
    from trilith_services.sizes import parse_bytes

    if checkpoint_every and checkpoint_dir is None:
        raise InvalidRequestError(f"--checkpoint-every {checkpoint_every:g} needs --checkpoint-dir")
    if restore_from is not None and checkpoint_dir is not None:
        raise InvalidRequestError(f"--checkpoint-dir is restored from as well; leave --restore-from {restore_from} out")
    targets = _static_targets(sync_to or [])
    waited: Directory | None = None
    if standby:
        logs.setup(ps="standby")
        index, waited = _stand_by(discovery, index, count or 1, standby_after)
        if index is None:
            raise typer.Exit(0)
    elif discovery is not None:
        index, count = _placed(discovery, index, count, listen, advertise)
    index, count = index or 0, count or 1
    logs.setup(ps=index)
    if checkpoint_dir is not None and not checkpoint_every:
        log.warning(
            "the only checkpoint in %s will be that of a clean end (SIGTERM): give --checkpoint-every SECONDS, such as "
            "60, or what is learned is lost with the process",
            checkpoint_dir,
        )
    tune_allocator()
    options = PsOptions(
        limits=server.limits,
        checkpoint_dir=checkpoint_dir,
        restore_from=restore_from,
        checkpoint_every_s=checkpoint_every,
        checkpoint_keep=checkpoint_keep,
        checkpoint_root=checkpoint_root,
        checkpoint_anywhere=checkpoint_anywhere,
        owned=owned,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        discovery=discovery,
        advertise=advertise,
        sync=SyncOptions(interval_s=sync_every, noted_bytes=parse_bytes(sync_memory)),
        sync_to=targets,
    )
    listed = [ServingDirectory(url, sync_name).replicas(index) for url in sync_to or [] if "://" in url]
    shard = LocalShard(
        index=index, count=count, memory_limit_bytes=sizes.memory_limit(memory_limit), threads=threads or None
    )
    status = ParameterServer(shard, options, replicas=listed).run(
        listen, bound=reached_by_others(listen, advertise, discovery)
    )
    if waited is not None:
        waited.close()
    raise typer.Exit(status)


def _static_targets(given: list[str]) -> dict[str, str]:
    """Address by name of those that are given so."""
    from trilith.discovery.addresses import check_address
    from trilith.errors import InvalidRequestError

    targets: dict[str, str] = {}
    for each in given:
        if "://" in each:
            continue
        name, equals, address = each.partition("=")
        if not equals or not name:
            raise InvalidRequestError(f"--sync-to {each!r} is neither name=host:port nor the URL of a directory")
        if name in targets:
            raise InvalidRequestError(f"--sync-to names {name!r} twice")
        targets[name] = check_address(address)
    return targets


def _stand_by(
    discovery: str | None, index: int | None, count: int, after_s: float
) -> tuple[int | None, Directory | None]:
    """Wait for a place: its index, None if SIGTERM came first, and the directory that holds the claim."""
    from trilith.discovery.urls import open_directory
    from trilith.discovery.zk_directory import ZooKeeperDirectory
    from trilith.discovery.zk_url import redact
    from trilith.errors import InvalidRequestError
    from trilith_services.local.supervisor import StopRequest
    from trilith_services.ps.process.standby import wait_for_place

    if index is not None or discovery is None:
        raise InvalidRequestError("--standby takes --discovery zk://… and --count, and finds --index by itself")
    directory = open_directory(discovery)
    if not isinstance(directory, ZooKeeperDirectory):
        raise InvalidRequestError(f"--standby needs a zk:// directory, not {redact(discovery)!r}")
    with StopRequest() as stop:
        place = wait_for_place(directory, count, after_s=after_s, cancelled=stop.wait)
    if place is None:
        directory.close()
    return place, directory


def _placed(
    discovery: str, index: int | None, count: int | None, listen: str, advertise: str
) -> tuple[int | None, int | None]:
    """Index and count, where none were given: of the list, or as a scheduler has put them into the environment."""
    from trilith.discovery import PS
    from trilith.discovery.mlp import MlpDirectory
    from trilith.discovery.tf_config import TfConfigDirectory
    from trilith.discovery.urls import open_directory
    from trilith.errors import InvalidRequestError

    scheme = discovery.partition("://")[0]
    if scheme == "static":
        return _listed(discovery, index, count, listen, advertise)
    if scheme not in ("tf-config", "mlp") or (index is not None and count is not None):
        return index, count
    directory = open_directory(discovery)
    if not isinstance(directory, TfConfigDirectory | MlpDirectory):
        return index, count
    if directory.server_type != PS:
        raise InvalidRequestError(f"{discovery} has this process as {directory.server_type or 'nobody'!r}, not as a PS")
    return directory.index if index is None else index, len(directory.query(PS)) if count is None else count


def _listed(discovery: str, index: int | None, count: int | None, listen: str, advertise: str) -> tuple[int, int]:
    """Index and count of a PS that the list has, by whatever name of its host."""
    from trilith.discovery import PS
    from trilith.discovery.addresses import advertised, split_address
    from trilith.discovery.urls import open_directory
    from trilith.errors import InvalidRequestError

    listed = open_directory(discovery).query(PS)
    if index is None:
        raise InvalidRequestError(f"--index must say which of the PS in {discovery} this one is, from 0")
    if count not in (None, len(listed)):
        raise InvalidRequestError(f"--count {count}, but {discovery} has {len(listed)}")
    if index not in listed:
        raise InvalidRequestError(f"--index {index}, but {discovery} has 0..{len(listed) - 1}")
    port = int(listen.rpartition(":")[2])
    at = advertised(listen, port, advertise) if advertise else listen
    if int(at.rpartition(":")[2]) != split_address(listed[index])[1]:
        raise InvalidRequestError(f"PS {index} is at {at}, but {discovery} has it at {listed[index]}")
    return index, len(listed)

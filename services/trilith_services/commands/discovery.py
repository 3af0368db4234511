"""`trilith discovery`: what a directory knows of a cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilith_services.commands import output
from trilith_services.commands.flags import Address, Json

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.record import ClusterRecord

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the `discovery` commands."""
    group = typer.Typer(help="Show or clear what a directory knows of a cluster.", no_args_is_help=True)
    group.command()(show)
    group.command()(forget)
    app.add_typer(group, name="discovery")


def show(
    address: Address,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the directory.", min=0.1)
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Show the members, the record that every PS and client must agree with, and who serves models."""
    from trilith.discovery import PS, WORKER
    from trilith.discovery.urls import open_directory

    directory = open_directory(address, timeout_s=timeout)
    try:
        members = {role: dict(directory.query(role)) for role in (PS, WORKER)}
        record = _record(directory)
        serving = _serving(directory)
    finally:
        directory.close()
    if as_json:
        shown: dict[str, Any] = {
            "members": members,
            "record": record and json.loads(record.to_json()),
            "serving": serving,
        }
        typer.echo(json.dumps(shown, indent=1))
        return
    console = output.console()
    grid = output.grid("role", ">index", "address")
    for role, listed in members.items():
        for index, where in listed.items():
            grid.add_row(role, str(index), where)
    console.print(grid if grid.rows else "no members")
    processes = output.grid("serving model", "task", ">replica", "address", "state")
    for model, found in serving.items():
        for each in found:
            processes.add_row(model, *(str(each[name]) for name in ("task", "replica", "address", "state")))
    if processes.rows:
        console.print(processes)
    if record is not None:
        console.print(f"recorded: {record.num_ps} PS, owner rule {record.owner_rule!r}", highlight=False)
        tables = output.grid("table", ">dim", "features")
        for name, config in sorted(record.tables.items()):
            dim = sum(segment.dim_size for segment in config.hash_table.entry_config.segments)
            features = sorted(feature for feature, table in record.features.items() if table == name)
            tables.add_row(name, str(dim), ", ".join(features))
        console.print(tables if tables.rows else "no tables are recorded")


def forget(
    address: Address,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the directory.", min=0.1)
    ] = 10.0,
    force: Annotated[bool, typer.Option("--force", help="Clear it although PS are registered.")] = False,
) -> None:
    """Clear a cluster's record, so that it may come back with another number of PS or other tables."""
    from trilith.discovery import PS
    from trilith.discovery.urls import open_directory
    from trilith.discovery.zk_directory import ZooKeeperDirectory
    from trilith.discovery.zk_url import redact
    from trilith.errors import ClusterMismatchError, InvalidRequestError

    directory = open_directory(address, timeout_s=timeout)
    try:
        if not isinstance(directory, ZooKeeperDirectory):
            raise InvalidRequestError(f"{redact(address)!r} keeps no record; only zk:// does")
        registered = dict(directory.query(PS))
        if registered and not force:
            raise ClusterMismatchError(f"PS {registered} are registered: stop them first, or add --force")
        directory.forget()
    finally:
        directory.close()
    typer.echo("forgotten")


def _record(directory: Directory) -> ClusterRecord | None:
    from trilith.discovery.record import RecordKeeper

    return directory.read_record() if isinstance(directory, RecordKeeper) else None


def _serving(directory: Directory) -> dict[str, list[dict[str, Any]]]:
    """The processes of every serving model below the directory's path."""
    from trilith.discovery.serving_nodes import ModelState, ServingNodes
    from trilith.discovery.zk_directory import ZooKeeperDirectory

    if not isinstance(directory, ZooKeeperDirectory):
        return {}
    states = {state.value: state.name.lower() for state in ModelState}
    return {
        model: [
            {
                "task": "/".join(filter(None, (each.path.location, each.path.task))),
                "replica": each.path.replica,
                "address": each.meta.reachable_at(),
                "state": states.get(each.meta.stat, f"state {each.meta.stat}"),
            }
            for each in ServingNodes(directory.zookeeper, model).read()
        ]
        for model in ServingNodes.models(directory.zookeeper)
    }

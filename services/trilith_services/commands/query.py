"""`trilith query`: look ids up in a running cluster."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.table import Table

from trilith_services.commands import output
from trilith_services.commands.flags import Address, Json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the `query` command."""
    # Signed ids look like options.
    app.command(context_settings={"ignore_unknown_options": True})(query)


def query(
    address: Address,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Name of the table.")],
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Ids: decimal (signed or unsigned) or 0x….")],
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the cluster.", min=0.1)] = 5.0,
    as_json: Json = False,
) -> None:
    """Look ids up: the PS that owns each, its weights, optimizer state by slot, and age.

    Exit status 1 if one of them has no row.
    """
    import numpy as np

    import trilith
    from trilith.entry_dumps import parse_id
    from trilith_services.console.members import Members

    wanted = [parse_id(text) for text in ids]
    with (
        closing(Members(address, timeout_s=timeout, wait_s=timeout)) as members,
        trilith.connect(address, timeout_s=timeout) as client,
    ):
        entries = client.table(table).lookup_entries(np.array(wanted, np.uint64))
        hosts = members.addresses()
    found = [_describe(each, entry, hosts) for each, entry in zip(wanted, entries, strict=True)]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(table, found)
    if not all(entry["found"] for entry in found):
        raise typer.Exit(1)


def _describe(wanted: int, entry: bytes, hosts: list[str]) -> dict[str, Any]:
    from trilith.entry_dumps import describe_entry

    owner = wanted % len(hosts)
    described: dict[str, Any] = {"id": wanted, "owner": owner, "address": hosts[owner], "found": bool(entry)}
    return described | describe_entry(entry) if entry else described


def _show(table: str, found: list[dict[str, Any]]) -> None:
    console = output.console()
    for entry in found:
        console.print(f"[bold]{table}[/] id [bold]{entry['id']}[/] on PS {entry['owner']} ({entry['address']})")
        if not entry["found"]:
            console.print("  [yellow]no row[/]: never updated, below its occurrence threshold, or expired")
            continue
        grid = Table.grid("", "", padding=(0, 2, 0, 0))
        grid.columns[0].no_wrap = True  # numbers fold, names do not
        grid.add_row("  age", output.moment(entry["last_update_unix_s"]) if entry["last_update_unix_s"] else "no time")
        grid.add_row("  weights", _numbers(entry["weights"]))
        for number, optimizer in enumerate(entry["optimizers"]):
            segment = f"segment {number} " if len(entry["optimizers"]) > 1 else ""
            if not optimizer["slots"]:
                grid.add_row(f"  {segment}{optimizer['optimizer']}", "no state")
            for slot, value in optimizer["slots"].items():
                grid.add_row(f"  {segment}{optimizer['optimizer']} {slot}", _numbers(value))
        console.print(grid)


def _numbers(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:.6g}"
    shown = " ".join(f"{number:.6g}" for number in value[:16])
    return f"{shown} … ({len(value)} in all)" if len(value) > 16 else shown

"""`trilith query`: look ids up in a running cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilith_services.commands import output
from trilith_services.commands.shards import Address, Members

if TYPE_CHECKING:
    from trilith_proto import hash_table_pb2

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the `query` command."""
    # Signed ids look like options.
    app.command(context_settings={"ignore_unknown_options": True})(query)


def query(
    address: Address,
    table: Annotated[str, typer.Argument(help="Table name.")],
    ids: Annotated[list[str], typer.Argument(help="Ids: decimal (signed or unsigned) or 0x….", metavar="ID...")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the cluster.", min=0.1)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Look ids up: the PS that owns each, its weights, optimizer state by slot, and age.

    Exit status 1 if one of them has no row.
    """
    import numpy as np

    import trilith

    wanted = [_parse_id(text) for text in ids]
    with Members(address, timeout_s=timeout) as members, trilith.connect(address, timeout_s=timeout) as client:
        entries = client.table(table).lookup_entries(np.array(wanted, np.uint64))
        hosts = members.addresses()
    found = [_describe(each, entry, hosts) for each, entry in zip(wanted, entries, strict=True)]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(table, found)
    if not all(entry["found"] for entry in found):
        raise typer.Exit(1)


def _parse_id(text: str) -> int:
    from trilith.errors import InvalidRequestError

    try:
        value = int(text, 0)
    except ValueError:
        raise InvalidRequestError(f"{text!r} is no id; ids are numbers such as 42, -1 or 0x2a") from None
    if not -(2**63) <= value < 2**64:
        raise InvalidRequestError(f"{text} does not fit in 64 bits")
    return value % 2**64


def _describe(wanted: int, entry: bytes, hosts: list[str]) -> dict[str, Any]:
    from trilith_proto import hash_table_pb2

    owner = wanted % len(hosts)
    described: dict[str, Any] = {"id": wanted, "owner": owner, "address": hosts[owner], "found": bool(entry)}
    if entry:
        dump = hash_table_pb2.EntryDump.FromString(entry)
        described["weights"] = list(dump.num)
        described["optimizers"] = [_describe_optimizer(single) for single in dump.opt.dump]
        described["last_update_unix_s"] = dump.last_update_ts_sec
    return described


def _describe_optimizer(single: hash_table_pb2.SingleOptimizerDump) -> dict[str, Any]:
    kind = single.WhichOneof("type") or ""
    dump = getattr(single, kind) if kind else None
    slots: dict[str, Any] = {}
    if dump is not None:
        for field in dump.DESCRIPTOR.fields:
            value = getattr(dump, field.name)
            slots[field.name] = value if isinstance(value, int | float) else list(value)
    return {"optimizer": kind, "slots": slots}


def _show(table: str, found: list[dict[str, Any]]) -> None:
    console = output.console()
    for entry in found:
        console.print(f"[bold]{table}[/] id [bold]{entry['id']}[/] on PS {entry['owner']} ({entry['address']})")
        if not entry["found"]:
            console.print("  [yellow]no row[/]: never updated, below its occurrence threshold, or expired")
            continue
        grid = output.grid("", "", "")
        grid.show_header = False
        grid.add_row("  age", output.moment(entry["last_update_unix_s"]) if entry["last_update_unix_s"] else "no time")
        grid.add_row("  weights", _numbers(entry["weights"]))
        for number, optimizer in enumerate(entry["optimizers"]):
            segment = f"segment {number} " if len(entry["optimizers"]) > 1 else ""
            if not optimizer["slots"]:
                grid.add_row(f"  {segment}{optimizer['optimizer']}", "no state")
            for slot, value in optimizer["slots"].items():
                grid.add_row(f"  {segment}{optimizer['optimizer']} {slot}", _numbers(value))
        console.print(grid, soft_wrap=True)


def _numbers(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:.6g}"
    shown = " ".join(f"{number:.6g}" for number in value[:16])
    return f"{shown} … ({len(value)} in all)" if len(value) > 16 else shown

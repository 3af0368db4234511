"""`trilith checkpoint`: list, inspect, verify and export checkpoints, without a running cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilith_services.commands import output
from trilith_services.commands.flags import Json

if TYPE_CHECKING:
    from trilith.checkpoint import CheckpointInfo, Manifest
    from trilith.folder import Folder

__all__ = ["register"]

Where = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a directory of them: its newest complete one.")
]


def register(app: typer.Typer) -> None:
    """Add the `checkpoint` commands."""
    group = typer.Typer(no_args_is_help=True, help="Look at checkpoints: list, inspect, verify, export.")
    group.command("list")(list_)
    group.command("inspect")(inspect)
    group.command("verify")(verify)
    group.command("export")(export)
    app.add_typer(group, name="checkpoint")


def list_(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Directory or URL that `trilith ps --checkpoint-dir` was given.")
    ],
    as_json: Json = False,
) -> None:
    """List the checkpoints of a directory, oldest first, incomplete ones too; or the checkpoint that it is itself."""
    from trilith import checkpoint
    from trilith.errors import CheckpointError
    from trilith.estimator.job_files import event_time_of

    found = []
    for info in checkpoint.list_checkpoints(directory) or _itself(directory):
        entry: dict[str, Any] = {"path": info.path, "tick_unix_s": info.number / 1000, "state": "incomplete"}
        if info.complete:
            try:
                summary = _summary(checkpoint.read_manifest(info.path))
                entry |= {"state": "complete", **summary, "event_time_unix_s": event_time_of(info.path)}
            except (CheckpointError, ValueError) as error:
                entry |= {"state": "damaged", "error": str(error)}
        found.append(entry)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if not found:
        raise CheckpointError(f"no checkpoints in {directory!r}: they are directories called ckpt-<20 digits>")
    timed = any(entry.get("event_time_unix_s") is not None for entry in found)
    table = output.grid(
        "checkpoint", "tick", "state", ">step", ">PS", ">rows", ">size", *(["samples until"] if timed else [])
    )
    for entry in found:
        until = entry.get("event_time_unix_s")
        colour = {"complete": "green", "incomplete": "yellow"}.get(entry["state"], "red")
        table.add_row(
            entry["path"].rsplit("/", 1)[-1],
            output.moment(entry["tick_unix_s"]),
            f"[{colour}]{entry['state']}[/]",
            *(
                (
                    output.count(entry["global_step"]),
                    str(entry["shards"]),
                    output.count(sum(entry["rows"].values())),
                    output.size(entry["bytes"]),
                )
                if entry["state"] == "complete"
                else ("-", "-", "-", "-")
            ),
            *([output.moment(until) if until is not None else "-"] if timed else []),
        )
    output.console().print(table)


def inspect(path: Where, as_json: Json = False) -> None:
    """Show what a checkpoint holds: tables with their optimizers and rows, dense variables, files by PS."""
    from trilith import checkpoint
    from trilith.folder import Folder

    path = _checkpoint(path)
    manifest = checkpoint.read_manifest(path)
    folder = Folder(path)
    tables, variables = _tables(folder, manifest), _variables(folder, manifest)
    if as_json:
        parts = [{"incarnation": part.incarnation, "files": len(part.files)} for part in manifest.parts]
        body = {"path": path, **_summary(manifest), "tables": tables, "variables": variables, "parts": parts}
        typer.echo(json.dumps(body, indent=1))
        return
    console = output.console()
    console.print(f"[bold]{path}[/]")
    console.print(
        f"step {output.count(manifest.global_step)}, {manifest.shard_count} PS, {output.size(manifest.bytes)}, "
        f"written {output.moment(manifest.created_unix_s)}\n"
    )
    grid = output.grid("table", ">dim", "optimizer", ">state floats", ">rows", ">size", "rows by PS")
    for table in tables:
        grid.add_row(
            table["table"],
            str(table["dim"]),
            " ".join(table["optimizers"]),
            str(table["state_floats"]),
            output.count(table["rows"]),
            output.size(table["bytes"]),
            " ".join(output.count(rows) for rows in table["rows_by_ps"]),
        )
    console.print(grid)
    if variables:
        grid = output.grid("variable", ">floats", ">partitions", "optimizer")
        for variable in variables:
            grid.add_row(
                variable["name"],
                output.count(variable["floats"]),
                str(variable["partitions"]),
                variable["optimizer"],
            )
        console.print()
        console.print(grid)


def verify(path: Where) -> None:
    """Read every file of a checkpoint and check sizes, checksums, formats, row counts and owners.

    Exit status 1 if anything is damaged.
    """
    from trilith import checkpoint
    from trilith_services.ps.checkpoint import snapshot

    path = _checkpoint(path)
    manifest = checkpoint.read_manifest(path)
    files = sum(len(part.files) for part in manifest.parts)
    damaged = 0
    with output.progress(output.console(stderr=True)) as progress:
        task = progress.add_task("verifying", total=files)
        for _, problem in snapshot.verify(path):
            progress.advance(task)
            if problem:
                damaged += 1
                progress.console.print(f"[red]damaged[/] {problem}", soft_wrap=True)
    if damaged:
        typer.echo(f"{path}: {damaged} of {files} files are damaged", err=True)
        raise typer.Exit(1)
    rows = sum(manifest.rows().values())
    typer.echo(f"{path}: {files} files, {output.size(manifest.bytes)}, {output.count(rows)} rows: all good")


def export(
    path: Where,
    target: Annotated[str, typer.Argument(metavar="DIR", help="Directory to write TABLE/part-*.parquet into.")],
    table: Annotated[list[str] | None, typer.Option(metavar="TABLE", help="Only this table; may be repeated.")] = None,
) -> None:
    """Export a checkpoint's tables to Parquet, one file per table and PS.

    Columns: id, weights, one per optimizer slot (with the segment's number in front if there are several), last_update;
    dense variables go to variables.parquet. Files are checked before they are exported.
    """
    from trilith import checkpoint
    from trilith.errors import UnknownTableError
    from trilith_services.ps.checkpoint import parquet

    path = _checkpoint(path)
    manifest = checkpoint.read_manifest(path)
    known = manifest.rows()
    if unknown := sorted(set(table or ()) - set(known)):
        raise UnknownTableError(f"no table {unknown[0]!r} in {path}; it has {sorted(known)}")
    chosen = sorted(table or known)
    total = sum(known[name] for name in chosen)
    with output.progress(output.console(stderr=True)) as progress:
        task = progress.add_task("exporting", total=total)
        for rows in parquet.export(path, manifest, target, chosen, variables=table is None):
            progress.advance(task, rows)
    typer.echo(f"{output.count(total)} rows of {len(chosen)} table(s) exported to {target}")


def _checkpoint(path: str) -> str:
    """The checkpoint at `path`, or the newest complete one below it."""
    from trilith import checkpoint
    from trilith.folder import Folder

    if Folder(path).exists(checkpoint.MANIFEST):
        return Folder(path).url
    newest = checkpoint.newest_complete(path)
    return path if newest is None else newest.path


def _itself(path: str) -> list[CheckpointInfo]:
    """The directory as a checkpoint, such as `Client.save` makes under any name; nothing if it is none."""
    from trilith import checkpoint
    from trilith.errors import CheckpointError
    from trilith.folder import Folder

    folder = Folder(path)
    if not folder.exists(checkpoint.MANIFEST):
        return []
    try:
        made_ms = int(checkpoint.read_manifest(path).created_unix_s * 1000)
    except CheckpointError:
        made_ms = 0
    return [checkpoint.CheckpointInfo(path=folder.url, number=made_ms, complete=True, order=made_ms)]


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "global_step": manifest.global_step,
        "shards": manifest.shard_count,
        "created_unix_s": manifest.created_unix_s,
        "bytes": manifest.bytes,
        "rows": manifest.rows(),
    }


def _tables(folder: Folder, manifest: Manifest) -> list[dict[str, Any]]:
    from trilith_services.ps.checkpoint import row_files

    found = []
    for name, rows in manifest.rows().items():
        by_ps = [[file for file in part.files if file.kind == "rows" and file.table == name] for part in manifest.parts]
        files = [file for held in by_ps for file in held]
        with row_files.open_rows(folder, files[0].name) as opened:
            found.append(
                {
                    "table": name,
                    "dim": opened.dim,
                    "state_floats": opened.state_floats,
                    "optimizers": [segment["optimizer"] for segment in opened.layout],
                    "rows": rows,
                    "bytes": sum(file.bytes for file in files),
                    "rows_by_ps": [sum(file.rows for file in held) for held in by_ps],
                }
            )
    return found


def _variables(folder: Folder, manifest: Manifest) -> list[dict[str, Any]]:
    from trilith_services.ps.checkpoint import variable_files

    found: dict[str, dict[str, Any]] = {}
    for state in variable_files.read_parts(folder, manifest.parts):
        entry = found.setdefault(
            state.spec.name,
            {
                "name": state.spec.name,
                "floats": 0,
                "partitions": 0,
                "optimizer": state.spec.optimizer.WhichOneof("type") or "-",
            },
        )
        entry["floats"] += state.values.size
        entry["partitions"] += 1
    return [found[name] for name in sorted(found)]

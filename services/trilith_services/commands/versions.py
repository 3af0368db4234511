"""`trilith serving versions`, `pin`, `withdraw` and `status`: which versions of a model there are, and which answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilith_services.commands import output
from trilith_services.commands.flags import Json, ServingName

if TYPE_CHECKING:
    from trilith.serving.published import Published

__all__ = ["pin", "status", "versions", "withdraw"]

Exports = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory or URL of exports, as `trilith serving entry --export` has it.")
]


def versions(exports: Exports, as_json: Json = False) -> None:
    """List the versions of a directory of exports: when and of which step they are, and what is said of them."""
    from trilith.errors import CheckpointError
    from trilith.folder import Folder
    from trilith.serving.exports import entry_base, list_versions, read_export
    from trilith.serving.published import read_published

    root, published = entry_base(exports), read_published(exports)
    found = []
    for version in reversed(list_versions(root)):
        row: dict[str, Any] = {"version": version, "state": _state(version, published)}
        try:
            manifest = read_export(Folder(root).child(str(version)).url)
        except CheckpointError as error:
            found.append(row | {"error": str(error)})
            continue
        row |= {"step": manifest.step, "mode": manifest.mode, "created_unix_s": manifest.created_unix_s}
        found.append(row | {"checkpoint": manifest.checkpoint})
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = output.grid(">Version", "State", ">Step", "Mode", "Exported")
    for row in found:
        if "error" in row:
            table.add_row(str(row["version"]), "damaged", "", "", "")
        else:
            exported = output.moment(row["created_unix_s"])
            table.add_row(str(row["version"]), row["state"], output.count(row["step"]), row["mode"], exported)
    output.console().print(table if found else f"no version in {exports}")
    _tell(row["error"] for row in found if "error" in row)


def _tell(problems: Iterable[str]) -> None:
    """Below a table, what has no place in it."""
    for problem in dict.fromkeys(problems):
        typer.echo(problem)


def _state(version: int, published: Published) -> str:
    if version in published.withdrawn:
        return "withdrawn"
    return "pinned" if version == published.pinned else ""


def pin(
    exports: Exports,
    version: Annotated[str, typer.Argument(metavar="N|latest", help="Number of a version; latest: follow the newest.")],
) -> None:
    """Have every entry that follows a directory answer with one version, such as the one before a bad one.

    It takes effect with the next look of each entry (--poll), without a failed request, and holds for those that start
    later. A pinned version is not pruned. Entries with --version N keep to theirs.
    """
    from trilith.errors import InvalidRequestError
    from trilith.serving import published

    if version != "latest" and not (version.isascii() and version.isdecimal() and int(version) > 0):
        raise InvalidRequestError(f"version {version!r} is neither a number nor latest")
    published.pin(exports, 0 if version == "latest" else int(version))
    typer.echo("pin: none, the newest version answers" if version == "latest" else f"pin: version {version} answers")


def withdraw(
    exports: Exports,
    version: Annotated[int, typer.Argument(metavar="N", help="Number of a version.", min=1)],
    undo: Annotated[bool, typer.Option("--undo", help="Let it be served again.")] = False,
) -> None:
    """Have no entry serve a version any more; the newest of the others takes its place without a failed request.

    Its files stay, to be looked at. An entry that has no other version goes on with it, and says so.
    """
    from trilith.serving import published

    published.withdraw(exports, version, undo=undo)
    typer.echo(f"withdraw: version {version} {'may be served again' if undo else 'is served no more'}")


def status(
    address: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT|URL", help="One entry, several with commas between, or the directory that lists them."
        ),
    ],
    name: ServingName = "model",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for answers.", min=0.1)] = 5.0,
    as_json: Json = False,
) -> None:
    """Show the versions that entries have loaded, which of them answers, and what is wrong.

    Exit status 1 if an entry does not answer.
    """
    from google.protobuf.json_format import MessageToDict

    from trilith.errors import TrilithError, UnavailableError
    from trilith.serving.prediction import Predictor

    found: list[dict[str, Any]] = []
    with output.console(stderr=True).status("asking"):
        addresses = _entries(address, name, timeout)
        for each in addresses:
            try:
                with Predictor(each, timeout_s=timeout) as predictor:
                    answer = predictor.status()
            except TrilithError as error:
                found.append({"address": each, "error": str(error)})
                continue
            found.append({"address": each, **MessageToDict(answer, preserving_proto_field_name=True)})
    if not addresses:
        raise UnavailableError(f"{address} lists no entry of serving model {name!r}")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)
    if any("error" in each for each in found):
        raise typer.Exit(1)


def _entries(address: str, name: str, timeout_s: float) -> list[str]:
    from contextlib import closing

    from trilith.discovery.addresses import check_address

    if "://" not in address:
        return [check_address(each.strip()) for each in address.split(",")]
    from trilith.discovery.serving import ServingDirectory

    found: dict[str, str] = {}
    with closing(ServingDirectory(address, name, timeout_s=timeout_s)) as directory:
        directory.entries().watch(found.update, loading=True)()
    return sorted(found.values())


def _show(found: list[dict[str, Any]]) -> None:
    table = output.grid("Entry", "Model", ">Version", "State", ">Step", ">Records", "Loaded")
    for entry in found:
        if "error" in entry:
            table.add_row(entry["address"], "", "", "no answer", "", "", "")
            continue
        first = [entry["address"], entry.get("model", "none")]
        for each in entry.get("versions", []) or [{}]:
            state = "in use" if each.get("in_use") else "not loaded" if "error" in each else "loaded" if each else ""
            loaded = output.moment(each["loaded_time"]) if "loaded_time" in each else ""
            numbers = [output.count(int(each[key])) if key in each else "" for key in ("step", "records")]
            table.add_row(*first, str(each.get("version", "")), state, *numbers, loaded)
            first = ["", ""]
    output.console().print(table)
    for entry in found:
        problems = [entry.get("error", ""), entry.get("load_error", "")]
        problems += [each.get("error", "") for each in entry.get("versions", [])]
        _tell(f"{entry['address']}: {problem}" for problem in problems if problem)

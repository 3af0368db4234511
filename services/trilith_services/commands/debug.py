"""`trilith debug`: asks the debugging routes of a console."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from enum import StrEnum
from typing import Annotated, Any

import typer

__all__ = ["register"]

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A console is asked as PS are: not through $http_proxy, from where this machine's own addresses are others."""


class Kind(StrEnum):
    """What is asked for."""

    debugging_variables = "debugging_variables"
    debugging_features = "debugging_features"


def register(app: typer.Typer) -> None:
    """Add the `debug` command."""
    app.command()(debug)


def debug(
    kind: Annotated[Kind, typer.Option("--type", help="What to ask for.")],
    host: Annotated[str, typer.Option(metavar="HOST", help="Where the console is.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Its port.", min=1, max=65535)] = 8080,
    variable_names: Annotated[
        str, typer.Option("--variable-names", "--variable_names", metavar="NAME,…", help="Dense variables.")
    ] = "",
    feature_ids: Annotated[
        str,
        typer.Option("--feature-ids", "--feature_ids", metavar="ID,…", help="Ids; --feature-ids=-1 for negative ones."),
    ] = "",
    feature_name: Annotated[
        str, typer.Option("--feature-name", "--feature_name", metavar="NAME", help="The feature that all ids are of.")
    ] = "",
    feature_names: Annotated[
        str, typer.Option("--feature-names", "--feature_names", metavar="NAME,…", help="The feature of each id.")
    ] = "",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the answer.", min=0.1)] = 30.0,
) -> None:
    """Show values of dense variables, or rows of features' ids, as the reference system's debugging client does.

    What the cluster does not have is shown as "Not exist".
    """
    from trilith.discovery.addresses import join_address

    server = f"http://{join_address(host, port)}"
    if kind is Kind.debugging_variables:
        names = _split(variable_names)
        if not names:
            typer.echo("no variable names are given", err=True)
            return
        values = _ask(f"{server}/debugging/variables", {"variable_names": names}, timeout)
        for name in names:
            typer.echo(f"{name}: {values.get(name, 'Not exist')}")
        return
    names, ids = _pairs(_split(feature_ids), feature_name, _split(feature_names))
    if not ids:
        typer.echo("no feature ids are given", err=True)
        return
    rows = _ask(f"{server}/debugging/features", {"feature_names": names, "feature_ids": ids}, timeout)
    for name, each in zip(names, ids, strict=True):
        found = rows.get(name, {}).get(str(int(each)))
        typer.echo(f"{name} {each}:\n{found.rstrip()}" if found is not None else f"{name} {each}: Not exist")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pairs(ids: list[str], feature_name: str, feature_names: list[str]) -> tuple[list[str], list[str]]:
    from trilith.entry_dumps import parse_id
    from trilith.errors import InvalidRequestError

    if feature_name and feature_names:
        raise InvalidRequestError("--feature-name and --feature-names exclude each other")
    names = [feature_name] * len(ids) if feature_name else feature_names
    if len(names) != len(ids):
        raise InvalidRequestError(f"{len(names)} feature names for {len(ids)} ids: it takes one name for each id")
    for each in ids:
        parse_id(each)
    return names, [str(int(each, 0)) for each in ids]


def _ask(url: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    """What a route answers, read out of its message."""
    from trilith.errors import InternalError, UnavailableError

    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=timeout) as response:
            answer = json.load(response)
            failed = answer["status"] != "success"
            told: dict[str, Any] = {} if failed else json.loads(answer["msg"])
    except urllib.error.HTTPError as error:
        with error:
            raise UnavailableError(f"{url} does not answer: {_refusal(error)}") from None
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnavailableError(f"no console answers at {url}: {reason}; `trilith console` starts one") from None
    except (ValueError, KeyError, TypeError):
        raise UnavailableError(f"what answers at {url} is no console") from None
    if failed:
        raise InternalError(f"the console could not answer: {answer['msg']}")
    return told


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {error.code}"

"""`trilith console`: a cluster in the browser, and over HTTP for scripts."""

from __future__ import annotations

from typing import Annotated

import typer

from trilith.discovery.urls import CLUSTER_FORMS
from trilith.runtime.extras import need
from trilith_services.commands.flags import (
    Listen,
    LogFlags,
    ServingName,
    expanded,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the `console` command."""
    app.command()(expanded(console))


def console(
    *,
    cluster: Annotated[
        str, typer.Option(metavar="URL", help=f"{CLUSTER_FORMS}; it need not be there yet. Left out: see --model-dir.")
    ] = "",
    model_dir: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Directory or URL of a model in training; its debugging_info.pb tells where the PS were when training "
            "began, and the features' tables.",
        ),
    ] = "",
    listen: Listen = "127.0.0.1:8080",
    serving: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Directory that lists serving processes, such as zk://host:2181/serving; left out: the replicas that "
            "PS push to.",
        ),
    ] = None,
    name: ServingName = "model",
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between looks at the cluster.", min=0.1)
    ] = 2.0,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a PS gets to answer a question.", min=0.1)
    ] = 5.0,
    allow_writes: Annotated[
        bool, typer.Option("--allow-writes", help="Let whoever reaches the console set and delete rows.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Name by which browsers ask for it, besides localhost and the address they reach it by. May be "
            "repeated.",
        ),
    ] = None,
    logs: LogFlags,
) -> None:
    """Show a cluster over HTTP: a page, a JSON API (described at /docs), and the debugging routes.

    There is no login: listen on an address that only those reach who may see every row. Needs the extra `console`.
    """
    from trilith.errors import InvalidRequestError
    from trilith.serving.debugging import read_debugging_info

    need("fastapi", "uvicorn", extra="console")
    from trilith_services.console.app import make_server
    from trilith_services.console.watcher import Watcher, WatchOptions

    logs.setup(role="console")
    if not cluster and not model_dir:
        raise InvalidRequestError("which cluster? Give --cluster URL, or --model-dir DIR of a model in training")
    info = read_debugging_info(model_dir) if model_dir else None
    options = WatchOptions(
        interval_s=interval,
        timeout_s=timeout,
        serving=serving,
        model=name,
        features=info.features if info is not None else {},
    )
    where = cluster or (info.cluster if info is not None else "")
    hosts = [*(allowed_host or []), listen.rpartition(":")[0]]
    make_server(Watcher(where, options), listen, writable=allow_writes, hosts=hosts).serve_until_told()

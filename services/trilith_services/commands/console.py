"""`trilith console`: a cluster in the browser, and over HTTP for scripts."""

from __future__ import annotations

from typing import Annotated

import typer

from trilith_services.commands.ps import LogFormat

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the `console` command."""
    app.command()(console)


def console(
    cluster: Annotated[
        str,
        typer.Option(help="static://host:port,host:port,… or zk://host:2181,…/path; it need not be there yet."),
    ],
    listen: Annotated[
        str,
        typer.Option(help="host:port to serve on; port 0 takes a free one. Whoever reaches it may read everything."),
    ] = "127.0.0.1:8080",
    serving: Annotated[
        str | None,
        typer.Option(
            help="Directory that lists serving processes, such as zk://host:2181/serving; left out: the replicas that "
            "PS push to."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Serving model under which the directory lists them.")] = "model",
    interval: Annotated[float, typer.Option(help="Seconds between looks at the cluster.", min=0.1)] = 2.0,
    timeout: Annotated[float, typer.Option(help="Seconds a PS gets to answer a question.", min=0.1)] = 5.0,
    allow_writes: Annotated[
        bool, typer.Option("--allow-writes", help="Let whoever reaches the console set and delete rows.")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="text (key=value) or json.")] = LogFormat.text,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Show a cluster over HTTP: a page, a JSON API (described at /docs), and the debugging routes.

    There is no login: listen on an address that only those reach who may see every row. Needs the extra `console`.
    """
    from trilith.errors import InvalidRequestError
    from trilith_services.logs import setup_logging

    try:
        from trilith_services.console.server import ConsoleServer, bind
        from trilith_services.console.watcher import Watcher, WatchOptions
    except ModuleNotFoundError as error:
        raise InvalidRequestError(f"{error.name} is not installed; pip install 'trilith[console]' brings it") from None

    setup_logging(log_format.value, level=log_level, role={"role": "console"})
    options = WatchOptions(interval_s=interval, timeout_s=timeout, serving=serving, model=name)
    ConsoleServer(Watcher(cluster, options), bind(listen), writable=allow_writes).serve_until_told()

"""The `trilith` command: every subcommand is a module of `trilith_services.commands`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from trilith.config import prefer_fast_grpc
from trilith.errors import TrilithError

__all__ = ["app", "main"]

COMMANDS = (
    "ps",
    "serving",
    "worker",
    "up",
    "demo",
    "query",
    "top",
    "console",
    "debug",
    "discovery",
    "checkpoint",
    "export",
    "data",
    "bench",
)

app = typer.Typer(
    name="trilith",
    help="A parameter-server cluster for training and serving recommender models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs flow
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _register() -> None:
    for name in COMMANDS:
        importlib.import_module(f"trilith_services.commands.{name}").register(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a TrilithError is one line on stderr and exit status 2."""
    try:
        app(args=list(argv) if argv is not None else None)
    except TrilithError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


prefer_fast_grpc()  # commands import it when they run
_register()

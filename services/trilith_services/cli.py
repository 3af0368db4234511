"""The `trilith` command: every subcommand is a module of `trilith_services.commands`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# gRPC's older I/O loop: small calls 1.2 to 1.8 times faster, large ones up to 1.25 (measured with grpcio 1.85). gRPC
# reads the variable when it is imported, and ignores names it does not know.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import typer

from trilith.errors import TrilithError

__all__ = ["app", "main"]

COMMANDS = ("ps", "worker", "up", "demo", "query", "top", "checkpoint", "bench")

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
        module = f"trilith_services.commands.{name}"
        try:
            command = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            continue
        command.register(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a TrilithError is one line on stderr and exit status 2."""
    try:
        app(args=list(argv) if argv is not None else None)
    except TrilithError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


_register()

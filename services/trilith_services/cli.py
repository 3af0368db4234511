"""The `trilith` command: every subcommand is a module of `trilith_services.commands`."""

from __future__ import annotations

import faulthandler
import importlib
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import trilith
from trilith.config import prepare_grpc
from trilith.errors import TrilithError
from trilith.runtime.extras import missing_extra

__all__ = ["app", "main"]

COMMANDS = (
    "ps",
    "serving",
    "new",
    "worker",
    "evaluate",
    "predict",
    "up",
    "demo",
    "query",
    "top",
    "console",
    "debug",
    "discovery",
    "checkpoint",
    "control",
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


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trilith {trilith.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and end.")
    ] = False,
) -> None:
    del version


# What typer raises for a wrong command line; of its classes only this one's child has a public name in every version.
_UsageError: type[BaseException] = typer.BadParameter.__mro__[1]


def _register() -> None:
    for name in COMMANDS:
        importlib.import_module(f"trilith_services.commands.{name}").register(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; what is wrong with it, its flags or a file is one line on stderr and status 2.

    SIGUSR1 has the process say on stderr where each of its threads is, and go on.
    """
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    try:
        status = app(args=list(argv) if argv is not None else None, prog_name="trilith", standalone_mode=False)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is error:
            raise
        typer.echo(f"error: {missing}", err=True)
        status = 2
    except TrilithError as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        typer.echo(f"error: {error} ({notes})" if notes else f"error: {error}", err=True)
        status = 2
    except _UsageError as error:
        _explain(error)
        status = 2
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}", err=True)  # a directory that cannot be made, say
        status = 2
    sys.exit(status)


def _explain(error: Any) -> None:
    """Say what was wrong, with the value, and where to read more; after a page of help there is nothing to say."""
    from pydantic import ValidationError

    from trilith_services.commands.jobs import hint

    text = error.format_message().removesuffix(".").replace("Value error, ", "")
    if not text:
        return
    text = re.sub(r"^Invalid value for '([^']*)': (Input)?", lambda match: f"{match[1]}: {'it' * bool(match[2])}", text)
    if isinstance(error.__cause__, ValidationError):
        given = error.__cause__.errors()[0]["input"]
        text += f", not {given!r}" if repr(given) not in text else ""
    typer.echo(f"error: {text}{hint(error)}; see {error.ctx.command_path if error.ctx else 'trilith'} --help", err=True)


prepare_grpc()  # commands import it when they run
_register()

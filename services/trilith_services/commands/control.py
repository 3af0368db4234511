"""`trilith control`: pause, resume, save and stop a run that trains."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from trilith_services.commands import output
from trilith_services.commands.flags import Json

__all__ = ["register"]


class Action(StrEnum):
    """What may be asked of a run."""

    status = "status"
    pause = "pause"
    resume = "resume"
    save = "save"
    stop = "stop"


def register(app: typer.Typer) -> None:
    """Add the `control` command."""
    app.command()(control)


def control(
    action: Annotated[Action, typer.Argument(help="What to ask of the run.", show_choices=True)],
    model_dir: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="The run's model_dir: a directory or URL.")],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long the answer, or the save, may take.", min=0.1)
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Ask a run that trains for its status, to wait after its step and go on, for a checkpoint now, or to end.

    The run's chief looks into the folder control of its model_dir, also while it evaluates or waits for data; workers
    do what is asked after their step. Exit status 1 if it is not done, such as a second pause.
    """
    from trilith.estimator.control import ask

    answer = ask(model_dir, action.value, timeout_s=timeout)
    if as_json:
        typer.echo(json.dumps(asdict(answer)))
    else:
        typer.echo(f"control: {answer.said}; {_line(answer.status)}")
    if not answer.done:
        raise typer.Exit(1)


def _line(status: Any) -> str:
    """The figures of a run, in a line."""
    waiting = f", waiting: ranks {', '.join(map(str, status['waiting']))}" if status["waiting"] else ""
    workers = output.plural(status["workers"], "worker")
    return (
        f"{status['name']} at step {output.count(status['step'])}, epoch {status['epoch']} of {status['epochs']}, "
        f"{workers}{waiting}; last saved at step {output.count(status['saved_step'])}"
    )

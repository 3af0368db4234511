"""`trilith evaluate`: the metrics of a job."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from trilith_services.commands.flags import Json, LogFlags, expanded
from trilith_services.commands.jobs import BatchSize, DataFlags, Job, RunFlags, check_trained

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(evaluate))


def evaluate(
    *,
    job: Job,
    run: RunFlags,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A path or glob, kafka://TOPIC, or - for standard input; left out: what the job evaluates on.",
        ),
    ] = "",
    batch_size: BatchSize = 512,
    form: DataFlags,
    as_json: Json = False,
    logs: LogFlags,
) -> None:
    """Show metrics and loss of a job, on its cluster or at its newest checkpoint; nothing is changed.

    `--set resume=CHECKPOINT` evaluates another one.
    """
    found = run.job(job)
    identity = found.run.identity()
    logs.setup(worker=identity.rank)
    check_trained(found)
    with found:
        metrics = found.evaluate(form.read(data, batch_size) if data else None)
    if not identity.chief:
        return
    if as_json:
        typer.echo(json.dumps(metrics))
    for name, value in metrics.items() if not as_json else ():
        typer.echo(f"{name}={value:.6g}")

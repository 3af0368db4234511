"""`trilith worker`: one training process."""

from __future__ import annotations

from typing import Annotated

import typer

from trilith_services.commands.flags import LogFlags, expanded
from trilith_services.commands.jobs import BatchSize, DataFlags, Job, RunFlags

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(worker))


def worker(
    *,
    job: Job,
    run: RunFlags,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="A path or glob, kafka://TOPIC, or - for standard input; left out: what the job trains on.",
        ),
    ] = "",
    batch_size: BatchSize = 512,
    form: DataFlags,
    logs: LogFlags,
) -> None:
    """Train a job until it is done or SIGTERM comes, alone or as one of its workers.

    All that is to be said of its run is said by --set, --config and the environment: where the rows are (--set
    cluster=URL), which worker this is, how long it trains. SIGTERM ends it after its step and a save, with status 0.
    """
    found = run.job(job)
    identity = found.run.identity()
    logs.setup(worker=identity.rank)
    with found:
        metrics = found.train(form.read(data, batch_size) if data else None)
    if metrics and identity.chief:
        typer.echo("worker: " + " ".join(f"{each}={value:.6g}" for each, value in metrics.items()))

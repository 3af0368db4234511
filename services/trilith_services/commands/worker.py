"""`trilith worker`: one training process."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trilith.runtime.extras import need
from trilith_services.commands.flags import LogFlags, MetricsHost, MetricsPort, Model, ModelFlag, expanded
from trilith_services.commands.jobs import DataFlags, Job, RunFlags, given, refuse_alone, refuse_beside
from trilith_services.worker.config import WorkerConfig

if TYPE_CHECKING:
    from trilith.data import Dataset
    from trilith_services.demo.models import ModelSettings
    from trilith_services.worker.run import Follower

__all__ = ["register"]

log = logging.getLogger(__name__)

_JOB_ALONE = ("sets", "config", "file_format", "kind")
_OF_A_JOB = ("job", *_JOB_ALONE, "data", "batch_size", "log_format", "log_level")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(worker))


def worker(
    *,
    context: typer.Context,
    job: Job = "",
    run: RunFlags,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="What to train on, in place of a job's own data: a path or glob, kafka://TOPIC, or - for standard "
            "input; of the demo: movielens, or synthetic:SAMPLES.",
        ),
    ] = "movielens",
    form: DataFlags,
    config: WorkerConfig,
    model: ModelFlag = Model.deepfm,
    export: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Directory or URL that rank 0's checkpoints are exported to, for `trilith serving entry`.",
        ),
    ] = "",
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    logs: LogFlags,
) -> None:
    """Train a job of yours, or one of the demo's models where none is named, until it is done or SIGTERM comes.

    `trilith worker MODULE:JOB` takes all that is to be said of a run by --set, --config and the environment, and of the
    other flags only --data, --batch-size, --format, --kind and those of logs. SIGTERM ends it after its step and a
    save, with status 0. Without MODULE:JOB the other flags are in force; other workers may come and go meanwhile.
    """
    if job:
        refuse_beside(context, f"MODULE:JOB ({job})", *_OF_A_JOB)
        _train(job, run, form.read(data, config.batch_size) if given(context, "data") else None, logs)
        return
    refuse_alone(context, *_JOB_ALONE)
    need("torch", extra="torch")
    if export:
        need("safetensors", extra="serving")
    from trilith.errors import InvalidRequestError

    config.check_places()
    if export and not config.model_dir:
        raise InvalidRequestError(f"--export {export} exports checkpoints: say with --model-dir where these go")

    from trilith_services.demo.models import settings_of
    from trilith_services.demo.task import load_task
    from trilith_services.worker.run import run_worker

    logs.setup(worker=config.rank)
    settings = settings_of(model.value)
    status = run_worker(
        replace(config, metrics_port=metrics_port, metrics_host=metrics_host),
        lambda: load_task(settings, data, log.info),
        follower=_exports(export, settings) if export else None,
    )
    raise typer.Exit(status)


def _train(name: str, run: RunFlags, data: Dataset | None, logs: LogFlags) -> None:
    job = run.job(name)
    identity = job.run.identity()
    logs.setup(worker=identity.rank)
    with job:
        metrics = job.train(data)
    if metrics and identity.chief:
        typer.echo("worker: " + " ".join(f"{each}={value:.6g}" for each, value in metrics.items()))


def _exports(directory: str, settings: ModelSettings) -> Follower:
    from trilith_services.commands.export_saved import ExportSaved
    from trilith_services.demo.exporting import reference_exporter

    return lambda task: ExportSaved(directory, "distributed", reference_exporter(settings, task.features), log.warning)

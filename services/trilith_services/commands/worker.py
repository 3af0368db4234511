"""`trilith worker`: one training process."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trilith.runtime.extras import need
from trilith_services.commands.flags import (
    Data,
    LogFlags,
    MetricsHost,
    MetricsPort,
    Model,
    ModelFlag,
    expanded,
)
from trilith_services.worker.config import WorkerConfig

if TYPE_CHECKING:
    from trilith_services.demo.models import ModelSettings
    from trilith_services.worker.run import Follower

__all__ = ["register"]

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(worker))


def worker(
    *,
    config: WorkerConfig,
    model: ModelFlag = Model.deepfm,
    data: Data = "movielens",
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
    """Train a shard of the data until it is done or SIGTERM comes; other workers may come and go meanwhile."""
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


def _exports(directory: str, settings: ModelSettings) -> Follower:
    from trilith_services.commands.export_saved import ExportSaved
    from trilith_services.demo.exporting import reference_exporter

    return lambda task: ExportSaved(directory, "distributed", reference_exporter(settings, task.features), log.warning)

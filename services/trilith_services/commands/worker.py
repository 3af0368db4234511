"""`trilith worker`: one training process."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trilith.runtime.extras import need
from trilith_services.commands.flags import (
    CLUSTER_FORMS,
    AsyncPush,
    BatchSize,
    Data,
    LogFormat,
    LogFormatFlag,
    LogLevel,
    LogLevelFlag,
    MetricsHost,
    MetricsPort,
    Model,
    ModelFlag,
    Prefetch,
    Seed,
)

if TYPE_CHECKING:
    from trilith_services.demo.models import ModelSettings
    from trilith_services.worker.run import Follower

__all__ = ["register"]

log = logging.getLogger(__name__)


class WorkerMode(StrEnum):
    """Where embedding rows live."""

    ps = "ps"
    all_to_all = "all-to-all"


class Dense(StrEnum):
    """Where dense parameters live."""

    ps = "ps"
    allreduce = "allreduce"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(worker)


def worker(
    cluster: Annotated[str, typer.Option(metavar="URL", help=f"The cluster, for --mode ps: {CLUSTER_FORMS}.")] = "",
    mode: Annotated[
        WorkerMode, typer.Option(help="ps: rows on the PS; all-to-all: in the workers, who take each step together.")
    ] = WorkerMode.ps,
    rank: Annotated[int, typer.Option(metavar="N", help="This worker's number, from 0.", min=0)] = 0,
    world_size: Annotated[
        int, typer.Option(metavar="N", help="Workers, and so shards that the data is cut into.", min=1)
    ] = 1,
    model: ModelFlag = Model.deepfm,
    data: Data = "movielens",
    batch_size: BatchSize = 512,
    epochs: Annotated[
        int, typer.Option(metavar="N", help="Passes over the shard; 0: the model's own number.", min=0)
    ] = 0,
    steps: Annotated[
        int, typer.Option(metavar="N", help="End after so many steps of this worker; 0: no limit.", min=0)
    ] = 0,
    seed: Seed = 0,
    dense: Annotated[
        Dense, typer.Option(help="ps: dense parameters on the PS, asynchronous; allreduce: synchronous.")
    ] = Dense.ps,
    master: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where rank 0 is, for allreduce and all-to-all.")
    ] = "",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, or auto: cuda where there is one, else cpu.")
    ] = "auto",
    threads: Annotated[
        int, typer.Option(metavar="N", help="torch threads; 0: the cores shared by the workers.", min=0)
    ] = 0,
    model_dir: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Directory or URL for rank 0's checkpoints, below the PS's --checkpoint-root; one whose newest "
            "checkpoint is ahead of the cluster is refused.",
        ),
    ] = "",
    save_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Steps of all workers between checkpoints; 0: one soon after the start, if there is none yet.",
            min=0,
        ),
    ] = 0,
    export: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Directory or URL that rank 0's checkpoints are exported to, for `trilith serving entry`.",
        ),
    ] = "",
    prefetch: Prefetch = 0,
    async_push: AsyncPush = 0,
    lookup_queue: Annotated[
        int, typer.Option(metavar="N", help="all-to-all: batches whose rows are found and wait to travel.", min=0)
    ] = 0,
    update_queue: Annotated[
        int, typer.Option(metavar="N", help="all-to-all: updates that have travelled and wait to be applied.", min=0)
    ] = 0,
    clip_norm: Annotated[
        float,
        typer.Option(
            metavar="NORM", help="Bound on the norm of a step's gradients, of rows and dense ones; 0: none.", min=0
        ),
    ] = 0.0,
    validate: Annotated[bool, typer.Option(help="Rank 0 scores the validation part after every epoch.")] = True,
    events: Annotated[
        str, typer.Option(metavar="FILE", help="Progress is appended here, a JSON object per line.")
    ] = "",
    state: Annotated[
        str, typer.Option(metavar="FILE", help="Remembers the position in the data, to go on there.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a PS that is away.", min=0.1)
    ] = 120.0,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    log_format: LogFormatFlag = LogFormat.text,
    log_level: LogLevelFlag = LogLevel.info,
) -> None:
    """Train a shard of the data until it is done or SIGTERM comes; other workers may come and go meanwhile."""
    need("torch", extra="torch")
    if export:
        need("safetensors", extra="serving")
    from trilith.errors import InvalidRequestError

    if mode is WorkerMode.ps and not cluster:
        raise InvalidRequestError("--cluster is left out; --mode ps needs it, such as static://host:port,host:port")
    if mode is WorkerMode.all_to_all and cluster:
        raise InvalidRequestError(f"--cluster {cluster}: --mode all-to-all has no PS; leave it out")
    if mode is WorkerMode.all_to_all and not master:
        raise InvalidRequestError("--mode all-to-all needs to know where rank 0 is: give --master host:port")

    if export and not model_dir:
        raise InvalidRequestError(f"--export {export} exports checkpoints: say with --model-dir where these go")

    from trilith_services.demo.models import settings_of
    from trilith_services.logs import setup_logging
    from trilith_services.worker.run import WorkerOptions, run_worker
    from trilith_services.worker.trainer import WorkerConfig

    setup_logging(log_format.value, level=log_level.value, role={"worker": rank})
    settings = settings_of(model.value)
    config = WorkerConfig(
        rank=rank,
        world_size=world_size,
        settings=settings,
        batch_size=batch_size,
        epochs=epochs or settings.epochs,
        steps=steps,
        seed=seed,
        dense="ps" if dense is Dense.ps and mode is WorkerMode.ps else "allreduce",
        device=device,
        validate=validate,
        model_dir=model_dir,
        save_every=save_every,
        state_file=state,
        prefetch=prefetch,
        async_push=async_push,
        clip_norm=clip_norm,
        lookup_queue=lookup_queue,
    )
    options = WorkerOptions(
        cluster=cluster,
        data=data,
        events=events,
        master=master,
        threads=threads,
        timeout_s=timeout,
        model_name=model.value,
        update_queue=update_queue,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    )
    raise typer.Exit(run_worker(options, config, follower=_exports(export, config.settings) if export else None))


def _exports(directory: str, settings: ModelSettings) -> Follower:
    from trilith_services.commands.export_saved import ExportSaved

    return lambda parts: ExportSaved(directory, "distributed", settings, parts.train.features, log.warning)

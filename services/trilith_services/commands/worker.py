"""`trilith worker`: one training process."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trilith_services.worker.models import ModelSettings
    from trilith_services.worker.run import Follower

__all__ = ["register"]

log = logging.getLogger(__name__)


class Model(StrEnum):
    """The reference models."""

    ffm = "ffm"
    deepfm = "deepfm"


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
    cluster: Annotated[
        str, typer.Option(help="Address of the cluster: zk://host:2181/path, static://host:port,…; --mode ps only.")
    ] = "",
    mode: Annotated[
        WorkerMode, typer.Option(help="ps: rows on the PS; all-to-all: in the workers, who take each step together.")
    ] = WorkerMode.ps,
    rank: Annotated[int, typer.Option(help="This worker's number, from 0.", min=0)] = 0,
    world_size: Annotated[int, typer.Option(help="Shards the data is cut into.", min=1)] = 1,
    model: Annotated[Model, typer.Option(help="Reference model.")] = Model.deepfm,
    data: Annotated[str, typer.Option(help="movielens, or synthetic:SAMPLES.")] = "movielens",
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 512,
    epochs: Annotated[int, typer.Option(help="Passes over the shard; 0: the model's own number.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="End after so many steps of this worker; 0: no limit.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Decides initial values and the order of samples.", min=0)] = 0,
    dense: Annotated[
        Dense, typer.Option(help="ps: dense parameters on the PS, asynchronous; allreduce: synchronous.")
    ] = Dense.ps,
    master: Annotated[str, typer.Option(help="host:port of rank 0, for allreduce and all-to-all.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="torch threads; 0: the cores shared by the workers.", min=0)] = 0,
    model_dir: Annotated[str, typer.Option(help="Directory or URL for rank 0's checkpoints.")] = "",
    save_every: Annotated[int, typer.Option(help="Steps of all workers between checkpoints; 0: none.", min=0)] = 0,
    export: Annotated[
        str, typer.Option(help="Export rank 0's checkpoints to this directory or URL, for `trilith serving entry`.")
    ] = "",
    prefetch: Annotated[int, typer.Option(help="Batches looked up ahead; 0: exact order.", min=0)] = 0,
    async_push: Annotated[int, typer.Option(help="Updates that may be on their way; 0: wait for each.", min=0)] = 0,
    clip_norm: Annotated[
        float, typer.Option(help="Bound on the norm of a step's gradients, of rows and dense ones; 0: none.", min=0)
    ] = 0.0,
    validate: Annotated[bool, typer.Option(help="Rank 0 scores the validation part after every epoch.")] = True,
    events: Annotated[str, typer.Option(help="File that progress is appended to, a JSON object per line.")] = "",
    state: Annotated[str, typer.Option(help="File that remembers the position, to go on there.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a PS that is away.", min=0.1)] = 120.0,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Train a shard of the data until it is done or SIGTERM comes; other workers may come and go meanwhile."""
    from trilith.errors import InvalidRequestError

    if (mode is WorkerMode.ps) != bool(cluster):
        raise InvalidRequestError(
            f"--mode {mode.value} with --cluster {cluster!r}: --mode ps needs an address, all-to-all has none"
        )
    if mode is WorkerMode.all_to_all and not master:
        raise InvalidRequestError("--mode all-to-all needs to know where rank 0 is: give --master host:port")

    if export and not model_dir:
        raise InvalidRequestError(f"--export {export} exports checkpoints: say with --model-dir where these go")

    from trilith_services.logs import setup_logging
    from trilith_services.worker.models import settings_of
    from trilith_services.worker.run import WorkerOptions, run_worker
    from trilith_services.worker.trainer import WorkerConfig

    setup_logging(level=log_level, role={"worker": rank})
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
    )
    options = WorkerOptions(
        cluster=cluster, data=data, events=events, master=master, threads=threads, timeout_s=timeout
    )
    raise typer.Exit(run_worker(options, config, follower=_exports(export, config.settings) if export else None))


def _exports(directory: str, settings: ModelSettings) -> Follower:
    from trilith_services.commands.export_saved import ExportSaved

    return lambda parts: ExportSaved(directory, "distributed", settings, parts.train.features, log.warning)

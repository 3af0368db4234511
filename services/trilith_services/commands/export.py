"""`trilith export`: from a checkpoint to what serving loads."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trilith.errors import InvalidRequestError
from trilith.runtime.extras import need
from trilith_services.commands.flags import Json, Model, expanded
from trilith_services.commands.jobs import RunFlags, given, is_job, refuse_alone, refuse_beside

if TYPE_CHECKING:
    from trilith.estimator import Estimator

__all__ = ["ExportMode", "register"]

_JOB_ALONE = ("sets", "config", "checkpoint")
_OF_A_JOB = ("what", "directory", *_JOB_ALONE, "mode", "as_json")


class ExportMode(StrEnum):
    """Where an export's rows are."""

    distributed = "distributed"
    standalone = "standalone"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(export))


def export(
    *,
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:JOB|CHECKPOINT",
            help="A job of yours; or a checkpoint of the demo's models, or a directory of them: its newest one "
            "(as ./a:b where its name looks like a job's).",
        ),
    ],
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Directory or URL where exports go, each below its version; a job's may be left out: its export_dir, "
            "or exports in its model_dir.",
        ),
    ] = "",
    run: RunFlags,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="Checkpoint of a job, or a directory of them; left out: its model_dir's newest."
        ),
    ] = "",
    mode: Annotated[
        ExportMode,
        typer.Option(
            help="distributed: rows come from serving replicas; standalone: all rows are in the export. Left out: what "
            "a job's export_mode says.",
        ),
    ] = ExportMode.distributed,
    dense_only: Annotated[
        bool, typer.Option("--dense-only", help="The model alone, for replicas that training keeps fresh.")
    ] = False,
    model: Annotated[Model, typer.Option(help="Reference model that was trained.")] = Model.deepfm,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Data it was trained on, for the names of the features: movielens, or synthetic:SAMPLES.",
        ),
    ] = "movielens",
    features: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Names of the features, as trained; left out: those of --data."),
    ] = "",
    keep: Annotated[int, typer.Option(metavar="N", help="Newest versions to keep.", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Export a trained job of yours, or a checkpoint of the demo's models, for `trilith serving entry`.

    An export is a torch.export program, safetensors weights, configs and serving rows. Of the flags --dense-only,
    --model, --data, --features and --keep are for the demo's models, --checkpoint, --set and --config for jobs.
    """
    need("torch", "safetensors", extra="serving")
    if is_job(what):
        refuse_beside(context, f"MODULE:JOB ({what})", *_OF_A_JOB)
        _export_job(run.job(what), directory, checkpoint, mode.value if given(context, "mode") else "", as_json)
        return
    refuse_alone(context, *_JOB_ALONE)
    if not directory:
        raise InvalidRequestError(f"export {what}: say where to, as trilith export CHECKPOINT DIR")
    from dataclasses import asdict

    from trilith_services.demo.datasets import load_dataset
    from trilith_services.demo.exporting import check_reference, reference_exporter
    from trilith_services.demo.models import settings_of
    from trilith_services.exporting import find_checkpoint

    names = [name.strip() for name in features.split(",")] if features else list(load_dataset(data).train.features)
    settings, found = settings_of(model.value), find_checkpoint(what)
    check_reference(found, settings, names)
    exporter = reference_exporter(settings, names)
    done = exporter.export(found, directory, mode=mode.value, dense_only=dense_only, keep=keep)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        typer.echo(f"export: version={done.version} step={done.step} rows={done.rows} path={done.path}")


def _export_job(job: Estimator, directory: str, checkpoint: str, mode: str, as_json: bool) -> None:
    from trilith_services.exporting import find_checkpoint

    with job:
        path = job.export(directory, checkpoint=find_checkpoint(checkpoint) if checkpoint else "", mode=mode)
    version = int(path.rstrip("/").rpartition("/")[2])
    if as_json:
        typer.echo(json.dumps({"version": version, "path": path}))
    else:
        typer.echo(f"export: version={version} path={path}")

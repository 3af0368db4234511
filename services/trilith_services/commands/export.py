"""`trilith export`: from a checkpoint to what serving loads."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from trilith.runtime.extras import need
from trilith_services.commands.flags import Json, Model

__all__ = ["ExportMode", "register"]


class ExportMode(StrEnum):
    """Where an export's rows are."""

    distributed = "distributed"
    standalone = "standalone"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(export)


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a directory of them: its newest complete one."),
    ],
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Directory or URL where exports go, each below its version.")
    ],
    mode: Annotated[
        ExportMode,
        typer.Option(help="distributed: rows come from serving replicas; standalone: all rows are in the export."),
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
    """Export a trained reference model: a torch.export program, safetensors weights, configs and serving rows."""
    need("torch", "safetensors", extra="serving")
    from dataclasses import asdict

    from trilith_services.demo.datasets import load_dataset
    from trilith_services.demo.exporting import check_reference, reference_exporter
    from trilith_services.demo.models import settings_of
    from trilith_services.exporting import find_checkpoint

    names = [name.strip() for name in features.split(",")] if features else list(load_dataset(data).train.features)
    settings, found = settings_of(model.value), find_checkpoint(checkpoint)
    check_reference(found, settings, names)
    exporter = reference_exporter(settings, names)
    done = exporter.export(found, directory, mode=mode.value, dense_only=dense_only, keep=keep)
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        typer.echo(f"export: version={done.version} step={done.step} rows={done.rows} path={done.path}")

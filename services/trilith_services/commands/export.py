"""`trilith export`: from a job's checkpoint to what serving loads."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from trilith.errors import InvalidRequestError
from trilith.runtime.extras import need
from trilith_services.commands.flags import Json, expanded
from trilith_services.commands.jobs import Job, RunFlags, check_trained, is_job

__all__ = ["ExportMode", "register"]


class ExportMode(StrEnum):
    """Where an export's rows are."""

    distributed = "distributed"
    standalone = "standalone"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(export))


def export(
    *,
    job: Job,
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Directory or URL where exports go, each below its version; left out: the job's export_dir, or "
            "exports in its model_dir.",
        ),
    ] = "",
    run: RunFlags,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="Checkpoint, or a directory of them: its newest; left out: model_dir's newest."
        ),
    ] = "",
    mode: Annotated[
        ExportMode | None,
        typer.Option(
            help="distributed: rows come from serving replicas; standalone: all rows are in the export; left out: the "
            "job's export_mode.",
        ),
    ] = None,
    dense_only: Annotated[
        bool, typer.Option("--dense-only", help="The model alone, for replicas that training keeps fresh.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="Newest versions to keep; left out: the job's export_keep.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a trained job for `trilith serving entry`.

    An export is a torch.export program, safetensors weights, configs and serving rows. It is seen when it is whole;
    SIGTERM leaves nothing of it.
    """
    need("torch", "safetensors", extra="serving")
    if not is_job(job):
        raise InvalidRequestError(
            f"{job!r} is not MODULE:JOB, such as my_shop.ctr:job; if it is a checkpoint, write trilith export "
            f"MODULE:JOB DIR --checkpoint {job}, with trilith_services.demo.job:deepfm for the demo's"
        )
    from trilith.serving.exports import read_export
    from trilith_services.exporting import find_checkpoint

    found = run.job(job)
    if not checkpoint:
        check_trained(found)
    with _removed_on_sigterm(), found:
        path = found.export(
            directory,
            checkpoint=find_checkpoint(checkpoint) if checkpoint else "",
            mode="" if mode is None else mode.value,
            dense_only=dense_only,
            keep=keep,
        )
    if not found.chief:
        return
    made = read_export(path)
    if as_json:
        typer.echo(json.dumps({"version": made.version, "step": made.step, "path": path}))
    else:
        typer.echo(f"export: version={made.version} step={made.step} path={path}")


@contextmanager
def _removed_on_sigterm() -> Iterator[None]:
    """End by an exception, as on SIGINT: whoever writes removes what is half written."""

    def on_signal(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

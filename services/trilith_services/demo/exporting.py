"""Exports of the demo's models, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from trilith.errors import CheckpointError
from trilith.nn.serving import Scores
from trilith.serving.exports import ProgramInput, ServedFeature
from trilith_proto import ps_pb2
from trilith_services.demo.models import MODELS, TABLE, ModelSettings
from trilith_services.exporting import Exporter
from trilith_services.ps.checkpoint.serving_rows import dense_values, serving_tables

__all__ = ["check_reference", "reference_exporter"]


def reference_exporter(settings: ModelSettings, features: Iterable[str]) -> Exporter:
    """What exports a reference model: its output "score" is the probability of a click."""
    names = tuple(features)
    head = settings.head(len(names), seed=0)
    return Exporter(
        settings.name,
        Scores(head),
        dense=head,
        features={name: ServedFeature(table=TABLE) for name in names},
        inputs=[ProgramInput(kind="stacked", names=names)],
    )


def check_reference(checkpoint: str, settings: ModelSettings, features: Iterable[str]) -> None:
    """Refuse a checkpoint that is of another reference model, or of other features.

    Raises:
        CheckpointError: It is; the message names the model that fits.
    """
    count = len(tuple(features))
    tables, values = serving_tables(checkpoint), dense_values(checkpoint)
    wrong = _misfit(settings, count, tables, values)
    if not wrong:
        return
    fitting = [name for name, each in MODELS.items() if not _misfit(each, count, tables, values)]
    hint = f"it is of --model {fitting[0]}" if fitting else "no reference model with so many features fits"
    raise CheckpointError(f"{checkpoint} is of no {settings.name} with {count} features ({wrong}); {hint}")


def _misfit(
    settings: ModelSettings,
    count: int,
    tables: Mapping[str, ps_pb2.TableConfig],
    values: Mapping[str, npt.NDArray[np.float32]],
) -> str:
    """Why a checkpoint is not of a reference model; empty if it is."""
    if TABLE not in tables:
        return f"it has no table {TABLE!r}"
    head = settings.head(count, seed=0)
    dim = sum(segment.dim_size for segment in tables[TABLE].hash_table.entry_config.segments)
    if dim != head.row_dim:
        return f"its rows have {dim} floats, not {head.row_dim}"
    wanted = {f"dense/{name}": each.numel() for name, each in head.named_parameters()}
    found = {name: each.size for name, each in values.items() if name.startswith("dense/")}
    if wanted != found:
        return f"its dense variables are {found}, not {wanted}"
    return ""

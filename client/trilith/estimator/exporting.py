"""What of a task is exported: its model as a program of plain tensors, and what an entry has to look up for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from trilith.data.parse.specs import Dense
from trilith.errors import InvalidRequestError
from trilith.estimator.features import Embedding, Inputs, Pooled, Rows, Sequence
from trilith.estimator.rows import TaskRows, combiner_of_feature
from trilith.estimator.state import read_job
from trilith.estimator.task import Task
from trilith.serving.exports import ProgramInput, ServedFeature

__all__ = ["Served", "exporter_of"]


class Served(nn.Module):
    """A task as serving runs it: one tensor for each of `inputs` in, predictions by label out."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.inputs: list[ProgramInput] = []
        for name, feature in task.features.items():
            if isinstance(feature, Dense):
                pad = feature.lengths == "fit"
                key = feature.feature or name
                self.inputs.append(ProgramInput(kind="dense", names=(key,), dim=feature.dim, pad=pad))
                continue
            self.inputs.append(ProgramInput(kind="feature", names=(name,)))
            if isinstance(feature, Sequence):
                self.inputs.append(ProgramInput(kind="mask", names=(name,)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Predictions float32[b], label after label."""
        given = iter(tensors)
        values: dict[str, Any] = {}
        for name, feature in self.task.features.items():
            rows = next(given)
            if isinstance(feature, Embedding):
                bias = rows[:, 0] if feature.bias else rows[:, 0] * 0.0
                values[name] = Pooled(rows[:, int(feature.bias) :], bias)
            elif isinstance(feature, Sequence):
                values[name] = Rows(rows[..., int(feature.base.bias) :], next(given) > 0.5)
            else:
                values[name] = rows
        found = self.task.predictions(self.task.outputs(Inputs(values)))
        return tuple(found[name] for name in self.outputs)

    @property
    def outputs(self) -> list[str]:
        """Names of what it gives, in order."""
        return list(self.task.labels) or ["score"]


def exporter_of(name: str, task: Task, rows: TaskRows) -> Any:
    """What writes exports of a task, as the services register it."""
    found = entry_points(group="trilith.engines", name="exporter")
    if not found:
        raise InvalidRequestError(
            "nothing is registered as exporter under the entry-point group 'trilith.engines': exports need the trilith "
            "wheel, or a checkout installed by `make venv`"
        )
    make: Callable[..., Any] = found["exporter"].load()
    weighted = [each for each, feature in task.features.items() if isinstance(feature, Embedding) and feature.weights]
    if weighted:
        raise InvalidRequestError(
            f"features {weighted} have weights for each id, which records that are served have no place for; without "
            "weights= they can be exported"
        )
    task = copy.deepcopy(task).to("cpu")  # a checkpoint's values are not those that training has now
    served = Served(task)
    features = {
        each: ServedFeature(
            table=rows.table_of(each),
            combiner=combiner_of_feature(feature),
            feature=feature.feature or each,
            newest=isinstance(feature, Sequence),
        )
        for each, feature in task.features.items()
        if not isinstance(feature, Dense)
    }

    def load(checkpoint: str) -> None:
        with torch.no_grad():
            task.load_state_dict(dict(read_job(checkpoint).dense))

    return make(name, served, dense=task, features=features, inputs=served.inputs, outputs=served.outputs, load=load)

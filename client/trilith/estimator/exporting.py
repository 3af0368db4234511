"""What of a task is exported: its model as a program of plain tensors, and what an entry has to look up for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
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
        self.outputs = self._predicted(task.made_up())
        """Names of what it gives, in order."""

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

    def _predicted(self, x: Inputs) -> list[str]:
        """What the task gives predictions of."""
        was = self.task.training
        self.task.eval()
        with torch.no_grad():
            found = list(self.task.predictions(self.task.outputs(x)))
        self.task.train(was)
        return found


def exporter_of(name: str, task: Task, rows: TaskRows, texts: Collection[str] = ()) -> Any:
    """What writes exports of a task, as the services register it.

    Args:
        name: Of the model.
        task: Its dense part is copied, and takes the values of the checkpoint that is exported.
        rows: The task's features on a cluster.
        texts: Features whose ids are text.
    """
    found = entry_points(group="trilith.engines", name="exporter")
    if not found:
        raise InvalidRequestError(
            "nothing is registered as exporter under the entry-point group 'trilith.engines': exports need the trilith "
            "wheel, or a checkout installed by `make venv`"
        )
    make: Callable[..., Any] = found["exporter"].load()
    task = copy.deepcopy(task).to("cpu")  # a checkpoint's values are not those that training has now
    served = Served(task)
    features = {
        each: ServedFeature(
            table=rows.table_of(each),
            combiner=combiner_of_feature(feature),
            feature=feature.feature or each,
            newest=isinstance(feature, Sequence),
            weights=feature.weights or None if isinstance(feature, Embedding) else None,
            strings=each in texts,
        )
        for each, feature in task.features.items()
        if not isinstance(feature, Dense)
    }

    def load(checkpoint: str) -> None:
        with torch.no_grad():
            task.load_state_dict(dict(read_job(checkpoint).dense))

    return make(name, served, dense=task, features=features, inputs=served.inputs, outputs=served.outputs, load=load)

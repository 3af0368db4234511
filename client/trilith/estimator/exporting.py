"""What of a task is exported: its model as a program of plain tensors, and what an entry has to look up for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trilith.checkpoint import hold
from trilith.data.parse.specs import Dense
from trilith.errors import InvalidRequestError
from trilith.estimator.features import Embedding, Inputs, Pooled, Rows, Sequence
from trilith.estimator.rows import Prepared, TaskRows, combiner_of_feature
from trilith.estimator.state import Job, read_job
from trilith.estimator.task import Task
from trilith.ops.ragged import Ragged
from trilith.runtime.registered import registered
from trilith.serving.exports import ProgramInput, ServedFeature

__all__ = ["Served", "TaskExporter", "records_of", "warm_up_of"]

_RECORDS = 64  # of a warm-up request


class Served(nn.Module):
    """A task as serving runs it: one tensor for each of `inputs` in, predictions by label out.

    Args:
        task: The model.
        wanted: What of it; see `Task.signatures`. None: all predictions.
    """

    def __init__(self, task: Task, wanted: Any = None) -> None:
        super().__init__()
        self.task = task
        self._wanted = wanted
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
        self.outputs = self._named()
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
        found = self._found(Inputs(values))
        return tuple(found[name] for name in self.outputs)

    def _found(self, x: Inputs) -> Mapping[str, Tensor]:
        """What the task gives, by name."""
        if not isinstance(self._wanted, str):
            return self.task.predictions(self.task.outputs(x))
        found = getattr(self.task, self._wanted)(x)
        return found if isinstance(found, Mapping) else {self._wanted: found}

    def _named(self) -> list[str]:
        """Names of what it gives; the model is run for it once.

        Raises:
            InvalidRequestError: The task has nothing of what is wanted.
        """
        wanted, kind = self._wanted, type(self.task).__name__
        if isinstance(wanted, str) and not callable(getattr(self.task, wanted, None)):
            raise InvalidRequestError(
                f"{kind} has no method {wanted!r}; names of predictions are a tuple: ({wanted!r},)"
            )
        was = self.task.training
        self.task.eval()
        with torch.no_grad():
            found = list(self._found(self.task.made_up()))
        self.task.train(was)
        if wanted is None or isinstance(wanted, str):
            return found
        names = list(wanted)
        if not names or not set(names) <= set(found):
            raise InvalidRequestError(f"outputs {names} are wanted; {kind} predicts {found}")
        return names


class TaskExporter:
    """Writes exports of a task again and again as it is trained, as the services register it. Not thread-safe.

    Args:
        name: Of the model.
        task: Its dense part is copied, and takes the values of the checkpoint that is exported.
        rows: The task's features on a cluster.
        read: Reads what a checkpoint has beside its rows, and refuses that of another model.

    Raises:
        InvalidRequestError: Nothing is registered that could write them.
    """

    def __init__(self, name: str, task: Task, rows: TaskRows, read: Callable[[str], Job]) -> None:
        self._make: Callable[..., Any] = registered("exporter", "no exporter", "exports need")
        self._name, self._trained, self._rows, self._read = name, task, rows, read
        self._task = copy.deepcopy(task).to("cpu")  # a checkpoint's values are not those that training has now
        self._made: tuple[frozenset[str], Any] | None = None

    def export(self, checkpoint: str, base: str, *, dense: str = "", **options: Any) -> Any:
        """Write the next version below `base`; see `Exporter.export` of the services, which takes the same options.

        Args:
            checkpoint: A complete checkpoint.
            base: Directory or URL of the exports.
            dense: The run's own newer save of the dense part alone, whose values are taken; empty: the checkpoint's.
            **options: The other ones.
        """
        with hold(checkpoint):
            job = read_job(dense) if dense else self._read(checkpoint)
            if dense:
                options["step"] = job.step
            texts = frozenset(self._trained.texts.union(job.texts))
            if self._made is None or self._made[0] != texts:
                self._made = texts, self._exporter(texts)
            self._task.load_state_dict(dict(job.dense))
            return self._made[1].export(checkpoint, base, **options)

    def _exporter(self, texts: Collection[str]) -> Any:
        """What writes exports of the task whose features of `texts` have ids that are text."""
        served = Served(self._task)
        features = {
            each: ServedFeature(
                table=self._rows.table_of(each),
                combiner=combiner_of_feature(feature),
                feature=feature.feature or each,
                newest=isinstance(feature, Sequence),
                weights=feature.weights or None if isinstance(feature, Embedding) else None,
                strings=each in texts,
            )
            for each, feature in self._task.features.items()
            if not isinstance(feature, Dense)
        }
        return self._make(
            self._name,
            served,
            dense=self._task,
            features=features,
            inputs=served.inputs,
            outputs=served.outputs,
            load=lambda checkpoint: None,  # the task has them already
            signatures=_signatures(self._task),
        )


def _signatures(task: Task) -> dict[str, tuple[Served, list[str]]]:
    """What else an export can be asked."""
    found = {}
    for name, wanted in task.signatures.items():
        try:
            served = Served(task, wanted)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"signature {name!r}: {error}") from None
        found[name] = served, served.outputs
    return found


def warm_up_of(task: Task, batches: Iterable[Prepared], most: int | None) -> bytes:
    """A warm-up file: the first `most` samples of batches, all of them if None, as requests in JSON."""
    lines: list[str] = []
    left = most
    for prepared in batches:
        if left is not None and left <= 0:
            break
        records = records_of(task, prepared, prepared.samples if left is None else left)
        left = None if left is None else left - len(records)
        starts = range(0, len(records), _RECORDS)
        lines.extend(json.dumps({"records": records[start : start + _RECORDS]}) for start in starts)
    return "".join(f"{line}\n" for line in lines).encode()


def records_of(task: Task, prepared: Prepared, most: int) -> list[dict[str, Any]]:
    """The first samples of a batch, their features by the names that records have."""
    columns: dict[str, list[Any]] = {}
    sparse = [(name, feature) for name, feature in task.features.items() if not isinstance(feature, Dense)]
    # A sequence has the newest ids only; what pools the same column has all.
    for name, feature in sorted(sparse, key=lambda each: isinstance(each[1], Embedding)):
        columns[feature.feature or name] = prepared.ids[name].tolist()
        if isinstance(feature, Embedding) and feature.weights:
            columns[feature.weights] = Ragged(prepared.weights[name], prepared.ids[name].row_splits).tolist()
    for name, numbers in task.features.items():
        if isinstance(numbers, Dense) and (numbers.feature or name) not in columns:
            columns[numbers.feature or name] = prepared.dense[name].tolist()
    return [dict(zip(columns, row, strict=True)) for row in islice(zip(*columns.values(), strict=True), most)]

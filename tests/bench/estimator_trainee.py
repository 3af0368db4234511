"""A task trained by the Estimator, and by a loop that is written by hand over the same modules, in turns.

Run as `python -m tests.bench.estimator_trainee`; it prints a JSON object with each side's samples per second by turn.
With `--compile` the sides are the Estimator with its model compiled and with it as it is written; where there is no
compiler, the object says why as "skipped".

Rows are in this process, where what a loop costs beside them weighs most. The loop by hand has what trains: rows looked
up, forward and backward, gradients that are held for one step of rows and dense parameters together. It knows of no
epochs, positions, signals, events or restarts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import trilith
from tests.bench.draws import Zipf
from trilith.errors import InvalidRequestError
from trilith.estimator import Callback, Dense, Embedding, Estimator, Label, RunConfig, Stop, Task, metrics
from trilith.estimator.events import Step
from trilith.estimator.features import Inputs, Pooled
from trilith.nn import EmbeddingCollection, Feature
from trilith.nn.optimization import Optimization
from trilith.ops.ragged import Ragged
from trilith.tables import Adagrad

_HIDDEN, _DENSE = 256, 8
_EXPONENT = 1.05
Batch = Mapping[str, Any]


def task_of(features: int, dim: int) -> Task:
    """A task of so many ids and some numbers, with two labels."""

    class Clicks(Task):
        numbers = Dense(_DENSE)
        labels = {"click": Label(), "buy": Label()}  # noqa: RUF012 - as a user writes it
        metrics = {"auc": metrics.Auc()}  # noqa: RUF012

        def build(self) -> None:
            width = features * dim + _DENSE
            self.trunk = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU())
            self.heads = nn.ModuleDict({name: nn.Linear(_HIDDEN, 1) for name in self.labels})

        def forward(self, x: Inputs) -> dict[str, torch.Tensor]:
            vectors = [x[f"f{index}"].vector for index in range(features)]
            deep = self.trunk(torch.cat([*vectors, x.numbers], 1))
            return {name: head(deep)[:, 0] for name, head in self.heads.items()}

    made = {f"f{index}": Embedding(dim=dim, optimizer=Adagrad(learning_rate=0.05)) for index in range(features)}
    return type("Clicks", (Clicks,), made)(dense_optimizer=_adam)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3)


def make_batches(features: int, rows: int, size: int, count: int) -> list[dict[str, np.ndarray]]:
    """Batches with one Zipf id per feature; labels mean nothing."""
    rng = np.random.default_rng(0)
    drawn = {f"f{index}": Zipf(rows, _EXPONENT, seed=index).draw(size * count) for index in range(features)}
    return [
        {
            **{name: ids[start : start + size] for name, ids in drawn.items()},
            "numbers": rng.normal(size=(size, _DENSE)).astype(np.float32),
            "click": (rng.random(size) < 0.25).astype(np.float32),
            "buy": (rng.random(size) < 0.05).astype(np.float32),
        }
        for start in range(0, size * count, size)
    ]


class _UntilDue(Callback):
    """Stops when it is time."""

    def __init__(self) -> None:
        self.end = 0.0
        self.samples = 0

    def on_step(self, event: Step) -> Stop | None:
        self.samples = event.samples
        return Stop("the turn is over") if time.perf_counter() >= self.end else None


class ByEstimator:
    """`Estimator.train` over the same batches again and again; `run` is what else the run is told."""

    def __init__(self, task: Task, batches: Sequence[Batch], **run: Any) -> None:
        self._due = _UntilDue()
        endless = RunConfig(epochs=1 << 30, device="cpu", threads=1, progress="none", evaluate_every_epoch=False, **run)
        self._job = Estimator(task, endless, train=lambda: iter(batches), callbacks=[self._due]).open()

    def train(self, seconds: float) -> int:
        """How many samples."""
        self._due.end = time.perf_counter() + seconds
        self._job.train()
        return self._due.samples


class ByHand:
    """The loop that a user would write."""

    def __init__(self, task: Task, batches: list[dict[str, np.ndarray]], features: int, dim: int) -> None:
        task.prepare(0)
        self._task, self._client = task, trilith.connect("local://")
        self._names = [f"f{index}" for index in range(features)]
        options = {"dim": dim, "optimizer": Adagrad(learning_rate=0.05)}
        tables = {name: Feature(self._client.table(name, **options)) for name in self._names}
        self._rows = EmbeddingCollection(self._client, tables)
        self._optimization = Optimization(nn.ModuleList([task, self._rows]), _adam(task.parameters()))
        self._batches = self._forever(batches)

    @staticmethod
    def _forever(batches: list[dict[str, np.ndarray]]) -> Iterator[Batch]:
        while True:
            yield from batches

    def train(self, seconds: float) -> int:
        """How many samples."""
        end, samples = time.perf_counter() + seconds, 0
        self._task.train()
        while time.perf_counter() < end:
            batch = next(self._batches)
            vectors = self._rows({name: Ragged.of_singles(batch[name].view(np.uint64)) for name in self._names})
            values: dict[str, Any] = {name: Pooled(each, each.new_zeros(len(each))) for name, each in vectors.items()}
            outputs = self._task(Inputs({**values, "numbers": torch.from_numpy(batch["numbers"])}))
            losses = [
                functional.binary_cross_entropy_with_logits(each, torch.from_numpy(batch[name]))
                for name, each in outputs.items()
            ]
            loss = torch.stack(losses).sum()
            if not np.isfinite(loss.item()):
                raise ArithmeticError(f"the loss is {loss.item()}")
            loss.backward()
            self._optimization.step()
            samples += len(batch["click"])
        return samples


def main() -> int:
    """Train in turns."""
    parser = argparse.ArgumentParser()
    for name in ("features", "rows", "batch", "batches", "dim", "turns"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of each side")
    parser.add_argument("--warm-seconds", type=float, required=True)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    batches = make_batches(given.features, given.rows, given.batch, given.batches)
    sides: dict[str, Callable[[float], int]] = {}
    if given.compile:
        try:
            sides["compiled"] = ByEstimator(task_of(given.features, given.dim), batches, compile=True).train
        except InvalidRequestError as error:
            print(json.dumps({"skipped": str(error)}))
            return 0
    else:
        sides["hand"] = ByHand(task_of(given.features, given.dim), batches, given.features, given.dim).train
    sides["estimator"] = ByEstimator(task_of(given.features, given.dim), batches).train
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, given.turns):
        for name, train in sides.items():
            began = time.perf_counter()
            samples = train(given.warm_seconds if turn < 0 else given.seconds / given.turns)
            if turn >= 0:
                rates[name].append(samples / (time.perf_counter() - began))
    print(json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A job of an Estimator as a user has it in a file: `python -m tests.integration.estimator_job DIR`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from trilith.estimator import Callback, Dense, Embedding, Estimator, Label, RunConfig, Task, metrics
from trilith.tables import Adagrad

SAMPLES, BATCH = 320, 32


class Job(Task):
    user = Embedding(dim=4, optimizer=Adagrad(learning_rate=0.2, initial_accumulator_value=0.1))
    item = Embedding(dim=4, bias=True, optimizer=Adagrad(learning_rate=0.2, initial_accumulator_value=0.1))
    context = Dense(2)
    labels: ClassVar = {"click": Label()}
    metrics: ClassVar = {"auc": metrics.Auc()}

    def build(self) -> None:
        self.deep = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.deep(torch.cat([x.user.vector, x.item.vector, x.context], 1))[:, 0] + x.item.bias


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    data = {
        "user": rng.integers(0, 30, SAMPLES),
        "item": rng.integers(0, 20, SAMPLES),
        "context": rng.normal(size=(SAMPLES, 2)).astype(np.float32),
        "click": rng.integers(0, 2, SAMPLES).astype(np.float32),
    }
    cuts = [slice(start, start + BATCH) for start in range(0, SAMPLES, BATCH)]
    return [{name: value[cut] for name, value in data.items()} for cut in cuts]


class KillAt(Callback):
    """Ends the process as kill -9 does, in the middle of a run."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, event) -> None:
        if event.own_step == self._step:
            os._exit(9)


def dense_adagrad(parameters):
    return torch.optim.Adagrad(parameters, 0.1)


def main(out: str) -> None:
    run = RunConfig(epochs=2, progress="lines").overridden()
    kill = int(os.environ.get("KILL_AT", "0"))
    job = Estimator(
        Job(dense_optimizer=dense_adagrad),
        run,
        train=batches,
        evaluate=batches,
        callbacks=[KillAt(kill)] if kill else [],
    )
    with job:
        found = job.train()
        rows = {name: job.client.table(name).lookup(np.arange(30)).tolist() for name in ("user", "item")}
        dense = {name: value.tolist() for name, value in job.task.state_dict().items()}
        report = {"metrics": found, "rows": rows, "dense": dense, "step": job.step_count}
        Path(out, "rank-0.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])

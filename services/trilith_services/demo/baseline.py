"""The same model in one process with plain torch embeddings: what a cluster is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from trilith.nn import auc
from trilith.runtime.machine import cores
from trilith_services.demo.click_model import ClickModel
from trilith_services.demo.clicks import ClickData, Parts
from trilith_services.demo.local import LocalEmbeddings
from trilith_services.demo.models import BATCH_SIZE, ModelSettings
from trilith_services.worker.events import Emit
from trilith_services.worker.meter import Meter

__all__ = ["Outcome", "best_threads", "train_locally"]

SPARSE_FROM = 100_000
"""Rows from which gradients of the touched rows only are faster than whole ones."""

TRIAL_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        auc: On the test part.
        samples_per_s: From the first step to the last, as a worker counts them.
        rows: Embedding rows.
        threads: torch threads used.
    """

    auc: float
    samples_per_s: float
    rows: int
    threads: int


def train_locally(
    settings: ModelSettings,
    parts: Parts,
    emit: Emit,
    *,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    epochs: int | None = None,
    steps: int = 0,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train and score.

    Args:
        settings: The model.
        parts: The data.
        emit: Is told how it goes.
        seed: Decides initial values and the order of samples.
        batch_size: Samples per step.
        epochs: Passes over the training part; None takes the settings'.
        steps: Ends training after so many steps; 0 is no limit.
        threads: torch threads; None tries which number is fastest.
        stop: Ends training early when it says so.
    """
    epochs = settings.epochs if epochs is None else epochs
    vocabulary = parts.train.vocabulary()
    rows = sum(ids.size for ids in vocabulary.values())

    def build() -> _Local:
        return _Local(settings, settings.locally(vocabulary, seed=seed, sparse=rows >= SPARSE_FROM))

    local = build()
    train, validation, test = (local.encode(part) for part in (parts.train, parts.validation, parts.test))
    before = torch.get_num_threads()
    used = best_threads(build, train, batch_size) if threads is None else threads
    torch.set_num_threads(used)
    try:
        total = -(-len(train) // batch_size) * epochs
        emit({"event": "start", "rank": 0, "total_steps": min(total, steps) if steps else total})
        meter = Meter()
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch, 0]).permutation(len(train))
            for batch in train.batches(batch_size, order=order):
                if stop() or (steps and meter.steps >= steps):
                    break
                scores, loss = local.step(batch)
                meter.add(batch.labels, scores, loss)
                if meter.due():
                    emit({"event": "progress", "rank": 0, "epoch": epoch, **meter.report()})
            score = auc(validation.labels, local.model.predict(validation))
            emit({"event": "validation", "rank": 0, "epoch": epoch + 1, "auc": score})
            if stop() or (steps and meter.steps >= steps):
                break
        summary = meter.summary()
        emit({"event": "progress", "rank": 0, "epoch": epochs, **summary})
        emit({"event": "done", "rank": 0, "samples": meter.samples})
        return Outcome(
            auc=auc(test.labels, local.model.predict(test)),
            samples_per_s=summary["samples_per_s"],
            rows=rows,
            threads=used,
        )
    finally:
        torch.set_num_threads(before)


class _Local:
    """A local model with its two optimizers."""

    def __init__(self, settings: ModelSettings, model: ClickModel[LocalEmbeddings]) -> None:
        self.model = model
        self.encode = model.embeddings.encode
        self._optimizers = [
            settings.torch_optimizer(model.embeddings.parameters(), dense=False),
            settings.torch_optimizer(model.head.parameters(), dense=True),
        ]

    def step(self, batch: ClickData) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], float]:
        """One step; returns the scores before it and the loss."""
        logits = self.model(batch.features)
        loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels))
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return logits.detach().numpy(), loss.item()


def best_threads(build: Callable[[], _Local], train: ClickData, batch_size: int) -> int:
    """The number of torch threads with which some steps of a throw-away model are fastest."""
    before = torch.get_num_threads()
    seconds = {}
    try:
        for threads in range(1, cores() + 1):
            torch.set_num_threads(threads)
            local = build()
            batches = [batch for batch, _ in zip(train.batches(batch_size), range(TRIAL_STEPS), strict=False)]
            local.step(batches[0])  # the first step allocates
            started = time.perf_counter()
            for batch in batches:
                local.step(batch)
            seconds[threads] = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return min(seconds, key=lambda threads: seconds[threads])

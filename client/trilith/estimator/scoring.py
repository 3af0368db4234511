"""Scorer: what a task gives for batches from which it does not learn, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilith.estimator.config import RunConfig
from trilith.estimator.features import Inputs
from trilith.estimator.group import Ranks
from trilith.estimator.metrics import Mean, Metric, merge_over_ranks, per_head, results
from trilith.estimator.rows import Prepared, TaskRows
from trilith.estimator.source import Source
from trilith.estimator.task import Task
from trilith.nn.optimization import Optimization

__all__ = ["Scorer"]


class Scorer:
    """Evaluates and predicts; creates no row and changes nothing.

    Args:
        run: What the run does.
        task: The model.
        rows: Its embeddings.
        optimization: Has the newest dense values.
        outputs: The task's, compiled or not.
        autocast: What the model computes in.
        ranks: Those whose metrics are merged.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        rows: TaskRows,
        optimization: Optimization,
        outputs: Callable[[Inputs], dict[str, Tensor]],
        autocast: Callable[[], AbstractContextManager[Any]],
        ranks: Ranks,
    ) -> None:
        self._run, self._task, self._rows, self._optimization = run, task, rows, optimization
        self._outputs, self._autocast, self._ranks = outputs, autocast, ranks

    def evaluate(
        self, source: Source, *, until: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], int] | None:
        """Metrics and loss of all ranks together, and how many samples this one looked at.

        Args:
            source: The batches.
            until: Asked behind each batch of a rank that is alone; when it is so, evaluation ends and gives None.

        Raises:
            TrilithError: Batches of a rank could not be scored; every rank raises it.
        """
        task = self._task
        metrics, samples = self._metrics(), 0
        with self._ranks.alike():
            for prepared, outputs in self._scored(source, self._run.evaluate_steps):
                labels, weight = self._rows.labels(prepared)
                loss = task.total(task.loss(outputs, labels, weight))
                metrics["loss"].add([float(loss)], weight=[prepared.samples])
                samples += prepared.samples
                if until() and not self._ranks.several:
                    return None
                for label, predicted in task.predictions(outputs).items():
                    for name in task.metrics:
                        metrics[f"{label}/{name}"].add(predicted.float(), labels[label], prepared.weight)
        return results(merge_over_ranks(metrics) if self._ranks.several else metrics), samples

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what `evaluate` finds."""
        return tuple(self._metrics())

    def _metrics(self) -> dict[str, Metric]:
        return {**per_head(self._task.metrics, self._task.labels), "loss": Mean()}

    def predict(self, source: Source) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Predictions batch by batch: by label float32[b]."""
        for _, outputs in self._scored(source, 0):
            found = self._task.predictions(outputs)
            yield {name: each.float().cpu().numpy() for name, each in found.items()}

    def _scored(self, source: Source, most: int) -> Iterator[tuple[Prepared, dict[str, Tensor]]]:
        """Batches with what the model gives for them."""
        task = self._task
        self._optimization.pull()
        was = task.training
        task.eval()
        batches = source.epoch(0)
        try:
            with torch.no_grad():
                loop = self._rows.prefetch(batches, self._run.prefetch)
            with loop:
                for number, (prepared, fetched) in enumerate(loop):
                    if most and number >= most:
                        return
                    if prepared is None:  # other ranks have more
                        fetched.result()
                        continue
                    task.eval()  # whoever takes the batches may train in between
                    with torch.no_grad(), self._autocast():
                        outputs = self._outputs(self._rows.inputs(prepared, fetched.result()))
                    yield prepared, outputs
        finally:
            batches.close()
            task.train(was)

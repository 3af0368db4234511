"""How training goes: what a batch taught, where its time went, and metrics of the newest samples."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trilith.estimator.metrics import per_head, results
from trilith.estimator.rows import Prepared
from trilith.estimator.task import Task

__all__ = ["Learned", "Progress", "Watch"]

_RECENT_SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Learned:
    """What a batch taught.

    Attributes:
        loss: Of the batch.
        losses: By label, where the task has one for each.
        outputs: Of the model, before it learned from the batch.
        batch: It.
        seconds: By phase.
    """

    loss: float
    losses: dict[str, float]
    outputs: Mapping[str, Tensor]
    batch: Prepared
    seconds: dict[str, float]


class Watch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was `phase`'s."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._at
        self._at = now


class Progress:
    """The newest batches of a run; their metrics are worked out when somebody looks, since most steps nobody does."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.samples = 0
        """Samples since the start."""
        self._first = self._last = (0, 0.0)  # samples and time behind the first batch and the last
        self._recent: deque[Learned] = deque()
        self._held = 0

    def add(self, learned: Learned) -> None:
        """Another batch."""
        self.samples += learned.batch.samples
        self._last = self.samples, time.perf_counter()
        if not self._recent:
            self._first = self._last
        self._recent.append(learned)
        self._held += learned.batch.samples
        while self._held - self._recent[0].batch.samples >= _RECENT_SAMPLES:
            self._held -= self._recent.popleft().batch.samples

    @property
    def samples_per_s(self) -> float:
        """From the first batch, before which there were compilation and connections, to the last."""
        (first, began), (samples, ended) = self._first, self._last
        return (samples - first) / (ended - began) if ended > began else 0.0

    def metrics(self) -> Mapping[str, float]:
        """Of the newest samples, by "LABEL/METRIC"."""
        return _Metrics(self._task, tuple(self._recent))


class _Metrics(Mapping[str, float]):
    """Metrics of some batches."""

    def __init__(self, task: Task, batches: tuple[Learned, ...]) -> None:
        self._task = task
        self._batches = batches
        self._found: dict[str, float] | None = None

    def _values(self) -> dict[str, float]:
        if self._found is None:
            metrics = per_head(self._task.metrics, self._task.labels)
            with torch.no_grad():
                for learned in self._batches:
                    batch = learned.batch
                    for label, predicted in self._task.predictions(learned.outputs).items():
                        for name in self._task.metrics:
                            metrics[f"{label}/{name}"].add(
                                predicted.detach().float(), batch.labels[label], batch.weight
                            )
            self._found = results(metrics)
        return self._found

    def __getitem__(self, name: str) -> float:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._task.metrics) * len(self._task.labels)

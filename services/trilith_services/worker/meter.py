"""How training goes: loss, AUC of the newest predictions, samples per second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.nn import auc

__all__ = ["Meter"]

WINDOW = 10_000
"""Samples that the live loss and AUC look back on."""


class Meter:
    """Sums up the newest samples. Their predictions were made before the model learned from them, so the AUC is honest.

    Args:
        clock: Source of seconds.
        every_s: How often `due` is true.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, every_s: float = 0.5) -> None:
        self._clock = clock
        self._every_s = every_s
        self._newest: deque[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float]] = deque()
        self._held = 0
        self._last_time = clock()
        self._last_samples = 0
        self._first_time = self._end_time = 0.0
        self._first_samples = 0
        self.samples = 0
        self.steps = 0

    def add(self, labels: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], loss: float) -> None:
        """Count one step: labels and scores float32[b], and its mean loss."""
        self._newest.append((labels, scores, loss))
        self._held += labels.size
        while self._held - self._newest[0][0].size >= WINDOW:
            self._held -= self._newest.popleft()[0].size
        self.samples += labels.size
        self.steps += 1
        self._end_time = self._clock()
        if self.steps == 1:  # before it there were compilation and connections
            self._first_time, self._first_samples = self._end_time, self.samples

    def due(self) -> bool:
        """Whether it is time for a report."""
        return self._clock() - self._last_time >= self._every_s

    def report(self) -> dict[str, Any]:
        """Loss and AUC of the newest samples; samples per second since the last report."""
        now = self._clock()
        passed = max(now - self._last_time, 1e-9)
        rate = (self.samples - self._last_samples) / passed
        self._last_time, self._last_samples = now, self.samples
        found: dict[str, Any] = {"samples": self.samples, "steps": self.steps, "samples_per_s": rate}
        if self._newest:
            labels = np.concatenate([labels for labels, _, _ in self._newest])
            scores = np.concatenate([scores for _, scores, _ in self._newest])
            found["loss"] = sum(loss * part.size for part, _, loss in self._newest) / labels.size
            found["auc"] = auc(labels, scores)
        return found

    def summary(self) -> dict[str, Any]:
        """The last report: samples per second from the first step to the last, as an Estimator counts them."""
        found = self.report()
        if self.steps > 1:
            passed = max(self._end_time - self._first_time, 1e-9)
            found["samples_per_s"] = (self.samples - self._first_samples) / passed
        return found

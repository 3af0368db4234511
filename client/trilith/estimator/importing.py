"""Imported: an export of a task, scored with the task's own batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from trilith.data.records import Kind, Records
from trilith.estimator.exporting import records_of
from trilith.estimator.rows import Prepared
from trilith.estimator.task import Task
from trilith.runtime.registered import registered
from trilith_proto.example_pb2 import Example

__all__ = ["Imported"]


class Imported:
    """Scores batches with an export, as an entry that serves it would.

    Args:
        path: A version, or a directory of them: its newest.
        task: Whose batches are scored.
        prepare: Takes from a batch what the task wants.
        replicas: Where the rows of a distributed export are, as of `trilith serving entry --replicas`.

    Attributes:
        path: Of the version.
        version: Its number.
        step: Of the checkpoint that it was made of.

    Raises:
        InvalidRequestError: Nothing is registered that could read it, or it is distributed without replicas.
        CheckpointError: There is none, or it is damaged.
    """

    def __init__(
        self, path: str, task: Task, prepare: Callable[[Any], Prepared], *, replicas: Sequence[str] = ()
    ) -> None:
        self._opened: Any = registered("importer", "no importer", "exports need")(path, replicas=replicas)
        self._task, self._prepare = task, prepare
        self.path: str = self._opened.path
        self.version: int = self._opened.version
        self.step: int = self._opened.step

    def __call__(self, batch: Any, *, signature: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Score a batch in any form that the task takes, or `Records`; by output float32[n], or [n, k]."""
        if not isinstance(batch, Records):
            prepared = self._prepare(batch)
            columns = records_of(self._task, prepared, prepared.samples)
            batch = Records.of([_example(each).SerializeToString() for each in columns], Kind.EXAMPLE)
        found: dict[str, np.ndarray[Any, Any]] = self._opened.predict(batch, signature=signature)
        return found

    def close(self) -> None:
        """Let go of its rows."""
        self._opened.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Close."""
        self.close()


def _example(sample: dict[str, list[Any]]) -> Example:
    """A sample as a record. Whole numbers, which may be ids and dense values at once, are 64 bits with a sign there."""
    example = Example()
    for name, values in sample.items():
        feature = example.named_feature.add(name=name).feature
        if values and isinstance(values[0], int):
            feature.int64_list.value.extend(each - (1 << 64) if each >= 1 << 63 else each for each in values)
        elif values:
            feature.float_list.value.extend(values)
    return example

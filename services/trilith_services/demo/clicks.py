"""Click data in memory: labels, and per feature the ids of every sample as a ragged array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["ClickData", "Parts", "split"]

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClickData:
    """Labelled samples.

    Attributes:
        labels: float32[n], 0 or 1.
        features: Per feature name, n lists of ids.
    """

    labels: Float32Array
    features: Mapping[str, Ragged[np.uint64]]

    def __post_init__(self) -> None:
        for name, ragged in self.features.items():
            ragged.check()
            if len(ragged) != self.labels.size:
                raise InvalidRequestError(f"feature {name!r} has {len(ragged)} samples, the labels {self.labels.size}")

    def __len__(self) -> int:
        return self.labels.size

    def take(self, rows: Int64Array) -> ClickData:
        """Return the samples `rows`, int64[m], in that order."""
        return ClickData(self.labels[rows], {name: ragged.take(rows) for name, ragged in self.features.items()})

    def batches(self, batch_size: int, *, order: Int64Array | None = None) -> Iterator[ClickData]:
        """Cut the samples into batches; the last may be smaller.

        Args:
            batch_size: Samples per batch.
            order: int64[m] samples to visit; all, in order, if None.
        """
        rows = np.arange(len(self)) if order is None else order
        for start in range(0, rows.size, batch_size):
            yield self.take(rows[start : start + batch_size])

    def columns(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """The samples in order, as batches that an Estimator takes: ids by feature, and the label "click"."""
        for batch in self.batches(batch_size):
            yield {**batch.features, "click": batch.labels}

    def vocabulary(self) -> dict[str, UInt64Array]:
        """Per feature the distinct ids, uint64[n], ascending."""
        return {name: np.unique(ragged.values) for name, ragged in self.features.items()}


@dataclass(frozen=True, slots=True)
class Parts:
    """What is learned from, what settings are chosen on, and what is only looked at in the end."""

    train: ClickData
    validation: ClickData
    test: ClickData


def split(data: ClickData, seed: int) -> Parts:
    """Cut into 80 % training, 10 % validation and 10 % test samples at random; `seed` decides."""
    order = np.random.default_rng(seed).permutation(len(data))
    eighty, ninety = len(data) * 8 // 10, len(data) * 9 // 10
    return Parts(data.take(order[:eighty]), data.take(order[eighty:ninety]), data.take(order[ninety:]))

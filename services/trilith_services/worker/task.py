"""What a worker trains: a model, the samples that it learns from and is scored on, and its optimizers, as values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.nn import EmbeddingCollection, FetchedRows
from trilith.nn.bags import IdsLike
from trilith.rows import Rows
from trilith.tables import Optimizer

__all__ = ["Batch", "Build", "Model", "Samples", "Task"]

Float32Array = npt.NDArray[np.float32]
_B_co = TypeVar("_B_co", bound="Batch", covariant=True)


class Batch(Protocol):
    """Some samples."""

    @property
    def labels(self) -> Float32Array:
        """float32[n], 0 or 1."""

    @property
    def features(self) -> Mapping[str, IdsLike]:
        """Ids by feature."""


class Samples(Protocol[_B_co]):
    """The samples to learn from, or a share of them."""

    def __len__(self) -> int:
        """How many."""

    def shard(self, index: int, count: int) -> Samples[_B_co]:
        """Every `count`-th, from `index` on."""

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, samples: int | None = None, skip: int = 0
    ) -> Iterator[_B_co]:
        """Batches of one pass without the first `skip`, in an order that seed, epoch and share decide."""


class Model(Protocol):
    """A model on a cluster."""

    @property
    def embeddings(self) -> EmbeddingCollection:
        """Where its rows are."""

    @property
    def head(self) -> nn.Module:
        """Its dense part."""

    def __call__(self, rows: FetchedRows, /) -> Tensor:
        """Logits float32[n]."""

    def predict(self, samples: Any, /) -> Float32Array:
        """Probabilities float32[n], without learning anything."""


class Build(Protocol):
    """Makes the model on a cluster, its tables too if need be."""

    def __call__(self, client: Rows, *, seed: int, device: torch.device, async_push: int) -> Model:
        """`seed` decides initial values; `async_push` updates of the embeddings may be on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model with its data.

    Attributes:
        name: What lookups are timed under.
        build: Makes the model.
        features: Names of its features.
        train: What it learns from.
        validation: What it is scored on after every epoch.
        epochs: Passes over `train`, where the worker's configuration does not say.
        dense_optimizer: Steps the dense part on the PS.
        torch_optimizer: The same for parameters in this process.
    """

    name: str
    build: Build
    features: tuple[str, ...]
    train: Samples[Batch]
    validation: Batch
    epochs: int
    dense_optimizer: Optimizer
    torch_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

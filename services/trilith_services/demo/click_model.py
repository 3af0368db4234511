"""Embeddings and a head together: from a batch's ids to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.nn.bags import IdsLike
from trilith.nn.embedding import FetchedRows
from trilith_services.demo.clicks import ClickData

__all__ = ["ClickModel", "StackedEmbeddings"]


class StackedEmbeddings(Protocol):
    """`EmbeddingCollection`, `LocalEmbeddings`, or anything else that embeds a batch."""

    def stacked(self, batch: Any) -> Tensor:
        """float32[b, F, dim], for ids by feature or whatever else the embeddings take."""


_E = TypeVar("_E", bound=StackedEmbeddings)


class ClickModel(nn.Module, Generic[_E]):
    """A click model whose embeddings may live anywhere.

    Args:
        embeddings: Embeds a batch.
        head: `FFM`, `DeepFM`, or any module from float32[b, F, dim] to logits float32[b].
    """

    def __init__(self, embeddings: _E, head: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.head = head

    def forward(self, batch: Mapping[str, IdsLike] | FetchedRows) -> Tensor:
        """Return logits float32[b]."""
        logits: Tensor = self.head(self.embeddings.stacked(batch))
        return logits

    def predict(self, data: ClickData, *, batch_size: int = 4096) -> npt.NDArray[np.float32]:
        """Return click probabilities float32[n], without learning anything."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                parts = [torch.sigmoid(self(batch.features)).cpu().numpy() for batch in data.batches(batch_size)]
        finally:
            self.train(training)
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

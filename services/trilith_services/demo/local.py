"""The same features in this process's memory, as plain `torch.nn.EmbeddingBag`: what a cluster is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.errors import InvalidRequestError
from trilith.nn.bags import IdsLike, as_bags
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData

__all__ = ["LocalEmbeddings"]


class LocalEmbeddings(nn.Module):
    """One `torch.nn.EmbeddingBag` over the whole vocabulary; `encode` turns ids into its row numbers once.

    Row 0 stands for ids outside the vocabulary, is zero and stays so: a cluster's answer for an id without a row.

    Args:
        vocabulary: Per feature its ids, uint64[v], ascending and distinct.
        dim: Floats per row.
        init: Rows start uniform in -init..init.
        sparse: Whether gradients hold the touched rows only; worth it for large vocabularies.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, npt.NDArray[np.uint64]],
        dim: int,
        *,
        init: float = 0.05,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self._vocabulary = dict(vocabulary)
        self._base: dict[str, int] = {}
        rows = 1
        for name, ids in self._vocabulary.items():
            self._base[name] = rows
            rows += ids.size
        self.bag = nn.EmbeddingBag(rows, dim, mode="mean", padding_idx=0, sparse=sparse)
        with torch.no_grad():
            self.bag.weight.uniform_(-init, init)
            self.bag.weight[0] = 0

    def set_rows(self, rows: npt.NDArray[np.float32]) -> None:
        """Take over float32[rows, dim] for the whole vocabulary, feature after feature."""
        with torch.no_grad():
            self.bag.weight[1:] = torch.from_numpy(rows)

    def encode(self, data: ClickData) -> ClickData:
        """The same samples with row numbers for ids."""
        features = {}
        for name, ragged in data.features.items():
            known = self._vocabulary[name]
            place = np.minimum(np.searchsorted(known, ragged.values), max(known.size - 1, 0))
            found = known[place] == ragged.values if known.size else np.zeros(ragged.values.size, np.bool_)
            rows = np.where(found, place + self._base[name], 0)
            features[name] = Ragged(rows.astype(np.uint64), ragged.row_splits)
        return ClickData(data.labels, features)

    def stacked(self, batch: Mapping[str, IdsLike]) -> Tensor:
        """Return float32[b, F, dim] for an encoded batch."""
        if batch.keys() != self._vocabulary.keys():
            raise InvalidRequestError(f"the batch has features {sorted(batch)}, not {sorted(self._vocabulary)}")
        bags = [as_bags(batch[name]) for name in self._vocabulary]
        lengths = np.concatenate([feature.lengths for feature in bags])
        rows = np.concatenate([feature.values for feature in bags]).view(np.int64)
        starts = np.cumsum(lengths) - lengths
        vectors: Tensor = self.bag(torch.from_numpy(rows), torch.from_numpy(starts))
        return vectors.view(len(bags), len(bags[0]), -1).transpose(0, 1)

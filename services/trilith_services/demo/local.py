"""A click model in this process's memory, with plain `torch.nn.EmbeddingBag`: what a cluster is measured against."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.connect import connect
from trilith.errors import InvalidRequestError
from trilith.estimator import Task
from trilith.estimator.rows import TaskRows
from trilith.nn.bags import IdsLike, as_bags
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData

__all__ = ["LocalEmbeddings", "LocalModel", "initial_rows"]


class LocalEmbeddings(nn.Module):
    """One `torch.nn.EmbeddingBag` over the whole vocabulary; `encode` turns ids into its row numbers once.

    Row 0 stands for ids outside the vocabulary, is zero and stays so: a cluster's answer for an id without a row.

    Args:
        vocabulary: Per feature its ids, uint64[v], ascending and distinct.
        rows: float32[rows, dim], what those of the vocabulary begin with, feature after feature.
        sparse: Whether gradients hold the touched rows only; worth it for large vocabularies.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, npt.NDArray[np.uint64]],
        rows: npt.NDArray[np.float32],
        *,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self._vocabulary = dict(vocabulary)
        self._base: dict[str, int] = {}
        count = 1
        for name, ids in self._vocabulary.items():
            self._base[name] = count
            count += ids.size
        weight = torch.cat([torch.zeros(1, rows.shape[1]), torch.from_numpy(rows)])
        self.bag = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="mean", padding_idx=0, sparse=sparse)

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

    def forward(self, batch: Mapping[str, IdsLike]) -> Tensor:
        """Return float32[b, F, dim] for an encoded batch."""
        if batch.keys() != self._vocabulary.keys():
            raise InvalidRequestError(f"the batch has features {sorted(batch)}, not {sorted(self._vocabulary)}")
        bags = [as_bags(batch[name]) for name in self._vocabulary]
        lengths = np.concatenate([feature.lengths for feature in bags])
        rows = np.concatenate([feature.values for feature in bags]).view(np.int64)
        starts = np.cumsum(lengths) - lengths
        vectors: Tensor = self.bag(torch.from_numpy(rows), torch.from_numpy(starts))
        return vectors.view(len(bags), len(bags[0]), -1).transpose(0, 1)


class LocalModel(nn.Module):
    """What a click task computes, from embeddings in this process.

    Args:
        task: Has a `head` from float32[b, F, dim] to logits float32[b], of which a copy is taken; it is built.
        embeddings: Of its features, each row a weight and a vector.
    """

    def __init__(self, task: Task, embeddings: LocalEmbeddings) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.head = copy.deepcopy(task.get_submodule("head"))

    def forward(self, batch: Mapping[str, IdsLike]) -> Tensor:
        """Return logits float32[b] for an encoded batch."""
        logits: Tensor = self.head(self.embeddings(batch))
        return logits


def initial_rows(task: Task, vocabulary: Mapping[str, npt.NDArray[np.uint64]]) -> npt.NDArray[np.float32]:
    """What rows of a task's only table begin with on a cluster: float32[rows, dim], feature after feature.

    Initial values alone move the test AUC by 0.001; starting from the same ones leaves what the cluster does.
    """
    ids = np.concatenate(list(vocabulary.values()))
    with connect("local://") as store:
        (name,) = set(TaskRows(task, store).tables.values())
        table = store.table(name)
        table.assign_add(ids, np.zeros((ids.size, table.dim), np.float32))  # creates the rows
        found: npt.NDArray[np.float32] = table.lookup(ids)
    return found

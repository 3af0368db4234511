"""TaskRows: a task's features on a cluster: their tables, one lookup for a batch, the tensors that the model takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.data.parse.specs import Dense
from trilith.errors import InvalidRequestError
from trilith.estimator.batches import DenseColumn, IdColumn, LabelColumn, Wanted, arrange, columns_of
from trilith.estimator.features import Embedding, Inputs, Pooled, Rows, Sequence
from trilith.estimator.task import Task
from trilith.nn import EmbeddingCollection, Feature, FetchedRows
from trilith.nn.bags import plain
from trilith.ops.combiners import Combiner, FirstN, combiner_of
from trilith.ops.ragged import Ragged
from trilith.pipelining import Lane, Prefetcher
from trilith.tables import TableSpec
from trilith.times import latest

__all__ = ["Prepared", "TaskRows", "combiner_of_feature"]

_OF_A_VIEW = ("pooling", "feature", "weights", "base", "table")
"""What features of one table may have of their own."""
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as a task takes it, before its rows are looked up.

    Attributes:
        ids: By feature its bags; those of sequences cut to their newest ids.
        weights: By feature float32[n], of its ids; of those that have weights.
        dense: By feature float32[b, dim].
        labels: By label float32[b], NaN where there is none.
        weight: float32[b], of the samples; None: all 1.
        samples: b.
        rest: Columns that the task has no use for.
        newest: The latest time of the samples, Unix seconds; None where the task asks for none, or there is none.
    """

    ids: dict[str, Ragged[np.uint64]]
    weights: dict[str, Float32Array]
    dense: dict[str, Tensor]
    labels: dict[str, Tensor]
    weight: Tensor | None
    samples: int
    rest: Mapping[str, Any]
    newest: int | None = None


class TaskRows:
    """The embeddings of a task's features.

    Args:
        task: Whose features.
        client: The cluster; tables that it lacks are created.
        device: Where the model computes.
        async_push: How many updates may be on their way; 0 waits for each.
        lane: Makes lookups ahead and updates, in the order of the loop.
    """

    def __init__(
        self,
        task: Task,
        client: Any,
        *,
        device: torch.device | str = "cpu",
        async_push: int = 0,
        lane: Lane | None = None,
    ) -> None:
        self.task = task
        self._owners = _owners(task)
        self._wanted = _wanted(task)
        specs = {name: base.spec(name) for name, base in self._owners.items()}
        _check_shared(self._owners, specs)
        tables = client.create_tables(list({spec.name: spec for spec in specs.values()}.values())) if specs else {}
        self.tables = {name: spec.name for name, spec in specs.items()}
        """By feature that owns a table, the table's name."""
        self.floats = {
            specs[name].name: (1, base.dim) if base.bias else (base.dim,) for name, base in self._owners.items()
        }
        """By table the floats of a row, segment by segment."""
        features = {
            name: Feature(tables[self.table_of(name)], combiner_of_feature(feature))
            for name, feature in self._sparse().items()
        }
        self.device = torch.device(device)
        self._none = torch.zeros((), device=self.device)
        """A bias of rows that have none."""
        self.collection = (
            EmbeddingCollection(client, features, device=device, async_push=async_push, lane=lane) if features else None
        )

    def _sparse(self) -> dict[str, Embedding | Sequence]:
        return {name: each for name, each in self.task.features.items() if not isinstance(each, Dense)}

    def table_of(self, name: str) -> str:
        """Name of the table in which a feature is looked up."""
        task = self.task
        feature = task.features[name]
        base = feature.base if isinstance(feature, (Embedding, Sequence)) else None
        while base is not None and base.base is not None:
            base = base.base
        owner = next(each for each, known in task.features.items() if known is (base or feature))
        return self.tables[owner]

    # ---- batches -----------------------------------------------------------------------------------------------------

    def prepare(self, batch: Any, *, labels: bool = True) -> Prepared:
        """Take from a batch what the task wants.

        Args:
            batch: In any form that `trilith.estimator.arrange` takes.
            labels: Whether it must have labels.

        Raises:
            InvalidRequestError: Something is missing, or does not have the right shape.
        """
        task = self.task
        columns = columns_of(batch)
        given = arrange(columns, self._wanted, labels=labels)
        task.texts |= given.texts
        ids = dict(given.ids)
        for name, feature in self._sparse().items():
            if isinstance(feature, Sequence):
                ids[name] = ids[name].last(feature.length)
        found = {name: each.masked_fill(~given.masks[name], torch.nan) for name, each in given.labels.items()}
        weights = {name: each for name, each in given.weights.items() if isinstance(task.features[name], Embedding)}
        dense = dict(given.dense)
        weight = dense.pop(task.sample_weight)[:, 0] if task.sample_weight else None
        newest = _newest(task, columns)
        return Prepared(ids, weights, dense, found, weight, given.rows, given.rest, newest)

    def request_time(self, prepared: Prepared) -> int:
        """When the rows of a batch are last updated: the latest time of its samples, Unix seconds.

        Raises:
            InvalidRequestError: The batch has no such column.
        """
        if prepared.newest is None:
            raise InvalidRequestError(f"a batch has no {self.task.request_time!r}, by which its rows are to expire")
        return prepared.newest

    def prefetch(
        self, batches: Iterable[Prepared | None], depth: int, *, lookup_queue: int = 0
    ) -> Prefetcher[Prepared | None, FetchedRows | None]:
        """Go over batches with their rows looked up, `depth` of them ahead; of None, a lookup of no ids."""
        collection = self.collection
        if collection is None:
            return Prefetcher(batches, lambda _: None, depth)
        none = {name: Ragged(np.empty(0, np.uint64), np.zeros(1, np.int64)) for name in self._sparse()}
        return collection.prefetch(  # type: ignore[return-value]
            batches,
            depth,
            ids=lambda batch: none if batch is None else batch.ids,
            weights=lambda batch: {} if batch is None else batch.weights,
            lookup_queue=lookup_queue,
        )

    def fetch(self, prepared: Prepared) -> FetchedRows | None:
        """Look a batch's rows up now."""
        return None if self.collection is None else self.collection.fetch(prepared.ids, weights=prepared.weights)

    def inputs(self, prepared: Prepared, fetched: FetchedRows | None) -> Inputs:
        """What the model takes of a batch."""
        task = self.task
        vectors = {}
        if self.collection is not None and fetched is not None:
            vectors = self.collection(replace(fetched, once=True))
        values: dict[str, Any] = {}
        for name, feature in task.features.items():
            if isinstance(feature, Dense):
                values[name] = prepared.dense[name].to(self.device)
            elif isinstance(feature, Sequence):
                bias = int(feature.base.bias)
                lengths = torch.from_numpy(prepared.ids[name].lengths).to(self.device)
                mask = torch.arange(feature.length, device=self.device) < lengths[:, None]
                values[name] = Rows(vectors[name][..., bias:], mask)
            else:
                vector = vectors[name]
                if feature.bias:
                    values[name] = Pooled(vector[:, 1:], vector[:, 0])
                else:  # nothing is cut off, and nothing is put together again in the backward pass
                    values[name] = Pooled(vector, self._none.expand(len(vector)))
        return Inputs(values)

    def labels(self, prepared: Prepared) -> tuple[dict[str, Tensor], Tensor | None]:
        """Labels, and weights of the samples, as tensors on the device."""
        found = {name: each.to(self.device) for name, each in prepared.labels.items()}
        return found, None if prepared.weight is None else prepared.weight.to(self.device)


def _owners(task: Task) -> dict[str, Embedding]:
    """Features that have a table of their own."""
    return {name: each for name, each in task.features.items() if isinstance(each, Embedding) and each.base is None}


def _check_shared(owners: Mapping[str, Embedding], specs: Mapping[str, TableSpec]) -> None:
    """Refuse features of one table that want different rows."""
    first: dict[str, str] = {}
    for name, spec in specs.items():
        other = first.setdefault(spec.name, name)
        if spec == specs[other]:
            continue
        one, two = owners[other], owners[name]
        names = [each.name for each in dataclasses.fields(Embedding) if each.name not in _OF_A_VIEW]
        odd = [each for each in names if getattr(one, each) != getattr(two, each)]
        said = ", ".join(f"{each}={getattr(one, each)!r} and {getattr(two, each)!r}" for each in odd)
        raise InvalidRequestError(
            f"features {other!r} and {name!r} are of one table, {spec.name!r}, with {said}; give both the same, or "
            f"write {name} = {other}.view()"
        )


def _newest(task: Task, columns: Mapping[str, Any]) -> int | None:
    """The latest time of a batch's samples; None where there is no such column."""
    if not task.request_time or task.request_time not in columns:
        return None
    values = columns[task.request_time]
    values = values if isinstance(values, Ragged) else plain(values)
    times = np.asarray(values.values if isinstance(values, Ragged) else values)
    if times.dtype.kind == "M":
        times = times.astype("datetime64[s]").astype(np.int64)
    return latest(times, time.time(), task.request_time)


def combiner_of_feature(feature: Embedding | Sequence) -> Combiner:
    """How a feature's rows become what the model takes."""
    return FirstN(feature.length) if isinstance(feature, Sequence) else combiner_of(feature.pooling)


def _wanted(task: Task) -> Wanted:
    """What a task wants of a batch."""
    ids, dense = {}, {}
    for name, feature in task.features.items():
        if isinstance(feature, Dense):
            fit = feature.lengths == "fit"
            columns = (feature.feature or name,)
            dense[name] = DenseColumn(dim=feature.dim, columns=columns, fill=0.0 if fit else None, cut=fit)
        else:
            weights = feature.weights if isinstance(feature, Embedding) else ""
            ids[name] = IdColumn(column=feature.feature or name, weights=weights)
    if task.sample_weight:
        dense[task.sample_weight] = DenseColumn(columns=(task.sample_weight,))
    low, high = task.label_range
    labels = {name: LabelColumn(column=each.feature or name, low=low, high=high) for name, each in task.labels.items()}
    return Wanted(ids=ids, dense=dense, labels=labels)

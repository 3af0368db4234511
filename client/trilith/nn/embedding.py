"""Embeddings that live in a cluster as torch modules: forward looks rows up, backward applies their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.nn.anchored import Anchored, outside_graphs
from trilith.nn.bags import IdsLike, as_bags, as_ids, is_keyed, read_keyed
from trilith.nn.bridge import Bridge, pick_device
from trilith.nn.exchange import Exchange, RowClient
from trilith.nn.lookups import FetchedRows, Lookup, Output, Step
from trilith.nn.pooling import PooledRows, make_pooling
from trilith.ops.combiners import Combiner, CombinerLike, combiner_of
from trilith.ops.ragged import Ragged
from trilith.pipelining import Lane, Prefetcher

__all__ = ["EmbeddingBag", "EmbeddingCollection", "EmbeddingRows", "Feature", "FetchedRows", "TableLike"]

_T = TypeVar("_T")
Weights = Mapping[str, npt.NDArray[np.float32]]


class TableLike(Protocol):
    """What a module needs to know of a table: `trilith.Table` has it."""

    @property
    def name(self) -> str:
        """Name in the cluster."""

    @property
    def dim(self) -> int:
        """Floats per row."""

    @property
    def client(self) -> Any:
        """The cluster's client."""


@dataclass(frozen=True, slots=True, init=False)
class Feature:
    """Which table a feature is looked up in, and how its bags become vectors."""

    table: TableLike
    combiner: Combiner

    def __init__(self, table: TableLike, combiner: CombinerLike = "mean") -> None:
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "combiner", combiner_of(combiner))

    def bags(self, ids: IdsLike) -> Ragged[np.uint64]:
        """The bags of a batch, without the ids that the combiner has no place for."""
        bags = as_bags(ids)
        return bags.first(self.combiner.n) if self.combiner.n else bags


class _ClusterModule(Anchored):
    """What the modules share: the exchange with the cluster and the device.

    A copy of a module has the same rows, and a thread of its own for its pushes.
    """

    def __init__(
        self,
        client: RowClient,
        *,
        device: str | torch.device | None = "cpu",
        init_missing: bool = False,
        bridge: Bridge | None = None,
        async_push: int = 0,
        lane: Lane | None = None,
    ) -> None:
        super().__init__(Bridge(pick_device(device)) if bridge is None else bridge)
        self.exchange = Exchange(client, init_missing=init_missing, async_push=async_push, lane=lane)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Of the tables that are looked up in."""
        raise NotImplementedError

    def accumulate(self) -> AbstractContextManager[None]:
        """Sum the gradients of every backward pass inside into one step, sent at the end."""
        return self.exchange.accumulate()

    def drain(self) -> None:
        """Wait until all gradients have been applied; raises what a push in the background ended with."""
        self.exchange.drain()

    def close(self) -> None:
        """End the thread that pushes; drain first to lose nothing."""
        self.exchange.pusher.close()

    def _run(
        self, step: Step, rows: Mapping[str, npt.NDArray[np.float32]] | None = None, *, once: bool = False
    ) -> tuple[Tensor, ...]:
        """The vectors of a step; `rows` where they were looked up before, which unless `once` may be used again."""
        found = step.fetch() if rows is None else rows
        outputs: tuple[Tensor, ...] = Lookup.apply(  # type: ignore[no-untyped-call]
            self.anchor, step, found, self.training, rows is None or once
        )
        return self._cast(outputs)


class EmbeddingRows(_ClusterModule):
    """A table as `torch.nn.Embedding`: one row per id, whatever the ids' shape.

    Args:
        table: A table of an open client.
        device: Where the rows shall be; "auto" takes CUDA where there is one.
        init_missing: Create rows of unknown ids at their first lookup rather than at their first step.
        bridge: Takes the place of the one that `device` would make.
    """

    def __init__(
        self,
        table: TableLike,
        *,
        device: str | torch.device | None = "cpu",
        init_missing: bool = False,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(table.client, device=device, init_missing=init_missing, bridge=bridge)
        self.table = table

    @property
    def table_names(self) -> tuple[str, ...]:
        """Of the table."""
        return (self.table.name,)

    @outside_graphs
    def forward(self, ids: Tensor | npt.NDArray[Any]) -> Tensor:
        """Return float32[*ids.shape, dim]."""
        array = as_ids(ids)
        flat = array.reshape(-1)
        name = self.table.name
        output = Output(name, 0, flat.size, PooledRows(None, None))
        (rows,) = self._run(Step(self.exchange, self.bridge, {name: flat}, [output], self._learns()))
        return rows.view(*array.shape, self.table.dim)

    def extra_repr(self) -> str:
        """Table and dim."""
        return f"{self.table.name!r}, dim={self.table.dim}"


class EmbeddingBag(_ClusterModule):
    """A table as `torch.nn.EmbeddingBag`: one vector per bag of ids; an empty bag gives zeros.

    Args:
        table: A table of an open client.
        combiner: "sum", "mean", "sqrtn", "max" or `FirstN(n)`.
        device: Where the vectors shall be; "auto" takes CUDA where there is one.
        init_missing: Create rows of unknown ids at their first lookup rather than at their first step.
        bridge: Takes the place of the one that `device` would make.
    """

    def __init__(
        self,
        table: TableLike,
        *,
        combiner: CombinerLike = "mean",
        device: str | torch.device | None = "cpu",
        init_missing: bool = False,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(table.client, device=device, init_missing=init_missing, bridge=bridge)
        self.table = table
        self.combiner = combiner_of(combiner)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Of the table."""
        return (self.table.name,)

    @outside_graphs
    def forward(
        self,
        ids: IdsLike,
        offsets: Tensor | npt.NDArray[Any] | None = None,
        *,
        row_splits: Tensor | npt.NDArray[Any] | None = None,
        lengths: Tensor | npt.NDArray[Any] | None = None,
    ) -> Tensor:
        """Return float32[b, dim], with FirstN(n) float32[b, n, dim]; `as_bags` says which forms of ids there are."""
        bags = as_bags(ids, offsets, row_splits=row_splits, lengths=lengths)
        if self.combiner.n:
            bags = bags.first(self.combiner.n)
        pooling = make_pooling([bags.lengths], [self.combiner], self.bridge.to_device)
        name = self.table.name
        output = Output(name, 0, bags.values.size, pooling)
        (vectors,) = self._run(Step(self.exchange, self.bridge, {name: bags.values}, [output], self._learns()))
        return vectors

    def extra_repr(self) -> str:
        """Table, dim and combiner."""
        return f"{self.table.name!r}, dim={self.table.dim}, combiner={str(self.combiner)!r}"


class EmbeddingCollection(_ClusterModule):
    """All features of a model: one lookup per forward and one push per backward, however many tables there are.

    Lookup and push can overlap with the model's computation: `prefetch` goes over batches whose rows it has looked up
    already, and with `async_push` the backward pass does not wait for its gradients to be applied. `trilith.pipelining`
    says what staleness that costs. Without both, every step sees all steps before it.

    Args:
        client: The cluster that holds the tables.
        features: By name; several may share a table.
        device: Where the vectors shall be; "auto" takes CUDA where there is one.
        init_missing: Create rows of unknown ids at their first lookup rather than at their first step.
        bridge: Takes the place of the one that `device` would make.
        async_push: How many updates may be on their way; 0 waits for each. `drain` waits for all.
        lane: Makes lookups ahead and updates in the order of the loop: runs are then reproducible. None: a thread each.
    """

    def __init__(
        self,
        client: RowClient,
        features: Mapping[str, Feature],
        *,
        device: str | torch.device | None = "cpu",
        init_missing: bool = False,
        bridge: Bridge | None = None,
        async_push: int = 0,
        lane: Lane | None = None,
    ) -> None:
        super().__init__(
            client, device=device, init_missing=init_missing, bridge=bridge, async_push=async_push, lane=lane
        )
        if not features:
            raise InvalidRequestError("a collection needs at least one feature")
        given: Mapping[str, object] = features
        if odd := [name for name, feature in given.items() if not isinstance(feature, Feature)]:
            kind = type(given[odd[0]]).__name__
            raise InvalidRequestError(f"feature {odd[0]!r} is a {kind}; write Feature(table, combiner)")
        for name, feature in features.items():
            if client.origin != feature.table.client.origin:
                raise InvalidRequestError(
                    f"feature {name!r}: table {feature.table.name!r} is of another client than the collection's, and "
                    "would be looked up where that name means another table; take it from the collection's client"
                )
        self.features = dict(features)
        # Features of one table lie together, those that add rows first: these become vectors in one operation.
        self._by_table: dict[str, tuple[list[str], list[str]]] = {}
        for name, feature in self.features.items():
            pooled, first = self._by_table.setdefault(feature.table.name, ([], []))
            (pooled if feature.combiner.adds else first).append(name)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Of the tables, in the order of the features."""
        return tuple(self._by_table)

    def fetch(self, batch: Mapping[str, IdsLike], *, weights: Weights | None = None) -> FetchedRows:
        """Look a batch up now, to go through the model later; may be called in another thread.

        Args:
            batch: Ids of every feature, in any form of `as_bags` that stands alone; one number of samples for all. Or a
                torchrec KeyedJaggedTensor, with or without weights.
            weights: float32[n] of the ids of pooled features that have them; see `trilith.nn.pooling.make_pooling`.
        """
        return self._fetch(batch, self._learns(), weights)

    def _fetch(self, batch: Mapping[str, IdsLike], create: bool, weights: Weights | None = None) -> FetchedRows:
        step, groups, samples = self._plan(batch, create, weights or {})
        return FetchedRows(step, step.fetch(), groups, samples)

    def prefetch(
        self,
        batches: Iterable[_T],
        depth: int,
        *,
        ids: Callable[[_T], Mapping[str, IdsLike]],
        weights: Callable[[_T], Weights] | None = None,
        lookup_queue: int = 0,
    ) -> Prefetcher[_T, FetchedRows]:
        """Go over batches with their rows looked up, `depth` of them ahead.

        Over the iterator of a dataset, `state_dict` of what is returned, or of the iterator, says where the loop is.

        Args:
            batches: Anything.
            depth: 0 looks every batch up when it is taken.
            ids: Gives the ids of a batch.
            weights: Gives their weights, as `fetch` takes them.
            lookup_queue: Where the workers hold the rows: batches whose rows their owners have found, and that wait to
                travel. Rows then lack up to `lookup_queue + 1` updates more.
        """
        if not lookup_queue:
            # The thread that looks up has a grad mode of its own: what counts is the caller's.
            with_grad = torch.is_grad_enabled()

            def fetch(batch: _T) -> FetchedRows:
                return self._fetch(ids(batch), self._learns() and with_grad, weights(batch) if weights else None)

            return Prefetcher(batches, fetch, depth, lane=self.exchange.lane)
        found = Prefetcher(
            batches, lambda batch: self._begin(ids(batch), weights(batch) if weights else {}), lookup_queue
        )
        return found.then(lambda bring: bring(), depth)

    def _begin(self, batch: Mapping[str, IdsLike], weights: Weights) -> Callable[[], FetchedRows]:
        """Have a batch's rows found; the call that is returned brings them."""
        step, groups, samples = self._plan(batch, False, weights)
        bring = self.exchange.begin(step.ids)
        return lambda: FetchedRows(step, bring(), groups, samples)

    @outside_graphs
    def forward(self, batch: Mapping[str, IdsLike] | FetchedRows) -> dict[str, Tensor]:
        """Return per feature float32[b, dim], with FirstN(n) float32[b, n, dim].

        Args:
            batch: Ids as for `fetch`, or what `fetch` made of them.
        """
        vectors: dict[str, Tensor] = {}
        for names, output in self._look_up(batch):
            vectors.update(zip(names, output, strict=True))
        return {name: vectors[name] for name in self.features}

    @outside_graphs
    def stacked(self, batch: Mapping[str, IdsLike] | FetchedRows) -> Tensor:
        """Return float32[b, F, dim], the features in order; all must be pooled and of one dim."""
        groups = list(self._look_up(batch))
        if len(groups) == 1 and groups[0][0] == list(self.features) and groups[0][1].ndim == 3:
            return groups[0][1].transpose(0, 1)
        vectors = {name: vector for names, output in groups for name, vector in zip(names, output, strict=True)}
        shapes = {name: tuple(vectors[name].shape) for name in self.features}
        if len(set(shapes.values())) > 1 or vectors[next(iter(vectors))].ndim != 2:
            raise InvalidRequestError(f"these features cannot be stacked: {shapes}")
        return torch.stack([vectors[name] for name in self.features], 1)

    def _look_up(self, batch: Mapping[str, IdsLike] | FetchedRows) -> list[tuple[list[str], Tensor]]:
        """Per run of features their names and their vectors, [features, b, ...]."""
        if isinstance(batch, FetchedRows):
            groups, samples = batch.groups, batch.samples
            outputs = self._run(batch.step, batch.rows, once=batch.once)
        else:
            step, groups, samples = self._plan(batch, self._learns(), {})
            outputs = self._run(step)
        return [
            (names, output.view(len(names), samples, *output.shape[1:]))
            for names, output in zip(groups, outputs, strict=True)
        ]

    def _plan(self, batch: Mapping[str, IdsLike], create: bool, weights: Weights) -> tuple[Step, list[list[str]], int]:
        """What to look up, the features of each output, and the number of samples."""
        if is_keyed(batch):
            batch, own = read_keyed(batch)
            weights = weights or own
        bags = self._bags(batch)
        samples = len(next(iter(bags.values())))
        step = Step(self.exchange, self.bridge, {}, [], create)
        groups: list[list[str]] = []
        for table, (pooled, first) in self._by_table.items():
            runs = ([pooled] if pooled else []) + [[name] for name in first]
            start = 0
            for names in runs:
                stop = start + sum(bags[name].values.size for name in names)
                combiners = [self.features[name].combiner for name in names]
                pooling = make_pooling(
                    [bags[name].lengths for name in names],
                    combiners,
                    self.bridge.to_device,
                    [weights.get(name) for name in names] if weights else (),
                )
                step.outputs.append(Output(table, start, stop, pooling))
                groups.append(names)
                start = stop
            parts = [bags[name].values for names in runs for name in names]
            step.ids[table] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return step, groups, samples

    def _bags(self, batch: Mapping[str, IdsLike]) -> dict[str, Ragged[np.uint64]]:
        if batch.keys() != self.features.keys():
            raise InvalidRequestError(
                f"the batch has features {sorted(batch)}, the collection has {sorted(self.features)}"
            )
        bags = {name: feature.bags(batch[name]) for name, feature in self.features.items()}
        sizes = {name: len(one) for name, one in bags.items()}
        if len(set(sizes.values())) > 1:
            raise InvalidRequestError(f"features differ in their number of samples: {sizes}")
        return bags

    def extra_repr(self) -> str:
        """Features with their tables."""
        return ", ".join(f"{name}: {feature.table.name!r}" for name, feature in self.features.items())

"""Source: passes over a user's data as batches of a task, with a position behind each batch that the loop has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from trilith.data.formats.arrow_rows import ArrowRows
from trilith.data.line_ids import line_fields
from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.specs import Dense, Extra, FeatureSpec, InstanceWeight, Label, Sparse
from trilith.data.pipeline.arrow import of_arrow
from trilith.data.pipeline.dataset import Dataset
from trilith.data.pipeline.division import divides_itself
from trilith.data.pipeline.nodes import Apply, Batch, Parse, Read, Stride
from trilith.data.pipeline.positions import pack_state, unpack_state
from trilith.data.records import Records
from trilith.errors import InvalidRequestError
from trilith.estimator.batches import columns_of
from trilith.estimator.features import Embedding
from trilith.estimator.group import Ranks
from trilith.estimator.rows import Prepared
from trilith.estimator.state import rng_state, set_rng_state
from trilith.estimator.task import Task
from trilith.pipelining import Placed

__all__ = ["EpochBatches", "Source", "shared", "task_specs"]


@runtime_checkable
class _Resumable(Protocol):
    """An iterable such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> Any:
        """Where it is."""

    def load_state_dict(self, state: Any) -> None:
        """Go there with the next iteration."""


class Source:
    """A user's data: what `train=` or `evaluate=` of an Estimator gives.

    Args:
        data: An iterable of batches, or a function that makes one. A `trilith.data.Dataset` that is not parsed is
            parsed by the task's features and shared by the workers, unless it is shared already; any other iterable is
            taken as it comes: it is this worker's.
        task: Whose batches.
        prepare: Takes from a batch what the task wants.
        labels: Whether batches must have labels.
        share: This worker's number and how many there are.
        ranks: Workers that take as many batches each; None: as many as there are.
    """

    def __init__(
        self,
        data: Any,
        task: Task,
        prepare: Callable[[Any], Prepared],
        *,
        labels: bool = True,
        share: tuple[int, int] = (0, 1),
        ranks: Ranks | None = None,
    ) -> None:
        self._data = data
        self._task = task
        self._prepare = prepare
        self._labels = labels
        self._share = share
        self._ranks = ranks

    def epoch(self, number: int, *, done: int = 0, state: Any = None) -> EpochBatches:
        """The batches of one pass, from a position on.

        Args:
            number: Of the pass, from 0; decides the order of a dataset that is shuffled.
            done: Batches that are done already.
            state: What `EpochBatches.place` made, or `EpochBatches.after` of the pass before; None: the first `done`
                batches are read and left out.

        Raises:
            InvalidRequestError: The data is no iterable, or has no second pass.
        """
        began = {} if isinstance(self._data, Dataset) else rng_state()
        if state and "rng" in state:  # which whoever makes the data may draw from, too
            began = state["rng"]
            set_rng_state(began)
        data = self._data() if callable(self._data) else self._data
        if isinstance(data, Dataset):
            return self._batches(self._parsed(data).iterate(epoch=number, state=state), done)
        if not isinstance(data, Iterable):
            raise InvalidRequestError(
                f"a {type(data).__name__} is no iterable of batches, nor a function that makes one; "
                "trilith.data.from_arrow makes batches of tables, and of what else has columns"
            )
        if hasattr(data, "set_epoch"):
            data.set_epoch(number)
        sampler = getattr(data, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)  # type: ignore[union-attr]
        loader = _Loader(data, began, state or {})
        if loader.iterator is data and number > 0 and not callable(self._data):
            raise InvalidRequestError(
                f"the data is a {type(data).__name__}, which ends after one pass; give a function that makes one"
            )
        return self._batches(loader.iterator, done, loader)

    def _batches(self, items: Iterator[Any], done: int, loader: _Loader | None = None) -> EpochBatches:
        return EpochBatches(items, self._ready, done, loader=loader, ranks=self._ranks)

    def _parsed(self, data: Dataset) -> Dataset:
        """A dataset whose batches are columns by name; by the task's features where it does not say how."""
        behind = [node for node in data.nodes if isinstance(node, Batch | Parse | Apply)]
        if not any(isinstance(node, Batch) for node in behind):
            raise InvalidRequestError("the dataset gives single records; .batch(n) makes batches of them")
        if of_arrow(data):
            return shared(data, *self._share)
        if isinstance(behind[-1], Batch):
            return shared(data, *self._share).parse(task_specs(self._task, labels=self._labels))
        return data

    def _ready(self, batch: Any) -> Prepared:
        if isinstance(batch, ArrowRows):
            batch = columns_of(batch)
            first = next((label.feature or name for name, label in self._task.labels.items()), None)
            own = next((batch[name] for name in ("label", "__LABEL__") if name in batch), None)
            if first is not None and own is not None:  # as in the records of files
                batch.setdefault(first, own)
        elif isinstance(batch, Records):  # a step made bytes of Arrow's columns
            batch = ParseSpec(task_specs(self._task, labels=self._labels)).parse(batch)
        return self._prepare(batch)


class _Loader:
    """An iterable that is not Trilith's, and the way back to a place in it.

    One with a `state_dict` says itself where it is. Any other is begun with the random numbers with which it was begun
    before, and as many batches are left out; so a DataLoader gives the same again also where it shuffles.

    Args:
        data: The iterable.
        began: Global random numbers when it was made.
        state: Of an earlier pass, or of this one.
    """

    def __init__(self, data: Iterable[Any], began: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self._data = data
        self._began = dict(began)
        self._resumable = data if isinstance(data, _Resumable) else None
        self._generators = _generators_of(data)
        goes_on = self._resumable is not None and "loader" in state
        if self._resumable is not None and goes_on:
            self._resumable.load_state_dict(unpack_state(state["loader"]))
        else:
            self._set(state)
        self._at_first = self._drawn()
        self.iterator = iter(data)
        self._state = state if goes_on else {}

    def __call__(self) -> Callable[[], Any]:
        """The place behind the last batch."""
        if self._resumable is None:
            return lambda: {"rng": self._began, **self._at_first}
        state = {"loader": pack_state(self._resumable.state_dict()), **self._drawn()}
        return lambda: state

    def settle(self) -> None:
        """Behind the first batch of a pass that goes on: let generators be where they were, as loaders draw anew."""
        self._set(self._state)

    @property
    def goes_on(self) -> bool:
        """Whether the loader knows by itself where to begin."""
        return bool(self._state)

    @property
    def after(self) -> dict[str, Any] | None:
        """What the next pass has of this one; None: nothing."""
        return self._drawn() or None

    def _drawn(self) -> dict[str, Any]:
        states = [each.get_state().numpy().tobytes() for each in self._generators]
        return {"generators": states} if states else {}

    def _set(self, state: Mapping[str, Any]) -> None:
        for generator, drawn in zip(self._generators, state.get("generators", ()), strict=False):
            generator.set_state(torch.from_numpy(np.frombuffer(drawn, np.uint8).copy()))


def _generators_of(data: Any) -> list[torch.Generator]:
    """Generators of its own that a DataLoader draws from."""
    found = (getattr(each, "generator", None) for each in (data, getattr(data, "sampler", None)))
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def shared(data: Dataset, rank: int, size: int) -> Dataset:
    """A rank's share of a dataset of records: by files, or by records where there are fewer files than ranks, or none.

    A dataset that is shared already stays as it is: one that was given a `shard`, or whose source, a queue or a topic,
    hands each record to one of those that read it.
    """
    source = data.nodes[0]
    counts = [each.count for each in data.nodes if isinstance(each, Stride)]
    counts += [count for _, count in source.shares] if isinstance(source, Read) else []
    if size == 1 or max(counts, default=1) > 1 or divides_itself(data.nodes):
        return data
    if isinstance(source, Read):
        return data.shard(rank, size)
    return Dataset((source, Stride(rank, size), *data.nodes[1:]), batched=True)


def task_specs(task: Task, *, labels: bool = True) -> dict[str, FeatureSpec]:
    """What a task wants of records, by name in the batch.

    A label is the feature or column of its name; a record without it has it among its own labels, which are in the
    order of the task's.
    """
    specs: dict[str, FeatureSpec] = {}
    for name, feature in task.features.items():
        key = feature.feature or name
        spec: FeatureSpec = Sparse(key, strings=True)
        if isinstance(feature, Dense):
            spec = Dense(feature.dim, feature=key, lengths=feature.lengths)
        if specs.setdefault(key, spec) != spec:
            raise InvalidRequestError(
                f"feature {name!r} reads {key!r} as {spec}, another one as {specs[key]}; one name has one form where "
                "records are parsed: parse the dataset yourself, under two names"
            )
        if isinstance(feature, Embedding) and feature.weights:
            raise InvalidRequestError(
                f"feature {name!r} has a weight for each id, which no parser gives; parse and map the dataset yourself"
            )
    if task.sample_weight:
        specs[task.sample_weight] = InstanceWeight()
    when = task.request_time
    if when and when not in specs:
        specs[when] = Extra(field=when) if when in line_fields() else Dense(1, "int64", when)
    for place, (name, label) in enumerate(task.labels.items() if labels else ()):
        key = label.feature or name
        specs[key] = Label(feature=key, place=place)
    return specs


class EpochBatches:
    """Batches of one pass. What is taken ahead of the loop is given again after `rewind`.

    Args:
        items: What the user's data gives.
        prepare: Makes a task's batch of each.
        done: How many were done before.
        loader: Says where `items` is, and finds a place in it; None where `items` does.
        ranks: Those that take as many batches each: a pass ends when none of them has one left, and those that have run
            out before are given None until then. None: each ends for itself.
    """

    def __init__(
        self,
        items: Iterator[Any],
        prepare: Callable[[Any], Prepared],
        done: int = 0,
        *,
        loader: _Loader | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._items = items
        self._prepare = prepare
        self._loader = loader
        self.done = done
        """Batches that the loop has done, of earlier runs too."""
        self._ranks = ranks
        self._ended = False
        self._ahead: deque[tuple[Prepared | None, Callable[[], Any]]] = deque()
        self._again: deque[tuple[Prepared | None, Callable[[], Any]]] = deque()
        self._first: deque[tuple[Prepared, Callable[[], Any]]] = deque()
        if loader is not None and loader.goes_on:
            self._place = self._here()
            first = next(items, None)  # now, as loaders draw random numbers with their first batch
            if first is not None:
                self._first.append((prepare(first), self._here()))
            loader.settle()
        else:
            for _ in range(done if loader is not None else 0):
                if next(items, None) is None:
                    break
            self._place = self._here()

    def __iter__(self) -> Iterator[Prepared | None]:
        return self

    def __next__(self) -> Prepared | None:
        """The next batch; may be called in another thread than the loop's."""
        found = self._again.popleft() if self._again else self._taken()
        self._ahead.append(found)
        return found[0]

    def _taken(self) -> tuple[Prepared | None, Callable[[], Any]]:
        """A batch of the data and the place behind it; None for the batch where this rank has none and another has."""
        found: tuple[Prepared | None, Callable[[], Any]] | None = None
        if self._first:
            found = self._first.popleft()
        elif not self._ended:
            try:
                found = self._prepare(next(self._items)), self._here()
            except StopIteration:
                self._ended = True
        others = self._ranks is not None and self._ranks.any(found is not None)
        if found is None and not others:
            raise StopIteration
        return found or (None, self._here())

    def _here(self) -> Callable[[], Any]:
        if self._loader is not None:
            return self._loader()
        if isinstance(self._items, Placed):
            return self._items.position()
        return lambda: None

    def advance(self) -> None:
        """The loop has done the oldest batch that was taken, or the step in which it had none."""
        batch, self._place = self._ahead.popleft()
        self.done += batch is not None

    def rewind(self) -> None:
        """Give again what was taken and not done; nobody may be taking batches meanwhile."""
        self._again = self._ahead + self._again
        self._ahead = deque()

    @property
    def place(self) -> Callable[[], Any]:
        """Makes the position behind the last batch that was done; None where only their number says it."""
        return self._place

    @property
    def after(self) -> dict[str, Any] | None:
        """Behind the last batch: what the next pass has of this one."""
        return None if self._loader is None else self._loader.after

    def close(self) -> None:
        """Let go of files and threads."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

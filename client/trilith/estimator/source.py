"""Source: passes over a user's data as batches of a task, with a position behind each batch that the loop has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from trilith.data.parse.specs import Dense, FeatureSpec, InstanceWeight, Label, Sparse
from trilith.data.pipeline.dataset import Dataset
from trilith.data.pipeline.nodes import Apply, Batch, Parse
from trilith.errors import InvalidRequestError
from trilith.estimator.features import Embedding
from trilith.estimator.rows import Prepared
from trilith.estimator.task import Task
from trilith.pipelining import Placed

__all__ = ["EpochBatches", "Source", "task_specs"]


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
            parsed by the task's features; any other iterable is taken as it comes.
        task: Whose batches.
        prepare: Takes from a batch what the task wants.
        labels: Whether batches must have labels.
    """

    def __init__(
        self,
        data: Any,
        task: Task,
        prepare: Callable[[Any], Prepared],
        *,
        labels: bool = True,
    ) -> None:
        self._data = data
        self._task = task
        self._prepare = prepare
        self._labels = labels

    def epoch(self, number: int, *, done: int = 0, state: Any = None) -> EpochBatches:
        """The batches of one pass, from a position on.

        Args:
            number: Of the pass, from 0; decides the order of a dataset that is shuffled.
            done: Batches that are done already.
            state: What `EpochBatches.place` made; None: the first `done` batches are read and left out.
        """
        data = self._data() if callable(self._data) else self._data
        if isinstance(data, Dataset):
            return EpochBatches(self._parsed(data).iterate(epoch=number, state=state), self._ready, done)
        if not isinstance(data, Iterable):
            raise InvalidRequestError(f"{type(data).__name__} is no iterable of batches, nor a function that makes one")
        if hasattr(data, "set_epoch"):
            data.set_epoch(number)
        sampler = getattr(data, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)  # type: ignore[union-attr]
        if state is not None and isinstance(data, _Resumable):
            data.load_state_dict(state)
            return EpochBatches(iter(data), self._ready, done, resumable=data)
        iterator = iter(data)
        if iterator is data and number > 0 and not callable(self._data):
            raise InvalidRequestError(
                f"the data is a {type(data).__name__}, which ends after one pass; give a function that makes one"
            )
        for _ in range(done):
            if next(iterator, None) is None:
                break
        return EpochBatches(iterator, self._ready, done, resumable=data if isinstance(data, _Resumable) else None)

    def _parsed(self, data: Dataset) -> Dataset:
        """A dataset whose batches are columns by name; by the task's features where it does not say how."""
        behind = [node for node in data.nodes if isinstance(node, Batch | Parse | Apply)]
        if not any(isinstance(node, Batch) for node in behind):
            raise InvalidRequestError("the dataset gives single records; .batch(n) makes batches of them")
        if isinstance(behind[-1], Batch):
            return data.parse(task_specs(self._task, labels=self._labels))
        return data

    def _ready(self, batch: Any) -> Prepared:
        return self._prepare(batch)


def task_specs(task: Task, *, labels: bool = True) -> dict[str, FeatureSpec]:
    """What a task wants of records, by name in the batch.

    A label is the feature or column of its name; a record without it has it among its own labels, which are in the
    order of the task's.
    """
    specs: dict[str, FeatureSpec] = {}
    for name, feature in task.features.items():
        key = feature.feature or name
        specs[key] = (
            Dense(feature.dim, feature=key, lengths=feature.lengths) if isinstance(feature, Dense) else Sparse(key)
        )
        if isinstance(feature, Embedding) and feature.weights:
            raise InvalidRequestError(
                f"feature {name!r} has a weight for each id, which no parser gives; parse and map the dataset yourself"
            )
    if task.sample_weight:
        specs[task.sample_weight] = InstanceWeight()
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
        resumable: Says where `items` is.
    """

    def __init__(
        self,
        items: Iterator[Any],
        prepare: Callable[[Any], Prepared],
        done: int = 0,
        *,
        resumable: _Resumable | None = None,
    ) -> None:
        self._items = items
        self._prepare = prepare
        self._resumable = resumable
        self.done = done
        """Batches that the loop has done, of earlier runs too."""
        self._ahead: deque[tuple[Prepared, Callable[[], Any]]] = deque()
        self._again: deque[tuple[Prepared, Callable[[], Any]]] = deque()
        self._place = self._here()

    def __iter__(self) -> Iterator[Prepared]:
        return self

    def __next__(self) -> Prepared:
        """The next batch; may be called in another thread than the loop's."""
        found = self._again.popleft() if self._again else (self._prepare(next(self._items)), self._here())
        self._ahead.append(found)
        return found[0]

    def _here(self) -> Callable[[], Any]:
        if isinstance(self._items, Placed):
            return self._items.position()
        if self._resumable is not None:
            state = self._resumable.state_dict()
            return lambda: state
        return lambda: None

    def advance(self) -> None:
        """The loop has done the oldest batch that was taken."""
        _, self._place = self._ahead.popleft()
        self.done += 1

    def rewind(self) -> None:
        """Give again what was taken and not done; nobody may be taking batches meanwhile."""
        self._again = self._ahead + self._again
        self._ahead = deque()

    @property
    def place(self) -> Callable[[], Any]:
        """Makes the position behind the last batch that was done; None where only their number says it."""
        return self._place

    def close(self) -> None:
        """Let go of files and threads."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

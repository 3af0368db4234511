"""Instance reweighting: how often each sample is repeated, by its actions and those before it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.rows import Priorities, at, with_first
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["MAX_COPIES", "InstanceReweight"]

MAX_COPIES = 1_000_000
"""More copies of one sample are taken for a mistake in the weights."""

_UNLISTED, _EMPTY = 1000, 2000
_BOUND = 1e15


@dataclass(frozen=True)
class InstanceReweight(SampleOp):
    """Repeat each sample by the weights of its actions, and perhaps change its first label.

    Actions are what the sample led to, pre_actions what came before. If the actions are the more prior, or nothing came
    before, the sample gets the label of its top action and the product of its weights; an earlier top action that has a
    weight adds its share where it stands for another label, else the two compensate each other. Samples without labels,
    or whose earlier actions are as prior, are dropped; those without any action at all stay as they are.

    Attributes:
        action_priority: Actions such as "2,7,0", the first being the most prior.
        reweight: Weights and labels of actions such as "2:3:-1,7:6:1", whole numbers, no weight below 0.
    """

    action_priority: str
    reweight: str

    def __post_init__(self) -> None:
        if not self._table:
            raise InvalidRequestError(f"reweight is {self.reweight!r}; it needs an action:weight:label")
        if len(self._priorities) >= _UNLISTED:
            raise InvalidRequestError(f"action_priority lists {len(self._priorities)} actions; at most {_UNLISTED - 1}")

    @cached_property
    def _priorities(self) -> Priorities:
        return Priorities.parse(self.action_priority, "action_priority")

    @cached_property
    def _table(self) -> dict[int, tuple[int, int]]:
        table = {}
        for part in self.reweight.split(","):
            if part.strip():
                try:
                    action, weight, label = map(int, part.split(":"))
                except ValueError:
                    raise InvalidRequestError(f"reweight has {part!r}; it must be action:weight:label") from None
                if weight < 0:
                    raise InvalidRequestError(f"reweight has {part!r}; a weight is not below 0")
                table[action] = (weight, label)
        return table

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset(("actions", "pre_actions")))

    def apply(self, samples: Samples) -> npt.NDArray[np.int64]:
        now, before = (self._judge(samples.rows(name)) for name in ("actions", "pre_actions"))
        labels = samples.labels
        first = at(labels, 0, 0.0)
        wins = (before.priority > now.priority) & (labels.lengths > 0)
        first = np.where(wins & now.has_entry, now.label, first).astype(np.float32)
        both = wins & before.has_entry
        differ = before.label != np.trunc(first)
        turned = both & ~differ & (before.count > now.count)
        first = np.where(turned, -first, first)
        copies = np.where(wins, now.count, 0)
        copies = np.where(both & differ, now.count + before.count, copies)
        copies = np.where(both & ~differ, np.abs(now.count - before.count), copies)
        # Products at the bound are not exact, so neither is their difference.
        copies = np.where(wins & (np.maximum(now.count, both * before.count) >= _BOUND), _BOUND, copies)
        idle = (now.priority == _EMPTY) & (before.priority == _EMPTY) & (labels.lengths > 0)
        copies = np.where(idle, 1, copies)
        if copies.size and copies.max() > MAX_COPIES:
            row = int(copies.argmax())
            asked = f"{samples.where(row)}: reweight asks for {copies[row]:.0f} copies or more"
            raise InvalidRequestError(f"{asked}; at most {MAX_COPIES} are made")
        samples.labels = with_first(labels, first, wins)
        return copies.astype(np.int64)

    def _judge(self, actions: Ragged[Any]) -> _Judged:
        ranks, top = self._priorities.best(actions)
        listed = ranks < len(self._priorities)
        lengths = actions.lengths
        priority = np.where(lengths == 0, _EMPTY, np.where(listed, ranks + 1, _UNLISTED))
        keys = np.array(sorted(self._table), np.int64)
        table = np.array([self._table[int(key)] for key in keys], np.float64)
        place = np.minimum(np.searchsorted(keys, top), keys.size - 1)
        return _Judged(
            priority=priority,
            has_entry=listed & (keys[place] == top),
            label=table[place, 1],
            count=self._count(actions, top, keys, table[:, 0]),
        )

    def _count(
        self,
        actions: Ragged[Any],
        top: npt.NDArray[np.int64],
        keys: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float64]:
        """float64[n]: product of the weights of a row's actions, with repeats; of the listed ones, the top's only."""
        lengths = actions.lengths
        values = actions.values[actions.row_splits[0] : actions.row_splits[-1]].astype(np.int64)
        place = np.minimum(np.searchsorted(keys, values), keys.size - 1)
        skipped = np.isin(values, self._priorities.listed) & (values != np.repeat(top, lengths))
        factors = np.where((keys[place] == values) & ~skipped, weights[place], 1.0)
        counts = (lengths > 0).astype(np.float64)
        filled = np.flatnonzero(lengths)
        if filled.size:
            starts = (actions.row_splits[:-1] - actions.row_splits[0])[filled]
            with np.errstate(over="ignore", invalid="ignore"):
                products = np.minimum(np.multiply.reduceat(factors, starts), _BOUND)
            counts[filled] = np.where(np.minimum.reduceat(factors, starts) == 0, 0.0, products)
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What the actions of each row amount to.

    Attributes:
        priority: int64[n], 1 for the most prior action; 1000 if none is listed, 2000 without actions.
        has_entry: bool[n], whether the top action has a weight.
        label: float64[n], the label of the top action where it has a weight.
        count: float64[n], the product of weights.
    """

    priority: npt.NDArray[Any]
    has_entry: npt.NDArray[np.bool_]
    label: npt.NDArray[np.float64]
    count: npt.NDArray[np.float64]

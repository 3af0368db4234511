"""Ops that keep a share of the samples: rates by action and by special strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.rows import INVALID_LABEL, Priorities, at, with_first
from trilith.errors import InvalidRequestError

__all__ = ["NegativeSample", "SpecialStrategy"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class NegativeSample(SampleOp):
    """Drop a share of the negatives.

    A sample whose label is at or above the threshold stays. Another is dropped with the rate of its most-prior action
    if that is listed, above 0 and has a rate, else with `drop_rate`. Rates count in thousandths.

    Attributes:
        drop_rate: Within [0, 1].
        label_index: Of the label that decides; a sample without it is a negative.
        threshold: See above.
        action_priority: Actions such as "2,7,0", the first being the most prior.
        per_action_drop_rate: Rates of actions such as "1:1.0,2:0.25"; takes effect together with `action_priority`.
        seed: Of the draws.
    """

    drop_rate: float
    label_index: int = 0
    threshold: float = 0.0
    action_priority: str = ""
    per_action_drop_rate: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rate("drop_rate", self.drop_rate)
        if self.label_index < 0:
            raise InvalidRequestError(f"label_index={self.label_index} is below 0")
        _ = self._priorities, self._rates

    @cached_property
    def _priorities(self) -> Priorities:
        return Priorities.parse(self.action_priority, "action_priority")

    @cached_property
    def _rates(self) -> dict[int, float]:
        rates = {}
        for part in _parts(self.per_action_drop_rate):
            action, _, rate = part.partition(":")
            try:
                rates[int(action)] = float(rate)
            except ValueError:
                raise InvalidRequestError(f"per_action_drop_rate has {part!r}; it must be action:rate") from None
            _check_rate("per_action_drop_rate", rates[int(action)])
        return rates

    @property
    def _by_action(self) -> bool:
        return bool(self.action_priority and self.per_action_drop_rate)

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset(("actions",)) if self._by_action else frozenset())

    def apply(self, samples: Samples) -> BoolArray:
        positive = at(samples.labels, self.label_index, INVALID_LABEL) >= np.float32(self.threshold)
        rates = np.full(len(samples), self.drop_rate)
        if self._by_action:
            ranks, actions = self._priorities.best(samples.rows("actions"))
            counts = (ranks < len(self._priorities)) & (actions > 0)
            for action, rate in self._rates.items():
                rates[counts & (actions == action)] = rate
        return positive | (samples.draws(self.seed) % np.uint64(1000) >= np.round(rates * 1000).astype(np.uint64))


@dataclass(frozen=True, kw_only=True)
class SpecialStrategy(SampleOp):
    """Keep samples by their special strategies, perhaps with another first label.

    The first listed strategy that a sample has decides: without a rate the sample stays, else with that probability;
    where it has a label, a sample that stays gets it as its first. A sample whose strategies are all unlisted goes.

    Attributes:
        strategy_list: Strategies in order of preference.
        strategy_conf: "strategy:rate" or "strategy:rate:label" with commas between them, all of one form.
        keep_empty_strategy: Whether samples without strategies stay.
        seed: Of the draws.
    """

    strategy_list: Sequence[int]
    strategy_conf: str = ""
    keep_empty_strategy: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy_list", tuple(map(int, self.strategy_list)))
        _ = self._conf

    @cached_property
    def _conf(self) -> Mapping[int, tuple[float, float | None]]:
        conf: dict[int, tuple[float, float | None]] = {}
        widths = set()
        for part in _parts(self.strategy_conf):
            strategy, *rest = part.split(":")
            try:
                numbers = [float(each) for each in rest]
                key = int(strategy)
            except ValueError:
                numbers, key = [], 0
            if len(numbers) not in (1, 2):
                raise InvalidRequestError(
                    f"strategy_conf has {part!r}; it must be strategy:rate or strategy:rate:label"
                )
            _check_rate("strategy_conf", numbers[0])
            widths.add(len(numbers))
            conf[key] = (numbers[0], numbers[1] if len(numbers) == 2 else None)
        if len(widths) > 1:
            raise InvalidRequestError(f"strategy_conf is {self.strategy_conf!r}; either all parts have a label or none")
        return conf

    @property
    def needs(self) -> Needs:
        labels = any(label is not None for _, label in self._conf.values())
        return Needs(labels=labels, line_id=frozenset(("special_strategies",)))

    def apply(self, samples: Samples) -> BoolArray:
        rows = samples.rows("special_strategies")
        priorities = Priorities(self.strategy_list)
        ranks, strategies = priorities.best(rows)
        listed = ranks < len(priorities)
        rates = np.ones(len(samples))
        for strategy, (rate, _) in self._conf.items():
            rates[strategies == strategy] = rate
        keep = np.where(rows.lengths == 0, self.keep_empty_strategy, listed & (samples.uniform(self.seed) < rates))
        for strategy, (_, label) in self._conf.items():
            chosen = keep & listed & (strategies == strategy)
            if label is not None and chosen.any():
                labels = np.full(len(samples), label, np.float32)
                samples.labels = with_first(samples.labels, labels, chosen)
        return keep


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_rate(name: str, rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise InvalidRequestError(f"{name} has {rate}; a rate is within [0, 1]")

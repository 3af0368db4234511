"""Learning rates over a model's steps."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError

__all__ = [
    "LearningRate",
    "LearningRateFunction",
    "PolynomialDecay",
    "as_factors",
    "check_rate",
    "rate_at",
    "rate_text",
    "rates_at",
]


class LearningRateFunction(ABC):
    """A rate that depends on the model's step.

    Two of one class with equal attributes are the same rate: `str` names the class and all attributes in sorted order.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The rate at `step`, which counts from 0."""

    def __str__(self) -> str:
        pairs = ", ".join(f"{name}={value}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({pairs})"


LearningRate: TypeAlias = float | LearningRateFunction | Callable[[], float]
"""A number, a function of the step, or a function without arguments that keeps its own time."""


@dataclass(frozen=True)
class PolynomialDecay(LearningRateFunction):
    """From `initial_learning_rate` to `end_learning_rate` (which may be the larger) in `decay_steps` steps, then flat.

    Attributes:
        initial_learning_rate: At step 0.
        decay_steps: Steps until the end is reached.
        end_learning_rate: From then on.
        power: Of the polynomial; 1 is a straight line.
        cycle: Whenever the end is reached, go on as if `decay_steps` had been its next multiple.
        name: Tells schedules apart that are otherwise equal.
    """

    initial_learning_rate: float
    decay_steps: int
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        check_rate("PolynomialDecay: initial_learning_rate", self.initial_learning_rate)
        check_rate("PolynomialDecay: end_learning_rate", self.end_learning_rate)
        if not 1 <= self.decay_steps < math.inf:
            raise InvalidRequestError(f"PolynomialDecay: decay_steps={self.decay_steps!r} is below 1")
        if not 0 <= self.power < math.inf:
            raise InvalidRequestError(f"PolynomialDecay: power={self.power!r} is not a finite number of at least 0")

    def __call__(self, step: int) -> float:
        """The rate at `step`."""
        if step < 0:
            raise InvalidRequestError(f"PolynomialDecay: step={step} is below 0")
        length = float(self.decay_steps)
        if self.cycle:
            length *= max(1, math.ceil(step / self.decay_steps))
        done = min(step / length, 1.0)
        initial, end = float(self.initial_learning_rate), float(self.end_learning_rate)
        return (initial - end) * math.pow(1.0 - done, self.power) + end


def check_rate(owner: str, rate: LearningRate) -> None:
    """Refuse what is neither callable nor a finite number of at least 0."""
    if callable(rate):
        return
    number = isinstance(rate, numbers.Real) and not isinstance(rate, (bool, np.bool_))
    if not number or not 0 <= float(rate) <= np.finfo(np.float32).max:
        raise InvalidRequestError(
            f"{owner}={rate!r} is neither a finite number of at least 0 nor a function that gives one"
        )


def rate_at(rate: LearningRate, step: int) -> float:
    """The value of a rate at the model's `step`."""
    if isinstance(rate, LearningRateFunction):
        return float(rate(step))
    return float(rate() if callable(rate) else rate)


def rates_at(rates: Sequence[LearningRate], step: int, factor: float = 1.0) -> npt.NDArray[np.float32]:
    """float32[segments]: every segment's rate at the model's `step`, times `factor`."""
    return np.array([rate_at(each, step) * factor for each in rates], np.float32)


def as_factors(given: Mapping[str, float] | None) -> dict[str, float]:
    """What rates are multiplied by, by table.

    Raises:
        InvalidRequestError: One is no finite number of at least 0.
    """
    for table, factor in (given or {}).items():
        if callable(factor):
            raise InvalidRequestError(f"rate_factors[{table!r}]={factor!r} is a function, it must be a number")
        check_rate(f"rate_factors[{table!r}]", factor)
    return {table: float(factor) for table, factor in (given or {}).items()}


def rate_text(rate: LearningRate) -> str:
    """Equal for equal rates: numbers by value, schedules by class and attributes; other functions match themselves."""
    return str(rate) if callable(rate) else str(float(rate))

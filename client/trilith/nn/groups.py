"""Groups of an optimizer whose values are in a cluster: torch changes their rates, which travel with each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trilith.batches import TableInfo

__all__ = ["RateGroup", "rate_of_table"]

_LEAST = float(np.finfo(np.float32).tiny)


class RateGroup:
    """One of the `param_groups` of an `Optimization`, with what its rate was at the beginning.

    Attributes:
        group: What torch and its schedulers see: "params", "lr", "name", and what else they keep there.
    """

    def __init__(self, name: str, rate: float | None) -> None:
        """Make one.

        Args:
            name: A table's, or "dense".
            rate: What "lr" is at the beginning; None: there is no one number, and "lr" is a factor, of 1 at first.
        """
        self._first = _short(rate) if rate else 1.0
        self.group: dict[str, Any] = {"params": [], "lr": self._first, "name": name}

    @property
    def factor(self) -> float:
        """What the rates of the beginning are to be multiplied by now."""
        return float(self.group["lr"]) / self._first

    def rate(self) -> float | None:
        """The rate of now, above 0; None where it is still that of the beginning."""
        rate = float(self.group["lr"])
        return None if rate == self._first else max(rate, _LEAST)  # on the wire 0 stands for the optimizer's own

    def state_dict(self) -> dict[str, Any]:
        """What schedulers go on from."""
        return {name: value for name, value in self.group.items() if name != "params"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.group.update({name: value for name, value in state.items() if name != "params"})


def _short(rate: float) -> float:
    """What was written, of a number that went through float32: 0.1 rather than 0.10000000149011612."""
    narrow = np.float32(rate)
    return float(str(narrow)) if float(narrow) == rate else rate


def rate_of_table(info: TableInfo) -> float | None:
    """The number at which all of a table's rows learn; None where it has a schedule, or segments with their own."""
    rates = info.learning_rates
    numbers = {None if callable(each) else float(each) for each in rates}
    return numbers.pop() if len(numbers) == 1 else None

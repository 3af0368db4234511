"""ProbabilisticFilter: draws instead of counting."""

from __future__ import annotations

import itertools

import numpy as np

from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_services.ps.engine.filters.thresholds import Bools, Counts, Ids, Thresholds, checked
from trilith_services.ps.engine.kernels import filters as kernels

__all__ = ["ProbabilisticFilter"]


class ProbabilisticFilter:
    """Keeps each new id with a probability that grows with its occurrences in one call; remembers nothing.

    Draws are a function of (seed, number of the call, id, position): the same calls in the same order decide the same.
    """

    def __init__(self, thresholds: Thresholds, *, equal: bool = False, seed: int = 0) -> None:
        self.thresholds = thresholds
        self.equal = equal
        self._seed = seed & (2**64 - 1)
        self._calls = itertools.count(1)

    @property
    def memory_bytes(self) -> int:
        """None worth counting."""
        return 0

    def filtered(
        self,
        ids: Ids,
        counts: Counts | None = None,
        thresholds: Thresholds | None = None,
        present: Bools | None = None,
    ) -> Bools:
        """Decide by drawing."""
        chosen = thresholds or self.thresholds
        ids, counts, present = checked(ids, counts, present)
        out = np.empty(ids.size, np.bool_)
        kernels.probabilistic_filter(
            np.uint64(self._seed ^ next(self._calls)),
            self.equal,
            address_of(chosen.values),
            chosen.mask,
            address_of(ids),
            0 if counts is None else address_of(counts),
            0 if present is None else address_of(present),
            ids.size,
            address_of(out),
        )
        return out

    def may_pass(self, ids: Ids, counts: Counts | None = None) -> Bools:
        """True for every id: it is drawn."""
        return np.ones(ids.size, np.bool_)

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""
        warm(kernels.probabilistic_filter)

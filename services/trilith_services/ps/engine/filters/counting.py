"""CellCounts: saturating counts of ids in cells, under one lock."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trilith.ops.memory import address_of
from trilith_services.ps.engine.filters.thresholds import Bools, Counts, Ids, Thresholds, checked

__all__ = ["CellCounts"]


class CellCounts(ABC):
    """What filters that count have in common; memory is touched only where ids fall."""

    def __init__(
        self, shape: tuple[int, ...], cells: npt.NDArray[Any], state_words: int, thresholds: Thresholds | None
    ) -> None:
        """Count nothing yet.

        Args:
            shape: What two filters must have in common to be equal, beside their counts.
            cells: Zeros: uint8 or uint16, of which all but 4 bits keep a signature of the id.
            state_words: How many int64 the kernels keep beside the cells.
            thresholds: Of the filter; None: 0 for all.
        """
        self.thresholds = thresholds or Thresholds.constant(0)
        self._shape = shape
        self._cells = cells
        self._state = np.zeros(state_words, np.int64)
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cells, which are committed as ids fall on them: all over, so soon all of them."""
        return self._cells.nbytes

    def add(self, ids: Ids, counts: Counts | None = None) -> Counts:
        """Count ids; uint32[n] how often each had been counted before, 15 where there was no cell."""
        ids, counts, _ = checked(ids, counts)
        out = np.empty(ids.size, np.uint32)
        with self._lock:
            self._add(address_of(ids), 0 if counts is None else address_of(counts), ids.size, address_of(out))
        return out

    @abstractmethod
    def _add(self, ids: int, counts: int, n: int, out: int) -> None:
        """Run the kernel over addresses; the lock is held."""

    def get(self, ids: Ids) -> Counts:
        """uint32[n] how often each id has been counted."""
        return self.add(ids, np.zeros(ids.size, np.uint32))

    def may_pass(self, ids: Ids, counts: Counts | None = None) -> Bools:
        """bool[n]: whether an id reaches its threshold within a call that counts all of these."""
        distinct, places = np.unique(ids, return_inverse=True)
        totals = np.zeros(distinct.size, np.int64)
        np.add.at(totals, places, 1 if counts is None else counts)
        reached: Bools = self.get(ids) + totals[places] >= self.thresholds.for_ids(ids)
        return reached

    def clone(self) -> Self:
        """An independent copy."""
        twin = copy.copy(self)
        with self._lock:
            twin._cells, twin._state = self._cells.copy(), self._state.copy()
        twin._lock = threading.Lock()
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CellCounts) or type(other) is not type(self):
            return NotImplemented
        return (
            self._shape == other._shape
            and np.array_equal(self._state, other._state)
            and np.array_equal(self._cells, other._cells)
        )

    __hash__ = None  # type: ignore[assignment]

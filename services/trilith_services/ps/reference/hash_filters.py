"""The reference system's filters that a PS has no use for, its factory of filters, and layers that filter by them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.filters import (
    DEFAULT_CAPACITY,
    DEFAULT_SPLITS,
    OccurrenceFilter,
    ProbabilisticFilter,
    SlidingFilter,
    Thresholds,
)
from trilith_services.ps.engine.filters.counting import CellCounts
from trilith_services.ps.engine.filters.thresholds import Bools, Counts, Ids, checked
from trilith_services.ps.engine.kernels import filters as kernels

__all__ = ["CountingFilter", "DummyFilter", "create_hash_filters", "intercept_gradient", "should_be_filtered"]


class DummyFilter:
    """Filters nothing."""

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
        """Pass every id."""
        return np.zeros(ids.size, np.bool_)

    def may_pass(self, ids: Ids, counts: Counts | None = None) -> Bools:
        """True for every id."""
        return np.ones(ids.size, np.bool_)

    def compile(self) -> None:
        """Do nothing: there is no kernel."""


class CountingFilter(CellCounts):
    """One block of saturating counters, without a window and without files.

    Attributes:
        bits: Width of a cell, 8 or 16; all but 4 bits of it keep a signature of the id.
        capacity: Elements the block is made for.
        total: Home cells, ⌊capacity · fill⌋.
    """

    def __init__(
        self, capacity: int, *, fill: float = 1.5, bits: int = 16, thresholds: Thresholds | None = None
    ) -> None:
        if bits not in {8, 16}:
            raise InvalidRequestError(f"cells of {bits} bits: cells have 8 or 16")
        self.bits = bits
        self.capacity = capacity
        self.fill = fill
        self.total = int(capacity * fill)
        if self.total < 1:
            raise InvalidRequestError(f"capacity {capacity} with fill {fill} leaves no cell")
        cells = np.zeros(self.total + kernels.EXTRA_CELLS, np.uint8 if bits == 8 else np.uint16)
        super().__init__((bits, capacity, self.total), cells, 2, thresholds)

    @property
    def elements(self) -> int:
        """Cells in use, at most `capacity`."""
        return int(self._state[kernels.BLOCK_ELEMENTS])

    @property
    def failures(self) -> int:
        """Ids for which there was no cell."""
        return int(self._state[kernels.BLOCK_FAILURES])

    @property
    def full(self) -> bool:
        """Whether the block holds what it was made for."""
        return self.elements >= self.capacity - 1

    def _add(self, ids: int, counts: int, n: int, out: int) -> None:
        state = address_of(self._state)
        kernels.counting_add(address_of(self._cells), self.bits, self.total, self.capacity, state, ids, counts, n, out)

    def filtered(
        self,
        ids: Ids,
        counts: Counts | None = None,
        thresholds: Thresholds | None = None,
        present: Bools | None = None,
    ) -> Bools:
        """Decide by counting."""
        chosen = thresholds or self.thresholds
        ids, counts, present = checked(ids, counts, present)
        limit = chosen.for_ids(ids)
        counted = limit > 0 if present is None else (limit > 0) & ~present
        out = np.zeros(ids.size, np.bool_)
        chosen_counts = None if counts is None else counts[counted]
        out[counted] = self.add(ids[counted], chosen_counts) < limit[counted]
        return out

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""
        warm(kernels.counting_add)


def create_hash_filters(
    ps_num: int,
    enable_hash_filter: bool,
    config: bytes | hash_table_pb2.SlotOccurrenceThresholdConfig,
    *,
    filter_capacity: int = DEFAULT_CAPACITY,
    filter_split_num: int = DEFAULT_SPLITS,
    filter_equal_probability: bool = False,
    filter_type: str = "sliding_hash_filter",
) -> list[OccurrenceFilter]:
    """Make one filter per PS, or a single one where there are none.

    Args:
        ps_num: Number of PS; 0 makes one filter.
        enable_hash_filter: False makes filters that pass everything.
        config: Thresholds, as a message or serialized.
        filter_capacity: Ids a sliding filter remembers.
        filter_split_num: Files and, from 5 on, blocks of a sliding filter.
        filter_equal_probability: See `ProbabilisticFilter`.
        filter_type: "sliding_hash_filter", "probabilistic_filter" or "no_filter".
    """
    if isinstance(config, bytes):
        config = hash_table_pb2.SlotOccurrenceThresholdConfig.FromString(config)
    thresholds = Thresholds.of(config)

    def make() -> OccurrenceFilter:
        if filter_type == "no_filter" or not enable_hash_filter:
            return DummyFilter()
        if filter_type == "sliding_hash_filter":
            return SlidingFilter(filter_capacity, filter_split_num, thresholds=thresholds)
        return ProbabilisticFilter(thresholds, equal=filter_equal_probability)

    known = ("sliding_hash_filter", "probabilistic_filter", "no_filter")
    if filter_type not in known:
        raise InvalidRequestError(f"filter type {filter_type!r} is none of {', '.join(known)}")
    return [make() for _ in range(max(ps_num, 1))]


class _Holds(Protocol):
    """What `should_be_filtered` asks of a table."""

    def contains(self, ids: Any) -> Bools: ...


def should_be_filtered(
    occurrence_filter: OccurrenceFilter,
    ids: Ids,
    counts: Counts | None = None,
    *,
    thresholds: Thresholds | None = None,
    table: _Holds | None = None,
) -> Bools:
    """Decide about ids beside a table, whose own ids pass uncounted, or without one."""
    if table is None and isinstance(occurrence_filter, ProbabilisticFilter):
        return np.zeros(ids.size, np.bool_)
    present = None if table is None else table.contains(ids)
    return occurrence_filter.filtered(ids, counts, thresholds, present)


def intercept_gradient(
    occurrence_filter: OccurrenceFilter, ids: npt.ArrayLike, grads: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The backward pass of a layer that is the identity forward: gradients of filtered ids become zero.

    Args:
        occurrence_filter: Counts one occurrence per id, in order.
        ids: uint64 or int64[n].
        grads: float32[n, dim]; not written.
    """
    filtered = should_be_filtered(occurrence_filter, np.ascontiguousarray(ids).astype(np.uint64, casting="unsafe"))
    return np.where(filtered[:, None], np.float32(0), grads)

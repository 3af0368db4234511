"""Occurrence filters: which new ids have been seen often enough to get a row.

A filter decides in input order and counts as it decides. With threshold t an id passes from its (t + 1)-th occurrence
on; t = 0 passes everything and counts nothing. Counts saturate at 15, so a threshold above 15 never passes.
"""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.kernels import filters as kernels
from trilith_services.ps.engine.rows import as_counts, as_ids

__all__ = [
    "CountingFilter",
    "DummyFilter",
    "OccurrenceFilter",
    "ProbabilisticFilter",
    "SlidingFilter",
    "Thresholds",
    "create_hash_filters",
    "intercept_gradient",
    "make_filter",
    "should_be_filtered",
]

_log = logging.getLogger(__name__)

DEFAULT_CAPACITY = 300_000_000
DEFAULT_SPLITS = 7
_MIN_CAPACITY = 300
_MIN_BLOCKS = 5
_SLIDING_FILL = 1.2
_SLOTS = 1 << 15

Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Thresholds:
    """How often an id must have been seen before it passes, by its slot (bits 48 to 62 of the id).

    Attributes:
        values: uint32[1] when all slots share one threshold, else uint32[32768].
    """

    values: Counts

    def __post_init__(self) -> None:
        values = self.values
        if values.dtype != np.uint32 or values.shape not in {(1,), (_SLOTS,)} or not values.flags.c_contiguous:
            raise InvalidRequestError(
                f"thresholds are {values.dtype}{list(values.shape)}, expected uint32[1] or uint32[{_SLOTS}]"
            )

    @classmethod
    def constant(cls, threshold: int) -> Thresholds:
        """The same threshold for every slot."""
        return cls.of(hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=threshold))

    @classmethod
    def of(cls, config: hash_table_pb2.SlotOccurrenceThresholdConfig) -> Thresholds:
        """The thresholds of a config."""
        default = config.default_occurrence_threshold
        values = np.full(_SLOTS if config.slot_occurrence_thresholds else 1, default, np.uint32)
        for each in config.slot_occurrence_thresholds:
            if each.slot >= _SLOTS:
                raise InvalidRequestError(f"occurrence threshold of slot {each.slot}: slots are 0..{_SLOTS - 1}")
            values[each.slot] = each.occurrence_threshold
        highest = int(values.max())
        if highest > kernels.MAX_COUNT:
            _log.warning("occurrence threshold %d can never be passed: counts saturate at 15", highest)
        return cls(values)

    @property
    def mask(self) -> int:
        """What a slot is cut to, to index `values`."""
        return self.values.size - 1


class OccurrenceFilter(Protocol):
    """Decides which new ids may have a row. Thread-safe."""

    needs_table: ClassVar[bool]
    """Whether a decision makes sense only beside a table (`intercept_gradient` has none)."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that the filter may come to use; it is committed as ids fall, all over it."""

    def filtered(
        self,
        ids: Ids,
        counts: Counts | None = None,
        thresholds: Thresholds | None = None,
        present: Bools | None = None,
    ) -> Bools:
        """Decide in input order, counting as it goes.

        Args:
            ids: uint64[n], C-contiguous, repeats allowed.
            counts: uint32[n] occurrences each id stands for, or None for one each.
            thresholds: Instead of the filter's own.
            present: bool[n], True for ids that have a row: they pass and are not counted. None: no id has one.

        Returns:
            bool[n], True where the id shall not get a row yet.
        """

    def may_pass(self, ids: Ids, counts: Counts | None = None) -> Bools:
        """bool[n]: false for ids that `filtered` would surely leave out, by the filter's thresholds; counts nothing."""

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""

    def save(self, base: str) -> None:
        """Write the filter's files, if it has state."""

    def restore(self, base: str) -> None:
        """Read back what `save` wrote; CheckpointError if that is missing, incomplete or of another shape."""


class DummyFilter:
    """Filters nothing."""

    needs_table: ClassVar[bool] = False

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

    def save(self, base: str) -> None:
        """Write nothing: there is no state."""

    def restore(self, base: str) -> None:
        """Read nothing: there is no state."""


class ProbabilisticFilter:
    """Keeps each new id with a probability that grows with its occurrences in one call; remembers nothing.

    Draws are a function of (seed, number of the call, id, position): the same calls in the same order decide the same.
    """

    needs_table: ClassVar[bool] = True

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
        ids, counts, present = _checked(ids, counts, present)
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

    def save(self, base: str) -> None:
        """Write nothing: there is no state."""

    def restore(self, base: str) -> None:
        """Read nothing: there is no state."""


class CountingFilter:
    """One block of saturating counters. One lock guards cells and state.

    Attributes:
        bits: Width of a cell, 8 or 16; all but 4 bits of it keep a signature of the id.
        capacity: Elements the block is made for.
        total: Home cells, ⌊capacity · fill⌋.
    """

    needs_table: ClassVar[bool] = False

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
        self.thresholds = thresholds or Thresholds.constant(0)
        self._cells = np.zeros(self.total + kernels.EXTRA_CELLS, np.uint8 if bits == 8 else np.uint16)
        self._state = np.zeros(2, np.int64)
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cells, which are committed as ids fall on them."""
        return self._cells.nbytes

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

    def add(self, ids: Ids, counts: Counts | None = None) -> Counts:
        """Count ids; uint32[n] how often each had been counted before, 15 where there was no cell."""
        ids, counts, _ = _checked(ids, counts)
        out = np.empty(ids.size, np.uint32)
        with self._lock:
            kernels.counting_add(
                address_of(self._cells),
                self.bits,
                self.total,
                self.capacity,
                address_of(self._state),
                address_of(ids),
                0 if counts is None else address_of(counts),
                ids.size,
                address_of(out),
            )
        return out

    def get(self, ids: Ids) -> Counts:
        """uint32[n] how often each id has been counted."""
        return self.add(ids, np.zeros(ids.size, np.uint32))

    def filtered(
        self,
        ids: Ids,
        counts: Counts | None = None,
        thresholds: Thresholds | None = None,
        present: Bools | None = None,
    ) -> Bools:
        """Decide by counting."""
        chosen = thresholds or self.thresholds
        ids, counts, present = _checked(ids, counts, present)
        limit = chosen.values[(ids >> np.uint64(48)) & np.uint64(chosen.mask)]
        counted = limit > 0 if present is None else (limit > 0) & ~present
        out = np.zeros(ids.size, np.bool_)
        chosen_counts = None if counts is None else counts[counted]
        out[counted] = self.add(ids[counted], chosen_counts) < limit[counted]
        return out

    def may_pass(self, ids: Ids, counts: Counts | None = None) -> Bools:
        """By the counts there are and all of these."""
        return _may_reach(self.thresholds, ids, counts, self.get(ids))

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""
        warm(kernels.counting_add)

    def save(self, base: str) -> None:
        """Refuse: the file format is the sliding filter's."""
        raise InvalidRequestError("a single counting block has no file format; save a SlidingFilter")

    def restore(self, base: str) -> None:
        """Refuse: the file format is the sliding filter's."""
        raise InvalidRequestError("a single counting block has no file format; restore a SlidingFilter")

    def clone(self) -> CountingFilter:
        """An independent copy."""
        twin = CountingFilter(self.capacity, fill=self.fill, bits=self.bits, thresholds=self.thresholds)
        with self._lock:
            twin._cells[:] = self._cells
            twin._state[:] = self._state
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CountingFilter):
            return NotImplemented
        return (
            (self.bits, self.capacity, self.total) == (other.bits, other.capacity, other.total)
            and np.array_equal(self._state, other._state)
            and np.array_equal(self._cells, other._cells)
        )

    __hash__ = None  # type: ignore[assignment]


class SlidingFilter:
    """Counts over a sliding window of blocks: the newest block takes new ids, the oldest is forgotten when it is full.

    One lock guards cells and state; memory is touched only where ids fall, so a large capacity costs nothing at first.

    Attributes:
        capacity: Ids the window remembers, at least 300.
        split_num: As given; the number of blocks is at least 5, files are `split_num`.
    """

    needs_table: ClassVar[bool] = False

    def __init__(
        self,
        capacity: int = DEFAULT_CAPACITY,
        split_num: int = DEFAULT_SPLITS,
        *,
        thresholds: Thresholds | None = None,
    ) -> None:
        if split_num < 1:
            raise InvalidRequestError(f"split_num={split_num}: a sliding filter has at least 1")
        self.capacity = max(capacity, _MIN_CAPACITY)
        self.split_num = split_num
        self.blocks = max(split_num, _MIN_BLOCKS)
        self.block_capacity = self.capacity // (self.blocks - 1)
        self.total = int(self.block_capacity * _SLIDING_FILL)
        if self.total < 1:
            raise InvalidRequestError(f"capacity {self.capacity} in {self.blocks} blocks leaves no cell")
        self.thresholds = thresholds or Thresholds.constant(0)
        self._cells = np.zeros((self.blocks, self.total + kernels.EXTRA_CELLS), np.uint16)
        self._state = np.zeros(kernels.SLIDING_WORDS + self.blocks, np.int64)
        self._lock = threading.Lock()

    @property
    def head(self) -> int:
        """Index of the block that takes new ids."""
        return int(self._state[kernels.HEAD])

    @property
    def moves(self) -> int:
        """How often the window has moved on."""
        return int(self._state[kernels.MOVES])

    @property
    def failures(self) -> int:
        """Ids for which there was no cell."""
        return int(self._state[kernels.SLIDING_FAILURES])

    @property
    def elements(self) -> int:
        """Cells in use in all blocks."""
        return int(self._state[kernels.SLIDING_WORDS :].sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cells, which are committed as ids fall on them: all over, so soon all of them."""
        return self._cells.nbytes

    def add(self, ids: Ids, counts: Counts | None = None) -> Counts:
        """Count ids; uint32[n] how often each had been counted before, 15 where there was no cell."""
        ids, counts, _ = _checked(ids, counts)
        out = np.empty(ids.size, np.uint32)
        with self._lock:
            kernels.sliding_add(
                address_of(self._cells),
                self.total,
                self.block_capacity,
                self.blocks,
                address_of(self._state),
                address_of(ids),
                0 if counts is None else address_of(counts),
                ids.size,
                address_of(out),
            )
        return out

    def get(self, ids: Ids) -> Counts:
        """uint32[n] how often each id has been counted."""
        return self.add(ids, np.zeros(ids.size, np.uint32))

    def filtered(
        self,
        ids: Ids,
        counts: Counts | None = None,
        thresholds: Thresholds | None = None,
        present: Bools | None = None,
    ) -> Bools:
        """Decide by counting."""
        chosen = thresholds or self.thresholds
        ids, counts, present = _checked(ids, counts, present)
        out = np.empty(ids.size, np.bool_)
        with self._lock:
            kernels.sliding_filter(
                address_of(self._cells),
                self.total,
                self.block_capacity,
                self.blocks,
                address_of(self._state),
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
        """By the counts there are and all of these."""
        return _may_reach(self.thresholds, ids, counts, self.get(ids))

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""
        warm(kernels.sliding_filter, kernels.sliding_add)

    def save(self, base: str) -> None:
        """Write one file per split. Blocks are copied one by one, so ids counted meanwhile may or may not be in."""
        from trilith_services.ps.reference.filter_shards import save_filter

        save_filter(self, base)

    def restore(self, base: str) -> None:
        """Read back what `save` wrote; the filter is unchanged if that is refused."""
        from trilith_services.ps.reference.filter_shards import restore_filter

        restore_filter(self, base)

    def export_state(self) -> npt.NDArray[np.int64]:
        """int64[3 + blocks]: head, moves, failures, elements of each block."""
        with self._lock:
            return self._state.copy()

    def export_block(self, block: int) -> tuple[npt.NDArray[np.uint16], int]:
        """A copy of one block's cells, uint16[total + 64], and its element count."""
        with self._lock:
            return self._cells[block].copy(), int(self._state[kernels.SLIDING_WORDS + block])

    def import_all(self, state: npt.NDArray[np.int64], cells: npt.NDArray[np.uint16]) -> None:
        """Take over a whole state: int64[3 + blocks] and uint16[blocks, total + 64], which the filter keeps.

        Raises:
            InvalidRequestError: It is of another shape, or no state that counting leads to; kernels would follow it.
        """
        if state.shape != self._state.shape or state.dtype != np.int64 or not state.flags.c_contiguous:
            raise InvalidRequestError(
                f"state is {state.dtype}{list(state.shape)}, expected int64{list(self._state.shape)}"
            )
        if cells.shape != self._cells.shape or cells.dtype != np.uint16:
            raise InvalidRequestError(
                f"cells are {cells.dtype}{list(cells.shape)}, expected uint16{list(self._cells.shape)}"
            )
        head, moves, failures = (int(word) for word in state[: kernels.SLIDING_WORDS])
        if not 0 <= head < self.blocks:
            raise InvalidRequestError(f"head={head} of {self.blocks} blocks")
        if not (0 <= moves < 2**62 and 0 <= failures < 2**62):
            raise InvalidRequestError(f"moves={moves}, failures={failures}: not between 0 and 2**62")
        elements = state[kernels.SLIDING_WORDS :]
        if elements.min() < 0 or elements.max() > self.block_capacity:
            raise InvalidRequestError(f"{elements.tolist()} elements in blocks of {self.block_capacity}")
        with self._lock:
            self._state, self._cells = state, np.ascontiguousarray(cells)

    def clone(self) -> SlidingFilter:
        """An independent copy."""
        twin = SlidingFilter(self.capacity, self.split_num, thresholds=self.thresholds)
        with self._lock:
            twin._cells[:] = self._cells
            twin._state[:] = self._state
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlidingFilter):
            return NotImplemented
        return (
            (self.capacity, self.split_num) == (other.capacity, other.split_num)
            and np.array_equal(self._state, other._state)
            and np.array_equal(self._cells, other._cells)
        )

    __hash__ = None  # type: ignore[assignment]


def _checked(ids: Ids, counts: Counts | None, present: Bools | None = None) -> tuple[Ids, Counts | None, Bools | None]:
    """The arrays as kernels read them."""
    ids = as_ids(ids)
    if present is not None:
        if present.dtype != np.bool_ or present.shape != ids.shape:
            raise InvalidRequestError(f"present is {present.dtype}{list(present.shape)}, expected bool[{ids.size}]")
        present = np.ascontiguousarray(present)
    return ids, as_counts(counts, ids.size), present


def _may_reach(thresholds: Thresholds, ids: Ids, counts: Counts | None, before: Counts) -> Bools:
    """bool[n]: whether an id counted `before` reaches its threshold within a call that counts all of these."""
    distinct, places = np.unique(ids, return_inverse=True)
    totals = np.zeros(distinct.size, np.int64)
    np.add.at(totals, places, 1 if counts is None else counts)
    limit = thresholds.values[(ids >> np.uint64(48)) & np.uint64(thresholds.mask)]
    reached: Bools = before + totals[places] >= limit
    return reached


def make_filter(config: ps_pb2.TableConfig) -> OccurrenceFilter | None:
    """The filter that a table's config asks for, None if none."""
    kinds = ps_pb2.TableConfig.FilterKind
    if config.filter == kinds.NO_FILTER:
        return None
    thresholds = Thresholds.of(config.occurrence_thresholds)
    if config.filter == kinds.SLIDING:
        return SlidingFilter(
            config.filter_capacity or DEFAULT_CAPACITY, config.filter_splits or DEFAULT_SPLITS, thresholds=thresholds
        )
    if config.filter in {kinds.PROBABILISTIC, kinds.PROBABILISTIC_EQUAL}:
        equal = config.filter == kinds.PROBABILISTIC_EQUAL
        return ProbabilisticFilter(thresholds, equal=equal, seed=config.seed)
    raise InvalidRequestError(f"table {config.name!r}: filter {config.filter} is none of {list(kinds.keys())}")


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
    if table is None and occurrence_filter.needs_table:
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

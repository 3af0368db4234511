"""Thresholds by slot, and what a table asks of any filter."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.kernels import filters as kernels
from trilith_services.ps.engine.rows import as_counts, checked_ids

__all__ = ["Bools", "Counts", "Ids", "OccurrenceFilter", "Thresholds", "checked"]

_log = logging.getLogger(__name__)

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
        for given in config.slot_occurrence_thresholds:
            if given.slot >= _SLOTS:
                raise InvalidRequestError(f"occurrence threshold of slot {given.slot}: slots are 0..{_SLOTS - 1}")
            values[given.slot] = given.occurrence_threshold
        highest = int(values.max())
        if highest > kernels.MAX_COUNT:
            _log.warning("occurrence threshold %d can never be passed: counts saturate at 15", highest)
        return cls(values)

    @property
    def mask(self) -> int:
        """What a slot is cut to, to index `values`."""
        return self.values.size - 1

    def for_ids(self, ids: Ids) -> Counts:
        """uint32[n]: the threshold of each id."""
        limits: Counts = self.values[(ids >> np.uint64(48)) & np.uint64(self.mask)]
        return limits


class OccurrenceFilter(Protocol):
    """Decides which ids that have no row yet may get one. Thread-safe; tables may share one."""

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


def checked(ids: Ids, counts: Counts | None, present: Bools | None = None) -> tuple[Ids, Counts | None, Bools | None]:
    """The arrays as kernels read them."""
    ids = checked_ids(ids)
    if present is not None:
        if present.dtype != np.bool_ or present.shape != ids.shape:
            raise InvalidRequestError(f"present is {present.dtype}{list(present.shape)}, expected bool[{ids.size}]")
        present = np.ascontiguousarray(present)
    return ids, as_counts(counts, ids.size), present

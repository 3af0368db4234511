"""SlidingFilter: counts of the ids seen lately."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith_services.ps.engine.filters.counting import CellCounts
from trilith_services.ps.engine.filters.thresholds import Bools, Counts, Ids, Thresholds, checked
from trilith_services.ps.engine.kernels import filters as kernels

__all__ = ["DEFAULT_CAPACITY", "DEFAULT_SPLITS", "SlidingFilter"]

DEFAULT_CAPACITY = 300_000_000
DEFAULT_SPLITS = 7
_MIN_CAPACITY = 300
_MIN_BLOCKS = 5
_SLIDING_FILL = 1.2


class SlidingFilter(CellCounts):
    """Counts over a sliding window of blocks: the newest block takes new ids, the oldest is forgotten when it is full.

    Memory is touched only where ids fall, so a large capacity costs nothing at first.

    Attributes:
        capacity: Ids the window remembers, at least 300.
        split_num: As given; the number of blocks is at least 5, files are `split_num`.
    """

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
        cells = np.zeros((self.blocks, self.total + kernels.EXTRA_CELLS), np.uint16)
        super().__init__((self.capacity, split_num), cells, kernels.SLIDING_WORDS + self.blocks, thresholds)

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

    def _add(self, ids: int, counts: int, n: int, out: int) -> None:
        kernels.sliding_add(
            address_of(self._cells),
            self.total,
            self.block_capacity,
            self.blocks,
            address_of(self._state),
            ids,
            counts,
            n,
            out,
        )

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

    def compile(self) -> None:
        """Compile or load the kernels that deciding runs."""
        warm(kernels.sliding_filter, kernels.sliding_add)

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

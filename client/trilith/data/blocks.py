"""Memory that is used again once nobody holds it."""

from __future__ import annotations

import sys
from collections import deque

import numpy as np
import numpy.typing as npt

__all__ = ["Blocks"]

_CELL = [np.empty(0)]
_UNSHARED = sys.getrefcount(_CELL[0])
"""References to what one list alone holds, as the interpreter counts them."""
_SMALL = 1 << 20
_KEPT = 64 << 20


class Blocks:
    """Blocks of memory, each given again once nobody holds it or a view of it. Any number of threads may ask.

    New memory costs a page fault for every 4 KB.
    """

    def __init__(self) -> None:
        self._blocks: deque[npt.NDArray[np.uint8]] = deque()

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """uint8[size or more], content undefined."""
        for _ in range(len(self._blocks)):
            try:
                cell = [self._blocks.popleft()]
            except IndexError:  # another thread took it
                break
            if sys.getrefcount(cell[0]) > _UNSHARED:  # every view of a block holds it
                self._blocks.append(cell[0])
            elif size <= cell[0].size <= 2 * size + _SMALL:
                return cell[0]
        return np.empty(size, np.uint8)

    def keep(self, block: npt.NDArray[np.uint8]) -> None:
        """Remember a block for when nobody holds it any more."""
        if block.size * (len(self._blocks) + 1) <= _KEPT:
            self._blocks.append(block)

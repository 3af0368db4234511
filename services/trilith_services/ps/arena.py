"""Anonymous memory whose addresses never change: rows stay where they are while their table grows."""

from __future__ import annotations

import mmap

import numpy as np

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of

__all__ = ["HUGE_PAGE", "Mapping"]

HUGE_PAGE = 2 << 20
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it


class Mapping:
    """Zeroed memory, reserved at once and committed page by page when first touched.

    Huge pages are asked for only beyond the first `plain_bytes`, so that a small table stays small.
    """

    def __init__(self, size: int, *, plain_bytes: int = 8 * HUGE_PAGE) -> None:
        self.size = max(mmap.PAGESIZE, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryLimitError(
                f"the kernel refused to reserve {self.size} bytes of address space: {error}"
            ) from None
        self.address = address_of(np.frombuffer(self._map, np.uint8))
        # Past the plain part, at the next huge-page boundary of the address space.
        start = -(-(self.address + plain_bytes) // HUGE_PAGE) * HUGE_PAGE - self.address
        if start < self.size and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE, start, self.size - start)
            except OSError:
                pass  # a kernel without transparent huge pages: slower, not wrong

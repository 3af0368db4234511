"""Anonymous memory whose addresses never change: rows stay where they are while their table grows."""

from __future__ import annotations

import mmap

import numpy as np

from trilith.errors import MemoryLimitError
from trilith.ops.memory import address_of

__all__ = ["HUGE_PAGE", "Arena", "Mapping"]

HUGE_PAGE = 2 << 20
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it


class Mapping:
    """Zeroed memory, reserved at once and committed page by page when first touched; aligned to huge pages."""

    def __init__(self, size: int) -> None:
        self.size = max(mmap.PAGESIZE, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        spare = HUGE_PAGE if self.size >= HUGE_PAGE else 0
        try:
            self._map = mmap.mmap(-1, self.size + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryLimitError(f"the kernel refused {self.size} bytes of address space: {error}") from None
        start = address_of(np.frombuffer(self._map, np.uint8))
        self._skipped = -start % HUGE_PAGE if spare else 0
        self.address = start + self._skipped

    def advise_huge(self, offset: int = 0, size: int | None = None) -> None:
        """Ask for huge pages from `offset` on: fewer faults when it fills, fewer TLB misses ever after.

        Not for small tables, which would take 2 MiB where a few KiB do.
        """
        start = -(-offset // HUGE_PAGE) * HUGE_PAGE
        end = self.size if size is None else offset + size
        if start < end and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE, self._skipped + start, end - start)
            except OSError:
                pass  # a kernel without transparent huge pages: slower, not wrong


class Arena:
    """Address space for numbered items of one size, an equal part of it for each stripe."""

    def __init__(self, stripes: int, items: int, item_bytes: int) -> None:
        """Reserve parts for item numbers 0 to `items`; items of 0 bytes take none."""
        self.item_bytes = item_bytes
        self._part = -(-(items + 1) * item_bytes // HUGE_PAGE) * HUGE_PAGE
        self._mapping = Mapping(stripes * self._part) if item_bytes else None

    def address(self, s: int) -> int:
        """Where item number 0 of stripe `s` is; 0 if items have no bytes."""
        return self._mapping.address + s * self._part if self._mapping else 0

    def advise_huge(self, s: int, items: int) -> None:
        """Ask for the huge pages of which so many items of stripe `s` need half or more."""
        if self._mapping:
            self._mapping.advise_huge(s * self._part, round(items * self.item_bytes / HUGE_PAGE) * HUGE_PAGE)

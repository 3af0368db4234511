"""Anonymous memory for rows and indexes: address space that is committed when touched, and can be given back."""

from __future__ import annotations

import ctypes
import mmap
import os

from trilith.errors import MemoryLimitError

__all__ = ["HUGE_PAGE", "Arena", "MappedMemory"]

HUGE_PAGE = 2 << 20
_PAGE = mmap.PAGESIZE
# Linux's numbers; Python's mmap has no names for some, and neither moves memory nor gives up a part of it.
_READ_WRITE = 0x1 | 0x2
_PRIVATE_ANONYMOUS_NORESERVE = 0x2 | 0x20 | 0x4000
_MAY_MOVE_FIXED = 0x1 | 0x2
_DONT_NEED, _HUGE = 4, 14
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedMemory:
    """Zeroed memory, reserved at once and committed page by page when first touched; aligned to huge pages.

    Attributes:
        address: Of its first byte.
        size: Bytes, whole pages.
    """

    __slots__ = ("_holes", "address", "size")

    def __init__(self, size: int) -> None:
        self.address = 0
        self._holes: list[tuple[int, int]] = []
        self.size = max(_PAGE, _up(size, _PAGE))
        spare = HUGE_PAGE if self.size >= HUGE_PAGE else 0
        start = _libc.mmap(None, self.size + spare, _READ_WRITE, _PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
        if start == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise MemoryLimitError(f"the kernel refused {self.size} bytes of address space: {reason}")
        self.address = _up(start, HUGE_PAGE) if spare else start
        if spare:
            _unmap(start, self.address - start)
            _unmap(self.address + self.size, start + spare - self.address)

    def __del__(self) -> None:
        if self.address:
            at = 0
            for start, end in sorted(self._holes):
                _unmap(self.address + at, start - at)
                at = end
            _unmap(self.address + at, self.size - at)

    def advise_huge(self, offset: int = 0, size: int | None = None) -> None:
        """Ask for huge pages from `offset` on: fewer faults when it fills, fewer TLB misses ever after.

        Not for small tables, which would take 2 MiB where a few KiB do. A kernel without transparent huge pages refuses
        it: slower, not wrong.
        """
        start = _up(offset, HUGE_PAGE)
        end = self.size if size is None else offset + size
        if start < end:
            _libc.madvise(self.address + start, end - start, _HUGE)

    def discard(self, start: int, end: int) -> None:
        """Give the whole pages between two offsets back to the machine; they are zeros when touched again."""
        start, end = _up(start, _PAGE), end // _PAGE * _PAGE
        if start < end:
            _libc.madvise(self.address + start, end - start, _DONT_NEED)

    def move(self, offset: int, size: int, target: MappedMemory, to: int, used: int) -> None:
        """Move `size` bytes, of which the first `used` hold something, into another mapping, and forget them here.

        Pages change their address and are not copied, except where the kernel does not move them.
        """
        here, there = self.address + offset, target.address + to
        if _libc.mremap(here, size, size, _MAY_MOVE_FIXED, there) == there:
            self._holes.append((offset, offset + size))  # somebody else's from now on
            return
        ctypes.memmove(there, here, min(used, size))
        self.discard(offset, offset + size)


class Arena:
    """Address space for numbered items of one size, a part of it for each stripe.

    A part that gets too small is exchanged for a larger one elsewhere, into which its pages are moved.
    """

    def __init__(self, stripes: int, items: int, item_bytes: int) -> None:
        """Reserve parts for item numbers 0 to `items`; items of 0 bytes take none."""
        self.item_bytes = item_bytes
        self._part = self._part_bytes(items)
        self._shared = MappedMemory(stripes * self._part) if item_bytes else None
        self._own: dict[int, MappedMemory] = {}
        self._advised: dict[int, list[int]] = {}  # where a part's memory changes its kind: it is moved in such pieces

    def address(self, s: int) -> int:
        """Where item number 0 of stripe `s` is; 0 if items have no bytes."""
        mapping, offset, _ = self._place(s)
        return mapping.address + offset if mapping else 0

    def grow(self, s: int, items: int, used: int) -> None:
        """Make room for item numbers 0 to `items` in the part of stripe `s`, which holds `used` and 0; it moves."""
        old, offset, size = self._place(s)
        if old is None:
            return
        new = MappedMemory(self._part_bytes(items))
        used_bytes = (used + 1) * self.item_bytes
        at = 0
        for end in [*self._advised.pop(s, []), size]:
            if at < end <= size:
                old.move(offset + at, end - at, new, at, max(0, used_bytes - at))
                at = end
        self._own[s] = new
        self._advised[s] = [size]

    def advise_huge(self, s: int, items: int) -> None:
        """Ask for the huge pages of which so many items of stripe `s` need half or more."""
        mapping, offset, size = self._place(s)
        wanted = round(items * self.item_bytes / HUGE_PAGE) * HUGE_PAGE
        if mapping is not None and 0 < wanted <= size:
            mapping.advise_huge(offset, wanted)
            self._advised[s] = sorted({*self._advised.get(s, []), wanted})

    def discard(self, s: int, first: int, last: int) -> None:
        """Give back the pages on which only items first..last of stripe `s` are, or those never used behind them."""
        mapping, offset, size = self._place(s)
        if mapping is not None:
            end = min(size, _up((last + 1) * self.item_bytes, _PAGE))
            mapping.discard(offset + first * self.item_bytes, offset + end)

    def _place(self, s: int) -> tuple[MappedMemory | None, int, int]:
        """The mapping that holds the part of stripe `s`, where in it, and the part's size."""
        own = self._own.get(s)
        return (own, 0, own.size) if own is not None else (self._shared, s * self._part, self._part)

    def _part_bytes(self, items: int) -> int:
        size = (items + 1) * self.item_bytes
        return _up(size, HUGE_PAGE if size >= HUGE_PAGE else _PAGE)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _unmap(address: int, size: int) -> None:
    if size > 0:
        _libc.munmap(address, size)

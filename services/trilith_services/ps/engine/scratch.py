"""One thread's scratch memory: a batch grouped by stripe, and what kernels work in."""

from __future__ import annotations

import threading

import numpy as np

from trilith.ops.memory import address_of
from trilith.shard import UInt64Array
from trilith_services.ps.engine.kernels import index
from trilith_services.ps.engine.kernels.index import STRIPES

__all__ = ["SCRATCH", "Batch", "group", "work_memory"]

Batch = tuple[int, int, int]
"""Addresses of starts, hashes and positions, as `index.group_by_stripe` describes them."""


class _Scratch(threading.local):
    """One thread's memory for grouping a batch and for kernels' own use, grown as needed."""

    def __init__(self) -> None:
        self.room = 0
        self.starts = np.zeros(STRIPES + 1, np.int64)
        self.work, self.work_at = np.empty(0, np.uint8), 0
        self.batch: Batch = (0, 0, 0)
        self.unsorted_at = 0
        self.arrays = np.empty((3, 0), np.uint64)


SCRATCH = _Scratch()


def group(ids: UInt64Array) -> Batch:
    """Group ids by stripe; the result is good until this thread's next call."""
    if len(ids) > SCRATCH.room:
        SCRATCH.room = 1 << max(10, (len(ids) - 1).bit_length())
        SCRATCH.arrays = np.empty((3, SCRATCH.room), np.uint64)
        start, step = address_of(SCRATCH.arrays), 8 * SCRATCH.room
        SCRATCH.batch = address_of(SCRATCH.starts), start, start + step
        SCRATCH.unsorted_at = start + 2 * step
    starts, hashes, positions = SCRATCH.batch
    index.group_by_stripe(address_of(ids), len(ids), SCRATCH.unsorted_at, hashes, positions, starts)
    return SCRATCH.batch


def work_memory(size: int) -> int:
    """Address of `size` bytes of this thread's scratch memory for kernels."""
    if SCRATCH.work.size < size:
        SCRATCH.work = np.empty(size, np.uint8)
        SCRATCH.work_at = address_of(SCRATCH.work)
    return SCRATCH.work_at

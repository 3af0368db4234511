"""Kernels of the occurrence filters: blocks of small counters, probed in place.

A cell is `signature << 4 | count`, 0 when empty. A block is `total` home cells and 64 more, so probing never wraps.
Blocks may be as large as the machine, so a batch is walked with prefetches some ids ahead.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from trilith.ops.hashing import mix64, uniform01
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import (
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    prefetch,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)

__all__ = [
    "BLOCK_ELEMENTS",
    "BLOCK_FAILURES",
    "EXTRA_CELLS",
    "HEAD",
    "MAX_COUNT",
    "MOVES",
    "SLIDING_FAILURES",
    "SLIDING_STEPS",
    "SLIDING_WORDS",
    "counting_add",
    "probabilistic_filter",
    "sliding_add",
    "sliding_filter",
]

MAX_COUNT = 15
EXTRA_CELLS = 64
SLIDING_STEPS = 16
_AHEAD = 16
_ONE = np.float32(1.0)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)

# Words of a sliding filter's state, before the element counts of its blocks.
HEAD, MOVES, SLIDING_FAILURES, SLIDING_WORDS = 0, 1, 2, 3
# Words of a counting block's state.
BLOCK_ELEMENTS, BLOCK_FAILURES = 0, 1


@inlined
def _signature(fid: np.uint64, bits: int) -> int:
    """The part of an id that a cell keeps, bits - 4 of them."""
    folded = (fid >> np.uint64(17)) | (fid << np.uint64(15))
    return _int64(folded & ((np.uint64(1) << np.uint64(bits - 4)) - np.uint64(1)))


@inlined
def _home(fid: np.uint64, total: int) -> int:
    """The cell at which probing starts. The hash is fixed, so a saved filter reads the same everywhere."""
    return _int64(mix64(fid) % np.uint64(total))


@inlined
def _load(cells: int, bits: int, index: int) -> int:
    if bits == 16:
        return _int64(load_u16(cells, index))
    return _int64(load_u8(cells, index))


@inlined
def _store(cells: int, bits: int, index: int, value: int) -> None:
    if bits == 16:
        store_u16(cells, index, np.uint16(value))
    else:
        store_u8(cells, index, np.uint8(value))


@inlined
def _load_i64(address: int, index: int) -> int:
    return _int64(load_u64(address, index))


@inlined
def _store_i64(address: int, index: int, value: int) -> None:
    store_u64(address, index, np.uint64(value))


@inlined
def _saturated(count: int) -> int:
    return count if count < MAX_COUNT else MAX_COUNT


@inlined
def _probe(cells: int, bits: int, home: int, steps: int, signature: int) -> int:
    """First cell from `home` that is empty or of this signature; -1 if `steps` cells are neither."""
    for index in range(home, home + steps):
        value = _load(cells, bits, index)
        if value == 0 or (value >> 4) == signature:
            return index
    return -1


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def counting_add(
    cells: int, bits: int, total: int, capacity: int, state: int, ids: int, counts: int, n: int, out: int
) -> None:
    """Count ids in one block and say how often each had been counted before; 15 where the block has no cell for it.

    Args:
        cells: Address of uint8 or uint16 [total + 64], written.
        bits: 8 or 16, width of a cell.
        total: Home cells.
        capacity: What the element count is capped at.
        state: Address of int64[2], written: elements, failures.
        ids: Address of uint64[n], repeats counted in order.
        counts: Address of uint32[n] occurrences per id, 0 only reads; or 0 for one each.
        n: Number of ids.
        out: Address of uint32[n], written: the count before.
    """
    elements = _load_i64(state, BLOCK_ELEMENTS)
    failures = _load_i64(state, BLOCK_FAILURES)
    for i in range(n):
        if i + _AHEAD < n:
            prefetch(cells + _home(load_u64(ids, i + _AHEAD), total) * (bits >> 3))
        fid = load_u64(ids, i)
        count = _int64(1) if counts == 0 else _int64(load_u32(counts, i))
        signature = _signature(fid, bits)
        index = _probe(cells, bits, _home(fid, total), EXTRA_CELLS, signature)
        old = MAX_COUNT
        if index >= 0:
            value = _load(cells, bits, index)
            old = value & MAX_COUNT
            if count > 0:
                _store(cells, bits, index, (signature << 4) | _saturated(old + count))
                if value == 0:
                    elements = min(capacity, elements + 1)
        elif count > 0:
            failures += 1
        store_u32(out, i, np.uint32(old))
    _store_i64(state, BLOCK_ELEMENTS, elements)
    _store_i64(state, BLOCK_FAILURES, failures)


@inlined
def _sliding_step(cells: int, total: int, capacity: int, blocks: int, state: int, fid: np.uint64, count: int) -> int:
    """Count one id in the window of blocks (count 0: only look) and return its count before."""
    signature = _signature(fid, 16)
    home = _home(fid, total)
    stride = (total + EXTRA_CELLS) * 2
    head = _load_i64(state, HEAD)
    block = head
    index = _probe(cells + block * stride, 16, home, SLIDING_STEPS, signature)
    if index < 0:
        block = (head + 1) % blocks
        index = _probe(cells + block * stride, 16, home, SLIDING_STEPS, signature)
    if index < 0:
        if count > 0:
            _store_i64(state, SLIDING_FAILURES, _load_i64(state, SLIDING_FAILURES) + 1)
        return MAX_COUNT
    value = _load(cells + block * stride, 16, index)
    old = value & MAX_COUNT
    if value == 0:
        back = head
        for _ in range(min(_load_i64(state, MOVES), blocks - 2)):
            back = blocks - 1 if back == 0 else back - 1
            found = _probe(cells + back * stride, 16, home, SLIDING_STEPS, signature)
            if found >= 0:
                older = _load(cells + back * stride, 16, found)
                if older != 0:
                    old = older & MAX_COUNT
                    break
    if count > 0:
        _store(cells + block * stride, 16, index, (signature << 4) | _saturated(old + count))
        if value == 0:
            words = SLIDING_WORDS
            _store_i64(state, words + block, min(capacity, _load_i64(state, words + block) + 1))
            if _load_i64(state, words + head) >= capacity - 1:
                _advance(cells, stride, blocks, state, head)
    return old


@inlined
def _advance(cells: int, stride: int, blocks: int, state: int, head: int) -> None:
    """Move the window on by one block and empty the block after its new head."""
    head = (head + 1) % blocks
    _store_i64(state, HEAD, head)
    _store_i64(state, MOVES, _load_i64(state, MOVES) + 1)
    cleared = (head + 1) % blocks
    for index in range(stride // 2):
        store_u16(cells + cleared * stride, index, np.uint16(0))
    _store_i64(state, SLIDING_WORDS + cleared, 0)


@inlined
def _sliding_prefetch(cells: int, total: int, blocks: int, state: int, fid: np.uint64) -> None:
    stride = (total + EXTRA_CELLS) * 2
    home = cells + _home(fid, total) * 2
    block = _load_i64(state, HEAD)
    for _ in range(min(_load_i64(state, MOVES), blocks - 2) + 1):
        prefetch(home + block * stride)
        block = blocks - 1 if block == 0 else block - 1


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def sliding_add(
    cells: int, total: int, capacity: int, blocks: int, state: int, ids: int, counts: int, n: int, out: int
) -> None:
    """Count ids in a sliding window of blocks and say how often each had been counted before.

    Args:
        cells: Address of uint16[blocks, total + 64], written.
        total: Home cells of one block.
        capacity: Elements of one block; at capacity - 1 the window moves on.
        blocks: Number of blocks, at least 5.
        state: Address of int64[3 + blocks], written: head, moves, failures, elements of each block.
        ids: Address of uint64[n], repeats counted in order.
        counts: Address of uint32[n] occurrences per id, 0 only reads; or 0 for one each.
        n: Number of ids.
        out: Address of uint32[n], written: the count before, 15 where there was no cell.
    """
    for i in range(n):
        if i + _AHEAD < n:
            _sliding_prefetch(cells, total, blocks, state, load_u64(ids, i + _AHEAD))
        count = _int64(1) if counts == 0 else _int64(load_u32(counts, i))
        old = _sliding_step(cells, total, capacity, blocks, state, load_u64(ids, i), count)
        store_u32(out, i, np.uint32(old))


@inlined
def _threshold(thresholds: int, mask: int, fid: np.uint64) -> int:
    return _int64(load_u32(thresholds, _int64((fid >> np.uint64(48)) & np.uint64(mask))))


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def sliding_filter(
    cells: int,
    total: int,
    capacity: int,
    blocks: int,
    state: int,
    thresholds: int,
    mask: int,
    ids: int,
    counts: int,
    present: int,
    n: int,
    out: int,
) -> None:
    """Decide in order which ids have not yet occurred often enough, counting them. A threshold of 0 counts nothing.

    Args:
        cells: Address of uint16[blocks, total + 64], written.
        total: Home cells of one block.
        capacity: Elements of one block.
        blocks: Number of blocks, at least 5.
        state: Address of int64[3 + blocks], written: head, moves, failures, elements of each block.
        thresholds: Address of uint32[mask + 1], by slot.
        mask: 32767, or 0 when all slots share one threshold.
        ids: Address of uint64[n].
        counts: Address of uint32[n] occurrences per id, or 0 for one each.
        present: Address of uint8[n], 1 for ids to pass uncounted; or 0 for none.
        n: Number of ids.
        out: Address of uint8[n], written: 1 where the id is filtered.
    """
    for i in range(n):
        if i + _AHEAD < n:
            _sliding_prefetch(cells, total, blocks, state, load_u64(ids, i + _AHEAD))
        fid = load_u64(ids, i)
        threshold = _threshold(thresholds, mask, fid)
        filtered = 0
        if threshold > 0 and (present == 0 or load_u8(present, i) == 0):
            count = _int64(1) if counts == 0 else _int64(load_u32(counts, i))
            if _sliding_step(cells, total, capacity, blocks, state, fid, count) < threshold:
                filtered = 1
        store_u8(out, i, np.uint8(filtered))


@kernel("void(uint64, boolean, int64, int64, int64, int64, int64, int64, int64)")
def probabilistic_filter(
    stream: np.uint64,
    equal: bool,
    thresholds: int,
    mask: int,
    ids: int,
    counts: int,
    present: int,
    n: int,
    out: int,
) -> None:
    """Keep each id with a probability that grows with its occurrences in this call.

    Args:
        stream: Says which draws: another one for every call.
        equal: Keep with 1 - 0.05^(count / threshold) instead of min(1, count / threshold).
        thresholds: Address of uint32[mask + 1], by slot.
        mask: 32767, or 0 when all slots share one threshold.
        ids: Address of uint64[n].
        counts: Address of uint32[n] occurrences per id, or 0 for one each.
        present: Address of uint8[n], 1 for ids to keep; or 0 for none.
        n: Number of ids.
        out: Address of uint8[n], written: 1 where the id is filtered.
    """
    key = mix64(stream)
    for i in range(n):
        fid = load_u64(ids, i)
        threshold = _threshold(thresholds, mask, fid)
        filtered = 0
        if threshold > 0 and (present == 0 or load_u8(present, i) == 0):
            count = _int64(1) if counts == 0 else _int64(load_u32(counts, i))
            share = np.float32(count) / np.float32(threshold)
            keep = _ONE - np.float32(np.exp(np.float32(-2.9957323) * share)) if equal else share
            if uniform01(key ^ mix64(fid), np.uint64(i)) >= keep:
                filtered = 1
        store_u8(out, i, np.uint8(filtered))

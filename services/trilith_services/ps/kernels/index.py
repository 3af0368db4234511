"""The index of a stripe: open addressing from 64-bit ids to row numbers, and the kernels that need nothing else.

A slot is 16 bytes: the id, and a word with the row's last update (Unix seconds, high 32 bits) over its number (low 32
bits, from 1). Number 0 is an empty slot, so fresh zero pages are an empty index and every id, 0 and 2^64-1 included, is
usable. The time lives here because a step dirties this line anyway, and because eviction then scans the index alone.
A probe begins at the first slot of a cache line and looks at whole lines.

Stripes are described by rows of an int64 matrix `stripes[s, column]`; kernels update it, under the stripe's lock.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u32, load_u64, prefetch, store_u32, store_u64
from trilith.ops.slots import SLOTS_PER_LINE, probe_line

I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]
U32: TypeAlias = npt.NDArray[np.uint32]
Bools: TypeAlias = npt.NDArray[np.bool_]

INDEX = 0  # address of the slots
MASK = 1  # slots - 1
ARENA = 2  # address of row number 1
USED = 3  # row numbers ever handed out
FREE = 4  # first freed row number, 0 if none; each freed row holds the next in its first four bytes
FREED = 5  # length of that list
SIZE = 6  # rows
LIMIT = 7  # rows at which the index must grow before another is added
COLUMNS = 8

# Ids whose memory is requested together: enough to fill the line-fill buffers. A read asks for less of each, and more
# of them pay for the start of every group.
GROUP = 32
READ_GROUP = 64

_ROW = np.uint64(0xFFFFFFFF)
_TIME_SHIFT = np.uint64(32)
_NONE = np.uint64(0)


@inlined
def get(address: Any, column: Any) -> Any:
    """int64 number `column` at `address`."""
    return np.int64(load_u64(address, column))


@inlined
def put(address: Any, column: Any, value: Any) -> Any:
    """Set int64 number `column` at `address`."""
    store_u64(address, column, np.uint64(value))


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def group_by_stripe(ids: int, n: int, bits: int, hashes: int, grouped: int, positions: int, starts: int) -> None:
    """Sort a batch by stripe, keeping the order of ids within each.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        bits: log2 of the number of stripes S, at least 1.
        hashes: Address of uint64[>= n], written: hash of grouped[j].
        grouped: Address of uint64[>= n], written: the ids, stripe after stripe.
        positions: Address of int64[>= n], written: where in the batch grouped[j] stood.
        starts: Address of int64[S + 1], written: stripe s is grouped[starts[s]:starts[s + 1]].
    """
    count = np.int64(1) << bits
    for s in range(count + 1):
        put(starts, s, 0)
    for i in range(n):
        value = mix64(load_u64(ids, i))
        stripe = stripe_of(value, bits)
        put(starts, stripe + 1, get(starts, stripe + 1) + 1)
    for s in range(count):
        put(starts, s + 1, get(starts, s + 1) + get(starts, s))
    for i in range(n):
        key = load_u64(ids, i)
        value = mix64(key)
        stripe = stripe_of(value, bits)
        j = get(starts, stripe)
        put(starts, stripe, j + 1)
        store_u64(grouped, j, key)
        store_u64(hashes, j, value)
        put(positions, j, i)
    for s in range(count, 0, -1):
        put(starts, s, get(starts, s - 1))
    put(starts, 0, 0)


@inlined
def stripe_of(value: Any, bits: Any) -> Any:
    """Stripe of an id with hash `value`: its highest bits, of which there is at least one."""
    return np.int64(value >> np.uint64(64 - bits))


@inlined
def row_number(word: Any) -> Any:
    """Row number in a slot's second word, 0 for an empty slot."""
    return np.int64(word & _ROW)


@inlined
def pack_slot(number: Any, time: Any) -> Any:
    """Second word of a slot."""
    return (np.uint64(time) << _TIME_SHIFT) | np.uint64(number)


@inlined
def slot_time(word: Any) -> Any:
    """Last update in a slot's second word, Unix seconds."""
    return np.int64(word >> _TIME_SHIFT)


@inlined
def home_of(value: Any, mask: Any) -> Any:
    """Where the probe for hash `value` starts: the first slot of a line."""
    return np.int64(value & np.uint64(mask)) & -SLOTS_PER_LINE


@inlined
def prefetch_slot(index: Any, mask: Any, value: Any) -> Any:
    """Request the line where the probe for hash `value` starts."""
    prefetch(index + 16 * home_of(value, mask))


@inlined
def find_slot(index: Any, mask: Any, key: Any, value: Any) -> Any:
    """Slot number of `key` with hash `value`, or that of the empty slot where it belongs."""
    line = home_of(value, mask)
    while True:
        slot = probe_line(index + 16 * line, key)
        if slot >= 0:
            return line + slot
        line = (line + SLOTS_PER_LINE) & mask


@inlined
def claim_row(stripes: int, s: Any, stride: Any, slot: Any, key: Any, time: Any) -> Any:
    """Put `key` into an empty slot with a row of its own, freed ones first; returns the row's address."""
    number = get(stripes, s * COLUMNS + FREE)
    if number != 0:
        address = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
        put(stripes, s * COLUMNS + FREE, np.int64(load_u32(address, 0)))
        put(stripes, s * COLUMNS + FREED, get(stripes, s * COLUMNS + FREED) - 1)
    else:
        number = get(stripes, s * COLUMNS + USED) + 1
        put(stripes, s * COLUMNS + USED, number)
        address = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
    index = get(stripes, s * COLUMNS + INDEX)
    store_u64(index, 2 * slot, key)
    store_u64(index, 2 * slot + 1, pack_slot(number, time))
    put(stripes, s * COLUMNS + SIZE, get(stripes, s * COLUMNS + SIZE) + 1)
    return address


@inlined
def release_slot(stripes: int, s: Any, stride: Any, slot: Any) -> Any:
    """Free the row of an occupied slot and close the gap, so that no probe meets a hole (Knuth 6.4, algorithm R)."""
    index = get(stripes, s * COLUMNS + INDEX)
    mask = get(stripes, s * COLUMNS + MASK)
    number = row_number(load_u64(index, 2 * slot + 1))
    address = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
    store_u32(address, 0, np.uint32(get(stripes, s * COLUMNS + FREE)))
    put(stripes, s * COLUMNS + FREE, number)
    put(stripes, s * COLUMNS + FREED, get(stripes, s * COLUMNS + FREED) + 1)
    put(stripes, s * COLUMNS + SIZE, get(stripes, s * COLUMNS + SIZE) - 1)
    hole = slot
    probe = slot
    while True:
        probe = (probe + 1) & mask
        word = load_u64(index, 2 * probe + 1)
        if word == _NONE:
            break
        key = load_u64(index, 2 * probe)
        home = home_of(mix64(key), mask)
        # The entry may move back only if its home is not inside (hole, probe].
        if ((probe - home) & mask) >= ((probe - hole) & mask):
            store_u64(index, 2 * hole, key)
            store_u64(index, 2 * hole + 1, word)
            hole = probe
    store_u64(index, 2 * hole + 1, _NONE)


@kernel("void(int64, int64, int64, int64)")
def rebuild_index(old: int, old_mask: int, new: int, new_mask: int) -> None:
    """Insert every occupied slot of one index into another, larger and empty one.

    Args:
        old: Address of the slots to read.
        old_mask: Their number - 1.
        new: Address of zeroed slots, written.
        new_mask: Their number - 1.
    """
    keys = np.empty(GROUP, np.uint64)
    words = np.empty(GROUP, np.uint64)
    hashes = np.empty(GROUP, np.uint64)
    slot = np.int64(0)
    while slot <= old_mask:
        m = 0
        while slot <= old_mask and m < GROUP:
            word = load_u64(old, 2 * slot + 1)
            if word != _NONE:
                keys[m] = load_u64(old, 2 * slot)
                words[m] = word
                hashes[m] = mix64(keys[m])
                prefetch_slot(new, new_mask, hashes[m])
                m += 1
            slot += 1
        for t in range(m):
            target = home_of(hashes[t], new_mask)
            while load_u64(new, 2 * target + 1) != _NONE:
                target = (target + 1) & new_mask
            store_u64(new, 2 * target, keys[t])
            store_u64(new, 2 * target + 1, words[t])


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def find_rows(stripes: int, bits: int, stride: int, ids: int, n: int, work: int, addresses: int, times: int) -> int:
    """Find where rows are.

    Args:
        stripes: Address of int64[S, COLUMNS].
        bits: log2 of S.
        stride: Bytes per row.
        ids: Address of uint64[n].
        n: Number of ids.
        work: Address of uint64[GROUP], scratch.
        addresses: Address of int64[n], written: the row's address, 0 if there is none.
        times: Address of uint32[n], written: the row's last update, Unix seconds; 0 to leave out.

    Returns:
        How many ids have a row.
    """
    present = 0
    for first in range(0, n, GROUP):
        count = min(GROUP, n - first)
        for t in range(count):
            value = mix64(load_u64(ids, first + t))
            store_u64(work, t, value)
            s = stripe_of(value, bits)
            prefetch_slot(get(stripes, s * COLUMNS + INDEX), get(stripes, s * COLUMNS + MASK), value)
        for t in range(count):
            value = load_u64(work, t)
            s = stripe_of(value, bits)
            index = get(stripes, s * COLUMNS + INDEX)
            slot = find_slot(index, get(stripes, s * COLUMNS + MASK), load_u64(ids, first + t), value)
            word = load_u64(index, 2 * slot + 1)
            number = row_number(word)
            row = np.int64(0)
            if number != 0:
                row = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
                present += 1
            put(addresses, first + t, row)
            if times != 0:
                store_u32(times, first + t, np.uint32(slot_time(word)))
    return present


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def erase_rows(stripes: int, stride: int, first: int, last: int, starts: int, hashes: int, grouped: int) -> int:
    """Delete rows.

    Args:
        stripes: Address of int64[S, COLUMNS], written.
        stride: Bytes per row.
        first: First stripe.
        last: One past the last stripe.
        starts: Address of int64[S + 1], from `group_by_stripe`, as are the next two.
        hashes: Address of uint64[n].
        grouped: Address of uint64[n].

    Returns:
        How many rows there were.
    """
    erased = 0
    for s in range(first, last):
        for j in range(get(starts, s), get(starts, s + 1)):
            index = get(stripes, s * COLUMNS + INDEX)
            slot = find_slot(index, get(stripes, s * COLUMNS + MASK), load_u64(grouped, j), load_u64(hashes, j))
            if load_u64(index, 2 * slot + 1) != _NONE:
                release_slot(stripes, s, stride, slot)
                erased += 1
    return erased


@inlined
def lifetime(lifetimes: Any, slots: Any, key: Any) -> Any:
    """Seconds that a row of `key` lives without an update; slots by the v2 rule, whatever built the id."""
    return get(lifetimes, np.int64((key >> np.uint64(48)) & np.uint64(slots - 1)))


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def evict_rows(stripes: int, stride: int, s: int, now: int, lifetimes: int, slots: int, evicted_ids: int) -> int:
    """Delete the expired rows of one stripe: those with now - last update >= lifetime.

    Args:
        stripes: Address of int64[S, COLUMNS], written.
        stride: Bytes per row.
        s: Stripe.
        now: Unix seconds to judge by.
        lifetimes: Address of int64[slots], seconds.
        slots: 1, or 32768 for lifetimes by slot.
        evicted_ids: Address of uint64[rows of the stripe], written: the ids deleted; 0 to leave out.

    Returns:
        How many rows were deleted.
    """
    evicted = 0
    index = get(stripes, s * COLUMNS + INDEX)
    mask = get(stripes, s * COLUMNS + MASK)
    slot = np.int64(0)
    while slot <= mask:
        word = load_u64(index, 2 * slot + 1)
        if word != _NONE and now - slot_time(word) >= lifetime(lifetimes, slots, load_u64(index, 2 * slot)):
            if evicted_ids != 0:
                store_u64(evicted_ids, evicted, load_u64(index, 2 * slot))
            # The slot may now hold a later entry of the cluster: look at it again.
            release_slot(stripes, s, stride, slot)
            evicted += 1
        else:
            slot += 1
    return evicted


@kernel("int64(int64, int64, int64, int64, uint64[::1], int64[::1], uint32[::1])")
def scan_index(index: int, begin: int, end: int, limit: int, ids: U64, numbers: I64, times: U32) -> int:
    """List the occupied slots from `begin` on, at most `limit` of them.

    Args:
        index: Address of the slots.
        begin: First slot to look at.
        end: One past the last slot to look at.
        limit: Room in the outputs.
        ids: uint64[limit], written.
        numbers: int64[limit], written: row numbers.
        times: uint32[limit], written: last updates.

    Returns:
        (slot to go on from) << 32 | (how many were listed).
    """
    found = np.int64(0)
    slot = begin
    while slot < end and found < limit:
        word = load_u64(index, 2 * slot + 1)
        if word != _NONE:
            ids[found] = load_u64(index, 2 * slot)
            numbers[found] = row_number(word)
            times[found] = np.uint32(slot_time(word))
            found += 1
        slot += 1
    return int((slot << 32) | found)


@kernel("void(int64, int64, uint32[::1], uint64[::1], int64, boolean[::1])")
def mark_expired(lifetimes: int, slots: int, times: U32, ids: U64, now: int, expired: Bools) -> None:
    """Judge rows that were copied out.

    Args:
        lifetimes: Address of int64[slots], seconds.
        slots: 1, or 32768 for lifetimes by slot.
        times: uint32[n], last updates.
        ids: uint64[n].
        now: Unix seconds to judge by.
        expired: bool[n], written.
    """
    for i in range(ids.size):
        expired[i] = now - np.int64(times[i]) >= lifetime(lifetimes, slots, ids[i])

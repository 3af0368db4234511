"""The index of a stripe: open addressing from 64-bit ids to row numbers, and the kernels that need nothing else.

A slot is 16 bytes: the id, and a word with the row's last update (Unix seconds, high 32 bits) over its number (low 32
bits, from 1). Number 0 is an empty slot, so fresh zero pages are an empty index and every id, 0 and 2^64-1 included, is
usable. The time lives here because a step dirties this line anyway, and because eviction then scans the index alone.

Stripes are described by rows of an int64 matrix `stripes[s, column]`; kernels update it, under the stripe's lock.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u32, load_u64, prefetch, store_u32, store_u64

I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]
U32: TypeAlias = npt.NDArray[np.uint32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Matrix: TypeAlias = npt.NDArray[np.int64]

INDEX = 0  # address of the slots
MASK = 1  # slots - 1
ARENA = 2  # address of row number 1
USED = 3  # row numbers ever handed out
FREE = 4  # first freed row number, 0 if none; each freed row holds the next in its first four bytes
FREED = 5  # length of that list
SIZE = 6  # rows
LIMIT = 7  # rows at which the index must grow before another is added
COLUMNS = 8

GROUP = 32  # ids whose memory is requested together: enough to fill the line-fill buffers

_ROW = np.uint64(0xFFFFFFFF)
_TIME_SHIFT = np.uint64(32)
_NONE = np.uint64(0)


@kernel("void(int64, int64, int64, uint64[::1], uint64[::1], int64[::1], int64[::1])")
def group_by_stripe(ids: int, n: int, bits: int, hashes: U64, grouped: U64, positions: I64, starts: I64) -> None:
    """Sort a batch by stripe, keeping the order of ids within each.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        bits: log2 of the number of stripes S.
        hashes: uint64[>= n], written: hash of grouped[j].
        grouped: uint64[>= n], written: the ids, stripe after stripe.
        positions: int64[>= n], written: where in the batch grouped[j] stood.
        starts: int64[S + 1], written: stripe s is grouped[starts[s]:starts[s + 1]].
    """
    count = np.int64(1) << bits
    for s in range(count + 1):
        starts[s] = 0
    shift = np.uint64(64 - bits)
    for i in range(n):
        value = mix64(load_u64(ids, i))
        stripe = np.int64(value >> shift) if bits > 0 else np.int64(0)
        starts[stripe + 1] += 1
    for s in range(count):
        starts[s + 1] += starts[s]
    for i in range(n):
        key = load_u64(ids, i)
        value = mix64(key)
        stripe = np.int64(value >> shift) if bits > 0 else np.int64(0)
        j = starts[stripe]
        starts[stripe] = j + 1
        grouped[j] = key
        hashes[j] = value
        positions[j] = i
    for s in range(count, 0, -1):
        starts[s] = starts[s - 1]
    starts[0] = 0


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
def prefetch_slot(index: Any, mask: Any, value: Any) -> Any:
    """Request the line where the probe for hash `value` starts."""
    prefetch(index + 16 * np.int64(value & np.uint64(mask)))


@inlined
def find_slot(index: Any, mask: Any, key: Any, value: Any) -> Any:
    """Slot number of `key` with hash `value`, or that of the empty slot where it belongs."""
    slot = np.int64(value & np.uint64(mask))
    while True:
        if load_u64(index, 2 * slot + 1) == _NONE or load_u64(index, 2 * slot) == key:
            return slot
        slot = (slot + 1) & mask


@inlined
def claim_row(stripes: Matrix, s: Any, stride: Any, slot: Any, key: Any, time: Any) -> Any:
    """Put `key` into an empty slot with a row of its own, freed ones first; returns the row's address."""
    number = stripes[s, FREE]
    if number != 0:
        address = stripes[s, ARENA] + (number - 1) * stride
        stripes[s, FREE] = np.int64(load_u32(address, 0))
        stripes[s, FREED] -= 1
    else:
        number = stripes[s, USED] + 1
        stripes[s, USED] = number
        address = stripes[s, ARENA] + (number - 1) * stride
    index = stripes[s, INDEX]
    store_u64(index, 2 * slot, key)
    store_u64(index, 2 * slot + 1, pack_slot(number, time))
    stripes[s, SIZE] += 1
    return address


@inlined
def release_slot(stripes: Matrix, s: Any, stride: Any, slot: Any) -> Any:
    """Free the row of an occupied slot and close the gap, so that no probe meets a hole (Knuth 6.4, algorithm R)."""
    index = stripes[s, INDEX]
    mask = stripes[s, MASK]
    number = row_number(load_u64(index, 2 * slot + 1))
    address = stripes[s, ARENA] + (number - 1) * stride
    store_u32(address, 0, np.uint32(stripes[s, FREE]))
    stripes[s, FREE] = number
    stripes[s, FREED] += 1
    stripes[s, SIZE] -= 1
    hole = slot
    probe = slot
    while True:
        probe = (probe + 1) & mask
        word = load_u64(index, 2 * probe + 1)
        if word == _NONE:
            break
        key = load_u64(index, 2 * probe)
        home = np.int64(mix64(key) & np.uint64(mask))
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
            target = np.int64(hashes[t] & np.uint64(new_mask))
            while load_u64(new, 2 * target + 1) != _NONE:
                target = (target + 1) & new_mask
            store_u64(new, 2 * target, keys[t])
            store_u64(new, 2 * target + 1, words[t])


@kernel("int64(int64[:, ::1], int64, int64, int64[::1], uint64[::1], uint64[::1], int64[::1], int64[::1])")
def find_rows(
    stripes: Matrix, first: int, last: int, starts: I64, hashes: U64, grouped: U64, positions: I64, numbers: I64
) -> int:
    """Look up row numbers.

    Args:
        stripes: int64[S, COLUMNS].
        first: First stripe.
        last: One past the last stripe.
        starts: int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: uint64[n].
        grouped: uint64[n].
        positions: int64[n].
        numbers: int64[n], written: row number of batch position i, 0 if it has no row.

    Returns:
        How many have a row.
    """
    present = 0
    for s in range(first, last):
        index = stripes[s, INDEX]
        mask = stripes[s, MASK]
        end = starts[s + 1]
        for j0 in range(starts[s], end, GROUP):
            m = min(GROUP, end - j0)
            for j in range(j0, j0 + m):
                prefetch_slot(index, mask, hashes[j])
            for j in range(j0, j0 + m):
                number = row_number(load_u64(index, 2 * find_slot(index, mask, grouped[j], hashes[j]) + 1))
                numbers[positions[j]] = number
                if number != 0:
                    present += 1
    return present


@kernel("int64(int64[:, ::1], int64, int64, int64, int64[::1], uint64[::1], uint64[::1])")
def erase_rows(stripes: Matrix, stride: int, first: int, last: int, starts: I64, hashes: U64, grouped: U64) -> int:
    """Delete rows.

    Args:
        stripes: int64[S, COLUMNS], written.
        stride: Bytes per row.
        first: First stripe.
        last: One past the last stripe.
        starts: int64[S + 1], from `group_by_stripe`, as are the next two.
        hashes: uint64[n].
        grouped: uint64[n].

    Returns:
        How many rows there were.
    """
    erased = 0
    for s in range(first, last):
        for j in range(starts[s], starts[s + 1]):
            index = stripes[s, INDEX]
            slot = find_slot(index, stripes[s, MASK], grouped[j], hashes[j])
            if load_u64(index, 2 * slot + 1) != _NONE:
                release_slot(stripes, s, stride, slot)
                erased += 1
    return erased


@inlined
def lifetime(lifetimes: I64, key: Any) -> Any:
    """Seconds that a row of `key` lives without an update; slots by the v2 rule, whatever built the id."""
    if lifetimes.size == 1:
        return lifetimes[0]
    return lifetimes[np.int64((key >> np.uint64(48)) & np.uint64(0x7FFF))]


@kernel("int64(int64[:, ::1], int64, int64, int64, int64[::1])")
def evict_rows(stripes: Matrix, stride: int, s: int, now: int, lifetimes: I64) -> int:
    """Delete the expired rows of one stripe: those with now - last update >= lifetime.

    Args:
        stripes: int64[S, COLUMNS], written.
        stride: Bytes per row.
        s: Stripe.
        now: Unix seconds to judge by.
        lifetimes: int64[1] for all slots or int64[32768] by slot, seconds.

    Returns:
        How many rows were deleted.
    """
    evicted = 0
    index = stripes[s, INDEX]
    mask = stripes[s, MASK]
    slot = np.int64(0)
    while slot <= mask:
        word = load_u64(index, 2 * slot + 1)
        if word != _NONE and now - slot_time(word) >= lifetime(lifetimes, load_u64(index, 2 * slot)):
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


@kernel("void(int64[::1], uint32[::1], uint64[::1], int64, boolean[::1])")
def mark_expired(lifetimes: I64, times: U32, ids: U64, now: int, expired: Bools) -> None:
    """Judge rows that were copied out.

    Args:
        lifetimes: int64[1] or int64[32768], seconds.
        times: uint32[n], last updates.
        ids: uint64[n].
        now: Unix seconds to judge by.
        expired: bool[n], written.
    """
    for i in range(ids.size):
        expired[i] = now - np.int64(times[i]) >= lifetime(lifetimes, ids[i])


@kernel("void(int64[:, ::1], int64, int64, int64[::1], uint64[::1], uint64[::1], int64[::1], uint32[::1])")
def read_times(
    stripes: Matrix, first: int, last: int, starts: I64, hashes: U64, grouped: U64, positions: I64, times: U32
) -> None:
    """Read last updates of ids that have rows.

    Args:
        stripes: int64[S, COLUMNS].
        first: First stripe.
        last: One past the last stripe.
        starts: int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: uint64[n].
        grouped: uint64[n].
        positions: int64[n].
        times: uint32[n], written: Unix seconds.
    """
    for s in range(first, last):
        for j in range(starts[s], starts[s + 1]):
            index = stripes[s, INDEX]
            slot = find_slot(index, stripes[s, MASK], grouped[j], hashes[j])
            times[positions[j]] = np.uint32(slot_time(load_u64(index, 2 * slot + 1)))


@kernel("void(int64, int64, int64, int64[::1])")
def stripes_of(ids: int, n: int, bits: int, stripes: I64) -> None:
    """Stripe of each id.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        bits: log2 of the number of stripes, at least 1.
        stripes: int64[n], written.
    """
    for i in range(n):
        stripes[i] = np.int64(mix64(load_u64(ids, i)) >> np.uint64(64 - bits))

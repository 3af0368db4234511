"""Kernels that go through the index of a stripe, range after range: rebuild, close up, evict, list."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.ops.hashing import unmix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import copy_floats, load_u32, load_u64, prefetch, store_u32, store_u64
from trilith_services.ps.engine.kernels.index import (
    FREE,
    FREED,
    GROUP,
    ROW_BYTES,
    SLOTS,
    STASH_ROOM,
    STASHED,
    STATE_BYTES,
    find_row,
    find_word,
    forget_word,
    get,
    hash_in,
    home_line,
    number_in,
    place_row,
    put,
    release_row,
    renumber,
    row_at,
    state_at,
    stripe_at,
    time_at,
    word_at,
)

U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_AHEAD = 32  # slots between the one whose row's time is requested and the one that is looked at


@inlined
def _request_time(stripe: Any, place: Any) -> Any:
    """Request the last update of the row that a slot soon to be looked at leads to."""
    if 0 <= place < get(stripe, SLOTS):
        prefetch(time_at(stripe, number_in(stripe, word_at(stripe, place))))


@kernel("void(int64, int64, int64, int64, int64)")
def copy_places(old: int, s: int, new: int, begin: int, end: int) -> None:
    """Put what some places of an index of stripe `s` lead to into another index, unless it is there already.

    Args:
        old: Address of int64[COLUMNS], which describes the stripe as it is.
        s: Number of the stripe.
        new: Address of int64[COLUMNS] with the other index, written; once its stash is full, nothing more is copied.
        begin: First place.
        end: One past the last place; there may be fewer.
    """
    hashes = np.empty(GROUP, np.uint64)
    numbers = np.empty(GROUP, np.int64)
    places = min(end, get(old, SLOTS) + get(old, STASHED))
    place = begin
    while place < places and get(new, STASHED) < get(new, STASH_ROOM):
        m = 0
        while place < places and m < GROUP:
            word = word_at(old, place)
            number = number_in(old, word)
            if number != 0:
                hashes[m] = hash_in(old, s, word)
                numbers[m] = number
                prefetch(home_line(new, hashes[m]))
                m += 1
            place += 1
        for t in range(m):
            if get(new, STASHED) < get(new, STASH_ROOM) and find_row(new, hashes[t]) == 0:
                place_row(new, hashes[t], numbers[t])


@kernel("void(int64, int64, int64, int64)")
def match_index(old: int, new: int, hashes: int, n: int) -> None:
    """Make an index lead from some hashes to where another one leads.

    Args:
        old: Address of int64[COLUMNS], which describes the stripe as it is.
        new: Address of int64[COLUMNS] with the other index, written; once its stash is full, nothing more is changed.
        hashes: Address of uint64[n], repeats allowed.
        n: Number of hashes.
    """
    for i in range(n):
        if get(new, STASHED) >= get(new, STASH_ROOM):
            return
        value = load_u64(hashes, i)
        right = find_row(old, value)
        word = find_word(new, value)
        has = number_in(new, word) if word != 0 else np.int64(0)
        if right != has:
            if has == 0:
                place_row(new, value, right)
            elif right == 0:
                forget_word(new, word)
            else:
                renumber(new, word, right)


@kernel("int64(int64, int64)")
def sort_freed(stripe: int, bound: int) -> int:
    """Put the freed row numbers above `bound` at the bottom of their stack, so that they are taken last.

    Args:
        stripe: Address of int64[COLUMNS].
        bound: A row number.

    Returns:
        How many are above it.
    """
    free = get(stripe, FREE)
    high = np.int64(0)
    for i in range(get(stripe, FREED)):
        number = load_u32(free, i)
        if np.int64(number) > bound:
            store_u32(free, i, load_u32(free, high))
            store_u32(free, high, number)
            high += 1
    return int(high)


@kernel("void(int64, int64)")
def drop_freed(stripe: int, count: int) -> None:
    """Forget the `count` freed row numbers at the bottom of their stack.

    Args:
        stripe: Address of int64[COLUMNS], written.
        count: How many.
    """
    free = get(stripe, FREE)
    left = get(stripe, FREED) - count
    for i in range(left):
        store_u32(free, i, load_u32(free, i + count))
    put(stripe, FREED, left)


@kernel("int64(int64, int64, int64, int64, int64)")
def move_rows(stripe: int, begin: int, end: int, bound: int, high: int) -> int:
    """Move rows with numbers above `bound` to freed ones below it; the two numbers change their roles.

    Args:
        stripe: Address of int64[COLUMNS], written.
        begin: First place to look at.
        end: One past the last place to look at; the index may have fewer.
        bound: A row number.
        high: How many numbers at the bottom of the stack of freed ones are above `bound`, from `sort_freed` or here. If
            others have taken numbers from the stack or put some there since, it may be wrong: more than there are on
            the stack is found here, anything else costs order alone.

    Returns:
        As many by now; -1 if the stack has to be sorted again: what is on its top is above `bound`, or is among those
        that should be, or there is nothing.
    """
    free = get(stripe, FREE)
    for place in range(begin, min(end, get(stripe, SLOTS) + get(stripe, STASHED))):
        if place + _AHEAD < get(stripe, SLOTS):
            coming = number_in(stripe, word_at(stripe, place + _AHEAD))
            if coming > bound:
                prefetch(row_at(stripe, coming))
                prefetch(state_at(stripe, coming))
        word = word_at(stripe, place)
        number = number_in(stripe, word)
        if number > bound:
            freed = get(stripe, FREED)
            if high >= freed:
                return -1
            target = np.int64(load_u32(free, freed - 1))
            if target > bound:
                return -1
            copy_floats(row_at(stripe, target), row_at(stripe, number), get(stripe, ROW_BYTES) // 4)
            copy_floats(state_at(stripe, target), state_at(stripe, number), get(stripe, STATE_BYTES) // 4)
            store_u32(time_at(stripe, target), 0, load_u32(time_at(stripe, number), 0))
            renumber(stripe, word, target)
            # On top, the freed number would be taken by the next new row.
            store_u32(free, freed - 1, load_u32(free, high))
            store_u32(free, high, np.uint32(number))
            high += 1
    return high


@inlined
def lifetime(lifetimes: Any, slots: Any, key: Any) -> Any:
    """Seconds that a row of `key` lives without an update; slots by the v2 rule, whatever built the id."""
    return get(lifetimes, np.int64((key >> np.uint64(48)) & np.uint64(slots - 1)))


@kernel("int64(int64, int64, int64, int64, int64, int64, int64)")
def any_expired(stripes: int, s: int, begin: int, end: int, now: int, lifetimes: int, slots: int) -> int:
    """Say whether a place of one stripe leads to an expired row: one with now - last update >= lifetime.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS].
        s: Stripe.
        begin: First place.
        end: One past the last place; the index may have fewer.
        now: Unix seconds to judge by.
        lifetimes: Address of int64[slots], seconds.
        slots: 1, or 32768 for lifetimes by slot.

    Returns:
        1 or 0.
    """
    stripe = stripe_at(stripes, s)
    for place in range(begin, min(end, get(stripe, SLOTS) + get(stripe, STASHED))):
        _request_time(stripe, place + _AHEAD)
        word = word_at(stripe, place)
        number = number_in(stripe, word)
        if number != 0:
            key = unmix64(hash_in(stripe, s, word))
            if now - np.int64(load_u32(time_at(stripe, number), 0)) >= lifetime(lifetimes, slots, key):
                return 1
    return 0


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def evict_rows(
    stripes: int, s: int, begin: int, end: int, now: int, lifetimes: int, slots: int, evicted_ids: int
) -> int:
    """Delete the expired rows at some places of one stripe: those with now - last update >= lifetime.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS], written.
        s: Stripe.
        begin: First place.
        end: One past the last place; the index may have fewer. Ranges are to be gone through from the last to the
            first, the whole stash in one.
        now: Unix seconds to judge by.
        lifetimes: Address of int64[slots], seconds.
        slots: 1, or 32768 for lifetimes by slot.
        evicted_ids: Address of uint64[end - begin], written: the ids deleted.

    Returns:
        How many rows were deleted.
    """
    stripe = stripe_at(stripes, s)
    evicted = 0
    # From the end, since the last entry of the stash takes the place of one that goes.
    for place in range(min(end, get(stripe, SLOTS) + get(stripe, STASHED)) - 1, begin - 1, -1):
        _request_time(stripe, place - _AHEAD)
        word = word_at(stripe, place)
        number = number_in(stripe, word)
        if number != 0:
            key = unmix64(hash_in(stripe, s, word))
            if now - np.int64(load_u32(time_at(stripe, number), 0)) >= lifetime(lifetimes, slots, key):
                release_row(stripe, word)
                store_u64(evicted_ids, evicted, key)
                evicted += 1
    return evicted


@kernel("int64(int64, int64, int64, int64, int64, uint64[::1], int64[:, ::1], uint32[::1])")
def scan_index(stripes: int, s: int, begin: int, end: int, limit: int, ids: U64, rows: I64, times: U32) -> int:
    """List what stands from place `begin` on, at most `limit` ids; the entries of the stash follow the slots.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS].
        s: Stripe.
        begin: First place to look at.
        end: One past the last place to look at; the index may have fewer by now.
        limit: Room in the outputs.
        ids: uint64[limit], written.
        rows: int64[limit, 2], written: addresses of rows' weights and states.
        times: uint32[limit], written: last updates.

    Returns:
        (place to go on from) << 32 | (how many were listed).
    """
    stripe = stripe_at(stripes, s)
    found = np.int64(0)
    place = begin
    last = min(end, get(stripe, SLOTS) + get(stripe, STASHED))
    while place < last and found < limit:
        _request_time(stripe, place + _AHEAD)
        word = word_at(stripe, place)
        number = number_in(stripe, word)
        if number != 0:
            ids[found] = unmix64(hash_in(stripe, s, word))
            rows[found, 0] = row_at(stripe, number)
            rows[found, 1] = state_at(stripe, number)
            times[found] = load_u32(time_at(stripe, number), 0)
            found += 1
        place += 1
    if found < limit:
        place = end
    return int((place << 32) | found)


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

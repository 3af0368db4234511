"""Kernels that go through the whole index of a stripe: rebuild, evict, list."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.ops.hashing import unmix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u32, prefetch, store_u64
from trilith_services.ps.kernels.index import (
    DELETED,
    GROUP,
    SLOTS,
    STASHED,
    get,
    hash_in,
    home_line,
    number_in,
    place_row,
    put,
    release_row,
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


@kernel("void(int64, int64, int64)")
def rebuild_index(old: int, s: int, new: int) -> None:
    """Put all that one index of stripe `s` leads to into another, empty one.

    Args:
        old: Address of int64[COLUMNS], which describes the stripe as it is.
        s: Number of the stripe.
        new: Address of int64[COLUMNS] with the new index, written: how many entries its stash has to hold, and no slot
            is a deleted one.
    """
    put(new, STASHED, 0)
    put(new, DELETED, 0)
    hashes = np.empty(GROUP, np.uint64)
    numbers = np.empty(GROUP, np.int64)
    places = get(old, SLOTS) + get(old, STASHED)
    place = np.int64(0)
    while place < places:
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
            place_row(new, hashes[t], numbers[t])


@inlined
def lifetime(lifetimes: Any, slots: Any, key: Any) -> Any:
    """Seconds that a row of `key` lives without an update; slots by the v2 rule, whatever built the id."""
    return get(lifetimes, np.int64((key >> np.uint64(48)) & np.uint64(slots - 1)))


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def evict_rows(stripes: int, s: int, now: int, lifetimes: int, slots: int, evicted_ids: int) -> int:
    """Delete the expired rows of one stripe: those with now - last update >= lifetime.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS], written.
        s: Stripe.
        now: Unix seconds to judge by.
        lifetimes: Address of int64[slots], seconds.
        slots: 1, or 32768 for lifetimes by slot.
        evicted_ids: Address of uint64[rows of the stripe], written: the ids deleted; 0 to leave out.

    Returns:
        How many rows were deleted.
    """
    stripe = stripe_at(stripes, s)
    evicted = 0
    # From the end, since the last entry of the stash takes the place of one that goes.
    for place in range(get(stripe, SLOTS) + get(stripe, STASHED) - 1, -1, -1):
        _request_time(stripe, place - _AHEAD)
        word = word_at(stripe, place)
        number = number_in(stripe, word)
        if number != 0:
            key = unmix64(hash_in(stripe, s, word))
            if now - np.int64(load_u32(time_at(stripe, number), 0)) >= lifetime(lifetimes, slots, key):
                release_row(stripe, word)
                if evicted_ids != 0:
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

"""The index of a stripe: a hash table from 64-bit ids to row numbers.

A slot is eight bytes and holds no id. `mix64` maps ids one to one to hashes, and where a slot stands says much of the
hash: its highest bits are the stripe's number, and in a stripe of 2^k lines, of eight slots each, its lowest k bits are
the number of the id's home line. The slot keeps the rest ("quotienting": Knuth 6.4, exercise 13; Cleary 1984), so that
ids are still told apart exactly:

    bits k+5..63   bits k..58 of the hash
    bits k+3, k+4  which of its four lines the id stands in, 0 its home
    bits 0..k+2    the row's number; 0 if it has been deleted

An empty slot is 0: fresh zero pages are an empty index, and every id, 0 and 2^64-1 included, is usable. The other three
lines of an id follow from its hash, and a line is passed only while it has no empty slot. An id whose four lines are
full is stashed: behind the slots there is room for a few hashes in full with their rows' numbers, looked through one by
one. A slot of a line that others may have passed becomes a deleted one, which the next id takes or a rebuild sweeps.

Stripes are described by rows of an int64 matrix `stripes[s, column]`; kernels update it, under the stripe's lock. Most
functions here take the address of one of those rows, `stripe`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_u32, load_u64, prefetch, store_u32, store_u64
from trilith.ops.slots import SLOTS_PER_LINE, probe_line

BITS = 5  # log2 of the number of stripes; the format above counts on it
STRIPES = 1 << BITS

INDEX = 0  # address of the slots, and of the stash behind them
SLOTS = 1  # their number, 8 * 2^k, a bound for row numbers too
ROWS = 2  # address of the weights of row number 0, which is never used
ROW_BYTES = 3  # from a row's weights to the next's
TIMES = 4  # address of row number 0's last update, uint32 Unix seconds; the others' follow
STASHED = 5  # entries in the stash
STASH_ROOM = 6  # as many are possible
DELETED = 7  # slots that hold a deleted id
SIZE = 8  # rows
LIMIT = 9  # rows at which the index must grow before another is added
MOST_DELETED = 10  # deleted slots at which it must be swept first
USED = 11  # row numbers ever handed out
FREE = 12  # address of the stack of freed row numbers, uint32: outside the rows, whose pages can so be given back
FREED = 13  # how many it holds
STATES = 14  # address of the optimizer state of row number 0; 0 if rows have none
STATE_BYTES = 15  # from a row's state to the next's
COLUMNS = 16  # two cache lines

STASH_ENTRY = 16  # bytes: uint64 hash, uint64 row number

# Ids whose memory is requested together: enough to fill the line-fill buffers. A read asks for less of each, and more
# of them pay for the start of every group.
GROUP = 32
READ_GROUP = 64

_CHOICES = 4  # lines an id may stand in
_BITS = np.uint64(BITS)
_STRIPE_SHIFT = np.uint64(64 - BITS)
_SPREAD_SHIFT = np.uint64(32)  # to bits of the hash that choose lines; no index has so many slots as to reach there
_LINE_SHIFT = np.uint64(6)  # bytes of a line
_SLOT_SHIFT = np.uint64(3)  # slots of a line
_NONE, _ONE = np.uint64(0), np.uint64(1)


@inlined
def get(address: Any, column: Any) -> Any:
    """int64 number `column` at `address`."""
    return np.int64(load_u64(address, column))


@inlined
def put(address: Any, column: Any, value: Any) -> Any:
    """Set int64 number `column` at `address`."""
    store_u64(address, column, np.uint64(value))


@inlined
def stripe_of(value: Any) -> Any:
    """Number of the stripe of an id with hash `value`: its highest bits."""
    return np.int64(value >> _STRIPE_SHIFT)


@inlined
def stripe_at(stripes: Any, s: Any) -> Any:
    """Address of what describes stripe number `s`."""
    return stripes + 8 * COLUMNS * s


@inlined
def row_at(stripe: Any, number: Any) -> Any:
    """Address of row `number`: of its weights."""
    return get(stripe, ROWS) + number * get(stripe, ROW_BYTES)


@inlined
def state_at(stripe: Any, number: Any) -> Any:
    """Address of the optimizer state of row `number`, 0 if rows have none."""
    return get(stripe, STATES) + number * get(stripe, STATE_BYTES)


@inlined
def time_at(stripe: Any, number: Any) -> Any:
    """Address of the last update of row `number`."""
    return get(stripe, TIMES) + 4 * number


@inlined
def home_line(stripe: Any, value: Any) -> Any:
    """Address of the line where the search for hash `value` begins."""
    return get(stripe, INDEX) + np.int64((value << _LINE_SHIFT) & np.uint64(8 * get(stripe, SLOTS) - 64))


@inlined
def home_tag(value: Any, slots: Any) -> Any:
    """What a slot in its home line keeps of hash `value`: all but the row's number."""
    return (value << _BITS) & np.uint64(-_CHOICES * slots)


@inlined
def other_line(index: Any, slots: Any, value: Any, tag: Any, choice: Any) -> Any:
    """Address of one of the four lines of hash `value` with home tag `tag`.

    Odd multiples of bits that the tag keeps too are added without carry, so that the way back to the home line is
    known; four lines of an index that has so many are four different ones.
    """
    line = value ^ (np.uint64(choice) * ((tag >> _SPREAD_SHIFT) | _ONE))
    return index + np.int64((line << _LINE_SHIFT) & np.uint64(8 * slots - 64))


@inlined
def stash_at(stripe: Any) -> Any:
    """Address of the stash."""
    return get(stripe, INDEX) + 8 * get(stripe, SLOTS)


@inlined
def word_at(stripe: Any, place: Any) -> Any:
    """Address of the word that holds the row's number of a place: places are the slots, and after them the stash."""
    slots = get(stripe, SLOTS)
    return get(stripe, INDEX) + 8 * place if place < slots else stash_at(stripe) + STASH_ENTRY * (place - slots) + 8


@inlined
def number_in(stripe: Any, word: Any) -> Any:
    """Row number in the word at address `word`, 0 if it holds none."""
    return get(word, 0) & (get(stripe, SLOTS) - 1)


@inlined
def hash_in(stripe: Any, s: Any, word: Any) -> Any:
    """The hash that the word at address `word`, which holds a row number of stripe number `s`, stands for."""
    if word >= stash_at(stripe):
        return load_u64(word - 8, 0)
    slots = get(stripe, SLOTS)
    held = load_u64(word, 0)
    choice = np.uint64(((held & np.uint64(slots)) != _NONE) + 2 * ((held & np.uint64(2 * slots)) != _NONE))
    line = np.uint64(word - get(stripe, INDEX)) >> _LINE_SHIFT
    home = (line ^ (choice * ((held >> _SPREAD_SHIFT) | _ONE))) & (np.uint64(slots - 1) >> _SLOT_SHIFT)
    kept = (held & np.uint64(-_CHOICES * slots)) >> _BITS
    return (np.uint64(s) << _STRIPE_SHIFT) | kept | home


@inlined
def find_word(stripe: Any, value: Any) -> Any:
    """Address of the word that holds the row's number of hash `value`; where there is none, of one without, or 0."""
    index = get(stripe, INDEX)
    slots = get(stripe, SLOTS)
    tag = home_tag(value, slots)
    for choice in range(_CHOICES):
        line = other_line(index, slots, value, tag, choice)
        slot = probe_line(line, tag + np.uint64(choice * slots), slots)
        if slot >= 0:
            return line + 8 * slot
    for entry in range(get(stripe, STASHED)):
        if load_u64(stash_at(stripe), 2 * entry) == value:
            return stash_at(stripe) + STASH_ENTRY * entry + 8
    return np.int64(0)


@inlined
def find_row(stripe: Any, value: Any) -> Any:
    """Number of the row of hash `value`, 0 if there is none."""
    word = find_word(stripe, value)
    return number_in(stripe, word) if word != 0 else np.int64(0)


@inlined
def is_full(stripe: Any) -> Any:
    """Whether the index must be rebuilt before a row is added."""
    return (
        get(stripe, SIZE) >= get(stripe, LIMIT)
        or get(stripe, DELETED) >= get(stripe, MOST_DELETED)
        or get(stripe, STASHED) >= get(stripe, STASH_ROOM)
    )


@inlined
def place_row(stripe: Any, value: Any, number: Any) -> Any:
    """Let the index, which is not full, lead from hash `value` to row `number`."""
    index = get(stripe, INDEX)
    slots = get(stripe, SLOTS)
    tag = home_tag(value, slots)
    for choice in range(_CHOICES):
        line = other_line(index, slots, value, tag, choice)
        for slot in range(SLOTS_PER_LINE):
            word = load_u64(line, slot)
            if word & np.uint64(slots - 1) == _NONE:
                if word != _NONE:
                    put(stripe, DELETED, get(stripe, DELETED) - 1)
                store_u64(line, slot, tag + np.uint64(choice * slots + number))
                return
    entry = get(stripe, STASHED)
    put(stripe, STASHED, entry + 1)
    if entry < get(stripe, STASH_ROOM):
        store_u64(stash_at(stripe), 2 * entry, value)
        put(stash_at(stripe), 2 * entry + 1, number)


@inlined
def claim_row(stripe: Any, value: Any) -> Any:
    """Give hash `value`, which has none, a row, freed ones first; returns its number. The index is not full."""
    freed = get(stripe, FREED)
    if freed != 0:
        number = np.int64(load_u32(get(stripe, FREE), freed - 1))
        put(stripe, FREED, freed - 1)
    else:
        number = get(stripe, USED) + 1
        put(stripe, USED, number)
    place_row(stripe, value, number)
    put(stripe, SIZE, get(stripe, SIZE) + 1)
    return number


@inlined
def renumber(stripe: Any, word: Any, number: Any) -> Any:
    """Put another row's number into the word at address `word`, which holds one."""
    if word < stash_at(stripe):
        number = (get(word, 0) & -get(stripe, SLOTS)) | number
    put(word, 0, number)


@inlined
def release_row(stripe: Any, word: Any) -> Any:
    """Delete the row whose number is in the word at address `word`."""
    freed = get(stripe, FREED)
    store_u32(get(stripe, FREE), freed, np.uint32(number_in(stripe, word)))
    put(stripe, FREED, freed + 1)
    put(stripe, SIZE, get(stripe, SIZE) - 1)
    forget_word(stripe, word)


@inlined
def forget_word(stripe: Any, word: Any) -> Any:
    """Let the index lead nowhere from the word at address `word`, which holds a row's number."""
    if word >= stash_at(stripe):
        # The last entry takes its place.
        last = get(stripe, STASHED) - 1
        store_u64(word - 8, 0, load_u64(stash_at(stripe), 2 * last))
        put(word, 0, get(stash_at(stripe), 2 * last + 1))
        put(stripe, STASHED, last)
        return
    line = word & -64
    passed = True
    for slot in range(SLOTS_PER_LINE):
        passed &= load_u64(line, slot) != _NONE
    if passed:
        # No other bit than the lowest of the choice: neither empty nor anybody's.
        put(word, 0, get(stripe, SLOTS))
        put(stripe, DELETED, get(stripe, DELETED) + 1)
    else:
        store_u64(word, 0, _NONE)


@kernel("void(int64, int64, int64, int64, int64, int64)")
def group_by_stripe(ids: int, n: int, work: int, hashes: int, positions: int, starts: int) -> None:
    """Sort a batch by stripe, keeping the order of ids within each.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        work: Address of uint64[>= n], scratch.
        hashes: Address of uint64[>= n], written: the ids' hashes, stripe after stripe.
        positions: Address of int64[>= n], written: where in the batch the id with hash number j stood.
        starts: Address of int64[STRIPES + 1], written: stripe s has hashes[starts[s]:starts[s + 1]].
    """
    for s in range(STRIPES + 1):
        put(starts, s, 0)
    for i in range(n):
        value = mix64(load_u64(ids, i))
        store_u64(work, i, value)
        stripe = stripe_of(value)
        put(starts, stripe + 1, get(starts, stripe + 1) + 1)
    for s in range(STRIPES):
        put(starts, s + 1, get(starts, s + 1) + get(starts, s))
    for i in range(n):
        value = load_u64(work, i)
        stripe = stripe_of(value)
        j = get(starts, stripe)
        put(starts, stripe, j + 1)
        store_u64(hashes, j, value)
        put(positions, j, i)
    for s in range(STRIPES, 0, -1):
        put(starts, s, get(starts, s - 1))
    put(starts, 0, 0)


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def find_rows(stripes: int, ids: int, n: int, work: int, rows: int, times: int) -> int:
    """Find where rows are.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS].
        ids: Address of uint64[n].
        n: Number of ids.
        work: Address of uint64[GROUP], scratch.
        rows: Address of int64[n, 2], written: the addresses of the row's weights and state, 0 if there is none.
        times: Address of uint32[n], written: the row's last update, Unix seconds, 0 if there is none.

    Returns:
        How many ids have a row.
    """
    present = 0
    for first in range(0, n, GROUP):
        count = min(GROUP, n - first)
        for t in range(count):
            value = mix64(load_u64(ids, first + t))
            store_u64(work, t, value)
            prefetch(home_line(stripe_at(stripes, stripe_of(value)), value))
        for t in range(count):
            value = load_u64(work, t)
            stripe = stripe_at(stripes, stripe_of(value))
            number = find_row(stripe, value)
            row, state, time = np.int64(0), np.int64(0), np.uint32(0)
            if number != 0:
                row, state = row_at(stripe, number), state_at(stripe, number)
                time = load_u32(time_at(stripe, number), 0)
                present += 1
            put(rows, 2 * (first + t), row)
            put(rows, 2 * (first + t) + 1, state)
            store_u32(times, first + t, time)
    return present


@kernel("int64(int64, int64, int64, int64, int64)")
def erase_rows(stripes: int, first: int, last: int, starts: int, hashes: int) -> int:
    """Delete rows.

    Args:
        stripes: Address of int64[STRIPES, COLUMNS], written.
        first: First stripe.
        last: One past the last stripe.
        starts: Address of int64[STRIPES + 1], from `group_by_stripe`, as is the next.
        hashes: Address of uint64[n].

    Returns:
        How many rows there were.
    """
    erased = 0
    for s in range(first, last):
        stripe = stripe_at(stripes, s)
        for j in range(get(starts, s), get(starts, s + 1)):
            word = find_word(stripe, load_u64(hashes, j))
            if word != 0 and number_in(stripe, word) != 0:
                release_row(stripe, word)
                erased += 1
    return erased

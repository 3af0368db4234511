"""Splitting a batch by owner, each id once, and bringing rows back: what the client does around every call.

Repeats are found with a hash table in one pass, not by sorting. A position in the split is a uint32 whose highest bit,
`FIRST`, marks the first occurrence of its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.hashing import mix64
from trilith.ops.jit import inlined, kernel, warm
from trilith.ops.lines import (
    FINITE_F16,
    FINITE_F32,
    add_floats,
    copy_floats_checked,
    narrow_floats,
    widen_floats,
)
from trilith.ops.memory import address_of, copy_floats, load_u32, load_u64, prefetch, store_u32, store_u64
from trilith.shard import Float32Array, FloatArray, UInt64Array

__all__ = [
    "FIRST",
    "GROUP",
    "Split",
    "gather_rows",
    "gather_values",
    "scatter_values",
    "split_by_owner",
    "split_distinct",
    "warm_kernels",
]

_Scalar = TypeVar("_Scalar", bound=np.generic)

_UINT64 = np.dtype(np.uint64)
FIRST = 0x80000000
_FIRST = np.uint32(FIRST)
_POSITION = np.uint32(FIRST - 1)
_EMPTY = np.uint32(0)
_ONE = np.uint32(1)
GROUP = 64
"""Ids that `find_distinct` looks at together."""


class Split(NamedTuple):
    """A batch of ids arranged for the shards that own them.

    Attributes:
        ids: uint64[u], shard after shard, within a shard by first occurrence.
        bounds: [shards + 1]; shard s owns ids[bounds[s]:bounds[s + 1]].
        positions: uint32[n], per input id its place in `ids`, with `FIRST` where it occurs first; None where input i is
            ids[i] and every one is a first occurrence.
    """

    ids: UInt64Array
    bounds: Sequence[int]
    positions: npt.NDArray[np.uint32] | None

    @property
    def counts(self) -> npt.NDArray[np.uint32] | None:
        """uint32[u], counted now: occurrences of each id; None where each occurred once."""
        if self.positions is None or self.positions.size == self.ids.size:
            return None
        counts = np.empty(self.ids.size, np.uint32)
        count_places(address_of(self.positions), self.positions.size, address_of(counts), counts.size)
        return counts

    def of(self, ids: UInt64Array) -> bool:
        """Whether this splits `ids`, C-contiguous; unknown, hence False, without positions."""
        if self.positions is None or self.positions.size != ids.size:
            return False
        return restores(address_of(self.ids), address_of(self.positions), ids.size, address_of(ids))

    def owned(self, shard: int) -> UInt64Array:
        """uint64[...]: the ids of one shard."""
        return self.ids[self.bounds[shard] : self.bounds[shard + 1]]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@inlined
def _index(value: Any) -> int:
    return np.int64(value)  # type: ignore[return-value]


@inlined
def _bucket(value: np.uint64, mask: int) -> int:
    return _index(mix64(value) & np.uint64(mask))


@inlined
def _number(ids: int, i: int, slots: int, mask: int, uniques: int, positions: int, found: int) -> int:
    """Give id `i`, whose bucket is in `positions`, its number; returns how many numbers are given out then."""
    value = load_u64(ids, i)
    bucket = _index(load_u32(positions, i))
    while True:
        number = load_u32(slots, bucket)
        if number == _EMPTY:
            store_u32(slots, bucket, np.uint32(found + 1))
            store_u64(uniques, found, value)
            store_u32(positions, i, np.uint32(found) | _FIRST)
            return found + 1
        place = _index(number) - 1
        if load_u64(uniques, place) == value:
            store_u32(positions, i, np.uint32(place))
            return found
        bucket = (bucket + 1) & mask


@kernel("int64(int64, int64, int64, int64, int64, int64)")
def find_distinct(ids: int, n: int, slots: int, mask: int, uniques: int, positions: int) -> int:
    """Give every distinct id a number in order of first occurrence.

    Whether an id is new cannot be guessed, and processors lose more by guessing wrong than by all else here. So where
    most of a group's ids repeat earlier ones, these are dealt with first and without a branch (measured: a quarter
    less time for Zipf's ids); where most are new, that would be in vain.

    Args:
        ids: Address of uint64[n].
        n: Number of ids, below 2^31.
        slots: Address of uint32[mask + 1 + GROUP], written: scratch for the hash table, more than n, and for a group.
        mask: Slots minus one, a power of two minus one.
        uniques: Address of uint64[n], written: the distinct ids.
        positions: Address of uint32[n], written: per input the number of its id, plus FIRST where it occurs first.

    Returns:
        How many distinct ids there are.
    """
    for i in range(mask + 1):
        store_u32(slots, i, _EMPTY)
    left = slots + 4 * (mask + 1)
    found = 0
    new = GROUP
    for start in range(0, n, GROUP):
        end = min(start + GROUP, n)
        before = found
        # `positions` holds the bucket until the number is known.
        for i in range(start, end):
            bucket = _bucket(load_u64(ids, i), mask)
            store_u32(positions, i, np.uint32(bucket))
            prefetch(slots + 4 * bucket)
        if new > GROUP // 2:
            for i in range(start, end):
                found = _number(ids, i, slots, mask, uniques, positions, found)
        else:
            waiting = 0
            for i in range(start, end):
                bucket = load_u32(positions, i)
                number = _index(load_u32(slots, _index(bucket)))
                place = max(number - 1, 0)
                known = (number != 0) & (load_u64(uniques, place) == load_u64(ids, i))
                store_u32(positions, i, np.uint32(place) if known else bucket)
                store_u32(left, waiting, np.uint32(i))
                waiting += 1 - known
            for w in range(waiting):
                found = _number(ids, _index(load_u32(left, w)), slots, mask, uniques, positions, found)
        new = found - before
    return found


@kernel("void(int64, int64, int64, int64)")
def count_places(positions: int, n: int, counts: int, found: int) -> None:
    """Count how often each distinct id occurs.

    Args:
        positions: Address of uint32[n].
        n: Number of inputs.
        counts: Address of uint32[found], written.
        found: Number of distinct ids.
    """
    for place in range(found):
        store_u32(counts, place, np.uint32(0))
    for i in range(n):
        place = _index(load_u32(positions, i) & _POSITION)
        store_u32(counts, place, np.uint32(load_u32(counts, place) + _ONE))


@kernel("boolean(int64, int64, int64, int64)")
def restores(uniques: int, positions: int, n: int, ids: int) -> bool:
    """Whether a split, put back in order, gives certain ids.

    Args:
        uniques: Address of uint64[u], the ids of the split.
        positions: Address of uint32[n].
        n: Number of inputs.
        ids: Address of uint64[n].
    """
    for i in range(n):  # noqa: SIM110 (a kernel)
        if load_u64(uniques, _index(load_u32(positions, i) & _POSITION)) != load_u64(ids, i):
            return False
    return True


@kernel("void(int64, int64, int64, int64, int64)")
def place_by_owner(ids: int, n: int, shards: int, bounds: int, places: int) -> None:
    """Arrange ids by owner, keeping their order within an owner.

    Args:
        ids: Address of uint64[n].
        n: Number of ids.
        shards: Number of owners.
        bounds: Address of uint64[shards + 2], written: bounds[s]..bounds[s + 1] are the places of owner s.
        places: Address of uint32[n], written: the place of each id, a permutation.
    """
    for s in range(shards + 2):
        store_u64(bounds, s, np.uint64(0))
    count = np.uint64(shards)
    for i in range(n):
        owner = _index(load_u64(ids, i) % count)
        store_u32(places, i, np.uint32(owner))
        store_u64(bounds, owner + 2, load_u64(bounds, owner + 2) + np.uint64(1))
    for s in range(2, shards + 2):
        store_u64(bounds, s, load_u64(bounds, s) + load_u64(bounds, s - 1))
    # bounds[s + 1] is now the start of owner s and moves to its end.
    for i in range(n):
        slot = _index(load_u32(places, i)) + 1
        place = load_u64(bounds, slot)
        store_u64(bounds, slot, place + np.uint64(1))
        store_u32(places, i, np.uint32(place))


@kernel("void(int64, int64, int64, int64, int64, int64)")
def rearrange(ids: int, places: int, found: int, new_ids: int, positions: int, n: int) -> None:
    """Move distinct ids to their places, and let `positions` follow.

    Args:
        ids: Address of uint64[found].
        places: Address of uint32[found], a permutation.
        found: Number of distinct ids.
        new_ids: Address of uint64[found], written.
        positions: Address of uint32[n], written: numbers of ids become places.
        n: Number of inputs.
    """
    for i in range(found):
        store_u64(new_ids, _index(load_u32(places, i)), load_u64(ids, i))
    for i in range(n):
        old = load_u32(positions, i)
        place = load_u32(places, _index(old & _POSITION))
        store_u32(positions, i, np.uint32(place | (old & _FIRST)))


@kernel("void(int64, int64, int64, int64, int64)")
def row_addresses(bounds: int, bases: int, shards: int, stride: int, addresses: int) -> None:
    """Work out where each row of a split lies.

    Args:
        bounds: Address of uint64[shards + 1].
        bases: Address of uint64[shards]: address of each shard's first row.
        shards: Number of shards.
        stride: Bytes per row.
        addresses: Address of uint64[u], written.
    """
    for s in range(shards):
        start, end = _index(load_u64(bounds, s)), _index(load_u64(bounds, s + 1))
        base = load_u64(bases, s)
        for row in range(start, end):
            store_u64(addresses, row, base + np.uint64((row - start) * stride))


@inlined
def _row_at(addresses: int, base: int, stride: int, place: int) -> int:
    return _index(load_u64(addresses, place)) if addresses else base + stride * place


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def gather(positions: int, n: int, addresses: int, base: int, dim: int, half: int, out: int) -> None:
    """Bring rows into input order.

    Args:
        positions: Address of uint32[n].
        n: Number of inputs.
        addresses: Address of uint64[u]: address of each row; 0: they lie one after another.
        base: Address of the first row, if `addresses` is 0.
        dim: Floats per row.
        half: Whether rows are float16 rather than float32.
        out: Address of float32[n, dim], written.
    """
    stride = 2 * dim if half else 4 * dim
    for i in range(n):
        # No prefetching: the rows of a reply were written a moment ago, and most are in the cache (measured).
        row = _row_at(addresses, base, stride, _index(load_u32(positions, i) & _POSITION))
        if half:
            widen_floats(out + 4 * i * dim, row, dim)
        else:
            copy_floats(out + 4 * i * dim, row, dim)


@kernel("int64(int64, int64, int64, int64, int64, int64, int32)")
def sum_rows(positions: int, n: int, values: int, dim: int, addresses: int, base: int, limit: np.int32) -> int:
    """Add the values of equal ids up in input order, in float32.

    Args:
        positions: Address of uint32[n]; the first occurrence of a row overwrites it, later ones add.
        n: Number of inputs.
        values: Address of float32[n, dim].
        dim: Floats per row.
        addresses: Address of uint64[u]: address of each row, float32[dim], written; 0: they lie one after another.
        base: Address of the first row, if `addresses` is 0.
        limit: Magnitude, as a bit pattern, that a sum must stay below.

    Returns:
        Nonzero if a sum reached the limit.
    """
    high = 0
    stride = 4 * dim
    for i in range(n):
        position = load_u32(positions, i)
        row = _row_at(addresses, base, stride, _index(position & _POSITION))
        if position & _FIRST:
            high |= copy_floats_checked(row, values + stride * i, dim, limit)
        else:
            high |= add_floats(row, values + stride * i, dim, limit)
    return high


@kernel("int64(int64, int64, int64, int64, int32)")
def convert(target: int, source: int, count: int, kind: int, limit: np.int32) -> int:
    """Copy floats, changing their width.

    Args:
        target: Address of the `count` floats written.
        source: Address of the `count` floats read.
        count: Number of floats.
        kind: 0 keeps float32, 1 narrows to float16, 2 widens from float16.
        limit: Magnitude, as a bit pattern, that values must stay below.

    Returns:
        Nonzero if a float32 value read reached the limit.
    """
    if kind == 0:
        return copy_floats_checked(target, source, count, limit)
    if kind == 1:
        return narrow_floats(target, source, count, limit)
    widen_floats(target, source, count)
    return 0


def warm_kernels() -> None:
    """Compile everything a client runs, or load it from the cache."""
    warm(find_distinct, count_places, restores, place_by_owner, rearrange, row_addresses, gather, sum_rows, convert)


# ---- what the client calls -------------------------------------------------------------------------------------------


def split_distinct(ids: UInt64Array, shards: int) -> Split:
    """Arrange a batch by owner, each id once.

    Args:
        ids: uint64[n], C-contiguous.
        shards: Number of shards; the owner of an id is its value modulo that.
    """
    n = ids.size
    _check_ids(ids)
    if n == 0:
        return Split(ids, [0] * (shards + 1), None)
    mask = (1 << (2 * n - 1).bit_length()) - 1  # at most half full, and small enough for the cache
    slots = np.empty(mask + 1 + GROUP, np.uint32)
    uniques, positions = np.empty(n, np.uint64), np.empty(n, np.uint32)
    found = find_distinct(address_of(ids), n, address_of(slots), mask, address_of(uniques), address_of(positions))
    if shards == 1:
        return Split(ids, (0, n), None) if found == n else Split(uniques[:found], (0, found), positions)
    places, bounds = np.empty(found, np.uint32), np.empty(shards + 2, np.uint64)
    place_by_owner(address_of(uniques), found, shards, address_of(bounds), address_of(places))
    grouped = np.empty(found, np.uint64)
    rearrange(address_of(uniques), address_of(places), found, address_of(grouped), address_of(positions), n)
    return Split(grouped, bounds[: shards + 1].tolist(), positions)


def split_by_owner(ids: UInt64Array, shards: int) -> Split:
    """Arrange a batch by owner, keeping repeats, for verbs where each occurrence counts and the order matters."""
    n = ids.size
    _check_ids(ids)
    if shards == 1 or n == 0:
        return Split(ids, [0] + [n] * shards, None)
    places, bounds = np.empty(n, np.uint32), np.empty(shards + 2, np.uint64)
    place_by_owner(address_of(ids), n, shards, address_of(bounds), address_of(places))
    grouped = np.empty(n, np.uint64)
    grouped[places] = ids
    places |= _FIRST
    return Split(grouped, bounds[: shards + 1].tolist(), places)


def _check_ids(ids: UInt64Array) -> None:
    if ids.dtype != _UINT64 or ids.ndim != 1 or not ids.flags.c_contiguous:
        raise InvalidRequestError(f"ids are {ids.dtype}{list(ids.shape)}, expected C-contiguous uint64[n]")


def _places(split: Split, blocks: Sequence[FloatArray], dim: int) -> tuple[npt.NDArray[np.uint64] | None, int]:
    """Where the rows of a split lie: the address of each, or, if one shard has them all, that of the first."""
    if len(blocks) == 1:
        return None, address_of(blocks[0])
    addresses = np.empty(split.ids.size, np.uint64)
    bounds = np.array(split.bounds, np.uint64)
    bases = np.array([address_of(block) for block in blocks], np.uint64)
    stride = dim * min(block.dtype.itemsize for block in blocks)
    row_addresses(address_of(bounds), address_of(bases), len(blocks), stride, address_of(addresses))
    return addresses, 0


def gather_rows(split: Split, blocks: Sequence[FloatArray], n: int, dim: int) -> Float32Array:
    """Bring the shards' rows into input order.

    Args:
        split: How the ids were split.
        blocks: Per shard float32|float16 [its ids, dim], C-contiguous, of any alignment.
        n: Number of input ids.
        dim: Floats per row.

    Returns:
        float32[n, dim], writable and aligned. Where nothing has to move it is `blocks[0]` itself.
    """
    half = any(block.dtype == np.float16 for block in blocks)
    if split.positions is None:
        first = next((block for block in blocks if block.size), None)
        if first is None:
            return np.zeros((n, dim), np.float32)
        if not half and first.flags.aligned and first.flags.writeable:
            return first
        out = np.empty((n, dim), np.float32)
        convert(address_of(out), address_of(first), n * dim, 2 if half else 0, FINITE_F32)
        return out
    out = np.empty((n, dim), np.float32)
    addresses, base = _places(split, blocks, dim)
    table = 0 if addresses is None else address_of(addresses)
    gather(address_of(split.positions), n, table, base, dim, int(half), address_of(out))
    return out


def gather_values(split: Split, pieces: Sequence[npt.NDArray[Any]], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Bring one value per id back into input order; `pieces` are in the order of the split, shard after shard."""
    together = np.concatenate([np.empty(0, dtype), *pieces])
    return together if split.positions is None else together[split.positions & _POSITION]


def scatter_values(split: Split, values: Float32Array, blocks: Sequence[FloatArray], *, float16: bool = False) -> bool:
    """Write one row per id for the shards, adding up the rows of equal ids in float32.

    Args:
        split: How the ids were split.
        values: float32[n, dim], C-contiguous and aligned.
        blocks: Per shard float32|float16 [its ids, dim], written.
        float16: The rows will travel as float16, even if some blocks are float32.

    Returns:
        Whether every number written is finite in the type in which it will travel.
    """
    n, dim = values.shape
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        raise InvalidRequestError(
            f"values are {values.dtype}{list(values.shape)}, expected C-contiguous float32[n, dim]"
        )
    half = any(block.dtype == np.float16 for block in blocks)
    limit = FINITE_F16 if half or float16 else FINITE_F32
    if split.positions is None:
        high = 0
        start = address_of(values)
        for block in blocks:
            high |= convert(address_of(block), start, block.size, int(block.dtype == np.float16), limit)
            start += 4 * block.size
        return not high
    # Sums are made in float32 and narrowed once.
    targets = [np.empty(block.shape, np.float32) if block.dtype == np.float16 else block for block in blocks]
    addresses, base = _places(split, targets, dim)
    table = 0 if addresses is None else address_of(addresses)
    high = sum_rows(address_of(split.positions), n, address_of(values), dim, table, base, limit)
    for block, target in zip(blocks, targets, strict=True):
        if block is not target:
            high |= convert(address_of(block), address_of(target), block.size, 1, limit)
    return not high

"""Ids of many tables' lists arranged by shard, each once, fused for an exchange between workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.dedup import FIRST, GROUP, find_distinct
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, as_index, load_u32, load_u64, store_u32, store_u64
from trilith.ops.ragged import Int64Array, as_integers
from trilith.ops.threads import in_parts, thread_count
from trilith.ops.unique import slot_count

__all__ = ["EMPTY_FROM", "FusedReorder", "fused_reorder_by_indices"]

Int32Array = npt.NDArray[np.int32]

_POSITION = np.uint32(FIRST - 1)
EMPTY_FROM = 5
"""Shard 0 is spared from this many shards on."""


class FusedReorder(NamedTuple):
    """Ids of K lists for S shards; a cell is the ids of one list that one shard owns.

    Attributes:
        output: int64[u], cell after cell: shard by shard, within it list by list, in a cell by first occurrence.
        shard_sizes: int32[S], ids of each shard.
        sharded_slot_sizes: int32[S * K], ids of cell s * K + k.
        emb_offset_sz: int32[K], length of each input list.
        fused_emb_offset: int32[sum of lengths], per input id where its vector begins in a flat buffer that holds the
            vectors of `output`.
    """

    output: Int64Array
    shard_sizes: Int32Array
    sharded_slot_sizes: Int32Array
    emb_offset_sz: Int32Array
    fused_emb_offset: Int32Array

    def offsets(self) -> list[Int32Array]:
        """`fused_emb_offset`, list by list."""
        return np.split(self.fused_emb_offset, np.cumsum(self.emb_offset_sz[:-1]))


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def count_cells(
    values: int,
    splits: int,
    first: int,
    last: int,
    lists: int,
    shards: int,
    spared: int,
    slots: int,
    uniques: int,
    numbers: int,
    owners: int,
    cells: int,
    unsigned: int,
) -> int:
    """Find the distinct ids of some lists and count them by cell.

    Args:
        values: Address of uint64[n].
        splits: Address of uint64[lists + 1], where each list begins.
        first: First list to look at.
        last: One past the last.
        lists: Number of lists.
        shards: Number of shards.
        spared: 1 if shard 0 owns nothing, else 0.
        slots: Address of uint32[s + GROUP], written: scratch; s is `slot_count` of the longest list.
        uniques: Address of uint64[n], written: the distinct ids of a list, from the list's start.
        numbers: Address of uint32[n], written: per id its number in its list, plus FIRST where it occurs first.
        owners: Address of uint32[n], written: the shard of each distinct id.
        cells: Address of uint64[shards * lists], written in the columns of the lists, which are 0.
        unsigned: 1 if negative ids are those from 2^63 on.

    Returns:
        The place of a negative id; -1 if there is none, or ids are unsigned.
    """
    modulus = np.uint64(shards - spared)
    for k in range(first, last):
        start, end = as_index(load_u64(splits, k)), as_index(load_u64(splits, k + 1))
        found = find_distinct(
            values + 8 * start,
            end - start,
            slots,
            slot_count(end - start) - 1,
            uniques + 8 * start,
            numbers + 4 * start,
        )
        for i in range(start, start + found):
            value = load_u64(uniques, i)
            if as_index(value) < 0 and unsigned == 0:
                return i
            shard = value % modulus + np.uint64(spared)
            store_u32(owners, i, np.uint32(shard))
            cell = as_index(shard) * lists + k
            store_u64(cells, cell, load_u64(cells, cell) + np.uint64(1))
    return -1


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def place_cells(
    splits: int,
    first: int,
    last: int,
    lists: int,
    dims: int,
    found: int,
    uniques: int,
    numbers: int,
    owners: int,
    places: int,
    bases: int,
    output: int,
    offsets: int,
) -> None:
    """Move the distinct ids of some lists into their cells and say where every input's vector will be.

    Args:
        splits: Address of uint64[lists + 1].
        first: First list.
        last: One past the last.
        lists: Number of lists.
        dims: Address of uint64[lists], floats per vector.
        found: Address of uint64[lists], distinct ids of each list.
        uniques: Address of uint64[n], from `count_cells`.
        numbers: Address of uint32[n], from `count_cells`.
        owners: Address of uint32[n], from `count_cells`; overwritten with the offset of each distinct id.
        places: Address of uint64[shards * lists]: where each cell begins in `output`; moved to its end.
        bases: Address of uint64[shards * lists]: where it begins among the floats; moved too.
        output: Address of uint64[u], written.
        offsets: Address of uint32[n], written.
    """
    for k in range(first, last):
        start, end = as_index(load_u64(splits, k)), as_index(load_u64(splits, k + 1))
        dim = load_u64(dims, k)
        for i in range(start, start + as_index(load_u64(found, k))):
            cell = as_index(load_u32(owners, i)) * lists + k
            place, base = load_u64(places, cell), load_u64(bases, cell)
            store_u64(output, as_index(place), load_u64(uniques, i))
            store_u32(owners, i, np.uint32(base))
            store_u64(places, cell, place + np.uint64(1))
            store_u64(bases, cell, base + dim)
        for i in range(start, end):
            store_u32(offsets, i, load_u32(owners, start + as_index(load_u32(numbers, i) & _POSITION)))


def fused_reorder_by_indices(
    inputs: Sequence[npt.ArrayLike],
    num_of_shards: int,
    dim_sizes: Sequence[int],
    *,
    rank0_empty: bool = True,
    unsigned: bool = False,
    threads: int | None = None,
) -> FusedReorder:
    """Arrange the ids of many lists by shard and list, each once per list.

    Args:
        inputs: K times int64[n_k], ids of at least 0.
        num_of_shards: S. An id belongs to shard id mod S.
        dim_sizes: K floats per vector.
        rank0_empty: From 5 shards on, shard 0 owns nothing and the others id mod (S - 1) + 1.
        unsigned: Negative ids stand for those from 2^63 on; otherwise they are refused.
        threads: How many may work on it; None decides by size.
    """
    if num_of_shards < 1:
        raise InvalidRequestError(f"num_of_shards={num_of_shards} is below 1")
    lists = [as_integers(f"inputs[{k}]", each, shape=(-1,)) for k, each in enumerate(inputs)]
    dims = as_integers("dim_sizes", dim_sizes, shape=(len(lists),))
    if (dims < 1).any():
        raise InvalidRequestError(f"dim_sizes {dims.tolist()} are not all at least 1")
    count, shards = len(lists), num_of_shards
    lengths = np.array([each.size for each in lists], np.int64)
    splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    n = int(splits[-1])
    values = np.concatenate([np.empty(0, np.int64), *lists]) if count != 1 else lists[0]
    uniques, numbers, owners = np.empty(n, np.int64), np.empty(n, np.uint32), np.empty(n, np.uint32)
    cells = np.zeros((shards, count), np.int64)
    spared = int(rank0_empty and shards >= EMPTY_FROM)
    workers = thread_count(threads, 32 * n)

    def count_lists(first: int, last: int) -> None:
        slots = np.empty(slot_count(int(lengths[first:last].max(initial=0))) + GROUP, np.uint32)
        bad = count_cells(
            address_of(values),
            address_of(splits),
            first,
            last,
            count,
            shards,
            spared,
            address_of(slots),
            address_of(uniques),
            address_of(numbers),
            address_of(owners),
            address_of(cells),
            int(unsigned),
        )
        if bad >= 0:
            raise InvalidRequestError(f"id {uniques[bad]} is negative; the remainder that gives its shard would be too")

    in_parts(count_lists, count, workers)
    flat = cells.reshape(-1)
    places, floats = _starts(flat), flat * np.tile(dims, shards)
    if floats.sum() >= 1 << 31:
        raise InvalidRequestError(f"the vectors take {floats.sum()} floats, more than int32 offsets can reach")
    bases, found = _starts(floats), cells.sum(axis=0)
    output, offsets = np.empty(int(flat.sum()), np.int64), np.empty(n, np.int32)

    def place_lists(first: int, last: int) -> None:
        place_cells(
            address_of(splits),
            first,
            last,
            count,
            address_of(dims),
            address_of(found),
            address_of(uniques),
            address_of(numbers),
            address_of(owners),
            address_of(places),
            address_of(bases),
            address_of(output),
            address_of(offsets),
        )

    in_parts(place_lists, count, workers)
    return FusedReorder(
        output, cells.sum(axis=1).astype(np.int32), flat.astype(np.int32), lengths.astype(np.int32), offsets
    )


def _starts(sizes: Int64Array) -> Int64Array:
    """Running sums, each without its own."""
    return np.asarray(np.cumsum(sizes) - sizes, np.int64)

"""Splitting batches: the kernels of trilith.ops.dedup against their naive twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive
from trilith.errors import InvalidRequestError
from trilith.ops import dedup

IDS = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1), st.sampled_from([0, 2**63, 2**64 - 1])), max_size=300
).map(lambda ids: np.array(ids, np.uint64))
SHARDS = st.integers(1, 5)
DIMS = st.sampled_from([1, 3, 4, 7, 8, 16, 19, 33])


def owned(split, shards):
    return [split.owned(s).tolist() for s in range(shards)]


def places(split, n):
    return list(range(n)) if split.positions is None else (split.positions & (dedup.FIRST - 1)).tolist()


def rows_like(ids, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(ids.size, dim)).astype(np.float32)


def blocks_for(split, shards, dim, dtype=np.float32):
    return [np.zeros((split.owned(s).size, dim), dtype) for s in range(shards)]


@given(ids=IDS, shards=SHARDS)
def test_split_distinct_matches_naive(ids, shards):
    split = dedup.split_distinct(ids, shards)
    want_ids, want_counts = naive.split_distinct(ids, shards)
    assert owned(split, shards) == want_ids
    counts = split.counts.tolist() if split.counts is not None else [1] * split.ids.size
    assert counts == [count for shard in want_counts for count in shard]
    assert split.ids[places(split, ids.size)].tolist() == ids.tolist()


@given(ids=IDS, shards=SHARDS)
def test_split_distinct_marks_each_first_occurrence_once(ids, shards):
    split = dedup.split_distinct(ids, shards)
    if split.positions is None:
        return
    first = (split.positions & dedup.FIRST) != 0
    seen = set()
    for each, is_first in zip(ids.tolist(), first.tolist(), strict=True):
        assert is_first == (each not in seen)
        seen.add(each)


@given(seed=st.integers(0, 99), n=st.integers(1, 2000), kinds=st.integers(1, 400), shards=SHARDS)
def test_batches_of_many_groups_are_split_whatever_share_of_their_ids_is_new(seed, n, kinds, shards):
    ids = np.random.default_rng(seed).integers(0, 2**64, kinds, np.uint64, endpoint=False)
    ids = ids[np.random.default_rng(seed + 1).integers(0, kinds, n)]
    split = dedup.split_distinct(ids, shards)
    want_ids, want_counts = naive.split_distinct(ids, shards)
    assert owned(split, shards) == want_ids
    if split.counts is not None:
        assert split.counts.tolist() == [count for shard in want_counts for count in shard]
    assert split.ids[places(split, n)].tolist() == ids.tolist()


@given(ids=IDS, shards=SHARDS, change=st.integers(0, 299))
def test_a_split_knows_the_ids_it_was_made_of(ids, shards, change):
    split = dedup.split_distinct(ids, shards)
    assert split.of(ids.copy()) == (split.positions is not None)
    assert not split.of(ids[1:])
    if ids.size:
        other = ids.copy()
        other[change % ids.size] ^= np.uint64(1 << 40)
        assert not split.of(other)


@given(ids=IDS, shards=SHARDS)
def test_split_by_owner_matches_naive(ids, shards):
    split = dedup.split_by_owner(ids, shards)
    assert owned(split, shards) == naive.split_by_owner(ids, shards)
    assert split.ids[places(split, ids.size)].tolist() == ids.tolist()


def test_distinct_ids_for_one_shard_are_not_moved():
    ids = np.arange(5, dtype=np.uint64)
    split = dedup.split_distinct(ids, 1)
    assert split.ids is ids
    assert split.positions is None
    assert split.counts is None


@given(ids=IDS, shards=SHARDS, dim=DIMS, half=st.booleans())
def test_gather_rows_matches_naive(ids, shards, dim, half):
    split = dedup.split_distinct(ids, shards)
    dtype = np.float16 if half else np.float32
    rows = rows_like(split.ids, dim).astype(dtype)
    blocks = [rows[split.bounds[s] : split.bounds[s + 1]] for s in range(shards)]
    got = dedup.gather_rows(split, blocks, ids.size, dim)
    assert got.shape == (ids.size, dim)
    assert got.dtype == np.float32
    assert got.flags.aligned
    want = naive.gather_rows(ids, dict(zip(split.ids.tolist(), rows, strict=True)))
    if want is not None:
        np.testing.assert_array_equal(got, want)


def test_gather_rows_of_unaligned_read_only_blocks():
    ids = np.arange(6, dtype=np.uint64)
    split = dedup.split_distinct(ids, 1)
    raw = b"x" + np.arange(18, dtype=np.float32).tobytes()
    block = np.frombuffer(raw, np.uint8)[1:].view(np.float32).reshape(6, 3)
    got = dedup.gather_rows(split, [block], 6, 3)
    assert got.flags.writeable
    np.testing.assert_array_equal(got, block)


@given(ids=IDS, shards=SHARDS, dim=DIMS)
def test_scatter_values_matches_naive(ids, shards, dim):
    split = dedup.split_distinct(ids, shards)
    values = rows_like(ids, dim)
    blocks = blocks_for(split, shards, dim)
    assert dedup.scatter_values(split, values, blocks)
    want = naive.summed_rows(ids, values)
    for s in range(shards):
        for each, row in zip(split.owned(s).tolist(), blocks[s], strict=True):
            np.testing.assert_array_equal(row, want[each])


@given(ids=IDS, shards=SHARDS, dim=DIMS)
def test_scatter_values_rounds_to_float16_once_after_adding(ids, shards, dim):
    split = dedup.split_distinct(ids, shards)
    values = rows_like(ids, dim)
    blocks = blocks_for(split, shards, dim, np.float16)
    assert dedup.scatter_values(split, values, blocks)
    want = naive.summed_rows(ids, values)
    for s in range(shards):
        for each, row in zip(split.owned(s).tolist(), blocks[s], strict=True):
            np.testing.assert_array_equal(row, want[each].astype(np.float16))


@given(ids=IDS, shards=SHARDS, dim=DIMS)
def test_scatter_values_of_a_split_with_repeats_keeps_every_row(ids, shards, dim):
    split = dedup.split_by_owner(ids, shards)
    values = rows_like(ids, dim)
    blocks = blocks_for(split, shards, dim)
    assert dedup.scatter_values(split, values, blocks)
    want = naive.last_rows(ids, values)
    for s in range(shards):
        for each, row in naive.last_rows(split.owned(s), blocks[s]).items():
            np.testing.assert_array_equal(row, want[each])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("place", [(0, 0), (3, 18), (5, 7)])
@pytest.mark.parametrize("repeats", [False, True])
def test_scatter_values_finds_what_is_not_finite(bad, shards, place, repeats):
    ids = np.array([4, 7, 4, 1, 0, 7] if repeats else range(6), np.uint64)
    split = dedup.split_distinct(ids, shards)
    values = np.ones((6, 19), np.float32)
    assert dedup.scatter_values(split, values, blocks_for(split, shards, 19))
    values[place] = bad
    assert not dedup.scatter_values(split, values, blocks_for(split, shards, 19))


def test_scatter_values_finds_a_sum_that_overflows():
    ids = np.array([3, 3], np.uint64)
    split = dedup.split_distinct(ids, 1)
    values = np.full((2, 4), 3e38, np.float32)
    assert not dedup.scatter_values(split, values, blocks_for(split, 1, 4))


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False), (-1e6, False)])
@pytest.mark.parametrize("repeats", [False, True])
def test_scatter_values_finds_what_float16_cannot_hold(value, fits, repeats):
    ids = np.array([3, 3] if repeats else [3, 4], np.uint64)
    split = dedup.split_distinct(ids, 1)
    values = np.zeros((2, 5), np.float32)
    values[1, 4] = value
    assert dedup.scatter_values(split, values, blocks_for(split, 1, 5, np.float16)) == fits
    assert dedup.scatter_values(split, values, blocks_for(split, 1, 5), float16=True) == fits


@given(ids=IDS, shards=SHARDS)
def test_gather_values_brings_one_value_per_id_back(ids, shards):
    split = dedup.split_by_owner(ids, shards)
    pieces = [(split.owned(s) % np.uint64(7)).astype(np.int8) for s in range(shards)]
    assert dedup.gather_values(split, pieces, np.int8).tolist() == (ids % np.uint64(7)).tolist()


@pytest.mark.parametrize(
    "ids", [np.arange(8, dtype=np.uint64)[::2], np.arange(4), np.arange(4, dtype=">u8"), np.zeros((2, 2), np.uint64)]
)
@pytest.mark.parametrize("split", [dedup.split_distinct, dedup.split_by_owner])
def test_ids_that_the_kernels_would_misread_are_refused(split, ids):
    with pytest.raises(InvalidRequestError, match="ids are .*, expected C-contiguous uint64"):
        split(ids, 3)


@pytest.mark.parametrize("values", [np.ones((4, 3)), np.ones((4, 6), np.float32)[:, ::2], np.ones((4, 3), ">f4")])
def test_values_that_the_kernels_would_misread_are_refused(values):
    split = dedup.split_distinct(np.arange(4, dtype=np.uint64), 1)
    with pytest.raises(InvalidRequestError, match="values are .*, expected C-contiguous float32"):
        dedup.scatter_values(split, values, [np.empty((4, 3), np.float32)])

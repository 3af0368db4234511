"""Ops that arrange ids and their places against naive twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_ops
from trilith.compat.monolith import id_ops, shared_buffer
from trilith.errors import InvalidRequestError
from trilith.ops import reorder

SEEDS = st.integers(0, 2**32 - 1)


def same(ours, theirs):
    """Bit for bit, dtype included."""
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)


# ---- ragged split ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.integers(-9, 9), max_size=6), max_size=5), splits=st.integers(1, 4), seed=SEEDS)
def test_a_ragged_split_keeps_all_rows_and_says_where_values_were(rows, splits, seed):
    rng = np.random.default_rng(seed)
    flat, cuts = [each for row in rows for each in row], np.cumsum([0, *map(len, rows)])
    chosen = rng.integers(0, splits, len(flat))
    values, positions = id_ops.ragged_split_by_indices(chosen, np.array(flat, np.int64), cuts, splits)
    for s, (value, position) in enumerate(zip(values, positions, strict=True)):
        mine = np.flatnonzero(chosen == s)
        same(position.values, mine)
        same(value.values, np.array(flat, np.int64)[mine])
        same(value.row_splits, np.searchsorted(mine, cuts))
        same(position.row_splits, value.row_splits)


def test_a_ragged_split_refuses_splits_and_indices_that_do_not_fit():
    def call(indices, values, splits):
        id_ops.ragged_split_by_indices(indices, values, splits, 2)

    with pytest.raises(InvalidRequestError, match="number of values"):
        call([0, 1], [1, 2], [0, 1])
    with pytest.raises(InvalidRequestError, match="indices"):
        call([0], [1, 2], [0, 2])
    with pytest.raises(InvalidRequestError, match="one-dimensional"):
        call([0, 1], [[1], [2]], [0, 2])
    for bad in (-1, 2, 2**40):
        with pytest.raises(InvalidRequestError, match=str(bad)):
            call([0, bad], [1, 2], [0, 2])


# ---- reorder, unique -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=SEEDS, n=st.integers(0, 60), shards=st.integers(1, 5))
def test_reorder_matches_naive(seed, n, shards):
    rng = np.random.default_rng(seed)
    keys, owners = rng.integers(-9, 9, n), rng.integers(0, shards, n)
    call = id_ops.reorder_by_indices
    output, sizes = call(keys, owners, shards)
    want, counts = naive_ops.reorder_by_indices(keys.tolist(), owners.tolist(), shards)
    same(output, np.array(want, np.int64))
    same(sizes, np.array(counts, np.int32))
    wide, _ = call(np.stack([keys, np.arange(n)], 1), owners, shards)
    assert wide[:, 0].tolist() == output.tolist()
    assert all(keys.tolist().index(key) == place for key, place in wide.tolist())


@settings(max_examples=30)
@given(
    lists=st.lists(st.lists(st.integers(0, 12) | st.integers(0, 2**62), max_size=30), max_size=5),
    shards=st.sampled_from([1, 2, 3, 4, 5, 7]),
    empty=st.booleans(),
    workers=st.integers(1, 3),
)
def test_fused_reorder_matches_naive(lists, shards, empty, workers):
    dims = [1 + k % 3 for k in range(len(lists))]
    found = reorder.fused_reorder_by_indices(lists, shards, dims, rank0_empty=empty, threads=workers)
    want = naive_ops.fused_reorder(lists, shards, dims, empty)
    for ours, theirs, dtype in zip(found, want, [np.int64, *[np.int32] * 4], strict=True):
        same(ours, np.array(theirs, dtype))
    assert [len(each) for each in found.offsets()] == [len(each) for each in lists] or not lists


def test_reorder_refuses_what_has_no_shard():
    reordered, fused = id_ops.reorder_by_indices, reorder.fused_reorder_by_indices
    with pytest.raises(InvalidRequestError, match="-3"):
        fused([[1], [2, -3]], 2, [1, 1])
    with pytest.raises(InvalidRequestError, match="outside 0..1"):
        reordered([1, 2], [0, 2], 2)
    with pytest.raises(InvalidRequestError, match="int32"):
        fused([[0, 1]], 1, [1 << 30])
    for shards, dims in ((0, [1]), (2, [0]), (2, [1, 1])):
        with pytest.raises(InvalidRequestError, match=r"num_of_shards|dim_sizes"):
            fused([[0, 1]], shards, dims)
    for rows, owners, shards in (([1], [0], 0), ([1, 2], [0], 1), ([[[1]]], [0], 1), (np.empty((1, 0)), [0], 1)):
        with pytest.raises(InvalidRequestError, match=r"num_of_shards|shape"):
            reordered(rows, owners, shards)


@settings(max_examples=40)
@given(st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=50), st.booleans())
def test_unique_keeps_the_order_of_first_occurrence(ids, unsigned):
    given_ids = np.array(ids, np.int64).view(np.uint64 if unsigned else np.int64)
    values, numbers = id_ops.unique_first_occurrence(given_ids)
    same(values, np.array(list(dict.fromkeys(given_ids.tolist())), given_ids.dtype))
    assert values[numbers].tolist() == given_ids.tolist()


# ---- the shared buffer -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=4), seed=SEEDS)
def test_a_buffer_filled_by_parts_holds_every_occurrence_and_its_gradient_sums_them(rows, seed):
    rng = np.random.default_rng(seed)
    dims = [1 + k * 5 for k in range(len(rows))]
    flat, splits = [each for row in rows for each in row], np.cumsum([0, *map(len, rows)])
    keys = shared_buffer.unique_key_with_value_and_offset(flat, splits, dims)
    want = naive_ops.unique_rows(rows, dims)
    assert keys.unique_key.tolist() == [each for places in want for each in places]
    assert keys.unique_key_split.tolist() == np.cumsum([0, *map(len, want)]).tolist()
    offsets = np.split(keys.value_offset, keys.value_offset_split[1:-1]) if keys.unique_key.size else []
    assert [each.tolist() for each in offsets] == [each for places in want for each in places.values()]
    vectors = {
        (j, each): rng.normal(size=dims[j]).astype(np.float32) for j, places in enumerate(want) for each in places
    }
    _, positions = id_ops.ragged_split_by_indices(keys.unique_key % 2, keys.unique_key, keys.unique_key_split, 2)
    grad = rng.normal(size=keys.size).astype(np.float32)
    handles = []
    for part in positions:
        chosen = [
            (int(np.searchsorted(keys.unique_key_split, p, "right")) - 1, int(keys.unique_key[p])) for p in part.values
        ]
        # More than is needed is accepted.
        value = np.concatenate([np.empty(0, np.float32), *(vectors[each] for each in chosen), np.ones(2, np.float32)])
        handles.append(shared_buffer.fill_with_offset_map(part.values, part.row_splits, value, keys))
        summed = shared_buffer.fill_with_offset_map_gradient(part.values, part.row_splits, grad, keys)
        sums = [sum(grad[o : o + dims[j]] for o in want[j][each]) for j, each in chosen]
        np.testing.assert_allclose(summed, np.concatenate([np.empty(0), *sums]), rtol=1e-5, atol=1e-5)
    buffer = shared_buffer.finalize_shared_tensor(handles)
    whole = [vectors[j, each] for j, row in enumerate(rows) for each in row]
    same(buffer, np.concatenate([np.empty(0, np.float32), *whole]))
    with pytest.raises(InvalidRequestError, match="finalized before"):
        shared_buffer.finalize_shared_tensor(handles)


def test_fills_refuse_what_does_not_fit():
    def unique_keys(values, splits, dims, **options):
        return shared_buffer.unique_key_with_value_and_offset(values, splits, dims, **options)

    keys = unique_keys([0, 1, 2, 1, 0, 0, 1, 0], [0, 0, 5, 8, 8], [1, 2, 3, 4])

    def fill(pos, splits, floats, keys=keys):
        value = np.arange(floats, dtype=np.float32)
        return shared_buffer.fill_with_offset_map(pos, splits, value, keys)

    pos, splits = [0, 1, 2, 3, 4], [0, 0, 3, 5, 5]
    with pytest.raises(InvalidRequestError, match="expected 12 .* actual 10"):
        fill(pos, splits, 10)
    with pytest.raises(InvalidRequestError, match=r"pos.* 5 is|pos\[4\]=5"):
        fill([0, 1, 2, 3, 5], splits, 12)
    with pytest.raises(InvalidRequestError, match="4 dims"):
        fill(pos, [0, 5], 12)
    with pytest.raises(InvalidRequestError, match="another table"):
        fill([3], [0, 0, 0, 0, 1], 4)
    with pytest.raises(InvalidRequestError, match="2 dims"):
        unique_keys([1], [0, 1], [1, 2])
    with pytest.raises(InvalidRequestError, match="at least 1"):
        unique_keys([1], [0, 1], [0])
    bare = unique_keys([1], [0, 1], [1], generate_buffer=False)
    with pytest.raises(InvalidRequestError, match="generate_buffer"):
        fill([0], [0, 1], 1, bare)
    other = unique_keys([1], [0, 1], [4])
    with pytest.raises(InvalidRequestError, match="one buffer, repeated"):
        shared_buffer.finalize_shared_tensor([keys.value_buffer, other.value_buffer])
    with pytest.raises(InvalidRequestError, match="do not have shape"):
        shared_buffer.finalize_shared_tensor([other.value_buffer], (3, -1))

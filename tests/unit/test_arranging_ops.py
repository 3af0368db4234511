"""Ops that arrange ids and their places against naive twins: the same tests for arrays, tensors, torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_ops
from trilith.errors import InvalidRequestError
from trilith.ops import (
    ragged,
    reorder,
    shared_buffer,
    split,
    torch_buffer,
    torch_packing,
    torch_ragged,
    torch_reorder,
    torch_split,
    unique,
)
from trilith.ops.torch_bridge import use_native

SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Form:
    """One implementation: how its inputs are made, and what goes with every call."""

    make: Callable[..., Any]
    options: dict[str, Any]
    split: Any
    reorder: Any
    buffer: Any

    def __call__(self, values, dtype=np.int64):
        return self.make(np.array(values, dtype))


ARRAYS = Form(np.asarray, {}, split, reorder, shared_buffer)
FORMS = pytest.mark.parametrize(
    "form",
    [
        ARRAYS,
        Form(torch.from_numpy, {"native": False}, torch_split, torch_reorder, torch_buffer),
        Form(torch.from_numpy, {"native": True}, torch_split, torch_reorder, torch_buffer),
    ],
    ids=["arrays", "kernels", "torch"],
)


def same(ours, theirs):
    """Bit for bit, dtype included."""
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)


# ---- ragged split ----------------------------------------------------------------------------------------------------


@FORMS
@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.integers(-9, 9), max_size=6), max_size=5), splits=st.integers(1, 4), seed=SEEDS)
def test_a_ragged_split_keeps_all_rows_and_says_where_values_were(form, rows, splits, seed):
    rng = np.random.default_rng(seed)
    flat, cuts = [each for row in rows for each in row], np.cumsum([0, *map(len, rows)])
    chosen = rng.integers(0, splits, len(flat))
    values, positions = form.split.ragged_split_by_indices(form(chosen), form(flat), form(cuts), splits, **form.options)
    for s, (value, position) in enumerate(zip(values, positions, strict=True)):
        mine = np.flatnonzero(chosen == s)
        same(position.values, mine)
        same(value.values, np.array(flat, np.int64)[mine])
        same(value.row_splits, np.searchsorted(mine, cuts))
        same(position.row_splits, value.row_splits)


@FORMS
def test_a_ragged_split_refuses_splits_and_indices_that_do_not_fit(form):
    def call(indices, values, splits):
        form.split.ragged_split_by_indices(form(indices), form(values), form(splits), 2, **form.options)

    with pytest.raises(InvalidRequestError, match="number of values"):
        call([0, 1], [1, 2], [0, 1])
    with pytest.raises(InvalidRequestError, match="indices"):
        call([0], [1, 2], [0, 2])
    with pytest.raises(InvalidRequestError, match="one-dimensional"):
        call([0, 1], [[1], [2]], [0, 2])
    for bad in (-1, 2, 2**40):
        with pytest.raises(InvalidRequestError, match=str(bad)):
            call([0, bad], [1, 2], [0, 2])


def test_gradients_flow_through_a_ragged_split():
    for native in (False, True):
        values = torch.arange(4.0, requires_grad=True)
        pieces, _ = torch_split.ragged_split_by_indices(
            torch.tensor([0, 1, 0, 1]), values, torch.tensor([0, 1, 4]), 2, native=native
        )
        (pieces[0].values.sum() + 2 * pieces[1].values.sum()).backward()
        assert values.grad.tolist() == [1, 2, 1, 2]


# ---- reorder, unique -------------------------------------------------------------------------------------------------


@FORMS
@settings(max_examples=30)
@given(seed=SEEDS, n=st.integers(0, 60), shards=st.integers(1, 5))
def test_reorder_matches_naive(form, seed, n, shards):
    rng = np.random.default_rng(seed)
    keys, owners = rng.integers(-9, 9, n), rng.integers(0, shards, n)
    call = form.reorder.reorder_by_indices
    output, sizes = call(form(keys), form(owners, np.int32), shards, **form.options)
    want, counts = naive_ops.reorder_by_indices(keys.tolist(), owners.tolist(), shards)
    same(output, np.array(want, np.int64))
    same(sizes, np.array(counts, np.int32))
    wide, _ = call(form(np.stack([keys, np.arange(n)], 1)), form(owners, np.int32), shards, **form.options)
    assert wide[:, 0].tolist() == output.tolist()
    assert all(keys.tolist().index(key) == place for key, place in wide.tolist())


@FORMS
@settings(max_examples=30)
@given(
    lists=st.lists(st.lists(st.integers(0, 12) | st.integers(0, 2**62), max_size=30), max_size=5),
    shards=st.sampled_from([1, 2, 3, 4, 5, 7]),
    empty=st.booleans(),
    workers=st.integers(1, 3),
)
def test_fused_reorder_matches_naive(form, lists, shards, empty, workers):
    dims = [1 + k % 3 for k in range(len(lists))]
    options = form.options or {"threads": workers}
    found = form.reorder.fused_reorder_by_indices(
        [form(each) for each in lists], shards, dims, rank0_empty=empty, **options
    )
    want = naive_ops.fused_reorder(lists, shards, dims, empty)
    for ours, theirs, dtype in zip(found, want, [np.int64, *[np.int32] * 4], strict=True):
        same(ours, np.array(theirs, dtype))
    assert [len(each) for each in found.offsets()] == [len(each) for each in lists] or not lists


@FORMS
def test_reorder_refuses_what_has_no_shard(form):
    reordered, fused = form.reorder.reorder_by_indices, form.reorder.fused_reorder_by_indices
    with pytest.raises(InvalidRequestError, match="-3"):
        fused([form([1]), form([2, -3])], 2, [1, 1], **form.options)
    with pytest.raises(InvalidRequestError, match="outside 0..1"):
        reordered(form([1, 2]), form([0, 2]), 2, **form.options)
    with pytest.raises(InvalidRequestError, match="int32"):
        fused([form([0, 1])], 1, [1 << 30], **form.options)
    for shards, dims in ((0, [1]), (2, [0]), (2, [1, 1])):
        with pytest.raises(InvalidRequestError, match=r"num_of_shards|dim_sizes"):
            fused([form([0, 1])], shards, dims, **form.options)
    for rows, owners, shards in (([1], [0], 0), ([1, 2], [0], 1), ([[[1]]], [0], 1), (np.empty((1, 0)), [0], 1)):
        with pytest.raises(InvalidRequestError, match=r"num_of_shards|shape"):
            reordered(form(rows), form(owners), shards, **form.options)


@settings(max_examples=40)
@given(st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=50), st.booleans())
def test_unique_keeps_the_order_of_first_occurrence(ids, unsigned):
    given_ids = np.array(ids, np.int64).view(np.uint64 if unsigned else np.int64)
    values, numbers = unique.unique_first_occurrence(given_ids)
    same(values, np.array(list(dict.fromkeys(given_ids.tolist())), given_ids.dtype))
    assert values[numbers].tolist() == given_ids.tolist()
    ours, places = torch_ragged.unique_first_occurrence(torch.from_numpy(given_ids))
    same(ours, values)
    same(places, numbers)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=4))
def test_row_ids_and_glued_splits_of_tensors_are_those_of_arrays(lengths):
    splits = [np.cumsum([0, *each]) for each in lengths]
    sizes = np.array([each.size for each in splits])
    glued = ragged.normalize_merged_split(np.concatenate(splits), sizes)
    ours = torch_ragged.normalize_merged_split(torch.from_numpy(np.concatenate(splits)), torch.from_numpy(sizes))
    same(ours, glued)
    same(torch_ragged.value_rowids(torch.from_numpy(glued)), ragged.value_rowids(glued))


def test_tensors_that_are_no_splits_are_refused():
    for splits in ([], [1, 2], [0, 3, 2], [[0, 1]]):
        with pytest.raises(InvalidRequestError, match="rise from 0"):
            torch_ragged.value_rowids(torch.tensor(splits))
    for sizes in ([2], [3, 0], []):
        with pytest.raises(InvalidRequestError, match="whole ones"):
            torch_ragged.normalize_merged_split(torch.tensor([0, 1, 2]), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(InvalidRequestError, match="rise from 0"):
        torch_ragged.normalize_merged_split(torch.tensor([0, 2, 1]), torch.tensor([3]))
    with pytest.raises(InvalidRequestError, match="integers"):
        torch_ragged.unique_first_occurrence(torch.ones(2))


# ---- the shared buffer -----------------------------------------------------------------------------------------------


@FORMS
@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=4), seed=SEEDS)
def test_a_buffer_filled_by_parts_holds_every_occurrence_and_its_gradient_sums_them(form, rows, seed):
    rng = np.random.default_rng(seed)
    dims = [1 + k * 5 for k in range(len(rows))]
    flat, splits = [each for row in rows for each in row], np.cumsum([0, *map(len, rows)])
    plain = shared_buffer.unique_key_with_value_and_offset(flat, splits, dims)
    keys = form.buffer.unique_key_with_value_and_offset(form(flat), form(splits), dims, **form.options)
    for ours, theirs in zip(keys[:5], plain[:5], strict=True):
        same(ours, theirs)
    want = naive_ops.unique_rows(rows, dims)
    assert keys.unique_key.tolist() == [each for places in want for each in places]
    assert keys.unique_key_split.tolist() == np.cumsum([0, *map(len, want)]).tolist()
    offsets = np.split(plain.value_offset, plain.value_offset_split[1:-1]) if plain.unique_key.size else []
    assert [each.tolist() for each in offsets] == [each for places in want for each in places.values()]
    vectors = {
        (j, each): rng.normal(size=dims[j]).astype(np.float32) for j, places in enumerate(want) for each in places
    }
    _, positions = split.ragged_split_by_indices(plain.unique_key % 2, plain.unique_key, plain.unique_key_split, 2)
    grad = rng.normal(size=plain.size).astype(np.float32)
    handles, values = [], []
    for part in positions:
        chosen = [
            (int(np.searchsorted(plain.unique_key_split, p, "right")) - 1, int(plain.unique_key[p]))
            for p in part.values
        ]
        # More than is needed is accepted.
        value = np.concatenate([np.empty(0, np.float32), *(vectors[each] for each in chosen), np.ones(2, np.float32)])
        given_value = form(value, np.float32)
        if form is not ARRAYS:
            values.append((given_value.requires_grad_(), part))
        handles.append(
            form.buffer.fill_with_offset_map(
                form(part.values), form(part.row_splits), given_value, keys, **form.options
            )
        )
        summed = shared_buffer.fill_with_offset_map_gradient(part.values, part.row_splits, grad, plain)
        sums = [sum(grad[o : o + dims[j]] for o in want[j][each]) for j, each in chosen]
        np.testing.assert_allclose(summed, np.concatenate([np.empty(0), *sums]), rtol=1e-5, atol=1e-5)
    buffer = form.buffer.finalize_shared_tensor(handles)
    whole = [vectors[j, each] for j, row in enumerate(rows) for each in row]
    same(buffer if form is ARRAYS else buffer.detach(), np.concatenate([np.empty(0, np.float32), *whole]))
    with pytest.raises(InvalidRequestError, match="finalized before"):
        form.buffer.finalize_shared_tensor(handles)
    if values:
        buffer.backward(torch.from_numpy(grad))
    for value, part in values:
        summed = shared_buffer.fill_with_offset_map_gradient(part.values, part.row_splits, grad, plain)
        same(value.grad, np.concatenate([summed, np.zeros(2, np.float32)]))


@FORMS
def test_fills_refuse_what_does_not_fit(form):
    def unique_keys(values, splits, dims, **options):
        return form.buffer.unique_key_with_value_and_offset(form(values), form(splits), dims, **options, **form.options)

    keys = unique_keys([0, 1, 2, 1, 0, 0, 1, 0], [0, 0, 5, 8, 8], [1, 2, 3, 4])

    def fill(pos, splits, floats, keys=keys):
        value = form(np.arange(floats), np.float32)
        return form.buffer.fill_with_offset_map(form(pos), form(splits), value, keys, **form.options)

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
        form.buffer.finalize_shared_tensor([keys.value_buffer, other.value_buffer])
    with pytest.raises(InvalidRequestError, match="do not have shape"):
        form.buffer.finalize_shared_tensor([other.value_buffer], (3, -1))


# ---- which form a tensor gets ----------------------------------------------------------------------------------------


def test_tensors_that_are_not_on_the_cpu_get_torchs_own_operations_and_stay_where_they_are():
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    assert not use_native(None, here)
    assert use_native(None, here, there)
    assert use_native(True, here)
    assert not use_native(False, there)
    flat = torch_packing.aligned_flat_concat([there, there])
    assert flat.device.type == "meta"
    assert [each.shape for each in torch_packing.aligned_flat_split([there, there], flat)] == [(3,), (3,)]

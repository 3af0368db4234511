"""The worker's primitive ops against their naive twins, and what they refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_ops
from trilith.compat.monolith import embedding_map, id_ops, packing
from trilith.compat.monolith import row_ops as reduce
from trilith.errors import InvalidRequestError
from trilith.ops import fused_gather, ragged, threads

SEEDS = st.integers(0, 2**32 - 1)
DIMS = st.sampled_from([1, 2, 3, 4, 7, 16, 21, 35])


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


# ---- split -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(0, 60), splits=st.integers(1, 5), dim=DIMS, whole=st.booleans())
def test_split_keeps_the_order_of_rows(seed, n, splits, dim, whole):
    rng = np.random.default_rng(seed)
    indices, rows = rng.integers(0, splits, n), rng.integers(-9, 9, (n, dim)) if whole else floats(rng, n, dim)
    got = id_ops.split_by_indices(indices, rows, splits)
    want = naive_ops.split_by_indices(indices, rows, splits)
    assert [len(each) for each in got] == [len(each) for each in want]
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, np.array(theirs, rows.dtype).reshape(-1, dim))
        assert ours.dtype == rows.dtype


@settings(max_examples=40)
@given(seed=SEEDS, n=st.integers(0, 40), splits=st.integers(1, 4), dim=DIMS)
def test_the_gradient_of_a_split_brings_rows_back(seed, n, splits, dim):
    rng = np.random.default_rng(seed)
    indices, rows = rng.integers(0, splits, n), floats(rng, n, dim)
    pieces = id_ops.split_by_indices(indices, rows, splits)
    np.testing.assert_array_equal(id_ops.split_by_indices_gradient(indices, pieces, splits), rows)


def test_no_rows_split_into_nothing_and_their_gradient_is_empty():
    assert [each.shape for each in id_ops.split_by_indices([], np.empty((0, 3), np.float32), 2)] == [(0, 3), (0, 3)]
    assert id_ops.split_by_indices_gradient([], [[], []], 2).shape == (0,)


@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_a_split_refuses_an_index_outside(bad):
    for call in (
        lambda: id_ops.split_by_indices([0, bad], np.zeros(2, np.float32), 2),
        lambda: id_ops.split_by_indices_gradient([0, bad], [[1.0], [2.0]], 2),
    ):
        with pytest.raises(InvalidRequestError, match=str(bad)):
            call()


# ---- map and gather --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=SEEDS, lists=st.integers(1, 4), n=st.integers(0, 60), dim=DIMS, workers=st.integers(1, 3))
def test_map_brings_rows_to_ids_and_gradients_back(seed, lists, n, dim, workers):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(-20, 20, rng.integers(1, 15)) for _ in range(lists)]
    blocks = [floats(rng, each.size, dim) for each in ids]
    wanted = rng.choice(np.concatenate(ids), n)
    want = naive_ops.map_rows([each.tolist() for each in ids], blocks, wanted.tolist()).reshape(-1, dim)
    np.testing.assert_array_equal(embedding_map.map_id_to_embedding(ids, blocks, wanted, threads=workers), want)
    grads = floats(rng, n, dim)
    back = naive_ops.map_gradient([each.tolist() for each in ids], wanted.tolist(), grads)
    got = embedding_map.map_id_to_embedding_gradient_back_prop(ids, wanted, grads)
    for ours, theirs in zip(got, back, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gather_by_input_gives_rows_of_any_shape_and_their_numbers():
    ids, rows = np.array([5, 7, 5, 9]), np.arange(8, dtype=np.float32).reshape(4, 2)
    wanted = np.array([[9, 5], [7, 9]])
    got, mapping = embedding_map.gather_embeddings_by_input(ids, rows, wanted)
    assert mapping.tolist() == [[3, 0], [1, 3]]
    np.testing.assert_array_equal(got, rows[mapping])
    grads = np.ones((2, 2, 2), np.float32)
    back = embedding_map.gather_embeddings_by_ids_gradient_back_prop(ids, grads, mapping)
    assert back.tolist() == [[1, 1], [1, 1], [0, 0], [2, 2]]


def test_an_unknown_id_is_refused_by_name():
    for call in (
        lambda: embedding_map.map_id_to_embedding([[1], [2]], [[[1.0]], [[2.0]]], [2, 31]),
        lambda: embedding_map.map_id_to_embedding_gradient_back_prop([[1], [2]], [31], [[1.0]]),
        lambda: embedding_map.gather_embeddings_by_input([1], [[1.0]], [31]),
    ):
        with pytest.raises(InvalidRequestError, match="31"):
            call()


def test_lists_that_do_not_fit_their_embeddings_are_refused():
    for ids, rows in (([[1]], [[[1.0]], [[1.0]]]), ([[1, 2]], [[[1.0]]]), ([[1], [2]], [[[1.0]], [[1.0, 2.0]]])):
        with pytest.raises(ValueError, match="embeddings"):
            embedding_map.map_id_to_embedding(ids, rows, [1])
    with pytest.raises(ValueError, match="grads"):
        embedding_map.map_id_to_embedding_gradient_back_prop([[1]], [1, 1], [[1.0]])


@settings(max_examples=40)
@given(seed=SEEDS, n=st.integers(0, 40), dims=st.lists(DIMS, min_size=1, max_size=3), workers=st.integers(1, 3))
def test_fused_gather_reads_at_offsets_and_its_gradient_adds_there(seed, n, dims, workers):
    rng = np.random.default_rng(seed)
    fused = floats(rng, 80)
    offsets = [rng.integers(0, 80 - dim + 1, n).astype(np.int32) for dim in dims]
    want = [
        np.array([fused[o : o + dim] for o in each], np.float32).reshape(-1, dim)
        for each, dim in zip(offsets, dims, strict=True)
    ]
    grads = [floats(rng, n, dim) for dim in dims]
    back = np.zeros(80, np.float32)
    for each, dim, grad in zip(offsets, dims, grads, strict=True):
        for offset, row in zip(each, grad, strict=True):
            back[offset : offset + dim] += np.float32(0.5) * row
    got = fused_gather.fused_gather_embeddings_by_input(fused, offsets, dims, threads=workers)
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, reference)
    summed = fused_gather.fused_gather_embeddings_by_input_gradient(80, grads, offsets, dims, scale=0.5)
    np.testing.assert_allclose(summed, back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 4])
def test_fused_gather_refuses_vectors_that_leave_the_buffer(bad):
    with pytest.raises(InvalidRequestError, match=str(bad)):
        fused_gather.fused_gather_embeddings_by_input(np.zeros(5), [[0, bad]], [2])
    with pytest.raises(InvalidRequestError, match=str(bad)):
        fused_gather.fused_gather_embeddings_by_input_gradient(5, [np.zeros((1, 2))], [[bad]], [2])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([], "0 arrays in out for 1 lists of offsets"),
        ([np.empty((1, 2))], "out is float64"),
        ([np.empty((1, 4), np.float32)[:, ::2]], "C-contiguous"),
        ([np.frombuffer(bytes(8), np.float32).reshape(1, 2)], "out is read-only"),
    ],
)
def test_vectors_are_gathered_only_where_they_fit(out, message):
    with pytest.raises(InvalidRequestError, match=message):
        fused_gather.fused_gather_embeddings_by_input(np.zeros(5), [[0]], [2], out=out)


# ---- reductions ------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "sum": (reduce.reduce_sum, lambda bag: bag.sum(0)),
    "mean": (reduce.reduce_mean, lambda bag: bag.mean(0) if len(bag) else np.full(bag.shape[1], np.nan)),
    "norm": (reduce.reduce_norm, lambda bag: np.sqrt((bag**2).sum(0))),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
@settings(max_examples=40)
@given(seed=SEEDS, n=st.integers(0, 40), rows=st.integers(1, 12), dim=DIMS)
def test_reductions_and_their_gradients_match_naive(kind, seed, n, rows, dim):
    rng = np.random.default_rng(seed)
    op, of_bag = REDUCTIONS[kind]
    places, values = rng.integers(0, rows, n), floats(rng, n, dim)
    want = np.stack([of_bag(bag) for bag in naive_ops.bags(places, values, rows)])
    np.testing.assert_allclose(op(places[:, None], values, rows), want, rtol=1e-4, atol=1e-5)
    grads = floats(rng, rows, dim)
    if kind == "sum":
        back = reduce.reduce_sum_gradient(places, grads)
        expected = grads[places]
    elif kind == "mean":
        back = reduce.reduce_mean_gradient(places, grads)
        expected = grads[places] / np.bincount(places, minlength=rows)[places][:, None]
    else:
        back = reduce.reduce_norm_gradient(places, values, grads)
        expected = grads[places] * values / want[places]
    np.testing.assert_allclose(back, expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_norm_of_zero_is_zero():
    assert reduce.reduce_norm_gradient([0, 0], np.zeros((2, 3)), np.ones((1, 3))).tolist() == np.zeros((2, 3)).tolist()


@pytest.mark.parametrize("bad", [-1, 3])
def test_reductions_refuse_rows_outside(bad):
    for op, _ in REDUCTIONS.values():
        with pytest.raises(InvalidRequestError, match=str(bad)):
            op([0, bad], np.ones((2, 2)), 3)


@settings(max_examples=40)
@given(seed=SEEDS, batch=st.integers(1, 6), dims=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_fused_reduce_and_split_sums_bags_and_cuts_columns(seed, batch, dims):
    rng = np.random.default_rng(seed)
    splits = [np.concatenate([[0], np.cumsum(rng.integers(0, 4, batch))]) for _ in range(2)]
    rows = [floats(rng, each[-1], sum(dims)) for each in splits]
    want = []
    for cuts, values in zip(splits, rows, strict=True):
        sums = np.stack([values[a:b].sum(0) for a, b in itertools.pairwise(cuts)])
        want += np.split(sums, np.cumsum(dims)[:-1], axis=1)
    got = reduce.fused_reduce_and_split(splits, rows, [dims, dims])
    for each, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(each, reference, rtol=1e-5, atol=1e-5)
    grads = [floats(rng, *each.shape) for each in want]
    back = reduce.fused_reduce_and_split_gradient(splits, grads, [dims, dims])
    for t, (each, cuts) in enumerate(zip(back, splits, strict=True)):
        wide = np.concatenate(grads[t * len(dims) : (t + 1) * len(dims)], axis=1)
        np.testing.assert_array_equal(each, np.repeat(wide, np.diff(cuts), axis=0))


def test_segment_sums_leave_zeros_and_refuse_disorder():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    want = np.array([[2, 4], [0, 0], [4, 5], [0, 0]])
    np.testing.assert_array_equal(reduce.fused_sorted_segment_sum([[0, 0, 2]], [values], [[4, 2]])[0], want)
    back = reduce.fused_sorted_segment_sum_gradient([[0, 0, 2]], [np.arange(8.0).reshape(4, 2)])[0]
    assert back.tolist() == [[0, 1], [0, 1], [4, 5]]
    for places, rows in (([1, 0, 2], values), ([0, 0, 4], values), ([], values), ([0], np.empty((0, 2), np.float32))):
        with pytest.raises(InvalidRequestError):
            reduce.fused_sorted_segment_sum([places], [rows], [[4, 2]])


def test_a_reduction_of_other_widths_or_batches_is_refused():
    with pytest.raises(InvalidRequestError, match="shape"):
        reduce.fused_reduce_sum_and_split([0], np.ones((1, 3)), 1, [1, 1])
    with pytest.raises(InvalidRequestError, match="2 rows"):
        reduce.fused_reduce_and_split([[0, 1], [0, 1, 1]], [np.ones((1, 1))] * 2, [[1], [1]])


# ---- ragged, packing, threads ----------------------------------------------------------------------------------------


def test_row_ids_and_glued_splits():
    assert ragged.value_rowids([0, 4, 4, 7, 8, 8]).tolist() == [0, 0, 0, 0, 2, 2, 2, 3]
    glued = id_ops.normalize_merged_split([0, 2, 5, 5, 9, 0, 0, 3, 4], [5, 4])
    assert glued.tolist() == [0, 2, 5, 5, 9, 9, 12, 13]
    for sizes in ([5, 3], [9, 0], []):
        with pytest.raises(InvalidRequestError):
            id_ops.normalize_merged_split([0, 2, 5, 5, 9, 0, 0, 3, 4], sizes)
    with pytest.raises(InvalidRequestError):
        ragged.value_rowids([0, 3, 2])


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5), align=st.sampled_from([1, 4, 8, 16]))
def test_aligned_concat_and_split_undo_each_other(shapes, align):
    arrays = [np.full(shape, i + 1, np.float32) for i, shape in enumerate(shapes)]
    flat = packing.aligned_flat_concat(arrays, 0.5, align=align)
    back = packing.aligned_flat_split(arrays, flat, align=align)
    assert flat.size % align == 0
    assert flat.sum() == sum(each.sum() for each in arrays) / 2
    for each, piece in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(piece, each * np.float32(0.5))
        assert np.shares_memory(piece, flat) or not piece.size


@given(
    groups=st.lists(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 3), max_size=3)), max_size=3),
    seed=SEEDS,
)
def test_packed_arrays_unpack_again(groups, seed):
    rng = np.random.default_rng(seed)
    arrays = [{key: floats(rng, *shape) for key, shape in group.items()} for group in groups]
    for group, whole in zip(
        packing.unpack_packed_tensors(groups, packing.pack_typed_keyed_tensors(arrays)), arrays, strict=True
    ):
        assert group.keys() == whole.keys()
        for key, each in group.items():
            np.testing.assert_array_equal(each, whole[key], strict=True)


def test_packing_refuses_what_it_cannot_undo():
    with pytest.raises(InvalidRequestError, match="1023"):
        packing.aligned_flat_concat([np.zeros(1)] * 1024)
    with pytest.raises(InvalidRequestError, match="power of two"):
        packing.aligned_flat_concat([np.zeros(1)], align=3)
    with pytest.raises(InvalidRequestError, match="packed into one"):
        packing.pack_tensors({"a": np.zeros(1, np.float32), "b": np.zeros(1, np.int64)})
    packed = packing.pack_typed_keyed_tensors([{"a": np.arange(6)}])
    assert packing.unpack_packed_tensors([{"a": [2, None]}], packed)[0]["a"].shape == (2, 3)
    with pytest.raises(InvalidRequestError, match="were packed as"):
        packing.unpack_packed_tensors([{"a": [6], "b": [1]}], packed)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [([6], None, "rank"), ([6], [None, None], "unknown"), ([6], [4, None], "divided"), ([6], [5], "values")],
)
def test_static_reshape_refuses(shape, target, message):
    with pytest.raises(InvalidRequestError, match=message):
        packing.static_reshape([np.zeros(shape)], [target])


def test_an_unknown_dimension_beside_zero_becomes_zero():
    arrays, sizes = packing.static_reshape([np.zeros((0, 3))], [[0, None]])
    assert arrays[0].shape == (0, 0)
    assert sizes.tolist() == [0]


def test_parts_cover_all_work_and_their_first_error_is_raised():
    seen = []
    threads.in_parts(lambda start, stop: seen.append((start, stop)), 10, 3)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 10)]

    def fail(start, stop):
        if start:
            raise InvalidRequestError(f"{start}..{stop}")

    with pytest.raises(InvalidRequestError, match=r"3\.\.6"):
        threads.in_parts(fail, 10, 3)
    with pytest.raises(InvalidRequestError, match="below 1"):
        threads.thread_count(0, 1)

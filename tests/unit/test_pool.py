"""Bags of rows combined: the kernel and the tensors against plain Python, and the gradients of the tensors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.nn.pooling import make_pooling
from trilith.ops.combiners import Combiner, FirstN, combiner_of
from trilith.ops.layout_config import FeatureConfig
from trilith.ops.pool import pool_rows
from trilith.ops.ragged import Ragged

_LENGTHS = [1, 0, 3, 2, 0, 1, 5]


@pytest.fixture(params=[1, 17, 40])
def rows(request):
    return np.random.default_rng(0).normal(size=(sum(_LENGTHS), request.param)).astype(np.float32)


_SPLITS = np.concatenate(([0], np.cumsum(_LENGTHS)))


def _bags(rows):
    return np.split(rows, _SPLITS[1:-1])


def combined(combiner, bag, dim):
    """The vector of one bag, by definition."""
    if combiner.n:
        return np.concatenate([bag, np.zeros((combiner.n, dim))])[: combiner.n]
    if combiner.kind == "max":
        return bag.max(0) if len(bag) else np.zeros(dim)
    divisor = {"sum": 1, "mean": len(bag), "sqrtn": len(bag) ** 0.5}[combiner.kind]
    return bag.sum(0) / (divisor or 1)


@pytest.mark.parametrize("name", ["sum", "mean", "sqrtn", "max", "first(2)", "first(6)"])
def test_the_kernel_and_tensors_combine_alike(rows, name):
    combiner, dim = combiner_of(name), rows.shape[1]
    expected = np.array([combined(combiner, bag, dim) for bag in _bags(rows)])
    np.testing.assert_allclose(pool_rows(rows, _SPLITS, combiner), expected, rtol=1e-5, atol=1e-6)
    places = Ragged(np.arange(len(rows)), _SPLITS)
    kept = places.first(combiner.n) if combiner.n else places
    pooling = make_pooling([kept.lengths], [combiner], torch.from_numpy)
    leaf = torch.from_numpy(rows[kept.values]).requires_grad_()
    vectors = pooling.forward(leaf)
    np.testing.assert_allclose(vectors.detach(), expected, rtol=1e-5, atol=1e-6)
    grads = torch.from_numpy(np.random.default_rng(1).normal(size=expected.shape).astype(np.float32))
    vectors.backward(grads)
    torch.testing.assert_close(pooling.backward(grads), leaf.grad)


def test_vectors_may_lie_apart(rows):
    out = np.full((len(_LENGTHS), 3, rows.shape[1]), 9, np.float32)
    pool_rows(rows, _SPLITS, Combiner("sum"), out[:, 1])
    np.testing.assert_allclose(out[:, 1], [bag.sum(0) for bag in _bags(rows)], rtol=1e-5, atol=1e-6)
    assert (out[:, ::2] == 9).all()


def test_combiners_have_one_name_each():
    for name in ("sum", "mean", "sqrtn", "max", "first(3)"):
        assert str(combiner_of(name)) == name
        assert combiner_of(combiner_of(name)) == combiner_of(name)
    assert FirstN(3) == Combiner("first", 3) == combiner_of("first(3)")
    for wrong in ("first(0)", "first", "max(3)", "ReduceSum"):
        with pytest.raises(InvalidRequestError, match=wrong.split("(")[0]):
            combiner_of(wrong)
    for kind, n in (("first", 0), ("sum", 1), ("max", 1), ("median", 0)):
        with pytest.raises(InvalidRequestError, match="none of sum, mean, sqrtn, max, first n"):
            Combiner(kind, n)


ROWS, SPLITS = np.ones((4, 3), np.float32), np.array([0, 1, 4])


@pytest.mark.parametrize(
    ("rows", "splits", "out", "message"),
    [
        (np.ones((4, 3)), SPLITS, np.empty((2, 3), np.float32), r"rows are float64\[4, 3\]"),
        (np.ones((4, 6), np.float32)[:, ::2], SPLITS, np.empty((2, 3), np.float32), "rows are"),
        (ROWS, SPLITS.astype(np.int32), np.empty((2, 3), np.float32), "splits are int32"),
        (ROWS, np.array([0, 1, 5]), np.empty((2, 3), np.float32), "splits go from 0 to 5"),
        (ROWS, SPLITS, np.empty((2, 3)), "out is float64"),
        (ROWS, SPLITS, np.empty((3, 3), np.float32), r"out is float32\[3, 3\], expected float32\[2, 3\]"),
        (ROWS, SPLITS, np.empty((2, 6), np.float32)[:, ::2], "of whole rows"),
        (ROWS, SPLITS, np.frombuffer(bytes(24), np.float32).reshape(2, 3), "out is read-only"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(rows, splits, out, message):
    with pytest.raises(InvalidRequestError, match=message):
        pool_rows(rows, splits, Combiner("sum"), out)


def test_bags_go_only_where_they_fit():
    for out in (np.empty((2, 3)), np.empty((2, 3, 4), np.float32), np.empty((2, 3, 6), np.float32)[:, :, ::2]):
        with pytest.raises(InvalidRequestError, match="out is"):
            pool_rows(ROWS, SPLITS, FirstN(3), out)


def test_the_largest_floats_get_the_gradients_and_the_first_of_equal_ones():
    rows = torch.tensor([[1.0, 5.0, 2.0], [1.0, 4.0, 3.0], [-1.0, -2.0, -3.0], [7.0, 7.0, 7.0]], requires_grad=True)
    pooling = make_pooling([np.array([2, 0, 1, 1])], [Combiner("max")], torch.from_numpy)
    vectors = pooling.forward(rows)
    assert vectors.tolist() == [[1, 5, 3], [0, 0, 0], [-1, -2, -3], [7, 7, 7]]
    grads = torch.arange(1.0, 13.0).view(4, 3)
    assert pooling.backward(grads).tolist() == [[1, 2, 0], [0, 0, 3], [7, 8, 9], [10, 11, 12]]


def test_rows_are_weighted_before_the_largest_is_taken():
    rows, splits = np.array([[1, -1], [2, -2], [3, 3]], np.float32), np.array([0, 2, 3])
    weights = np.array([3, 1, -2], np.float32)
    pooling = make_pooling([np.diff(splits)], [Combiner("max")], torch.from_numpy, [weights])
    want = pool_rows(rows * weights[:, None], splits, Combiner("max"))
    np.testing.assert_array_equal(pooling.forward(torch.from_numpy(rows)), want)
    assert want.tolist() == [[3, -2], [-6, -6]]
    assert pooling.backward(torch.ones(2, 2)).tolist() == [[3, 0], [0, 1], [-2, -2]]


@given(lengths=st.lists(st.integers(0, 4), max_size=6), dim=st.integers(1, 40), seed=st.integers(0, 9))
def test_gradients_of_the_largest_are_those_of_a_loop(lengths, dim, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (sum(lengths), dim)).astype(np.float32)  # many are equal
    grads = rng.normal(size=(len(lengths), dim)).astype(np.float32)
    pooling = make_pooling([np.array(lengths, np.int64)], [Combiner("max")], torch.from_numpy)
    vectors = pooling.forward(torch.from_numpy(rows)).numpy()
    splits = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    np.testing.assert_array_equal(vectors, pool_rows(rows, splits, Combiner("max")))
    want = np.zeros_like(rows)
    for bag, (start, stop) in enumerate(pairwise(splits.tolist())):
        for d in range(dim if stop > start else 0):
            want[start + int(rows[start:stop, d].argmax()), d] = grads[bag, d]
    np.testing.assert_array_equal(pooling.backward(torch.from_numpy(grads)).numpy(), want)


def test_layouts_do_not_take_the_largest():
    with pytest.raises(InvalidRequestError, match="not by max"):
        FeatureConfig(table="t", slice_dims=(1,), combiner=Combiner("max"))

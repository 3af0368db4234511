"""Bags pooled into places of a tensor, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.ops.pool import MEAN, SQRTN, SUM, pool_first_rows, pool_rows

_LENGTHS = [1, 0, 3, 2, 0, 1, 5]


@pytest.fixture(params=[1, 17, 40])
def rows(request):
    return np.random.default_rng(0).normal(size=(sum(_LENGTHS), request.param)).astype(np.float32)


_SPLITS = np.concatenate(([0], np.cumsum(_LENGTHS)))


def _bags(rows):
    return np.split(rows, _SPLITS[1:-1])


@pytest.mark.parametrize(
    ("combiner", "divisor"), [(SUM, lambda n: 1), (MEAN, lambda n: max(n, 1)), (SQRTN, lambda n: max(n, 1) ** 0.5)]
)
def test_bags_become_vectors_that_may_lie_apart(rows, combiner, divisor):
    out = np.full((len(_LENGTHS), 3, rows.shape[1]), 9, np.float32)
    pool_rows(rows, _SPLITS, combiner, out[:, 1])
    expected = [bag.sum(0) / divisor(len(bag)) for bag in _bags(rows)]
    np.testing.assert_allclose(out[:, 1], expected, rtol=1e-5, atol=1e-6)
    assert (out[:, ::2] == 9).all()


def test_first_rows_stand_side_by_side(rows):
    out = np.full((len(_LENGTHS), 5, rows.shape[1]), 9, np.float32)
    pool_first_rows(rows, _SPLITS, out)
    for bag, found in zip(_bags(rows), out, strict=True):
        np.testing.assert_array_equal(found[: len(bag)], bag)
        assert not found[len(bag) :].any()


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
        pool_rows(rows, splits, SUM, out)


def test_bags_go_only_where_they_fit():
    for out in (np.empty((2, 3)), np.empty((2, 3, 4), np.float32), np.empty((2, 3, 6), np.float32)[:, :, ::2]):
        with pytest.raises(InvalidRequestError, match="out is"):
            pool_first_rows(ROWS, SPLITS, out)

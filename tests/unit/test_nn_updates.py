"""Clipping of a step's gradients, and decay, where rows are in a cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.nn_fakes import FakeClient
from trilith.errors import InvalidRequestError
from trilith.features import ClipType, UserEmbeddingCheck
from trilith.nn import ClippedBackward, EmbeddingCollection, Feature


def make(*, table="t", **options):
    """One dense scalar of 1 and a row of ones."""
    client = FakeClient({table: 4}, initial=1.0)
    client._row(table, 3)
    collection = EmbeddingCollection(client, {"f": Feature(client.table(table), "sum")})
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    return client, collection, head, ClippedBackward(collection, head, **options)


def step(collection, head, backward, ids=((3,),)):
    rows = collection({"f": np.array(ids, np.int64)})["f"]
    backward(rows[:, :3].sum() + head.weight.sum())


def test_one_norm_over_dense_and_rows():
    client, collection, head, backward = make(clip_norm=1.0)
    step(collection, head, backward)
    assert head.weight.grad.tolist() == [[0.5]]  # the norm of (1, 1, 1, 1) is 2
    assert client.rows["t", 3].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert client.calls.count("apply_gradients") == 1
    assert backward.update.global_step == 1


def test_below_the_bound_nothing_changes():
    client, collection, head, backward = make(clip_norm=2.0)
    step(collection, head, backward)
    assert head.weight.grad.tolist() == [[1.0]]
    assert client.rows["t", 3].tolist() == [0, 0, 0, 1]


def test_decay_comes_after_clipping():
    _, collection, head, backward = make(clip_norm=1.0, dense_weight_decay=0.25)
    step(collection, head, backward)
    assert head.weight.grad.tolist() == [[0.75]]


def test_values_are_clipped_by_themselves():
    client, collection, head, backward = make(clip_norm=0.25, clip_type=ClipType.VALUE)
    step(collection, head, backward, ids=((3, 3),))
    assert head.weight.grad.tolist() == [[0.25]]
    assert client.rows["t", 3].tolist() == [0.5, 0.5, 0.5, 1.0]  # once for each place


def test_rows_warm_up():
    client, collection, head, backward = make(clip_norm=10.0, sparse_clip_norm=1.0, sparse_norm_warmup_steps=2)
    step(collection, head, backward)
    assert client.rows["t", 3].tolist() == [1, 1, 1, 1]
    step(collection, head, backward)
    assert client.rows["t", 3][0] < 1


def test_gradients_cannot_be_held_twice():
    _, collection, _, _ = make()
    with collection.exchange.hold(), pytest.raises(InvalidRequestError, match="already"), collection.accumulate():
        pass


def test_nothing_is_sent_after_an_error():
    client, collection, head, backward = make(clip_norm=1.0)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("broken")

    rows = collection({"f": np.array([[3]])})["f"]
    with pytest.raises(RuntimeError, match="broken"):
        backward(rows.sum() + Broken.apply(head.weight).sum())
    assert "apply_gradients" not in client.calls
    step(collection, head, backward)
    assert client.calls.count("apply_gradients") == 1


def test_dense_means_and_user_embeddings_are_checked_on_the_way_back():
    check = UserEmbeddingCheck(features=["user"], threshold=2.0)
    client, collection, head, backward = make(
        table="user", clip_norm=None, dense_reduce_mean=True, embedding_check=check
    )
    for scale, left in ((1.0, [1, 1, 1, 1]), (3.0, [0, 0, 0, 1])):
        head.zero_grad()
        rows = collection({"f": np.array([[3]], np.int64)})["f"]
        backward(rows[:, :3].sum() + head.weight.sum(), batch_size=4, features={"user": np.array([[scale]])})
        assert head.weight.grad.tolist() == [[0.25]]
        assert client.rows["user", 3].tolist() == left

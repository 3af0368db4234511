"""The reference models against their formulas, the local twin, dense parameters, and AUC."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.unit.nn_fakes import FakeClient
from trilith.errors import InvalidRequestError
from trilith.nn import (
    FFM,
    AllReduced,
    DeepFM,
    DenseOnPs,
    EmbeddingCollection,
    Feature,
    auc,
)
from trilith.nn.reduction import FUSIONS, average_gradients
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.local import LocalEmbeddings


def naive_auc(labels, scores):
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, n in itertools.product(scores[labels > 0.5], scores[labels <= 0.5])
    ]
    return sum(pairs) / len(pairs) if pairs else 0.5


@given(pairs=st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), max_size=30))
def test_auc_counts_pairs_in_order(pairs):
    labels = np.array([label for label, _ in pairs], np.float32)
    scores = np.array([score for _, score in pairs], np.float32)
    assert auc(labels, scores) == pytest.approx(naive_auc(labels, scores))


def test_auc_refuses_what_it_cannot_order():
    with pytest.raises(InvalidRequestError, match="2 labels but 1"):
        auc([0, 1], [0.5])
    with pytest.raises(InvalidRequestError, match="NaN"):
        auc([0, 1], [0.5, float("nan")])
    with pytest.raises(InvalidRequestError, match="a label is NaN"):
        auc([0, float("nan")], [0.5, 0.6])
    with pytest.raises(InvalidRequestError, match="takes labels first"):
        auc([0.2, 0.7, 0.4], [0, 1, 1])
    assert auc([0.0, 1.0], [1, 0]) == 0.0  # predictions may be 0 or 1


def test_ffm_is_the_sum_over_pairs_of_fields():
    model = FFM(fields=4, dim=3)
    rows = torch.randn(5, 4, model.row_dim, dtype=torch.float64)
    want = []
    for sample in rows:
        logit = sample[:, 0].sum()
        for i in range(4):
            for j in range(i + 1, 4):
                left = sample[i, 1 + 3 * j : 4 + 3 * j]
                logit = logit + left @ sample[j, 1 + 3 * i : 4 + 3 * i]
        want.append(logit)
    torch.testing.assert_close(model(rows), torch.stack(want))


def test_deepfm_without_its_mlp_is_a_factorization_machine():
    model = DeepFM(fields=4, dim=3, hidden=(8,)).double()
    with torch.no_grad():
        for parameter in model.mlp[-1].parameters():
            parameter.zero_()
    rows = torch.randn(5, 4, model.row_dim, dtype=torch.float64)
    vectors = rows[:, :, 1:]
    pairs = sum((vectors[:, i] * vectors[:, j]).sum(1) for i in range(4) for j in range(i + 1, 4))
    torch.testing.assert_close(model(rows), rows[:, :, 0].sum(1) + pairs)


@pytest.mark.parametrize("make", [FFM, DeepFM])
def test_gradients_of_the_models_are_right(make):
    torch.manual_seed(3)
    model = make(3, 2).double()
    rows = torch.randn(2, 3, model.row_dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (rows,))


def clicks(samples: int = 40) -> ClickData:
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 3, samples)
    return ClickData(
        rng.integers(0, 2, samples).astype(np.float32),
        {
            "a": Ragged.of_singles(rng.integers(100, 105, samples)),
            "b": Ragged(
                rng.integers(200, 204, lengths.sum()).astype(np.uint64), np.cumsum([0, *lengths], dtype=np.int64)
            ),
        },
    )


@pytest.mark.parametrize("make", [FFM, DeepFM])
def test_the_same_model_learns_the_same_from_a_cluster_and_from_local_memory(make):
    """Plain gradient descent on both sides: after some steps every weight must agree."""
    torch.manual_seed(0)
    data, rate = clicks(), 0.1
    local_head, cluster_head = make(2, 2), make(2, 2)
    cluster_head.load_state_dict(local_head.state_dict())
    ids = np.concatenate(list(data.vocabulary().values()))
    rows = np.random.default_rng(0).uniform(-0.3, 0.3, (ids.size, local_head.row_dim)).astype(np.float32)
    local = LocalEmbeddings(data.vocabulary(), rows)
    client = FakeClient({"t": local_head.row_dim}, learning_rate=rate)
    client.rows |= {("t", int(one)): row.copy() for one, row in zip(ids, rows, strict=True)}
    cluster = EmbeddingCollection(client, {name: Feature(client.table("t")) for name in data.features})
    optimizer = torch.optim.SGD([*local.parameters(), *local_head.parameters()], rate)
    dense = DenseOnPs(client, cluster_head, None)
    encoded = local.encode(data)
    for mine, theirs in zip(encoded.batches(8), data.batches(8), strict=True):
        optimizer.zero_grad()
        dense.pull()
        for logits in (local_head(local(mine.features)), cluster_head(cluster.stacked(theirs.features))):
            nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(mine.labels)).backward()
        optimizer.step()
        dense.step()
    dense.pull()
    with torch.no_grad():
        here, there = local_head(local(encoded.features)), cluster_head(cluster.stacked(data.features))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(local_head.parameters(), cluster_head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def only(data: ClickData, name: str, ids: np.ndarray) -> ClickData:
    features = {
        other: Ragged.of_singles(ids) if other == name else Ragged.of_singles(np.zeros(ids.size, np.uint64))
        for other in data.features
    }
    return ClickData(np.zeros(ids.size, np.float32), features)


def test_an_id_outside_the_vocabulary_is_a_zero_row_that_never_learns():
    data = clicks()
    count = sum(ids.size for ids in data.vocabulary().values())
    local = LocalEmbeddings(data.vocabulary(), np.ones((count, 2), np.float32))
    strange = local.encode(only(data, "a", np.array([999], np.uint64)))
    assert strange.features["a"].values.tolist() == [0]
    out = local(strange.features)
    assert not out.any()
    out.sum().backward()
    assert not local.bag.weight.grad[0].any()


def test_dense_parameters_take_the_values_a_cluster_has():
    client = FakeClient({})
    first = nn.Linear(2, 1)
    DenseOnPs(client, first, None)
    second = nn.Linear(2, 1)
    dense = DenseOnPs(client, second, None, prefix="dense/")
    torch.testing.assert_close(first.weight, second.weight)
    dense.step()
    assert not client.calls
    second(torch.ones(1, 2)).sum().backward()
    dense.step(learning_rate=0.5)
    assert dense.pull() == 0
    torch.testing.assert_close(second.weight, first.weight - 0.5)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(InvalidRequestError, match="ReLU"):
        DenseOnPs(FakeClient({}), nn.ReLU(), None)


def test_all_reduced_parameters_need_a_process_group():
    module = nn.Linear(1, 1)
    with pytest.raises(InvalidRequestError, match="init_process_group"):
        AllReduced(FakeClient({}), module, torch.optim.SGD(module.parameters(), 0.1), stored_as=None)


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_all_reduced_parameters_step_here_and_are_stored_in_the_cluster(process_group):
    client = FakeClient({})
    module = nn.Linear(2, 1)
    dense = AllReduced(client, module, torch.optim.SGD(module.parameters(), 0.1), stored_as=None)
    before = module.weight.detach().clone()
    dense.pull()
    module(torch.ones(1, 2)).sum().backward()
    dense.step(learning_rate=0.5)
    torch.testing.assert_close(module.weight.detach(), before - 0.5)
    np.testing.assert_array_equal(client.variables["dense/weight"], before.numpy())
    dense.publish()
    np.testing.assert_array_equal(client.variables["dense/weight"], module.weight.detach().numpy())


def test_a_parameter_that_no_worker_has_a_gradient_for_stays_as_it_is(process_group):
    module = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    dense = AllReduced(FakeClient({}), module, optimizer, stored_as=None)
    for used in (module, module[:1]):
        before = [each.weight.item() for each in module]
        sum(each(torch.ones(1, 1)).sum() for each in used).backward()
        dense.step(scale=0.5)
    assert module[1].weight.item() == before[1]
    np.testing.assert_allclose(module[0].weight.item(), before[0] - 0.1 * (0.9 * 0.5 + 0.5), rtol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("float16", [False, True])
def test_gradients_are_averaged_whatever_way_they_travel(process_group, fusion, float16):
    given = [torch.arange(5.0), None, torch.full((2, 3), 0.1), torch.zeros(0), *[torch.ones(1)] * 1100]
    found = average_gradients(given, scale=0.5, fusion=fusion, float16=float16)
    assert found[1] is None
    for ours, theirs in zip(found, given, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs * 0.5, rtol=1e-3 if float16 else 0, atol=0)
    with pytest.raises(InvalidRequestError, match="'two' is none of"):
        average_gradients(given, fusion="two")

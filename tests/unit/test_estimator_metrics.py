"""Metrics against their definitions written out, in parts, merged, and over ranks."""

from __future__ import annotations

import math
import multiprocessing
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from trilith.errors import InvalidRequestError
from trilith.estimator.metrics import (
    Auc,
    Calibration,
    LogLoss,
    Mean,
    Mse,
    direction,
    merge_over_ranks,
    pack,
    per_head,
    results,
    unpack,
)

METRICS = {"auc": Auc(), "logloss": LogLoss(), "mse": Mse(), "calibration": Calibration(), "mean": Mean()}


# ---- the definitions, as scikit-learn's documentation has them, in plain loops -------------------------------------


def naive_auc(predictions, labels, weights):
    above = pairs = 0.0
    for p, y, w in zip(predictions, labels, weights, strict=True):
        for q, z, v in zip(predictions, labels, weights, strict=True):
            if y > 0.5 >= z:
                pairs += w * v
                above += w * v * (1.0 if p > q else 0.5 if p == q else 0.0)
    return above / pairs if pairs else math.nan


def naive_log_loss(predictions, labels, weights):
    # sklearn.metrics.log_loss clips to [eps, 1 - eps], eps being that of the predictions' dtype.
    total = 0.0
    for p, y, w in zip(predictions, labels, weights, strict=True):
        p = min(max(float(p), 2.0**-23), 1 - 2.0**-23)
        total -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
    return total / sum(weights) if sum(weights) else math.nan


def naive_mse(predictions, labels, weights):
    total = sum(w * (float(p) - y) ** 2 for p, y, w in zip(predictions, labels, weights, strict=True))
    return total / sum(weights) if sum(weights) else math.nan


def naive_calibration(predictions, labels, weights):
    above = sum(w * float(p) for p, w in zip(predictions, weights, strict=True))
    below = sum(w * y for y, w in zip(labels, weights, strict=True))
    return above / below if below else math.nan


def naive_mean(predictions, labels, weights):
    return (
        sum(w * float(p) for p, w in zip(predictions, weights, strict=True)) / sum(weights)
        if sum(weights)
        else math.nan
    )


NAIVE = {
    "auc": naive_auc,
    "logloss": naive_log_loss,
    "mse": naive_mse,
    "calibration": naive_calibration,
    "mean": naive_mean,
}

PROBABILITIES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)
SAMPLES = st.lists(
    st.tuples(PROBABILITIES, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.booleans()),
    max_size=40,
)


def columns(samples):
    predictions, labels, weights, mask = zip(*samples, strict=True) if samples else ((), (), (), ())
    return np.array(predictions, np.float32), np.array(labels), np.array(weights), np.array(mask, np.bool_)


@pytest.mark.parametrize("name", METRICS)
@given(samples=SAMPLES, cut=st.integers(0, 40))
def test_a_metric_is_its_definition_in_parts_and_merged(name, samples, cut):
    predictions, labels, weights, mask = columns(samples)
    wanted = NAIVE[name](predictions[mask], labels[mask], weights[mask])
    whole, left, right = METRICS[name].fresh(), METRICS[name].fresh(), METRICS[name].fresh()
    whole.add(predictions, labels, weights, mask)
    left.add(predictions[:cut], labels[:cut], weights[:cut], mask[:cut])
    right.add(predictions[cut:], labels[cut:], weights[cut:], mask[cut:])
    left.merge(right.state())
    for found in (whole, left):
        np.testing.assert_allclose(found.result(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_known_values(name):
    # From scikit-learn: roc_auc_score, log_loss, mean_squared_error.
    predictions, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    found = METRICS[name].fresh()
    found.add(predictions, labels)
    wanted = {"auc": 0.75, "logloss": 0.472287978, "mse": 0.15812500, "calibration": 0.825, "mean": 0.4125}
    assert found.result() == pytest.approx(wanted[name], rel=1e-7)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_counted_is_nan_and_a_fresh_one_shares_nothing(name):
    used = METRICS[name].fresh()
    used.add([0.5, 0.25], [1, 0])
    assert math.isnan(used.fresh().result())
    assert not math.isnan(used.result())
    used.reset()
    assert math.isnan(used.result())


@pytest.mark.parametrize("name", METRICS)
def test_samples_without_a_label_do_not_count(name):
    with_gaps, without = METRICS[name].fresh(), METRICS[name].fresh()
    with_gaps.add([0.5, 0.9, 0.25, 0.7], [1, math.nan, 0, np.finfo(np.float32).min])
    without.add([0.5, 0.25], [1, 0])
    assert with_gaps.result() == without.result()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_count_as_arrays_do(name, dtype):
    tensors, arrays = METRICS[name].fresh(), METRICS[name].fresh()
    predictions = torch.tensor([[0.5], [0.25], [0.75]], dtype=dtype, requires_grad=True)
    tensors.add(predictions, torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 0.0]))
    arrays.add([0.5, 0.25, 0.75], [1, 0, 1], [1, 2, 0])
    assert tensors.result() == pytest.approx(arrays.result(), rel=1e-6)


@pytest.mark.parametrize("name", ["mse", "logloss", "calibration", "mean", "auc"])
def test_a_prediction_that_is_nan_makes_the_result_nan(name):
    found = METRICS[name].fresh()
    found.add([0.5, math.nan], [1, 0])
    assert math.isnan(found.result())
    another = METRICS[name].fresh()
    another.add([0.5, 0.3], [1, 0])
    another.merge(found.state())
    assert math.isnan(another.result())


def test_what_is_undefined_is_nan():
    one_class = Auc()
    one_class.add([0.5, 0.3], [1, 1])
    assert math.isnan(one_class.result())
    no_positive = Calibration()
    no_positive.add([0.5], [0])
    assert math.isnan(no_positive.result())


@pytest.mark.parametrize(
    ("name", "given_", "said"),
    [
        ("mse", ([0.5], [1, 0]), "1 predictions, and of label 2"),
        ("mse", ([[0.5, 0.5]], [1]), "one metric for each head"),
        ("mse", ([0.5],), "Mse compares predictions with labels"),
        ("mse", ([0.5], [1], [-1]), "negative or not finite"),
        ("mse", ([0.5], [1], [math.inf]), "negative or not finite"),
        ("mse", (["a"], [1]), "prediction is of"),
        ("logloss", ([1.5], [1]), "prediction 1.5 is outside 0..1; predictions must be probabilities"),
        ("logloss", ([0.5], [2]), "label 2 is outside 0..1"),
    ],
)
def test_what_cannot_be_counted_is_refused(name, given_, said):
    with pytest.raises(InvalidRequestError, match=said):
        METRICS[name].fresh().add(*given_)


# ---- AUC in bins ---------------------------------------------------------------------------------------------------


@given(
    samples=st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.booleans(), st.sampled_from([0.5, 1.0, 2.0])), max_size=60
    ),
    limit=st.integers(0, 60),
    cut=st.integers(0, 60),
)
def test_an_auc_in_bins_is_within_its_bound_of_the_exact_one(samples, limit, cut):
    predictions = np.array([each[0] for each in samples], np.float32)
    labels, weights = np.array([each[1] for each in samples], float), np.array([each[2] for each in samples])
    exact, left, right = Auc(limit=1000), Auc(limit=limit), Auc(limit=limit)
    exact.add(predictions, labels, weights)
    left.add(predictions[:cut], labels[:cut], weights[:cut])
    right.add(predictions[cut:], labels[cut:], weights[cut:])
    left.merge(right.state())
    assert exact.exact
    assert left.exact == (limit > 0 and len(samples) <= limit)
    if math.isnan(exact.result()):
        assert math.isnan(left.result())
    else:
        assert abs(left.result() - exact.result()) <= left.error_bound + 1e-12
        assert left.error_bound == 0 or not left.exact


def test_a_long_evaluation_keeps_little_and_errs_little():
    generator = np.random.default_rng(0)
    logits = generator.normal(-3, 1.5, 200_000)
    predictions = (1 / (1 + np.exp(-logits))).astype(np.float32)
    labels = generator.random(predictions.size) < predictions
    exact, binned = Auc(limit=1 << 20), Auc(limit=1000)
    for piece in np.array_split(np.arange(predictions.size), 50):
        exact.add(predictions[piece], labels[piece])
        binned.add(predictions[piece], labels[piece])
    assert (exact.exact, binned.exact) == (True, False)
    assert abs(exact.result() - binned.result()) <= binned.error_bound < 1e-3
    assert abs(exact.result() - binned.result()) < 1e-5
    assert sum(array.nbytes for array in binned.state().values()) < 1 << 18


def test_float64_predictions_that_differ_only_there_are_no_ties():
    found = Auc()
    found.add(np.array([0.5, 0.5 + 1e-12]), [0, 1])
    assert found.result() == 1.0


# ---- several -------------------------------------------------------------------------------------------------------


def test_every_head_has_its_own():
    found = per_head({"auc": Auc(), "mse": Mse()}, ["click", "buy"])
    found["click/mse"].add([0.5], [1])
    assert list(found) == ["click/auc", "click/mse", "buy/auc", "buy/mse"]
    figures = results(found)
    assert figures["click/mse"] == 0.25
    assert math.isnan(figures["buy/mse"])


@pytest.mark.parametrize(
    ("name", "wanted"), [("valid/click/auc", "max"), ("loss", "min"), ("a/logloss", "min"), ("rmse", "min")]
)
def test_a_name_says_what_is_better(name, wanted):
    assert direction(name) == wanted


def test_a_name_that_says_nothing_is_refused():
    with pytest.raises(InvalidRequestError, match="give mode"):
        direction("click/calibration")


@given(samples=SAMPLES, limit=st.sampled_from([0, 3, 100]))
def test_packed_states_come_back(samples, limit):
    predictions, labels, weights, mask = columns(samples)
    metrics = {"a/auc": Auc(limit=limit), "b": Mse()}
    for each in metrics.values():
        each.add(predictions, labels, weights, mask)
    states = unpack(pack(metrics))
    again = {"a/auc": Auc(limit=limit), "b": Mse()}
    for name, state in states.items():
        again[name].merge(state)
    np.testing.assert_equal(results(again), results(metrics))


@pytest.mark.parametrize("body", [b"", b"\x05", b"\xff" * 40, (2).to_bytes(8, "little") + b"[1"])
def test_forged_packs_are_refused(body):
    with pytest.raises(InvalidRequestError, match="no packed metrics"):
        unpack(np.frombuffer(body, np.uint8))
    with pytest.raises(InvalidRequestError, match="another metric"):
        Auc().merge(Mse().state())


def _rank(rank: int, port: int, results_to: multiprocessing.Queue) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics = {"auc": Auc(limit=3 * rank), "mse": Mse()}
    for each in metrics.values():
        each.add([[0.1, 0.4], [0.35, 0.8, 0.3]][rank], [[0, 0], [1, 1, 0]][rank])
    results_to.put((rank, results(merge_over_ranks(metrics))))
    distributed.destroy_process_group()


def test_all_ranks_have_the_figures_of_all():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for each in processes:
        each.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for each in processes:
        each.join(timeout=60)
    whole = {"auc": Auc(), "mse": Mse()}
    for each in whole.values():
        each.add([0.1, 0.4, 0.35, 0.8, 0.3], [0, 0, 1, 1, 0])
    assert found[0] == found[1]
    assert found[0] == pytest.approx(results(whole))
    assert merge_over_ranks(whole) == whole

"""Optimizer, codec and initializer kernels against their naive twins, through the table that runs them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trilith
from tests import naive_engine as naive
from trilith.ops.memory import address_of
from trilith.tables import Ftrl, GroupAdagrad, GroupFtrl, RandomUniform
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.kernels.optimizers import KINDS
from trilith_services.ps.engine.kernels.values import all_finite, widen_halves
from trilith_services.ps.engine.table import Table

CASES = [
    ("sgd", {}),
    ("adagrad", {"initial_accumulator_value": 0.3, "weight_decay_factor": 0.1}),
    ("dynamic_wd_adagrad", {"weight_decay_factor": 0.1}),
    ("dynamic_wd_adagrad", {"weight_decay_factor": 0.1, "decouple_weight_decay": True}),
    ("ftrl", {"beta": 0.5, "l1_regularization_strength": 0.2, "l2_regularization_strength": 0.3}),
    ("group_ftrl", {"beta": 1.0, "l1_regularization_strength": 0.4, "initial_accumulator_value": 0.1}),
    ("adadelta", {"weight_decay_factor": 0.05}),
    ("adam", {"weight_decay_factor": 0.05}),
    ("adam", {"use_nesterov": True, "beta1": 0.8}),
    ("amsgrad", {"weight_decay_factor": 0.05}),
    ("amsgrad", {"use_nesterov": True}),
    ("momentum", {"weight_decay_factor": 0.05}),
    ("momentum", {"use_nesterov": True}),
    ("moving_average", {"momentum": 0.7}),
    ("rmsprop", {"weight_decay_factor": 0.05, "learning_rate": 0.02}),
    ("rmspropv2", {"weight_decay_factor": 0.05}),
    ("group_adagrad", {"l2_regularization_strength": 0.2, "beta": 0.5, "weight_decay_factor": 0.05}),
]


def make_table(dim: int = 4, optimizer: str = "sgd", *, seed: int = 3, **fields: float) -> Table:
    config = ps_pb2.TableConfig(name="t", seed=seed)
    config.hash_table.cuckoo.SetInParent()
    segment = config.hash_table.entry_config.segments.add(dim_size=dim)
    segment.init_config.random_uniform.SetInParent()
    getattr(segment.opt_config, optimizer).SetInParent()
    for name, value in fields.items():
        setattr(getattr(segment.opt_config, optimizer), name, value)
    return Table(config)


def parameters(table: Table, kind: str) -> dict[str, float]:
    message = getattr(table.config.hash_table.entry_config.segments[0].opt_config, kind)
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def test_every_optimizer_has_a_case() -> None:
    assert {kind for kind, _ in CASES} | {"batch_softmax"} == set(KINDS)


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=lambda value: value if isinstance(value, str) else None)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), dim=st.sampled_from([1, 3, 8, 16, 17, 33]))
def test_optimizer_steps_match_the_formula(kind: str, fields: dict[str, float], seed: int, dim: int) -> None:
    table = make_table(dim, kind, **fields)
    rng = np.random.default_rng(seed)
    ids = np.array([1, 2**64 - 1, 0], np.uint64)
    table.assign(ids, rng.normal(size=(3, dim)).astype(np.float32))
    p = parameters(table, kind)
    weights = [row.astype(np.float64) for row in table.lookup(ids)]
    states = [naive.initial_state(kind, p, dim) for _ in ids]
    for at in range(1, 4):
        grads = rng.normal(size=(3, dim)).astype(np.float32)
        table.apply_gradients(ids, grads, learning_rates=[0.1], global_step=at, request_time=at)
        weights = [naive.step(kind, p, w, s, g, 0.1, at) for w, s, g in zip(weights, states, grads, strict=True)]
    np.testing.assert_allclose(table.lookup(ids), weights, rtol=2e-3, atol=2e-4)
    _, rows = table.export_rows(ids)
    for i, state in enumerate(states):
        want = np.concatenate([np.ravel(state[name]) for name, _ in table.layout.segments[0].slots] or [[]])
        np.testing.assert_allclose(rows.state[i], want, rtol=2e-3, atol=2e-4)
    assert rows.last_update.tolist() == [3, 3, 3]


@pytest.mark.parametrize("optimizer", [Ftrl(), GroupFtrl(), GroupAdagrad()], ids=lambda each: each.kind)
def test_a_rate_of_0_is_not_divided_by(optimizer) -> None:
    with trilith.connect("local://", threads=1) as client:
        table = client.table("t", dim=2, optimizer=optimizer, initializer=RandomUniform(-1, 1), learning_rate=0.0)
        table.assign_add([1], [[0.0, 0.0]])
        before = table.lookup_entries([1])
        for gradient in ([1.0, -2.0], [0.0, 0.0]):
            table.apply_gradients([1], [gradient])
        assert np.isfinite(table.lookup([1])).all()
        entries = [trilith.describe_entry(each) for each in (*before, *table.lookup_entries([1]))]
        assert {**entries[0], "last_update_unix_s": 0} == {**entries[1], "last_update_unix_s": 0}


def test_batch_softmax_estimates_the_gap_between_occurrences() -> None:
    table = make_table(1, "batch_softmax")
    ids = np.array([9], np.uint64)
    table.assign(ids, np.zeros((1, 1), np.float32))
    weight, state = np.zeros(1), naive.initial_state("batch_softmax", {}, 1)
    for at in range(0, 3000, 5):
        table.apply_gradients(ids, np.ones((1, 1), np.float32), learning_rates=[0.1], global_step=at)
        weight = naive.step("batch_softmax", {}, weight, state, np.ones(1), 0.1, at)
    np.testing.assert_allclose(table.lookup(ids)[0], weight, rtol=1e-4)
    assert abs(table.lookup(ids)[0, 0] - 5) < 0.1


@given(seed=st.integers(0, 2**63 - 1), key=st.integers(0, 2**64 - 1))
def test_a_new_row_is_a_pure_function_of_seed_id_and_column(seed: int, key: int) -> None:
    table = make_table(5, seed=seed)
    ids = np.array([key], np.uint64)
    table.reinitialize(ids, request_time=1)
    got = table.lookup(ids)[0]
    np.testing.assert_allclose(got, naive.uniform_row(seed, key, 5, -0.05, 0.05), rtol=1e-5, atol=1e-8)
    assert (got >= np.float32(-0.05)).all()
    assert (got < np.float32(0.05)).all()


def test_stochastic_rounding_keeps_the_mean_and_only_makes_float16_values() -> None:
    config = make_table(8).config
    config.hash_table.entry_config.segments[0].opt_config.stochastic_rounding_float16 = True
    table = Table(config)
    ids = np.arange(4000, dtype=np.uint64)
    table.assign(ids, np.full((4000, 8), 0.1, np.float32))
    table.apply_gradients(ids, np.zeros((4000, 8), np.float32), learning_rates=[1.0], global_step=3)
    rows = table.lookup(ids)
    assert set(np.unique(rows)) == {np.float32(np.float16(0.09997559)), np.float32(np.float16(0.10003662))}
    assert abs(rows.mean() - 0.1) < 1e-6
    # Exact values stay, and so do signs, subnormals and the largest half.
    table.assign(ids[:4], np.repeat(np.float32([[0.5], [-(2.0**-24)], [65504.0], [-0.25]]), 8, axis=1))
    table.apply_gradients(ids[:4], np.zeros((4, 8), np.float32), learning_rates=[1.0], global_step=3)
    assert table.lookup(ids[:4])[:, 0].tolist() == [0.5, -(2.0**-24), 65504.0, -0.25]


def serving(codec: str, dim: int = 6, **fields: float) -> Table:
    config = ps_pb2.TableConfig(name="s")
    config.hash_table.cuckoo.SetInParent()
    entry = config.hash_table.entry_config
    entry.entry_type = hash_table_pb2.EntryConfig.SERVING
    segment = entry.segments.add(dim_size=dim)
    getattr(segment.comp_config, codec).SetInParent()
    for name, value in fields.items():
        setattr(getattr(segment.comp_config, codec), name, value)
    return Table(config)


@given(values=st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6))
@settings(max_examples=50)
def test_serving_rows_decode_to_what_their_codec_keeps(values: list[float]) -> None:
    ids, row = np.array([4], np.uint64), np.float32([values])
    wants = {
        "fp32": row,
        "fp16": row.astype(np.float16).astype(np.float32),
        "fixed_r8": np.clip(np.trunc((row + np.copysign(1 / 256, row)) * 128), -128, 127) / 128,
        "one_bit": np.where(0.1 * np.tanh(row) > 0, 0.1, -0.1),
    }
    for codec, want in wants.items():
        table = serving(codec)
        table.assign(ids, row)
        np.testing.assert_allclose(table.lookup(ids), want, rtol=1e-6, atol=1e-7, err_msg=codec)


def test_adding_to_a_serving_row_decodes_adds_and_encodes() -> None:
    table = serving("fp16")
    ids = np.array([1], np.uint64)
    for _ in range(2):
        table.assign_add(ids, np.full((1, 6), 0.25, np.float32))
    assert table.lookup(ids).tolist() == [[0.5] * 6]


@given(st.lists(st.floats(width=16), max_size=9))
def test_halves_are_widened_exactly_and_checked_for_finiteness(values: list[float]) -> None:
    halves = np.array(values, np.float16)
    wide = np.empty(len(halves), np.float32)
    widen_halves(address_of(halves), address_of(wide), len(halves))
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    assert all_finite(address_of(halves), len(halves), 2) == np.isfinite(halves).all()
    assert all_finite(address_of(wide), len(wide), 4) == np.isfinite(wide).all()

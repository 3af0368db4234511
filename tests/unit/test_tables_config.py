"""Segments, config identity, default rates and fusing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.tables import (
    Adagrad,
    Adam,
    BatchSoftmax,
    CuckooHashTable,
    Fp16,
    HashTableConfig,
    MovingAverage,
    PolynomialDecay,
    Rmsprop,
    Segment,
    Sgd,
    StochasticRoundingFloat16,
    Zeros,
    default_learning_rate,
    fuse_adjacent,
)
from trilith_proto.hash_table_pb2 import EmbeddingHashTableConfig, EntryConfig, OptimizerConfig


def sgd(dim):
    return Segment(dim, Zeros(), Sgd()).as_proto()


def test_a_segment_takes_wrappers_and_messages_alike():
    made = Segment(3, Zeros(), Sgd(), Fp16())
    ready = Segment(3, Zeros().as_proto(), Sgd().as_proto(), Fp16().as_proto())
    assert made.as_proto().SerializeToString() == bytes.fromhex("0a020a00 12071205156f12833a 1a021200 3803")
    assert ready.as_proto() == made.as_proto()


def test_a_segment_without_compressor_writes_none():
    assert sgd(3).SerializeToString() == bytes.fromhex("0a020a00 12071205156f12833a 3803")


@pytest.mark.parametrize("dim", [0, -1, 4097, 1.5, "8"])
def test_a_segments_width_is_bounded(dim):
    with pytest.raises(InvalidRequestError, match="segment: dim=.* is outside 1..4096"):
        Segment(dim, Zeros(), Sgd())


def test_a_segment_refuses_a_part_in_the_wrong_place():
    with pytest.raises(InvalidRequestError, match="is neither a InitializerConfig"):
        Segment(3, Sgd(), Zeros())


def test_the_hash_table_writes_its_capacity_and_only_a_wanted_eviction():
    plain, evicting = EmbeddingHashTableConfig(), EmbeddingHashTableConfig()
    CuckooHashTable().mutate_table(plain)
    CuckooHashTable(initial_capacity=300, feature_evict_every_n_hours=24).mutate_table(evicting)
    assert plain.SerializeToString() == bytes.fromhex("1001 2a00")
    assert evicting.SerializeToString() == bytes.fromhex("10ac02 2a00 3801 4018")


@pytest.mark.parametrize("options", [{"initial_capacity": -1}, {"feature_evict_every_n_hours": -1}])
def test_the_hash_table_refuses_negative_options(options):
    with pytest.raises(InvalidRequestError, match="=-1 is outside 0"):
        CuckooHashTable(**options)


def instance(rates, capacity=1, names=None):
    return HashTableConfig(EmbeddingHashTableConfig(initial_capacity=capacity), rates, names)


def test_configs_are_one_when_bytes_and_rates_are():
    assert instance([0.1]) == instance([0.1])
    assert hash(instance([0.1])) == hash(instance([0.1]))
    assert instance([1]) == instance([1.0])
    assert instance([PolynomialDecay(0.01, 20, 0.05)]) == instance([PolynomialDecay(0.01, 20, 0.05)])
    assert instance([0.1]) != instance([0.2])
    assert instance([0.1]) != instance([0.1], capacity=2)
    assert instance([0.1]) != instance([PolynomialDecay(0.01, 20, 0.05)])
    assert instance([0.1]) != instance([0.1, 0.1])
    assert instance([0.1]) != str(instance([0.1]))


def test_anonymous_functions_never_match():
    assert instance([lambda: 0.1]) != instance([lambda: 0.1])


def test_extra_restore_names_are_copied_and_do_not_tell_configs_apart():
    names = ["old"]
    config = instance([0.1], names=names)
    names.append("later")
    assert config.extra_restore_names == ["old"]
    assert instance([0.1]).extra_restore_names == []
    assert config == instance([0.1])


def test_rates_are_called_with_the_models_step():
    config = instance([0.5, lambda: 0.25, PolynomialDecay(0.0, 10, 1.0)])
    got = config.call_learning_rate_fns(5)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([0.5, 0.25, 0.5], np.float32))
    assert config.call_learning_rate_fns_fewer_ops(5) == [0.5, 0.25, 0.5]


def test_a_config_without_rates_cannot_give_any():
    with pytest.raises(InvalidRequestError, match="no learning rates"):
        instance([]).call_learning_rate_fns()
    with pytest.raises(InvalidRequestError, match="no learning rates"):
        instance([]).call_learning_rate_fns_fewer_ops()


def test_a_computed_rate_vector_may_be_kept_on_the_config():
    config = instance([0.5])
    config.learning_rate_tensor = config.call_learning_rate_fns()
    np.testing.assert_array_equal(config.learning_rate_tensor, np.array([0.5], np.float32))


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (Adagrad(), float(np.float32(0.01))),
        (Adagrad(learning_rate=0.5), 0.5),
        (BatchSoftmax(), float(np.float32(0.1))),
        (Rmsprop(), float(np.float32(0.01))),
        (StochasticRoundingFloat16(Sgd(learning_rate=0.25)), 0.25),
        (MovingAverage(), 0.0),
        (Adagrad(learning_rate=0.5, warmup_steps=10), PolynomialDecay(0.0, 10, end_learning_rate=0.5)),
    ],
)
def test_the_default_rate_is_the_optimizers_reached_through_its_warmup(optimizer, rate):
    assert default_learning_rate(optimizer.as_proto()) == rate


def test_an_optimizer_without_a_rate_has_no_default():
    config = OptimizerConfig()
    with pytest.raises(InvalidRequestError, match="give the table one"):
        default_learning_rate(config)
    config.dc.SetInParent()
    with pytest.raises(InvalidRequestError, match="optimizer dc has no learning rate"):
        default_learning_rate(config)


def test_adjacent_segments_that_differ_in_width_alone_become_one():
    adam = Segment(2, Zeros(), Adam()).as_proto()
    fused, rates = fuse_adjacent([sgd(1), sgd(2), adam, sgd(4), sgd(5)], [0.1, 0.1, 0.1, 0.1, 0.2])
    assert [each.dim_size for each in fused] == [3, 2, 4, 5]
    assert rates == [0.1, 0.1, 0.1, 0.2]


def test_dims_inside_the_parts_do_not_keep_segments_apart():
    inner = sgd(1)
    inner.init_config.zeros.dim_size = 1
    inner.opt_config.sgd.dim_size = 1
    fused, _ = fuse_adjacent([inner, sgd(2)], [0.1, 0.1])
    assert [each.dim_size for each in fused] == [3]


def test_fusing_wants_one_rate_per_segment():
    with pytest.raises(InvalidRequestError, match="1 learning rates for 2 segments"):
        fuse_adjacent([sgd(1), sgd(2)], [0.1])


@given(
    st.lists(st.tuples(st.sampled_from(["sgd", "adam"]), st.integers(1, 9), st.sampled_from([0.1, 0.2])), max_size=12)
)
def test_fusing_keeps_every_float_its_optimizer_and_its_rate(rows):
    parts = {"sgd": Sgd(), "adam": Adam()}
    segments = [Segment(dim, Zeros(), parts[kind]).as_proto() for kind, dim, _ in rows]
    before = [EntryConfig.Segment.FromString(each.SerializeToString()) for each in segments]
    fused, rates = fuse_adjacent(segments, [rate for _, _, rate in rows])
    floats = [(kind, rate) for kind, dim, rate in rows for _ in range(dim)]
    pairs = [(each.opt_config.WhichOneof("type"), rate) for each, rate in zip(fused, rates, strict=True)]
    assert [pair for pair, each in zip(pairs, fused, strict=True) for _ in range(each.dim_size)] == floats
    assert all(one != other for one, other in pairwise(pairs))
    assert segments == before

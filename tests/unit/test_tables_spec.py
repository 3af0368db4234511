"""Table specs: the keywords, the messages they become, and every config that makes no table."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.tables import (
    Adagrad,
    BatchSoftmax,
    DynamicWdAdagrad,
    Fp16,
    MovingAverage,
    PolynomialDecay,
    RandomUniform,
    Segment,
    Sgd,
    TableSpec,
    Zeros,
    check_table_config,
    table_config,
)
from trilith.tables.spec import seed_of
from trilith_proto.hash_table_pb2 import EntryConfig
from trilith_proto.ps_pb2 import TableConfig


def proto(**changes) -> TableConfig:
    config = table_config("t", dim=2, optimizer=Sgd(), initializer=Zeros()).proto
    copy = TableConfig()
    copy.CopyFrom(config)
    for name, value in changes.items():
        setattr(copy, name, value)
    return copy


def test_a_plain_table_is_one_training_segment():
    spec = table_config(
        "user", dim=16, optimizer=Adagrad(learning_rate=0.5), initializer=RandomUniform(-0.5, 0.5), seed=7
    )
    assert (spec.name, spec.dim, spec.segments, spec.learning_rates) == ("user", 16, 1, (0.5,))
    assert spec.proto.hash_table.SerializeToString() == bytes.fromhex(
        # entry_config { segment { uniform { -0.5, 0.5 }, adagrad { 0.5, times 1, decay 0, warmup 0 }, 16 }, TRAINING }
        "0a26 0a22 0a0c 120a 15000000bf 1d0000003f 1210 0a0e 150000003f 2001 2d00000000 3000 3810 1001 1001 2a00"
    )
    assert spec.proto.seed == 7


def test_what_is_not_given_is_adagrad_over_a_small_uniform_draw():
    spec = table_config("user", dim=4)
    segment = spec.proto.hash_table.entry_config.segments[0]
    assert segment.opt_config == Adagrad(learning_rate=0.05).as_proto()
    assert segment.init_config == RandomUniform(-0.05, 0.05).as_proto()
    assert not segment.HasField("comp_config")
    np.testing.assert_array_equal(spec.rates_at(0), np.array([0.05], np.float32))


def test_a_serving_table_is_compressed_and_has_no_optimizer():
    segment = table_config("s", dim=4, entry_type="serving").proto.hash_table.entry_config.segments[0]
    assert segment.comp_config.HasField("fp32")
    assert not segment.HasField("opt_config")
    spec = table_config("s", dim=4, entry_type="serving", compressor=Fp16(), skip_zero_embedding=True)
    assert spec.proto.hash_table.entry_config.entry_type == EntryConfig.SERVING
    assert spec.proto.hash_table.skip_zero_embedding
    assert spec.learning_rates == (0.0,)


def test_every_keyword_arrives_in_the_message():
    got = table_config(
        "t",
        segments=[Segment(1, Zeros(), Sgd()), Segment(2, Zeros(), Adagrad(), learning_rate=0.25)],
        seed=2**64 - 1,
        ttl_days=0,
        slot_ttl_days={3: 30, 1: 10},
        evict_every_hours=2,
        occurrence_threshold=3,
        slot_occurrence_thresholds={2: 5},
        filter="probabilistic_equal",
        filter_capacity=1000,
        filter_splits=9,
        initial_capacity=500,
    )
    config = got.proto
    assert got.learning_rates == (float(np.float32(0.001)), 0.25)
    assert config.seed == 2**64 - 1
    expiry = config.hash_table.slot_expire_time_config
    assert expiry.HasField("default_expire_time")
    assert expiry.default_expire_time == 0
    assert [(each.slot, each.expire_time) for each in expiry.slot_expire_times] == [(1, 10), (3, 30)]
    assert config.hash_table.enable_feature_eviction
    assert config.hash_table.feature_evict_every_n_hours == 2
    assert config.hash_table.initial_capacity == 500
    thresholds = config.occurrence_thresholds
    assert thresholds.default_occurrence_threshold == 3
    assert [(each.slot, each.occurrence_threshold) for each in thresholds.slot_occurrence_thresholds] == [(2, 5)]
    assert (config.filter, config.filter_capacity, config.filter_splits) == (TableConfig.PROBABILISTIC_EQUAL, 1000, 9)


def test_a_threshold_alone_brings_the_sliding_filter():
    assert table_config("t", dim=1).proto.filter == TableConfig.NO_FILTER
    assert table_config("t", dim=1, occurrence_threshold=0).proto.filter == TableConfig.NO_FILTER
    assert table_config("t", dim=1, occurrence_threshold=1).proto.filter == TableConfig.SLIDING
    assert table_config("t", dim=1, slot_occurrence_thresholds={1: 2}).proto.filter == TableConfig.SLIDING
    assert table_config("t", dim=1, occurrence_threshold=1, filter="none").proto.filter == TableConfig.NO_FILTER


def test_a_threshold_that_no_id_can_pass_warns():
    with pytest.warns(UserWarning, match="occurrence threshold 16 is above 15") as caught:
        table_config("t", dim=1, occurrence_threshold=16)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="occurrence threshold 20 is above 15"):
        table_config("t", dim=1, slot_occurrence_thresholds={1: 20})


def test_a_threshold_that_can_be_passed_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table_config("t", dim=1, occurrence_threshold=15)
        table_config("t", dim=1, occurrence_threshold=100, filter="probabilistic")


def test_the_seed_depends_on_the_name_alone_and_is_the_same_in_every_process():
    program = "from trilith.tables.spec import seed_of; print(seed_of('user'))"
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240)
    assert int(other.stdout) == seed_of("user") == table_config("user", dim=1).proto.seed
    assert seed_of("user") != seed_of("item")


def test_equal_keywords_give_equal_bytes():
    one, other = (
        table_config("t", dim=3, slot_ttl_days=ttl).proto.SerializeToString() for ttl in ({1: 2, 3: 4}, {3: 4, 1: 2})
    )
    assert one == other


def test_rates_are_given_for_all_segments_or_for_each():
    segments = [Segment(1, Zeros(), Sgd()), Segment(2, Zeros(), MovingAverage())]
    schedule = PolynomialDecay(0.0, 10, 1.0)
    assert table_config("t", segments=segments).learning_rates == (float(np.float32(0.001)), 0.0)
    assert table_config("t", segments=segments, learning_rate=0.5).learning_rates == (0.5, 0.5)
    spec = table_config("t", segments=segments, learning_rate=[0.5, schedule])
    np.testing.assert_array_equal(spec.rates_at(5), np.array([0.5, 0.5], np.float32))
    with pytest.raises(InvalidRequestError, match="table 't': 1 learning rates for 2 segments"):
        table_config("t", segments=segments, learning_rate=[0.5])
    with pytest.raises(InvalidRequestError, match="for the table and for a segment"):
        table_config("t", segments=[Segment(1, Zeros(), Sgd(), learning_rate=0.1)], learning_rate=0.5)


def test_a_warmup_becomes_a_schedule():
    spec = table_config("t", dim=1, optimizer=Adagrad(learning_rate=1.0, warmup_steps=4))
    assert [spec.rates_at(step)[0] for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]


def test_a_spec_can_be_had_from_an_existing_tables_message():
    spec = table_config("t", dim=3, optimizer=Adagrad(learning_rate=0.5))
    again = TableSpec.from_proto(spec.proto)
    assert again == spec
    assert again.proto is not spec.proto


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "give either dim or segments, not neither"),
        ({"dim": 1, "segments": [Segment(1, Zeros(), Sgd())]}, "not both"),
        ({"segments": [Segment(1, Zeros(), Sgd())], "optimizer": Sgd()}, "belong into each segment"),
        ({"segments": []}, "no segments"),
        ({"segments": [Segment(1)]}, "segment 0: no init_config, which a training row needs"),
        ({"segments": [Segment(1, Zeros())]}, "segment 0: no opt_config"),
        (
            {"segments": [Segment(1, Zeros(), Sgd())], "entry_type": "serving"},
            "segment 0: no comp_config, which a serving",
        ),
        ({"segments": [Segment(4000, Zeros(), Sgd())] * 2}, "dim=8000 over all segments is outside 1..4096"),
        ({"dim": 0}, "table 't', segment: dim=0 is outside 1..4096"),
        ({"dim": 4097}, "dim=4097"),
        ({"dim": 2, "optimizer": BatchSoftmax()}, "one float per row, but dim=2"),
        (
            {"dim": 2, "optimizer": DynamicWdAdagrad(enable_dynamic_wd=True, flip_direction=True)},
            "enable_dynamic_wd=True, flip_direction=True",
        ),
        (
            {
                "dim": 2,
                "optimizer": DynamicWdAdagrad(
                    enable_dynamic_wd=False, flip_direction=False, dynamic_wd_temperature=2.0
                ),
            },
            "dynamic_wd_temperature=2 was never specified",
        ),
        ({"dim": 2, "learning_rate": -1.0}, r"learning_rate=-1\.0 is neither"),
        ({"dim": 2, "learning_rate": "fast"}, "learning_rate='fast' is neither"),
        ({"dim": 2, "filter": "sieve"}, "filter='sieve' is none of none, sliding, probabilistic, probabilistic_equal"),
        ({"dim": 2, "entry_type": "frozen"}, "entry_type='frozen' is none of training, serving"),
        ({"dim": 2, "seed": -1}, "seed=-1 is not a whole number in 0..18446744073709551615"),
        ({"dim": 2, "ttl_days": 1.5}, r"ttl_days=1\.5 is not a whole number"),
        ({"dim": 2, "slot_ttl_days": {32768: 1}}, "slot_expire_times: slot=32768 is outside 0..32767"),
        ({"dim": 2, "slot_occurrence_thresholds": {2: -1}}, "slot_occurrence_thresholds=-1"),
        ({"dim": 2, "evict_every_hours": -1}, "feature_evict_every_n_hours=-1 is outside 0"),
        ({"dim": 2, "filter_capacity": 2**40}, "filter_capacity=1099511627776 is above"),
        ({"dim": 2, "filter_splits": 5000}, "filter_splits=5000 is above"),
    ],
)
def test_keywords_that_make_no_table_are_refused(keywords, message):
    with pytest.raises(InvalidRequestError, match=message):
        table_config("t", **keywords)


@pytest.mark.parametrize("name", ["", " ", "a b", "/etc", "../up", "a/../b", "a//b", "-x", "n" * 201, "é", "a\n"])
def test_a_name_that_would_not_do_as_a_file_name_is_refused(name):
    with pytest.raises(InvalidRequestError, match="table name"):
        table_config(name, dim=1)


@pytest.mark.parametrize("name", ["user", "e21904dd414d1780e5fc904866dc69c2", "a/b:c.d-e_f", "0"])
def test_names_of_the_reference_system_are_accepted(name):
    assert table_config(name, dim=1).name == name


def test_dynamic_weight_decay_is_a_table_without_its_unpublished_options():
    optimizer = DynamicWdAdagrad(weight_decay_factor=0.5, enable_dynamic_wd=False, flip_direction=False)
    assert table_config("t", dim=2, optimizer=optimizer).dim == 2


def segment_of(config: TableConfig) -> EntryConfig.Segment:
    return config.hash_table.entry_config.segments[0]


def clear_kind(config):
    config.hash_table.ClearField("cuckoo")


def clear_initializer(config):
    segment_of(config).init_config.ClearField("zeros")


def clear_optimizer(config):
    segment_of(config).opt_config.ClearField("sgd")


def empty_compressor(config):
    segment_of(config).comp_config.SetInParent()


def choose_dc(config):
    segment_of(config).opt_config.dc.SetInParent()


def clear_dim(config):
    segment_of(config).ClearField("dim_size")


def unknown_rows(config):
    config.hash_table.entry_config.entry_type = EntryConfig.UNKNOWN


def negative_rate(config):
    segment_of(config).opt_config.sgd.learning_rate = -1


def crossed_bounds(config):
    segment_of(config).init_config.random_uniform.minval = 3


def no_scale(config):
    segment_of(config).comp_config.one_bit.init_scale = 0


def evict_always(config):
    config.hash_table.enable_feature_eviction = True
    config.hash_table.feature_evict_every_n_hours = 0


def slot_twice(config):
    config.hash_table.slot_expire_time_config.slot_expire_times.add(slot=1)
    config.hash_table.slot_expire_time_config.slot_expire_times.add(slot=1)


def unknown_filter(config):
    config.filter = 9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (clear_kind, "chooses no type; cuckoo"),
        (clear_initializer, "the initializer chooses no kind.*zeros"),
        (clear_optimizer, "the optimizer chooses no kind.*adagrad"),
        (empty_compressor, "the compressor chooses no kind.*fp32"),
        (choose_dc, "dc compensates another optimizer's delay"),
        (clear_dim, r"table 't', segment 0: dim=0 is outside 1\.\.4096"),
        (unknown_rows, "entry_type is UNKNOWN"),
        (negative_rate, r"table 't', segment 0, sgd: learning_rate=-1\.0"),
        (crossed_bounds, r"minval=3 above maxval=0\.05"),
        (no_scale, r"one_bit: init_scale=0\.0"),
        (evict_always, "feature_evict_every_n_hours=0 is below 1"),
        (slot_twice, "slot=1 is given twice"),
        (unknown_filter, "filter=9 is none of"),
    ],
)
def test_a_ready_message_is_held_to_the_same_rules(spoil, message):
    config = proto()
    check_table_config(config)
    spoil(config)
    with pytest.raises(InvalidRequestError, match=message):
        check_table_config(config)

"""Parsing into batches: defaults, shapes, errors, quantized vectors, ragged arrays, fids spread over servers."""

from __future__ import annotations

import numpy as np
import pytest

from trilith.compat.monolith.expanding import ParseSteps, contract, expand
from trilith.compat.monolith.parse_functions import (
    parse_example_batch,
    parse_examples,
    parse_instances,
    parse_instances2,
    parse_instances_raw,
)
from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.quantized import dequantize, quantize
from trilith.data.parse.sharding import (
    FeatureFids,
    ShardingConfig,
    flatten,
    parse_fused,
    shard_fids,
    shard_ragged,
    unflatten,
)
from trilith.data.parse.specs import INVALID_LABEL, Dense, Extra, InstanceWeight, Label, Slot, Sparse
from trilith.data.records import Records
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.ragged import Ragged, singles
from trilith_proto import example_pb2, proto_parser_pb2


def instance(**fields):
    return proto_parser_pb2.Instance(**fields)


def example(**features):
    message = example_pb2.Example()
    for name, values in features.items():
        named = message.named_feature.add(name=name)
        kind = "float_list" if isinstance(values, list) and values and isinstance(values[0], float) else "fid_v2_list"
        getattr(named.feature, kind).value.extend(values)
    return message


def batch_of(rows, **lists):
    message = example_pb2.ExampleBatch(batch_size=rows)
    for name, (shared, values) in lists.items():
        feature_list = message.named_feature_list.add(name=name, type=int(shared), id=7)
        for each in values:
            feature_list.feature.add().fid_v2_list.value.extend(each)
    return message


# ---- instances -------------------------------------------------------------------------------------------------------


def test_fids_of_slots_are_v2_only_if_a_named_feature_is_asked_for():
    message = instance(fid=[3 << 54 | 5])
    assert parse_instances([message], fidv1_features=[3])["slot_3"].tolist() == [[3 << 54 | 5]]
    with_v2 = parse_instances([message], fidv1_features=[3], fidv2_features=["other"])
    assert with_v2["slot_3"].tolist() == [[3 << 48 | 5]]


def test_messages_bytes_and_records_parse_alike():
    message = instance(fid=[1 << 54 | 5], label=[0.5])
    raw = message.SerializeToString()
    for samples in ([message], [raw], Records.of([raw], "instance")):
        got = parse_instances(samples, fidv1_features=[1], dense_features=["label"], dense_feature_shapes=[2])
        assert got["slot_1"].tolist() == [[1 << 54 | 5]]
        assert got["label"].tolist() == [[0.5, 0.0]]


def test_a_dense_feature_of_an_instance_has_exactly_its_dim_or_is_zero():
    short, right = instance(), instance()
    short.feature.add(name="x", float_value=[1.0])
    right.feature.add(name="x", float_value=[1.0, 2.0])
    got = parse_instances([short, right], dense_features=["x"], dense_feature_shapes=[2])["x"]
    assert got.tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_a_weight_of_zero_stays_and_a_missing_one_is_one():
    weights = parse_instances(
        [instance(instance_weight=0.0), instance()], dense_features=["instance_weight"], dense_feature_shapes=[2]
    )
    assert weights["instance_weight"].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_scalars_of_the_line_id_fill_the_first_column_and_have_their_defaults():
    got = parse_instances([instance()], extra_features=["sample_rate", "uid", "cid"], extra_feature_shapes=[2, 2, 2])
    assert got["sample_rate"].tolist() == [[1.0, 0.0]]
    assert got["uid"].tolist() == [[0, 0]]
    assert got["cid"].tolist() == [[b"", b""]]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"extra_features": ["no_such"], "extra_feature_shapes": [1]}, "no_such"),
        ({"extra_features": ["is_draw"], "extra_feature_shapes": [1]}, "bool"),
        ({"dense_features": ["x"], "dense_feature_shapes": []}, "1 names"),
        ({"dense_features": ["x"], "dense_feature_shapes": [0]}, "dim=0"),
        ({"dense_features": ["label"], "dense_feature_shapes": [1], "dense_feature_types": ["int64"]}, "label"),
        ({"fidv1_features": [1], "fidv2_features": ["slot_1"]}, "slot_1"),
        ({"fidv1_features": [1024]}, "1024"),
        ({}, "no features"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, match):
    with pytest.raises(InvalidRequestError, match=match):
        parse_instances([instance()], **arguments)


def test_damaged_records_are_left_out_and_counted_if_asked():
    spec = ParseSpec(label=Label(), on_error="skip")
    records = Records.of([instance(label=[1.0]).SerializeToString(), b"\xff"], "instance")
    assert spec.parse(records)["label"].tolist() == [[1.0]]
    assert spec.skipped == 1
    with pytest.raises(DataError, match="record 1, byte"):
        ParseSpec(label=Label()).parse(records)


def test_features_by_type_have_the_names_asked_for():
    message = instance(label=[1.0, 2.0])
    message.feature.add(name="n", int64_value=[-1])
    message.feature.add(name="s", bytes_value=[b"\xff"])
    got = parse_instances2(
        [message],
        int64_features=["n"],
        int64_feature_dims=[1],
        string_features=["s"],
        string_feature_dims=[1],
        misc_float_features=["label", "sample_rate"],
        misc_float_dims=[2, 1],
    )
    assert {name: value.tolist() for name, value in got.items()} == {
        "n": [[-1]],
        "s": [[b"\xff"]],
        "label": [[1.0, 2.0]],
        "sample_rate": [[1.0]],
    }


def test_the_raw_op_gives_all_splits_before_all_values():
    message = instance(fid=[1 << 54, 2 << 54, 1 << 54 | 1])
    splits1, splits2, values1, values2 = parse_instances_raw([message], fidv1_features=[1, 2])
    assert [splits1.tolist(), splits2.tolist()] == [[0, 2], [0, 1]]
    assert [values1.tolist(), values2.tolist()] == [[1 << 54, 1 << 54 | 1], [2 << 54]]


def test_a_single_row_loses_its_batch_axis_if_asked():
    got = parse_instances(
        [instance(label=[1.0])], dense_features=["label"], dense_feature_shapes=[1], collapse_batch_dim=True
    )
    assert got["label"].shape == (1,)


# ---- quantized vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 40])
def test_a_quantized_vector_comes_back_within_a_step(size):
    vector = np.linspace(-1, 3, size).astype(np.float32)
    assert np.abs(dequantize(quantize(vector)) - vector).max() <= 4 / 255 + 1e-3


def test_the_last_quantized_vector_of_a_feature_takes_the_place_of_its_floats():
    message = instance()
    values = [quantize([9.0] * 6), quantize([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])]
    message.feature.add(name="x", float_value=[7.0] * 6, bytes_value=[b"other", *values])
    plain = instance()
    plain.feature.add(name="x", float_value=[7.0] * 6)
    got = parse_instances([message, plain], dense_features=["x"], dense_feature_shapes=[6])["x"]
    np.testing.assert_allclose(got[0], np.arange(6), atol=0.02)
    assert got[1].tolist() == [7.0] * 6
    with pytest.raises(DataError, match=r"record 0.*'x'"):
        parse_instances([message], dense_features=["x"], dense_feature_shapes=[5])


# ---- examples --------------------------------------------------------------------------------------------------------


def test_an_empty_example_has_the_defaults_of_examples():
    got = parse_examples(
        [b""],
        sparse_features=["f"],
        dense_features=["label", "x", "s", "instance_weight"],
        dense_feature_shapes=[2, 2, 1, 1],
        dense_feature_types=["float32", "float32", "string", "float32"],
        extra_features=["sample_rate"],
        extra_feature_shapes=[1],
    )
    assert got["label"].tolist() == [[INVALID_LABEL] * 2]
    assert got["x"].tolist() == [[0.0, 0.0]]
    assert got["s"].tolist() == [[b""]]
    assert got["instance_weight"].tolist() == [[1.0]]
    assert got["sample_rate"].tolist() == [[1.0]]
    assert got["f"].tolist() == [[]]


def test_a_feature_of_another_type_than_asked_for_is_an_error_that_names_it():
    with pytest.raises(DataError, match="'x' holds a fid_v2_list"):
        parse_examples([example(x=[1])], dense_features=["x"], dense_feature_shapes=[1])


def test_message_objects_are_taken_as_they_are_and_bytes_are_promoted():
    message = example(__LABEL__=[3.0], instance_weight=[0.0])
    request = {"dense_features": ["label", "instance_weight"], "dense_feature_shapes": [1, 1]}
    assert parse_examples([message], **request)["label"].tolist() == [[INVALID_LABEL]]
    promoted = parse_examples([message.SerializeToString()], **request)
    assert promoted["label"].tolist() == [[3.0]]
    assert promoted["instance_weight"].tolist() == [[0.0]]


# ---- batches of examples ---------------------------------------------------------------------------------------------


def test_a_shared_list_is_repeated_and_an_absent_one_is_empty():
    got = parse_example_batch(
        batch_of(3, s=(True, [[1, 2]]), i=(False, [[3], [], [4]])), sparse_features=["s", "i", "none"]
    )
    assert got["s"].tolist() == [[1, 2]] * 3
    assert got["i"].tolist() == [[3], [], [4]]
    assert got["none"].tolist() == [[], [], []]


def test_a_list_shorter_than_the_batch_is_an_error():
    with pytest.raises(DataError, match="'i' has 1 features for 2 rows"):
        parse_example_batch(batch_of(2, i=(False, [[3]])), sparse_features=["i"])
    with pytest.raises(DataError, match="'s' has no feature"):
        parse_example_batch(batch_of(2, s=(True, [])), sparse_features=["s"])


def test_several_batches_parse_into_one_and_damaged_ones_can_be_skipped():
    payloads = [
        batch_of(2, f=(False, [[1], [2]])).SerializeToString(),
        b"\x0a\x05",
        batch_of(1, f=(False, [[3]])).SerializeToString(),
    ]
    spec = ParseSpec(f=Sparse(), uid=Extra(), w=InstanceWeight(), label=Label(), on_error="skip")
    got = spec.parse(Records.of(payloads, "examplebatch"))
    assert got["f"].tolist() == [[1], [2], [3]]
    assert got["uid"].shape == (3, 1)
    assert spec.skipped == 1


# ---- specs -----------------------------------------------------------------------------------------------------------


def test_specs_may_rename_features_and_serve_every_kind_of_record():
    spec = ParseSpec(items=Sparse("f"), context=Dense(1, feature="x"))
    message = instance()
    message.feature.add(name="f", fid=[1, 2])
    message.feature.add(name="x", float_value=[0.5])
    for records in (
        Records.of([message.SerializeToString()], "instance"),
        Records.of([example(f=[1, 2], x=[0.5]).SerializeToString()], "example"),
    ):
        got = spec.parse(records)
        assert got["items"].tolist() == [[1, 2]]
        assert got["context"].tolist() == [[0.5]]
    with pytest.raises(InvalidRequestError, match="plaintext"):
        spec.parse(Records.of([b""], "plaintext"))
    with pytest.raises(InvalidRequestError, match="only Instances"):
        ParseSpec(a=Slot(1)).parse(Records.of([b""], "example"))


# ---- ragged arrays ---------------------------------------------------------------------------------------------------


def test_a_ragged_array_knows_whether_its_rows_are_equally_long():
    ramp = singles(3)
    assert not ramp.flags.writeable
    assert Ragged(np.zeros(3), ramp).uniform(1)
    for splits, n, expected in (([0, 2, 4], 2, True), ([0, 2, 4], 1, False), ([0, 1, 4], 2, False), ([0], 5, True)):
        assert Ragged(np.zeros(splits[-1]), np.array(splits)).uniform(n) is expected
    assert singles(70_000).size == 70_001


def test_ragged_arrays_expand_and_contract():
    ragged = Ragged.of([[1, 2], [], [3]])
    parts = expand({"r": ragged, "x": 1}, value_rowids=True)
    assert parts["r"]["value_rowids"].tolist() == [0, 0, 2]
    assert contract(parts)["r"].tolist() == ragged.tolist()
    with pytest.raises(InvalidRequestError, match="nrows"):
        contract({"r": {**parts["r"], "nrows": 5}})
    assert ragged.take([2, 0]).tolist() == [[3], [1, 2]]
    assert ragged.dense(1, -1).tolist() == [[1], [-1], [3]]


def test_queued_parse_steps_run_once_in_order():
    steps = ParseSteps()
    steps.add(lambda features: {**features, "a": 1})
    steps.add(lambda features: {**features, "b": features["a"] + 1})
    assert steps.apply({}) == {"a": 1, "b": 2}
    assert steps.apply({}) == {}


# ---- sharding --------------------------------------------------------------------------------------------------------


def worked_example(version, unique=False):
    examples = [example(u=[10, 11, 10], v=[5]), example(u=[12])]
    config = ShardingConfig(features={"u": ("t", [2, 1]), "v": ("t", [4])}, ps_num=2, unique=unique, version=version)
    return shard_fids(Records.of([each.SerializeToString() for each in examples], "example"), config)


def test_fids_go_to_the_server_that_their_value_says():
    got = worked_example(5)
    assert {key: value.tolist() for key, value in got["fid_list"].items()} == {"t:0": [10, 10, 12], "t:1": [11, 5]}
    assert {key: value.tolist() for key, value in got["fid_list_row_splits"].items()} == {
        "t:0": [0, 3, 3],
        "t:1": [0, 1, 2],
    }
    assert got["fid_offset"].tolist() == [0, 1 << 32, 3, 6, 1 << 32 | 3]
    assert got["feature_offset"].tolist() == [0, 3, 4, 5, 5]
    assert got["nfl_offset"].tolist() == [0, 2, 5]
    assert {key: int(value[0]) for key, value in got["emb_size"].items()} == {"t:0": 9, "t:1": 7}
    once = worked_example(5, unique=True)
    assert once["fid_list"]["t:0"].tolist() == [10, 12]
    assert once["fid_offset"].tolist() == [0, 1 << 32, 0, 3, 1 << 32 | 3]


def test_older_layouts_place_fids_in_lists_instead_of_floats():
    assert worked_example(1)["fid_offset"].tolist() == [0, 1 << 32, 1, 2, 1 << 32 | 1]
    assert worked_example(2)["fid_offset"].tolist() == [0, 2 << 32, 1, 2, 3 << 32]
    assert "emb_size" not in worked_example(3)
    together = worked_example(4)
    assert together["fid_list"].tolist() == [10, 10, 12, 11, 5]
    assert together["fid_list_row_length"].tolist() == [3, 0, 1, 1]


def test_sharded_fids_travel_inside_a_flat_batch():
    config = ShardingConfig(features={"u": ("t", [1])})
    sharded = shard_ragged({"u": FeatureFids(Ragged.of([[1], [2, 3]], np.uint64))}, config, 2)
    back, rest = unflatten({**flatten(sharded), "label": 1})
    assert rest == {"label": 1}
    assert back["fid_list"]["t:0"].tolist() == [1, 2, 3]
    assert set(back) == set(sharded)


def test_the_fused_layout_leaves_sparse_features_to_the_spreading():
    records = Records.of([example(u=[1, 2], x=[0.5]).SerializeToString()], "example")
    config = ShardingConfig(features={"u": ("t", [1])})
    fused = parse_fused(records, ParseSpec(x=Dense(1)), config)
    assert fused["x"].tolist() == [[0.5]]
    assert unflatten(fused)[0]["fid_list"]["t:0"].tolist() == [1, 2]
    assert parse_fused(records)["__sharding_sparse_fids__sparse_features"] is records


# ---- labels by name --------------------------------------------------------------------------------------------------

BY_NAME = {"click": Label(feature="click"), "buy": Label(feature="buy", place=1)}
MISSING = float(INVALID_LABEL)


def records_with_labels(kind: str) -> Records:
    """By name, one of them; of the record itself, both; of the record itself, one; none."""
    if kind == "instance":
        messages = [instance(), instance(label=[1, 0]), instance(label=[0]), instance()]
        messages[0].feature.add(name="click", float_value=[1])
    else:
        messages = [example(click=[1.0], x=[0.5]), example(label=[1.0, 0.0]), example(), example(x=[0.5])]
        messages[2].label.append(0)
    return Records.of([message.SerializeToString() for message in messages], kind)


@pytest.mark.parametrize("kind", ["instance", "example"])
def test_a_label_is_the_feature_of_its_name_or_one_of_the_records_own(kind):
    found = ParseSpec(BY_NAME).parse(records_with_labels(kind))
    assert found["click"].tolist() == [[1], [1], [0], [MISSING]]
    assert found["buy"].tolist() == [[MISSING], [0], [MISSING], [MISSING]]


def test_a_label_of_a_batch_is_the_list_of_its_name_or_the_batchs_own():
    def batch(**lists) -> Records:
        message = example_pb2.ExampleBatch(batch_size=2)
        for name, rows in lists.items():
            named = message.named_feature_list.add(name=name, type=0)
            for row in rows:
                named.feature.add().float_list.value.extend(row)
        return Records.of([message.SerializeToString()], "examplebatch")

    found = ParseSpec(BY_NAME).parse(batch(click=[[1], [0]]))
    assert (found["click"].tolist(), found["buy"].tolist()) == ([[1], [0]], [[MISSING], [MISSING]])
    found = ParseSpec(BY_NAME).parse(batch(label=[[1, 0], [0]]))
    assert (found["click"].tolist(), found["buy"].tolist()) == ([[1], [0]], [[0], [MISSING]])
    with pytest.raises(DataError, match="a feature 'click' and labels of its own"):
        ParseSpec(BY_NAME).parse(batch(label=[[1, 0], [0]], click=[[1], [0]]))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (example(click=[1.0], label=[0.0]), "a feature 'click' and labels of its own"),
        (example(click=[1.0, 0.0]), "label 'click' has 2 values; a label is one number"),
        (example(click=[7]), "feature 'click' holds a fid_v2_list, which is no list of float values"),
    ],
)
def test_a_label_that_may_be_two_or_is_no_number_is_damage(message, error):
    records = Records.of([example().SerializeToString(), message.SerializeToString()], "example")
    with pytest.raises(DataError, match=f"record 1: {error}|record 1.*{error}"):
        ParseSpec(BY_NAME).parse(records)
    kept = ParseSpec(BY_NAME, on_error="skip")
    assert kept.parse(records)["click"].tolist() == [[MISSING]]
    assert kept.skipped == 1


def test_a_label_with_a_name_is_one():
    with pytest.raises(InvalidRequestError, match="dim=2 of the label 'click'"):
        Label(2, feature="click")
    with pytest.raises(InvalidRequestError, match="place=-1"):
        Label(feature="click", place=-1)

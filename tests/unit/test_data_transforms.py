"""Transforms: their bytes, what running them does, what they refuse; and ops on fids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_samples as naive
from trilith.data.fids import make_fid_v1, make_fid_v2
from trilith.data.records import Records
from trilith.data.samples import (
    FeatureHash,
    SwitchSlotBatch,
    feature_combine,
    gen_fid_mask,
    map_id,
    switch_slot,
    zeros_like_rows,
)
from trilith.data.samples.transforms import (
    AddLabel,
    Compose,
    FilterByAction,
    FilterByFid,
    FilterByLabel,
    FilterByValue,
    LogicalOr,
    TransformConfig,
    apply_transform,
    ops_of,
)
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_proto.example_pb2 import SHARED, Example, ExampleBatch, FilterValues
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

INVALID = naive.INVALID_LABEL


def chunk(messages) -> Records:
    return Records.of([each.SerializeToString() for each in messages], messages[0].DESCRIPTOR.name.lower())


def messages_of(records) -> list[Instance]:
    return [Instance.FromString(payload) for payload in records.payloads()]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "wanted"),
    [
        (FilterByFid(has_fids=[1], filter_fids=[2, 3]), "0a0a0a080a06080110021003"),
        (
            AddLabel("1,2:3:1.0;4::0.5", 0.0, 0.3),
            "0a240a2222200a0b0801080210031d0000803f0a0708041d0000003f15000000001d9a99993e",
        ),
        (FilterByValue("chnid", "eq", 0), "0a130a112a0f0a0563686e69641202657120003000"),
        (FilterByFid(), "0a040a020a00"),
        (FilterByAction([1, -1]), "0a110a0f120d080108ffffffffffffffffff01"),
        (FilterByLabel([0.5]), "0a090a071a050d0000003f"),
        (FilterByValue("uid", "eq", 2**64 - 1), "0a1a0a182a160a037569641202657120ffffffffffffffffff013000"),
        (FilterByValue("sample_rate", "between", [0, 0.5]), None),
        (FilterByValue("device_type", "startswith", ["a", "é"], keep_empty=True), None),
        (FilterByValue("chnid", "in", operand_filepath="values.bin"), None),
        (Compose([]), ""),
        (Compose([FilterByLabel([0.5]), FilterByFid()]), "0a090a071a050d0000003f0a040a020a00"),
        (LogicalOr(FilterByLabel([0.5]), FilterByFid()), "0a0f120d0a071a050d0000003f12020a00"),
    ],
    ids=str,
)
def test_a_transform_serialises_to_the_bytes_of_the_reference_and_runs_from_them(transform, wanted):
    config = transform.as_proto()
    assert wanted is None or config.SerializeToString().hex() == wanted
    assert len(ops_of(config.SerializeToString())) == len(config.configs)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: FilterByFid(has_fids=[-1]), "has_fids"),
        (lambda: FilterByAction([2**31]), "has_actions"),
        (lambda: FilterByAction(["a"]), "has_actions"),
        (lambda: FilterByLabel(["a"]), "thresholds"),
        (lambda: FilterByValue("nope", "eq", 1), "nope"),
        (lambda: FilterByValue("rank", "xx", 1), "op of 'rank'"),
        (lambda: FilterByValue("rank", "eq"), "operand"),
        (lambda: FilterByValue("user_id", "eq", b"\xff").as_proto(), "UTF-8"),
        (lambda: AddLabel("", 0.0, 1.0), "config"),
        (lambda: AddLabel("1::1", 0.0, 0.0), "new_sample_rate"),
        (lambda: Compose([1]), "transforms has 1"),
        (lambda: Compose(FilterByFid()), "give a list"),
        (lambda: LogicalOr(Compose([FilterByAction([1])]), FilterByAction([2])), "^x is"),
        (lambda: LogicalOr(FilterByAction([2]), LogicalOr(FilterByAction([1]), FilterByAction([2]))), "^y is"),
    ],
)
def test_a_transform_that_makes_no_sense_is_refused_with_its_field(make, why):
    with pytest.raises(InvalidRequestError, match=why):
        make()


def test_a_config_of_unknown_leaves_or_of_no_bytes_is_refused():
    empty = TransformConfig()
    empty.configs.add()
    unknown = TransformConfig()
    unknown.configs.add().basic_config.SetInParent()
    for config in (empty, unknown):
        with pytest.raises(InvalidRequestError, match="config"):
            apply_transform(config, chunk([Instance()]))
    with pytest.raises(DataError, match="TransformConfig"):
        ops_of(b"\xff")


def test_a_config_of_another_writer_may_have_more_operands_than_its_op_uses():
    config = FilterByValue("chnid", "eq", 3).as_proto()
    config.configs[0].basic_config.filter_by_value.int_operand.append(5)
    records = chunk([Instance(line_id=LineId(chnid=each)) for each in (3, 5)])
    assert apply_transform(config, records).numbers.tolist() == [0]


# ---- running ---------------------------------------------------------------------------------------------------------


def test_no_config_is_the_identity():
    records = chunk([Instance(label=[1.0])])
    assert apply_transform(b"", records) is records


def test_stages_run_from_left_to_right():
    messages = [
        Instance(label=[0.0], line_id=LineId(actions=[1])),
        Instance(label=[0.5], line_id=LineId(actions=[2])),
        Instance(line_id=LineId(actions=[1])),
    ]
    stages = [FilterByAction([1, 3]), AddLabel("1:3:1.0;2::1.0", -1.0, 0.25), FilterByLabel([0, 0, -100])]
    made = Compose(stages)(chunk(messages))
    assert made.numbers.tolist() == [0]
    assert list(messages_of(made)[0].label) == [INVALID, 1.0, -1.0]
    assert messages_of(made)[0].line_id.sample_rate == 0.25


def test_labels_of_both_sides_of_an_or_are_added_to_what_either_keeps():
    messages = [Instance(line_id=LineId(actions=[each])) for each in (1, 2, 3)]
    either = LogicalOr(AddLabel("1::1", 0.0, 1.0), FilterByAction([2]))
    assert [list(each.label) for each in messages_of(either(chunk(messages)))] == [[1.0], [0.0], [0.0]]
    both = LogicalOr(FilterByAction([2]), AddLabel("3::1", 0.0, 1.0))
    kept = Compose([both, FilterByLabel([1.0])])(chunk(messages))
    assert kept.numbers.tolist() == [2]
    neither = LogicalOr(FilterByAction([2]), FilterByAction([3]))
    assert neither(chunk(messages)).numbers.tolist() == [1, 2]


def test_a_negative_request_time_never_passes_a_filter_by_fid_or_action():
    records = chunk([Instance(line_id=LineId(req_time=-1)), Instance()])
    for transform in (FilterByAction([]), FilterByFid()):
        assert transform(records).numbers.tolist() == [1]


def test_operands_of_a_config_may_come_from_a_file(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(FilterValues(bytes_list={"value": [b"a"]}).SerializeToString())
    records = chunk([Example(line_id=LineId(cid=each)) for each in ("a", "b")])
    transform = FilterByValue("cid", "not-in", operand_filepath=str(path))
    assert transform(records).numbers.tolist() == [1]
    assert apply_transform(transform.as_proto(), records).numbers.tolist() == [1]


def test_leaves_draw_apart():
    records = chunk([Instance()] * 2000)
    twice = Compose([AddLabel("1::0.5", 0.0, 1.0), AddLabel("1::0.5", 0.0, 1.0)])
    drawn = np.array([list(each.label) for each in messages_of(twice(records))])
    assert (drawn[:, 1] == 0).mean() == pytest.approx(0.5, abs=0.05)
    assert ((drawn[:, 0] != INVALID) & (drawn[:, 1] == 0)).mean() < 0.3


# ---- fids ------------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3), max_size=4)


@given(a=ROWS, b=ROWS, slot=st.integers(0, 32767))
def test_feature_combine_matches_naive(a, b, slot):
    rows = min(len(a), len(b))
    made = feature_combine(Ragged.of(a[:rows]), Ragged.of(b[:rows]), slot)
    assert made.tolist() == naive.feature_combine(a[:rows], b[:rows], slot)


def test_rows_are_combined_pairwise():
    made = feature_combine(Ragged.of([[2, 3]]), Ragged.of([[10, 11]]), 7)
    assert made.tolist() == [[make_fid_v2(7, each) for each in (20, 22, 30, 33)]]
    with pytest.raises(InvalidRequestError, match="1 rows and b has 0"):
        feature_combine(Ragged.of([[1]]), Ragged.of([]), 1)


def test_a_switched_slot_keeps_nothing_of_the_old_one():
    rows = Ragged.of([[make_fid_v2(100, 1), make_fid_v2(305, 9)], [make_fid_v2(32767, 2**48 - 1)]])
    wanted = [[make_fid_v2(306, 1), make_fid_v2(306, 9)], [make_fid_v2(306, 2**48 - 1)]]
    assert switch_slot(rows, 306).tolist() == wanted
    with pytest.raises(InvalidRequestError, match="32768"):
        switch_slot(rows, 32768)


def test_a_mask_says_which_rows_hold_a_fid():
    rows = Ragged.of([[1, 2, 3], [3], [], [4, -1, 6]])
    assert gen_fid_mask(rows, 3).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert gen_fid_mask(rows, 2**64 - 1).tolist() == gen_fid_mask(rows, -1).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_ids_are_mapped_one_by_one():
    mapping = {123: 0, 456: 1, -7: 2}
    assert map_id([[123, 456], [-7, 912]], mapping).tolist() == [[0, 1], [2, -1]]
    assert map_id(Ragged.of([[123], [], [5]]), mapping, -9).tolist() == [[0], [], [-9]]
    assert map_id([1], {}, 4).tolist() == [4]


def test_zeros_are_as_many_as_records():
    assert zeros_like_rows(chunk([Instance()] * 3)).tolist() == [0, 0, 0]


def test_slots_of_features_are_switched_in_place_or_in_a_copy():
    example = Example()
    example.named_feature.add(name="a", id=1, sorted_id=2).feature.fid_v1_list.value.append(make_fid_v1(5, 2**54 - 1))
    example.named_feature.add(name="b", id=3, sorted_id=4).feature.fid_v2_lists.list.add().value.append(
        make_fid_v2(5, 9)
    )
    example.named_feature.add(name="c").feature.float_list.value.append(1.0)
    op = SwitchSlotBatch({"a": (True, 10), "b": (False, 11), "c": (True, 12)})
    made = Example.FromString(op(chunk([example])).payload(0))
    assert [(each.name, each.id, each.sorted_id) for each in made.named_feature] == [
        ("a", 1, 2),
        ("b", 3, 4),
        ("c", 0, 0),
        ("b_share", 3, 4),
    ]
    assert list(made.named_feature[0].feature.fid_v1_list.value) == [make_fid_v1(10, 2**54 - 1)]
    assert made.named_feature[1] == example.named_feature[1]
    assert list(made.named_feature[3].feature.fid_v2_lists.list[0].value) == [make_fid_v2(11, 9)]
    assert made.named_feature[2] == example.named_feature[2]


def test_columns_of_a_batch_switch_their_slots_too():
    batch = ExampleBatch(batch_size=2)
    column = batch.named_feature_list.add(name="a", id=1, type=SHARED)
    column.feature.add().fid_v2_list.value.append(make_fid_v2(5, 9))
    records = Records.of([batch.SerializeToString()], "examplebatch")
    made = ExampleBatch.FromString(SwitchSlotBatch({"a": (False, 7)}, "twin")(records).payload(0))
    assert [each.name for each in made.named_feature_list] == ["a", "a_twin"]
    assert made.named_feature_list[1].type == SHARED
    assert list(made.named_feature_list[1].feature[0].fid_v2_list.value) == [make_fid_v2(7, 9)]


def test_a_slot_that_v1_fids_cannot_have_is_refused():
    example = Example()
    example.named_feature.add(name="a").feature.fid_v1_list.value.append(1)
    with pytest.raises(InvalidRequestError, match="1024"):
        SwitchSlotBatch({"a": (True, 1024)}).on(example)
    with pytest.raises(InvalidRequestError, match="32768"):
        SwitchSlotBatch({"a": (True, 32768)})
    with pytest.raises(InvalidRequestError, match="instance"):
        SwitchSlotBatch({})(chunk([Instance()]))


def test_strings_are_hashed_and_nothing_else_is_kept():
    example = Example(label=[1.0], instance_weight=2.0, line_id=LineId(uid=7))
    example.named_feature.add(name="city", id=4).feature.bytes_list.value.extend([b"amsterdam", b"amsterdam!", b"x"])
    example.named_feature.add(name="age", id=5).feature.int64_list.value.append(30)
    example.named_feature.add(name="other").feature.int64_list.value.append(1)
    raw = example.named_raw_feature.add(name="tags", id=6).raw_feature
    raw.feature.add().bytes_list.value.append(b"x")
    made = FeatureHash({"city": 12, "age": 0, "tags": 13}).on(example)
    assert (list(made.label), made.line_id.uid, made.instance_weight) == ([1.0], 7, 0.0)
    city, age, tags = made.named_feature
    assert (city.name, city.id, age.feature) == ("city", 4, example.named_feature[1].feature)
    fids = list(city.feature.fid_v2_list.value)
    assert fids[0] == fids[1] != fids[2]  # only eight bytes count
    assert {fid >> 48 for fid in fids} == {12}
    assert [fid >> 48 for fid in tags.feature.fid_v2_list.value] == [13]
    with pytest.raises(InvalidRequestError, match="Examples"):
        FeatureHash(["city"]).on(ExampleBatch())

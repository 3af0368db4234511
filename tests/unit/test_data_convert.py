"""Conversions between kinds of messages, one by one and in chunks."""

from __future__ import annotations

import pytest

from trilith.data import messages as convert
from trilith.data.fids import make_fid_v1, make_fid_v2
from trilith.data.messages import Pruning
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import INDIVIDUAL, SHARED, Example, ExampleBatch
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance


def reserved(example: Example) -> Example:
    example.named_feature.add(name="__LINE_ID__").feature.bytes_list.value.append(LineId(uid=7).SerializeToString())
    example.named_feature.add(name="__LABEL__").feature.float_list.value.extend([1.0, 2.0])
    example.named_feature.add(name="instance_weight").feature.float_list.SetInParent()
    return example


def test_reading_promotes_reserved_features_and_keeps_them():
    example = reserved(Example(label=[0.5]))
    records = Records.of([example.SerializeToString()], "example", source_keys=[512])
    read = convert.read_message(records, 0)
    assert (list(read.label), read.line_id.uid, read.instance_weight) == ([0.5, 1.0, 2.0], 7, 1.0)
    assert len(read.named_feature) == 3
    assert read.data_source_key == 512


def test_the_scan_for_reserved_features_stops_when_all_were_seen():
    example = reserved(Example())
    example.named_feature.add(name="__LABEL__").feature.float_list.value.append(9.0)
    convert.promote(example)
    assert list(example.label) == [1.0, 2.0]


def test_the_key_of_the_header_replaces_that_of_the_payload():
    records = Records.of([Instance(data_source_key=5).SerializeToString()] * 2, "instance", source_keys=[0, 256])
    assert [each.data_source_key for each in convert.messages(records)] == [0, 256]


def test_an_instance_becomes_an_example():
    instance = Instance(
        fid=[make_fid_v1(1023, 5), make_fid_v1(2, 7), make_fid_v1(1023, 6)], value=[0.5], label=[1.0], next_fid=[4]
    )
    instance.line_id.uid = 3
    instance.feature.add(name="g", fid=[make_fid_v2(1024, 5)], float_value=[1.0])
    instance.feature.add(name="seq").fid_list.add(value=[1, 2])
    instance.feature.add(name="empty")
    example = convert.instance_to_example(instance)
    names = [(each.name, each.id, each.feature.WhichOneof("type")) for each in example.named_feature]
    assert names == [
        ("value", 0, "float_list"),
        ("fc_slot_1023", 1, "fid_v1_list"),
        ("fc_slot_2", 2, "fid_v1_list"),
        ("g", 3, "fid_v2_list"),
        ("seq", 4, "fid_v2_lists"),
        ("empty", 5, None),
    ]
    assert list(example.named_feature[1].feature.fid_v1_list.value) == [make_fid_v1(1023, 5), make_fid_v1(1023, 6)]
    assert (list(example.label), example.instance_weight, example.line_id.uid) == ([1.0], 1.0, 3)
    assert convert.instance_to_example(Instance(instance_weight=0.0)).instance_weight == 0.0


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("fid_v2_list", "fid"),
        ("float_list", "float_value"),
        ("int64_list", "int64_value"),
        ("bytes_list", "bytes_value"),
        ("fid_v2_lists", "fid_list"),
        ("float_lists", "float_list"),
        ("int64_lists", "int64_list"),
        ("bytes_lists", "bytes_list"),
        ("double_list", None),
        ("double_lists", None),
        ("fid_v1_lists", None),
    ],
)
def test_every_list_of_an_example_has_its_place_in_an_instance(kind, field):
    example = Example()
    values = [b"x"] if "bytes" in kind else [3]
    feature = getattr(example.named_feature.add(name="f").feature, kind)
    (feature.list.add() if kind.endswith("lists") else feature).value.extend(values)
    (made,) = convert.example_to_instance(example).feature
    assert [each.name for each, _ in made.ListFields()] == (["name"] if field is None else ["name", field])
    if field is not None:
        got = list(getattr(made, field))
        assert (got if not kind.endswith("lists") else list(got[0].value)) == values
        back = convert.instance_to_example(Instance(feature=[made])).named_feature[0].feature
        assert back == example.named_feature[0].feature


def test_only_named_features_of_an_example_reach_the_instance():
    example = reserved(Example(label=[9.0], instance_weight=3.0, data_source_key=4))
    example.named_feature.add(name="fc_slot_2").feature.fid_v1_list.value.append(make_fid_v1(2, 1))
    example.named_feature.add(name="unset")
    made = convert.example_to_instance(example)
    wanted = Instance(label=[1.0, 2.0], instance_weight=1.0, line_id=LineId(uid=7), fid=[make_fid_v1(2, 1)])
    assert made == wanted


def batch() -> ExampleBatch:
    made = ExampleBatch(batch_size=2, data_source_key=512)
    shared = made.named_feature_list.add(name="u", id=3, type=SHARED)
    shared.feature.add().fid_v1_list.value.append(make_fid_v1(1, 1))
    own = made.named_feature_list.add(name="i", id=4, type=INDIVIDUAL)
    own.feature.add().float_list.value.append(1.0)
    own.feature.add()
    labels = made.named_feature_list.add(name="__LABEL__")
    for label in (0.0, 1.0):
        labels.feature.add().float_list.value.append(label)
    raw = made.named_raw_feature_list.add(name="r", id=5)
    for value in (1, 2):
        raw.raw_feature.add().feature.add().int64_value = value
    return made


def test_rows_of_a_batch_become_examples():
    first, second = convert.batch_to_examples(batch())
    assert [(each.name, each.id) for each in first.named_feature] == [("u", 3), ("i", 4)]
    assert second.named_feature[0].feature == first.named_feature[0].feature
    assert second.named_feature[1].feature.WhichOneof("type") is None
    assert [list(first.label), list(second.label)] == [[0.0], [1.0]]
    assert first.data_source_key == 512
    assert not first.named_raw_feature


def test_rows_of_a_batch_become_instances():
    first, second = convert.batch_to_instances(batch())
    assert list(first.fid) == list(second.fid) == [make_fid_v1(1, 1)]
    assert [each.name for each in first.feature] == ["i"]
    assert not second.feature
    assert (list(second.label), second.data_source_key) == ([1.0], 512)


@pytest.mark.parametrize(
    ("pruning", "named", "raw"), [(Pruning.AS_IS, ["u", "i"], 1), (Pruning.NAMED, [], 1), (Pruning.RAW, ["u", "i"], 0)]
)
def test_pruning_says_which_features_of_a_batch_are_left_out(pruning, named, raw):
    records = Records.of([batch().SerializeToString()], "examplebatch")
    made = [Example.FromString(each) for each in convert.convert(records, "example", pruning=pruning).payloads()]
    assert [each.name for each in made[0].named_feature] == named
    assert [len(each.named_raw_feature) for each in made] == [raw, raw]
    assert [list(each.label) for each in made] == [[0.0], [1.0]]


def test_records_of_the_wanted_kind_are_pruned_when_asked():
    example = reserved(Example())
    example.named_raw_feature.add(name="r")
    records = Records.of([example.SerializeToString()], "example")
    named = Example.FromString(convert.convert(records, "example", pruning=Pruning.NAMED).payload(0))
    assert (list(named.label), len(named.named_feature), len(named.named_raw_feature)) == ([1.0, 2.0], 0, 1)
    raw = Example.FromString(convert.convert(records, "example", pruning=Pruning.RAW).payload(0))
    assert (list(raw.label), len(raw.named_feature), len(raw.named_raw_feature)) == ([], 3, 0)


def test_damaged_records_are_left_out_and_counted_when_asked():
    short = batch()
    del short.named_feature_list[1].feature[1]
    payloads = [batch().SerializeToString(), short.SerializeToString(), b"\xff", batch().SerializeToString()]
    lost: list[int] = []
    records = Records.of(payloads, "examplebatch")
    assert convert.convert(records, "example", on_error="skip", lost=lost.append).numbers.tolist() == [0, 0, 3, 3]
    assert lost == [2]


def test_names_and_ids_of_any_size_survive():
    made = ExampleBatch(batch_size=1)
    for name, number in (("n" * 300, -1), ("", 300), ("é", 0)):
        made.named_feature_list.add(name=name, id=number).feature.add().float_list.value.extend([0.5] * 100)
    (example,) = convert.batch_to_examples(made)
    assert [(each.name, each.id) for each in example.named_feature] == [("n" * 300, -1), ("", 300), ("é", 0)]
    assert list(example.named_feature[2].feature.float_list.value) == [0.5] * 100


def test_a_batch_without_rows_has_none():
    made = ExampleBatch()
    made.named_feature_list.add(name="u", type=SHARED).feature.add()
    made.named_feature_list.add(name="__LABEL__", type=SHARED).feature.add()
    assert list(convert.batch_to_examples(made)) == list(convert.batch_to_instances(made)) == []


def test_a_pruned_example_keeps_what_was_promoted():
    example = reserved(Example())
    example.named_raw_feature.add(name="r")
    records = Records.of([example.SerializeToString()], "example")
    read = convert.read_message(records, 0, pruning=Pruning.NAMED)
    assert (list(read.label), len(read.named_feature), len(read.named_raw_feature)) == ([1.0, 2.0], 0, 1)
    assert not convert.read_message(records, 0, pruning=Pruning.RAW).named_raw_feature


@pytest.mark.parametrize("kind", [Kind.EXAMPLE, Kind.INSTANCE])
def test_a_batch_whose_columns_do_not_have_its_rows_is_refused_with_its_place(kind):
    short, none = batch(), batch()
    del short.named_feature_list[1].feature[1]
    del none.named_feature_list[0].feature[0]
    for damaged, why in ((short, "column 'i' has 1 features in a batch of 2"), (none, "shared column 'u'")):
        records = Records.of([batch().SerializeToString(), damaged.SerializeToString()], "examplebatch", source="part")
        with pytest.raises(DataError, match=f"part: record 1.*{why}"):
            convert.convert(records, kind)


def test_chunks_remember_where_their_records_came_from():
    payloads = [batch().SerializeToString(), ExampleBatch().SerializeToString(), batch().SerializeToString()]
    records = Records.of(payloads, "examplebatch", source_keys=[256, 0, 768])
    made = convert.convert(records, "example")
    assert made.kind is Kind.EXAMPLE
    assert made.numbers.tolist() == [0, 0, 2, 2]
    assert made.source_keys.tolist() == [256, 256, 768, 768]
    assert Example.FromString(made.payload(3)).data_source_key == 768


def test_plaintext_is_the_payload_and_the_same_kind_is_the_same_chunk():
    records = Records.of([b"\xff", b""], "instance")
    assert convert.convert(records, "instance") is records
    assert convert.convert(records, "plaintext").payloads() == [b"\xff", b""]


@pytest.mark.parametrize(("origin", "wanted"), [("plaintext", "example"), ("example", "examplebatch")])
def test_a_conversion_nobody_can_make_is_refused(origin, wanted):
    with pytest.raises(InvalidRequestError, match=wanted):
        convert.convert(Records.of([b""], origin), wanted)


def test_a_payload_that_cannot_be_parsed_is_named():
    records = Records.of([b"", b"\xff"], "instance", source="part")
    with pytest.raises(DataError, match="part: record 1, byte 0: the payload is no Instance"):
        convert.convert(records, "example")
    bad = Example()
    bad.named_feature.add(name="__LINE_ID__").feature.bytes_list.value.append(b"\xff")
    with pytest.raises(DataError, match="record 0.*LineId"):
        convert.convert(Records.of([bad.SerializeToString()], "example"), "instance")

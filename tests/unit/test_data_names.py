"""Fids, hashes, slot names, feature lists, tf.Examples, strings: the rules beyond the vectors."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.compat.monolith.feature_list import Feature, FeatureList
from trilith.compat.monolith.messages import string_to_variant
from trilith.compat.monolith.names import FeatureNameMapper, SlotNames
from trilith.compat.monolith.tf_example import TFExampleConverter, tf_example_to_example
from trilith.data import fids
from trilith.data.formats.framing import Framing
from trilith.data.records import Records
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

WORDS = st.integers(0, 2**64 - 1)


# ---- fids ----------------------------------------------------------------------------------------------------------


@given(signature=WORDS, slot_v1=st.integers(0, 1023), slot_v2=st.integers(0, 32767))
def test_arrays_and_integers_make_the_same_fids(signature, slot_v1, slot_v2):
    v1 = fids.make_fid_v1(slot_v1, signature)
    v2 = fids.make_fid_v2(slot_v2, signature)
    assert v1 == slot_v1 << 54 | signature & (2**54 - 1)
    assert v2 == slot_v2 << 48 | signature & (2**48 - 1)
    assert (fids.slot_of_v1(v1), fids.slot_of_v2(v2)) == (slot_v1, slot_v2)
    assert fids.v1_to_v2(v1) == slot_v1 << 48 | signature & (2**48 - 1)
    assert fids.reslot_v1(v1, 5) == 5 << 54 | v1 & (2**54 - 1)
    assert fids.reslot_v2(v2, 5) == 5 << 48 | v2 & (2**48 - 1)
    for signatures in (np.array([signature], np.uint64), np.array([signature], np.uint64).view(np.int64)):
        assert fids.make_fid_v1(slot_v1, signatures).tolist() == [v1]
        assert fids.make_fid_v2(np.array([slot_v2]), signatures).tolist() == [v2]
    stored = np.array([v1], np.uint64).view(np.int64)
    assert fids.v1_to_v2(stored).tolist() == [fids.v1_to_v2(v1)]
    assert fids.extract_fid(signature, 3) == fids.extract_fid(np.array([signature], np.uint64), 3)[0]


def test_slots_and_ids_out_of_range_are_refused():
    for make, slot in ((fids.make_fid_v1, 1024), (fids.make_fid_v2, 32768), (fids.make_fid_v2, -1)):
        with pytest.raises(InvalidRequestError, match=f"slot {slot} is outside"):
            make(slot, 1)
        with pytest.raises(InvalidRequestError, match=f"slot {slot} is outside"):
            make(np.array([1, slot]), np.array([1, 2]))
    assert fids.check_fid_v2(2**63 - 1) == 2**63 - 1
    with pytest.raises(InvalidRequestError, match="highest bit"):
        fids.check_fid_v2(np.array([1, 2**63], np.uint64))
    with pytest.raises(InvalidRequestError, match="float64"):
        fids.slot_of_v1(np.array([1.0]))


def test_hashes_match_known_values():
    assert fids.java_hash("") == 0
    assert fids.java_hash("pc") == 3571
    assert fids.java_hash("datasource_inst") == -1487072768
    assert fids.java_hash("é") == 31 * (0xC3 - 256) + (0xA9 - 256)
    assert fids.data_source_key("1") == 12544
    assert fids.extract_fid(185, 4) == 1153447759131936
    value = 185
    assert fids.city_hash64(struct.pack("<q", value)) & fids.SIGNATURE_V2 == 1153447759131936 & fids.SIGNATURE_V2
    with pytest.raises(InvalidRequestError, match="not 7"):
        fids.city_hash64(bytes(7))


# ---- names ---------------------------------------------------------------------------------------------------------


def test_the_registry_comes_before_the_list_and_the_list_before_numbers():
    conf = FeatureList.parse(["feature_name=fc_page slot=305", "feature_name=slot_7 slot=9"])
    names = SlotNames(feature_list=conf)
    names.register({"page": 1})
    names.register([4])
    assert [names.slot_of(name) for name in ("page", "fc_page", "slot_7", "slot_4", "slot_8", "new", "new")] == [
        *(1, 305, 9, 4, 8),
        *(1, 1),
    ]
    assert (names.name_of(305), names.name_of(8)) == ("fc_page", "slot_8")
    with pytest.raises(InvalidRequestError, match="slot 40000 is outside"):
        names.register({"x": 40000})


def test_two_registries_share_nothing():
    first, second = SlotNames(), SlotNames(tob=True)
    assert (first.slot_of("a"), first.slot_of("b"), second.slot_of("b")) == (1, 2, 1)
    assert (first.name_of(3), second.name_of(3)) == ("slot_3", "fc_slot_3")


def test_a_mapper_judges_what_was_registered_before_the_mapping():
    mapper = FeatureNameMapper(enabled=True)
    assert mapper.register_names(["a", "x"])
    assert not mapper.available
    assert not mapper.set_mapping({"a": 1})
    assert not mapper.available
    assert mapper.find("a") is None
    assert mapper.set_mapping({"a": 1, "x": 2, "y": 3})
    assert mapper.available
    assert mapper.register_ids([(99, 3)])
    assert not mapper.register_ids([(98, 99)])
    assert not mapper.register_names(["nobody"])
    assert {name: mapper.find(name) for name in ("a", "x", "y", "z")} == {"a": 1, "x": 2, "y": 3, "z": None}
    assert not FeatureNameMapper().available


def test_feature_lists_name_the_line_that_is_wrong():
    with pytest.raises(DataError, match="conf: line 2: slot='x' is no integer"):
        FeatureList.parse(["# fine", "feature_name=a slot=x"], source="conf")
    with pytest.raises(DataError, match="line 1: .*feature_name"):
        FeatureList.parse(["slot=3"])


def test_short_names_drop_the_prefix_of_each_term():
    cases = {"fc_A-fc_b": "a-b", "f_page": "page", "plain": "plain", "fc_x-y": "x-y", "f_a-f_b": "a-b"}
    for full, short in cases.items():
        assert Feature(feature_name=full).name == short


def test_values_run_to_the_next_key():
    line = 'feature_name=f; depend=a b,c ; args=1,"x y", method=Fast shared=T slot=3 cache_keys=u,v need_raw=no x=1'
    conf = FeatureList.parse([line, "cache_name=c; cache_column=uid; capacity=10", "cache_column: gid"])
    feature = conf["f"]
    assert (feature.depend, feature.args, feature.method) == (("a b", "c"), ("1", "x y"), "Fast")
    assert (feature.shared, feature.slot, feature.cache_keys, feature.need_raw) == (True, 3, ("u", "v"), False)
    assert (conf.caches["c"].capacity, conf.caches["cache_column"].cache_column) == (10, "gid")
    assert "f" in conf
    assert 4 not in conf
    with pytest.raises(InvalidRequestError, match="slot 4"):
        conf[4]


# ---- tf.Example ----------------------------------------------------------------------------------------------------

SERIALIZED = bytes.fromhex(
    "0a360a0a0a016112051a030a01030a0d0a0162120812060a040000d0400a0a0a016312050a030a01780a0d0a0179120812060a040000803e"
)


def test_a_tf_example_becomes_an_example():
    example = tf_example_to_example(SERIALIZED, {"a": 1, "b": 2}, ["c"], "y")
    found = {each.name: (each.id, each.feature) for each in example.named_feature}
    assert (found["a"][0], list(found["a"][1].fid_v2_list.value)) == (1, [281474976710659])
    assert list(found["b"][1].fid_v2_list.value) == [562949953421314]
    assert list(found["c"][1].bytes_list.value) == [b"x"]
    assert (list(example.label), example.instance_weight) == ([0.25], 1.0)


def test_converted_records_keep_where_they_came_from():
    converter = TFExampleConverter(sparse_features={"a": 1}, dense_features=["c"], label="y")
    assert converter.as_proto().SerializeToString(deterministic=True).hex() == "0a050a016110011201631a01792200"
    records = Records.of([SERIALIZED, SERIALIZED], "plaintext", source="f")
    made = converter.convert_records(records)
    assert (made.kind, made.where(1)) == ("example", records.where(1))
    assert list(Example.FromString(made.payload(1)).label) == [0.25]
    with pytest.raises(DataError, match=r"f: record 0, byte 0: no tf\.Example"):
        converter.convert_records(Records.of([b"\xff"], "plaintext", source="f"))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"sparse_features": {"a": 0}}, "slot 0 of 'a'"),
        ({"sparse_features": {"a": 1}, "label": "a"}, "label='a'"),
        ({"sparse_features": {}, "dense_features": ["w"], "instance_weight": "w"}, "instance_weight='w'"),
    ],
)
def test_converters_that_cannot_be_are_refused(options, wrong):
    with pytest.raises(InvalidRequestError, match=wrong):
        TFExampleConverter(**options)


# ---- strings -------------------------------------------------------------------------------------------------------


def test_strings_are_records_with_the_source_of_their_channel():
    example = Example(line_id=LineId(chnid=7))
    named = Example()
    named.named_feature.add(name="__LINE_ID__").feature.bytes_list.value.append(LineId(chnid=8).SerializeToString())
    options = {"chnids": [7, 8], "datasources": ["pc", "1"], "default_datasource": "3"}
    strings = [example.SerializeToString(), named.SerializeToString(), b""]
    records, present = string_to_variant(strings, "example", **options)
    assert records.payloads() == strings
    assert records.source_keys.tolist() == [914176, 12544, 13056]
    assert present.tolist() == [True, True, False]
    batches, _ = string_to_variant([b""], "examplebatch", **options)
    assert batches.source_keys.tolist() == [0]


def test_strings_that_are_damaged_are_named():
    with pytest.raises(DataError, match="record 1, byte 9: the data ends inside"):
        string_to_variant([struct.pack("<Q", 1) + b"a", b"x"], "instance", has_header=True, framing=Framing())
    with pytest.raises(DataError, match="record 0, byte 0: cannot be parsed as instance"):
        string_to_variant([b"\xff"], "instance", chnids=[1], datasources=["a"])
    with pytest.raises(InvalidRequestError, match="chnids has 1 members and datasources 0"):
        string_to_variant([], "instance", chnids=[1])
    whole = Instance(fid=[1]).SerializeToString()
    records, _ = string_to_variant([struct.pack("<Q", len(whole)) + whole + b"more"], "instance", has_header=True)
    assert records.payloads() == [whole]

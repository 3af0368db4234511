"""Filters of samples against their twins in tests/naive_samples.py, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive_samples as naive
from trilith.data.fids import make_fid_v1, make_fid_v2
from trilith.data.messages import read_message
from trilith.data.records import Kind, Records
from trilith.data.samples import (
    AddAction,
    AddLabel,
    FilterByFeatureValue,
    FilterByFids,
    FilterByLabel,
    FilterByValue,
    NegativeSample,
    SampleOp,
    SpecialStrategy,
    apply_ops,
    relate,
)
from trilith.data.samples.chunk import default_ordinals
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example, Feature, FidList, FilterValues
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

SMALL = st.integers(-2, 4)
V1 = st.builds(make_fid_v1, st.integers(0, 3), st.integers(0, 2))
V2 = st.builds(make_fid_v2, st.integers(1, 4), st.integers(0, 2))
ACTIONS = st.lists(st.integers(-1, 3), max_size=4)


@st.composite
def line_ids(draw):
    line_id = LineId(
        actions=draw(ACTIONS), pre_actions=draw(ACTIONS), special_strategies=draw(st.lists(SMALL, max_size=3))
    )
    for name, values in {
        "uid": st.integers(0, 2**64 - 1) | st.integers(0, 4),
        "req_time": SMALL,
        "chnid": SMALL,
        "rank": SMALL,
        "sample_rate": st.sampled_from([0.0, 0.1, 0.5, 1.0, float("nan")]),
        "device_type": st.sampled_from(["", "a", "ab", "b", "é"]),
    }.items():
        value = draw(st.none() | values)
        if value is not None:
            setattr(line_id, name, value)
    return line_id


@st.composite
def instances(draw):
    message = Instance(fid=draw(st.lists(V1, max_size=4)), label=draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]))))
    for _ in range(draw(st.integers(0, 2))):
        message.feature.add(name=draw(st.sampled_from(["f", "g"])), fid=draw(st.lists(V2, max_size=3)))
    if draw(st.booleans()):
        message.line_id.CopyFrom(draw(line_ids()))
    return message


FEATURES = st.one_of(
    st.just(Feature()),
    st.builds(lambda fids: Feature(fid_v1_list=FidList(value=fids)), st.lists(V1, max_size=3)),
    st.builds(lambda fids: Feature(fid_v2_list=FidList(value=fids)), st.lists(V2, max_size=3)),
    st.builds(lambda values: Feature(int64_list={"value": values}), st.lists(SMALL, max_size=3)),
    st.builds(lambda values: Feature(float_list={"value": values}), st.lists(st.sampled_from([0.1, 1.0]), max_size=2)),
    st.builds(lambda values: Feature(double_list={"value": values}), st.lists(st.sampled_from([0.1, 1.0]), max_size=2)),
    st.builds(lambda values: Feature(bytes_list={"value": values}), st.lists(st.sampled_from([b"", b"a"]), max_size=2)),
    st.builds(lambda value: Feature(int64_value=value), SMALL),
)


@st.composite
def examples(draw):
    message = Example(label=draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]))))
    for name in draw(st.permutations(["f", "g", "h"]))[: draw(st.integers(0, 3))]:
        message.named_feature.add(name=name).feature.CopyFrom(draw(FEATURES))
    if draw(st.booleans()):
        message.line_id.CopyFrom(draw(line_ids()))
    return message


CHUNKS = st.lists(instances(), min_size=1, max_size=6) | st.lists(examples(), min_size=1, max_size=6)


def chunk(messages) -> Records:
    return Records.of([each.SerializeToString() for each in messages], messages[0].DESCRIPTOR.name.lower())


def kept(op: SampleOp, messages) -> list[bool]:
    numbers = set(op(chunk(messages)).numbers.tolist())
    return [number in numbers for number in range(len(messages))]


# ---- fids ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    messages=CHUNKS,
    fids=st.fixed_dictionaries(
        {name: st.lists(V1 | V2, max_size=3) for name in ("filter_fids", "has_fids", "select_fids")}
    ),
    slots=st.lists(st.integers(1, 4), max_size=2),
    actions=ACTIONS,
    req_time_min=st.integers(-1, 1),
)
def test_filter_by_fids_matches_naive(messages, fids, slots, actions, req_time_min):
    conditions = {**fids, "select_slots": slots, "has_actions": actions, "req_time_min": req_time_min}
    assert kept(FilterByFids(**conditions), messages) == [naive.filter_by_fids(each, **conditions) for each in messages]


def test_every_condition_on_fids_alone_matches_naive():
    one = [make_fid_v1(1, 1)]
    messages = [Instance(fid=one), Instance(), Instance(fid=[*one, make_fid_v1(2, 0)])]
    for name in ("filter_fids", "has_fids", "select_fids"):
        op = FilterByFids(**{name: one})
        assert kept(op, messages) == [naive.filter_by_fids(each, **{name: one}) for each in messages]


@pytest.mark.parametrize(
    ("name", "value"), [("has_fids", 2**64), ("select_fids", -1), ("select_slots", 0), ("has_actions", 2**31)]
)
def test_a_condition_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=name):
        FilterByFids(**{name: [value]})


# ---- values ----------------------------------------------------------------------------------------------------------

SINGLE = st.sampled_from(["gt", "ge", "eq", "lt", "le", "neq"])
MEMBERSHIP = st.sampled_from(["in", "not-in"])
FLOATS = st.sampled_from([0.0, 0.1, 0.5, 1.0])
STRINGS = st.sampled_from(["", "a", "ab", "b", "é"])


def relations(values, *, lists=True, affixes=False):
    options = [
        st.tuples(SINGLE, values),
        st.tuples(st.just("between"), st.lists(values, min_size=2, max_size=2)),
        st.tuples(MEMBERSHIP, st.lists(values, max_size=3) if lists else values),
    ]
    if affixes:
        options.append(st.tuples(st.sampled_from(["startswith", "endswith"]), values | st.lists(values, max_size=2)))
    return st.one_of(options)


SCALARS = st.one_of(
    st.tuples(st.sampled_from(["req_time", "chnid", "rank"]), relations(SMALL)),
    st.tuples(st.just("uid"), relations(st.integers(0, 4) | st.integers(0, 2**64 - 1))),
    st.tuples(st.just("sample_rate"), relations(FLOATS, lists=False)),
    st.tuples(st.just("device_type"), relations(STRINGS, affixes=True)),
)


def listed(operand, domain) -> list:
    operands = operand if isinstance(operand, list) else [operand]
    if domain == "float":
        return [float(np.float32(each)) for each in operands]
    return [each.encode() if isinstance(each, str) else each for each in operands]


@settings(max_examples=60)
@given(messages=CHUNKS, field_and_relation=SCALARS)
def test_filter_by_a_scalar_matches_naive(messages, field_and_relation):
    field, (op, operand) = field_and_relation
    operands = listed(operand, "float" if field == "sample_rate" else "")
    wanted = []
    for message in messages:
        value = getattr(message.line_id, field)
        wanted.append(naive.compare(op, value.encode() if isinstance(value, str) else value, operands))
    assert kept(FilterByValue(field, op, operand), messages) == wanted


@settings(max_examples=60)
@given(
    messages=CHUNKS,
    field=st.sampled_from(["actions", "pre_actions", "special_strategies"]),
    op=st.sampled_from(["any", "all", "diff"]),
    operands=ACTIONS,
    keep_empty=st.booleans(),
)
def test_filter_by_a_list_matches_naive(messages, field, op, operands, keep_empty):
    wanted = []
    for message in messages:
        values = list(getattr(message.line_id, field))
        wanted.append(naive.compare_sets(op, values, operands) if values else keep_empty)
    assert kept(FilterByValue(field, op, operands, keep_empty=keep_empty), messages) == wanted


def test_a_list_takes_a_single_operand_too():
    messages = [Instance(line_id=LineId(actions=[1, 2])), Instance(line_id=LineId(actions=[3]))]
    assert kept(FilterByValue("actions", "any", 2), messages) == [True, False]


@pytest.mark.parametrize(
    ("field", "op", "operand", "why"),
    [
        ("actions", "in", [1], "op of 'actions'"),
        ("rank", "any", [1], "op of 'rank'"),
        ("rank", "startswith", 1, "op of 'rank'"),
        ("rank", "xx", 1, "op of 'rank' is 'xx'"),
        ("rank", "eq", None, "operand or operand_filepath"),
        ("rank", "eq", [1], "operand of 'rank'"),
        ("rank", "eq", 1.5, "operand of 'rank'"),
        ("rank", "eq", 2**63, "operand of 'rank'"),
        ("rank", "eq", True, "operand of 'rank'"),
        ("rank", "in", 1, "operand of 'rank'"),
        ("rank", "between", [1], "operand of 'rank'"),
        ("sample_rate", "eq", "1", "operand of 'sample_rate'"),
        ("sample_rate", "in", [1.0], "operand of 'sample_rate'"),
        ("user_id", "eq", 1, "operand of 'user_id'"),
        ("is_draw", "eq", 1, "field_name is 'is_draw'"),
        ("nope", "eq", 1, "'nope'"),
    ],
)
def test_a_relation_that_says_nothing_is_refused_with_its_field(field, op, operand, why):
    with pytest.raises(InvalidRequestError, match=why):
        FilterByValue(field, op, operand)


def write_values(path, **values) -> str:
    path.write_bytes(FilterValues(**values).SerializeToString())
    return str(path)


def test_operands_come_from_a_file_that_is_read_when_first_used(tmp_path):
    path = tmp_path / "values"
    op = FilterByValue("chnid", "not-in", operand_filepath=str(path))
    write_values(path, int64_list={"value": [3, -1, 3]})
    messages = [Instance(line_id=LineId(chnid=each)) for each in (3, 4, -1)]
    assert kept(op, messages) == [False, True, False]
    path.unlink()
    assert kept(op, messages) == [False, True, False]


def test_a_file_of_operands_that_does_not_fit_is_refused(tmp_path):
    path = write_values(tmp_path / "values", int64_list={"value": [1]})
    message = Instance(line_id=LineId(cid="a"))
    with pytest.raises(InvalidRequestError, match="bytes_list"):
        FilterByValue("cid", "in", operand_filepath=path).on(message)
    with pytest.raises(InvalidRequestError, match="in and not-in"):
        FilterByValue("chnid", "gt", operand_filepath=path)
    with pytest.raises(InvalidRequestError, match="both are given"):
        FilterByValue("chnid", "in", [1], operand_filepath=path)
    with pytest.raises(InvalidRequestError, match="no such file"):
        FilterByValue("chnid", "in", operand_filepath=str(tmp_path / "none")).on(message)
    (tmp_path / "bad").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match="FilterValues"):
        FilterByValue("chnid", "in", operand_filepath=str(tmp_path / "bad")).on(message)
    with pytest.raises(InvalidRequestError, match="operand_filepath"):
        FilterByFeatureValue("f", "in", operand_filepath=path, field_type="double")


FEATURE_RELATIONS = st.one_of(
    st.tuples(st.just("int64"), relations(SMALL) | st.tuples(st.sampled_from(["any", "all", "diff"]), ACTIONS)),
    st.tuples(st.just("float"), relations(FLOATS, lists=False)),
    st.tuples(st.just("double"), relations(FLOATS, lists=False)),
    st.tuples(st.just("bytes"), relations(STRINGS, affixes=True)),
)


@settings(max_examples=60)
@given(
    messages=st.lists(examples(), min_size=1, max_size=6),
    name=st.sampled_from(["f", "g"]),
    typed_relation=FEATURE_RELATIONS,
    keep_empty=st.booleans(),
)
def test_filter_by_feature_value_matches_naive(messages, name, typed_relation, keep_empty):
    kind, (op, operand) = typed_relation
    filter_ = FilterByFeatureValue(name, op, operand, field_type=kind, keep_empty=keep_empty)
    operands = listed(operand, kind)
    wanted = [naive.filter_by_feature_value(each, name, op, operands, kind, keep_empty) for each in messages]
    assert kept(filter_, messages) == wanted


def test_the_last_feature_of_a_name_counts():
    message = Example()
    for value in (1, 2):
        message.named_feature.add(name="f").feature.int64_list.value.append(value)
    assert FilterByFeatureValue("f", "eq", 2, field_type="int64").on(message)
    assert not FilterByFeatureValue("f", "eq", 1, field_type="int64").on(message)


@pytest.mark.parametrize("kind", ["float", "double"])
def test_a_feature_that_is_a_float_can_be_in_a_list(kind):
    message = Example()
    getattr(message.named_feature.add(name="f").feature, f"{kind}_list").value.append(0.1)
    assert FilterByFeatureValue("f", "in", [2.0, 0.1], field_type=kind).on(message)
    assert not FilterByFeatureValue("f", "not-in", [2.0, 0.1], field_type=kind).on(message)
    assert not FilterByFeatureValue("f", "in", [2.0], field_type=kind).on(message)


def test_features_of_instances_are_not_filtered_by_value():
    with pytest.raises(InvalidRequestError, match="Examples"):
        FilterByFeatureValue("f", "eq", 1, field_type="int64").on(Instance())


@pytest.mark.parametrize(("op", "kind"), [("any", "float"), ("eq", "bool"), ("startswith", "int64")])
def test_a_feature_filter_that_says_nothing_is_refused(op, kind):
    with pytest.raises(InvalidRequestError, match="op of 'f'|field_type"):
        FilterByFeatureValue("f", op, 1, field_type=kind)


@pytest.mark.parametrize(
    ("op", "value", "operands", "result"),
    [
        ("gt", 1, [0], True),
        ("gt", 1, [1], False),
        ("le", "1", ["1"], True),
        ("between", 1, [0, 1], False),
        ("between", 1, [1, 2], True),
        ("in", "1", ["1", "2"], True),
        ("between", "10", ["1", "2"], True),
        ("ge", 0.1, [np.float32(0.1)], True),
        ("endswith", b"ab\0", [b"\0"], True),
    ],
)
def test_relations_of_single_values(op, value, operands, result):
    assert relate(op, value, operands) is result


# ---- labels ----------------------------------------------------------------------------------------------------------


@given(
    messages=CHUNKS,
    thresholds=st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.5]), max_size=3),
    filter_equal=st.booleans(),
)
def test_filter_by_label_matches_naive(messages, thresholds, filter_equal):
    wanted = [naive.filter_by_label(list(each.label), thresholds, filter_equal) for each in messages]
    assert kept(FilterByLabel(thresholds, filter_equal), messages) == wanted


# ---- chance ----------------------------------------------------------------------------------------------------------


def share_kept(op, message, draws=2000) -> float:
    return len(op(chunk([message] * draws))) / draws


def test_negatives_are_dropped_at_the_rate_of_their_most_prior_action():
    op = NegativeSample(
        drop_rate=0.88,
        threshold=0.5,
        action_priority="2,3,4,1,5,6,-7",
        per_action_drop_rate="1:1.0,2:0.0,3:1.0,5:0.22,-7:0.0",
    )

    def share(label, *actions):
        return share_kept(op, Instance(label=label, line_id=LineId(actions=actions)))

    assert share([1.0], 3) == 1.0
    assert share([0.0], 1, 2, 3) == 1.0  # the rate of 2
    assert share([0.0], 1, 3) == 0.0  # the rate of 3
    assert share([0.0], 5, 6) == pytest.approx(0.78, abs=0.04)
    assert share([0.0], 6) == pytest.approx(0.12, abs=0.04)  # listed without a rate
    assert share([0.0], 10, 11) == pytest.approx(0.12, abs=0.04)  # not listed
    assert share([0.0], -7) == pytest.approx(0.12, abs=0.04)  # not above 0
    assert share([]) == pytest.approx(0.12, abs=0.04)


@pytest.mark.parametrize(("rate", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_rates_of_nothing_and_everything_are_exact(rate, share):
    assert share_kept(NegativeSample(drop_rate=rate), Instance(label=[-1.0])) == share


STRATEGIES = st.dictionaries(st.integers(-2, 4), st.tuples(st.sampled_from([0.0, 1.0]), st.just(9.0)), max_size=3)


@settings(max_examples=60)
@given(messages=CHUNKS, listed_=st.lists(SMALL, max_size=3), conf=STRATEGIES, keep_empty=st.booleans())
def test_special_strategy_matches_naive(messages, listed_, conf, keep_empty):
    text = ",".join(f"{strategy}:{rate}:{label}" for strategy, (rate, label) in conf.items())
    op = SpecialStrategy(strategy_list=listed_, strategy_conf=text, keep_empty_strategy=keep_empty)
    for message in messages:
        keep, label = naive.special_strategy(list(message.line_id.special_strategies), listed_, conf, keep_empty)
        made = op.on(message)
        assert bool(made) == keep
        if made:
            wanted = list(message.label)
            if label is not None and wanted:
                wanted[0] = label
            assert list(made[0].label) == wanted


def test_special_strategies_are_kept_at_their_rate():
    op = SpecialStrategy(strategy_list=[5], strategy_conf="5:0.25")
    share = share_kept(op, Instance(line_id=LineId(special_strategies=[5])))
    assert share == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("cls", "arguments", "why"),
    [
        (NegativeSample, {"drop_rate": 1.5}, "drop_rate has 1.5"),
        (NegativeSample, {"drop_rate": 1, "label_index": -1}, "label_index"),
        (NegativeSample, {"drop_rate": 1, "action_priority": "1,x"}, "action_priority"),
        (NegativeSample, {"drop_rate": 1, "per_action_drop_rate": "1"}, "per_action_drop_rate"),
        (NegativeSample, {"drop_rate": 1, "per_action_drop_rate": "1:2"}, "per_action_drop_rate"),
        (SpecialStrategy, {"strategy_list": [1], "strategy_conf": "1:2"}, "strategy_conf"),
        (SpecialStrategy, {"strategy_list": [1], "strategy_conf": "1"}, "strategy_conf"),
        (SpecialStrategy, {"strategy_list": [1], "strategy_conf": "1:1:1,2:1"}, "label"),
    ],
)
def test_rates_that_make_no_sense_are_refused_by_name(cls, arguments, why):
    with pytest.raises(InvalidRequestError, match=why):
        cls(**arguments)


def test_draws_depend_on_the_record_and_not_on_the_chunk_it_comes_in():
    records = Records.of([Instance(label=[-1.0]).SerializeToString()] * 64, "instance", source="a")
    op = NegativeSample(drop_rate=0.5, seed=3)
    whole = op(records).numbers.tolist()
    parts = [op(records.take(slice(start, start + 10))).numbers.tolist() for start in range(0, 64, 10)]
    assert [number for part in parts for number in part] == whole
    assert NegativeSample(drop_rate=0.5, seed=4)(records).numbers.tolist() != whole
    other = Records.of(records.payloads(), "instance", source="b")
    assert op(other).numbers.tolist() != whole
    assert op(records, np.arange(64) + 1000).numbers.tolist() != whole


def test_rows_of_one_batch_draw_apart():
    records = chunk([Instance()] * 3).take(np.array([0, 0, 1, 1, 1, 2]))
    assert len(set(default_ordinals(records).tolist())) == 6


# ---- chunks ----------------------------------------------------------------------------------------------------------


def test_ops_in_a_chain_see_what_those_before_them_kept_and_changed():
    messages = [Instance(label=[each], line_id=LineId(chnid=each, special_strategies=[1])) for each in range(4)]
    ops = [
        FilterByValue("chnid", "ge", 1),
        SpecialStrategy(strategy_list=[1], strategy_conf="1:1:7"),
        FilterByLabel([7.0]),
        FilterByValue("chnid", "lt", 3),
    ]
    made = apply_ops(ops, chunk(messages))
    assert made.numbers.tolist() == [1, 2]
    assert [list(Instance.FromString(each).label) for each in made.payloads()] == [[7.0], [7.0]]


def test_an_action_that_one_op_adds_is_seen_by_the_next():
    ops = [AddAction("chnid", "eq", 1, 9), FilterByFids(has_actions=[9]), FilterByValue("actions", "all", [9])]
    messages = [Instance(line_id=LineId(chnid=each)) for each in (0, 1)]
    assert apply_ops(ops, chunk(messages)).numbers.tolist() == [1]


def test_one_chain_may_read_a_feature_as_floats_and_as_doubles():
    messages = [Example(), Example()]
    messages[0].named_feature.add(name="f").feature.float_list.value.append(1.0)
    messages[1].named_feature.add(name="f").feature.double_list.value.append(1.0)
    ops = [
        FilterByFeatureValue("f", "eq", 1.0, field_type="float", keep_empty=True),
        FilterByFeatureValue("f", "neq", 1.0, field_type="double", keep_empty=True),
    ]
    assert apply_ops(ops, chunk(messages)).numbers.tolist() == [0]


def test_what_reserved_features_say_is_written_once():
    example = Example(label=[5.0])
    example.named_feature.add(name="__LABEL__").feature.float_list.value.append(2.0)
    line_id = LineId(uid=7, actions=[1], user_id="u")
    example.named_feature.add(name="__LINE_ID__").feature.bytes_list.value.append(line_id.SerializeToString())
    made = AddLabel("1::1", 0.0, 0.5)(chunk([example]))
    read = read_message(made, 0)
    assert list(read.label) == [5.0, 2.0, 1.0]
    line_id.sample_rate = 0.5
    assert read.line_id == line_id


def test_no_ops_and_no_records_change_nothing():
    records = chunk([Instance()])
    assert apply_ops([], records) is records
    assert len(FilterByLabel([0.0])(records.take(slice(0, 0)))) == 0


def test_ops_refuse_what_are_no_samples():
    with pytest.raises(InvalidRequestError, match="plaintext"):
        FilterByLabel([0.0])(Records.of([b""], Kind.PLAINTEXT))


def test_a_damaged_record_is_named_or_left_out():
    payloads = [Instance(label=[each]).SerializeToString() for each in (1.0, 2.0, 3.0)]
    payloads[1] = b"\x1a\xff"
    records = Records.of(payloads, "instance", source="part-0")
    with pytest.raises(DataError, match="part-0: record 1"):
        FilterByLabel([0.0])(records)
    lost: list[int] = []
    made = apply_ops([FilterByLabel([2.5])], records, np.arange(3), on_error="skip", lost=lost.append)
    assert (made.numbers.tolist(), lost) == ([2], [1])


def test_each_record_needs_an_ordinal():
    with pytest.raises(InvalidRequestError, match="2 ordinals for 1 records"):
        NegativeSample(drop_rate=0.5)(chunk([Instance()]), np.arange(2))


def test_reserved_features_count_in_records_and_not_in_messages():
    example = Example()
    example.named_feature.add(name="__LABEL__").feature.float_list.value.append(2.0)
    assert kept(FilterByLabel([1.0]), [example]) == [True]
    assert FilterByLabel([1.0]).on(example) == []


def test_a_single_value_has_no_relation_of_sets():
    with pytest.raises(InvalidRequestError, match="'any'"):
        relate("any", 1, [1])

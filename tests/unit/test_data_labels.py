"""Label and action ops, reweighting and label configs against their twins in tests/naive_samples.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_samples as naive
from trilith.data.records import Records
from trilith.data.samples import (
    INVALID_LABEL,
    AddAction,
    AddLabel,
    FillMultiRankOutput,
    LabelNormalization,
    LabelUpperBound,
    MultiLabelGen,
    ScatterLabel,
    UseFieldAsLabel,
    apply_ops,
)
from trilith.data.samples.label_conf import TaskLabel, label_conf, parse_tasks, tasks_of
from trilith.data.samples.reweight import MAX_COPIES, InstanceReweight
from trilith.data.samples.rows import Priorities
from trilith.errors import InvalidRequestError
from trilith_proto.example_pb2 import Example
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

ACTIONS = st.lists(st.integers(-1, 4), max_size=4)
LABELS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 9.0]), max_size=3)
FLOAT_MIN = float(INVALID_LABEL)


@st.composite
def chunks(draw):
    """Samples of one kind."""
    cls = draw(st.sampled_from([Instance, Example]))
    messages = []
    for _ in range(draw(st.integers(1, 5))):
        message = cls(label=draw(LABELS))
        if draw(st.booleans()):
            message.line_id.CopyFrom(
                LineId(
                    actions=draw(ACTIONS),
                    pre_actions=draw(ACTIONS),
                    chnid=draw(st.integers(-1, 4)),
                    device_type=draw(st.sampled_from(["ios", "android", ""])),
                )
            )
        messages.append(message)
    return messages


def changed(op, messages) -> list:
    cls = type(messages[0])
    records = Records.of([each.SerializeToString() for each in messages], cls.DESCRIPTOR.name.lower())
    return [cls.FromString(payload) for payload in op(records).payloads()]


def labels_of(messages) -> list[list[float]]:
    return [list(each.label) for each in messages]


def one(op, **fields):
    (made,) = op.on(Instance(**fields))
    return made


# ---- tasks of actions ------------------------------------------------------------------------------------------------


@st.composite
def tasks(draw):
    positive = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
    negative = draw(st.lists(st.integers(3, 4), max_size=2))
    return positive, negative, draw(st.sampled_from([0.0, 1.0]))


@given(messages=chunks(), configured=st.lists(tasks(), min_size=1, max_size=3))
def test_add_label_matches_naive(messages, configured):
    text = ";".join(f"{','.join(map(str, pos))}:{','.join(map(str, neg))}:{rate}" for pos, neg, rate in configured)
    made = changed(AddLabel(text, -2.0, 0.25), messages)
    wanted = [naive.add_label(each.label, each.line_id.actions, configured, -2.0) for each in messages]
    assert labels_of(made) == wanted
    assert all(each.line_id.sample_rate == 0.25 for each in made)


def test_a_negative_is_labelled_at_the_rate_of_its_task():
    records = Records.of([Instance(line_id=LineId(actions=[5])).SerializeToString()] * 2000, "instance")
    made = AddLabel("1::0.3;2::0.3", 0.0, 1.0)(records)
    drawn = np.array([list(Instance.FromString(each).label) for each in made.payloads()]) == 0.0
    assert drawn.mean(axis=0) == pytest.approx([0.3, 0.3], abs=0.04)
    assert drawn.all(axis=1).mean() == pytest.approx(0.09, abs=0.03)  # tasks draw apart


def test_label_conf_keeps_order_and_writes_every_field():
    made = label_conf("1,2:3:1.0;;4::0.5;")
    assert made.SerializeToString().hex() == "0a0b0801080210031d0000803f0a0708041d0000003f"
    assert tasks_of(made.conf) == parse_tasks("1,2:3:1.0;4::0.5")
    assert parse_tasks("-7,-9:-41:0")[0] == TaskLabel(pos_actions=(-7, -9), neg_actions=(-41,), sample_rate=0.0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("", "needs a task"),
        (";", "needs a task"),
        (":1:1.0", "pos_actions is empty"),
        ("1:2:1.5", "sample_rate=1.5"),
        ("1:2", "2 parts"),
        ("1:2:1:1", "4 parts"),
        ("1:1:1.0", "both have 1"),
        ("a:1:1.0", "no pos:neg:rate"),
        ("1:2:", "no pos:neg:rate"),
        ("2147483648::1", "int32"),
    ],
)
def test_a_config_of_tasks_that_makes_no_sense_is_refused(config, why):
    with pytest.raises(InvalidRequestError, match=why):
        label_conf(config)


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_new_sample_rate_is_above_0_and_at_most_1(rate):
    with pytest.raises(InvalidRequestError, match="new_sample_rate"):
        AddLabel("1::1", 0.0, rate)


# ---- labels of heads -------------------------------------------------------------------------------------------------


@given(messages=chunks(), places=st.dictionaries(st.integers(-1, 4), st.integers(0, 4), min_size=1))
def test_scatter_label_matches_naive(messages, places):
    made = changed(ScatterLabel(",".join(f"{channel}:{index}" for channel, index in places.items())), messages)
    assert labels_of(made) == [naive.scatter_label(each.label, each.line_id.chnid, places) for each in messages]


@given(
    messages=chunks(),
    field=st.sampled_from(["chnid", "device_type"]),
    lists=st.none() | st.tuples(st.lists(st.integers(0, 1), min_size=1), st.lists(st.integers(2, 3))),
    priorities=st.lists(st.integers(-1, 4), max_size=4, unique=True),
)
def test_multi_label_gen_matches_naive(messages, field, lists, priorities):
    places = {"0": 2, "3": 0, "03": 1} if field == "chnid" else {"ios": 3, "": 1}
    positive, negative = lists or ([], [])
    op = MultiLabelGen(
        head_to_index=places,
        head_field=field,
        pos_actions=positive,
        neg_actions=negative,
        use_origin_label=lists is None,
        action_priority=",".join(map(str, priorities)),
    )
    wanted = [
        naive.multi_label_gen(
            list(each.label),
            list(each.line_id.actions),
            str(getattr(each.line_id, field)),
            places,
            positive,
            negative,
            priorities,
            lists is None,
        )
        for each in messages
    ]
    assert labels_of(changed(op, messages)) == wanted


@given(rows=st.lists(ACTIONS, max_size=5), priorities=st.lists(st.integers(-1, 4), max_size=5))
def test_most_prior_action_matches_naive(rows, priorities):
    from trilith.ops.ragged import Ragged

    ranks, actions = Priorities(priorities).best(Ragged.of(rows))
    unique = list(dict.fromkeys(priorities))
    assert actions.tolist() == [naive.most_prior(row, unique) or 0 for row in rows]
    assert (ranks < len(unique)).tolist() == [bool(set(row) & set(unique)) for row in rows]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ScatterLabel("100"), "config has '100'"),
        (lambda: ScatterLabel(""), "config is empty"),
        (lambda: ScatterLabel("1:-1"), "config puts 1 at -1"),
        (lambda: MultiLabelGen(head_to_index={}, pos_actions=[1]), "head_to_index is empty"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}, pos_actions=[1], task_num=2), "task_num=2"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}, pos_actions=[1], use_origin_label=True), "use_origin_label"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}), "pos_actions"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}, pos_actions=[1], head_field="actions"), "head_field"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}, pos_actions=[1], head_field="sample_rate"), "head_field"),
        (lambda: MultiLabelGen(head_to_index={"1": 2}, pos_actions=[1], action_priority="x"), "action_priority"),
    ],
)
def test_heads_that_make_no_sense_are_refused_by_name(make, why):
    with pytest.raises(InvalidRequestError, match=why):
        make()


# ---- other changes ---------------------------------------------------------------------------------------------------


def test_add_action_appends_where_the_relation_holds():
    op = AddAction("req_time", "between", [5, 7], 2)
    messages = [Instance(line_id=LineId(req_time=each, actions=[1])) for each in (4, 5, 6, 7)]
    assert [list(each.line_id.actions) for each in changed(op, messages)] == [[1], [1, 2], [1, 2], [1]]
    assert list(one(AddAction("user_id", "in", ["a"], -3), line_id=LineId(user_id="a")).line_id.actions) == [-3]
    assert list(one(AddAction("uid", "eq", 2**63 + 1, 9), line_id=LineId(uid=2**63 + 1)).line_id.actions) == [9]


@pytest.mark.parametrize("field", ["actions", "no_such_field"])
def test_add_action_leaves_lists_and_unknown_fields_alone(field):
    message = Instance(line_id=LineId(actions=[1]))
    assert AddAction(field, "eq", 1, 2).on(message) == [message]


@pytest.mark.parametrize(("op", "action", "why"), [("any", 1, "op is 'any'"), ("eq", 2**31, "int32")])
def test_add_action_refuses(op, action, why):
    with pytest.raises(InvalidRequestError, match=why):
        AddAction("rank", op, 1, action)


def test_labels_are_bounded_where_there_are_enough():
    op = LabelUpperBound([0.5, 0.5])
    assert labels_of(changed(op, [Instance(label=[0.0, 1.0, 1.0]), Instance(label=[9.0])])) == [[0.0, 0.5, 1.0], [9.0]]


@pytest.mark.parametrize(
    ("method", "value", "wanted"),
    [
        ("log", 1.0, [-math.inf, 0.0, math.log(4.0)]),
        ("scale", 2.0, [-1.75, 0.0, 1.5]),
        ("scale2int", 2.0, [-1.0, 0.0, 1.0]),
        ("pow", 2.0, [6.25, 1.0, 16.0]),
        ("repow", 2.0, [0.0, 0.0, 9.0]),
        ("scalelog", 3.0, [-math.inf, 0.0, math.log(2.0)]),
    ],
)
def test_labels_are_normalised(method, value, wanted):
    made = one(LabelNormalization([method], [value]), label=[-3.5, 0.0, 3.0])
    np.testing.assert_allclose(made.label, wanted, rtol=1e-6)


def test_normalisations_run_in_order():
    assert list(one(LabelNormalization(["scale", "repow"], [0.5, 3]), label=[2.0]).label) == [64.0]


@pytest.mark.parametrize(("methods", "values"), [(["nope"], [1.0]), (["log"], [])])
def test_a_normalisation_that_is_unknown_or_has_no_value_is_refused(methods, values):
    with pytest.raises(InvalidRequestError, match="norm_"):
        LabelNormalization(methods, values)


def test_a_field_becomes_the_least_label():
    line_id = LineId(sample_rate=0.5)
    assert list(one(UseFieldAsLabel("sample_rate"), label=[-1.0, 1.0], line_id=line_id).label) == [0.5, 1.0]
    overwrite = UseFieldAsLabel("sample_rate", overwrite_invalid_value=True, label_threshold=0.4)
    assert list(one(overwrite, label=[-1.0, 1.0], line_id=line_id).label) == [0.0, 1.0]
    assert list(one(UseFieldAsLabel("req_time"), label=[1.0], line_id=LineId(req_time=7)).label) == [7.0]
    for name in ("actions", "user_id", "nope"):
        with pytest.raises(InvalidRequestError, match=name):
            UseFieldAsLabel(name)


def test_ranks_become_the_last_label():
    drawn = FillMultiRankOutput(enable_draw_as_rank=True, enable_chnid_as_rank=True)
    assert list(one(drawn, label=[1.0], line_id=LineId(is_draw=True)).label) == [1.0, 1.0]
    channel = FillMultiRankOutput(enable_chnid_as_rank=True)
    made = changed(channel, [Instance(line_id=LineId(chnid=each)) for each in (0, 1, 7, -1)])
    assert labels_of(made) == [[0.0], [1.0], [2.0], [2.0]]
    ranked = FillMultiRankOutput(enable_lineid_rank_as_rank=True, rank_num=5)
    made = changed(ranked, [Instance(line_id=LineId(rank=each)) for each in (0, 4, 99)])
    assert labels_of(made) == [[0.0], [4.0], [4.0]]
    with pytest.raises(InvalidRequestError, match="enable_draw_as_rank"):
        FillMultiRankOutput()
    with pytest.raises(InvalidRequestError, match="rank_num"):
        FillMultiRankOutput(enable_chnid_as_rank=True, rank_num=0)


def test_a_message_is_copied_and_the_rest_of_it_stays():
    message = Instance(fid=[1], label=[5.0], instance_weight=2.0, line_id=LineId(uid=7, user_id="u", actions=[1]))
    message.feature.add(name="f", fid=[3])
    before = message.SerializeToString()
    (made,) = AddLabel("1::1", 0.0, 0.5).on(message)
    assert message.SerializeToString() == before
    message.label.append(1.0)
    message.line_id.sample_rate = 0.5
    assert made == message


def test_changed_records_know_where_they_came_from():
    records = Records.of([Instance().SerializeToString()] * 3, "instance", source_keys=[256, 512, 768], source="part-0")
    made = apply_ops([AddLabel("1::1", 0.0, 0.5)], records.take([2, 0]))
    assert [made.where(row) for row in range(2)] == [records.where(2), records.where(0)]
    assert made.source_keys.tolist() == [768, 256]


# ---- reweighting -----------------------------------------------------------------------------------------------------

TABLE = st.dictionaries(st.integers(0, 4), st.tuples(st.integers(0, 3), st.integers(-1, 1)), min_size=1)


@given(messages=chunks(), priorities=st.lists(st.integers(0, 4), max_size=4, unique=True), table=TABLE)
def test_reweight_matches_naive(messages, priorities, table):
    op = InstanceReweight(
        ",".join(map(str, priorities)), ",".join(f"{action}:{w}:{label}" for action, (w, label) in table.items())
    )
    wanted = []
    for each in messages:
        copies, label = naive.reweight(
            list(each.label), list(each.line_id.actions), list(each.line_id.pre_actions), priorities, table
        )
        wanted += [label] * copies
    assert labels_of(changed(op, messages)) == wanted


def test_a_weight_that_explodes_is_refused():
    op = InstanceReweight("1", "1:1000:1")
    message = Instance(label=[1.0], line_id=LineId(actions=[1] * 200))
    with pytest.raises(InvalidRequestError, match=f"record 0.*at most {MAX_COPIES}"):
        op.on(message)
    message.line_id.pre_actions[:] = [2] * 200
    with pytest.raises(InvalidRequestError, match="copies"):
        InstanceReweight("1,2", "1:1000:1,2:1000:1").on(message)
    assert (
        len(InstanceReweight("1", "1:1000:1,2:0:1").on(Instance(label=[1.0], line_id=LineId(actions=[2] * 200)))) == 0
    )


@pytest.mark.parametrize(
    ("priority", "weights", "why"),
    [("1,a", "1:1:1", "action_priority"), ("1", "", "reweight"), ("1", "1:1", "reweight"), ("1", "1:-1:1", "below 0")],
)
def test_weights_that_make_no_sense_are_refused_by_name(priority, weights, why):
    with pytest.raises(InvalidRequestError, match=why):
        InstanceReweight(priority, weights)


def test_labels_without_meaning_are_the_lowest_float():
    assert labels_of(changed(ScatterLabel("1:0"), [Instance(label=[3.0])])) == [[FLOAT_MIN]]

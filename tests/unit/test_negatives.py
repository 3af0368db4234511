"""Sampled negatives: who is pooled, what is generated, and that every pass draws the same."""

from __future__ import annotations

import os

import numpy as np
import pytest

from trilith.data.messages import message_of
from trilith.data.pipeline.dataset import from_records
from trilith.data.pipeline.positions import from_json, to_json
from trilith.data.records import Kind, Records
from trilith.data.samples.item_pool import ItemPool, PooledItem, worker_identity
from trilith.data.samples.negatives import NegativeConfig
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example
from trilith_proto.proto_parser_pb2 import Instance


def v1(slot, signature):
    return slot << 54 | signature


def instance(item, label, *, actions=(), channel=None):
    made = Instance(label=[label], fid=[v1(1, item), v1(200, 1000 + item)])
    if channel is not None:
        made.fid.append(v1(3, channel))
    made.line_id.item_id = item
    made.line_id.actions.extend(actions)
    return made.SerializeToString()


def example(item, label):
    made = Example(label=[label], data_source_key=7)
    made.named_feature.add(name="user").feature.fid_v2_list.value.append(item)
    made.named_feature.add(name="goods").feature.fid_v2_list.value.append(1000 + item)
    made.named_raw_feature.add(name="raw")
    made.line_id.item_id = item
    return made.SerializeToString()


def run(payloads, kind="instance", *, seed=0, **options):
    options.setdefault("item_features", [200] if kind == "instance" else ["goods"])
    dataset = from_records(payloads, kind).negatives(seed=seed, **options)
    return [message_of(payload, Kind(kind)) for payload in dataset]


def test_a_positive_comes_behind_its_negatives():
    rows = run([instance(1, 1), instance(2, -1), instance(3, 1)], neg_num=2, start_num=0, max_item_num=1)
    assert [(row.line_id.item_id, row.label[0]) for row in rows] == [
        (1, -1), (1, -1), (1, 1), (2, -1), (3, -1), (3, -1), (3, 1),
    ]  # fmt: skip
    assert list(rows[4].fid) == [v1(1, 3), v1(200, 1003)]
    assert [round(row.instance_weight, 4) for row in rows[:3]] == [3, 2, 1]


def test_nothing_is_drawn_before_a_channel_holds_more_than_start_num():
    rows = run([instance(item, 1) for item in range(5)], neg_num=1, start_num=3)
    assert [row.label[0] for row in rows] == [1, 1, 1, -1, 1, -1, 1]


def test_examples_keep_the_user_side_and_lose_raw_features():
    rows = run([example(1, 1), example(2, 1)], "example", neg_num=1, start_num=0, max_item_num=1)
    generated = rows[2]
    assert {each.name: list(each.feature.fid_v2_list.value) for each in generated.named_feature} == {
        "user": [2],
        "goods": [1002],
    }
    assert not generated.named_raw_feature
    assert generated.data_source_key == 0
    assert rows[3].data_source_key == 7


def test_reserved_features_count_as_the_fields_they_name():
    made = Example.FromString(example(1, 0))
    del made.label[:]
    made.named_feature.add(name="__LABEL__").feature.float_list.value.append(1)
    rows = run([made.SerializeToString()], "example", neg_num=1, start_num=0)
    assert [list(row.label) for row in rows] == [[-1], [1]]
    assert all(each.name != "__LABEL__" for row in rows for each in row.named_feature)


def test_the_most_prior_action_decides_who_is_positive():
    payloads = [instance(1, 0, actions=[5, 2]), instance(2, 0, actions=[5]), instance(3, 0)]
    rows = run(payloads, neg_num=1, start_num=0, positive_actions=[2], action_priority="2,5", negative_action=9)
    assert [list(row.line_id.actions) for row in rows] == [[9], [5, 2], [5], []]


def test_channels_do_not_mix_and_channel_0_takes_no_part():
    payloads = [instance(1, 1, channel=4), instance(2, 1, channel=5)]
    rows = run(payloads, neg_num=1, start_num=0, per_channel=True, throw_origin=True)
    assert [row.line_id.item_id for row in rows] == [1, 2]
    zero = Instance(label=[1])
    zero.fid.append(0)
    rows = run([zero.SerializeToString()], neg_num=1, start_num=0, per_channel=True, channel_feature="0")
    assert [row.label[0] for row in rows] == [1]


def test_what_is_not_positive_is_pooled_by_chance():
    negatives = [instance(item, -1) for item in range(2000)]
    pool = ItemPool(0, 10_000)
    list(
        from_records(negatives).negatives(NegativeConfig(cache_only_pos=False, origin_neg_in_pool_proba=0.3), pool=pool)
    )
    assert abs(len(pool.channels[3]) / 2000 - 0.3) < 0.05


def test_draws_are_uniform_and_depend_on_the_seed():
    payloads = [instance(item, 1) for item in range(20)] + [instance(0, 1)] * 1000

    def drawn(seed):
        rows = run(payloads, seed=seed, neg_num=1, start_num=19, throw_origin=True)
        return [row.line_id.item_id for row in rows]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    counts = np.bincount(drawn(1), minlength=20)
    assert (np.abs(counts - 50) < 30).all()


def test_an_iterator_goes_on_with_its_pool():
    payloads = [instance(item % 17, 1 if item % 3 else -1) for item in range(3000)]
    dataset = from_records(payloads).negatives(neg_num=2, start_num=5, max_item_num=9, item_features=[200])
    with dataset.batch(100).iterate() as iterator:
        states, whole = [], []
        for records in iterator:
            whole.append(records.payloads())
            states.append(iterator.state_dict())
    for done in (0, 10, len(states) - 2):
        with dataset.batch(100).iterate(state=from_json(to_json(states[done]))) as again:
            assert [records.payloads() for records in again] == whole[done + 1 :]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"neg_num": 0}, "neg_num=0"),
        ({"start_num": -1}, "start_num=-1"),
        ({"positive_actions": [1], "cache_negative_actions": [1, 2]}, r"actions \[1\]"),
        ({"easy_hard_ratio": 2}, "easy_hard_ratio=2"),
        ({"action_priority": "1,x"}, "x"),
    ],
)
def test_configs_that_make_no_sense_are_refused(options, match):
    with pytest.raises(InvalidRequestError, match=match):
        NegativeConfig(**options)


def test_records_of_other_kinds_and_damaged_ones_are_named():
    with pytest.raises(InvalidRequestError, match="plaintext"):
        run([b"x"], "plaintext")
    with pytest.raises(DataError, match="record 1"):
        list(from_records(Records.of([instance(1, 1), b"\xff\xff"], "instance")).negatives())
    with pytest.raises(InvalidRequestError, match="v1 slots are given as numbers"):
        run([instance(1, 1)], item_features=["goods"])


# ---- the pool's files ------------------------------------------------------------------------------------------------


def filled(channels, items, capacity=100):
    pool = ItemPool(0, capacity)
    for channel in channels:
        for gid in range(items):
            pool.add(channel, PooledItem(gid, (gid << 48,), (), gid + 1, gid))
    return pool


def content(pool):
    return {
        channel: [(item.gid, item.fids, item.origin_cnt, item.sample_cnt) for item in items]
        for channel, items in pool.channels.items()
    }


def test_a_pool_comes_back_from_its_files(tmp_path):
    pool = filled([3, 4, (1 << 64) - 1], 5)
    pool.save(str(tmp_path), 7, nshards=2, worker=1, workers=3)
    assert sorted(os.listdir(tmp_path)) == ["model.ckpt-7_item_pool_1_0_3", "model.ckpt-7_item_pool_1_1_3"]
    again = ItemPool(0, 100)
    assert again.restore(str(tmp_path), 7, nshards=2, worker=4)  # 4 % 3: another number of workers now
    assert content(again) == content(pool)
    small = ItemPool(0, 2)
    small.restore(str(tmp_path), 7, nshards=2, worker=1)
    assert [item.gid for item in small.channels[3]] == [3, 4]


def test_the_newest_save_up_to_the_step_is_restored(tmp_path):
    for step in (5, 10, 20):
        filled([step], 1).save(str(tmp_path), step)
    for step, found in ((20, 20), (19, 10), (10, 10), (7, 5), (100, 20)):
        pool = ItemPool(0, 10)
        assert pool.restore(str(tmp_path), step)
        assert list(pool.channels) == [found]
    pool = ItemPool(0, 10)
    assert not pool.restore(str(tmp_path), 4)
    os.rename(tmp_path / "model.ckpt-5_item_pool_0_0_1", tmp_path / "item_pool_0_0_1")
    assert pool.restore(str(tmp_path), 4)
    assert list(pool.channels) == [5]
    assert not pool.restore(str(tmp_path / "nowhere"), 4)


def test_a_damaged_file_is_named(tmp_path):
    filled([1], 3).save(str(tmp_path), 5)
    path = tmp_path / "model.ckpt-5_item_pool_0_0_1"
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="item_pool_0_0_1"):
        ItemPool(0, 10).restore(str(tmp_path), 5)


def test_workers_are_numbered_behind_the_chief():
    config = '{"cluster": {"chief": ["a"], "worker": ["b", "c"]}, "task": {"type": "%s", "index": %d}}'
    assert worker_identity(None) == (0, 1)
    assert worker_identity(config % ("chief", 0)) == (0, 3)
    assert worker_identity(config % ("worker", 1)) == (2, 3)
    with pytest.raises(InvalidRequestError, match="TF_CONFIG"):
        worker_identity("{")

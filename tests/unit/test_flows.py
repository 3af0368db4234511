"""Flows, small operators, local queues and file patterns."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import numpy as np
import pytest

from trilith.compat.monolith.datasets import (
    DatasetFlags,
    FilePBDataset,
    KafkaDataset,
    ParquetDataset,
    PBDataset,
    create_instance_dataset,
)
from trilith.compat.monolith.operators import cache_one, merged_window
from trilith.data.fids import data_source_key
from trilith.data.formats.files import expand_glob, expand_input_patterns, gen_patterns, match_input_patterns
from trilith.data.formats.framing import Framing
from trilith.data.formats.writers import open_writer
from trilith.data.pipeline import flows
from trilith.data.pipeline.dataset import from_records
from trilith.data.pipeline.flows import with_source_names
from trilith.data.pipeline.queue import LocalFiles, StrQueue
from trilith.data.records import Records
from trilith.errors import DataError, InvalidRequestError, QueueFullError
from trilith.ops.ragged import Ragged
from trilith_proto.example_pb2 import Example
from trilith_proto.proto_parser_pb2 import Instance

NAMES = ["pc", "mobile", "cloud"]


def mixed(count):
    """Records 0, 1, ... of the sources in turn."""
    keys = [data_source_key(NAMES[number % 3]) for number in range(count)]
    payloads = []
    for number in range(count):
        instance = Instance()
        instance.line_id.item_id = number
        payloads.append(instance.SerializeToString())
    return from_records(Records.of(payloads, "instance", source_keys=keys))


def ids(payloads):
    return [Instance.FromString(payload).line_id.item_id for payload in payloads]


def test_every_flow_has_its_records_in_order():
    parts = mixed(30).split(NAMES)
    assert [ids(parts[name]) for name in NAMES] == [list(range(first, 30, 3)) for first in range(3)]
    assert ids(parts["pc"].take(2)) == [0, 3]  # and again, from the beginning


def test_flows_may_be_read_by_threads_of_their_own_with_short_queues():
    parts = mixed(6000).split(NAMES, max_queue_size=2)
    found = {}
    readers = [threading.Thread(target=lambda name=name: found.update({name: ids(parts[name])})) for name in NAMES]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [found[name] for name in NAMES] == [list(range(first, 6000, 3)) for first in range(3)]


def test_a_record_of_no_flow_is_an_error_or_dropped():
    with pytest.raises(DataError, match=r"record 2, byte \d+: data source key .* none of \['pc', 'mobile'\]"):
        list(mixed(9).split(NAMES[:2])["pc"])
    assert ids(mixed(9).split(NAMES[:2], unknown="drop")["mobile"]) == [1, 4, 7]


def test_a_full_flow_that_nobody_reads_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(flows, "_PATIENCE_S", 0.01)
    with pytest.raises(InvalidRequestError, match="which nobody reads"):
        list(mixed(9000).split(NAMES, max_queue_size=10)["pc"])


def test_merged_records_say_where_they_came_from():
    parts = mixed(9).split(NAMES)
    merged = parts["pc"].merge(parts["mobile"], parts["cloud"]).apply(with_source_names)
    messages = [Instance.FromString(payload) for payload in merged]
    assert [message.line_id.item_id for message in messages] == list(range(9))
    wanted = [f"data_source{data_source_key(NAMES[number % 3])}" for number in range(9)]
    assert [message.line_id.data_source_name for message in messages] == wanted


# ---- operators -------------------------------------------------------------------------------------------------------


def test_cache_one_tells_the_last_element():
    assert list(cache_one([1, 2])) == [(1, False), (2, True)]
    assert list(cache_one([])) == []


def test_windows_join_batches_along_their_rows():
    batch = {"x": np.array([[1], [2]]), "r": Ragged.of([[1], [2, 3]]), "s": [b"a", b"b"]}
    (window,) = merged_window([batch, batch, batch])
    assert window["x"].tolist() == [[1], [2], [1], [2]]
    assert window["r"].row_splits.tolist() == [0, 1, 3, 4, 6]
    assert window["s"] == [b"a", b"b"] * 2
    assert len(list(merged_window([batch] * 3, drop_remainder=False))) == 2
    with pytest.raises(InvalidRequestError, match="size=0"):
        list(merged_window([], 0))


# ---- queues in this process ------------------------------------------------------------------------------------------


def test_a_queue_refills_itself_until_nothing_comes():
    batches = [["1"], [], ["2", "3"]]
    queue = StrQueue(auto_enqueue_fn=lambda: (batches.pop(0), False) if batches else ([], True))
    assert [queue.dequeue() for _ in range(5)] == [("1", False), ("2", False), ("3", False), ("", True), ("", True)]


def test_a_queue_takes_no_more_than_its_capacity_and_can_be_saved():
    queue = StrQueue(["a", "b"], capacity=3)
    assert queue.dequeue() == ("a", False)
    queue.enqueue_many(["c", "d"])
    with pytest.raises(QueueFullError, match="capacity of 3"):
        queue.enqueue_many(["e"])
    again = StrQueue()
    again.load_state_dict(queue.state_dict())
    assert [again.dequeue()[0] for _ in range(3)] == ["b", "c", "d"]


def test_patterns_are_expanded_one_after_another(tmp_path):
    for name in ("b_1", "a_0", "a_1"):
        (tmp_path / name).touch()
    files = LocalFiles([str(tmp_path / pattern) for pattern in ("a_*", "zz*", "b_*")])
    assert files.take().endswith("a_0")
    state = files.state_dict()
    again = LocalFiles([])
    again.load_state_dict(state)
    assert [again.take()[-3:] for _ in range(2)] == ["a_1", "b_1"]
    assert again.take() is None


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_patterns_of_days_and_hours_are_half_open():
    assert len(gen_patterns("/abc", 20220901, end_date=20220920)) == 19
    assert gen_patterns("/abc/", "20231231", 22, "20240101", 1, is_hourly=True, wildcard="*.pb") == [
        "/abc/20231231/22*.pb",
        "/abc/20231231/23*.pb",
        "/abc/20240101/00*.pb",
    ]
    now = datetime(2024, 3, 2, 5, tzinfo=UTC)
    assert gen_patterns("x", "20240229", today=lambda: now) == ["x/20240229/*", "x/20240301/*"]
    assert gen_patterns("", "20240101") == gen_patterns("x", "") == []
    with pytest.raises(InvalidRequestError, match="'2024' is not a day"):
        gen_patterns("x", "2024")


def test_placeholders_multiply_leftmost_slowest(tmp_path):
    assert expand_input_patterns("{INT(0,1)}/{ DATE(20240229, 20240301) }/*") == [
        "0/20240229/*", "0/20240301/*", "1/20240229/*", "1/20240301/*",
    ]  # fmt: skip
    assert expand_input_patterns("h{DATE(2024022923,2024030100)}") == ["h2024022923", "h2024030100"]
    for wrong in ("{DATE(2024,2025)}", "{INT(a,b)}", "{DATE(20240230,20240301)}"):
        with pytest.raises(InvalidRequestError):
            expand_input_patterns(wrong)
    (tmp_path / "p1").touch()
    assert match_input_patterns(f"{tmp_path}/p{{INT(0,3)}}") == [f"{tmp_path}/p1"]
    with pytest.raises(InvalidRequestError, match="no file matches"):
        match_input_patterns(f"{tmp_path}/q{{INT(0,3)}}")


def test_globs_reach_where_fsspec_does():
    import fsspec

    files = fsspec.filesystem("memory")
    for name in ("b", "a"):
        files.pipe(f"/flows/{name}.pb", b"x")
    assert expand_glob("memory://flows/*.pb") == ["memory://flows/a.pb", "memory://flows/b.pb"]
    assert expand_glob("/nowhere/x") == []


# ---- names of the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pruning", "left"), [(None, (1, 1)), (0, (1, 1)), (1, (0, 1)), (2, (1, 0))])
def test_a_file_is_read_without_the_features_that_are_pruned(tmp_path, pruning, left):
    example = Example()
    example.named_feature.add(name="a")
    example.named_raw_feature.add(name="b")
    with open_writer(str(tmp_path / "x.pb"), framing=Framing(has_sort_id=True)) as out:
        out.write(Records.of([example.SerializeToString()], "example"))
    dataset = FilePBDataset(str(tmp_path / "x.pb"), input_pb_type="example", feature_pruning_type=pruning)
    (found,) = map(Example.FromString, dataset)
    assert (len(found.named_feature), len(found.named_raw_feature)) == left
    with pytest.raises(InvalidRequestError, match="pruning is 3"):
        FilePBDataset("x", input_pb_type="example", feature_pruning_type=3)


def test_the_dataset_is_chosen_by_its_arguments():
    kafka = DatasetFlags(kafka_topics="t", kafka_group_id="g", kafka_servers="s:1")
    assert type(PBDataset("file", flags=kafka)) is KafkaDataset
    assert type(PBDataset("file", flags=DatasetFlags(dataset_input_use_parquet=True))) is ParquetDataset
    assert type(PBDataset(["t"], "group", servers="s:1")) is KafkaDataset
    assert type(PBDataset(buffer_size_or_group_id=5, topics_or_files="x")) is FilePBDataset
    assert type(PBDataset("x", 5)) is FilePBDataset
    with pytest.raises(InvalidRequestError, match="cannot both be set"):
        PBDataset("x", flags=DatasetFlags(dataset_input_use_parquet=True, dataset_input_use_tfrecord=True))
    with pytest.raises(InvalidRequestError, match="neither files nor topics"):
        PBDataset(group_id="g")
    with pytest.raises(InvalidRequestError, match="unknown arguments"):
        FilePBDataset("x", colour=1)
    with pytest.raises(InvalidRequestError, match="exactly one pattern"):
        create_instance_dataset(["a", "b"], enable_sharding=True)

"""Pipelines: what they give, in which order, from any position, on any number of threads."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
import time

import numpy as np
import pytest

import trilith.data
from trilith.compat.monolith import datasets as reference
from trilith.data.formats.framing import Framing
from trilith.data.formats.reading import Position
from trilith.data.formats.writers import open_writer
from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.specs import Label, Slot
from trilith.data.pipeline.dataset import from_records, read, read_kafka
from trilith.data.pipeline.positions import from_json, to_json
from trilith.data.records import Kind, Records
from trilith.data.samples import FilterByLabel, transforms
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example


def write(path, numbers, pad=0):
    """A file of records "0", "1", ... as plain text, framed by their length."""
    with path.open("wb") as out:
        for number in numbers:
            payload = str(number).encode() + b" " * pad
            out.write(len(payload).to_bytes(8, "little") + payload)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Five files of 10, 20, ... 50 records; record r of file f is 100 f + r."""
    for index in range(5):
        write(tmp_path / f"part-{index}", range(100 * index, 100 * index + 10 * (index + 1)))
    return str(tmp_path / "part-*")


def ints(elements):
    return [int(element) for element in elements]


def batches(dataset):
    return [ints(records.payloads()) for records in dataset]


def numbers_of(records):
    """int64[n]: what the payloads say."""
    return np.array(ints(records.payloads()))


def even(records):
    return numbers_of(records) % 2 == 0


ALL = [100 * f + r for f in range(5) for r in range(10 * (f + 1))]


def small(pattern, **options):
    """Chunks of very few records, so that every boundary is met."""
    return read(pattern, kind="plaintext", block_bytes=40, **options)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_files_are_read_in_the_order_of_their_names(files):
    assert ints(small(files)) == ALL
    assert ints(small(files).chunks().__next__().payloads()) == ALL[: len(next(small(files).chunks()))]


def test_files_are_read_in_turns(files):
    found = ints(small(files, cycle_length=2, block_length=3))
    assert sorted(found) == ALL
    assert found[:9] == [0, 1, 2, 100, 101, 102, 3, 4, 5]
    # The third file takes the place of the first, when that has ended.
    assert found[18:26] == [9, 109, 110, 111, 200, 201, 202, 112]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_by_file_and_by_record_are_a_partition(files, count):
    for by in ("files", "records"):
        shares = (
            [ints(small(files).shard(index, count, by=by)) for index in range(count)]
            if by == "records" or (count <= 5)
            else []
        )
        if shares:
            assert sorted(itertools.chain(*shares)) == ALL
    if count <= 5:
        assert ints(small(files).shard(1 % count, count))[:3] == ints(small(files).shard(1 % count, count).take(3))


@pytest.mark.parametrize(
    ("ending", "options"), [("", {}), (".gz", {"compression": "gzip"}), (".tfrecord", {"format": "tfrecord"})]
)
def test_a_named_pipe_is_read_once_and_not_looked_into(tmp_path, ending, options):
    with open_writer(str(tmp_path / f"file{ending}"), **options) as out:
        out.write(Records.of([b"1", b"2", b"3"], "plaintext"))
    path = tmp_path / f"pipe{ending}"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes((tmp_path / f"file{ending}").read_bytes()), daemon=True)
    writer.start()
    found = []
    reader = threading.Thread(target=lambda: found.extend(ints(read(str(path), kind="plaintext"))), daemon=True)
    reader.start()
    reader.join(30)
    assert found == [1, 2, 3]


def test_what_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*nothing"):
        list(read(str(tmp_path / "nothing*")))


def test_a_damaged_file_is_an_error_that_names_it_or_is_counted(tmp_path):
    path = write(tmp_path / "cut", range(10))
    with open(path, "r+b") as file:
        file.truncate(60)
    good = write(tmp_path / "cut2", range(10, 12))
    found = []
    with pytest.raises(DataError, match=r"cut: record 6, byte 54"):
        found.extend(small([path, good]).prefetch(2))
    iterator = iter(small([path, good], on_error="skip").batch(4).prefetch(2, threads=2))
    assert [ints(each.payloads()) for each in iterator] == [[0, 1, 2, 3], [4, 5, 10, 11]]
    assert iterator.losses.records == 1
    assert "cut: record 6" in iterator.losses.messages[0]


def test_damaged_payloads_are_errors_or_left_out_by_every_step(tmp_path):
    payloads = [each if number % 10 else b"\xff\xff\xff" for number, each in enumerate(examples(50).payloads())]
    with open_writer(str(tmp_path / "odd")) as out:
        out.write(Records.of(payloads, "example"))

    def steps(on_error):
        dataset = read(str(tmp_path / "odd"), kind="example", on_error=on_error)
        specs = {"label": Label()}
        return {
            "op": dataset.filter(FilterByLabel([-1])).parse(specs),
            "transform": dataset.transform(transforms.FilterByLabel([-1])).parse(specs),
            "convert": dataset.convert("instance").parse(specs),
            "negatives": dataset.negatives(neg_num=1).parse(specs),
            "parse": dataset.parse(specs),
        }

    for name, dataset in steps("raise").items():
        with pytest.raises(DataError, match="record 0"):
            list(dataset.batch(9).prefetch(2, threads=2))
        iterator = iter(steps("skip")[name].batch(9).prefetch(2, threads=2))
        labels = [label for batch in iterator for label in batch["label"][:, 0].tolist()]
        assert len(labels) == 45
        assert name == "convert" or labels == [number for number in range(50) if number % 10]
        assert iterator.losses.records == 5


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_filters_see_chunks_and_batches_are_full(files):
    found = batches(small(files).filter(even).batch(16))
    assert list(itertools.chain(*found)) == [number for number in ALL if number % 2 == 0]
    assert [len(batch) for batch in found] == [16, 16, 16, 16, 11]
    assert [len(batch) for batch in batches(small(files).filter(even).batch(16, drop_remainder=True))] == [16] * 4


def test_a_filter_of_the_wrong_shape_is_refused(files):
    with pytest.raises(InvalidRequestError, match=r"a filter gave int64\[1\]"):
        list(small(files).filter(lambda records: np.zeros(1, np.int64)))


def test_the_parser_runs_once_per_batch_wherever_it_is_named(files):
    calls = []

    def parse(records):
        calls.append(len(records))
        return {"x": numbers_of(records)}

    for dataset in (
        small(files).parse(parse).shuffle(8, seed=1).batch(32),
        small(files).shuffle(8, seed=1).batch(32).parse(parse),
    ):
        calls.clear()
        found = [batch["x"] for batch in dataset]
        assert calls == [32] * 4 + [22]
        assert sorted(np.concatenate(found)) == ALL
    assert [element["x"].tolist() for element in small(files).parse(parse).take(2)] == [[0], [1]]


def test_shuffling_depends_on_seed_and_epoch_only(files):
    dataset = small(files).shuffle(20, seed=3)
    first = ints(dataset)
    assert sorted(first) == ALL
    assert first != ALL
    assert max(abs(place - first.index(number)) for place, number in enumerate(ALL[:30])) > 5
    assert ints(dataset.iterate()) == first
    assert ints(read(files, kind="plaintext").shuffle(20, seed=3)) == first  # in chunks of any size
    assert ints(dataset.iterate(epoch=1)) != first
    assert ints(small(files).shuffle(20, seed=4)) != first
    two = ints(dataset.repeat(2))
    assert two == first + ints(dataset.iterate(epoch=1))


def test_every_pass_has_an_order_of_its_own_that_the_seed_decides(files):
    dataset = small(files).shuffle(50, seed=3).batch(7)
    passes = [batches(dataset) for _ in range(3)]
    assert [sorted(itertools.chain(*each)) for each in passes] == [ALL] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes == [batches(dataset.iterate(epoch=epoch)) for epoch in range(3)]
    assert passes == [batches(again) for again in [small(files).shuffle(50, seed=3).batch(7)] * 3]
    dataset.set_epoch(1)
    assert [batches(dataset), batches(dataset)] == passes[1:]
    # Two at a time: each a whole pass.
    dataset.set_epoch(0)
    assert [list(each) for each in zip(*map(batches, [dataset, dataset]), strict=True)] == [
        list(each) for each in zip(*passes[:2], strict=True)
    ]
    one, two = iter(dataset), iter(dataset)
    found = [(ints(a.payloads()), ints(b.payloads())) for a, b in zip(one, two, strict=True)]
    assert [sorted(itertools.chain(*each)) for each in zip(*found, strict=True)] == [ALL] * 2
    with pytest.raises(InvalidRequestError, match="epoch=-1"):
        dataset.set_epoch(-1)


def test_a_position_goes_on_in_its_epoch_and_the_next_pass_is_the_one_behind(files):
    dataset = small(files).shuffle(50, seed=3).batch(7)
    passes = [batches(dataset) for _ in range(4)]
    iterator = dataset.iterate(epoch=2)
    assert [ints(next(iterator).payloads()) for _ in range(5)] == passes[2][:5]
    again = small(files).shuffle(50, seed=3).batch(7)
    resumed = again.iterate(state=iterator.state_dict())
    assert resumed.epoch == 2
    assert batches(resumed) == passes[2][5:]
    assert batches(again) == passes[3]


def test_the_length_is_known_where_records_are_in_memory_and_nothing_drops_them(files):
    ten = from_records([str(number).encode() for number in range(10)])
    for dataset, length in (
        (ten, 10),
        (ten.shuffle(3).batch(4), 3),
        (ten.batch(4, drop_remainder=True).repeat(2).prefetch(), 4),
        (ten.skip(3).take(5).parse(numbers_of).batch(2), 3),
        (ten.shard(1, 3, by="records").repeat(2), 6),
        (ten.skip(30), 0),
    ):
        assert len(dataset) == length == len(list(dataset))
    for dataset in (small(files), small(files).take(3), ten.filter(even), ten.repeat(), ten.merge(ten)):
        with pytest.raises(TypeError, match="when it is read"):
            len(dataset)
        assert dataset


@pytest.mark.parametrize(
    "build",
    [
        lambda files: files.shard(0, 2).deal(lambda epoch: None),
        lambda files: files.deal(lambda epoch: None).shard(0, 2),
        lambda files: files.shard(0, 2).share("static://x:1", "q"),
        lambda files: files.share("static://x:1", "q").shard(0, 2),
        lambda files: files.share("static://x:1", "q").shard(0, 2, by="records"),
        lambda files: files.shard(0, 2, by="records").share("static://x:1", "q"),
        lambda files: files.share("static://x:1", "q").deal(lambda epoch: None, shared=False),
        lambda files: files.merge(files.share("static://x:1", "q")).shard(0, 2, by="records"),
        lambda files: read("").shard(0, 2),
        lambda files: read("").deal(lambda epoch: None, shared=False),
        lambda files: read("").share("static://x:1", "q"),
    ],
)
def test_shares_that_contradict_each_other_are_refused_when_they_are_named(files, build):
    with pytest.raises(InvalidRequestError, match=r"shard|dealt|standard input"):
        build(small(files))


def test_ranks_that_are_more_than_the_files_divide_the_records(files, tmp_path, caplog):
    for pattern in (files, files.replace("*", "[34]"), files.replace("*", "4")):
        whole = ints(small(pattern))
        for count in (2, 4, 6, 7):
            shares = [ints(small(pattern).shard(index, count)) for index in range(count)]
            assert sorted(itertools.chain(*shares)) == whole
            assert all(shares)
    # Some of the ranks may themselves divide their files among ranks of a second kind.
    nested = [ints(small(files).shard(i, 2).shard(j, 4)) for i in range(2) for j in range(4)]
    assert sorted(itertools.chain(*nested)) == ALL
    assert all(nested)
    assert not caplog.records
    empty = write(tmp_path / "empty", [])
    assert ints(small([files, empty]).shard(5, 6)) == []
    assert "share 5 of 6 is empty: its files hold no records" in caplog.text
    assert ints(from_records([b"1", b"2"]).shard(3, 4, by="records")) == []
    assert "share 3 of 4 is empty: 2 records are all" in caplog.text


def test_files_that_are_dealt_out_are_divided_among_ranks_and_exclusions_count(files):
    def dealt(**options):
        return reference.DistributedFilePBDataset(
            [files], enable_dynamic_sharding=True, input_pb_type="plaintext", has_sort_id=False, **options
        )

    assert sorted(ints(dealt())) == ALL
    for count in (2, 3, 8):
        shares = [ints(dealt(shard_num=count, shard_index=index)) for index in range(count)]
        assert sorted(itertools.chain(*shares)) == ALL
        assert all(shares)
    assert max(ints(dealt(exclude_fn=lambda name: name.endswith("4")))) == 339


def test_instance_files_are_divided_among_more_ranks_than_files(tmp_path):
    records = Records.of([str(number).encode() for number in range(9)], "instance")
    with open_writer(str(tmp_path / "a.snappy"), framing=Framing(has_sort_id=True)) as out:
        out.write(records)
    for options in ({}, {"enable_dynamic_sharding": True, "use_snappy": True}):
        shares = [
            ints(
                reference.create_instance_dataset(
                    [str(tmp_path / "*.snappy")], enable_sharding=True, shard_index=index, shard_num=4, **options
                )
            )
            for index in range(4)
        ]
        assert sorted(itertools.chain(*shares)) == list(range(9))
        assert all(shares)


def test_a_whole_shuffle_is_fair():
    counts = np.zeros((4, 4))
    for seed in range(600):
        for place, number in enumerate(ints(from_records([b"0", b"1", b"2", b"3"]).shuffle(4, seed=seed))):
            counts[place, number] += 1
    assert (np.abs(counts - 150) < 60).all()


def test_spans_count_records_before_batching_and_batches_behind_it(files):
    assert ints(small(files).skip(5).take(7)) == ALL[5:12]
    assert batches(small(files).batch(10).skip(1).take(2)) == [ALL[10:20], ALL[20:30]]
    assert ints(small(files).take(0)) == []


def test_repeating_nothing_without_end_ends():
    assert list(from_records([]).repeat()) == []
    assert len(ints(from_records([b"1"]).repeat(3))) == 3
    assert ints(from_records([b"1", b"2"]).repeat().take(5)) == [1, 2, 1, 2, 1]


def test_merging_takes_turns_until_all_have_ended():
    left, right = from_records([b"1", b"2", b"3", b"4", b"5"]), from_records([b"10", b"20"])
    assert ints(left.merge(right)) == [1, 10, 2, 20, 3, 4, 5]
    assert ints(left.merge(right, block_length=2)) == [1, 2, 10, 20, 3, 4, 5]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: from_records([]).batch(0), "size=0"),
        (lambda: from_records([]).batch(2.0), "size=2.0 is no whole number"),
        (lambda: from_records([]).set_epoch(1.5), "epoch=1.5 is no whole number"),
        (lambda: from_records([]).take("3"), "count='3' is no whole number"),
        (lambda: from_records([]).batch(2).shuffle(2), "before batch"),
        (lambda: from_records([]).batch(2).filter(even), "before batch"),
        (lambda: from_records([]).shuffle(0), "buffer_size=0"),
        (lambda: from_records([]).prefetch(0), "depth=0"),
        (lambda: from_records([]).shard(2, 2), "index must be in"),
        (lambda: from_records([]).shard(0, 2, by="files"), "where files are read"),
        (lambda: from_records([]).parse(3), "neither feature specs"),
        (lambda: read("x", colour="red"), "unknown options"),
        (lambda: read("x", kind="banana"), r"'banana' is no kind; there are \['instance', 'example'"),
        (lambda: read("x", format="xml"), r"'xml' is no file format; there are \['records'"),
        (lambda: read("x", compression="lzma"), "compression='lzma'"),
        (lambda: read("x", on_error="ignore"), "on_error='ignore'"),
        (lambda: read_kafka("x", colour="red"), "unknown options"),
        (lambda: read_kafka("x", kind="banana"), "'banana' is no kind"),
        (lambda: read_kafka("x", on_error="ignore"), "on_error='ignore'"),
        (lambda: ParseSpec(a=Slot(1), on_error="ignore"), "on_error='ignore'"),
    ],
)
def test_pipelines_that_make_no_sense_are_refused_when_they_are_built(wrong, match):
    with pytest.raises(InvalidRequestError, match=match):
        wrong()


# ---- positions -------------------------------------------------------------------------------------------------------

PIPELINES = {
    "plain": small,
    "turns": lambda files: small(files, cycle_length=3, block_length=2).filter(even),
    "shuffled": lambda files: small(files).shuffle(30, seed=5).batch(7),
    "repeated": lambda files: small(files).shuffle(16, seed=2).repeat(2).batch(9),
    "threads": lambda files: small(files).filter(even).parse(numbers_of).shuffle(10).batch(4).prefetch(3, threads=3),
    "twice prefetched": lambda files: small(files).prefetch(2).filter(even).batch(5).parse(numbers_of).prefetch(2),
    "merged": lambda files: small(files).skip(3).merge(small(files).shuffle(9), block_length=4).take(100).batch(3),
    "share": lambda files: small(files).shard(1, 3, by="records").batch(4).skip(2),
}


def plain(element):
    if isinstance(element, Records):
        return element.payloads()
    return element.tolist() if isinstance(element, np.ndarray) else element


@pytest.mark.parametrize("name", PIPELINES)
def test_an_iterator_goes_on_from_every_position_exactly(files, name):
    dataset = PIPELINES[name](files)
    with dataset.iterate() as iterator:
        states, whole = [iterator.state_dict()], []
        for element in iterator:
            whole.append(plain(element))
            states.append(iterator.state_dict())
    assert len(whole) > 5
    for done in [*range(0, len(states), max(1, len(states) // 12)), len(states) - 1]:
        with dataset.iterate(state=from_json(to_json(states[done]))) as again:
            first = again.state_dict()
            assert [plain(element) for element in again] == whole[done:]
        with dataset.iterate(state=first) as again:
            assert [plain(element) for element in again] == whole[done:]


def examples(count):
    payloads = []
    for number in range(count):
        example = Example(label=[number])
        example.named_feature.add(name="n").feature.int64_list.value.append(number)
        payloads.append(example.SerializeToString())
    return Records.of(payloads, "example")


@pytest.mark.parametrize(
    ("form", "compression"),
    [
        ("records", None),
        ("records", "snappy"),
        ("records", "zstd"),
        ("records", "gzip"),
        ("tfrecord", None),
        ("parquet", None),
    ],
)
def test_files_of_every_format_are_gone_on_with_in_the_middle(tmp_path, form, compression):
    for part in range(3):
        where = str(tmp_path / f"part-{part}")
        with open_writer(where, format=form, **({} if form == "parquet" else {"compression": compression})) as out:
            out.write(examples(40))
    options = {} if form == "parquet" else {"compression": compression}
    dataset = read(str(tmp_path / "part-*"), kind="example", format=form, block_bytes=300, **options)
    dataset = dataset.map(lambda records: [Example.FromString(each).label[0] for each in records.payloads()]).batch(7)
    with dataset.iterate() as iterator:
        states, whole = [iterator.state_dict()], []
        for batch in iterator:
            whole.append(batch)
            states.append(iterator.state_dict())
    assert [number for batch in whole for number in batch] == [*range(40)] * 3
    for done in range(0, len(states), 4):
        assert list(dataset.iterate(state=states[done])) == whole[done:]


def test_a_kafka_topic_is_gone_on_with_behind_the_last_element():
    producer_of = pytest.importorskip("confluent_kafka").Producer
    producer = producer_of({"test.mock.num.brokers": 1, "logger": logging.getLogger("mock")})
    (broker,) = producer.list_topics(timeout=60).brokers.values()
    for number in range(20):
        payload = str(number).encode()
        producer.produce("t", len(payload).to_bytes(8, "little") + payload, partition=0)
    assert producer.flush(60) == 0
    dataset = read_kafka(
        "t",
        servers=f"{broker.host}:{broker.port}",
        kind="plaintext",
        group_id="g",
        poll_batch_size=3,
        message_poll_timeout=300,
        stream_timeout=5_000,  # for a machine that is slow to connect; the end takes as long
        start=Position(0, 0, (("t", 0, 0),)),
    ).batch(4)
    with dataset.iterate() as iterator:
        found = [ints(next(iterator).payloads()) for _ in range(2)]
        state = iterator.state_dict()
    with dataset.iterate(state=state) as iterator:
        found += [ints(records.payloads()) for records in iterator]
    assert list(itertools.chain(*found)) == list(range(20))


def test_a_position_of_another_pipeline_is_refused(files):
    state = small(files).batch(3).iterate().state_dict()
    with pytest.raises(InvalidRequestError, match="another pipeline"):
        small(files).batch(4).iterate(state=state)
    with pytest.raises(InvalidRequestError, match="another list of files"):
        small(files.replace("*", "[12]")).batch(3).iterate(state=state)
    iterator = small(files).batch(3).iterate()
    next(iterator)
    with pytest.raises(InvalidRequestError, match="has begun"):
        iterator.load_state_dict(state)


# ---- threads ---------------------------------------------------------------------------------------------------------


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("trilith-data-")]


def gone(deadline_s=20.0):
    deadline = time.monotonic() + deadline_s
    while ours() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not ours()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_are_in_order_on_any_number_of_threads(files, threads):
    dataset = small(files).filter(even).batch(4).parse(numbers_of)
    want = [element.tolist() for element in dataset]
    assert [element.tolist() for element in dataset.prefetch(3, threads=threads)] == want
    assert gone()


def test_no_more_is_made_ahead_than_was_asked_for(files):
    made = []
    iterator = iter(small(files).batch(1).map(lambda records: made.append(1)).prefetch(3))
    next(iterator)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    threading.Event().wait(0.05)
    assert len(made) == 5  # one given out, three that wait, one in the hand of the thread
    iterator.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_end_when_an_iterator_is_abandoned_or_closed(files, threads):
    dataset = small(files).filter(even).batch(1).parse(numbers_of).prefetch(1, threads=threads)
    iterator = iter(dataset)
    next(iterator)
    assert ours()
    del iterator
    gc.collect()
    assert gone()
    iterator = iter(dataset)
    next(iterator)
    iterator.close()
    assert not ours()
    assert list(iterator) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_thread_raises_is_raised_where_the_element_was_due(files, threads):
    def parse(records):
        numbers = numbers_of(records)
        if 115 in numbers:
            raise ZeroDivisionError("in the parser")
        return numbers

    iterator = iter(small(files).batch(4).parse(parse).prefetch(2, threads=threads))
    found = []
    with pytest.raises(ZeroDivisionError, match="in the parser"):
        found.extend(number for element in iterator for number in element.tolist())
    assert found == ALL[: ALL.index(115) // 4 * 4]
    assert list(iterator) == []
    assert gone()


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # said where there is one core only
def test_workers_of_a_torch_data_loader_share_the_files_or_the_records(files):
    loader = pytest.importorskip("torch.utils.data").DataLoader
    for pattern in (files, files.replace("*", "3")):
        dataset = small(pattern).parse(numbers_of).batch(4)
        found = [loader(dataset.torch(), batch_size=None, num_workers=workers) for workers in (0, 2)]
        one, two = ([number for batch in each for number in batch.tolist()] for each in found)
        assert sorted(two) == sorted(one)
        assert two != one


def test_the_package_says_what_it_offers():
    for name in trilith.data.__all__:
        assert getattr(trilith.data, name) is not None
    assert Kind("instance") is trilith.data.Kind.INSTANCE

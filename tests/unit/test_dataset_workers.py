"""Datasets in the workers of a torch DataLoader: together they give what one process gives, in every epoch."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import multiprocessing
import os
import threading
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import trilith
from trilith.compat.monolith import datasets as reference
from trilith.data.fids import data_source_key
from trilith.data.formats.reading import Position
from trilith.data.formats.writers import open_writer
from trilith.data.parse.parsers import InstanceParser, ParseSpec
from trilith.data.parse.sharding import ShardingConfig, parse_fused
from trilith.data.parse.specs import Extra, Label, Slot
from trilith.data.pipeline import dataset as dataset_module
from trilith.data.pipeline.dataset import from_records, read, read_kafka
from trilith.data.pipeline.queue import LocalFiles
from trilith.data.records import Records
from trilith.data.samples import FilterByLabel, FilterByValue, transforms
from trilith.data.samples.item_pool import ItemPool
from trilith.errors import InvalidRequestError, TrilithError
from trilith_proto.proto_parser_pb2 import Instance

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # said where there is one core only

SIZES = (3, 10, 1, 17, 0, 9)
ALL = [100 * part + row for part, size in enumerate(SIZES) for row in range(size)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six files of instances; record r of file f has label and uid 100 f + r."""
    folder = tmp_path_factory.mktemp("files")
    for part, size in enumerate(SIZES):
        payloads = []
        for row in range(size):
            instance = Instance(label=[100 * part + row], fid=[1 << 54 | row])
            instance.line_id.uid = 100 * part + row
            payloads.append(instance.SerializeToString())
        with open_writer(str(folder / f"part-{part}")) as out:
            out.write(Records.of(payloads, "instance"))
    return str(folder / "part-*")


def uids(records):
    """int64[n]: the uids of instances; at the top of a module, so that it can be sent to a process."""
    return np.array([Instance.FromString(each).line_id.uid for each in records.payloads()], np.int64)


def not_of_seven(records):
    return uids(records) % 7 != 0


def flat(batches):
    return [number for batch in batches for number in np.asarray(batch).tolist()]


def in_workers(dataset, count, epoch=0):
    """What each of so many workers gives, played in this process."""
    found = []
    before = dataset_module.torch_worker
    for index in range(count):
        try:
            dataset_module.torch_worker = lambda index=index: (index, count)
            found.append([np.asarray(each).tolist() for each in dataset.iterate(epoch=epoch)])
        finally:
            dataset_module.torch_worker = before
    return found


# ---- each record once ------------------------------------------------------------------------------------------------

RECORD_STEPS = {
    "filter": lambda d, n: d.filter(not_of_seven),
    "op": lambda d, n: d.filter(FilterByValue("uid", "ge", n)),
    "shuffle": lambda d, n: d.shuffle(1 + n, seed=n),
    "take": lambda d, n: d.take(n),
    "skip": lambda d, n: d.skip(n),
    "shard": lambda d, n: d.shard(n % 3, 3, by="records"),
    "repeat": lambda d, n: d.repeat(2),
    "merge": lambda d, n: d.merge(from_records(HELD).skip(n % 4), block_length=1 + n % 3),
    "prefetch": lambda d, n: d.prefetch(1 + n % 2, threads=1 + n % 2),
}
BATCH_STEPS = {
    "take": lambda d, n: d.take(n),
    "skip": lambda d, n: d.skip(n % 5),
    "repeat": lambda d, n: d.repeat(2),
    "map": lambda d, n: d.map(np.asarray),
    "prefetch": lambda d, n: d.prefetch(1 + n % 2, threads=1 + n % 2),
}
HELD = [Instance(line_id={"uid": 1000 + n}).SerializeToString() for n in range(5)]


def steps(of):
    return st.lists(st.tuples(st.sampled_from(sorted(of)), st.integers(0, 30)), max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    source=st.sampled_from(["files", "two files", "turns", "shard", "dealt", "held", "nothing"]),
    before=steps(RECORD_STEPS),
    size=st.integers(1, 7),
    drop=st.booleans(),
    behind=steps(BATCH_STEPS),
    workers=st.integers(1, 8),
    epoch=st.integers(0, 2),
)
def test_workers_together_give_what_one_process_gives(files, source, before, size, drop, behind, workers, epoch):
    dataset = {
        "files": lambda: read(files, block_bytes=64),
        "two files": lambda: read(files.replace("*", "[13]"), block_bytes=64),
        "turns": lambda: read(files, cycle_length=3, block_length=2),
        "shard": lambda: read(files).shard(1, 4),
        "dealt": lambda: read(files).shard(0, 2).deal(lambda epoch: LocalFiles([files]), shared=False),
        "held": lambda: from_records(HELD),
        "nothing": lambda: from_records([]),
    }[source]()
    for name, number in before:
        dataset = RECORD_STEPS[name](dataset, number)
    dataset = dataset.parse(uids).batch(size, drop_remainder=drop)
    for name, number in behind:
        dataset = BATCH_STEPS[name](dataset, number)
    want = [np.asarray(each).tolist() for each in dataset.iterate(epoch=epoch)]
    found = in_workers(dataset, workers, epoch)
    batches = list(itertools.chain(*found))
    counts = collections.Counter(itertools.chain(*want))
    assert collections.Counter(itertools.chain(*batches)) == counts
    if drop or any(name in ("take", "skip") for name, _ in behind):  # the very batches
        assert sorted(batches) == sorted(want)


def test_workers_take_the_batches_of_a_span_in_turns(files):
    dataset = read(files).shuffle(20, seed=2).parse(uids).batch(4).skip(3).map(np.asarray).take(5).skip(1)
    want = [each.tolist() for each in dataset.iterate()]
    for count in (2, 3, 5):
        found = in_workers(dataset, count)
        in_turns = [each for row in itertools.zip_longest(*found) for each in row if each is not None]
        assert sorted(in_turns) == sorted(want)
    plain = read(files).parse(uids).batch(4, drop_remainder=True)
    found = [each.tolist() for each in DataLoader(plain.torch(), batch_size=None, num_workers=3)]
    assert found == [each.tolist() for each in plain.iterate()]


def test_batches_that_another_worker_takes_are_not_parsed(files):
    parsed = []

    def parse(records):
        parsed.append(len(records))
        return uids(records)

    dataset = read(files).parse(parse).batch(4, drop_remainder=True).take(8)
    assert len(list(dataset)) == 8 == len(parsed)
    parsed.clear()
    found = in_workers(dataset, 4)
    assert len(parsed) == 8
    assert [len(each) for each in found] == [2] * 4


def test_flows_and_negatives_give_every_record_once(files):
    names = ["a", "b", "c"]
    keys = np.array([data_source_key(name) for name in names], np.uint32)
    records = Records.of(HELD * 4, "instance")
    records = dataclasses.replace(records, source_keys=keys[np.arange(len(records)) % 3])
    flow = from_records(records).split(names[:1], unknown="drop")[names[0]].parse(uids).batch(2)
    want = sorted(flat(flow.iterate()))
    assert sorted(flat(itertools.chain(*in_workers(flow, 3)))) == want
    assert sorted(flat(itertools.chain(*in_workers(flow.take(2), 3)))) == sorted(flat(flow.take(2)))

    made = read(files).negatives(neg_num=2, start_num=0, positive_label=102, item_features=[1], negative_label=-7)
    originals = made.filter(FilterByLabel([0])).parse(uids).batch(4)
    assert sorted(flat(itertools.chain(*in_workers(originals, 3)))) == ALL
    labels = [label for each in made.parse({"l": Label()}).batch(50).iterate() for label in each["l"][:, 0].tolist()]
    assert labels.count(-7) == 2  # there is one positive


def test_a_pool_that_is_passed_to_workers_is_said_to_be_copied(files, caplog):
    dataset = read(files).negatives(neg_num=1, pool=ItemPool(0, 10), item_features=[1]).parse(uids).batch(4)
    list(dataset)
    assert not caplog.records
    in_workers(dataset, 2)
    assert "copied to each DataLoader worker" in caplog.text


def test_what_is_handed_out_by_a_queue_or_topic_cannot_have_a_first_record_of_all(files):
    shared = read(files).deal(lambda epoch: LocalFiles([files]), shared=True)
    for dataset, step in (
        (shared.take(3), "take\\(3\\)"),
        (shared.batch(2).skip(1), "skip\\(1\\)"),
        (read_kafka("t").take(3), "take\\(3\\)"),
        (read_kafka("t").shard(0, 2, by="records"), "shard\\(0, 2, by='records'\\)"),
        (from_records(HELD).merge(shared).take(3), "take\\(3\\)"),
    ):
        with pytest.raises(InvalidRequestError, match=f"{step} cannot be shared by 2 DataLoader workers"):
            in_workers(dataset, 2)
    assert len(list(shared.take(3))) == 3
    with pytest.raises(InvalidRequestError, match="say deal"):
        in_workers(read(files).deal(lambda epoch: LocalFiles([files])), 2)


def test_the_partitions_that_a_topic_begins_with_are_divided(monkeypatch):
    from trilith.data.formats import kafka

    started = []

    class Reader:
        def __init__(self, topics, *, start, **options):
            started.append(start.partitions)
            self.losses = kafka.Losses()

        def __next__(self):
            raise StopIteration

        def close(self):
            pass

    monkeypatch.setattr(kafka, "KafkaReader", Reader)
    partitions = tuple(("t", number, 5) for number in range(3))
    dataset = dataset_module.Dataset((dataset_module.Topics(("t",), {"start": Position(0, 0, partitions)}),))
    assert in_workers(dataset, 2) == [[], []]
    assert sorted(itertools.chain(*started)) == list(partitions)
    started.clear()
    in_workers(dataset, 4)
    assert sorted(itertools.chain(*started)) == list(partitions)


def test_a_pipe_and_standard_input_are_not_shared(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequestError, match="a pipe can be read by one process"):
        in_workers(read(str(tmp_path / "pipe")), 2)
    with pytest.raises(InvalidRequestError, match="standard input is the main process's"):
        list(DataLoader(read("").torch(), batch_size=None, num_workers=1))


# ---- real workers ----------------------------------------------------------------------------------------------------


def pipeline(files):
    spec = {"uid": Extra(), "slot": Slot(1), "label": Label()}
    return read(files).filter(FilterByValue("uid", "ge", 0)).filter(not_of_seven).shuffle(50, seed=1).parse(spec)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_way_to_start_workers_gives_each_record_once_and_each_epoch_its_order(files, method):
    samples = pipeline(files).batch(5).prefetch(2, threads=2)
    list(samples)  # threads have been used before there are workers
    loaders = DataLoader(samples.torch(), batch_size=None, num_workers=2, multiprocessing_context=method)
    want = sorted(number for number in ALL if number % 7)
    orders = [[number for batch in loaders for number in batch["uid"][:, 0].tolist()] for _ in range(2)]
    assert [sorted(each) for each in orders] == [want] * 2
    assert orders[0] != orders[1]
    forked = DataLoader(samples.torch(epoch=1), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [number for batch in forked for number in batch["uid"][:, 0].tolist()] == orders[1]
    ten = pipeline(files).take(10).batch(3).torch()
    ten = DataLoader(ten, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert sum(len(batch["uid"]) for batch in ten) == 10


@pytest.mark.parametrize("workers", [0, 1, 3, 7])
@pytest.mark.parametrize("persistent", [False, True])
def test_passes_of_a_loader_are_epochs_that_can_be_set(files, workers, persistent):
    if persistent and not workers:
        pytest.skip("torch knows no persistent worker where there is none")
    samples = read(files).shuffle(100, seed=4).parse(uids).batch(6)
    torch_dataset = samples.torch()
    loader = DataLoader(torch_dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
    passes = [flat(loader) for _ in range(3)]
    assert [sorted(each) for each in passes] == [ALL] * 3
    assert len({tuple(each) for each in passes}) == 3
    torch_dataset.set_epoch(1)
    assert [flat(loader), flat(loader)] == passes[1:]
    torch_dataset.set_epoch(0)
    assert flat(loader) == passes[0]
    other = DataLoader(samples.torch(epoch=2), batch_size=None, num_workers=workers, persistent_workers=persistent)
    assert flat(other) == passes[2]
    # What every worker cuts for itself from one order of all is of the same epoch in all workers.
    some = DataLoader(samples.take(5).torch(), batch_size=None, num_workers=workers, persistent_workers=persistent)
    for epoch in range(3):
        assert sorted(flat(some)) == sorted(flat(samples.take(5).iterate(epoch=epoch)))


def test_two_passes_at_a_time_are_two_epochs(files):
    samples = read(files).shuffle(100, seed=4).parse(uids).batch(6).take(4)
    loader = DataLoader(samples.torch(), batch_size=None, num_workers=2)
    for _ in range(3):
        loader.dataset.set_epoch(0)
        found = list(zip(loader, loader, strict=True))
        passes = [sorted(flat(each)) for each in zip(*found, strict=True)]
        want = [sorted(flat(samples.iterate(epoch=epoch))) for epoch in range(2)]
        assert passes in (want, want[::-1])


def test_copies_of_what_a_loader_takes_count_for_themselves(files):
    samples = read(files).shuffle(100, seed=4).parse(uids).batch(6)
    first = samples.torch()
    passes = [flat(samples.iterate(epoch=epoch)) for epoch in range(3)]
    assert flat(first) == passes[0]
    for other in (ForkingPickler.loads(ForkingPickler.dumps(first)), copy.deepcopy(first), copy.copy(first)):
        assert flat(other) == passes[1]
    assert flat(first) == passes[1]
    folder = first._passes.folder
    assert os.path.isdir(folder)
    del first
    assert not os.path.exists(folder)
    assert flat(ForkingPickler.loads(ForkingPickler.dumps(samples))) == passes[0]


def test_ranks_that_are_forked_or_spawned_number_their_passes_apart(files):
    """Each as if it were alone, with workers of its own or none; also where the main process has made passes."""
    samples = read(files).shuffle(100, seed=4).parse(uids).batch(6).torch()
    want = [flat(samples) for _ in range(3)]
    for method, counts in (("fork", (0, 0, 2, 2)), ("spawn", (0, 0))):
        context = multiprocessing.get_context(method)
        receive, send = context.Pipe(duplex=False)
        ranks = [context.Process(target=send_passes, args=(send, samples, workers)) for workers in counts]
        for rank in ranks:
            rank.start()
        found = []
        for _ in ranks:
            assert receive.poll(120)
            found.append(receive.recv())
        for rank in ranks:
            rank.join(60)
        alone = [orders for workers, orders in found if not workers]
        assert alone == [[want[0], want[1], want[0]]] * 2
        shared = [orders for workers, orders in found if workers]
        for orders in shared:
            assert orders == shared[0]
            assert [sorted(each) for each in orders] == [ALL] * 3
            assert orders[0] == orders[2] != orders[1]


def passes(samples, workers):
    """Two passes and, set back, the first one again."""
    loader = DataLoader(samples, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    found = [flat(loader) for _ in range(2)]
    samples.set_epoch(0)
    return [*found, flat(loader)]


def send_passes(send, samples, workers):
    send.send((workers, passes(samples, workers)))


def test_length_of_what_a_loader_takes():
    samples = from_records(HELD).parse(uids).batch(2)
    assert len(DataLoader(samples.torch(), batch_size=None)) == 3
    with pytest.raises(TypeError):
        len(DataLoader(read("x").torch(), batch_size=None))


def test_functions_that_cannot_travel_are_refused_by_their_step(files):
    def keep(records):
        return not_of_seven(records)

    for dataset, step in (
        (read(files).filter(FilterByValue("uid", "ge", 0)).filter(keep), "filter"),
        (read(files).parse(lambda records: 1).batch(2), "apply or map"),
        (read(files, exclude=lambda name: False), r"read\(exclude=...\)"),
        (read(files).deal(lambda epoch: LocalFiles([files]), shared=False), "deal"),
        (read(files).merge(read(files).apply(keep)), "apply or map"),
        (read(files).share(trilith.connect("local://"), "q"), "share"),
    ):
        with pytest.raises(InvalidRequestError, match=f"{step} holds .* cannot be sent to another process"):
            ForkingPickler.dumps(dataset.torch())
        with pytest.raises(InvalidRequestError, match=step):
            list(DataLoader(dataset.torch(), batch_size=None, num_workers=1, multiprocessing_context="spawn"))


def test_every_kind_of_dataset_can_be_pickled(files):
    ignored = {"uid": Extra(), "label": Label()}
    spec = ParseSpec(ignored)
    sharding = ShardingConfig(features={"slot_1": ("table", [4])})
    for dataset in (
        read(files).parse(spec).batch(3),
        read(files).transform(transforms.FilterByLabel([0])).parse(InstanceParser(ignored)).batch(3),
        read(files).parse(partial(parse_fused, spec=spec, config=sharding)).batch(3),
    ):
        want = next(iter(dataset))
        found = next(iter(ForkingPickler.loads(ForkingPickler.dumps(dataset.torch()))))
        assert found.keys() == want.keys()
    for dataset in (
        read(files).filter(FilterByLabel([0])).negatives(neg_num=1, item_features=[1]).parse(ignored).batch(3),
        read(files).share("static://127.0.0.1:1", "q").convert("example").reweight("1,2", "1:1:1,2:1:1"),
        reference.create_instance_dataset([files], enable_dynamic_sharding=True),
        reference.PBDataset(patterns=[files]),
        read_kafka("t", servers="x:1", group_id="g"),
        from_records(HELD).repeat(2).take(3),
        *from_records(HELD).split(["a", "b"]).values(),
    ):
        again = ForkingPickler.loads(ForkingPickler.dumps(dataset))
        assert [node.mark for node in again.nodes] == [node.mark for node in dataset.nodes]


# ---- positions -------------------------------------------------------------------------------------------------------


def test_a_worker_goes_on_where_it_was_and_not_where_another_one_was(files, monkeypatch):
    dataset = read(files).shuffle(9, seed=1).parse(uids).batch(3)
    monkeypatch.setattr(dataset_module, "torch_worker", lambda: (1, 2))
    whole = [each.tolist() for each in dataset.iterate(epoch=3)]
    iterator = dataset.iterate(epoch=3)
    first = [next(iterator).tolist() for _ in range(3)]
    state = iterator.state_dict()
    resumed = iter(dataset)  # as torchdata's StatefulDataLoader does it in a worker
    resumed.load_state_dict(state)
    assert first + [each.tolist() for each in resumed] == whole
    for other in ((0, 2), (0, 1), (1, 3)):
        monkeypatch.setattr(dataset_module, "torch_worker", lambda other=other: other)
        with pytest.raises(InvalidRequestError, match="position is of DataLoader worker 1 of 2; this is"):
            dataset.iterate(state=state)


# ---- forks -----------------------------------------------------------------------------------------------------------


def in_child(work):
    """What `work` gives in a forked process, which must end by itself."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run():
        try:
            send.send(work())
        except TrilithError as error:
            send.send(error)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    assert receive.poll(60)
    found = receive.recv()
    child.join(60)
    assert child.exitcode == 0
    return found


def test_an_iterator_of_the_parent_is_refused_in_a_forked_child_and_left_alone(files):
    dataset = read(files).parse(uids).batch(4).prefetch(1, threads=2)
    iterator = iter(dataset)
    next(iterator)

    def child():
        try:
            next(iterator)
        except InvalidRequestError as error:
            iterator.close()
            return str(error), flat(dataset)

    message, found = in_child(child)
    assert "made before the process was forked" in message
    assert found == ALL
    assert flat(iterator) == ALL[4:]
    with pytest.raises(TypeError, match="state_dict"):
        ForkingPickler.dumps(iter(dataset))


def test_a_child_splits_flows_anew(files):
    names = ["a", "b"]
    keys = np.array([data_source_key(name) for name in names], np.uint32)
    records = dataclasses.replace(Records.of(HELD, "instance"), source_keys=keys[[0, 1, 0, 1, 0]])
    a, b = (each.parse(uids).batch(1) for each in from_records(records).split(names).values())
    reading = iter(a)
    next(reading)
    assert in_child(lambda: (flat(a), flat(b))) == ([1000, 1002, 1004], [1001, 1003])
    assert (flat(reading), flat(b)) == ([1002, 1004], [1001, 1003])


def test_a_fork_waits_for_kernels_that_are_being_compiled():
    from trilith.ops.jit import COMPILING

    held, go = threading.Event(), threading.Event()

    def compile_something():
        with COMPILING:
            held.set()
            go.wait(0.5)  # the fork comes meanwhile; were it not to wait, its child would find the lock held

    thread = threading.Thread(target=compile_something)
    thread.start()
    held.wait()

    def child():
        with COMPILING:
            return "compiled"

    assert in_child(child) == "compiled"
    go.set()
    thread.join()

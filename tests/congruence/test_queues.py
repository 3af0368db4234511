"""String queues behave the same on every shape of cluster, whatever happens to the workers."""

from __future__ import annotations

import threading

import pytest

import trilith
from tests.waiting import eventually
from trilith.data.pipeline.dataset import read
from trilith.errors import InvalidRequestError, QueueFullError, UnknownQueueError
from trilith.shard import Dequeued

LEASE = 600.0


def drain(client, name, worker="w"):
    taken = []
    while given := client.queues.dequeue(name, worker, lease_s=0):
        taken.append(given.element)
    assert given.exhausted
    return taken


def test_elements_come_first_in_first_out(client, name):
    assert client.queues.create(name, ["a", "b"])
    client.queues.enqueue(name, ["c", "ü/%"])
    assert drain(client, name) == ["a", "b", "c", "ü/%"]
    assert client.queues.dequeue(name, "w", lease_s=0) == Dequeued(exhausted=True)


def test_creating_a_queue_again_keeps_what_it_holds(client, name):
    assert client.queues.create(name, ["a"])
    assert not client.queues.create(name, ["b"])
    assert drain(client, name) == ["a"]


def test_more_elements_than_the_capacity_are_refused_as_a_whole(client, name):
    client.queues.create(name, ["a", "b"], capacity=3)
    with pytest.raises(QueueFullError, match="holds 2 elements; 2 more would exceed its capacity of 3"):
        client.queues.enqueue(name, ["c", "d"])
    client.queues.enqueue(name, ["c"])
    assert drain(client, name) == ["a", "b", "c"]
    client.queues.enqueue(name, ["d", "e", "f"])  # the room of what was consumed is free again


def test_a_queue_that_is_not_there_is_named(client, name):
    for call in (
        lambda: client.queues.enqueue(name, ["a"]),
        lambda: client.queues.dequeue(name, "w", lease_s=1),
    ):
        with pytest.raises(UnknownQueueError, match=name):
            call()


def test_calls_that_make_no_sense_are_refused(client, name):
    client.queues.create(name)
    for call, match in (
        (lambda: client.queues.create(""), "needs a name"),
        (lambda: client.queues.create("x", capacity=-1) if client._cluster.count == 0 else _raise(), "below 0"),
        (lambda: client.queues.dequeue([], "w", lease_s=1), "name of a queue"),
        (lambda: client.queues.dequeue(name, "w", lease_s=-1), "lease_s=-1"),
        (lambda: client.queues.dequeue(name, "w", lease_s=float("nan")), "lease_s=nan"),
        (lambda: client.queues.hold_leases("w", float("inf")), "lease_s=inf"),
        (lambda: client.queues.enqueue(name, "text"), "is one string"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            call()


def _raise():
    raise InvalidRequestError("below 0")


def test_a_leased_element_is_nobody_elses_until_it_is_acknowledged(client, name):
    client.queues.create(name, ["a"])
    given = client.queues.dequeue(name, "first", lease_s=LEASE)
    assert (given.queue, given.element) == (name, "a")
    assert client.queues.dequeue(name, "second", lease_s=LEASE) == Dequeued()  # it may come back
    assert client.queues.acknowledge("first", given.lease)
    assert client.queues.dequeue(name, "second", lease_s=LEASE) == Dequeued(exhausted=True)
    assert not client.queues.acknowledge("first", given.lease)


def test_what_a_dead_worker_had_is_handed_out_again_in_its_old_order(client, name):
    client.queues.create(name, ["a", "b", "c"])
    dead = f"dead-{name}"
    for _ in range(2):
        client.queues.dequeue(name, dead, lease_s=LEASE)
    assert client.queues.release_leases(dead) == 2
    assert drain(client, name) == ["a", "b", "c"]


def test_a_lease_that_lapses_gives_its_element_back_and_a_held_one_does_not(client, name):
    for lease_s in (0.05, 0.5, 5.0):  # long enough to be prolonged in time
        queue, lapsing, held = (f"{kind}-{lease_s}-{name}" for kind in ("queue", "lapsing", "held"))
        client.queues.create(queue, ["a", "b"])
        lost = client.queues.dequeue(queue, lapsing, lease_s=lease_s)
        kept = client.queues.dequeue(queue, held, lease_s=lease_s)
        if client.queues.hold_leases(held, LEASE) and kept.element == "b":
            break
    again = []
    eventually(lambda: again.append(client.queues.dequeue(queue, "other", lease_s=LEASE)) or again[-1])
    assert again[-1].element == "a"
    assert not client.queues.acknowledge(lapsing, lost.lease)
    assert client.queues.acknowledge("other", again[-1].lease)
    assert client.queues.acknowledge(held, kept.lease)


def test_what_an_element_became_is_enqueued_as_it_is_acknowledged(client, name):
    patterns, files = f"{name}.p", f"{name}.f"
    client.queues.create(patterns, ["x*", "y*"])
    client.queues.create(files)
    order = [files, patterns]
    given = client.queues.dequeue(order, "w", lease_s=LEASE)
    assert (given.queue, given.element) == (patterns, "x*")
    assert client.queues.acknowledge("w", given.lease, queue=files, elements=["x1", "x2"])
    assert [client.queues.dequeue(order, "w", lease_s=0).element for _ in range(3)] == ["x1", "x2", "y*"]
    assert client.queues.dequeue(order, "w", lease_s=0).exhausted


def test_a_worker_can_claim_what_it_had_before_it_was_restarted(client, name):
    client.queues.create(name, ["a", "b", "c"])
    worker = f"w-{name}"
    mine = client.queues.dequeue(name, worker, lease_s=LEASE)
    assert client.queues.dequeue(name, worker, lease_s=LEASE, claim="a") == mine
    claimed = client.queues.dequeue(name, worker, lease_s=LEASE, claim="c")
    assert claimed.element == "c"
    assert client.queues.dequeue(name, "other", lease_s=LEASE, claim="a") == Dequeued()
    assert (
        drain(client, name) == ["b"]
        if client.queues.acknowledge(worker, mine.lease) and (client.queues.acknowledge(worker, claimed.lease))
        else False
    )


def test_queues_come_back_from_a_checkpoint_with_what_was_leased(local, shape, tmp_path):
    cluster = local(shape)
    with cluster.connect() as client:
        client.queues.create("files", ["a", "b", "c", "d"], capacity=10)
        done = client.queues.dequeue("files", "w", lease_s=LEASE)
        open_ = client.queues.dequeue("files", "w", lease_s=LEASE)
        client.queues.acknowledge("w", done.lease)
        client.save(str(tmp_path / "ckpt"))
        drain_some = client.queues.dequeue("files", "w", lease_s=0)
        assert drain_some.element == "c"
        client.restore(str(tmp_path / "ckpt"))
        assert client.queues.dequeue("files", "w", lease_s=LEASE, claim=open_.element).lease == open_.lease
        assert client.queues.release_leases("w") == 1
        taken = [client.queues.dequeue("files", "w", lease_s=0).element for _ in range(3)]
        assert taken == ["b", "c", "d"]
        with pytest.raises(QueueFullError):
            client.queues.enqueue("files", [str(i) for i in range(11)])


def test_a_checkpoint_of_one_ps_gives_its_queues_to_ps_0_of_three(local, tmp_path):
    with local("1-ps").connect() as client:
        client.queues.create("files", ["a"])
        client.save(str(tmp_path / "ckpt"))
    three = local("3-ps")
    with three.connect() as client:
        client.restore(str(tmp_path / "ckpt"))
        assert drain(client, "files") == ["a"]
        assert [len(store.queues.export()) for store in three.stores] == [1, 0, 0]


def test_a_queue_survives_in_embedded_mode_without_tables():
    with trilith.connect("local://") as client:
        client.queues.create("q", ["a"])
        assert drain(client, "q") == ["a"]


# ---- files dealt from the queue --------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """Six files of five records each; record r of file f is 10 f + r."""
    for part in range(6):
        payloads = [str(10 * part + row).encode() for row in range(5)]
        (tmp_path / f"part-{part}").write_bytes(b"".join(len(each).to_bytes(8, "little") + each for each in payloads))
    return str(tmp_path / "part-*")


ALL = [10 * part + row for part in range(6) for row in range(5)]


def shared(client, name, parts, worker):
    dataset = read(parts, kind="plaintext", block_bytes=16)
    return dataset.share(client, name, worker=f"{worker}-{name}", lease_s=LEASE)


def test_a_queue_that_has_nothing_left_is_told_of(client, name, parts, caplog):
    assert [int(each) for each in shared(client, name, parts, "first")] == ALL
    assert not caplog.records
    assert list(shared(client, name, parts, "first")) == []  # a job that is run again
    (told,) = (each.getMessage() for each in caplog.records)
    assert told.startswith(f"queue '{name}/0' had no file for this worker: others, or an earlier run, took all")


def test_workers_that_share_a_queue_read_every_file_once(client, name, parts):
    found = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: found[i].extend(int(each) for each in shared(client, name, parts, i)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found[0] + found[1]) == ALL


def test_what_a_worker_leaves_unfinished_is_read_by_another(client, name, parts):
    with iter(shared(client, name, parts, "first")) as leaving:
        assert [int(next(leaving)) for _ in range(7)] == ALL[:7]
    assert [int(each) for each in shared(client, name, parts, "second")] == ALL[5:]


def test_a_worker_goes_on_in_the_file_it_had(client, name, parts):
    dataset = shared(client, name, parts, "worker").batch(3)
    with iter(dataset) as before:
        first = [int(each) for _ in range(3) for each in next(before).payloads()]
        state = before.state_dict()
    with dataset.iterate(state=state) as after:
        rest = [int(each) for records in after for each in records.payloads()]
    assert first + rest == ALL
    assert client.queues.release_leases(f"worker-{name}") == 0

"""Prefetching and asynchronous pushing: order, bounds, errors, ends; and how late they make rows."""

from __future__ import annotations

import threading

import pytest

from tests.unit.nn_fakes import FakeClient
from trilith.data.parse.specs import Slot
from trilith.data.pipeline.dataset import from_records
from trilith.data.pipeline.positions import from_json, to_json
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.nn import EmbeddingCollection, Feature
from trilith.ops.ragged import Ragged
from trilith.pipelining import Ahead, Prefetcher, Pusher
from trilith_proto.proto_parser_pb2 import Instance

WAIT_S = 20.0


# ---- fetching ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("background", [False, True])
def test_items_come_in_order_with_what_was_fetched_for_them(depth, background):
    with Prefetcher(range(20), lambda item: item * item, depth, background=background) as ahead:
        assert [(item, fetched.result()) for item, fetched in ahead] == [(i, i * i) for i in range(20)]


@pytest.mark.parametrize("background", [False, True])
def test_a_fetch_begins_when_the_item_depth_places_before_is_taken(background):
    """The first `depth` items are fetched at once, each further one when an item is taken, and none earlier."""
    fetched = []
    reached = threading.Condition()

    def fetch(item):
        with reached:
            fetched.append(item)
            reached.notify_all()

    with Prefetcher(range(10), fetch, 2, background=background) as ahead:
        for item, result in ahead:
            result.result()
            most = min(item + 3, 10)
            with reached:
                assert reached.wait_for(lambda most=most: len(fetched) >= most, WAIT_S)
                assert fetched == list(range(most))


def test_errors_of_a_fetch_belong_to_its_item_and_those_of_the_source_come_in_their_place():
    def source():
        yield from (1, 0, 2)
        raise KeyError("source")

    with Prefetcher(source(), lambda item: 1 / item, 2) as prefetcher:
        ahead = iter(prefetcher)
        one, zero, two = (next(ahead)[1] for _ in range(3))
        assert (one.result(), two.result()) == (1.0, 0.5)
        with pytest.raises(ZeroDivisionError):
            zero.result()
        with pytest.raises(KeyError):
            next(ahead)


def test_a_prefetcher_that_is_left_early_ends_its_thread_and_has_fetched_depth_ahead():
    fetched = []
    with Prefetcher(iter(range(1000)), fetched.append, 3) as ahead:
        for item, _ in ahead:
            if item == 4:
                break
        thread = ahead._thread
    assert not thread.is_alive()
    assert fetched == list(range(8))


@pytest.mark.parametrize(("first", "second"), [(1, 0), (1, 2), (3, 1)])
def test_a_fetch_may_follow_another_and_both_have_fetched_what_was_asked_for_when_they_end(first, second):
    begun, followed = [], []

    def follow(value):
        followed.append(value)
        return 12 / value

    def begin(item):
        begun.append(item)
        return item - 2

    with Prefetcher(iter(range(100)), begin, first).then(follow, second) as ahead:
        for item, fetched in ahead:
            if item == 2:
                with pytest.raises(ZeroDivisionError):
                    fetched.result()
            else:
                assert fetched.result() == 12 / (item - 2)
            if item == 6:
                break
    assert followed == [item - 2 for item in range(7 + second)]
    assert begun == list(range(7 + second + first + (second > 0)))


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("followed", [0, 2])
@pytest.mark.parametrize("threads", [0, 2])
def test_the_position_is_that_of_the_loop_whatever_was_taken_ahead(depth, background, followed, threads):
    samples = from_records([str(number).encode() for number in range(40)]).shuffle(9, seed=3).batch(3)
    samples = samples.map(lambda records: [int(each) for each in records.payloads()])
    samples = samples.prefetch(2, threads=threads) if threads else samples
    whole = list(samples.iterate(epoch=2))
    iterator = samples.iterate(epoch=2)
    ahead = Prefetcher(iterator, sum, depth, background=background)
    ahead = ahead.then(lambda each: each, followed) if followed else ahead
    seen, states = [], [(iterator.state_dict(), ahead.state_dict())]
    with ahead:
        for batch, fetched in ahead:
            assert fetched.result() == sum(batch)
            seen.append(batch)
            states.append((iterator.state_dict(), ahead.state_dict()))
            if len(seen) == 11:
                break
    states.append((iterator.state_dict(), ahead.state_dict()))  # what was fetched ahead is forgotten, not passed over
    assert seen == whole[:11]
    for done, both in enumerate(states):
        done = min(done, 11)
        for state in both:
            assert seen[:done] + list(samples.iterate(state=state)) == whole


def test_items_without_a_place_have_no_position():
    with Prefetcher(iter(range(9)), abs, 2) as ahead:
        next(iter(ahead))
        with pytest.raises(InvalidRequestError, match=r"samples\.iterate\(\)"):
            ahead.state_dict()


def test_training_that_is_resumed_sees_each_batch_once(tmp_path):
    """The rows are those of a run that was never interrupted, with batches fetched ahead in all."""
    payloads = [Instance(fid=[1 << 54 | number % 7, 1 << 54 | number % 3]).SerializeToString() for number in range(60)]
    samples = from_records(payloads).shuffle(20, seed=1).parse({"f": Slot(1)}).batch(4)

    def train(client, iterator, steps=None):
        collection = EmbeddingCollection(client, {"f": Feature(client.table("t"), "sum")})
        state = None
        with collection.prefetch(iterator, 2, ids=lambda batch: batch) as batches:
            for done, (_, fetched) in enumerate(batches, 1):
                collection(fetched.result())["f"].sum().backward()
                state = iterator.state_dict()
                if done == steps:
                    break
        return state

    found = []
    for interrupted in (False, True):
        client = FakeClient({"t": 1})
        if interrupted:
            state = from_json(to_json(train(client, samples.iterate(epoch=1), 5)))
            train(client, samples.iterate(state=state))
        else:
            train(client, samples.iterate(epoch=1))
        found.append({key: value.tolist() for key, value in client.rows.items()})
    assert found[0] == found[1]
    assert len(found[0]) == 7


def test_depths_below_zero_are_refused():
    for make in (lambda: Prefetcher([], str, -1), lambda: Pusher(-1)):
        with pytest.raises(InvalidRequestError, match="-1 is below 0"):
            make()


# ---- pushing behind --------------------------------------------------------------------------------------------------


def test_depth_zero_pushes_in_the_callers_thread():
    threads = []
    Pusher().push(lambda: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("background", [False, True])
def test_pushes_keep_their_order_and_draining_leaves_none(background):
    pusher, done = Pusher(3, background=background), []
    for i in range(50):
        pusher.push(lambda i=i: done.append(i))
    pusher.drain()
    assert done == list(range(50))
    pusher.close()


def test_at_most_depth_pushes_are_unfinished():
    pusher, go, done = Pusher(2), threading.Semaphore(0), []

    def call():
        assert go.acquire(timeout=WAIT_S)
        done.append(1)

    pusher.push(call)
    pusher.push(call)
    third = threading.Thread(target=lambda: pusher.push(call))
    third.start()
    third.join(0.05)
    assert third.is_alive()
    assert not done
    go.release()
    third.join(WAIT_S)
    assert not third.is_alive()
    assert len(done) == 1
    go.release(2)
    pusher.drain()
    assert len(done) == 3
    pusher.close()


@pytest.mark.parametrize("background", [False, True])
def test_the_error_of_a_push_is_raised_as_it_was_and_those_behind_it_are_dropped(background):
    pusher, entered, fail, done = Pusher(2, background=background), threading.Event(), threading.Event(), []
    cause = UnavailableError("PS 1 is gone")

    def broken():
        entered.set()
        assert not background or fail.wait(WAIT_S)
        raise cause

    pusher.push(broken)
    pusher.push(lambda: done.append(1))
    fail.set()
    with pytest.raises(UnavailableError) as caught:
        pusher.drain()
    assert caught.value is cause
    pusher.drain()
    assert not done
    pusher.push(lambda: done.append(2))  # it may be used on
    pusher.drain()
    assert done == [2]
    pusher.close()


@pytest.mark.parametrize("background", [False, True])
def test_values_are_read_one_step_ahead(background):
    now = [5.0]
    value = Ahead(lambda: now[0], background=background)
    seen = []
    for _ in range(3):
        seen.append(value.take())
        value._join()
        now[0] -= 1
    assert seen == [5.0, 5.0, 4.0]
    value.forget()
    assert value.take() == 2.0
    value._join()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefetch", "push"), [(0, 0), (2, 0), (0, 1), (1, 2), (3, 2)])
def test_rows_lack_exactly_the_updates_that_are_stated_at_worst(prefetch, push):
    """With every delay at its longest, a row that is stepped by -1 each time lacks prefetch + push steps."""
    client = FakeClient({"t": 1})
    collection = EmbeddingCollection(client, {"f": Feature(client.table("t"), "sum")})
    collection.exchange.pusher = Pusher(push, background=False)
    batches = [{"f": Ragged.of_singles([7])} for _ in range(12)]
    seen = []
    for _, fetched in Prefetcher(batches, collection.fetch, prefetch, background=False):
        rows = collection(fetched.result())["f"]
        seen.append(-rows.item())
        rows.sum().backward()
    assert seen == [max(0.0, step - prefetch - push) for step in range(12)]
    collection.drain()
    assert client.rows["t", 7] == -12

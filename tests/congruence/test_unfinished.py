"""Writes that fail on some shards: the error says which have done them, and they are sent again as the same writes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.congruence.faults import Meddled
from trilith.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MemoryLimitError,
    UnknownTableError,
)
from trilith.tables import Sgd, Zeros
from trilith_services.ps.process.shard import LocalShard

IDS = np.arange(6)
ONES = np.ones((6, 2), np.float32)
TABLE = {"dim": 2, "optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()}
WRITES = {
    "apply_gradients": lambda client, **options: client.table("t").apply_gradients(IDS, -ONES, **options),
    "assign_add": lambda client, **options: client.table("t").assign_add(IDS, ONES, **options),
    "erase": lambda client, **options: client.erase("t", IDS, **options),
    "reinitialize": lambda client, **options: client.reinitialize("t", IDS, **options),
    "clear": lambda client, **options: client.clear(["t"], **options),
    "evict": lambda client, **options: client.evict(**options),
}


class Faulty(Meddled):
    """A store, of which one write is answered late or refused."""

    def __init__(self, store: LocalShard) -> None:
        super().__init__(store)
        self.late: threading.Event | None = None
        self.refusal: Exception | None = None
        self.calls = 0
        self.good = 0  # calls before the one that is answered late or refused

    def __getattr__(self, name):
        found = super().__getattr__(name)
        if name not in WRITES:
            return found

        def call(*arguments, **options):
            self.calls += 1
            if self.refusal is not None and self.calls > self.good:
                refusal, self.refusal = self.refusal, None
                raise refusal
            result = found(*arguments, **options)
            if self.late is not None and self.calls > self.good:
                assert self.late.wait(60)
            return result

        return call


@pytest.fixture
def faulty(local):
    shards: list[Faulty] = []

    def wrap(store):
        shards.append(Faulty(store))
        return shards[-1]

    with local("3-ps", wrap=wrap).connect() as client:
        client.table("t", **TABLE)
        yield client, shards


@pytest.mark.parametrize("verb", WRITES)
def test_a_write_whose_answer_did_not_come_is_done_once_when_it_is_sent_again(faulty, verb):
    client, shards = faulty
    table = client.table("t")
    table.assign(IDS, ONES)
    shards[1].late = threading.Event()
    with pytest.raises(DeadlineExceededError) as raised:
        WRITES[verb](client, timeout_s=1.0)
    unfinished = raised.value.unfinished
    assert (unfinished.done, unfinished.refused, unfinished.unknown) == ((0, 2), (), (1,))
    assert "done by shards 0, 2; not known of shard 1" in raised.value.__notes__[-1]
    shards[1].late.set()
    for _ in range(20):  # younger ones do not make it unknown
        client.create_tables([])
        client.erase("t", [9_999])
        client.apply_gradients({"t": (np.arange(10_000, 10_006), ONES)})
    after = table.lookup(IDS)
    calls = [shard.calls for shard in shards]
    client.retry(raised.value)
    np.testing.assert_array_equal(table.lookup(IDS), after)
    assert [shard.calls for shard in shards] == [calls[0], calls[1] + 1, calls[2]]
    expected = {"apply_gradients": 2, "assign_add": 2, "evict": 1}.get(verb, 0)
    np.testing.assert_array_equal(after, expected * ONES)


def test_a_write_that_one_shard_refused_is_completed(faulty):
    client, shards = faulty
    shards[2].refusal = MemoryLimitError("full")
    with pytest.raises(MemoryLimitError) as raised:
        client.table("t").apply_gradients(IDS, -ONES)
    unfinished = raised.value.unfinished
    assert (unfinished.done, unfinished.refused, unfinished.unknown) == ((0, 1), (2,), ())
    client.retry(raised.value)
    np.testing.assert_array_equal(client.table("t").lookup(IDS), ONES)


def test_a_write_in_several_messages_is_completed(local):
    shards: list[Faulty] = []

    def wrap(store):
        shards.append(Faulty(store))
        return shards[-1]

    with local("1-ps", wrap=wrap).connect(chunk_bytes=64) as client:
        table = client.table("t", **TABLE)
        table.assign(IDS, 0 * ONES)
        shards[0].late = threading.Event()
        with pytest.raises(DeadlineExceededError) as raised:
            table.apply_gradients(IDS, -ONES, timeout_s=1.0)
        assert raised.value.unfinished.unknown == (0,)
        shards[0].late.set()
        client.retry(raised.value)
        np.testing.assert_array_equal(table.lookup(IDS), ONES)


def test_messages_that_were_done_before_one_whose_answer_did_not_come_are_not_done_again(local):
    shards: list[Faulty] = []

    def wrap(store):
        shards.append(Faulty(store))
        return shards[-1]

    with local("1-ps", wrap=wrap).connect(chunk_bytes=64) as client:
        table = client.table("t", **TABLE)
        shards[0].good, shards[0].late = shards[0].calls + 1, threading.Event()
        with pytest.raises(DeadlineExceededError) as raised:
            table.apply_gradients(IDS, -ONES, timeout_s=1.0)
        shards[0].late.set()
        for _ in range(3):
            client.erase("t", [99])
        client.retry(raised.value)
        np.testing.assert_array_equal(table.lookup(IDS), ONES)


@pytest.mark.parametrize("verb", ["apply_gradients", "assign_add", "erase"])
def test_messages_that_were_done_before_one_that_was_refused_are_not_done_again(local, verb):
    shards: list[Faulty] = []

    def wrap(store):
        shards.append(Faulty(store))
        return shards[-1]

    with local("1-ps", wrap=wrap).connect(chunk_bytes=64) as client:
        table = client.table("t", **TABLE)
        ids = np.arange(40)
        call = {
            "apply_gradients": lambda: table.apply_gradients(ids, np.full((40, 2), -1, np.float32)),
            "assign_add": lambda: table.assign_add(ids, np.ones((40, 2), np.float32)),
            "erase": lambda: table.erase(ids),
        }[verb]
        table.assign(ids, 0 * np.ones((40, 2), np.float32))
        shards[0].good, shards[0].refusal = shards[0].calls + 1, MemoryLimitError("full")
        with pytest.raises(MemoryLimitError) as raised:
            call()
        assert raised.value.unfinished.unknown == (0,)
        client.retry(raised.value)
        np.testing.assert_array_equal(table.lookup(ids), np.full((40, 2), verb != "erase", np.float32))
        assert table.size() == (0 if verb == "erase" else 40)


def test_dense_variables_and_the_step_are_completed(faulty):
    client, shards = faulty
    client.create_variables({"w": np.zeros(4, np.float32)}, optimizer=Sgd(learning_rate=1.0))
    owner = next(shard for shard in shards if any(shard._store.variables))
    original = owner._store.apply_dense_gradients
    event = threading.Event()

    def slow(*arguments, **options):
        original(*arguments, **options)
        assert event.wait(60)

    owner._store.apply_dense_gradients = slow
    with pytest.raises(DeadlineExceededError) as raised:
        client.apply_dense_gradients({"w": -np.ones(4, np.float32)}, timeout_s=1.0)
    event.set()
    client.retry(raised.value)
    np.testing.assert_array_equal(client.pull_variables(["w"])[0]["w"], np.ones(4))


def test_what_was_refused_everywhere_or_changed_nothing_has_nothing_to_go_on_with(client, name):
    table = client.table(name, **TABLE)
    for call in (lambda: client.lookup({"nowhere": [1]}), lambda: table.assign(IDS, ONES, request_time=-1)):
        with pytest.raises((UnknownTableError, InvalidRequestError)) as raised:
            call()
        assert raised.value.unfinished is None
        with pytest.raises(InvalidRequestError, match="has no unfinished write"):
            client.retry(raised.value)
    with pytest.raises(InvalidRequestError, match="ValueError has no unfinished write"):
        client.retry(ValueError("of something else"))

"""Asking several entries: who is asked, who is left alone, and what is said when nobody answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

import trilith
from tests.waiting import eventually
from trilith.discovery.serving import ServingDirectory
from trilith.errors import (
    ClosedError,
    DataError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    TrilithError,
    UnavailableError,
)
from trilith.rpc.kept import Kept
from trilith.rpc.remote import ERROR_KEY
from trilith.serving import prediction
from trilith.serving.prediction import Predictor
from trilith_proto import serving_pb2
from trilith_services.grpc.serve import Method, Server

FAST_S = 0.001


class FakeEntry:
    """Scores every record with its number, or does as a test says."""

    def __init__(self, number: float, listen: str) -> None:
        self.number = number
        self.asked = 0
        self.failure: TrilithError | None = None
        self.model = "m"
        self.free = threading.Event()
        self.free.set()
        self.waiting = 0
        methods = {
            "Predict": Method(call=self.predict, parse=serving_pb2.PredictRequest.FromString, serialize=_bytes),
            "ModelStatus": Method(call=self.status, serialize=_bytes, control=True),
        }
        self._server = Server("trilith.Prediction", methods)
        self.address = f"127.0.0.1:{self._server.listen(listen)}"

    def predict(self, request: serving_pb2.PredictRequest, context: grpc.ServicerContext):
        self.asked += 1
        self.waiting += not self.free.is_set()
        if not self.free.wait(20) or self.failure is not None:
            failure = self.failure or UnavailableError("nobody freed it")
            context.set_trailing_metadata(((ERROR_KEY, type(failure).__name__),))
            context.abort(grpc.StatusCode[failure.status], str(failure))
        values = np.full(len(request.records), self.number, "<f4").tobytes()
        output = serving_pb2.PredictOutput(name="score", width=1, values=values)
        return serving_pb2.PredictResponse(outputs=[output], model_version=3)

    def status(self, request: bytes, context: grpc.ServicerContext):
        return serving_pb2.ModelStatusResponse(model=self.model)

    def stop(self) -> None:
        self.free.set()
        self._server.stop(0)


def _bytes(message) -> bytes:
    return message.SerializeToString()


@pytest.fixture
def start() -> Iterator[Callable[..., FakeEntry]]:
    with contextlib.ExitStack() as stack:

        def start(number: float = 1.0, listen: str = "127.0.0.1:0") -> FakeEntry:
            entry = FakeEntry(number, listen)
            stack.callback(entry.stop)
            return entry

        yield start


@pytest.fixture
def two(start) -> Iterator[SimpleNamespace]:
    """Two entries, and a predictor that knows both."""
    a, b = start(1.0), start(2.0)
    with Predictor([a.address, b.address], timeout_s=20.0) as predictor:
        yield SimpleNamespace(a=a, b=b, predictor=predictor)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(FAST_S)


def score(predictor: Predictor) -> float:
    return float(predictor.predict([b""]).scores[0])


def test_requests_are_spread_over_the_entries(two) -> None:
    assert {score(two.predictor) for _ in range(64)} == {1.0, 2.0}


def test_a_busy_entry_gets_no_further_requests(two) -> None:
    two.a.free.clear()
    with ThreadPoolExecutor(1) as pool:
        while not two.a.asked:  # until one hangs there
            waiting = pool.submit(score, two.predictor)
            until(lambda: two.a.asked or waiting.done())  # noqa: B023
        assert {score(two.predictor) for _ in range(32)} == {2.0}
        assert two.a.asked == 1
        two.a.free.set()
        assert waiting.result() == 1.0


def test_an_entry_that_fails_is_left_alone_until_it_says_that_it_is_well(two) -> None:
    two.a.failure, two.a.model = UnavailableError("no replica of shard 0"), ""
    assert {score(two.predictor) for _ in range(32)} == {2.0}
    assert two.a.asked == 1
    two.a.failure, two.a.model = None, "m"
    until(lambda: score(two.predictor) == 1.0)


def test_an_entry_that_ended_is_passed_over_and_its_successor_used(two, start) -> None:
    two.a.stop()
    assert {score(two.predictor) for _ in range(32)} == {2.0}
    start(3.0, two.a.address)
    until(lambda: score(two.predictor) == 3.0)


def test_an_entry_that_does_not_answer_gets_a_share_of_the_time_only(two) -> None:
    two.a.free.clear()
    started = time.monotonic()
    for _ in range(16):
        assert two.predictor.predict([b""], timeout_s=2.0).scores.tolist() == [2.0]
    assert two.a.asked >= 1
    assert time.monotonic() - started < 10.0


def test_an_overloaded_entry_is_passed_over_and_asked_again(two) -> None:
    two.a.failure = OverloadedError("enough")
    assert {score(two.predictor) for _ in range(32)} == {2.0}
    assert two.a.asked > 1


def test_what_is_wrong_with_a_request_is_said_by_the_first_that_is_asked(two) -> None:
    two.a.failure = two.b.failure = DataError("record 0")
    with pytest.raises(DataError, match="record 0"):
        two.predictor.predict([b"x"])
    assert two.a.asked + two.b.asked == 1


def test_when_all_fail_the_reason_is_told_at_the_deadline(two) -> None:
    two.a.failure = two.b.failure = UnavailableError("no replica of shard 0")
    with pytest.raises(UnavailableError, match="no replica of shard 0"):
        two.predictor.predict([b""], timeout_s=2.0)
    assert two.a.asked > 1
    assert two.b.asked > 1


def test_what_an_entry_said_before_it_fell_silent_is_told_at_the_deadline(start) -> None:
    entry = start()
    entry.failure = UnavailableError("no replica of shard 0")
    with Predictor(entry.address) as predictor:
        silence = threading.Thread(target=lambda: (until(lambda: entry.asked > 1), entry.free.clear()))
        silence.start()
        with pytest.raises(UnavailableError, match="no replica of shard 0"):
            predictor.predict([b""], timeout_s=1.0)
        silence.join()


def test_an_entry_alone_gets_all_the_time(start) -> None:
    entry = start()
    entry.free.clear()
    with Predictor(entry.address) as predictor:
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"no answer within 0\.5 s"):
            predictor.predict([b""], timeout_s=0.5)
        assert time.monotonic() - started >= 0.45


@pytest.mark.parametrize("records", [["text"], [b"", None]])
def test_a_record_that_is_no_bytes_is_refused(start, records) -> None:
    with (
        Predictor(start().address) as predictor,
        pytest.raises(InvalidRequestError, match="serialized messages are bytes"),
    ):
        predictor.predict(records)


def test_entries_come_and_go_in_a_directory(start, tmp_path) -> None:
    url = f"hosts://{tmp_path}"
    directory = ServingDirectory(url, "clicks")
    entries = directory.entries()
    with Predictor(url, name="clicks", timeout_s=40.0) as predictor:
        with pytest.raises(UnavailableError, match=r"lists no entry of serving model 'clicks'"):
            predictor.predict([b""], timeout_s=0.1)
        a, b = start(1.0), start(2.0)
        entries.announce(0, a.address, available=True)
        assert score(predictor) == 1.0  # it waits for one to be listed
        entries.announce(1, b.address, available=True)
        until(lambda: score(predictor) == 2.0)
        for entry in (a, b):
            entry.free.clear()
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(score(predictor))) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: a.waiting and b.waiting)  # as each gets two of the four
        b.free.set()
        entries.withdraw(0, a.address)
        until(lambda: a.address not in {each.address for each in predictor._balancer.members})
        a.free.set()  # what was on its way there is answered
        for thread in threads:
            thread.join()
        assert 1.0 in answers
        assert {score(predictor) for _ in range(16)} == {2.0}
        with pytest.raises(InvalidRequestError, match="Only ZooKeeper gives numbers"):
            entries.announce(None, a.address, available=True)
    directory.close()


def test_remote_predict_takes_a_directory(start, tmp_path) -> None:
    entry = start(5.0)
    directory = ServingDirectory(f"hosts://{tmp_path}", "model")
    directory.entries().announce(0, entry.address, available=True)
    assert trilith.remote_predict(f"hosts://{tmp_path}", [b"", b""]).scores.tolist() == [5.0, 5.0]
    directory.close()


def test_a_closed_predictor_says_so(two) -> None:
    two.predictor.close()
    with pytest.raises(ClosedError):
        two.predictor.predict([b""])
    with pytest.raises(InvalidRequestError, match="no address"):
        Predictor("")


# ---- connections that are kept ---------------------------------------------------------------------------------------


def test_a_deadline_that_is_too_near_is_held_against_no_entry(start):
    entry = start()
    with Predictor(entry.address) as predictor:
        predictor.predict([b"x"])
        entry.free.clear()
        with pytest.raises(DeadlineExceededError):
            predictor.predict([b"x"], timeout_s=0.01)
        (connection,) = predictor._balancer.members
        assert not connection.suspect
        with pytest.raises(DeadlineExceededError):
            predictor.predict([b"x"], timeout_s=0.1)
        assert connection.suspect
        with pytest.raises(DeadlineExceededError):
            predictor.predict([b"x"], timeout_s=0.01)
        assert connection.suspect


class Connections:
    """Makes connections as a test lets it."""

    def __init__(self, **options: float) -> None:
        self.made: list[str] = []
        self.closed: list[str] = []
        self.hold: dict[str, threading.Event] = {}
        self.failure: Exception | None = None
        self.kept: Kept[str, str] = Kept(self.make, self.closed.append, **options)  # type: ignore[arg-type]

    def make(self, key: str, timeout_s: float) -> str:
        self.made.append(key)
        if key in self.hold:
            assert self.hold[key].wait(60)
        if self.failure is not None:
            raise self.failure
        return key

    def use(self, key: str, timeout_s: float = 60.0) -> None:
        with self.kept.use(key, timeout_s) as found:
            assert found == key


def test_only_so_many_connections_are_kept_and_the_longest_unused_goes_first():
    these = Connections(most=3)
    for key in "abcadb":  # b gives way to d, and c to b
        these.use(key)
    assert (these.made, these.closed, len(these.kept)) == (list("abcdb"), ["b", "c"], 3)
    with these.kept.use("x", 1.0), these.kept.use("y", 1.0), these.kept.use("z", 1.0), these.kept.use("a", 1.0):
        pass
    assert len(these.kept) == 3
    assert set(these.closed) >= {"d"}


def test_a_connection_that_nobody_uses_is_closed_without_another_call():
    these = Connections(idle_s=0.05)
    with these.kept.use("a", 1.0):
        these.use("b")
        eventually(lambda: these.closed == ["b"], timeout_s=60.0)
    eventually(lambda: these.closed == ["b", "a"], timeout_s=60.0)
    assert len(these.kept) == 0


def test_who_connects_slowly_holds_nobody_else_up():
    these = Connections()
    these.hold["slow"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(these.use, "slow")
        eventually(lambda: these.made == ["slow"], timeout_s=60.0)
        these.use("quick")
        with pytest.raises(DeadlineExceededError, match="slow: not connected within 0.01 s"):
            these.use("slow", 0.01)
        these.hold["slow"].set()
        slow.result(60)
    these.use("slow")
    assert these.made == ["slow", "quick"]


def test_a_connection_that_failed_is_not_kept():
    these = Connections()
    these.failure = UnavailableError("nobody is there")
    with pytest.raises(UnavailableError, match="nobody is there"):
        these.use("a")
    assert len(these.kept) == 0
    these.failure = None
    these.use("a")
    assert these.made == ["a", "a"]


def test_a_forked_child_waits_for_no_connection_that_its_parent_was_making():
    these = Connections()
    hold = these.hold["a"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(these.use, "a")
        eventually(lambda: these.made == ["a"], timeout_s=60.0)
        these.use("b")
        held = these.kept._lock
        held.acquire()
        these.kept.after_fork()  # what a child does, whoever holds the lock
        held.release()
        assert len(these.kept) == 1
        del these.hold["a"]
        these.use("b")
        these.use("a")
        assert these.made == ["a", "b", "a"]
        hold.set()
        slow.result(60)


def test_asking_once_in_a_while_keeps_few_connections(start, monkeypatch):
    closed: list[str] = []
    kept = Kept(prediction._connected, lambda each: (closed.append(each._addresses[0]), each.close()), most=2)
    monkeypatch.setattr(prediction, "_KEPT", kept)
    entries = [start(float(number)) for number in range(3)]
    for number, entry in enumerate(entries):
        assert trilith.remote_predict(entry.address, [b"x"]).scores.tolist() == [number]
    assert closed == [entries[0].address]
    assert trilith.remote_predict(entries[0].address, [b"x"]).scores.tolist() == [0]

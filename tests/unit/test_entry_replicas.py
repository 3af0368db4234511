"""The replicas that an entry asks: what is held against them, and what is said when a shard has none."""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.served import train
from tests.waiting import eventually
from trilith.config import ClientConfig
from trilith.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ReadOnlyError,
    TrilithError,
    UnavailableError,
    UnknownTableError,
)
from trilith.serving.exports import ps_base
from trilith.shard import IdPart
from trilith_proto import ps_pb2, serving_pb2
from trilith_services.console.sampling import Sample, entry_state, missing_replicas
from trilith_services.console.serving_list import ServingProcess
from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica
from trilith_services.serving import replicas as module
from trilith_services.serving.replicas import ReplicaSet
from trilith_services.serving.server import Entry, EntryOptions

PARTS = [IdPart("t", np.arange(3, dtype=np.uint64))]
ROWS = [np.ones((3, 1), np.float32)]


class FakeShard:
    """A replica that answers, or fails as it is told."""

    made: dict[str, FakeShard]

    def __init__(self, resolve: Callable[[], str], config: ClientConfig, *, index: int) -> None:
        self.failure: TrilithError | None = None
        self.asked = 0
        self.closed = False
        self.made[resolve()] = self

    def until(self, deadline: float) -> FakeShard:
        return self

    def lookup(self, parts: Any, *, float16: bool) -> Any:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return ROWS

    def describe(self) -> ps_pb2.DescribeResponse:
        return ps_pb2.DescribeResponse(shard_index=1, shard_count=2)

    def stats(self) -> ps_pb2.StatsResponse:
        return ps_pb2.StatsResponse(replica=ps_pb2.ReplicaStats(as_of=17.0))

    def global_step(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pair(monkeypatch) -> tuple[ReplicaSet, FakeShard, FakeShard]:
    """Two replicas of shard 1 of 2, both well."""
    monkeypatch.setattr(FakeShard, "made", {}, raising=False)
    monkeypatch.setattr(module, "RemoteShard", FakeShard)
    shard = ReplicaSet(1, 2, ClientConfig(timeout_s=0.5))
    shard.set_addresses(["a:1", "b:2"])
    shard.probe(lambda work: work())
    assert shard.as_of == 17.0
    return shard, FakeShard.made["a:1"], FakeShard.made["b:2"]


@pytest.mark.parametrize(
    "error",
    [UnknownTableError("no table 't'"), InvalidRequestError("ids of shape (2, 2)"), ReadOnlyError("x")],
)
def test_what_a_caller_did_wrong_is_told_at_once_and_held_against_no_replica(pair, error):
    shard, a, b = pair
    a.failure = b.failure = error
    with pytest.raises(type(error), match=re.escape(str(error))):
        shard.lookup(PARTS)
    assert a.asked + b.asked == 1
    assert [(each.healthy, each.failures, each.error) for each in shard.status()] == [(True, 0, "")] * 2
    assert shard.as_of == 17.0


def test_a_full_queue_or_a_near_deadline_is_held_against_no_replica(pair):
    shard, a, b = pair
    a.failure = b.failure = OverloadedError("128 calls are waiting already")
    with pytest.raises(UnavailableError, match="128 calls"):
        shard.until(time.monotonic() + 0.05).lookup(PARTS)
    a.failure = b.failure = DeadlineExceededError("no answer")
    with pytest.raises(UnavailableError, match="no answer"):
        shard.until(time.monotonic() + 0.01).lookup(PARTS)
    assert [each.healthy for each in shard.status()] == [True, True]
    assert sum(each.failures for each in shard.status()) >= 2


@pytest.mark.parametrize("error", [UnavailableError("away"), DeadlineExceededError("slow"), InternalError("a fault")])
def test_a_replica_that_fails_is_left_alone_and_another_asked(pair, error):
    shard, a, b = pair
    a.failure = error
    for _ in range(4):
        assert shard.lookup(PARTS) is ROWS
    assert a.asked <= 1 <= b.asked
    a.failure, b.failure = None, error
    assert shard.lookup(PARTS) is ROWS  # also one that was left alone, if no other is well
    shard.probe(lambda work: work())
    assert [each.healthy for each in shard.status()] == [True, True]


def test_a_replica_that_is_listed_no_more_still_answers_what_it_was_asked(pair, monkeypatch):
    shard, a, b = pair
    shard.set_addresses(["a:1"])
    assert (a.closed, b.closed) == (False, True)
    asked, go = threading.Event(), threading.Event()

    def lookup(parts: Any, *, float16: bool) -> Any:
        asked.set()
        assert go.wait(30)
        assert not a.closed
        return ROWS

    monkeypatch.setattr(a, "lookup", lookup)
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(shard.lookup, PARTS)
        assert asked.wait(30)
        shard.set_addresses([])
        go.set()
        assert rows.result(30) is ROWS
    assert a.closed


def test_a_shard_without_a_replica_is_shown_as_one_that_is_missing(pair):
    shard, *_ = pair
    shard.set_addresses(["b:2"])
    assert [(each.address, each.healthy) for each in shard.status()] == [("b:2", True)]
    shard.set_addresses([])
    (missing,) = shard.status()
    assert (missing.shard, missing.address, missing.healthy) == (1, "b:2", False)
    assert missing.error == "no replica of this shard is listed any more"
    (never,) = ReplicaSet(0, 2, ClientConfig()).status()
    assert (never.address, never.healthy, never.error) == ("", False, "no replica of this shard is listed")


# ---- an entry whose shard has no replica -----------------------------------------------------------------------------


class ChangingList:
    """Says who the replicas are when the test says so."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._changed: Callable[[Iterable[str]], None] = lambda addresses: None

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        self._changed = changed
        changed(self.addresses)
        return lambda: None

    def say(self, addresses: list[str]) -> None:
        self._changed(addresses)

    def close(self) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Entry, ChangingList, ReplicaServer]]:
    """A distributed export behind an entry, and the only replica of its only shard."""
    with train("local://", tmp_path / "model") as trained:
        done = trained.exporter().export(trained.save(), str(tmp_path / "exports"))
    rows = f"{ps_base(str(tmp_path / 'exports'), 0)}/{done.version}/rows"
    replica = ReplicaServer(Replica(LocalShard(threads=1)), ReplicaOptions(rows=rows))
    listed = ChangingList([f"127.0.0.1:{replica.start()}"])
    entry = Entry(str(tmp_path / "exports"), EntryOptions(http="127.0.0.1:0"), replicas=listed)
    entry.start()
    yield entry, listed, replica
    entry.stop()
    replica.stop()


def get(entry: Entry, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{entry.http_port}{path}", timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def health(entry: Entry, service: str) -> int:
    with grpc.insecure_channel(entry.address) as channel:
        return (
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status
        )


def test_an_entry_is_ready_only_while_it_can_answer(served):
    entry, listed, replica = served
    services = "", "trilith.Prediction"
    eventually(lambda: get(entry, "/healthz") == (200, "ok\n"), timeout_s=60.0)
    eventually(lambda: [health(entry, each) for each in services] == [1, 1], timeout_s=60.0)

    listed.say([])  # as when the session of the only one has ended
    status, why = get(entry, "/healthz")
    assert (status, why) == (
        503,
        f"no replica of shard 0 of 1 answers: {listed.addresses[0]}: no replica of this shard is listed any more\n",
    )
    eventually(lambda: [health(entry, each) for each in services] == [2, 2], timeout_s=60.0)
    assert get(entry, "/livez") == (200, "ok\n")
    assert health(entry, "live") == 1
    unhealthy = f'trilith_serving_replica_healthy{{address="{listed.addresses[0]}",shard="0"}} 0.0'
    assert unhealthy in get(entry, "/metrics")[1]

    listed.say(listed.addresses)
    eventually(lambda: get(entry, "/healthz")[0] == 200, timeout_s=60.0)
    eventually(lambda: [health(entry, each) for each in services] == [1, 1], timeout_s=60.0)
    replica.stop()  # listed, but away
    eventually(lambda: get(entry, "/healthz")[0] == 503, timeout_s=60.0)


def test_an_entry_computes_with_as_many_threads_as_it_is_given(served, tmp_path, monkeypatch):
    _, listed, _ = served
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    for threads in (None, 3):
        entry = Entry(str(tmp_path / "exports"), EntryOptions(torch_threads=threads), replicas=listed)
        entry.start()
        entry.stop()
    assert given == [3]


# ---- what the console makes of it ------------------------------------------------------------------------------------


def sample(**fields: Any) -> Sample[serving_pb2.ModelStatusResponse]:
    return Sample(time.monotonic(), serving_pb2.ModelStatusResponse(**fields))


def test_the_console_shows_an_entry_that_cannot_answer_as_degraded():
    listed = ServingProcess(server_type="entry", shard=0, name="1", address="a:1", state="available")
    well = serving_pb2.ReplicaStatus(shard=0, address="b:1", healthy=True)
    gone = serving_pb2.ReplicaStatus(shard=1, address="c:1", error="no replica of this shard is listed any more")
    found = entry_state(listed, sample(model="m", mode="distributed", replicas=[well, gone]))
    assert (found.state, found.healthy_replicas, found.replicas) == ("degraded", 1, 2)
    assert found.problem == "shard 1: 0 of 1 replicas answer (no replica of this shard is listed any more)"
    assert [each.shard for each in missing_replicas(2, [], [found])] == [0, 1]
    found = entry_state(listed, sample(model="m", mode="distributed", replicas=[well]))
    assert (found.state, found.problem) == ("available", "")
    found = entry_state(listed, sample(load_error="version 3: damaged"))
    assert (found.state, found.problem) == ("available", "version 3: damaged")
    assert missing_replicas(2, [], [entry_state(listed, sample(model="m", mode="standalone"))]) == []

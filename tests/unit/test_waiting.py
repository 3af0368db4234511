"""Whoever waits says so: for what, where, why and for how long; sparsely, and once where many wait for the same."""

from __future__ import annotations

import logging
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import trilith
from trilith.config import ClientConfig
from trilith.discovery.members import wait_for_ps
from trilith.discovery.urls import open_directory
from trilith.errors import TrilithError, UnavailableError
from trilith.ops import jit
from trilith.rpc.remote import RemoteShard
from trilith.runtime import waiting
from trilith.runtime.waiting import Wait

PATIENCE_S = 30.0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three seconds pass at once."""
    monkeypatch.setattr(waiting, "FIRST_S", 0.05)
    waiting._SPOKEN.last.clear()
    yield
    waiting._SPOKEN.last.clear()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Gives the next line said; of seconds that have passed it has N."""
    heard: queue.Queue[str] = queue.Queue()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.put(record.getMessage())

    listener = Listener(logging.WARNING)
    waiting.log.addHandler(listener)
    yield lambda: re.sub(r": \d+ s so far", ": N s so far", heard.get(timeout=PATIENCE_S))
    waiting.log.removeHandler(listener)


def test_after_three_seconds_it_is_said_what_is_waited_for_and_how_long_at_most(soon, lines) -> None:
    wait = Wait("shard 7 at host:7000", most=120.0)
    wait.why = "refused"
    with wait:
        assert lines() == "waiting for shard 7 at host:7000 (refused): N s so far, 120 s at most"
    with Wait("an export in here", most=None):
        assert lines() == "waiting for an export in here: N s so far, for as long as it takes"
    with Wait("kernels", most="a minute or two", so_far_s=12.0):
        assert lines() == "waiting for kernels: N s so far, a minute or two"


def test_what_comes_soon_is_not_spoken_of(caplog) -> None:
    said: list[str] = []
    with Wait("it", most=1.0, say=said.append):
        pass
    assert said == []
    assert waiting.FIRST_S == 3.0


def test_lines_are_ever_further_apart() -> None:
    times, at = [], waiting.FIRST_S
    for _ in range(6):
        times.append(at)
        at += waiting._apart_s(at)
    assert times == [3.0, 9.0, 27.0, 81.0, 141.0, 201.0]


def test_many_that_wait_for_the_same_speak_once(soon) -> None:
    said: queue.Queue[str] = queue.Queue()
    first = Wait("the same", most=1.0, say=said.put).begin()
    said.get(timeout=PATIENCE_S)
    others = [Wait("the same", most=1.0) for _ in range(3)]
    assert not any(each._is_due(60.0) for each in others)
    first.end(came=False)
    assert not others[0]._is_due(60.0)  # nor whoever tries again soon
    first = Wait("the same", most=1.0)
    first.begin().end(came=True)
    assert others[0]._is_due(60.0)  # that was another time


def test_who_tries_again_and_again_is_ever_more_silent(monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    waiting._SPOKEN.last.clear()
    spoken = []
    for _ in range(100):  # gives up after five seconds and tries again after five
        now += 10.0
        if Wait("the same", most=5.0)._is_due(waiting._apart_s(waiting.FIRST_S)):
            spoken.append(now - 1000.0)
    waiting._SPOKEN.last.clear()
    assert spoken[:4] == [10.0, 20.0, 40.0, 90.0]
    assert np.diff(spoken[3:]).min() >= 50


def test_the_end_is_told_where_the_waiting_was(soon, lines, caplog) -> None:
    caplog.set_level(logging.INFO)
    with Wait("it", most=1.0):
        lines()
    assert re.fullmatch(r"it: there, after \d\.\d s", caplog.messages[-1])
    caplog.clear()
    given_up = Wait("another", most=1.0).begin()
    lines()
    given_up.end(came=False)
    assert "there" not in caplog.text


# ---- who waits


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address that nobody listens on."""
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{keeper.getsockname()[1]}"


@pytest.fixture
def mute() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_client_whose_ps_refuses_says_that_and_ends_with_that(soon, lines, refusing) -> None:
    with pytest.raises(TrilithError, match="no connection: .*[Rr]efused"):
        trilith.connect(f"static://{refusing}", timeout_s=2.0)
    said = lines()
    assert said.startswith(f"waiting for shard 0 at {refusing}")
    assert said.endswith("2 s at most")


def test_a_call_in_the_middle_says_so_too(soon, lines, refusing) -> None:
    shard = RemoteShard(lambda: refusing, ClientConfig(timeout_s=2.0), index=3)
    with pytest.raises(TrilithError, match="refused"):
        shard.stats()
    assert re.match(rf"waiting for shard 3 at {refusing} \(.*refused.*\): N s so far, 2 s at most", lines())
    shard.close()


def test_a_deadline_that_comes_first_says_what_was_the_matter(refusing) -> None:
    shard = RemoteShard(lambda: refusing, ClientConfig(timeout_s=0.001), index=3)
    with pytest.raises(TrilithError, match="no connection: .*refused"):
        shard.stats()
    shard.close()


def test_a_ps_that_takes_the_connection_and_is_mute_is_spoken_of(soon, lines, mute) -> None:
    with pytest.raises(TrilithError):
        trilith.connect(f"static://{mute}", timeout_s=1.0)
    assert lines() == f"waiting for shard 0 at {mute}: N s so far, 1 s at most"


def test_zookeeper_that_is_away_is_spoken_of_with_its_address(soon, lines, mute) -> None:
    with pytest.raises(UnavailableError, match=f"no ZooKeeper at {mute} within 0.5 s"):
        open_directory(f"zk://{mute}/trilith", timeout_s=0.5)
    assert re.fullmatch(rf"waiting for ZooKeeper at {mute}( \(.*\))?: N s so far, 0.5 s at most", lines())


def test_ps_that_are_not_in_the_directory_are_spoken_of(soon, lines, tmp_path) -> None:
    directory = open_directory(f"hosts://{tmp_path}")
    with pytest.raises(UnavailableError, match=r"PS \[0, 1\] of 2"):
        wait_for_ps(directory, 2, timeout_s=0.5)
    want = f"waiting for PS [0, 1] of 2 to register in HostFilesDirectory('{tmp_path}')"
    assert lines() == f"{want}: N s so far, 0.5 s at most"
    directory.close()


def test_compiling_is_one_waiting_of_many_kernels(soon, lines, monkeypatch) -> None:
    monkeypatch.setattr(jit, "_compiled_s", [])
    go = threading.Event()
    compiling = threading.Thread(target=jit._say_compiling(lambda name: go.wait(PATIENCE_S)), args=("a",))
    compiling.start()
    said = lines()
    go.set()
    compiling.join()
    assert said.startswith("waiting for kernels to be compiled for this processor, once for all; they are kept in /")
    assert said.endswith("a minute or two in all")
    assert len(jit._compiled_s) == 1

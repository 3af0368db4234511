"""Rounds of checkpoints, in virtual time: they keep coming whatever saves take, and a clean stop loses nothing."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from trilith import checkpoint
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint import checkpointer, snapshot
from trilith_services.ps.checkpoint.checkpointer import Checkpointer
from trilith_services.ps.checkpoint.rounds import Rounds

EPOCH = 1_700_000_040.0  # a whole minute


class World:
    """Virtual time: threads that run one at a time, each until it sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._turns: list[tuple[float, int, threading.Event]] = []
        self._order = itertools.count()
        self._back = threading.Event()
        self._mine = threading.local()
        self._running = 0
        self.failures: list[BaseException] = []

    def sleep(self, seconds: float) -> None:
        heapq.heappush(self._turns, (self.now + max(seconds, 1e-3), next(self._order), self._mine.event))
        self._mine.event.clear()
        self._back.set()
        self._mine.event.wait()

    def start(self, body: Callable[[], None], *, after: float = 0.0) -> None:
        event = threading.Event()

        def run() -> None:
            self._mine.event = event
            event.wait()
            try:
                body()
            except BaseException as error:  # noqa: BLE001 (raised by `run`)
                self.failures.append(error)
            self._running -= 1
            self._back.set()

        self._running += 1
        heapq.heappush(self._turns, (self.now + after, next(self._order), event))
        threading.Thread(target=run, daemon=True).start()

    def run(self) -> None:
        while self._running:
            self.now, _, event = heapq.heappop(self._turns)
            self._back.clear()
            event.set()
            self._back.wait()
        if self.failures:
            raise self.failures[0]


class FakePs:
    """One PS whose saves only take time; its state is a number that grows with each acknowledged write."""

    def __init__(
        self, world: World, url: str, index: int, count: int, takes: Callable[[], float], *, every_s: float = 60.0
    ) -> None:
        self.world = world
        self.takes = takes
        self.skew = 0.0
        self.store: Any = SimpleNamespace(
            index=index, count=count, life=f"{random.Random(index).randrange(2**32):08x}", restored_from="", state=0
        )
        self.checkpointer = Checkpointer(self.store, url, every_s=every_s, clock=self.clock)
        self.store.ps = self
        self._stop = False
        self.saves = 0

    def clock(self) -> float:
        return EPOCH + self.world.now + self.skew

    def serve(self, *, until: float, then_stop: bool = False) -> None:
        """What the thread and the process around it do."""
        if not self.checkpointer._registered:
            self.checkpointer.register()
        self.checkpointer._due = self.checkpointer._tick_after(self.clock())
        while self.world.now < until and not self.checkpointer._stopping.is_set():
            self.store.state += 1
            pause = self.checkpointer._pause()
            self.world.sleep(min(pause, max(until - self.world.now, 0.0)))
        if then_stop:
            self.store.state += 1  # acknowledged just before
            assert self.checkpointer.stop()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()

    def save(store: Any, path: str, *, clock: Callable[[], float]) -> ps_pb2.SaveResponse:
        folder, state, began = Folder(path), store.state, clock()
        saving = checkpoint.saving_name(store.index, store.count, store.life)
        folder.write(saving, b"")
        made.sleep(store.ps.takes())
        response = ps_pb2.SaveResponse(global_step=state)
        part = checkpoint.part_of(
            store.index, store.count, response, finished_unix_s=clock(), began_unix_s=began, life=store.life
        )
        checkpoint.write_part(folder, part)
        folder.remove(saving)
        store.ps.saves += 1
        return response

    monkeypatch.setattr(snapshot, "save_shard", save)
    monkeypatch.setattr(checkpointer.time, "sleep", made.sleep)
    return made


@pytest.fixture
def url() -> Iterator[str]:
    where = f"memory://{uuid4().hex}"
    yield where
    Folder(where).remove_all()


class Completed:
    """When checkpoints become complete."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
        self.times: list[float] = []
        self.numbers: list[int] = []
        write = checkpoint.write_manifest

        def note(path: str, parts: Any, **options: Any) -> Any:
            self.times.append(world.now)
            self.numbers.append(int(path[-20:]))
            return write(path, parts, **options)

        monkeypatch.setattr(checkpoint, "write_manifest", note)

    def longest_gap(self, until: float) -> float:
        return max(b - a for a, b in itertools.pairwise([0.0, *self.times, until]))


def fixed(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def between(low: float, high: float, seed: int) -> Callable[[], float]:
    draw = random.Random(seed)
    return lambda: draw.uniform(low, high)


def once_slow(usual: float, slow: float) -> Callable[[], float]:
    left = iter([usual, usual, slow])
    return lambda: next(left, usual)


@pytest.mark.parametrize(
    ("takes", "slowest"),
    [
        pytest.param([fixed(70.0)] * 3, 70.0, id="all-slower-than-the-interval"),
        pytest.param([fixed(70.0), fixed(70.0), once_slow(70.0, 130.0)], 130.0, id="one-save-of-130-s"),
        pytest.param([fixed(1.0), once_slow(1.0, 130.0)], 130.0, id="one-slow-save-of-fast-ones"),
        pytest.param([between(65.0, 125.0, seed) for seed in range(10)], 125.0, id="10-ps-of-65-to-125-s"),
        pytest.param([between(40.0, 70.0, seed) for seed in range(100)], 70.0, id="100-ps-of-40-to-70-s"),
    ],
)
def test_a_checkpoint_becomes_complete_within_the_slowest_save_and_two_intervals(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch, takes: list[Callable[[], float]], slowest: float
) -> None:
    end = 3600.0 if len(takes) < 50 else 500.0
    seen = Completed(monkeypatch, world)
    cluster = [FakePs(world, url, index, len(takes), each) for index, each in enumerate(takes)]
    for ps in cluster:
        world.start(lambda ps=ps: ps.serve(until=end))
    world.run()
    assert seen.longest_gap(end) <= slowest + 2 * 60.0
    assert len(checkpoint.list_checkpoints(url)) <= 3 + 1  # --checkpoint-keep, and one that is being written
    # Nothing is written for nothing: every part is one of a complete checkpoint, but for the last.
    assert max(ps.saves for ps in cluster) <= len(seen.times) + 2


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("every_s", [0.5, 60.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_clean_stop_of_all_ps_loses_no_acknowledged_write(
    world: World, url: str, count: int, every_s: float, seed: int
) -> None:
    draw = random.Random(seed)
    cluster = [
        FakePs(world, url, index, count, between(0.1, draw.choice([0.5, 5.0]), draw.randrange(99)), every_s=every_s)
        for index in range(count)
    ]
    spread = draw.choice([0.05, 1.5, 20.0])  # of the moment at which each is told
    for ps in cluster:
        world.start(lambda ps=ps: ps.serve(until=2.2 * every_s + draw.uniform(0, spread), then_stop=True))
    world.run()
    newest = checkpoint.newest_complete(url)
    assert newest is not None
    states = [part.global_step for part in checkpoint.read_manifest(newest.path).parts]
    assert states == [ps.store.state for ps in cluster]


def test_a_ps_that_is_started_again_completes_the_round_that_waits_for_it(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Completed(monkeypatch, world)
    stays = FakePs(world, url, 0, 2, fixed(5.0))
    dies = FakePs(world, url, 1, 2, fixed(5.0))
    again = FakePs(world, url, 1, 2, fixed(5.0))
    again.store.life = again.checkpointer._rounds._life = "00000abc"
    world.start(lambda: stays.serve(until=600.0))
    world.start(lambda: dies.serve(until=100.0))
    world.start(lambda: again.serve(until=600.0), after=300.0)
    world.run()
    assert [at for at in seen.times if at < 100] != []
    assert [at for at in seen.times if 100 < at < 300] == []
    assert len([at for at in seen.times if 300 <= at <= 320]) == 1
    assert seen.times[-1] > 500


def test_a_ps_that_starts_first_does_not_complete_a_round_from_before_the_stop(world: World, url: str) -> None:
    first, last = (FakePs(world, url, index, 2, fixed(1.0)) for index in range(2))
    again = FakePs(world, url, 0, 2, fixed(1.0))
    again.store.life = again.checkpointer._rounds._life = "00000abc"
    world.start(lambda: first.serve(until=130.0, then_stop=True))
    world.start(lambda: last.serve(until=290.0, then_stop=True))  # it has begun a round that it does not end with
    world.start(lambda: again.serve(until=500.0), after=300.0)
    chosen = []
    for after in (299.0, 400.0):
        world.start(lambda: chosen.append(checkpoint.newest_complete(url)), after=after)
    world.run()
    assert chosen[0] is not None
    assert chosen[1] == chosen[0], "whoever starts later restores what the first has restored"
    assert checkpoint.read_manifest(chosen[0].path).parts[1].global_step == last.store.state


def test_parts_of_a_ps_that_lost_its_place_do_not_count(world: World, url: str, caplog: Any) -> None:
    stays = FakePs(world, url, 0, 2, fixed(1.0))
    lost = FakePs(world, url, 1, 2, fixed(30.0))
    successor = FakePs(world, url, 1, 2, fixed(3.0))
    successor.store.life = successor.checkpointer._rounds._life = "00000abc"
    lost.store.state = 1_000_000
    world.start(lambda: stays.serve(until=400.0))
    world.start(lambda: lost.serve(until=400.0, then_stop=True))  # it is cut off, and saves on, and ends in order
    world.start(lambda: successor.serve(until=400.0), after=70.0)
    with caplog.at_level(logging.ERROR):
        world.run()
    after = [info for info in checkpoint.list_checkpoints(url) if info.complete]
    assert after
    assert all(checkpoint.read_manifest(info.path).parts[1].life == "00000abc" for info in after)
    assert "another process has been started as PS 1 of 2" in caplog.text


@pytest.mark.parametrize("hours", [-1.0, 1.0])
@pytest.mark.parametrize("who", [[0, 1], [1]])
def test_a_clock_that_is_set_neither_stops_checkpoints_nor_makes_an_old_one_the_newest(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch, hours: float, who: list[int]
) -> None:
    seen = Completed(monkeypatch, world)
    cluster = [FakePs(world, url, index, 2, fixed(1.0)) for index in range(2)]
    for ps in cluster:
        world.start(lambda ps=ps: ps.serve(until=1200.0, then_stop=True))

    def set_clocks() -> None:
        for index in who:
            cluster[index].skew += hours * 3600

    world.start(set_clocks, after=610.0)
    world.run()
    assert seen.longest_gap(1200.0) <= 3 * 60.0
    newest = checkpoint.newest_complete(url)
    assert newest is not None
    assert newest.number == seen.numbers[-1]
    assert [part.global_step for part in checkpoint.read_manifest(newest.path).parts] == [
        ps.store.state for ps in cluster
    ]


def test_a_damaged_word_about_who_a_ps_is_does_not_end_checkpoints(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Completed(monkeypatch, world)
    for index in range(2):
        ps = FakePs(world, url, index, 2, fixed(1.0))
        world.start(lambda ps=ps: ps.serve(until=300.0))
    world.start(lambda: Folder(url).write("ps.00001-of-00002.json", b"{"), after=100.0)
    world.run()
    assert seen.times[-1] > 230


def test_who_is_late_is_named(world: World, url: str, caplog: Any) -> None:
    cluster = [FakePs(world, url, 0, 3, fixed(1.0)), FakePs(world, url, 1, 3, fixed(500.0))]  # PS 2 is away
    for ps in cluster:
        world.start(lambda ps=ps: ps.serve(until=200.0))
    with caplog.at_level(logging.WARNING):
        world.run()
    (said,) = {record.getMessage() for record in caplog.records if "waits for" in record.getMessage()}
    assert "PS 1 (still writing), PS 2 (has not begun)" in said
    assert "PS 0" not in said


def test_waiting_for_others_looks_seldom(world: World, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda folder: looks.append(world.now) or names(folder))
    ps = FakePs(world, url, 0, 2, fixed(1.0))
    world.start(lambda: ps.serve(until=660.0))
    world.run()
    assert len([at for at in looks if at > 120]) <= 540 / 5 * 4  # directories listed in nine minutes, not 20 a second


def test_a_save_that_fails_is_tried_again_at_the_next_tick(
    world: World, url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    seen = Completed(monkeypatch, world)
    save, failures = snapshot.save_shard, [90.0]

    def full(store: Any, path: str, *, clock: Callable[[], float]) -> Any:
        if store.index == 1 and world.now < failures[0]:
            raise CheckpointError("no space left")
        return save(store, path, clock=clock)

    monkeypatch.setattr(snapshot, "save_shard", full)
    for index in range(2):
        ps = FakePs(world, url, index, 2, fixed(1.0))
        world.start(lambda ps=ps: ps.serve(until=300.0))
    world.run()
    assert 90 < seen.times[0] < 190
    failed = [record for record in caplog.records if "checkpoint failed" in record.getMessage()]
    assert len(failed) == 1
    assert not any(record.exc_info for record in failed)  # a line, not a traceback


def test_ps_that_begin_at_once_begin_the_same_round(url: str) -> None:
    first, second = (Rounds(url, index, 2, f"0000000{index}", keep=3) for index in range(2))
    Folder(first.path(60_000)).write("round.00000000000000060000.tmp-1", b"")  # the first is in the middle of beginning
    assert second.begin(60_000) == 60_000
    assert first.begin(60_000) == 60_000
    assert [info.number for info in checkpoint.list_checkpoints(url)] == [60_000]

"""Notes: what workers that do not wait for each other leave for each other in a folder."""

from __future__ import annotations

import json
import threading

import pytest

from trilith.estimator.notes import Notes
from trilith.estimator.state import RankState

HERE = RankState(epoch=1, batches=4, steps=9, samples=36, source={"file": "a", "offset": 5}, rng={"torch": "AA=="})


@pytest.fixture
def two(tmp_path):
    return Notes(str(tmp_path), 0, 2), Notes(str(tmp_path), 1, 2)


def test_a_position_counts_for_rows_that_have_learned_as_much(two):
    chief, other = two
    assert other.mine(100) is None
    other.write(HERE, step=20)
    assert other.mine(20) == HERE
    assert other.mine(19) is None  # PS went back behind it
    assert list(chief.others(25)) == [(1, HERE)]
    assert list(chief.others(19)) == []
    assert list(other.others(25)) == []


def test_another_number_of_workers_has_other_notes(two, tmp_path):
    two[1].write(HERE, step=20)
    assert Notes(str(tmp_path), 1, 3).mine(20) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"step": 1}'])
def test_a_damaged_note_is_left_out_and_told(two, tmp_path, caplog, content):
    chief, other = two
    other.write(HERE, step=20)
    (path,) = (tmp_path / "workers").iterdir()
    path.write_bytes(content)
    assert list(chief.others(25)) == []
    assert str(path) in caplog.text


def test_the_chief_waits_for_whoever_has_not_ended(two):
    chief, other = two
    looks = iter(range(1000))

    def until() -> bool:
        if next(looks) == 2:
            other.write(HERE, step=20, ended=True)
        return False

    other.write(HERE, step=20)
    assert chief.wait_for_others(600.0, until) == []
    assert next(looks) >= 2


def test_a_worker_without_a_sign_of_life_is_not_waited_for(two):
    chief, other = two
    assert chief.wait_for_others(0.1, lambda: False) == [1]
    other.write(HERE, step=20)
    assert chief.wait_for_others(0.1, lambda: False) == [1]
    assert chief.wait_for_others(600.0, lambda: True) == []


def test_who_is_at_work_says_so(two):
    chief, other = two
    beats = iter(range(1000))

    def until() -> bool:
        other.beat()
        return next(beats) == 3

    other.write(HERE, step=20)
    assert chief.wait_for_others(0.6, until) == []  # as each look finds another beat


def test_a_stop_is_for_whoever_runs_or_comes_before_the_chief_begins_again(two, tmp_path):
    chief, other = two
    chief.begin()
    assert other.stopped() == chief.stopped() == ""
    other.stop("enough")
    assert chief.stopped() == other.stopped() == Notes(str(tmp_path), 1, 2).stopped() == "enough"
    Notes(str(tmp_path), 0, 2).begin()
    assert other.stopped() == Notes(str(tmp_path), 1, 2).stopped() == ""


def test_who_comes_after_a_stop_waits_until_the_chief_says_what_it_is_for(two, tmp_path):
    chief, _ = two
    chief.begin()
    Notes(str(tmp_path), 1, 2).join(600.0)  # nobody is stopped: no wait
    chief.stop("enough")
    found = []

    def come() -> None:
        late = Notes(str(tmp_path), 1, 2)
        late.join(600.0)
        found.append(late.stopped())

    for sign in (chief.beat, Notes(str(tmp_path), 0, 2).begin):
        thread = threading.Thread(target=come)
        thread.start()
        while thread.is_alive():  # until it has looked
            sign()
            thread.join(0.1)
    assert found == ["enough", ""]


def test_who_comes_after_a_stop_without_a_chief_is_stopped(two, tmp_path):
    chief, _ = two
    chief.begin()
    chief.stop("enough")
    late = Notes(str(tmp_path), 1, 2)
    late.join(0.1)
    assert late.stopped() == "enough"


def test_notes_of_earlier_runs_are_forgotten_and_those_of_workers_come_back(two, tmp_path):
    chief, other = two
    other.write(HERE, step=20)
    chief.stop("enough")
    chief.forget()
    assert list(chief.others(25)) == []
    other.beat()
    assert list(chief.others(25)) == [(1, HERE)]
    assert json.loads((tmp_path / "workers" / "stop.json").read_text())["reason"] == "enough"

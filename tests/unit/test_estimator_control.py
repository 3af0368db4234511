"""Control: an operator pauses, resumes, saves and ends a run by files in its model_dir."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.waiting import eventually
from trilith.errors import DeadlineExceededError, InvalidRequestError
from trilith.estimator import Callback, Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.control import Control, ask
from trilith_services.cli import main


class Clicks(Task):
    user = Embedding(dim=2)
    labels: ClassVar = {"click": Label()}

    def forward(self, x):
        return x.user.vector.sum(1)


BATCH = {"user": np.arange(8), "click": np.arange(8) % 2}


class Watched(Callback):
    """Steps as they come, and the names of other events."""

    def __init__(self) -> None:
        self.step = 0
        self.names: list[str] = []
        self.reason = ""

    def on(self, event):
        self.step = event.step
        if event.name != "step":
            self.names.append(event.name)
        if event.name == "stopped":
            self.reason = event.reason


class Training:
    """A run in a thread of its own, which ends when it is told to."""

    def __init__(self, model_dir: str, **run: Any) -> None:
        self.seen = Watched()
        self._end = threading.Event()
        settings = {"progress": "none", "epochs": 1 << 30, "threads": 1} | run
        self._job = Estimator(
            Clicks(dense_optimizer=None), RunConfig(model_dir=model_dir, **settings),
            train=lambda: iter(lambda: None if self._end.is_set() else BATCH, None), callbacks=[self.seen],
        )  # fmt: skip
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self._job as job:
                job.train()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def __enter__(self) -> Training:
        self._thread.start()
        eventually(lambda: self.seen.step > 2 or self.error)
        assert self.error is None
        return self

    def ended(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.error is None

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(60)


def stands(training: Training) -> bool:
    """Whether no step is taken for a while."""
    before = training.seen.step
    return not threading.Event().wait(0.3) and training.seen.step == before


def test_a_run_is_paused_saved_resumed_and_ended(tmp_path):
    where = str(tmp_path / "model")
    with Training(where) as training:
        found = ask(where, "status")
        assert (found.done, found.said, found.status["paused"]) == (True, "trains", False)
        assert found.status["step"] >= 2
        assert ask(where, "pause").done
        eventually(lambda: ask(where, "status").status["waiting"] == [0])
        assert stands(training)
        again = ask(where, "pause")
        assert (again.done, again.said) == (False, "it is paused already")
        saved = ask(where, "save")
        assert saved.done
        assert saved.said.startswith(f"saved {where}/ckpt-")
        assert saved.status["saved_step"] == saved.status["step"] == training.seen.step
        assert stands(training)
        before = training.seen.step
        assert ask(where, "resume").said == "training goes on"
        eventually(lambda: training.seen.step > before)
        assert ask(where, "resume").said == "it was not paused"
        assert ask(where, "stop").done
        training.ended()
        assert training.seen.reason == "trilith control stop"
        assert training.seen.names[-1] == "stopped"
        assert training.seen.names.count("saved") == 2  # the last one as the run ended
        assert [name for name in training.seen.names if name in ("paused", "resumed")] == ["paused", "resumed"] * 2
    with pytest.raises(InvalidRequestError, match=f"no run trains in {where}: there is no .*run.json"):
        ask(where, "status")


def test_a_paused_run_is_ended(tmp_path):
    where = str(tmp_path)
    with Training(where) as training:
        ask(where, "pause")
        eventually(lambda: ask(where, "status").status["waiting"] == [0])
        ask(where, "stop")
        training.ended()
        assert training.seen.names[-1] == "stopped"


def test_a_save_that_fails_is_said_and_training_goes_on(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    where = str(tmp_path)
    with Training(where) as training:
        monkeypatch.setattr("trilith.estimator.saving.Saver.save", fail)
        found = ask(where, "save")
        assert (found.done, found.said) == (False, "not saved: the disk is full")
        before = training.seen.step
        eventually(lambda: training.seen.step > before)
        monkeypatch.undo()
        assert ask(where, "save").done
        ask(where, "stop")
        training.ended()


def control_of(folder: Any, status: Callable[[], dict[str, Any]] = dict) -> Control:
    return Control(str(folder), 0, chief=True, status=status)


def test_what_was_asked_of_an_earlier_run_is_forgotten(tmp_path):
    folder = tmp_path / "control"
    folder.mkdir()
    (folder / "request-1.json").write_text('{"action": "stop"}')
    (folder / "paused.json").write_text("{}")
    with control_of(tmp_path) as control:
        assert sorted(each.name for each in folder.iterdir()) == ["run.json"]
        assert not control.paused
        assert ask(str(tmp_path), "status").said == "trains"
        assert not control.stop_reason
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"action": "explode"}', '{"action": 7}', "\xff"])
def test_a_request_that_is_none_is_answered_so(tmp_path, content):
    with control_of(tmp_path):
        (tmp_path / "control" / "request-7.json").write_text(content, "latin-1")
        answer = tmp_path / "control" / "answer-7.json"
        eventually(answer.exists)
        assert json.loads(answer.read_text())["said"].endswith("is none of status, pause, resume, save, stop")
        assert ask(str(tmp_path), "status").done


def test_workers_that_do_not_meet_wait_as_the_chief_says(tmp_path):
    with control_of(tmp_path), Control(str(tmp_path), 1, chief=False, status=dict) as other:
        ask(str(tmp_path), "pause")
        eventually(lambda: other.paused)
        assert ask(str(tmp_path), "status").status["waiting"] == []
        with other.waits():
            assert ask(str(tmp_path), "status").status["waiting"] == [1]
            ask(str(tmp_path), "resume")
            eventually(lambda: not other.paused)
        assert ask(str(tmp_path), "status").status["waiting"] == []


def test_whoever_waits_for_a_save_is_told_that_the_run_has_ended(tmp_path):
    found = []
    with control_of(tmp_path) as control:
        asker = threading.Thread(target=lambda: found.append(ask(str(tmp_path), "save")))
        asker.start()
        eventually(lambda: control.save_wanted)
    asker.join(60)
    assert (found[0].done, found[0].said) == (False, "not saved: the run has ended")


def test_no_answer_is_said_and_the_request_taken_back(tmp_path):
    folder = tmp_path / "control"
    folder.mkdir()
    (folder / "run.json").write_text('{"pid": 12345, "host": "gone"}')
    with pytest.raises(DeadlineExceededError, match="within 0.2 s: process 12345 of gone does not run any more, or"):
        ask(str(tmp_path), "pause", timeout_s=0.2)
    assert [each.name for each in folder.iterdir()] == ["run.json"]
    with pytest.raises(InvalidRequestError, match="action 'explode' is none of"):
        ask(str(tmp_path), "explode")  # type: ignore[arg-type]


def test_the_command_says_what_came_of_it(tmp_path, capsys):
    figures = {"name": "clicks", "step": 1234, "epoch": 0, "epochs": 3, "workers": 2, "saved_step": 1000}
    with control_of(tmp_path, lambda: figures):
        for argv, status in ((["pause"], 0), (["pause"], 1), (["status", "--json"], 0)):
            with pytest.raises(SystemExit) as ended:
                main(["control", argv[0], str(tmp_path), *argv[1:]])
            assert (ended.value.code or 0) == status
    first, second, third = capsys.readouterr().out.splitlines()
    line = "clicks at step 1,234, epoch 0 of 3, 2 workers; last saved at step 1,000"
    assert first == f"control: workers wait after their step; {line}"
    assert second.startswith("control: it is paused already; ")
    assert json.loads(third)["status"] == figures | {"paused": True, "waiting": []}

"""Checkpoints by the time of the events: they know it, are due by it, and are the same in a run that was killed."""

from __future__ import annotations

import json
import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import trilith.data
from tests.unit.test_estimator import Remember
from trilith.checkpoint import list_checkpoints
from trilith.data import Framing, Records
from trilith.data.formats.framing import frame_records
from trilith.errors import InvalidRequestError
from trilith.estimator import Callback, Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.state import read_job, read_rank
from trilith.tables import Adagrad
from trilith_proto.example_pb2 import Example
from trilith_services.cli import app

HOUR = 3_600
BEGAN = 1_600_001_400  # ten minutes before a full hour
STEP_S = 900


class Clicks(Task):
    user = Embedding(dim=4, optimizer=Adagrad(learning_rate=0.2))
    labels: ClassVar = {"click": Label()}
    request_time = "req_time"

    def build(self) -> None:
        self.deep = nn.Linear(4, 1)

    def forward(self, x):
        return self.deep(x.user.vector)[:, 0]


def batches(count: int = 14) -> list[dict[str, Any]]:
    """Fifteen minutes each; every third one is a little late."""
    rng = np.random.default_rng(5)
    return [
        {
            "user": rng.integers(0, 20, 8),
            "click": rng.integers(0, 2, 8).astype(np.float32),
            "req_time": BEGAN + number * STEP_S - (number % 3 == 2) * 2 * STEP_S - np.arange(8),
        }
        for number in range(count)
    ]


def job(*callbacks: Callback, train: Any = batches, task: Task | None = None, **settings: Any) -> Estimator:
    task = task or Clicks(dense_optimizer=lambda parameters: torch.optim.Adam(parameters, 0.05))
    return Estimator(task, RunConfig(progress="none", **settings), train=train, callbacks=callbacks)


def saved(model_dir: Any) -> list[tuple[int, int | None]]:
    """Step and event time of all checkpoints."""
    jobs = [read_job(info.path) for info in list_checkpoints(str(model_dir)) if info.complete]
    return [(each.step, each.event_time) for each in jobs]


def everything(estimator: Estimator) -> dict[str, np.ndarray]:
    dense = {name: each.numpy() for name, each in estimator.task.state_dict().items()}
    return dense | {"user": estimator.client.table("user").lookup(np.arange(50))}


class KilledError(Exception):
    pass


class Kill(Callback):
    """Behind a batch."""

    def __init__(self, at: int) -> None:
        self._left = at

    def on_step(self, event):
        self._left -= 1
        if not self._left:
            raise KilledError


def killed(*settings: Any, at: int, **given: Any) -> None:
    estimator = job(Kill(at), *settings, **given)
    with pytest.raises(KilledError):
        estimator.train()
    estimator.close()


def test_a_checkpoint_is_due_whenever_an_hour_of_events_is_over(tmp_path):
    told = Remember()
    with job(told, model_dir=str(tmp_path), keep_newest=9, save_every_event_s=HOUR) as estimator:
        estimator.train()
    # The hours begin at 10, 70, 130 and 190 minutes; batches are of 0, 15, -, 45, 60, -, 90, ... minutes.
    times = [BEGAN + minutes * 60 for minutes in (15, 90, 135, 195)]
    assert saved(tmp_path) == [(2, times[0]), (7, times[1]), (10, times[2]), (14, times[3])]
    assert [event.event_time for event in told.named("saved")] == times
    shown = [event.event_time for event in told.named("step")]
    assert shown == sorted(shown)  # what is late makes it no earlier
    assert (shown[0], shown[-1]) == (BEGAN, times[3])


@pytest.mark.parametrize("settings", [{}, {"prefetch": 2, "async_push": 2}, {"accumulate": 2}, {"save_every": 3}])
@pytest.mark.parametrize("at", [1, 5, 8, 12])
def test_a_run_that_is_killed_and_resumed_makes_the_same_checkpoints(tmp_path, settings, at):
    settings = {"keep_newest": 99, "save_every_event_s": HOUR, "seed": 3} | settings
    with job(model_dir=str(tmp_path / "whole"), **settings) as whole:
        whole.train()
        want = everything(whole)
    killed(at=at, model_dir=str(tmp_path / "cut"), **settings)
    with job(model_dir=str(tmp_path / "cut"), **settings) as again:
        again.train()
        found = everything(again)
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_other_saves_have_the_time_too_and_move_no_boundary(tmp_path):
    class Fails(Callback):
        def on_step(self, event):
            if event.own_step == 3:
                estimator.save()

    with job(Fails(), model_dir=str(tmp_path), keep_newest=9, save_every_event_s=HOUR) as estimator:
        estimator.train()
    assert [step for step, _ in saved(tmp_path)] == [2, 3, 7, 10, 14]


def test_a_loop_of_ones_own_saves_the_time(tmp_path):
    with job(model_dir=str(tmp_path)) as estimator:
        for batch in batches(3):
            estimator.step(batch)
        path = estimator.save()
    assert read_job(path).event_time == read_rank(path, 0, 1).event_time == BEGAN + STEP_S


def test_a_task_without_times_has_none_and_cannot_be_saved_by_them(tmp_path):
    class Untimed(Clicks):
        request_time = ""

    def untimed() -> Task:
        return Untimed(dense_optimizer=lambda parameters: torch.optim.Adam(parameters, 0.05))

    with job(task=untimed(), model_dir=str(tmp_path)) as estimator:
        estimator.train()
    assert saved(tmp_path) == [(14, None)]
    with pytest.raises(
        InvalidRequestError, match="save_every_event_s=3600 needs a task .* Untimed has no request_time"
    ):
        job(task=untimed(), model_dir=str(tmp_path), save_every_event_s=HOUR).open()
    with pytest.raises(InvalidRequestError, match="save_every_event_s=3600 needs model_dir"):
        RunConfig(save_every_event_s=HOUR)


def test_checkpoints_are_listed_with_their_times(tmp_path):
    with job(model_dir=str(tmp_path), keep_newest=9, save_every_event_s=HOUR) as estimator:
        estimator.train()
    listed = json.loads(CliRunner().invoke(app, ["checkpoint", "list", str(tmp_path), "--json"]).output)
    assert [(entry["global_step"], entry["event_time_unix_s"]) for entry in listed] == saved(tmp_path)
    shown = CliRunner().invoke(app, ["checkpoint", "list", str(tmp_path)], env={"COLUMNS": "200"}).output
    assert shown.splitlines()[0].split()[-2:] == ["samples", "until"]
    assert "2020-09-13" in shown


# ---- streams ---------------------------------------------------------------------------------------------------------


def message(number: int) -> bytes:
    """An impression; there is one in half a minute."""
    example = Example(label=[float(number % 3 == 0)])
    example.line_id.req_time = BEGAN + number * 30
    example.named_feature.add(name="user").feature.int64_list.value.append(number % 50)
    return frame_records(Records.of([example.SerializeToString()], "example"), Framing()).tobytes()


@pytest.mark.parametrize("settings", [{}, {"prefetch": 2, "async_push": 2}])
def test_a_job_on_a_topic_that_is_killed_goes_on_where_its_checkpoint_was(tmp_path, settings):
    pytest.importorskip("confluent_kafka")
    from confluent_kafka import Producer

    producer = Producer({"test.mock.num.brokers": 1, "logger": logging.getLogger("mock")})
    (broker,) = producer.list_topics(timeout=60).brokers.values()
    topic = trilith.data.read_kafka(
        "impressions", servers=f"{broker.host}:{broker.port}", group_id="trainer", kind="example",
        message_poll_timeout=300, stream_timeout=60_000, configuration=["auto.offset.reset=earliest"],
    )  # fmt: skip

    def send(first: int, last: int) -> None:
        for number in range(first, last):
            producer.produce("impressions", message(number), partition=0)
        assert producer.flush(60) == 0

    settings = {"keep_newest": 99, "save_every_event_s": HOUR, "steps": 15} | settings
    send(0, 300)
    killed(at=9, train=topic.batch(25), model_dir=str(tmp_path / "cut"), **settings)
    send(300, 500)
    with job(train=topic.batch(25), model_dir=str(tmp_path / "cut"), **settings) as again:
        again.train()
        found = everything(again)
    held = trilith.data.from_records([message(number)[8:] for number in range(500)], "example")
    with job(train=held.batch(25), model_dir=str(tmp_path / "whole"), **settings) as whole:
        whole.train()
        want = everything(whole)
    assert [step for step, _ in saved(tmp_path / "cut")] == [6, 11, 15]
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

"""What a person sees of training: bars or lines, made of the events that runs write down."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

pytest.importorskip("torch")

from trilith.estimator import (
    Done,
    Evaluated,
    Exported,
    JsonLines,
    RowsRejoined,
    SaveFailed,
    Started,
    Step,
    Stopped,
)
from trilith.estimator.callbacks import Callbacks
from trilith_services.commands.training_view import TrainingView


class Trainers:
    """Files of events, as runs of so many workers write them, ten seconds apart."""

    def __init__(self, folder, count=2):
        self.files = {f"worker-{rank}": folder / f"worker-{rank}.jsonl" for rank in range(count)}
        self._now = 100.0
        self._lines = []
        for rank, path in enumerate(self.files.values()):
            lines = JsonLines(path, every_s=0.0, clock=lambda: self._now)
            self._lines.append(lines)
            self.tell(rank, Started(rank=rank, world_size=count))

    def tell(self, rank, *events):
        for event in events:
            self._now += 10.0
            self._lines[rank].on(event)
        self._lines[rank].close()


def step(number, **figures):
    figures = {"samples": 10 * number, "loss": 0.5, "metrics": {"click/auc": 0.7}, **figures}
    return Step(step=2 * number, own_step=number, **figures)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_view_shows_figures_with_and_without_a_terminal(tmp_path, terminal):
    out = io.StringIO()
    trainers = Trainers(tmp_path)
    console = Console(file=out, force_terminal=terminal, width=160)
    with TrainingView(console, trainers.files, 10, every_s=0.0) as view:
        for rank in (0, 1):
            trainers.tell(rank, step(4), step(5), Evaluated(epoch=1, metrics={"valid/click/auc": 0.75}))
            trainers.tell(rank, SaveFailed(error="disk full"), Done(samples_per_s=10.0))
        rejoined = RowsRejoined(shard=1, restored_from="c", restored_step=3, known_step=7, steps_back=4)
        trainers.tell(0, Exported(path="exports/7"))
        trainers.tell(1, rejoined)
        view.look()
        view.look()
    assert view.samples_per_s == 20.0, "what the trainers said, added up"
    assert view.exported == "exports/7"
    assert not view.stopped
    text = out.getvalue()
    assert text.count("epoch 1: auc 0.7500 on the validation part") == 1, "all say what is of all"
    assert text.count("checkpoint failed: disk full") == 1
    assert "worker-1: PS 1 is back from c, 4 steps earlier (step 3); going on" in text
    assert ("step 10 of 20  loss 0.5000  auc 0.7000  2 samples/s" in text) is not terminal


def test_the_bars_show_their_numbers_whole_on_a_terminal_of_80_columns(tmp_path):
    out = io.StringIO()
    trainers = Trainers(tmp_path, 1)
    with TrainingView(
        Console(file=out, force_terminal=True, color_system=None, width=80), trainers.files, 1422
    ) as view:
        trainers.tell(0, step(1038, samples=0), step(1039, samples=113640))
        view.look()
    assert re.search(r"1039/1422 loss 0\.5000  auc 0\.7000  11,364 samples/s", out.getvalue())


def test_what_is_not_defined_is_a_dash_and_a_worker_that_began_anew_keeps_its_pace(tmp_path):
    out = io.StringIO()
    trainers = Trainers(tmp_path, 1)
    with TrainingView(Console(file=out), trainers.files, 9, every_s=0.0) as view:
        trainers.tell(0, step(1, loss=float("nan"), metrics={"click/auc": float("nan")}), step(3), Stopped())
        trainers.tell(0, Started(), step(2, samples=5))
        view.look()
    assert view.stopped
    assert out.getvalue().splitlines() == [
        "step 1 of 9  loss -  auc -",
        "step 3 of 9  loss 0.5000  auc 0.7000  2 samples/s",
        "step 2 of 9  loss 0.5000  auc 0.7000  2 samples/s",
    ]


def test_a_line_that_is_not_whole_yet_is_read_when_it_is_and_a_file_may_come_late(tmp_path):
    out = io.StringIO()
    path = tmp_path / "late.jsonl"
    with TrainingView(Console(file=out), {"torch": path}, 9) as view:
        view.look()
        line = json.dumps({"event": "evaluated", "epoch": 2, "metrics": {"valid/click/auc": 0.8}}) + "\n"
        path.write_text(line[:20])
        view.look()
        assert not out.getvalue()
        path.write_text(line)
        view.look()
    assert "epoch 2: auc 0.8000" in out.getvalue()


def test_a_run_in_this_process_is_seen_while_it_trains(tmp_path):
    out = io.StringIO()
    path = tmp_path / "torch.jsonl"
    with TrainingView(Console(file=out), {"torch": path}, 9) as view:
        with Callbacks([JsonLines(path), view.callback()]) as told:
            told.tell(step(1))
            assert "step 1 of 9" in out.getvalue()
            told.tell(step(2))
            told.tell(Done(step=2, samples_per_s=3.0))
        assert view.samples_per_s == 3.0

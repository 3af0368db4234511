"""Saves of the dense part alone: small, between checkpoints, exported without rows, and a beginning for other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from trilith.checkpoint import list_checkpoints, newest_complete
from trilith.errors import InvalidRequestError
from trilith.estimator import Callback, Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.state import read_job
from trilith.serving.exports import entry_base, list_versions, read_export
from trilith.tables import Sgd


class Clicks(Task):
    user = Embedding(dim=2, optimizer=Sgd(learning_rate=0.5))
    labels: ClassVar = {"click": Label()}

    def build(self) -> None:
        self.layer = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.layer(self.norm(x.user.vector))[:, 0]


class Saves(Callback):
    """Saves and exports, and the dense part as it was at each."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, bool]] = []
        self.exported: list[int] = []
        self.dense: dict[int, dict[str, torch.Tensor]] = {}
        self.failed: list[str] = []
        self.task: Task | None = None

    def on_saved(self, event):
        self.saved.append((event.step, event.dense_only))
        self.dense[event.step] = {name: each.clone() for name, each in self.task.state_dict().items()}

    def on_exported(self, event):
        self.exported.append(event.step)

    def on_save_failed(self, event):
        self.failed.append(event.error)


def batches() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"user": rng.integers(0, 9, 16), "click": rng.integers(0, 2, 16)} for _ in range(10)]


def job(told: Saves, *, dense: Any = None, **run: Any) -> Estimator:
    optimizer = dense or (lambda parameters: torch.optim.Adam(parameters, 0.1))
    told.task = Clicks(dense_optimizer=optimizer)
    return Estimator(told.task, RunConfig(progress="none", **run), train=batches, callbacks=[told])


@pytest.mark.parametrize("dense", [None, Sgd(learning_rate=0.1)], ids=["in this process", "on the PS"])
def test_the_dense_part_is_saved_between_checkpoints(tmp_path, dense):
    told = Saves()
    with job(told, dense=dense, model_dir=str(tmp_path), save_every=6, save_dense_every=2, keep_newest=2) as made:
        made.train()
    assert told.saved == [(2, True), (4, True), (6, False), (8, True), (10, True), (10, False)]
    saves = list_checkpoints(str(tmp_path / "dense_only"))
    assert [read_job(each.path).step for each in saves] == [8, 10]  # as many as of checkpoints
    for each in saves:
        found = read_job(each.path)
        assert found.dense.keys() == told.dense[found.step].keys()
        for name, value in told.dense[found.step].items():
            torch.testing.assert_close(found.dense[name], value, rtol=0, atol=0, msg=name)
        assert sorted(path.name for path in Path(each.path).iterdir()) == ["job.dense.safetensors", "job.json"]
    # What a run goes on from is a checkpoint.
    assert read_job(newest_complete(str(tmp_path)).path).step == 10
    again = Saves()
    with job(again, dense=dense, model_dir=str(tmp_path), save_dense_every=2, epochs=2) as made:
        made.train()
        assert made.step_count == 20
    assert again.saved == [(step, True) for step in (12, 14, 16, 18, 20)] + [(20, False)]


def test_each_is_exported_without_rows_once_there_are_some(tmp_path):
    told = Saves()
    run = {"model_dir": str(tmp_path), "save_every": 4, "save_dense_every": 2, "export_every_save": True}
    with job(told, **run) as made:
        made.train()
        want = {name: each.clone() for name, each in made.task.state_dict().items()}
    assert told.exported == [4, 6, 8, 10, 10]  # not of step 2: there was no checkpoint yet
    base = entry_base(str(tmp_path / "exports"))
    manifests = [read_export(f"{base}/{version}") for version in list_versions(base)]
    assert [each.step for each in manifests] == [4, 6, 8, 10, 10]
    rows = {path.name for path in (tmp_path / "exports" / "ps_0").iterdir()}
    assert rows == {str(each.version) for each in (manifests[0], manifests[2], manifests[4])}
    assert want.keys() == read_job(list_checkpoints(str(tmp_path / "dense_only"))[-1].path).dense.keys()


def test_another_run_begins_with_one(tmp_path):
    told = Saves()
    with job(told, model_dir=str(tmp_path / "old"), save_dense_every=2) as made:
        made.train()
    path = list_checkpoints(str(tmp_path / "old" / "dense_only"))[-1].path
    with job(Saves(), model_dir=str(tmp_path / "new"), warm_start=path, warm_start_parts="dense", steps=1) as made:
        made.open()
        made._resume()
        for name, value in read_job(path).dense.items():
            torch.testing.assert_close(made.task.state_dict()[name], value, rtol=0, atol=0, msg=name)
        assert not made.client.table("user").lookup(np.arange(9)).any()


def test_one_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    told = Saves()
    with job(told, model_dir=str(tmp_path), save_dense_every=4) as made:
        monkeypatch.setattr("trilith.estimator.saving.Saver.save_dense", fail)
        made.train()
    assert told.failed == ["the disk is full"] * 2
    assert told.saved == [(10, False)]


def test_it_needs_somewhere_to_save(tmp_path):
    with pytest.raises(InvalidRequestError, match="save_dense_every=3 needs model_dir"):
        RunConfig(save_dense_every=3)

"""Exports of a job: how many are kept, what is left out of them, what is refused, and that no half of one stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from trilith.checkpoint import checkpoint_name, newest_complete, prune
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.estimator import Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.exporting import TaskExporter
from trilith.estimator.state import Job, read_job
from trilith.serving.exports import entry_base, list_versions, ps_base
from trilith.serving.published import pin
from trilith_services import exporting


class Shop(Task):
    user = Embedding(dim=2, bias=True)
    labels: ClassVar = {"click": Label()}

    def build(self) -> None:
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Any) -> torch.Tensor:
        return x.user.bias + self.layer(x.user.vector.sum(1, keepdim=True))[:, 0]


class Wide(Shop):
    user = Embedding(dim=3, bias=True)


class Unbiased(Shop):
    user = Embedding(dim=2)


class WithItem(Shop):
    item = Embedding(dim=2)


class Deep(Shop):
    def build(self) -> None:
        self.layer = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))


class Broad(Shop):
    def build(self) -> None:
        self.layer = nn.Linear(1, 2)


def same_name(task: type[Task]) -> Task:
    """Code of today for what `Shop` was."""
    return type("Shop", (task,), {})()


def job(task: Task | None = None, **settings: Any) -> Estimator:
    batch = {"user": [1, 2], "item": [3, 4], "click": [0.0, 1.0]}
    run = RunConfig(**{"progress": "none", "threads": 1} | settings)
    return Estimator(Shop() if task is None else task, run, train=[batch] * 4, evaluate=[batch])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of `Shop` has saved."""
    place = tmp_path_factory.mktemp("shop") / "model"
    with job(model_dir=str(place)) as trained:
        trained.train()
    return place


@pytest.fixture
def saved(model: Path) -> str:
    found = newest_complete(str(model))
    assert found is not None
    return found.path


# ---- how many, and what of them --------------------------------------------------------------------------------------


def test_exports_of_every_save_are_as_many_as_the_run_keeps(tmp_path):
    settings = {"model_dir": str(tmp_path), "save_every": 1, "export_every_save": True, "export_mode": "standalone"}
    with job(export_keep=2, **settings) as trained:
        trained.train()
        versions = list_versions(str(tmp_path / "exports"))
        assert len(versions) == 2
        newest = int(trained.export(keep=1).rpartition("/")[2])
        assert newest > versions[-1]
        assert list_versions(str(tmp_path / "exports")) == [newest]
        with pytest.raises(InvalidRequestError, match="keep=0: at least 1 version is kept"):
            trained.export(keep=0)
    assert list_versions(str(tmp_path / "exports")) == [newest]


def test_rows_go_with_their_version_those_of_shards_that_training_had_before_too(tmp_path, saved):
    with job() as exporter:
        first = Path(exporter.export(str(tmp_path), checkpoint=saved))
        before = Path(ps_base(str(tmp_path), 7)) / first.name  # of a cluster of more PS
        before.mkdir(parents=True)
        (before / "manifest.json").write_text("{}")
        second = Path(exporter.export(str(tmp_path), checkpoint=saved, keep=1))
        assert not before.exists()
        assert [path.name for path in Path(ps_base(str(tmp_path), 0)).iterdir()] == [second.name]
        pin(str(tmp_path), int(second.name))
        third = Path(exporter.export(str(tmp_path), checkpoint=saved, keep=1))
    assert list_versions(entry_base(str(tmp_path))) == [int(second.name), int(third.name)]


def test_an_export_of_the_model_alone_has_no_rows(tmp_path, saved):
    with job() as exporter:
        made = Path(exporter.export(str(tmp_path / "out"), checkpoint=saved, dense_only=True))
        assert {path.name for path in (tmp_path / "out").rglob("*")} == {
            *("entry", made.name, "manifest.json", "model.json", "program.json", "weights.safetensors")
        }
        with pytest.raises(InvalidRequestError, match="a standalone export has all rows inside"):
            exporter.export(str(tmp_path / "other"), checkpoint=saved, mode="standalone", dense_only=True)
    assert not (tmp_path / "other").exists()


# ---- checkpoints that are of something else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "differs"),
    [
        (same_name(Wide), r"is of another Shop: its table 'user' has rows of 1 \+ 2 floats, not 1 \+ 3 floats$"),
        (same_name(Unbiased), r"its table 'user' has rows of 1 \+ 2 floats, not 2 floats$"),
        (same_name(WithItem), r"it lacks the tables \['item'\]"),
        (
            same_name(Deep),
            r"it lacks the dense values \['layer.0.bias', .*\], it has the dense values \['layer.bias', .*\] beside",
        ),
        (same_name(Broad), r"it has other shapes of \['layer.bias', 'layer.weight'\]"),
        (Deep(), "is of the task Shop, this one is Deep"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path, model, saved, task, differs):
    with job(task) as other, pytest.raises(CheckpointError, match=differs) as refused:
        other.export(str(tmp_path / "out"), checkpoint=saved)
    assert str(refused.value).startswith(saved)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    for does in (Estimator.train, Estimator.evaluate):
        with (
            job(task, model_dir=str(model), epochs=2) as other,
            pytest.raises(CheckpointError, match=differs.rstrip("$")),
        ):
            does(other)


def test_a_feature_less_is_another_model_too(tmp_path):
    settings = {"model_dir": str(tmp_path)}
    with job(same_name(WithItem), **settings) as trained:
        trained.train()
    with job(epochs=2, **settings) as other, pytest.raises(CheckpointError, match=r"has the tables \['item'\] beside"):
        other.train()


def test_how_one_trains_on_is_said_where_the_rows_fit(model):
    with (
        job(same_name(WithItem), model_dir=str(model), epochs=2) as other,
        pytest.raises(CheckpointError, match="warm_start=.* and warm_start_parts=rows begins with its rows$"),
    ):
        other.train()


def test_a_class_may_be_called_otherwise_when_it_is_exported(tmp_path, saved):
    with job(type("Store", (Shop,), {})()) as renamed:
        assert renamed.export(str(tmp_path), checkpoint=saved)


def test_rows_without_a_job_and_no_checkpoint_are_told_apart(tmp_path):
    with job() as exporter:
        exporter.client.save(str(tmp_path / "rows"))
        with pytest.raises(CheckpointError, match="rows/job.json: missing; the checkpoint holds rows and no job"):
            exporter.export(str(tmp_path / "out"), checkpoint=str(tmp_path / "rows"))
        with pytest.raises(CheckpointError, match="nothing: no manifest.json"):
            exporter.export(str(tmp_path / "out"), checkpoint=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


# ---- while it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standalone", "distributed"])
def test_an_export_that_fails_leaves_nothing_and_the_next_one_is_whole(tmp_path, saved, monkeypatch, mode):
    def full(path: str, target: str, *arguments: Any, **options: Any) -> int:
        Path(target).mkdir(parents=True)
        (Path(target) / "half").write_text("")
        raise CheckpointError(f"{target} cannot be written: no space left on device")

    with job() as exporter:
        with monkeypatch.context() as broken:
            broken.setattr(exporting, "write_serving_rows", full)
            with pytest.raises(CheckpointError, match="no space left"):
                exporter.export(str(tmp_path), checkpoint=saved, mode=mode)
        assert [path for path in tmp_path.rglob("*") if path.name not in ("entry", "ps_0")] == []
        made = exporter.export(str(tmp_path), checkpoint=saved, mode=mode)
    root = str(tmp_path) if mode == "standalone" else entry_base(str(tmp_path))
    assert list_versions(root) == [int(made.rpartition("/")[2])]


def test_a_checkpoint_is_not_pruned_from_when_its_job_is_read_on(tmp_path, saved):
    directory = tmp_path / "model"
    places = [directory / checkpoint_name(number) for number in (1, 2)]
    for place in places:
        shutil.copytree(saved, place)
    pruned: list[str] = []

    def read(path: str) -> Job:
        pruned.extend(prune(str(directory), keep=1))
        return read_job(path)

    with job() as exporter:
        TaskExporter("shop", exporter.task, exporter.rows, read).export(str(places[0]), str(tmp_path / "out"))
    assert pruned == []
    assert prune(str(directory), keep=1) == [str(places[0])]

"""A run begins with a checkpoint of another model: values, optimizer state, buffers, rows and the step."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import trilith
from tests.congruence.clusters import LocalCluster
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.estimator import Callback, Embedding, Estimator, Label, RunConfig, Task
from trilith.estimator.state import read_job
from trilith.tables import Adam, Sgd

ROWS = 16
PLACES = ["local", "ps", "allreduce"]


class Old(Task):
    """Layers of a checkpoint; each is as likely as the others to be confused with another."""

    user = Embedding(dim=4, optimizer=Sgd(learning_rate=0.1))
    labels: ClassVar = {"click": Label()}
    names: ClassVar = {"first": "layer_1", "norm": "norm", "second": "layer_2", "last": "last"}
    cut: ClassVar = (6,)

    def build(self) -> None:
        name = self.names
        setattr(self, name["first"], nn.Linear(4, 6))
        setattr(self, name["norm"], nn.BatchNorm1d(4))
        setattr(self, name["second"], nn.ModuleList(nn.Linear(6, rows) for rows in self.cut))
        setattr(self, name["last"], nn.Linear(6, 1))

    def forward(self, x):
        first, norm, second, last = (getattr(self, self.names[name]) for name in ("first", "norm", "second", "last"))
        hidden = first(norm(x.user.vector)).relu()
        return last(torch.cat([part(hidden) for part in second], 1).relu())[:, 0]


class Renamed(Old):
    names: ClassVar = {"first": "layer_0", "norm": "deep_norm", "second": "layer_1", "last": "head"}
    was: ClassVar = {"layer_0": "layer_1", "deep_norm": "norm", "layer_1.0": "layer_2.0", "head": "last"}


class Cut(Old):
    cut: ClassVar = (2, 4)


class Wider(Old):
    """A layer more, and one of another shape."""

    def build(self) -> None:
        super().build()
        self.last = nn.Linear(7, 1)
        self.more = nn.Linear(6, 1)

    def forward(self, x):
        hidden = self.layer_1(self.norm(x.user.vector)).relu()
        return self.last(torch.cat([self.layer_2[0](hidden), self.more(hidden)], 1).relu())[:, 0]


def batches(seed: int = 0, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"user": rng.integers(0, 20, ROWS), "click": rng.integers(0, 2, ROWS)} for _ in range(count)]


class Told(Callback):
    def on_restored(self, event):
        self.event = event


def job(task: type[Task], dense: str, **settings: object) -> Estimator:
    optimizer = Adam(learning_rate=0.01) if dense == "ps" else lambda parameters: torch.optim.Adam(parameters, 0.01)
    settings = {"dense": dense, "progress": "none", "seed": 3} | settings
    data = settings.pop("data", batches())
    callbacks = settings.pop("callbacks", [])
    return Estimator(task(dense_optimizer=optimizer), RunConfig(**settings), train=data, callbacks=callbacks)


def old_run(tmp_path, dense: str, task: type[Task] = Old) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint of step 4, and the dense part four steps later."""
    with job(task, dense, model_dir=str(tmp_path / "old")) as first:
        first.train()
        path = first.save()
        for batch in batches(1):
            first.step(batch)
        return path, state(first)


def state(estimator: Estimator) -> dict[str, torch.Tensor]:
    estimator.optimization.pull()  # PS have taken a step since the last one
    return {name: value.clone() for name, value in estimator.task.state_dict().items()}


def in_new_names(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    new = {old: name for name, old in Renamed.was.items()}
    parts = {name: name.rpartition(".") for name in values}
    return {f"{new[layer]}.{kind}": values[name] for name, (layer, _, kind) in parts.items()}


def equal(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


ALIASES = {
    f"{new}.{kind}": f"{old}.{kind}"
    for new, old in Renamed.was.items()
    for kind in (
        ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if "norm" in new
        else ("weight", "bias")
    )
}


@pytest.mark.parametrize("dense", PLACES)
@pytest.mark.parametrize(
    "how", [{"warm_start_aliases": ALIASES}, {"warm_start_match": "auto"}], ids=["aliases", "auto"]
)
def test_a_model_of_other_names_goes_on_as_the_old_one_does(tmp_path, dense, how):
    if "warm_start_match" in how:  # norm and last are no layers whose likeness would say so
        rest = {name: old for name, old in ALIASES.items() if not name.startswith("layer")}
        how = how | {"warm_start_aliases": rest}
    path, want = old_run(tmp_path, dense)
    told = Told()
    with job(Renamed, dense, warm_start=path, data=batches(1), callbacks=[told], **how) as new:
        new.train()
        equal(state(new), in_new_names(want))
        assert new.step_count == 8
    assert told.event.renamed == ALIASES
    assert (told.event.missing, told.event.left) == ((), ())


@pytest.mark.parametrize("dense", PLACES)
def test_a_parameter_that_is_cut_or_joined_goes_on_with_its_optimizers_state(tmp_path, dense):
    path, want = old_run(tmp_path, dense)
    cut = {f"layer_2.{n}.{kind}": f"layer_2.0.{kind}" for n in range(2) for kind in ("weight", "bias")}
    with job(Cut, dense, warm_start=path, data=batches(1), warm_start_aliases=cut) as new:
        new.train()
        found = state(new)
    joined = {
        f"layer_2.0.{kind}": torch.cat([found.pop(f"layer_2.{n}.{kind}") for n in range(2)])
        for kind in ("weight", "bias")
    }
    equal(found | joined, want)

    path, want = old_run(tmp_path / "cut", dense, Cut)
    join = {f"layer_2.0.{kind}": (f"layer_2.0.{kind}", f"layer_2.1.{kind}") for kind in ("weight", "bias")}
    with job(Old, dense, warm_start=path, data=batches(1), warm_start_aliases=join) as new:
        new.train()
        found = state(new)
    for kind in ("weight", "bias"):
        want[f"layer_2.0.{kind}"] = torch.cat([want[f"layer_2.0.{kind}"], want.pop(f"layer_2.1.{kind}")])
    equal(found, want)


@pytest.mark.parametrize("dense", PLACES)
def test_what_is_present_is_taken_and_the_rest_begins_anew_and_is_told(tmp_path, dense, caplog):
    path, _ = old_run(tmp_path, dense)
    told = Told()
    settings = {
        "warm_start": path,
        "warm_start_match": "present",
        "callbacks": [told],
        "model_dir": str(tmp_path / "new"),
    }
    with job(Wider, dense, **settings) as new, caplog.at_level(logging.WARNING):
        fresh = state(new.open())
        new.train()
        saved = state(new)
        assert new.step_count == 8
    assert set(told.event.missing) == {"last.weight", "more.weight", "more.bias"}
    assert told.event.left == ("last.weight",)
    lines = [record.getMessage() for record in caplog.records if path in record.getMessage()]
    assert lines == [
        f"{path} has none of these, which begin as they were made: last.weight, more.weight, more.bias",
        f"{path} has these, which are not taken: last.weight",
    ]
    assert json.dumps(told.event.as_dict())
    assert (saved["more.weight"] - fresh["more.weight"]).abs().max() < 0.05  # four steps of 0.01
    with job(Wider, dense, model_dir=str(tmp_path / "new"), resume="latest", steps=1) as again:
        again.train()  # goes on at its own checkpoint
        assert again.step_count == 8
        equal(state(again), saved)


@pytest.mark.parametrize("dense", PLACES)
def test_rows_alone_are_taken_into_a_model_of_other_shapes(tmp_path, dense):
    path, _ = old_run(tmp_path, dense)
    with trilith.connect("local://") as client:
        client.restore(path)
        want = client.table("user", dim=4, optimizer=Sgd(learning_rate=0.1)).lookup(np.arange(20))
    settings = {"warm_start": path, "warm_start_parts": "rows", "model_dir": str(tmp_path / "new")}
    with job(Wider, dense, **settings) as new:
        fresh = state(new.open())
        new._resume()
        equal(state(new), fresh)
        np.testing.assert_array_equal(new.client.table("user").lookup(np.arange(20)), want)
        new.train()
        assert new.step_count == 8


@pytest.mark.parametrize("dense", PLACES)
def test_the_dense_part_alone_is_taken_with_rows_and_steps_from_nothing(tmp_path, dense):
    path, _ = old_run(tmp_path, dense)
    with job(Renamed, dense, warm_start=path, warm_start_parts="dense", warm_start_aliases=ALIASES) as new:
        new._resume()
        equal(state(new), in_new_names(read_job(path).dense))
        assert new.step_count == 0
        assert new.client.count_rows("user") == 0
        new.train()
        assert new.step_count == 4


@pytest.mark.parametrize("dense", PLACES)
def test_the_step_goes_on_or_begins_at_0(tmp_path, dense):
    path, _ = old_run(tmp_path, dense)
    settings = {"warm_start": path, "model_dir": str(tmp_path / "new"), "warm_start_keep_step": False}
    with job(Old, dense, **settings) as new:
        new._resume()
        assert new.step_count == new.client.global_step() == 0
        assert new.client.count_rows("user") == 20
        new.train()
        assert new.step_count == 4
    with job(Old, dense, **settings, epochs=2) as again:
        again.train()
        assert again.step_count == 8  # at its own checkpoint, of step 4


@pytest.mark.parametrize(("was", "now"), [("local", "ps"), ("ps", "local"), ("ps", "allreduce"), ("allreduce", "ps")])
def test_another_place_takes_the_values_and_begins_its_optimizer_anew(tmp_path, was, now):
    path, _ = old_run(tmp_path, was)
    with job(Renamed, now, warm_start=path, warm_start_aliases=ALIASES) as new:
        new._resume()
        equal(state(new), in_new_names(read_job(path).dense))
        new.train()
        assert new.step_count == 8


def test_an_optimizer_of_another_kind_begins_anew_and_says_so(tmp_path, caplog):
    path, _ = old_run(tmp_path, "local")
    task = Old(dense_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9))
    run = RunConfig(warm_start=path, progress="none")
    with Estimator(task, run, train=batches()) as new, caplog.at_level(logging.WARNING):
        new.train()
    assert any("of another kind" in record.getMessage() for record in caplog.records)


def test_the_rates_are_the_new_runs(tmp_path):
    path, _ = old_run(tmp_path, "local")
    task = Old(dense_optimizer=lambda parameters: torch.optim.Adam(parameters, 0.5))
    with Estimator(task, RunConfig(warm_start=path, progress="none"), train=batches()) as new:
        new.train()
        assert new.optimization.param_groups[0]["lr"] == 0.5


def test_what_does_not_fit_is_refused_before_anything_is_changed(tmp_path):
    path, _ = old_run(tmp_path, "ps")
    for settings, error, message in (
        ({}, CheckpointError, r"it lacks \['more.weight', 'more.bias'\].*'last.weight': '\[1, 6\], here \[1, 7\]'"),
        ({"warm_start_match": "auto"}, CheckpointError, "more.weight"),
        ({"warm_start_aliases": {"more.weight": "lost.weight"}}, CheckpointError, "has no 'lost.weight'"),
        ({"warm_start_aliases": {"mare.weight": "last.weight"}}, InvalidRequestError, "do you mean 'more.weight'"),
    ):
        with job(Wider, "ps", warm_start=path, **settings) as new:
            with pytest.raises(error, match=message):
                new.train()
            assert new.client.count_rows("user") == 0


def test_a_checkpoint_without_a_job_has_no_dense_part_to_take(tmp_path):
    with trilith.connect("local://") as client:
        client.table("user", dim=4)
        client.save(str(tmp_path / "rows"))
    with (
        job(Old, "local", warm_start=str(tmp_path / "rows"), warm_start_parts="dense") as new,
        pytest.raises(CheckpointError, match="holds rows and no job"),
    ):
        new.train()


# ---- the dense part anew, in the run's own model_dir -----------------------------------------------------------------


@pytest.mark.parametrize("dense", PLACES)
def test_a_run_that_goes_on_begins_its_dense_part_anew_once(tmp_path, dense, caplog):
    settings = {"model_dir": str(tmp_path / "own"), "epochs": 4}
    same = type("Old", (Wider,), {})
    with job(Old, dense, **settings, max_steps=4) as first:
        first.train()
        rows = first.client.table("user").lookup(np.arange(20))
    with job(same, dense, **settings, reset_dense="wider") as refit, caplog.at_level(logging.WARNING):
        fresh = state(refit.open())
        refit.evaluate(batches(2))
        np.testing.assert_array_equal(refit.client.table("user").lookup(np.arange(20)), rows)
        refit.step(batches()[0])
        assert refit.step_count == 5
        assert (state(refit)["more.weight"] - fresh["more.weight"]).abs().max() < 0.02
        refit.save()
        saved = state(refit)
    assert any("reset_dense='wider'" in record.getMessage() for record in caplog.records)
    with job(same, dense, **settings, reset_dense="wider") as again:
        again._resume()
        equal(state(again), saved)
    with job(same, dense, **settings) as later:  # also without it
        later._resume()
        equal(state(later), saved)


def test_the_dense_part_is_not_reset_where_ps_may_have_the_old_one(tmp_path):
    with LocalCluster("1-ps") as cluster:
        settings = {"model_dir": str(tmp_path), "cluster": cluster.address}
        with job(Old, "ps", **settings, max_steps=2) as first:
            first.train()
        with (
            job(Old, "ps", **settings, reset_dense="x") as other,
            pytest.raises(InvalidRequestError, match="reset_dense='x': the PS may have .* warm_start_parts=rows"),
        ):
            other.train()

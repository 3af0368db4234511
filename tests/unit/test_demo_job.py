"""The demo's job: an Estimator learns what plain torch learns, and commands find it by its name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

import trilith
from trilith.errors import InvalidRequestError
from trilith.nn import auc
from trilith.ops.jit import JIT_DISABLED
from trilith_services.commands.demo import DemoOptions, run_demo
from trilith_services.commands.jobs import find_job
from trilith_services.demo import job as jobs
from trilith_services.demo import movielens
from trilith_services.demo.baseline import train_locally
from trilith_services.demo.clicks import split
from trilith_services.demo.synthetic import make_clicks

pytestmark = pytest.mark.skipif(JIT_DISABLED, reason="trains for minutes with kernels in plain Python")

BATCH = 64


class InOrder:
    """The training part, in the order in which plain torch goes over it."""

    def __init__(self, data, seed):
        self._data, self._seed, self._epoch = data, seed, 0

    def set_epoch(self, epoch):
        self._epoch = epoch

    def __iter__(self):
        order = np.random.default_rng([self._seed, self._epoch, 0]).permutation(len(self._data))
        return self._data.take(order).columns(BATCH)


def seeded(task):
    task.override({"user.seed": 4})
    return task


def quiet(job, **run):
    sets = [f"{name}={value}" for name, value in {"progress": "none", **run}.items()]
    return job.configure(job.run.overridden(sets=sets, environ={}))


@pytest.mark.parametrize("make", [jobs.deepfm_task, jobs.ffm_task])
def test_an_estimator_learns_what_plain_torch_learns(make):
    """Same initial values, same order, same optimizer; every row exists beforehand, which else its first step makes."""
    parts = split(make_clicks(2000, vocabulary=60, seed=3), seed=0)
    job = quiet(jobs.make(seeded(make()), epochs=2), seed=4, prefetch=0, async_push=0)
    with job:
        table = job.client.table(jobs.TABLE)
        ids = np.concatenate(list(parts.train.vocabulary().values()))
        table.assign_add(ids, np.zeros((ids.size, table.dim), np.float32))
        job.train(InOrder(parts.train, 4))
        scores = np.concatenate([each["click"] for each in job.predict(parts.test.columns(256))])
        rows = table.size()
    told = []
    plain = train_locally(seeded(make()), parts, told.append, seed=4, batch_size=BATCH, epochs=2, threads=1)
    assert auc(parts.test.labels, scores) == pytest.approx(plain.auc, abs=2e-4)
    assert rows == plain.rows == ids.size
    assert [event.name for event in told if event.name != "step"] == ["started", "evaluated", "evaluated", "done"]
    steps = -(-len(parts.train) // BATCH)
    assert [event.own_step for event in told if event.name == "step"] == list(range(1, 2 * steps + 1))
    assert told[-1].samples == 2 * len(parts.train)
    assert told[-1].samples_per_s == plain.samples_per_s > 0


def test_plain_torch_ends_after_its_steps_or_when_asked_and_picks_its_threads():
    parts = split(make_clicks(2000, vocabulary=60, seed=3), seed=0)
    told = []
    outcome = train_locally(jobs.ffm_task(), parts, told.append, batch_size=BATCH, epochs=2, steps=3)
    assert told[-1].samples == 3 * BATCH
    assert [event.name for event in told] == ["started", "step", "step", "step", "done"]
    assert outcome.threads >= 1
    told.clear()
    train_locally(jobs.ffm_task(), parts, told.append, epochs=2, threads=1, stop=lambda: len(told) > 2)
    assert [event.name for event in told] == ["started", "step", "step", "done"]


def test_its_own_data_is_read_anew_in_every_pass_in_an_order_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "cache_dir", lambda: tmp_path)  # kernels stay where they are
    job = find_job("trilith_services.demo.job:deepfm")
    with quiet(job, epochs=2, **{"params_override.data": "synthetic:640", "params_override.batch_size": 100}):
        found = job.train()
        assert 0 < found["click/auc"] < 1
        assert job.step_count == 2 * 6
        assert job.evaluate() == found


@pytest.mark.parametrize("name", ["deepfm_in_step", "ffm_in_step"])
def test_dense_parameters_may_be_in_the_worker(name):
    parts = split(make_clicks(300), seed=0)
    with quiet(find_job(f"trilith_services.demo.job:{name}"), epochs=1) as job:
        assert job.placement.dense == "local"
        job.train(lambda: parts.train.columns(BATCH))
        assert np.isfinite(next(job.predict(parts.test.columns(30)))["click"]).all()


def test_the_demo_goes_on_with_what_its_job_has_learned_and_says_what_else_would_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "cache_dir", lambda: tmp_path / "cache")
    data = {"params_override.data": "synthetic:640", "params_override.batch_size": 100}
    with quiet(jobs.ffm(), model_dir=tmp_path / "model", steps=2, **data) as job:
        job.train()
    found = {"model_dir": tmp_path / "model", "data": "synthetic:640", "batch_size": 100, "baseline": False, "steps": 4}

    def demo(**options):
        out = io.StringIO()
        assert run_demo(DemoOptions(**found | options), Console(file=out, width=200)) == 0
        return out.getvalue()

    assert ", step 2\n" in demo(num_ps=0, model="ffm")
    assert ", step 4\n" in demo(num_ps=0, model="ffm")
    for options, other in (
        ({"num_ps": 0}, "--model ffm"),
        ({"workers": 2, "model": "ffm"}, "--workers 1"),
        ({"mode": "all-to-all", "model": "ffm", "seed": 1}, "--mode embedded --workers 1 --seed 0"),
        ({"num_ps": 0, "model": "ffm", "data": "movielens"}, "--data synthetic:640"),
    ):
        with pytest.raises(InvalidRequestError, match=f"has checkpoints of a demo with {other}: say so, too"):
            demo(**options)
    with trilith.connect("local://") as client:
        client.save(str(tmp_path / "other" / "ckpt-00000000000000000001"))
    with pytest.raises(InvalidRequestError, match="has checkpoints of no demo"):
        demo(num_ps=0, model_dir=tmp_path / "other")

"""What a run meets on its cluster: PS that restart, updates on their way, calls that fail, metrics that are scraped."""

from __future__ import annotations

import json
import threading
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.congruence.clusters import LocalCluster
from tests.unit.test_estimator import BATCH, Ctr, Remember, batches, dense_adam, job, run_config
from trilith.client import Client
from trilith.cluster import Rejoined
from trilith.errors import ShardRestartedError, UnavailableError
from trilith.estimator import Callback, Stop
from trilith.estimator.events import Done, Step
from trilith.estimator.state import unpack_rank
from trilith.ops.jit import JIT_DISABLED
from trilith.tables import Adagrad
from trilith_services.local.supervisor import free_ports

compiled_only = pytest.mark.skipif(JIT_DISABLED, reason="trains for minutes with kernels in plain Python")

AHEAD = {"prefetch": 2, "async_push": 2}


def on_ps() -> Ctr:
    """With dense parameters beside the rows, so that there are calls for both."""
    return Ctr(dense_optimizer=Adagrad(learning_rate=0.1))


def fails_once(client: Client, name: str, at: int) -> list[int]:
    """Have the call number `at` find that a PS has restarted; returns what grows by each call."""
    real, calls = getattr(client, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise ShardRestartedError("shard 0 restarted")
        return real(*args, **kwargs)

    setattr(client, name, call)
    return calls


@compiled_only
def test_a_ps_that_restarts_costs_a_batch_and_is_told():
    """The restart itself is played: the third push finds another incarnation."""
    told = Remember()
    with job(run_config(steps=6, evaluate_every_epoch=False), task=on_ps(), callbacks=[told]) as estimator:
        pushes = fails_once(estimator.client, "apply_gradients", at=3)
        back = Rejoined(
            index=0, restored_from="ckpt", restored_step=8, known_step=30, missing_variables=("dense/bias",)
        )
        estimator.client.rejoin = lambda: [back]
        created, pull, stale = [], estimator.dense.pull, []
        estimator.dense.create = lambda: created.append(1)

        def pull_and_look():
            stale.extend(each.grad for each in estimator.task.parameters() if each.grad is not None)
            return pull()

        estimator.dense.pull = pull_and_look
        estimator.train()
    assert len(pushes) == 6
    assert not stale, "the dense gradients of the batch that was given up are in no later step"
    assert created == [1], "variables that the PS came back without are there again"
    assert [event.name for event in told.events].count("shard_restarted") == 1
    (rejoined,) = told.named("rows_rejoined")
    assert (rejoined.shard, rejoined.steps_back, rejoined.restored_from) == (0, 22, "ckpt")
    assert [event.own_step for event in told.named("step")] == [1, 2, 4, 5, 6]
    (done,) = told.named("done")
    assert done.samples == 5 * BATCH


@compiled_only
def test_a_restart_that_is_noticed_in_the_background_is_accepted_and_training_goes_on():
    told, rejoined = Remember(), []
    with job(run_config(epochs=2, **AHEAD), task=on_ps(), evaluate=None, callbacks=[told]) as estimator:
        calls = [
            fails_once(estimator.client, name, at=5) for name in ("lookup", "apply_gradients", "apply_dense_gradients")
        ]
        estimator.client.rejoin = lambda: rejoined.append(1) or []
        estimator.train()
    assert len(rejoined) == len(told.named("shard_restarted")) == 3
    assert told.named("done")
    steps = 2 * len(batches())
    assert len(calls[1]) == steps - 1, "a batch whose lookup failed is left out"


@compiled_only
@pytest.mark.parametrize("verb", ["apply_gradients", "apply_dense_gradients"])
def test_an_error_of_a_push_in_the_background_stops_training_with_its_cause(verb, monkeypatch):
    cause, calls, told = UnavailableError("PS 1 is gone"), [], Remember()

    def broken(self, *args, **kwargs):
        calls.append(1)
        raise cause

    monkeypatch.setattr(Client, verb, broken)
    threads = set(threading.enumerate())
    estimator = job(run_config(prefetch=1, async_push=2), task=on_ps(), callbacks=[told])
    with pytest.raises(UnavailableError) as caught, estimator:
        estimator.train()
    assert caught.value is cause
    assert told.events[-1].error is cause
    assert len(calls) <= 3, "no more than were on their way"
    assert set(threading.enumerate()) <= threads


@compiled_only
def test_what_is_on_its_way_arrives_before_a_run_ends_that_was_stopped():
    class After(Callback):
        def on_step(self, event: Step) -> Stop | None:
            return Stop("enough") if event.own_step == 5 else None

    applied = []
    with job(run_config(epochs=5, **AHEAD), task=on_ps(), callbacks=[After()]) as estimator:
        real = estimator.client.apply_gradients
        estimator.client.apply_gradients = lambda *args, **kwargs: (real(*args, **kwargs), applied.append(1))[0]
        estimator.train()
        assert len(applied) == 5
        assert estimator.client.global_step() == 5


@compiled_only
def test_the_timers_of_lookups_are_served_while_it_runs():
    (port,) = free_ports(1)
    scraped = []

    class Scrape(Callback):
        def on_done(self, event: Done) -> None:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
                scraped.append(reply.read().decode())

    with LocalCluster("1-ps") as cluster:
        run = run_config(cluster=cluster.address, name="timed", metrics_port=port, steps=3)
        with job(run, task=on_ps(), evaluate=None, callbacks=[Scrape()]) as estimator:
            estimator.train()
    (line,) = [
        line
        for line in scraped[0].splitlines()
        if line.startswith('trilith_embedding_lookup_seconds_count{model_name="timed",ps="0"}')
    ]
    assert float(line.split()[-1]) >= 3
    assert "trilith_train_steps_total" in scraped[0]
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)


@compiled_only
def test_a_worker_that_holds_the_rows_may_queue_between_the_stages_of_an_exchange():
    told = Remember()
    queues = {"prefetch": 1, "async_push": 1, "lookup_queue": 1, "update_queue": 2}
    run = run_config(cluster="peers://", master=f"127.0.0.1:{free_ports(1)[0]}", epochs=2, **queues)
    with job(run, task=Ctr(dense_optimizer=dense_adam), callbacks=[told]) as estimator:
        estimator.train()
        assert estimator.client.global_step() == 2 * len(batches())
    assert told.named("done")
    assert told.named("evaluated")


@compiled_only
@pytest.mark.parametrize("every", [{"save_every": 2}, {"save_every_s": 1e-9}])
def test_a_worker_that_does_not_save_leaves_word_of_where_it_is_as_often_as_the_chief_saves(tmp_path, every):
    words = []

    class Read(Callback):
        def on_step(self, event: Step) -> None:
            said = json.loads((tmp_path / "workers" / "rank-00001-of-00002.json").read_text())
            words.append(unpack_rank(said["state"]).steps)

    with LocalCluster("1-ps") as cluster:
        run = run_config(cluster=cluster.address, rank=1, world_size=2, model_dir=str(tmp_path), steps=6, **every)
        with job(run, task=on_ps(), evaluate=None, callbacks=[Read()]) as estimator:
            estimator.train()
    step = every.get("save_every", 1)
    assert words == [done // step * step for done in range(6)]

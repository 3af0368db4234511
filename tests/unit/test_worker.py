"""The worker's parts: positions, events, figures, its loop over an embedded cluster, and going on after a restart."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

import trilith
from tests.congruence.clusters import LocalCluster
from trilith.checkpoint import list_checkpoints, newest_complete
from trilith.cluster import Rejoined
from trilith.errors import InvalidRequestError, ShardRestartedError
from trilith.ops.jit import JIT_DISABLED
from trilith_services.cli import main
from trilith_services.demo.click_files import store_clicks
from trilith_services.demo.clicks import split
from trilith_services.demo.datasets import load_dataset
from trilith_services.demo.models import settings_of
from trilith_services.demo.synthetic import make_clicks, zipf_ids
from trilith_services.demo.task import click_task, load_task
from trilith_services.local.supervisor import free_ports
from trilith_services.options import argv_of
from trilith_services.worker.config import Dense, Mode, WorkerConfig
from trilith_services.worker.events import EventLog, Tail
from trilith_services.worker.meter import Meter
from trilith_services.worker.position import Position
from trilith_services.worker.run import backends, run_worker
from trilith_services.worker.task import Task
from trilith_services.worker.trainer import Trainer, save_checkpoint

compiled_only = pytest.mark.skipif(JIT_DISABLED, reason="trains for minutes with kernels in plain Python")

SMALL = settings_of("ffm", dim=2, epochs=2)


@pytest.fixture
def client():
    with trilith.connect("local://") as client:
        yield client


@pytest.fixture(scope="module")
def parts():
    return split(make_clicks(2000, features=4, vocabulary=60, seed=3), seed=0)


def load() -> Task:
    return load_task(SMALL, "synthetic:640", lambda line: None)


def config(**changes) -> WorkerConfig:
    return WorkerConfig(**{"batch_size": 64, **changes})


# ---- data ------------------------------------------------------------------------------------------------------------


def test_made_up_clicks_are_decided_by_their_seed():
    one, two, other = make_clicks(50, seed=1), make_clicks(50, seed=1), make_clicks(50, seed=2)
    np.testing.assert_array_equal(one.labels, two.labels)
    for name in one.features:
        np.testing.assert_array_equal(one.features[name].values, two.features[name].values)
    assert any((one.features[name].values != other.features[name].values).any() for name in ("user", "item"))
    with pytest.raises(InvalidRequestError):
        make_clicks(0)


def test_zipf_ids_favour_few():
    ids = zipf_ids(np.random.default_rng(0), (10_000,), 1000)
    counts = np.sort(np.bincount(ids, minlength=1000))[::-1]
    assert counts[:10].sum() > 10 * counts[500:510].sum()


def test_data_and_models_are_named_or_refused():
    assert len(load_dataset("synthetic:100").train) == 80
    for name in ("synthetic:", "synthetic:3", "movielens:5", "imagenet"):
        with pytest.raises(InvalidRequestError, match="movielens"):
            load_dataset(name)
    with pytest.raises(InvalidRequestError, match="deepfm"):
        settings_of("mlp")


def test_training_from_files_sees_every_sample_once_per_epoch_in_an_order_of_its_own(parts, tmp_path):
    files = store_clicks(parts.train, tmp_path)
    assert len(files) == len(parts.train)
    assert store_clicks(parts.train, tmp_path) == files

    def seen(share, **options):
        batches = list(share.epoch(64, seed=1, **{"epoch": 0, **options}))
        assert all(len(batch) == 64 for batch in batches[:-1])
        return np.concatenate([batch.features["user"].values for batch in batches])

    want = parts.train.features["user"].values
    np.testing.assert_array_equal(np.sort(seen(files)), np.sort(want))
    assert (seen(files) != seen(files, epoch=1)).any()
    np.testing.assert_array_equal(seen(files, skip=3), seen(files)[3 * 64 :])
    np.testing.assert_array_equal(seen(files, samples=100), seen(files)[:100])
    shares = [files.shard(rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [len(seen(share)) for share in shares]
    np.testing.assert_array_equal(np.sort(np.concatenate([seen(share) for share in shares])), np.sort(want))
    batch = next(files.epoch(1 << 20, seed=0, epoch=0))
    for name, ragged in parts.train.features.items():
        assert batch.features[name].values.size == ragged.values.size
    assert batch.labels.sum() == parts.train.labels.sum()


# ---- position, events, figures ---------------------------------------------------------------------------------------


def test_a_position_outlives_its_worker(tmp_path):
    path = str(tmp_path / "state")
    assert Position.load(path) == Position()
    Position(1, 2, 3).save(path)
    assert Position.load(path) == Position(1, 2, 3)
    Position(9, 9, 9).save("")
    Position(1, 2, 3).save(path, config(batch_size=64, seed=1))
    assert Position.load(path, config(batch_size=64, seed=1)) == Position(1, 2, 3)
    for other in ({"batch_size": 32, "seed": 1}, {"batch_size": 64, "seed": 2}, {"batch_size": 64, "world_size": 2}):
        with pytest.raises(InvalidRequestError, match=r"counts batches of (batch_size|seed|world_size)"):
            Position.load(path, config(**other))
    Path(path).write_text("[")
    with pytest.raises(InvalidRequestError, match="does not say where a worker is"):
        Position.load(path)
    assert Position.load("") == Position()


def test_events_are_read_once_each_and_only_when_whole(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    log = EventLog(path, clock=lambda: 5.0)
    log({"event": "start"})
    with path.open("a") as file:
        file.write('{"event": "do')
    assert tail.read() == [{"time": 5.0, "event": "start"}]
    with path.open("a") as file:
        file.write('ne"}\n')
    assert tail.read() == [{"event": "done"}]
    log.close()


def test_the_meter_looks_back_on_the_newest_samples():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert meter.report() == {"samples": 0, "steps": 0, "samples_per_s": 0.0}
    meter.add(np.array([0, 1], np.float32), np.array([0.9, 0.1], np.float32), 2.0)
    now[0] = 2.0
    assert meter.due()
    assert meter.report() == {"samples": 2, "steps": 1, "samples_per_s": 1.0, "loss": 2.0, "auc": 0.0}
    big = np.tile(np.array([0, 1], np.float32), 5000)
    meter.add(big, big, 1.0)
    assert meter.report()["auc"] == 1.0
    assert meter.report()["loss"] == 1.0


def test_the_last_report_counts_from_the_first_step_to_the_last():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    for second in (100.0, 101.0, 102.0):  # it took long to begin
        now[0] = second
        meter.add(np.array([0, 1], np.float32), np.array([0.9, 0.1], np.float32), 2.0)
    meter.report()
    now[0] = 104.0  # nothing was trained meanwhile
    assert meter.summary()["samples_per_s"] == 2.0


@pytest.mark.parametrize(
    "changes",
    [{"rank": 1}, {"rank": -1}, {"batch_size": 0}, {"epochs": -1}, {"steps": -1}, {"save_every": 5}],
)
def test_impossible_work_is_refused(changes):
    with pytest.raises(InvalidRequestError, match=next(iter(changes))):
        config(**changes)


def test_the_flags_of_a_worker_are_its_options(monkeypatch):
    seen = []
    monkeypatch.setattr("trilith_services.worker.run.run_worker", lambda config, *_, **__: seen.append(config) or 0)
    wanted = config(
        cluster="static://h:1", rank=1, world_size=2, dense=Dense.allreduce, master="h:2", validate=False, timeout_s=3.0
    )
    for config_ in (wanted, config(cluster="static://h:1")):
        with pytest.raises(SystemExit):
            main(["worker", *argv_of(config_)])
        assert seen.pop() == config_
    assert "h:1" not in repr(wanted)


# ---- training --------------------------------------------------------------------------------------------------------


@compiled_only
def test_training_stops_when_asked_and_goes_on_where_it_was(client, parts, tmp_path):
    state = str(tmp_path / "state")
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 5

    events: list[dict] = []
    assert not Trainer(config(state_file=state), client, click_task(SMALL, parts), events.append).run(stop)
    assert events[-1]["event"] == "stopped"
    assert Position.load(state) == Position(0, 5, 5)
    assert client.global_step() == 5
    assert Trainer(config(state_file=state), client, click_task(SMALL, parts), events.append).run()
    batches = -(-len(parts.train) // 64)
    assert Position.load(state) == Position(2, 0, 2 * batches)
    assert client.global_step() == 2 * batches


@compiled_only
def test_steps_limit_a_worker(client, parts):
    events: list[dict] = []
    assert Trainer(config(steps=7), client, click_task(SMALL, parts), events.append).run()
    assert events[0]["total_steps"] == 7
    assert events[-1] == {"event": "done", "rank": 0, "samples": 7 * 64}


@compiled_only
def test_rank_0_saves_once_it_has_trained_as_steps_go_by_and_at_the_end(client, parts, tmp_path):
    events: list[dict] = []
    directory = str(tmp_path / "model")
    work = config(model_dir=directory, save_every=16, steps=40, validate=False)
    Trainer(work, client, click_task(SMALL, parts), events.append).run()
    saved = [event["step"] for event in events if event["event"] == "saved"]
    assert saved == [8, 24, 40]
    assert len(list_checkpoints(directory)) == 3
    path, step = save_checkpoint(client, directory, clock=lambda: 0.0)
    assert step == 40
    newest = newest_complete(directory)
    assert newest.path == path, "a clock that went back must not make the newest checkpoint look old"


@compiled_only
def test_a_start_neither_saves_nor_prunes_and_refuses_a_directory_that_is_ahead_of_its_cluster(client, parts, tmp_path):
    directory = str(tmp_path / "model")
    work = config(model_dir=directory, save_every=16, steps=40, validate=False)
    Trainer(work, client, click_task(SMALL, parts), lambda event: None).run()
    before = list_checkpoints(directory)
    for _ in range(3):
        with trilith.connect("local://") as empty:
            trainer = Trainer(work, empty, click_task(SMALL, parts), lambda event: None)
            with pytest.raises(InvalidRequestError, match="of step 40, the cluster is at step 0"):
                trainer.run()
            assert list_checkpoints(directory) == before
        with trilith.connect("local://") as restored:
            restored.restore(before[-1].path)
            assert Trainer(work, restored, click_task(SMALL, parts), lambda event: None).run(lambda: True) is False
            assert list_checkpoints(directory) == before, "stopped before its first step, it has nothing to save"


@compiled_only
def test_the_checkpoint_of_most_steps_outlives_any_number_of_empty_ones(client, parts, tmp_path):
    directory = str(tmp_path / "model")
    Trainer(
        config(model_dir=directory, steps=16, validate=False), client, click_task(SMALL, parts), lambda event: None
    ).run()
    trained = newest_complete(directory)
    with trilith.connect("local://") as empty:
        for _ in range(5):
            save_checkpoint(empty, directory)
    assert trained in list_checkpoints(directory)
    assert len(list_checkpoints(directory)) == 4


@compiled_only
def test_a_checkpoint_that_fails_does_not_end_training(client, parts, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    events: list[dict] = []
    assert Trainer(config(model_dir=str(blocker), steps=10), client, click_task(SMALL, parts), events.append).run()
    assert "save_failed" in [event["event"] for event in events]


@compiled_only
def test_a_restarted_ps_costs_a_batch_and_is_told(client, parts):
    """The restart itself is played: the third push finds another incarnation."""
    events: list[dict] = []
    trainer = Trainer(config(steps=6), client, click_task(SMALL, parts), events.append)
    real, calls = client.apply_gradients, []

    def apply_gradients(updates):
        calls.append(1)
        if len(calls) == 3:
            raise ShardRestartedError("shard 0 restarted")
        real(updates)

    client.apply_gradients = apply_gradients
    back = Rejoined(index=0, restored_from="ckpt", restored_step=8, known_step=30, missing_variables=("dense/bias",))
    client.rejoin = lambda: [back]
    pull, stale = trainer._dense.pull, []

    def pull_and_look():
        stale.extend(each.grad for each in trainer.model.head.parameters() if each.grad is not None)
        return pull()

    trainer._dense.pull = pull_and_look
    assert trainer.run()
    assert not stale  # the dense gradients of the batch that was given up are in no later step
    (told,) = [event for event in events if event["event"] == "rejoined"]
    assert (told["shard"], told["steps_back"], told["restored_from"]) == (0, 22, "ckpt")
    assert len(calls) == 6
    assert events[-1]["samples"] == 5 * 64


@compiled_only
def test_both_models_train(client, parts):
    settings = replace(settings_of("deepfm"), dim=4, hidden=(8,))
    events: list[dict] = []
    assert Trainer(config(steps=5), client, click_task(settings, parts), events.append).run()
    assert np.isfinite(events[-2]["loss"])


# ---- the process -----------------------------------------------------------------------------------------------------


@compiled_only
def test_a_worker_serves_the_timers_of_its_lookups(tmp_path):
    (port,) = free_ports(1)
    scraped = []

    @contextmanager
    def follower(task):
        def tell(event):
            if event["event"] == "done":
                with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
                    scraped.append(reply.read().decode())

        yield tell

    with LocalCluster("1-ps") as cluster:
        work = config(cluster=cluster.address, metrics_port=port, threads=1, epochs=1, steps=3, validate=False)
        assert run_worker(work, lambda: replace(load(), name="timed-worker"), follower=follower) == 0
    (line,) = [
        line
        for line in scraped[0].splitlines()
        if line.startswith('trilith_embedding_lookup_seconds_count{model_name="timed-worker",ps="0"}')
    ]
    assert float(line.split()[-1]) >= 3
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


@compiled_only
def test_a_worker_that_holds_the_rows_may_queue_between_the_stages_of_an_exchange(tmp_path):
    (port,) = free_ports(1)
    events = []

    @contextmanager
    def follower(task):
        yield events.append

    queues = {"prefetch": 1, "async_push": 1, "lookup_queue": 1, "update_queue": 2}
    work = config(mode=Mode.all_to_all, master=f"127.0.0.1:{port}", threads=1, epochs=1, **queues)
    assert run_worker(work, load, follower=follower) == 0
    assert events[-1]["event"] == "done"
    assert any(each["event"] == "validation" for each in events)
    with pytest.raises(InvalidRequestError, match="queues of an exchange"):
        run_worker(config(cluster="local://", update_queue=1), load)


def test_a_group_for_a_gpu_has_a_backend_for_either_device():
    assert (backends("cpu"), backends("cuda")) == ("gloo", "cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_waits_for_its_cluster_ends_at_a_signal(monkeypatch, number):
    def wait(*args, **options):
        signal.raise_signal(number)
        time.sleep(60)

    monkeypatch.setattr("trilith_services.worker.run.connect", wait)
    before = signal.getsignal(number)
    assert run_worker(config(cluster="static://127.0.0.1:9"), load) == 0
    assert signal.getsignal(number) is before

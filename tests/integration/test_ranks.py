"""Several workers of an Estimator: processes in step on PS, that agree, end together, and go on together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import trilith
from tests.congruence.clusters import LocalCluster
from tests.integration.ranks_job import BEGAN
from tests.waiting import eventually
from trilith.checkpoint import list_checkpoints, read_manifest
from trilith.estimator.control import ask
from trilith.estimator.state import read_job, read_rank
from trilith_services.local.supervisor import free_ports, trilith_argv
from trilith_services.ps.checkpoint import parquet

pytestmark = pytest.mark.jobs

TIMEOUT_S = 400


class Ranks:
    """A scenario of `tests.integration.ranks_job` in so many processes."""

    def __init__(self, out: Path, scenario: str, ranks: int = 2, **settings: str) -> None:
        out.mkdir(exist_ok=True)
        self._out, self._scenario = out, scenario
        port = free_ports(1)[0]
        self.processes = []
        for rank in range(ranks):
            environ = os.environ | settings
            if ranks > 1:
                environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            argv = [sys.executable, "-m", "tests.integration.ranks_job", scenario, str(out)]
            with self._log(rank).open("wb") as log:
                self.processes.append(subprocess.Popen(argv, env=environ, stdout=log, stderr=log))

    def _log(self, rank: int) -> Path:
        return self._out / f"{self._scenario}-{rank}.log"

    def log(self, rank: int) -> str:
        return self._log(rank).read_text()

    def statuses(self) -> list[int]:
        return [process.wait(TIMEOUT_S) for process in self.processes]

    def reports(self) -> list[dict]:
        assert self.statuses() == [0] * len(self.processes), "\n".join(map(self.log, range(len(self.processes))))
        return [json.loads((self._out / f"{self._scenario}-{r}.json").read_text()) for r in range(len(self.processes))]


@pytest.fixture
def ranks(tmp_path):
    """Starts ranks, and ends those that are left."""
    started = []

    def start(scenario: str, ranks: int = 2, out: str = "out", **settings: str) -> Ranks:
        started.append(Ranks(tmp_path / out, scenario, ranks, **settings))
        return started[-1]

    yield start
    for each in started:
        for process in each.processes:
            process.kill()
            process.wait(60)


def at(there: LocalCluster, /, **settings: object) -> dict[str, str]:
    """Settings of a run on a cluster, as the environment has them."""
    return {f"TRILITH_RUN_{name.upper()}": str(value) for name, value in {"cluster": there.address, **settings}.items()}


def assert_same(found: dict, want: dict, tolerance: float) -> None:
    assert (found["step"], found["counted"]) == (want["step"], want["counted"])
    np.testing.assert_allclose(found["rows"], want["rows"], rtol=0, atol=tolerance)
    for name, value in want["dense"].items():
        np.testing.assert_allclose(found["dense"][name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_norm": 1e6}, {"accumulate": 2}, {"cluster": "peers://", "accumulate": 2}],
    ids=["plain", "clipped", "summed", "peers"],
)
def test_two_workers_in_step_are_one_with_the_joined_batch(ranks, settings):
    with LocalCluster("3-ps") as one, LocalCluster("3-ps") as two:
        alone = ranks("train", 1, "one", **at(one, **{**settings, "cluster": one.address}))
        first, second = ranks("train", 2, "two", **at(two, **settings)).reports()
        (want,) = alone.reports()
    assert np.abs(want["rows"]).max() > 0.01
    assert first["counted"] == (3 if "accumulate" in settings else 6)
    assert_same(first, want, 1e-6)
    assert_same(second, first, 0)
    assert (first["told"], second["told"]) == (want["told"], want["told"])


@pytest.mark.parametrize("where", ["ps", "peers"])
def test_workers_in_step_begin_as_one_with_a_checkpoint_of_other_names(ranks, tmp_path, where):
    def settings(cluster: LocalCluster, tower: str, **run: object) -> dict[str, str]:
        place = cluster.address if where == "ps" else "peers://"
        return at(cluster, **{"dense": "allreduce", **run, "cluster": place}) | {"TOWER": tower}

    warm = {
        "warm_start_aliases": json.dumps(
            {f"tower.{n}.{k}": f"deep.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")}
        )
    }
    with LocalCluster("3-ps") as old:
        ranks("renamed", 2, "old", **settings(old, "deep", model_dir=tmp_path / "old")).reports()
    warm |= {"warm_start": list_checkpoints(str(tmp_path / "old"))[0].path, "warm_start_keep_step": "false"}
    with LocalCluster("3-ps") as one, LocalCluster("3-ps") as two:
        alone = ranks("renamed", 1, "one", **settings(one, "tower", **warm))
        saves = {"model_dir": tmp_path / "new"}  # of variables that the PS know by their new names
        first, second = ranks("renamed", 2, "two", **settings(two, "tower", **warm, **saves)).reports()
        (want,) = alone.reports()
    assert first["counted"] == 6
    assert_same(first, want, 1e-6)
    assert_same(second, first, 0)


def test_workers_that_do_not_wait_begin_at_step_0_with_a_checkpoint_of_other_names(ranks, tmp_path):
    with LocalCluster("3-ps") as old:
        settings = at(old, dense="ps", model_dir=tmp_path / "old")
        ranks("renamed", 1, "old", **settings, TOWER="deep").reports()
    path = list_checkpoints(str(tmp_path / "old"))[0].path
    warm = {"warm_start": path, "warm_start_keep_step": "false", "warm_start_match": "auto"}
    with LocalCluster("3-ps") as new:
        found = ranks("renamed", 2, "new", **at(new, dense="ps", **warm), TOWER="deep_3")
        assert found.statuses() == [0, 0], found.log(0) + found.log(1)
        client = new.connect()
        assert client.global_step() == 12
        assert {name.rpartition("/")[2] for name in client.variables()} == {
            f"deep_3.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")
        }
        client.close()


def test_a_bound_on_the_norm_is_one_for_all(ranks):
    # A bound that is always reached: were it each rank's own, the dense parts would part.
    with LocalCluster("1-ps") as cluster:
        first, second = ranks("train", **at(cluster, clip_norm=0.01)).reports()
    assert_same(second, first, 0)
    assert 0 < np.abs(first["rows"]).max() <= 0.01 * 0.5 * first["step"]


@pytest.mark.parametrize("where", ["ps", "peers"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_rank_without_data_takes_the_steps_of_the_others(ranks, ahead, where):
    with LocalCluster("3-ps") as cluster:
        settings = {"cluster": cluster.address if where == "ps" else "peers://", "async_push": ahead}
        first, second = ranks("uneven", **at(cluster, **settings), AHEAD=str(ahead)).reports()
    assert (first["step"], first["counted"]) == (12, 12)
    assert_same(second, first, 0)
    assert first["metrics"] == second["metrics"]
    assert (first["told"].count("step"), second["told"].count("step")) == (12, 4)
    assert first["told"].count("epoch") == second["told"].count("epoch") == 2


def test_a_dataset_is_shared_exactly_once_and_metrics_are_those_of_the_whole(ranks):
    with LocalCluster("1-ps") as cluster:
        first, second = ranks("shared", **at(cluster)).reports()
    for name in ("held", "file", "own", "arrow"):
        assert sorted(first["seen"][name] + second["seen"][name]) == list(range(27)), name
        assert abs(len(first["seen"][name]) - len(second["seen"][name])) <= 1, name
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_of_one_rank_that_is_not_finite_is_left_out_by_all(ranks, precision):
    with LocalCluster("1-ps") as cluster:
        first, second = ranks("not_finite", **at(cluster), PRECISION=precision).reports()
    assert (first["step"], first["counted"]) == (5, 5)
    assert first["skipped"] == second["skipped"] == (precision == "fp32")
    assert first["scale"] == second["scale"] < (2.0 if precision == "fp32" else 65536.0)
    assert_same(second, first, 0)


@pytest.mark.parametrize(("scenario", "reason"), [("stops", "enough of it"), ("terminated", "SIGTERM")])
def test_what_stops_one_rank_stops_all_after_the_same_step(ranks, tmp_path, scenario, reason):
    with LocalCluster("1-ps") as cluster:
        first, second = ranks(scenario, **at(cluster, model_dir=tmp_path / "model")).reports()
    assert (first["step"], first["counted"]) == (3, 3)
    assert_same(second, first, 0)
    assert (first["reason"], second["reason"]) == (f"rank 1: {reason}", reason)
    for told in (first["told"], second["told"]):
        assert told[-2:] == ["saved", "stopped"]
    (saved,) = list_checkpoints(str(tmp_path / "model"))
    assert [read_rank(saved.path, rank, 2).batches for rank in (0, 1)] == [3, 3]


def test_a_rank_that_fails_or_is_killed_ends_the_others_which_say_why(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        failed, killed = ranks("raises", out="a", **at(cluster)), ranks("killed", out="b", **at(cluster))
        assert failed.statuses() == [1, 1]
        assert "UnavailableError: rank 0 of 2: rank 1 ended with KeyError: " in failed.log(0).splitlines()[-1]
        assert "raised by callback At" in failed.log(1)
        assert killed.statuses() == [1, 9]
        assert "rank 0 of 2: another rank is gone without a word" in killed.log(0).splitlines()[-1]


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_others_say_why_rank_0_failed_which_holds_what_they_meet_by(ranks, ahead):
    with LocalCluster("1-ps") as cluster:
        failed = ranks("raises", 3, **at(cluster, prefetch=ahead, async_push=ahead), FAILS="0")
        assert failed.statuses() == [1, 1, 1]
        for rank in (1, 2):
            said = f'UnavailableError: rank {rank} of 3: rank 0 ended with KeyError: "a fault of the user\'s"; started'
            assert said in failed.log(rank).splitlines()[-1]
        killed = ranks("killed", out="killed", **at(cluster), FAILS="0")
        assert killed.statuses() == [9, 1]
        assert "rank 1 of 2: another rank is gone, and so is rank 0" in killed.log(1).splitlines()[-1]


def test_a_save_that_one_rank_cannot_make_fails_for_all_and_training_goes_on(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        first, second = ranks("saves_fail", **at(cluster, model_dir=tmp_path / "model", save_every=2)).reports()
    assert first["counted"] == 6
    for told in (first["told"], second["told"]):
        assert (told.count("save_failed"), told.count("saved")) == (1, 2)
    assert "the disk of rank 1 is full" in (tmp_path / "out" / "saves_fail-0.log").read_text()
    assert [info.complete for info in list_checkpoints(str(tmp_path / "model"))] == [True, True]


def test_all_ranks_save_and_the_chief_exports(ranks, tmp_path):
    with LocalCluster("3-ps") as cluster:
        first, second = ranks("exports", **at(cluster, model_dir=tmp_path / "model")).reports()
    assert first["metrics"] == second["metrics"] == first["again"] == second["again"]
    assert first["export"] == second["export"]
    assert Path(first["export"]).is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "sigkill"])
def test_ranks_that_end_in_the_middle_go_on_together_to_the_same_end(ranks, tmp_path, number):
    model = {"model_dir": tmp_path / "model", "save_every": 2, "owns_cluster": "true"}
    with LocalCluster("1-ps") as cluster:
        cut = ranks("waits", out="cut", **at(cluster, **model))
        eventually((tmp_path / "cut" / "trains").exists, timeout_s=TIMEOUT_S)
        cut.processes[1].send_signal(number)
        assert cut.statuses() == ([1, -9] if number == signal.SIGKILL else [0, 0])
        newest = [info for info in list_checkpoints(str(tmp_path / "model")) if info.complete][-1]
        done = {read_rank(newest.path, rank, 2).steps for rank in (0, 1)}
        assert len(done) == 1
        assert done.pop() >= 2
    with LocalCluster("1-ps") as cut, LocalCluster("1-ps") as whole:
        first, second = ranks("waits", out="on", **at(cut, **model), STEPS="100").reports()
        (want, _) = ranks("waits", out="whole", **at(whole), STEPS="100").reports()
    assert first["told"][0] == "restored"
    assert_same(second, first, 0)
    assert_same(first, want, 1e-5)


def test_workers_that_hold_the_rows_save_them_and_go_on(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, cluster="peers://", model_dir=tmp_path / "model", save_every=4, prefetch=2, epochs=1)
        ranks("train", out="part", **settings).reports()
        first, second = ranks("train", out="on", **settings | {"TRILITH_RUN_EPOCHS": "2"}).reports()
        (want, _) = ranks("train", out="whole", **at(cluster, epochs=2)).reports()
        scored = ranks("scores", 1, **settings).reports()
    assert (first["told"][0], first["step"], first["counted"]) == ("restored", 12, 12)
    assert_same(second, first, 0)
    assert np.abs(np.subtract(first["rows"], want["rows"])).max() < 0.5  # rows that are looked up ahead are older
    np.testing.assert_equal(scored[0]["rows"], first["rows"])
    np.testing.assert_equal(scored[0]["dense"], first["dense"])


def test_ranks_outlive_a_ps_that_restarts(ranks, tmp_path, processes):
    names = ["ps-0", "ps-1"]
    places = ("--checkpoint-root", str(tmp_path), "--checkpoint-dir", str(tmp_path / "model"))
    addresses = [
        processes.start(name, "ps", "--index", str(index), "--count", "2", *places) for index, name in enumerate(names)
    ]
    processes.wait(*names)
    settings = {
        "TRILITH_RUN_CLUSTER": f"static://{','.join(addresses)}",
        "TRILITH_RUN_MODEL_DIR": str(tmp_path / "model"),
        "TRILITH_RUN_SAVE_EVERY": "50",
    }
    job = ranks("waits", **settings)
    eventually(lambda: any(info.complete for info in list_checkpoints(str(tmp_path / "model"))), timeout_s=TIMEOUT_S)
    processes.end("ps-1")
    processes.start("ps-1")
    processes.wait("ps-1")
    (tmp_path / "out" / "enough").touch()
    job.processes[1].send_signal(signal.SIGTERM)
    first, second = job.reports()
    for told in (first["told"], second["told"]):
        assert "rows_rejoined" in told
        assert told[-1] == "stopped"
    np.testing.assert_equal(first["dense"], second["dense"])


def test_torchrun_starts_workers_which_say_why_another_ended(tmp_path):
    def torchrun(scenario: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        argv += [str(free_ports(1)[0]), "-m", "tests.integration.ranks_job", scenario, str(tmp_path)]
        environ = os.environ | at(cluster)
        return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    with LocalCluster("1-ps") as cluster:
        done, failed = torchrun("train"), torchrun("raises")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"train-{rank}.json").read_text()) for rank in (0, 1))
    assert first["counted"] == 6
    assert_same(second, first, 0)
    assert failed.returncode == 1
    assert "a fault of the user's" in failed.stderr


def test_trilith_worker_takes_its_rank_from_the_environment(tmp_path):
    port = str(free_ports(1)[0])
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster) | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = trilith_argv("worker", "tests.integration.ranks_job:of_worker")
        ranks = [
            subprocess.Popen(argv, env=os.environ | settings | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0]
        with cluster.connect() as client:
            assert client.global_step() == 6
    assert "worker: click/auc=" in said[0]
    assert said[1] == ""


def test_another_number_of_workers_is_refused_in_a_line_that_says_what_to_do(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=tmp_path / "model")
        ranks("train", 2, **settings).reports()
        alone = ranks("train", 1, "alone", **settings)
        assert alone.statuses() == [1]
        assert "was written by 2 workers, and there are 1" in alone.log(0).splitlines()[-1]


@pytest.mark.parametrize("where", ["ps", "peers"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_step_is_as_late_as_its_latest_sample_of_any_rank_and_so_are_saves(ranks, tmp_path, where, ahead):
    settings = {"prefetch": ahead, "async_push": ahead, "save_every_event_s": 3600, "keep_newest": 99}
    with LocalCluster("3-ps") as cluster:
        settings |= {"cluster": cluster.address if where == "ps" else "peers://", "model_dir": tmp_path / "model"}
        first, second = ranks("timed", **at(cluster, **settings)).reports()
    # Rank 1 is an hour ahead until its batches end with the fifth; the tenth of rank 0 is a little later than that.
    step_of = [BEGAN + 900 * each for each in (4, 5, 6, 7, 8, 5, 6, 7, 8, 9)]
    latest = np.maximum.accumulate(step_of).tolist()
    saved = [(step, latest[step - 1]) for step in (3, 10)]
    assert [tuple(each) for each in first["saved"]] == [tuple(each) for each in second["saved"]] == saved
    newest = list_checkpoints(str(tmp_path / "model"))[-1].path
    assert read_job(newest).event_time == latest[-1]
    assert [read_rank(newest, rank, 2).event_time for rank in (0, 1)] == [latest[-1]] * 2
    assert sum(parquet.export(newest, read_manifest(newest), str(tmp_path / "rows"), ["user"])) == 15
    rows = pq.read_table(tmp_path / "rows" / "user").to_pydict()
    updated = [each.timestamp() for each in rows["last_update"]]
    assert dict(zip(rows["id"], updated, strict=True)) == {
        100 * rank + number: step_of[number] for rank in (0, 1) for number in range(5 if rank else 10)
    }


# ---- workers that do not wait for each other -------------------------------------------------------------------------


def share(rank: int) -> list[int]:
    """Samples of 80 that are a rank's of two."""
    return list(range(rank, 80, 2))


def test_workers_that_do_not_wait_share_the_data_and_the_chief_saves_after_all_of_them(ranks, tmp_path):
    saved = str(tmp_path / "model")
    with LocalCluster("3-ps") as cluster:
        first, second = ranks("apart", **at(cluster, model_dir=saved, save_every=4)).reports()
    assert (first["seen"], second["seen"]) == (share(0), share(1))
    assert "click/auc" in first["metrics"]
    assert second["metrics"] == {}
    assert "saved" in first["told"]
    assert not {"saved", "evaluated"} & set(second["told"])
    newest = list_checkpoints(saved)[-1].path
    # A save behind the chief's last batch, where that is the last step of all, is the last one.
    ends = [(at.epoch, at.batches) for at in (read_rank(newest, rank, 2) for rank in range(2))]
    assert ends in ([(1, 0), (1, 0)], [(0, 10), (1, 0)])
    # PS that are new and empty: the chief restores them, the other one waits for that.
    with LocalCluster("3-ps") as cluster:
        first, second = ranks("apart", out="again", **at(cluster, model_dir=saved, save_every=4, epochs=2)).reports()
    assert (first["seen"], second["seen"]) == (share(0), share(1))
    assert first["counted"] == 40


def test_a_worker_that_was_killed_goes_on_where_it_left_word_while_the_others_train(ranks, tmp_path):
    saved = str(tmp_path / "model")
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=saved, save_every=1, timeout_s=200)
        two = ranks("apart", STUCK="1", **settings)
        eventually((tmp_path / "out" / "held").exists, timeout_s=120)
        two.processes[1].kill()
        two.processes[1].wait()
        assert two.processes[0].poll() is None  # it waits for the other before its last save
        environ = {"RANK": "1", "WORLD_SIZE": "2"}
        back = ranks("apart", 1, "back", **settings, **environ)
        assert back.statuses() == [0], back.log(0)
        assert two.processes[0].wait(TIMEOUT_S) == 0, two.log(0)
    first = json.loads((tmp_path / "out" / "apart-0.json").read_text())
    again = json.loads((tmp_path / "back" / "apart-1.json").read_text())
    assert first["seen"] == share(0)
    # Word was left behind the third batch of four, and of the fourth nobody knows.
    assert again["seen"] == share(1)[12:]
    found = [read_rank(list_checkpoints(saved)[-1].path, rank, 2) for rank in range(2)]
    assert [each.epoch for each in found] == [1, 1]
    assert [list(each.callbacks.values()) for each in found] == [[{"steps": 10}]] * 2


def test_a_callback_of_one_worker_stops_those_that_do_not_wait_for_it(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=tmp_path / "model", epochs=100_000)
        first, second = ranks("apart", STOP="3", **settings).reports()
    assert (first["reason"], second["reason"]) == ("enough of it", "enough of it")
    assert second["told"][-1] == "stopped"


def test_a_worker_that_comes_after_all_were_told_to_stop_stops_and_goes_on_with_the_next_run(ranks, tmp_path):
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=tmp_path / "model", epochs=100_000)
        both = ranks("apart", STOP="3", LATE="1", **settings)
        eventually((tmp_path / "model" / "workers" / "stop.json").exists, timeout_s=120)
        (tmp_path / "out" / "free").touch()
        first, second = both.reports()
        assert (first["reason"], second["reason"]) == ("enough of it", "enough of it")
        assert (len(first["seen"]), second["seen"]) == (12, [])
        assert second["step"] == 3
        settings |= at(cluster, epochs=1)
        again = ranks("apart", **settings).reports()
    assert [each["told"][-1] for each in again] == ["done", "done"]
    assert sorted(first["seen"] + again[0]["seen"] + again[1]["seen"]) == list(range(80))


@pytest.mark.parametrize("scenario", ["waits", "apart"])
def test_an_operator_pauses_saves_resumes_and_ends_a_run_of_several(ranks, tmp_path, scenario):
    """In step the ranks agree about it; others look for themselves."""
    saved = str(tmp_path / "model")

    def waiting(count: int) -> bool:
        return len(ask(saved, "status", timeout_s=120).status["waiting"]) == count

    with LocalCluster("1-ps") as cluster, trilith.connect(cluster.address) as client:
        two = ranks(scenario, **at(cluster, model_dir=saved, epochs=100_000))
        eventually(lambda: client.global_step() > 10 and (tmp_path / "model/control/run.json").exists(), timeout_s=120)
        assert ask(saved, "pause", timeout_s=120).done
        eventually(lambda: waiting(1 if scenario == "waits" else 2), timeout_s=120)
        before = client.global_step()
        found = ask(saved, "save", timeout_s=120)
        assert found.done, found.said
        assert read_manifest(list_checkpoints(saved)[-1].path).global_step == before
        assert client.global_step() == before
        assert ask(saved, "resume").done
        eventually(lambda: client.global_step() > before + 10, timeout_s=120)
        assert ask(saved, "stop").done
        first, second = two.reports()
    assert first["told"][-1] == second["told"][-1] == "stopped"
    assert {"paused", "resumed"} <= set(first["told"]) & set(second["told"])


@pytest.mark.parametrize("scenario", ["train", "apart"])
def test_of_several_workers_the_chief_saves_the_dense_part_alone(ranks, tmp_path, scenario):
    saved = str(tmp_path / "model")
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=saved, save_dense_every=4, save_every=1000)
        first, second = ranks(scenario, **settings).reports()
    paths = [each.path for each in list_checkpoints(f"{saved}/dense_only")]
    assert paths
    assert all(read_job(path).dense.keys() == first["dense"].keys() for path in paths)
    # In step all are told of it; else the chief alone, beside its last save.
    assert first["told"].count("saved") == len(paths) + 1
    assert second["told"].count("saved") == (len(paths) + 1 if scenario == "train" else 0)


def test_a_worker_without_a_chief_says_what_it_waits_for(ranks, tmp_path):
    saved = str(tmp_path / "model")
    with LocalCluster("1-ps") as cluster:
        ranks("apart", **at(cluster, model_dir=saved)).reports()
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=saved, epochs=2, timeout_s=1)
        alone = ranks("apart", 1, "alone", **settings, RANK="1", WORLD_SIZE="2")
        assert alone.statuses() == [1]
    assert "rank 1: the cluster is at step 0, and rank 0 did not restore" in alone.log(0)


def test_the_chief_saves_by_its_own_samples_where_nobody_waits_and_the_job_is_as_late_as_the_latest(ranks, tmp_path):
    saved = str(tmp_path / "model")
    with LocalCluster("1-ps") as cluster:
        settings = at(cluster, model_dir=saved, save_every_event_s=3600, keep_newest=99)
        first, second = ranks("timed", **settings, APART="1").reports()
    assert [when for _, when in first["saved"]] == [BEGAN + 900 * each for each in (2, 6, 9)]
    assert second["saved"] == []
    newest = list_checkpoints(saved)[-1].path
    assert [read_rank(newest, rank, 2).event_time for rank in (0, 1)] == [BEGAN + 900 * 9, BEGAN + 900 * 8]
    assert read_job(newest).event_time == BEGAN + 900 * 9

"""`trilith up` with real processes: start, stop, supervision."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import trilith
from tests import waiting
from trilith import checkpoint
from trilith.errors import ShardRestartedError
from trilith.runtime.machine import cores
from trilith.tables import Adagrad, RandomUniform
from trilith_services.local.supervisor import is_serving, trilith_argv

IDS = np.arange(1000, dtype=np.uint64)
USERS = {"dim": 4, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1.0, 1.0)}

pytestmark = pytest.mark.timeout(900)
eventually = partial(waiting.eventually, timeout_s=240.0)


class Up:
    """A running `trilith up`."""

    def __init__(self, directory: Path, *arguments: str, cwd: Path | None = None) -> None:
        self.log = directory / "up.log"
        self.address_file = directory / "address"
        command = trilith_argv("up", "--address-file", str(self.address_file), "--log-dir", str(directory), *arguments)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=cwd)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def address(self) -> str:
        eventually(lambda: self.address_file.exists() or self.process.poll() is not None)
        assert self.address_file.exists(), self.output
        return self.address_file.read_text().strip()

    @property
    def endpoints(self) -> list[str]:
        return self.address.removeprefix("static://").split(",")

    def child(self, *words: str) -> psutil.Process:
        """The child whose command line has these words."""
        for child in psutil.Process(self.process.pid).children():
            line = child.cmdline()
            if any(line[at : at + len(words)] == list(words) for at in range(len(line))):
                return child
        raise AssertionError(f"no child {words}; {self.output}")

    def wait(self, timeout_s: float = 240.0) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str, cwd: Path | None = None) -> Up:
        directory = tmp_path / f"run-{len(started)}"
        directory.mkdir(exist_ok=True)
        started.append(Up(directory, *arguments, cwd=cwd))
        return started[-1]

    yield start
    for run in started:
        children = psutil.Process(run.process.pid).children(recursive=True) if run.process.poll() is None else []
        run.process.terminate()
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.wait()
        for child in children:
            assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@contextmanager
def no_child_survives(run: Up) -> Iterator[None]:
    children = psutil.Process(run.process.pid).children(recursive=True)
    assert children
    yield
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert len(gone) == len(children)


def complete_rows(directory: Path) -> int:
    """Rows in the newest complete checkpoint."""
    newest = checkpoint.newest_complete(str(directory))
    return 0 if newest is None else sum(checkpoint.read_manifest(newest.path).rows().values())


def test_a_killed_ps_comes_back_from_its_checkpoint_at_the_same_address(up, tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    run = up("--ps", "2", "--checkpoint-dir", str(directory), "--checkpoint-every", "0.5")
    with trilith.connect(run.address, timeout_s=60.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, np.ones((IDS.size, 4), np.float32))
        client.global_step(set_to=10)
        rows, entries = users.lookup(IDS), users.lookup_entries(IDS)
        eventually(lambda: complete_rows(directory) == IDS.size)
        before = len(checkpoint.list_checkpoints(str(directory)))
        assert before
        # Two ticks later every complete checkpoint has the step too.
        started = time.time()
        eventually(lambda: checkpoint.newest_complete(str(directory)).number > 1000 * started + 500)

        run.child("--index", "1").kill()
        eventually(lambda: "ps-1 was killed by SIGKILL; starting it again" in run.output)
        eventually(lambda: is_serving(run.endpoints[1]))

        with pytest.raises(ShardRestartedError):
            users.apply_gradients(IDS, np.ones((IDS.size, 4), np.float32))
        (back,) = client.rejoin()
        assert (back.index, back.restored_step) == (1, 10)
        assert str(directory) in back.restored_from
        odd = IDS % 2 == 1  # those that PS 1 owns, which has nothing newer than its checkpoint
        np.testing.assert_array_equal(users.lookup(IDS)[odd], rows[odd])
        assert [e for e, mine in zip(users.lookup_entries(IDS), odd, strict=True) if mine] == [
            e for e, mine in zip(entries, odd, strict=True) if mine
        ]
        users.apply_gradients(IDS, np.ones((IDS.size, 4), np.float32))
    with no_child_survives(run):
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 0


def test_a_ps_that_keeps_dying_ends_the_run_with_the_end_of_its_log(up, tmp_path) -> None:
    run = up("--ps", "1", "--checkpoint-dir", str(tmp_path / "checkpoints"))
    assert run.address
    killed: set[int] = set()
    for _ in range(3):
        child: list[psutil.Process] = []

        def fresh(child: list[psutil.Process] = child) -> bool:
            found = psutil.Process(run.process.pid).children()
            child[:] = [each for each in found if each.pid not in killed]
            return bool(child)

        eventually(fresh)
        killed.add(child[0].pid)
        child[0].kill()
    assert run.wait() == 2
    assert "error: ps-0 keeps dying: 3 times within 60 s, at last it was killed by SIGKILL" in run.output
    assert "the end of" in run.output.split("error: ")[1]


def test_without_checkpoints_a_dead_ps_ends_the_run(up) -> None:
    run = up("--ps", "2")
    assert run.address
    with no_child_survives(run):
        run.child("--index", "0").kill()
        assert run.wait() == 2
    said = run.output.split("error: ")[1]
    assert said.startswith(
        "ps-0 was killed by SIGKILL, and its rows are gone: a job with a model_dir, or --checkpoint-dir, survives that"
    )


def test_sigterm_while_the_ps_start_ends_the_run_well(up) -> None:
    run = up("--ps", "2")
    eventually(lambda: "starting 2 PS" in run.output)
    run.process.terminate()
    assert run.wait() == 0
    assert "stopping" in run.output


def test_nothing_survives_the_supervisor(up) -> None:
    run = up("--ps", "2")
    assert run.address
    with no_child_survives(run):
        run.process.kill()
        run.wait()


def test_a_graceful_stop_writes_a_last_checkpoint_that_the_next_run_starts_from(up, tmp_path) -> None:
    directory = str(tmp_path / "checkpoints")
    first = up("--ps", "2", "--checkpoint-dir", directory, "--checkpoint-every", "3600")
    with trilith.connect(first.address, timeout_s=60.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, np.ones((IDS.size, 4), np.float32))
        entries = users.lookup_entries(IDS)
    first.process.terminate()
    assert first.wait() == 0
    second = up("--ps", "3", "--checkpoint-dir", directory, "--checkpoint-every", "3600")
    with trilith.connect(second.address, timeout_s=60.0) as client:
        assert client.table("user", **USERS).lookup_entries(IDS) == entries


def test_a_stale_address_file_is_not_left_for_scripts_to_read(up, tmp_path) -> None:
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / "address").write_text("static://127.0.0.1:1\n")
    run = up("--ps", "1")
    eventually(lambda: "starting 1 PS" in run.output)
    eventually(lambda: not run.address_file.exists() or run.address_file.read_text() != "static://127.0.0.1:1\n")
    assert run.address != "static://127.0.0.1:1"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A directory with what `trilith new` writes."""
    pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("new") / "clicks"
    subprocess.run(trilith_argv("new", str(directory)), check=True, capture_output=True, timeout=240)
    return directory


@pytest.mark.jobs
def test_a_job_ends_with_its_last_save_and_goes_on_there_on_other_ps(up, job, tmp_path) -> None:
    model_dir = tmp_path / "model"
    common = ("--job", "job:job", "--workers", "2", "--set", f"model_dir={model_dir}")
    first = up("--ps", "2", *common, "--set", "epochs=1", cwd=job)
    assert first.wait() == 0, first.output
    assert "all workers are done" in first.output
    steps = checkpoint.read_manifest(checkpoint.newest_complete(str(model_dir)).path).global_step
    assert steps > 0
    assert f"done: step {steps}" in first.output
    checkpoints = checkpoint.list_checkpoints(str(model_dir))

    second = up("--ps", "3", *common, "--set", "epochs=2", cwd=job)
    assert second.wait() == 0, second.output
    assert f"done: step {2 * steps}" in second.output
    assert checkpoint.read_manifest(checkpoint.newest_complete(str(model_dir)).path).global_step == 2 * steps
    added = [info for info in checkpoint.list_checkpoints(str(model_dir)) if info not in checkpoints]
    assert all(Path(info.path, "job.json").exists() for info in added), "the PS write none of their own accord"


def dies_and_comes_back(run: Up, name: str, *words: str) -> None:
    """Kill it; it is started again, and worker 0 takes steps after that."""
    run.child(*words).kill()
    eventually(lambda: f"{name} was killed by SIGKILL; starting it again" in run.output, otherwise=lambda: run.output)
    before = run.output.count("| step ")
    eventually(lambda: run.output.count("| step ") > before + 3, otherwise=lambda: run.output)


@pytest.mark.jobs
def test_of_a_job_a_dead_ps_and_a_dead_worker_come_back_from_its_checkpoint(up, job, tmp_path) -> None:
    model_dir = tmp_path / "model"
    sets = (f"model_dir={model_dir}", "epochs=100000", "save_every=20", "evaluate_every_epoch=false", "log_every_s=0.1")
    flags = [word for each in sets for word in ("--set", each)]
    run = up("--job", "job:job", "--ps", "2", "--workers", "2", *flags, cwd=job)
    assert run.address
    eventually(lambda: complete_rows(model_dir) > 0, otherwise=lambda: run.output)
    worker = run.child("worker", "job:job")
    assert f"threads={max(1, cores() // 4)}" in worker.cmdline()
    with no_child_survives(run):
        dies_and_comes_back(run, "ps-1", "--index", "1")
        assert f"PS 1 is back from {model_dir}" in run.output
        assert worker.is_running(), "a dead PS costs a batch"
        dies_and_comes_back(run, "worker-1", "--set", "rank=1")

        run.child("--set", "rank=1").terminate()
        assert run.wait() == 0, run.output
    assert "stopped at step" in run.output
    assert "worker-0 has left" in run.output


def told(events: Path, name: str) -> list[dict[str, Any]]:
    """What a worker has written down, of one kind of event."""
    whole = events.read_text().rpartition("\n")[0] if events.exists() else ""
    return [each for each in map(json.loads, whole.splitlines()) if each["event"] == name]


@pytest.mark.jobs
def test_workers_that_do_not_wait_outlive_a_ps_and_come_and_go(up, tmp_path) -> None:
    pytest.importorskip("torch")
    model_dir, events = tmp_path / "model", [tmp_path / f"worker-{rank}.jsonl" for rank in range(2)]
    sets = (
        f"model_dir={model_dir}", "save_every=20", "epochs=100000", "evaluate_every_epoch=false", "log_every_s=0.1",
        f"events={tmp_path}/worker-{{rank}}.jsonl", "params_override.data=synthetic:20000",
        "params_override.batch_size=128",
    )  # fmt: skip
    flags = [word for each in sets for word in ("--set", each)]
    run = up("--job", "trilith_services.demo.job:deepfm", "--ps", "2", "--workers", "2", *flags)
    assert run.address
    eventually(lambda: complete_rows(model_dir) > 0, otherwise=lambda: run.output)
    eventually(lambda: all(told(each, "step") for each in events), otherwise=lambda: run.output)
    workers = [run.child("--set", f"rank={rank}") for rank in range(2)]

    run.child("--index", "1").kill()
    eventually(lambda: all(told(each, "rows_rejoined") for each in events), otherwise=lambda: run.output)
    assert all(told(each, "rows_rejoined")[0]["restored_from"].startswith(str(model_dir)) for each in events)
    assert all(worker.is_running() for worker in workers), "a dead PS costs a batch"

    eventually(lambda: told(events[1], "step")[-1]["own_step"] > 25, otherwise=lambda: run.output)
    workers[1].kill()
    eventually(lambda: len(told(events[1], "started")) == 2, otherwise=lambda: run.output)
    again = told(events[1], "started")[1]["time"]
    eventually(lambda: told(events[1], "step")[-1]["time"] > again, otherwise=lambda: run.output)
    first = next(each for each in told(events[1], "step") if each["time"] > again)
    assert first["own_step"] > 20, "it goes on where it left word"
    assert workers[0].is_running()

    workers[0].terminate()
    eventually(lambda: "worker-0 has left" in run.output, otherwise=lambda: run.output)
    before = len(told(events[1], "step"))
    eventually(lambda: len(told(events[1], "step")) > before + 3, otherwise=lambda: run.output)
    assert run.process.poll() is None

    run.child("--set", "rank=1").terminate()
    assert run.wait() == 0, run.output
    assert "all workers are done" in run.output


@pytest.mark.jobs
def test_worker_output_has_a_prefix_and_a_worker_that_keeps_failing_ends_the_run(up, job) -> None:
    run = up("--ps", "1", "--job", "job:job", "--", "--no-such-option", cwd=job)
    assert run.wait() == 2
    assert "error: worker-0 keeps dying: 3 times within 60 s, at last it ended with status 2" in run.output
    assert "worker-0 | error: No such option: --no-such-option" in run.output

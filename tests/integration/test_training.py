"""Training with real processes: workers that come and go, a PS that is killed, the demo from start to last line."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from rich.console import Console

import trilith
from trilith.checkpoint import newest_complete, read_manifest
from trilith.nn import DenseOnPs, auc
from trilith.serving.debugging import read_debugging_info
from trilith.serving.exports import entry_base, list_versions, ps_base, read_export
from trilith.serving.prediction import Predictor
from trilith_services.demo.baseline import train_locally
from trilith_services.demo.click_files import click_records
from trilith_services.demo.datasets import load_dataset
from trilith_services.demo.models import TABLE, settings_of
from trilith_services.local.supervisor import ProcessSpec, PsCluster, Supervisor, free_ports, trilith_argv
from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica
from trilith_services.serving.replica_lists import GivenReplicas
from trilith_services.serving.server import Entry, EntryOptions
from trilith_services.worker.events import Tail

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

DATA = "synthetic:40000"
LAST_LINE = re.compile(
    r"demo: auc=(0\.\d{4}) baseline_auc=(0\.\d{4}|nan) samples_per_s=(\d+) baseline_samples_per_s=(\d+|nan) "
    r"rows=(\d+) ps=(\d+) workers=(\d+)"
)


class Run:
    """A cluster and its workers, whose events are kept."""

    def __init__(self, supervisor: Supervisor, directory: Path) -> None:
        self.supervisor = supervisor
        self.directory = directory
        self.cluster = PsCluster(supervisor, 2, checkpoint_dir=directory / "model")
        self.cluster.start()
        self.events: dict[str, list[dict]] = {}
        self._tails: dict[str, Tail] = {}

    def worker(self, rank: int, *arguments: str, world: int = 2) -> str:
        name = f"worker-{rank}"
        events = self.directory / f"{name}.jsonl"
        argv = trilith_argv(
            "worker",
            *("--cluster", self.cluster.address, "--rank", str(rank), "--world-size", str(world), "--model", "ffm"),
            *("--data", DATA, "--events", str(events), "--model-dir", str(self.directory / "model"), *arguments),
        )
        self.supervisor.start(ProcessSpec(name=name, argv=argv))
        self.events[name] = []
        self._tails[name] = Tail(events)
        return name

    def until(self, condition: Callable[[], object], timeout_s: float = 400.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self.supervisor.poll()
            for name, tail in self._tails.items():
                self.events[name] += tail.read()
            if condition():
                return
            tails = {name: self.supervisor.tail(name)[-5:] for name in self._tails}
            assert time.monotonic() < deadline, f"it did not happen in time: {tails}"
            time.sleep(0.02)

    def last(self, name: str, kind: str) -> dict | None:
        return next((event for event in reversed(self.events[name]) if event["event"] == kind), None)

    def steps(self, name: str) -> int:
        return (self.last(name, "progress") or {"steps": 0})["steps"]

    def wait_for_end(self) -> None:
        self.until(lambda: not self.supervisor.running(prefix="worker-"))
        assert {name: self.supervisor.status(name) for name in self._tails} == dict.fromkeys(self._tails, 0)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Supervisor(Console(file=io.StringIO()), tmp_path / "logs") as supervisor:
        yield Run(supervisor, tmp_path)


def score(run: Run) -> float:
    settings, test = settings_of("ffm"), load_dataset(DATA).test
    with trilith.connect(run.cluster.address, timeout_s=60.0) as client:
        model = settings.on_cluster(client, test.features, seed=0)
        DenseOnPs(client, model.head, settings.dense_optimizer())
        return auc(test.labels, model.predict(test))


def test_a_ps_killed_in_the_middle_is_restarted_while_the_same_workers_go_on(run):
    names = [run.worker(rank, "--epochs", "8", "--save-every", "60", "--batch-size", "256") for rank in (0, 1)]
    pids = [run.supervisor.pid(name) for name in names]
    run.until(lambda: (run.last(names[0], "saved") or {"step": 0})["step"] > 0 and run.steps(names[1]) > 50)
    run.supervisor.signal("ps-1", signal.SIGKILL)
    run.wait_for_end()
    assert [run.supervisor.pid(name) for name in names] == pids
    told = [run.last(name, "rejoined") for name in names]
    for event in told:
        assert event is not None
        assert event["shard"] == 1
        assert event["restored_from"]
        assert event["steps_back"] == max(event["known_step"] - event["restored_step"], 0)
    outcome = train_locally(
        settings_of("ffm"), load_dataset(DATA), lambda event: None, epochs=8, batch_size=256, threads=1
    )
    assert outcome.auc > 0.6, "there is something to learn"
    # One PS lost up to 60 of 1,000 steps; that must not be seen in the end.
    assert score(run) > outcome.auc - 0.02


def test_a_worker_may_join_and_leave_and_sigterm_ends_it_well(run, tmp_path):
    base = str(tmp_path / "exports")
    first = run.worker(0, "--epochs", "4", "--save-every", "100", "--export", base, world=2)
    run.until(lambda: run.steps(first) > 0)
    guest = run.worker(1, "--epochs", "1000", world=2)
    run.until(lambda: run.steps(guest) > 0)
    run.supervisor.signal(guest, signal.SIGTERM)
    run.wait_for_end()
    assert run.last(guest, "stopped") is not None
    assert run.last(first, "done") is not None
    newest = read_export(f"{entry_base(base)}/{list_versions(entry_base(base))[-1]}")
    assert newest.step == run.last(first, "saved")["step"], "what is saved in the end is exported"


def test_synchronous_workers_take_the_same_steps_and_store_the_dense_part(run):
    master = f"127.0.0.1:{free_ports(1)[0]}"
    names = [run.worker(rank, "--epochs", "1", "--dense", "allreduce", "--master", master) for rank in (0, 1)]
    run.wait_for_end()
    assert run.steps(names[0]) == run.steps(names[1]) > 0
    with trilith.connect(run.cluster.address, timeout_s=60.0) as client:
        values, step = client.pull_variables()
    assert step == 2 * run.steps(names[0])
    assert values["dense/bias"].any(), "rank 0 publishes what was learned"


def test_a_worker_without_a_cluster_says_so_in_one_line():
    address = f"static://127.0.0.1:{free_ports(1)[0]}"
    done = subprocess.run(
        trilith_argv("worker", "--cluster", address, "--data", "synthetic:100", "--timeout", "1"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def demo(*arguments: str) -> tuple[re.Match[str], str]:
    done = subprocess.run(
        trilith_argv("demo", "--data", "synthetic:5000", "--batch-size", "128", *arguments),
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    match = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert match, done.stdout
    return match, done.stdout


def exporting(tmp_path: Path, mode: str) -> tuple[str, ...]:
    return ("--export", str(tmp_path / "exports"), "--export-mode", mode)


def check_export(tmp_path: Path, shards: int, score: float) -> None:
    """The newest export is of the last step, and an entry that serves it ranks samples as the demo did."""
    base = str(tmp_path / "exports")
    version = list_versions(entry_base(base))[-1]
    newest = newest_complete(str(tmp_path))
    assert newest is not None
    manifest = read_export(f"{entry_base(base)}/{version}")
    assert manifest.step == read_manifest(newest.path).global_step
    assert manifest.mode == ("distributed" if shards else "standalone")
    test = load_dataset("synthetic:5000").test
    with ExitStack() as stack:
        addresses = {}
        for index in range(shards):
            rows = f"{ps_base(base, index)}/{version}/rows"
            replica = ReplicaServer(
                Replica(LocalShard(index=index, count=shards, threads=1)), ReplicaOptions(rows=rows)
            )
            addresses[index] = [f"127.0.0.1:{replica.start()}"]
            stack.callback(replica.stop)
        entry = Entry(base, EntryOptions(deadline_s=20.0), replicas=GivenReplicas(addresses) if shards else None)
        port = entry.start()
        stack.callback(entry.stop)
        predictor = stack.enter_context(Predictor(f"127.0.0.1:{port}", timeout_s=60.0))
        found = predictor.predict(click_records(test))
    assert found.model_version == version
    assert abs(auc(test.labels, found.scores) - score) < 0.005


def test_the_demo_trains_with_processes_and_ends_in_its_line(tmp_path):
    arguments = ("--steps", "24", "--model-dir", str(tmp_path), "--model", "ffm", "--save-every", "8")
    match, text = demo(*arguments, *exporting(tmp_path, "distributed"))
    assert match.group(6, 7) == ("2", "2")
    assert int(match[5]) > 0
    assert match[2] != "nan"
    assert "starting 2 PS and 2 workers" in text
    debugged = read_debugging_info(str(tmp_path))
    assert debugged.cluster.count(",") == 1
    assert set(debugged.features.values()) == {TABLE}
    check_export(tmp_path, 2, float(match[1]))


def test_the_demo_runs_embedded_and_goes_on_from_its_checkpoint(tmp_path):
    arguments = ("--num-ps", "0", "--no-baseline", "--model-dir", str(tmp_path))
    for steps, more in ((6, ()), (12, ()), (12, exporting(tmp_path, "standalone"))):
        match, _ = demo(*arguments, "--steps", str(steps), *more)
        assert match.group(2, 4, 6, 7) == ("nan", "nan", "0", "1")
        with trilith.connect("local://") as client:
            assert client.restore(newest_complete(str(tmp_path)).path) == steps
    check_export(tmp_path, 0, float(match[1]))
    refused = subprocess.run(
        trilith_argv("demo", "--model-dir", str(tmp_path)), capture_output=True, text=True, timeout=240, check=False
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --model-dir {tmp_path} has checkpoints of an embedded demo")


def test_the_demo_runs_without_ps_pipelined_and_goes_on_from_its_checkpoint(tmp_path):
    arguments = ("--mode", "all-to-all", "--steps", "12", "--no-baseline", "--model-dir", str(tmp_path))
    for steps, more in ((6, ()), (12, exporting(tmp_path, "distributed"))):
        match, text = demo(*arguments, "--prefetch", "2", "--async-push", "2", "--save-every", "2", *more)
        assert match.group(2, 4, 6, 7) == ("nan", "nan", "0", "2")
        assert int(match[5]) > 0
        assert "2 workers, all-to-all" in text
        with trilith.connect("local://") as client:
            assert client.restore(newest_complete(str(tmp_path)).path) == steps
    check_export(tmp_path, 2, float(match[1]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--num-ps", "0", "--workers", "2"), "--workers 2"),
        (("demo", "--mode", "all-to-all", "--num-ps", "2"), "--num-ps 2"),
        (("demo", "--mode", "ps", "--num-ps", "0"), "--num-ps 0"),
        (("worker", "--mode", "all-to-all", "--cluster", "static://127.0.0.1:1"), "all-to-all has no PS"),
        (("worker", "--mode", "all-to-all"), "--master"),
    ],
)
def test_modes_that_contradict_other_options_are_refused(arguments, said):
    done = subprocess.run(trilith_argv(*arguments), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_ctrl_c_ends_the_demo_and_all_its_processes(tmp_path):
    arguments = ("--data", DATA, "--model", "ffm", "--epochs", "1000", "--no-baseline", "--model-dir", str(tmp_path))
    with subprocess.Popen(trilith_argv("demo", *arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 130
    assert "stopped, as asked" in rest
    assert not psutil.wait_procs(children, timeout=60)[1]

"""The demo from start to last line: in every mode, resumed, exported, interrupted, with processes that are killed."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.waiting import eventually
from trilith.checkpoint import list_checkpoints, newest_complete, read_manifest
from trilith.nn import auc
from trilith.serving.debugging import read_debugging_info
from trilith.serving.exports import entry_base, list_versions, ps_base, read_export
from trilith.serving.prediction import Predictor
from trilith_services.demo.click_files import click_records
from trilith_services.demo.datasets import load_dataset
from trilith_services.demo.job import TABLE
from trilith_services.local.supervisor import free_ports, trilith_argv
from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica
from trilith_services.serving.replica_lists import GivenReplicas
from trilith_services.serving.server import Entry, EntryOptions

pytestmark = pytest.mark.timeout(900)

SMALL = ("--data", "synthetic:5000", "--batch-size", "128")
LARGE = ("--data", "synthetic:40000", "--model", "ffm")
LAST_LINE = re.compile(
    r"demo: auc=(0\.\d{4}) baseline_auc=(0\.\d{4}|nan) samples_per_s=(\d+) baseline_samples_per_s=(\d+|nan) "
    r"rows=(\d+) ps=(\d+) workers=(\d+)"
)


def last_line(text: str) -> re.Match[str]:
    match = LAST_LINE.fullmatch(text.splitlines()[-1])
    assert match, text
    return match


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(trilith_argv(*arguments), capture_output=True, text=True, timeout=420, check=False)


def demo(*arguments: str) -> tuple[re.Match[str], str]:
    done = ended("demo", *SMALL, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return last_line(done.stdout), done.stdout


def refused(*arguments: str) -> str:
    done = ended(*arguments)
    assert done.returncode == 2, done.stdout
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


def saved_step(directory: Path) -> int:
    newest = newest_complete(str(directory))
    assert newest is not None
    return read_manifest(newest.path).global_step


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


@pytest.mark.jobs
def test_the_demo_trains_with_processes_and_ends_in_its_line(tmp_path):
    arguments = ("--model-dir", str(tmp_path), "--model", "ffm", "--save-every", "8")
    match, text = demo(*arguments, "--steps", "24", *exporting(tmp_path, "distributed"))
    assert match.group(6, 7) == ("2", "2")
    assert int(match[3]) > 0
    assert int(match[5]) > 0
    assert match[2] != "nan"
    assert "starting 2 PS and 2 workers" in text
    assert saved_step(tmp_path) == 24
    assert len(list_versions(entry_base(str(tmp_path / "exports")))) >= 3, "every checkpoint is exported"
    check_export(tmp_path, 2, float(match[1]))
    debugged = read_debugging_info(str(tmp_path))
    assert debugged.cluster.count(",") == 1
    assert set(debugged.features.values()) == {TABLE}
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"ps-0.log", "worker-1.log", "worker-1.jsonl", "torch.jsonl"} <= {each.name for each in folder.iterdir()}

    match, text = demo(*arguments, "--steps", "32", "--no-baseline")
    assert f"goes on from {tmp_path}/ckpt-" in text
    assert saved_step(tmp_path) == 32
    said = refused("demo", *SMALL, *arguments, "--mode", "all-to-all", "--workers", "3", "--seed", "1")
    assert f"--model-dir {tmp_path} has checkpoints of a demo with --mode ps --workers 2 --seed 0: say so, too" in said


@pytest.mark.jobs
def test_the_demo_runs_embedded_and_goes_on_from_its_checkpoint(tmp_path):
    arguments = ("--num-ps", "0", "--no-baseline", "--model-dir", str(tmp_path))
    for steps, more in ((6, ()), (12, ()), (12, exporting(tmp_path, "standalone"))):
        match, text = demo(*arguments, "--steps", str(steps), *more)
        assert match.group(2, 4, 6, 7) == ("nan", "nan", "0", "1")
        assert saved_step(tmp_path) == steps
    check_export(tmp_path, 0, float(match[1]))
    # One worker may go on with the rows on PS.
    match, text = demo("--workers", "1", "--no-baseline", "--model-dir", str(tmp_path), "--steps", "18")
    assert "2 PS, 1 worker " in text
    assert saved_step(tmp_path) == 18
    where = ("demo", *SMALL, "--model-dir", str(tmp_path))
    assert "has checkpoints of a demo with --workers 1: say so, too" in refused(*where)
    said = refused(*where, "--mode", "all-to-all", "--model", "ffm")
    assert "with --model deepfm --mode embedded --workers 1: say" in said


@pytest.mark.jobs
def test_the_demo_runs_without_ps_pipelined_and_goes_on_from_its_checkpoint(tmp_path):
    arguments = ("--mode", "all-to-all", "--no-baseline", "--model-dir", str(tmp_path))
    for steps, more in ((6, ()), (40, exporting(tmp_path, "distributed"))):
        pipelined = ("--prefetch", "2", "--async-push", "2", "--save-every", "20")
        match, text = demo(*arguments, *pipelined, "--steps", str(steps), *more)
        assert match.group(2, 4, 6, 7) == ("nan", "nan", "0", "2")
        assert int(match[5]) > 0
        assert "2 workers, all-to-all" in text
        assert saved_step(tmp_path) == steps // 2, "a step of both is one"
    assert re.findall(r"^epoch (\d+): auc ", text, re.M) == ["1"], "it is of both"
    check_export(tmp_path, 2, float(match[1]))


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose first steps have been taken."""
    with subprocess.Popen(trilith_argv("demo", *LARGE, *arguments), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            next(line for line in process.stdout if line.startswith("step"))
            yield process
        finally:
            process.kill()


def child(process: subprocess.Popen[str], *words: str) -> psutil.Process:
    """The child whose command line has these words."""
    return next(each for each in psutil.Process(process.pid).children() if " ".join(words) in " ".join(each.cmdline()))


@pytest.mark.jobs
def test_a_ps_and_a_worker_that_are_killed_come_back_and_the_model_is_as_good(tmp_path):
    arguments = ("--model-dir", str(tmp_path), "--epochs", "6", "--save-every", "60", "--batch-size", "256")
    with running(*arguments) as process:
        eventually(lambda: [info for info in list_checkpoints(str(tmp_path)) if info.complete], timeout_s=240)
        shard, worker = child(process, "ps", "--index", "1"), child(process, "rank=1")
        shard.kill()
        worker.kill()
        text, _ = process.communicate(timeout=420)
        assert process.returncode == 0, text
    assert "worker-1 was killed by SIGKILL; starting it again" in text
    assert f"worker-0: PS 1 is back from {tmp_path}/ckpt-" in text
    assert "worker-0 was killed" not in text
    assert "worker-0 ended" not in text
    match = last_line(text)
    assert float(match[2]) > 0.6, "there is something to learn"
    # One PS lost up to 60 of 750 steps; that must not be seen in the end.
    assert float(match[1]) > float(match[2]) - 0.02


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.jobs) for mode in ("ps", "all-to-all")] + ["embedded"]
)
def test_ctrl_c_ends_the_demo_and_all_its_processes_and_what_was_learned_is_saved(tmp_path, mode):
    arguments = ("--mode", mode, "--epochs", "1000", "--no-baseline", "--model-dir", str(tmp_path))
    with running(*arguments) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == {"ps": 4, "embedded": 0, "all-to-all": 2}[mode]
        (folder,) = tmp_path.glob("runs/*")
        chief = folder / ("embedded.jsonl" if mode == "embedded" else "worker-0.jsonl")
        eventually(lambda: chief.exists() and '"event": "step"' in chief.read_text(), timeout_s=240)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 130
    assert text.splitlines()[-1] == "stopped, as asked"
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert saved_step(tmp_path) > 0


def test_a_worker_without_a_cluster_says_so_in_one_line():
    address = f"static://127.0.0.1:{free_ports(1)[0]}"
    sets = ("--set", f"cluster={address}", "--set", "timeout_s=1", "--set", "params_override.data=synthetic:100")
    assert address.removeprefix("static://") in refused("worker", "trilith_services.demo.job:ffm", *sets)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-ps", "0", "--workers", "2"), "--workers 2"),
        (("--mode", "all-to-all", "--num-ps", "2"), "--num-ps 2"),
        (("--mode", "ps", "--num-ps", "0"), "--num-ps 0"),
    ],
)
def test_modes_that_contradict_other_options_are_refused(arguments, said):
    assert said in refused("demo", *arguments)

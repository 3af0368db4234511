"""An Estimator as a process on PS of its own, killed and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilith_services.local.supervisor import free_ports

TIMEOUT_S = 300


def run(out: Path, ranks: int = 1, **settings: str) -> list[int]:
    """The job as so many processes; their exit statuses."""
    out.mkdir(exist_ok=True)
    port = free_ports(1)[0]
    started = []
    for rank in range(ranks):
        environ = os.environ | settings
        if ranks > 1:
            environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv = [sys.executable, "-m", "tests.integration.estimator_job", str(out)]
        with (out / f"rank-{rank}.log").open("ab") as log:
            started.append(subprocess.Popen(argv, env=environ, stdout=log, stderr=log))
    return [process.wait(TIMEOUT_S) for process in started]


def report(out: Path, rank: int = 0) -> dict:
    return json.loads((out / f"rank-{rank}.json").read_text())


def logs(out: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(out.glob("*.log")))


@pytest.fixture
def cluster(processes, tmp_path):
    """Makes two empty PS and says where they are; each call makes others."""
    number = 0

    def make() -> str:
        nonlocal number
        number += 1
        names = [f"ps-{number}-{index}" for index in range(2)]
        addresses = [
            processes.start(name, "ps", "--index", str(i), "--count", "2", "--checkpoint-root", str(tmp_path))
            for i, name in enumerate(names)
        ]
        processes.wait(*names)
        return f"static://{','.join(addresses)}"

    return make


@pytest.mark.parametrize("ahead", ["0", "2"])
@pytest.mark.jobs
def test_a_run_on_ps_that_is_killed_goes_on_at_its_last_checkpoint_to_the_same_bits(cluster, tmp_path, ahead):
    def settings(name: str, address: str) -> dict[str, str]:
        return {
            "TRILITH_RUN_CLUSTER": address,
            "TRILITH_RUN_MODEL_DIR": str(tmp_path / name),
            "TRILITH_RUN_SAVE_EVERY": "4",
            "TRILITH_RUN_OWNS_CLUSTER": "true",
            "TRILITH_RUN_PREFETCH": ahead,
            "TRILITH_RUN_ASYNC_PUSH": ahead,
            "TRILITH_RUN_THREADS": "1",
        }

    whole, cut = tmp_path / "whole-out", tmp_path / "cut-out"
    assert run(whole, **settings("whole", cluster())) == [0], logs(whole)
    address = cluster()
    for kill in ("5", "10", "18"):
        assert run(cut, **settings("cut", address), KILL_AT=kill) == [9], logs(cut)
    assert run(cut, **settings("cut", address)) == [0], logs(cut)
    assert report(cut) == report(whole)

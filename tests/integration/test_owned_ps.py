"""PS that are one run's own end with it, when all is trained and saved; and no other client ends any."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import trilith
from tests.congruence.clusters import LocalCluster
from tests.integration.test_ranks import TIMEOUT_S, ranks  # noqa: F401 - a fixture
from tests.unit.test_estimator import job, run_config
from tests.waiting import eventually
from trilith.checkpoint import list_checkpoints
from trilith.errors import InvalidRequestError, UnavailableError
from trilith_services.ps.process.metrics import Metrics
from trilith_services.ps.process.servicer import ParameterServerServicer
from trilith_services.ps.process.shard import LocalShard


def owned(processes, tmp_path: Path, *flags: str) -> dict[str, str]:
    """Two PS, and settings of a run whose own they are."""
    names = ["ps-0", "ps-1"]
    common = ("--count", "2", "--checkpoint-root", str(tmp_path), *flags)
    addresses = [processes.start(name, "ps", "--index", str(index), *common) for index, name in enumerate(names)]
    processes.wait(*names)
    return {
        "TRILITH_RUN_CLUSTER": f"static://{','.join(addresses)}",
        "TRILITH_RUN_MODEL_DIR": str(tmp_path / "model"),
        "TRILITH_RUN_OWNS_CLUSTER": "true",
        "TRILITH_RUN_SHUT_DOWN_PS": "true",
    }


def ended(processes) -> list[int]:
    return [process.wait(TIMEOUT_S) for process in processes.running.values()]


@pytest.mark.jobs
@pytest.mark.parametrize("apart", ["", "1"], ids=["in-step", "apart"])
def test_ps_end_with_status_0_when_all_workers_are_done(ranks, processes, tmp_path, apart):  # noqa: F811
    settings = owned(processes, tmp_path, "--owned")
    started = ranks("timed", **settings, APART=apart)
    assert started.statuses() == [0, 0], started.log(0) + started.log(1)
    assert ended(processes) == [0, 0], processes.log("ps-0")
    assert list_checkpoints(str(tmp_path / "model"))[-1].complete
    assert "the run whose own this is has ended" in processes.log("ps-0")
    assert "shut down" not in started.log(0)  # nothing to warn of


@pytest.mark.jobs
def test_ps_stay_where_a_run_is_stopped_and_end_with_the_one_that_goes_on_although_one_is_gone(
    ranks,  # noqa: F811
    processes,
    tmp_path,
):
    settings = owned(processes, tmp_path, "--owned")
    started = ranks("waits", **settings)
    eventually((tmp_path / "out" / "trains").exists, timeout_s=TIMEOUT_S)
    started.processes[1].send_signal(signal.SIGTERM)
    assert [each["told"][-1] for each in started.reports()] == ["stopped", "stopped"]
    assert [process.poll() for process in processes.running.values()] == [None, None]
    step = list_checkpoints(str(tmp_path / "model"))[-1]
    with trilith.connect(settings["TRILITH_RUN_CLUSTER"]) as client:
        assert client.global_step() > 0
        assert processes.end("ps-1") == -signal.SIGKILL
        assert client.shutdown(timeout_s=2) == [1]
    assert step.complete
    assert ended(processes) == [0]


@pytest.mark.jobs
def test_a_run_does_not_begin_on_ps_that_it_may_not_end(ranks, processes, tmp_path):  # noqa: F811
    started = ranks("train", **owned(processes, tmp_path))
    assert started.statuses() == [1, 1]
    assert (
        "PS 0, 1 let no client shut them down; start them with `trilith ps --owned`" in started.log(0).splitlines()[-1]
    )
    assert [process.poll() for process in processes.running.values()] == [None, None]


def test_a_client_ends_no_ps_that_is_not_its_own_and_none_of_several_then(processes, tmp_path):
    with LocalCluster("1-ps") as cluster, cluster.connect() as client:
        with pytest.raises(InvalidRequestError, match="PS 0 let no client shut them down"):
            client.shutdown()
        assert client.global_step() == 0
    first = processes.start("ps-0", "ps", "--index", "0", "--count", "2", "--owned")
    second = processes.start("ps-1", "ps", "--index", "1", "--count", "2")
    processes.wait("ps-0", "ps-1")
    with trilith.connect(f"static://{first},{second}") as client:
        with pytest.raises(InvalidRequestError, match="PS 1 let no client shut them down"):
            client.shutdown()
        assert [each.owned for each in client.describe()] == [True, False]
    with trilith.connect("local://") as client, pytest.raises(InvalidRequestError, match="are in this process"):
        client.shutdown()


def test_a_ps_that_restores_for_long_ends_before_it_answers_anything_else():
    told: list[str] = []
    servicer = ParameterServerServicer(LocalShard(index=0, count=1), Metrics(), shut_down=lambda: told.append("end"))
    with pytest.raises(UnavailableError):
        servicer.admit("Clear")
    servicer.admit("Shutdown")
    servicer.shutdown()
    assert told == ["end"]


def test_a_ps_that_restarts_meanwhile_ends_too(processes, tmp_path):
    address = processes.start("ps-0", "ps", "--owned")
    processes.wait("ps-0")
    with trilith.connect(f"static://{address}") as client:
        processes.end("ps-0")
        processes.start("ps-0")
        assert client.shutdown(timeout_s=120) == []
    assert ended(processes) == [0]


def test_a_run_without_ps_has_none_to_end(tmp_path):
    with job(run_config(owns_cluster=True, shut_down_ps=True, model_dir=str(tmp_path), steps=2)) as estimator:
        estimator.train()
    assert list_checkpoints(str(tmp_path))[-1].complete

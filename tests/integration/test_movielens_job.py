"""The job of docs/recipes/movielens: on PS that are found in ZooKeeper, killed and resumed, exported and served."""

from __future__ import annotations

import ast
import os
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest

import trilith
import trilith.data
from tests.programs import PATIENCE_S
from tests.quality.movielens_job import Job, made_up_archive
from trilith.serving.prediction import Predictor
from trilith_services.local.supervisor import free_ports, trilith_argv

pytestmark = [pytest.mark.timeout(900), pytest.mark.jobs]

SETTINGS = {"save_every": 6, "owns_cluster": "true", "epochs": 2, "threads": 1, "progress": "none"}


@pytest.fixture
def cluster(processes, zk_url, tmp_path):
    """Starts two empty PS below a path of their own in ZooKeeper, and says where."""

    def start(name: str) -> str:
        url = zk_url.replace("?", f"/{name}?")
        names = [f"{name}-{index}" for index in range(2)]
        for index, each in enumerate(names):
            shard = ("--index", str(index), "--count", "2", "--discovery", url)
            processes.start(each, "ps", *shard, "--checkpoint-root", str(tmp_path))
        processes.wait(*names)
        return url

    return start


@pytest.mark.slow
def test_a_job_that_is_killed_anywhere_learns_the_same_bits_and_what_is_served_scores_as_the_trainer_does(
    cluster, processes, tmp_path
):
    job = Job(tmp_path / "job", made_up_archive(tmp_path / "ml-100k.zip"))
    whole = {**SETTINGS, "cluster": cluster("whole"), "model_dir": "whole"}
    cut = {**SETTINGS, "cluster": cluster("cut"), "model_dir": "cut"}
    evaluated = ast.literal_eval(job.by_itself(**whole).splitlines()[-1])
    assert sorted(evaluated) == ["buy/auc", "buy/logloss", "click/auc", "click/logloss", "loss"]
    job.kill_at(9, "cut.jsonl", **cut)
    job.kill_in_a_save("cut.jsonl", **cut)
    job.kill_at(20, "cut.jsonl", **cut)
    job.train("cut.jsonl", **cut)
    assert job.learned("cut", cut["cluster"]) == job.learned("whole", whole["cluster"])
    assert sum(event["event"] == "restored" for event in job.events("cut.jsonl")) >= 2

    job.trilith("predict", "ctr:job", "--data", "data/test.parquet", "--output", "scores.parquet", **cut)
    job.trilith("export", "ctr:job", "exports-of-cut", "--mode", "standalone", **cut)
    wants = pq.read_table(job.directory / "scores.parquet")
    samples = job.directory / "data" / "test.parquet"
    assert any(not seen for seen in pq.read_table(samples)["seen"].to_pylist())
    exports = str(job.directory / "exports-of-cut")
    address = processes.start("entry", "serving", "entry", "--export", exports, "--http", "")
    processes.wait("entry")
    with Predictor(address, timeout_s=PATIENCE_S) as predictor:
        found = predictor.predict(next(iter(trilith.data.read(samples).batch(len(wants)))))
    assert sorted(found.outputs) == ["buy", "click"]
    for name, scores in found.outputs.items():
        np.testing.assert_allclose(scores, wants[name].to_numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_torchrun_and_workers_of_trilith_are_two_ranks_of_the_same_job(cluster, tmp_path):
    job = Job(tmp_path / "job", made_up_archive(tmp_path / "ml-100k.zip"))
    environ = {"cluster": cluster("ranks"), "model_dir": "model", "progress": "none", "epochs": 1}
    environ = {f"TRILITH_RUN_{name.upper()}": str(value) for name, value in environ.items()}
    printed = job.python("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ctr", **environ)
    assert printed.count("'click/auc'") == 2  # the same on both: metrics are merged

    ranks = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    with (job.directory / "worker.log").open("ab") as log:
        workers = [
            subprocess.Popen(
                trilith_argv("worker", "ctr:job", "--set", "epochs=2"),
                cwd=job.directory,
                env=os.environ | environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(2)
        ]
    assert [worker.wait(PATIENCE_S) for worker in workers] == [0, 0], job.log()
    with trilith.connect(environ["TRILITH_RUN_CLUSTER"], timeout_s=PATIENCE_S) as client:
        assert client.global_step() == 2 * 7  # 6,400 samples by 512, on two ranks, twice

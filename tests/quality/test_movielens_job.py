"""The job of docs/recipes/movielens on MovieLens itself: what it learns, and that ten kills change no bit of that."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from tests.programs import Processes
from tests.quality.movielens_job import Job
from tests.quality.test_models import require_movielens
from trilith_services.demo import movielens

pytestmark = pytest.mark.timeout(1800)

SETTINGS = {"save_every": 30, "owns_cluster": "true", "threads": 1, "progress": "none"}
EPOCHS, STEPS = 3, 471
KILLS = 9


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.close()


def test_a_job_that_is_killed_ten_times_learns_what_one_that_was_not_does(processes, tmp_path):
    require_movielens()
    job = Job(tmp_path / "job", movielens.fetch())

    def cluster(name: str) -> str:
        names = [f"{name}-{index}" for index in range(2)]
        shard = ("--count", "2", "--checkpoint-root", str(tmp_path))
        found = [processes.start(each, "ps", "--index", str(index), *shard) for index, each in enumerate(names)]
        processes.wait(*names)
        return f"static://{','.join(found)}"

    whole = {**SETTINGS, "epochs": EPOCHS, "cluster": cluster("whole"), "model_dir": "whole"}
    cut = {**SETTINGS, "epochs": EPOCHS, "cluster": cluster("cut"), "model_dir": "cut"}
    found = ast.literal_eval(job.by_itself(**whole).splitlines()[-1])
    assert found["click/auc"] > 0.67, found
    assert found["buy/auc"] > 0.68, found

    kills = np.sort(np.random.default_rng().choice(np.arange(31, STEPS - 30), KILLS, replace=False)).tolist()
    print(f"killed at {kills}, and in a save behind {kills[KILLS // 2]}")
    for number, step in enumerate(kills):
        job.kill_at(step, "cut.jsonl", **cut)
        if number == KILLS // 2:
            job.kill_in_a_save("cut.jsonl", **cut)
    job.train("cut.jsonl", **cut)
    assert job.learned("cut", cut["cluster"]) == job.learned("whole", whole["cluster"])

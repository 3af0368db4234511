"""One training process of the train benchmarks: a worker of a cluster, or the whole model in this process.

Run as `python -m tests.bench.trainee`. It says {"event": "ready"} when it could train, then trains for as long as each
line of its input says, `SECONDS THREADS`, and reports the samples. A worker is an Estimator; the local side takes the
same steps on the same batches, with `torch.nn.EmbeddingBag` and torch's Adagrad.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from typing import Protocol

from tests.bench.processes import EXPERIMENTS

os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)

import numpy as np
import torch

from tests.bench.draws import Zipf
from tests.bench.estimator_trainee import ByEstimator
from trilith.data.fids import make_fid_v2
from trilith.estimator import Task
from trilith.nn import DeepFM
from trilith.ops.ragged import Ragged
from trilith_services.demo.baseline import LocalTrainer
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.job import DENSE, ClickTask
from trilith_services.demo.local import LocalEmbeddings, initial_rows

_HIDDEN = (256, 128)
_EXPONENT = 1.05


class _Side(Protocol):
    def train(self, seconds: float) -> int:
        """Take steps for so long; returns how many samples."""


class _Local:
    """The model in one process."""

    def __init__(self, task: Task, data: ClickData, batch: int) -> None:
        task.prepare(0)
        vocabulary = data.vocabulary()
        embeddings = LocalEmbeddings(vocabulary, initial_rows(task, vocabulary), sparse=True)
        self._trainer = LocalTrainer(task, embeddings)
        self._batches = itertools.cycle(list(embeddings.encode(data).batches(batch)))

    def train(self, seconds: float) -> int:
        end, before = time.perf_counter() + seconds, self._trainer.progress.samples
        while time.perf_counter() < end:
            self._trainer.step(next(self._batches))
        return self._trainer.progress.samples - before


def task_of(features: int, dim: int) -> Task:
    """The demo's DeepFM over so many features."""

    class Clicks(ClickTask):
        def build(self) -> None:
            self.head = DeepFM(features, dim, hidden=_HIDDEN)

    first = replace(ClickTask.user, dim=dim)
    columns = {f"f{index}": first.view() if index else first for index in range(features)}
    return type("Clicks", (Clicks,), {**dict.fromkeys(ClickTask().features), **columns})(dense_optimizer=DENSE)


def make_data(features: int, rows: int, samples: int) -> ClickData:
    """Samples with one Zipf id per feature, out of `rows` per feature, and labels that mean nothing."""
    rng = np.random.default_rng(0)
    columns = {}
    for index in range(features):
        ids = Zipf(rows, _EXPONENT, seed=index).draw(samples)
        columns[f"f{index}"] = Ragged.of_singles(make_fid_v2(index + 1, ids))
    return ClickData((rng.random(samples) < 0.25).astype(np.float32), columns)


def main() -> int:
    """Train as told until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster", default="", help="address; none trains in this process alone")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    for name in ("prefetch", "async-push"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("features", "rows", "batch", "batches", "dim"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(arguments.features, arguments.dim)
    data = make_data(arguments.features, arguments.rows, arguments.batches * arguments.batch)
    side: _Side
    if arguments.cluster:
        share = data.take(np.arange(arguments.rank, len(data), arguments.world_size))
        names = ("cluster", "rank", "world_size", "prefetch", "async_push")
        run = {name: getattr(arguments, name) for name in names}
        side = ByEstimator(task, list(share.columns(arguments.batch)), **run)
    else:
        side = _Local(task, data, arguments.batch)
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        seconds, threads = line.split()
        torch.set_num_threads(int(threads))
        started = time.perf_counter()
        samples = side.train(float(seconds))
        passed = time.perf_counter() - started
        print(json.dumps({"event": "trained", "samples": samples, "seconds": passed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A small trained job, what it scores, and load on those who serve it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trilith
from tests.programs import PATIENCE_S
from tests.waiting import eventually
from trilith.data.records import Records
from trilith.estimator import Estimator, RunConfig
from trilith.estimator.exporting import TaskExporter
from trilith.estimator.state import read_job
from trilith.serving.prediction import Prediction, Predictor
from trilith_services.demo.click_files import click_records
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.job import DENSE, TABLE, DeepFmTask, torch_adagrad
from trilith_services.demo.synthetic import make_clicks

PACE_S = 0.005  # without it, processes that start beside the load would be starved by it


@dataclass
class Trained:
    """The demo's DeepFM, smaller, with its dense part in this process."""

    job: Estimator
    data: ClickData

    @property
    def client(self) -> trilith.Client:
        return self.job.client

    def save(self) -> str:
        return self.job.save()

    def shift(self, by: float) -> None:
        """Another model: its bias is another."""
        with torch.no_grad():
            self.job.task.head.bias += by

    def scores(self) -> np.ndarray:
        return next(self.job.predict(self.data.columns(len(self.data))))["click"]

    @property
    def records(self) -> Records:
        return click_records(self.data)

    def exporter(self, name: str = "deepfm") -> TaskExporter:
        """What `Estimator.export` writes with; here with a say in what a test wants to decide."""
        return TaskExporter(name, self.job.task, self.job.rows, read_job)


@contextmanager
def train(cluster: str, directory: Path, samples: int = 64) -> Iterator[Trained]:
    """Rows and weights that are not zero, as training would leave them."""
    data = make_clicks(samples)
    task = DeepFmTask(dense_optimizer=torch_adagrad(DENSE), hidden=(8,), **{"user.dim": 4})
    # Whoever looks for what is trained finds the rows as they are, not those of a checkpoint.
    run = RunConfig(cluster=cluster, model_dir=str(directory), resume="never", timeout_s=PATIENCE_S, threads=1)
    with Estimator(task, run) as job:
        ids = np.unique(np.concatenate([ids.values for ids in data.features.values()]))
        rows = np.random.default_rng(0).normal(0, 0.3, (ids.size, task.user.row_dim)).astype(np.float32)
        job.client.assign({TABLE: (ids, rows)})
        yield Trained(job, data)


class Load:
    """Threads that ask for scores again and again, and keep what they were told."""

    def __init__(self, address: str, records: list[bytes], *, name: str = "model", threads: int = 2) -> None:
        self.answers: list[Prediction] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self.predictor = Predictor(address, name=name, timeout_s=10.0)
        self._threads = [threading.Thread(target=self._run, args=(records,)) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.predictor.close()

    def _run(self, records: list[bytes]) -> None:
        while not self._stop.wait(PACE_S):
            try:
                self.answers.append(self.predictor.predict(records))
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.errors.append(error)
                return

    def more(self, count: int = 30) -> None:
        """Wait until so many more requests were answered."""
        before = len(self.answers)
        eventually(lambda: self.errors or len(self.answers) >= before + count, timeout_s=PATIENCE_S)

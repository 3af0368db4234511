"""A small trained model as a checkpoint, what it scores, and load on those who serve it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trilith
from tests.programs import PATIENCE_S
from tests.waiting import eventually
from trilith.data.records import Records
from trilith.nn import DenseOnPs
from trilith.serving.prediction import Prediction, Predictor
from trilith_services.demo.click_files import click_records
from trilith_services.demo.click_model import ClickModel
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.exporting import reference_exporter
from trilith_services.demo.models import TABLE, ModelSettings
from trilith_services.demo.synthetic import make_clicks
from trilith_services.exporting import Exporter
from trilith_services.worker.trainer import save_checkpoint

PACE_S = 0.005  # without it, processes that start beside the load would be starved by it
SETTINGS = ModelSettings(name="deepfm", dim=4, hidden=(8,), epochs=1)


@dataclass
class Trained:
    """A model on an embedded cluster."""

    client: trilith.Client
    model: ClickModel
    data: ClickData
    directory: Path

    def save(self) -> str:
        return save_checkpoint(self.client, str(self.directory))[0]

    def shift(self, by: float) -> None:
        """Another model: its bias is another."""
        bias = self.client.pull_variables(["dense/bias"])[0]["dense/bias"]
        self.client.assign_variables({"dense/bias": bias + by})
        with torch.no_grad():
            self.model.head.bias += by

    def scores(self) -> np.ndarray:
        return self.model.predict(self.data)

    @property
    def records(self) -> Records:
        return click_records(self.data)

    def exporter(self) -> Exporter:
        return reference_exporter(SETTINGS, self.data.features)


def train(client: trilith.Client, directory: Path, samples: int = 64) -> Trained:
    """Rows and weights that are not zero, as training would leave them."""
    data = make_clicks(samples)
    model = SETTINGS.on_cluster(client, data.features, seed=0)
    DenseOnPs(client, model.head, SETTINGS.dense_optimizer())
    ids = np.unique(np.concatenate([ids.values for ids in data.features.values()]))
    rows = np.random.default_rng(0).normal(0, 0.3, (ids.size, model.head.row_dim)).astype(np.float32)
    client.assign({TABLE: (ids, rows)})
    return Trained(client, model, data, directory)


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

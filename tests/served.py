"""A small trained model as a checkpoint, and what it scores: what tests of exports and serving begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trilith
from trilith.data.click_files import click_records
from trilith.data.clicks import ClickData
from trilith.data.records import Records
from trilith.data.synthetic import make_clicks
from trilith.nn import ClickModel, DenseOnPs
from trilith_services.exporting import Exporter, reference_exporter
from trilith_services.worker.models import TABLE, ModelSettings
from trilith_services.worker.trainer import save_checkpoint

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
    ids = np.unique(np.concatenate([each.values for each in data.features.values()]))
    rows = np.random.default_rng(0).normal(0, 0.3, (ids.size, model.head.row_dim)).astype(np.float32)
    client.assign({TABLE: (ids, rows)})
    return Trained(client, model, data, directory)

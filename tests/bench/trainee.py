"""One training process of the train benchmarks: a worker of a cluster, or the whole model in this process.

Run as `python -m tests.bench.trainee`. It says {"event": "ready"} when it could train, then trains for as long as each
line of its input says, `SECONDS THREADS`, and reports the samples. A worker is `Trainer`, as `trilith worker` runs it;
the local side takes the same steps on the same batches, with `torch.nn.EmbeddingBag` and torch's Adagrad.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tests.bench.processes import EXPERIMENTS

os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)

import numpy as np
import torch
from torch.nn import functional

import trilith
from tests.bench.draws import Zipf
from trilith.data.fids import make_fid_v2
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData, Parts
from trilith_services.demo.local import LocalEmbeddings
from trilith_services.demo.models import ModelSettings, settings_of
from trilith_services.demo.task import click_task
from trilith_services.worker.config import WorkerConfig
from trilith_services.worker.meter import Meter
from trilith_services.worker.trainer import Trainer

_HIDDEN = (256, 128)
_EXPONENT = 1.05
_ENDLESS = 1 << 30


class _Side(Protocol):
    @property
    def samples(self) -> int:
        """Samples trained so far."""

    def train(self, stop: Callable[[], bool]) -> None:
        """Take steps until `stop` says so."""


class _Worker:
    """A worker of a cluster."""

    def __init__(self, arguments: argparse.Namespace, settings: ModelSettings, data: ClickData) -> None:
        rest = data.take(np.arange(10))
        config = WorkerConfig(
            rank=arguments.rank,
            world_size=arguments.world_size,
            batch_size=arguments.batch,
            epochs=_ENDLESS,
            validate=False,
            device="cpu",
            prefetch=arguments.prefetch,
            async_push=arguments.async_push,
        )
        client = trilith.connect(arguments.cluster, timeout_s=120.0)
        self.samples = 0
        self._trainer = Trainer(config, client, click_task(settings, Parts(data, rest, rest)), self._listen)

    def train(self, stop: Callable[[], bool]) -> None:
        self._trainer.run(stop)

    def _listen(self, event: dict[str, Any]) -> None:
        if event["event"] == "stopped":
            self.samples = int(event["samples"])


class _Local:
    """The same model in one process."""

    def __init__(self, arguments: argparse.Namespace, settings: ModelSettings, data: ClickData) -> None:
        self._model = settings.locally(data.vocabulary(), seed=0, sparse=True)
        embeddings = self._model.embeddings
        assert isinstance(embeddings, LocalEmbeddings)
        self._optimizers = [
            settings.torch_optimizer(embeddings.parameters(), dense=False),
            settings.torch_optimizer(self._model.head.parameters(), dense=True),
        ]
        self._meter = Meter()
        self._batches = _forever(embeddings.encode(data), arguments.batch)

    @property
    def samples(self) -> int:
        return self._meter.samples

    def train(self, stop: Callable[[], bool]) -> None:
        while not stop():
            batch = next(self._batches)
            logits = self._model(batch.features)
            loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels))
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
            self._meter.add(batch.labels, logits.detach().numpy(), loss.item())
            if self._meter.due():
                self._meter.report()


def _forever(data: ClickData, batch: int) -> Iterator[ClickData]:
    epoch = 0
    while True:
        order = np.random.default_rng([0, epoch, 0]).permutation(len(data))
        yield from data.batches(batch, order=order)
        epoch += 1


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
    settings = settings_of("deepfm", dim=arguments.dim, hidden=_HIDDEN)
    data = make_data(arguments.features, arguments.rows, arguments.batches * arguments.batch)
    side: _Side = (_Worker if arguments.cluster else _Local)(arguments, settings, data)
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        seconds, threads = line.split()
        torch.set_num_threads(int(threads))
        before, started = side.samples, time.perf_counter()
        end = started + float(seconds)
        side.train(lambda end=end: time.perf_counter() >= end)  # type: ignore[misc]
        passed = time.perf_counter() - started
        print(json.dumps({"event": "trained", "samples": side.samples - before, "seconds": passed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A job of several workers: `python -m tests.integration.ranks_job SCENARIO DIR`, by the environment one of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import nn

import trilith.data
from trilith.data import Kind, Records
from trilith.data.formats.writers import open_writer
from trilith.estimator import (
    Callback,
    Dense,
    Embedding,
    Estimator,
    Label,
    RunConfig,
    Stop,
    Task,
    WorkerIdentity,
    metrics,
)
from trilith.tables import Adam, Sgd, Zeros
from trilith_proto.example_pb2 import Example

BATCH, STEPS = 8, 6
IDS = 30


class Job(Task):
    user = Embedding(dim=4, bias=True, optimizer=Sgd(learning_rate=0.5), initializer=Zeros())
    context = Dense(2)
    labels: ClassVar = {"click": Label()}
    metrics: ClassVar = {"auc": metrics.Auc(), "logloss": metrics.LogLoss()}

    def build(self) -> None:
        self.deep = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.deep(torch.cat([x.user.vector, x.context], 1))[:, 0] + x.user.bias


def whole(seed: int = 5, steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    """Batches of all workers together: 2 * BATCH samples each."""
    rng = np.random.default_rng(seed)
    return [
        {
            "user": rng.integers(0, IDS, 2 * BATCH),
            "context": rng.normal(size=(2 * BATCH, 2)).astype(np.float32),
            "click": rng.integers(0, 2, 2 * BATCH).astype(np.float32),
        }
        for _ in range(steps)
    ]


def own(seed: int = 5, steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    """This worker's half of each, all of it where it is alone."""
    me = WorkerIdentity.find()
    return [
        {name: value[me.rank * BATCH :][:BATCH] if me.world_size == 2 else value for name, value in batch.items()}
        for batch in whole(seed, steps)
    ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.5)


def job(
    *callbacks: Callback, train: Any = own, evaluate: Any = None, task: Task | None = None, **run: Any
) -> Estimator:
    run = {"progress": "none", "threads": 1, "device": "cpu"} | run
    return Estimator(
        task or Job(dense_optimizer=sgd), RunConfig(**run).overridden(), train=train, evaluate=evaluate,
        callbacks=callbacks,
    )  # fmt: skip


def state(estimator: Estimator) -> dict[str, Any]:
    return {
        "step": estimator.step_count,
        "counted": estimator.client.global_step(),
        "rows": estimator.client.table("user").lookup(np.arange(IDS)).tolist(),
        "dense": {name: each.tolist() for name, each in estimator.task.state_dict().items()},
    }


class Told(Callback):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.reason = ""

    def on(self, event):
        self.names.append(event.name)
        if event.name == "stopped":
            self.reason = event.reason


class At(Callback):
    """Does something in one rank after a step."""

    def __init__(self, rank: int, step: int, what: Any) -> None:
        self._rank, self._step, self._what = rank, step, what

    def on_step(self, event):
        if event.own_step == self._step and WorkerIdentity.find().rank == self._rank:
            return self._what()
        return None


def of_worker() -> Estimator:
    """A job for `trilith worker`."""
    return job(evaluate=own)


# ---- scenarios: each gives what a rank reports ---------------------------------------------------------------------


def train(**run: Any) -> dict[str, Any]:
    """As the environment says."""
    told = Told()
    with job(told, **run) as estimator:
        estimator.train()
        return state(estimator) | {"told": told.names}


class Renamed(Job):
    """The same layers, called otherwise: as the environment says."""

    def build(self) -> None:
        super().build()
        layers = self.deep
        del self.deep
        setattr(self, os.environ["TOWER"], layers)

    def forward(self, x):
        return getattr(self, os.environ["TOWER"])(torch.cat([x.user.vector, x.context], 1))[:, 0] + x.user.bias


def renamed() -> dict[str, Any]:
    """A model of other names, with an optimizer that has a state of each parameter."""
    on_ps = os.environ["TRILITH_RUN_DENSE"] == "ps"
    optimizer = Adam(learning_rate=0.1) if on_ps else lambda each: torch.optim.SGD(each, 0.1, momentum=0.9)
    with job(task=Renamed(dense_optimizer=optimizer)) as estimator:
        estimator.train()
        return state(estimator)


def uneven() -> dict[str, Any]:
    """Rank 0 has six batches, rank 1 two, in training and in evaluation; two epochs."""
    rank = WorkerIdentity.find().rank
    told = Told()

    def mine(seed: int) -> list[dict[str, np.ndarray]]:
        return own(seed)[: 2 if rank else STEPS]

    with job(
        told, train=lambda: mine(5), evaluate=lambda: mine(6), epochs=2, prefetch=int(os.environ["AHEAD"])
    ) as found:
        result = found.train()
        return state(found) | {"told": told.names, "metrics": result}


def records(count: int) -> list[bytes]:
    """Examples, of which the first of `context` says which one it is."""
    made = []
    for number in range(count):
        example = Example(label=[number % 2])
        example.named_feature.add(name="user").feature.fid_v2_list.value.append(number % IDS)
        example.named_feature.add(name="context").feature.float_list.value.extend([number, 0.0])
        made.append(example.SerializeToString())
    return made


def shared() -> dict[str, Any]:
    """Datasets that nobody has parsed are shared by the ranks; what each has seen."""
    seen: dict[str, list[float]] = {"held": [], "file": [], "own": [], "arrow": []}

    class Keeps(Job):
        name = ""

        def forward(self, x):
            if self.training:
                seen[self.name] += x.context[:, 0].tolist()
            return super().forward(x)

    rank = WorkerIdentity.find().rank
    path = Path(sys.argv[2], f"records-{rank}.tfrecord")
    with open_writer(str(path)) as writer:
        writer.write(Records.of(records(27), Kind.EXAMPLE))
    read = trilith.data.read(str(path), kind="example")
    numbers = np.arange(27)
    context = [[float(number), 0.0] for number in numbers]
    columns = {"user": numbers % IDS, "context": context, "click": (numbers % 2).astype(np.float32)}
    data = {
        "held": trilith.data.from_records(records(27), "example").batch(4),
        "file": read.batch(4),
        "own": read.shard(rank, 2, by="records").batch(4),
        "arrow": trilith.data.from_arrow(pa.table(columns)).batch(4),
    }
    task = Keeps(dense_optimizer=sgd)
    with job(task=task) as found:
        for task.name, each in data.items():
            found.train(each)
        return {"seen": seen, "step": found.step_count, "metrics": found.evaluate(data["file"])}


def not_finite() -> dict[str, Any]:
    """A gradient of rank 1's rows is infinite at step 3: no rank takes that step."""
    rank = WorkerIdentity.find().rank

    class Bad(Job):
        steps = 0

        def forward(self, x):
            self.steps += self.training
            found = super().forward(x)
            if self.training and self.steps == 3 and rank == 1:
                x.user.bias.register_hook(lambda grad: grad * float("inf"))
            return found

    precision = os.environ["PRECISION"]
    with job(task=Bad(dense_optimizer=sgd), skip_non_finite=precision == "fp32", precision=precision) as found:
        found.train()
        return state(found) | {"skipped": found.optimization.skipped, "scale": found.scaler.get_scale()}


def stops() -> dict[str, Any]:
    """A callback of rank 1 stops all after its third step."""
    told = Told()
    with job(told, At(1, 3, lambda: Stop("enough of it"))) as found:
        found.train()
        return state(found) | {"told": told.names, "reason": told.reason}


def terminated() -> dict[str, Any]:
    """SIGTERM comes to rank 1 in its third step."""
    told = Told()
    kill = At(1, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with job(told, kill) as found:
        found.train()
        return state(found) | {"told": told.names, "reason": told.reason}


def raises() -> dict[str, Any]:
    """A rank fails in its third step: 1, or what FAILS says."""

    def fail() -> None:
        raise KeyError("a fault of the user's")

    with job(At(int(os.environ.get("FAILS", "1")), 3, fail)) as found:
        found.train()
    return {}


def killed() -> dict[str, Any]:
    """A rank is killed in its third step: 1, or what FAILS says."""
    with job(At(int(os.environ.get("FAILS", "1")), 3, lambda: os._exit(9))) as found:
        found.train()
    return {}


def waits() -> dict[str, Any]:
    """Trains for long; a file says that it does."""
    out = Path(sys.argv[2])

    def forever() -> Iterator[dict[str, np.ndarray]]:
        while not (out / "enough").exists() or WorkerIdentity.find().rank:
            yield from own()

    def say() -> None:
        (out / "trains").touch()

    told = Told()
    with job(told, At(0, 4, say), train=forever, steps=int(os.environ.get("STEPS", "0"))) as found:
        found.train()
        return state(found) | {"told": told.names}


def saves_fail() -> dict[str, Any]:
    """Rank 1 cannot write its part of a checkpoint: the save fails for all, and training goes on."""
    import trilith.estimator.saving as saving

    real = saving.write_rank

    def write(path: str, rank: int, *rest: Any) -> None:
        if rank == 1 and not told.names.count("save_failed"):
            raise OSError("the disk of rank 1 is full")
        real(path, rank, *rest)

    saving.write_rank = write
    told = Told()
    with job(told) as found:
        found.train()
        return state(found) | {"told": told.names}


def exports() -> dict[str, Any]:
    """Trained, saved and exported by all ranks."""
    with job(evaluate=own) as found:
        result = found.train()
        path = found.export(str(Path(sys.argv[2], "exports")))
        return state(found) | {"metrics": result, "again": found.evaluate(), "export": path}


def scores() -> dict[str, Any]:
    """One process evaluates and predicts with what two have saved."""
    with job(evaluate=own) as found:
        result = found.evaluate()
        predicted = [each["click"].tolist() for each in found.predict(own())]
        return state(found) | {"metrics": result, "predicted": predicted}


def hold() -> None:
    """Wait until a file comes."""
    out = Path(sys.argv[2])
    (out / "held").touch()
    while not (out / "free").exists():
        time.sleep(0.05)


def apart() -> dict[str, Any]:
    """Dense parameters are on the PS, and nobody waits; samples that were seen, in their order.

    Of a rank that STUCK names, the fourth batch takes until a file comes; one that LATE names begins then.
    """
    if os.environ.get("LATE") == os.environ.get("RANK", "0"):
        hold()
    seen: list[float] = []

    class Keeps(Job):
        def forward(self, x):
            if self.training:
                seen.extend(x.context[:, 0].tolist())
            return super().forward(x)

    class Counted(Told):
        """Keeps in checkpoints how many steps it has seen."""

        def state_dict(self):
            return {"steps": self.before + self.names.count("step")}

        def load_state_dict(self, saved):
            self.before = saved["steps"]

        before = 0

    told = Counted()
    calls = [At(int(os.environ["STUCK"]), 4, hold)] if "STUCK" in os.environ else []
    stop = [At(0, int(os.environ["STOP"]), lambda: Stop("enough of it"))] if "STOP" in os.environ else []
    read = trilith.data.from_records(records(80), "example")
    data = {"train": read.batch(4), "evaluate": trilith.data.from_records(records(20), "example").batch(8)}
    task = Keeps(dense_optimizer=Sgd(learning_rate=0.05))
    with job(told, *calls, *stop, task=task, **data) as found:
        metrics = found.train()
        return state(found) | {"told": told.names, "seen": seen, "metrics": metrics, "reason": told.reason}


BEGAN, STEP_S = 1_600_000_200, 900


def timed() -> dict[str, Any]:
    """A batch is of fifteen minutes; rank 1 is an hour ahead, of other rows, and has half as many batches."""
    rank = WorkerIdentity.find().rank

    class Timed(Job):
        user = Embedding(dim=2, optimizer=Sgd(learning_rate=0.5), initializer=Zeros(), ttl_days=1)
        request_time = "when"

        def build(self) -> None:
            self.deep = nn.Linear(4, 1)

        def forward(self, x):
            return self.deep(torch.cat([x.user.vector, x.context], 1))[:, 0]

    def mine() -> list[dict[str, Any]]:
        return [
            {
                "user": np.array([100 * rank + number]),
                "context": np.ones((1, 2), np.float32),
                "click": [1.0],
                "when": [BEGAN + number * STEP_S + rank * 4 * STEP_S],
            }
            for number in range(5 if rank else 10)
        ]

    at: list[Any] = []

    class Saves(Callback):
        def on_saved(self, event):
            at.append((event.step, event.event_time))

    dense = Sgd(learning_rate=0.05) if os.environ.get("APART") else sgd
    with job(Saves(), task=Timed(dense_optimizer=dense), train=mine) as found:
        found.train()
    return {"saved": at}


SCENARIOS = {each.__name__: each for each in (
    train, uneven, shared, not_finite, stops, terminated, raises, killed, waits, saves_fail, exports, scores, apart,
    timed, renamed,
)}  # fmt: skip


def main(name: str, out: str) -> None:
    found = SCENARIOS[name]()
    rank = WorkerIdentity.find().rank
    Path(out, f"{name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

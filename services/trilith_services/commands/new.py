"""`trilith new`: a job to begin with, with data, a run and a test, that works as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilith.errors import InvalidRequestError

__all__ = ["register"]

_JOB = '''"""Who clicks on what: a model, its data and its run."""

from pathlib import Path

import torch
from torch import nn

import trilith.data
from trilith.estimator import Dense, Embedding, Estimator, Label, RunConfig, Task, metrics
from trilith.tables import Adagrad

HERE = Path(__file__).parent


class Clicks(Task):
    user = Embedding(dim=8, optimizer=Adagrad(learning_rate=0.2), bias=True)
    item = Embedding(dim=8, optimizer=Adagrad(learning_rate=0.2), bias=True)
    context = Dense(2)
    labels = {"click": Label()}
    metrics = {"auc": metrics.Auc(), "logloss": metrics.LogLoss()}

    def build(self):
        self.trunk = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        deep = self.trunk(torch.cat([x.user.vector, x.item.vector, x.context], 1))[:, 0]
        return {"click": deep + x.user.bias + x.item.bias}


job = Estimator(
    Clicks(dense_optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2)),
    RunConfig().overridden(file=HERE / "run.toml"),
    train=lambda: trilith.data.read(HERE / "train.parquet").shuffle(4_000).batch(64),
    evaluate=lambda: trilith.data.read(HERE / "valid.parquet").batch(512),
)

if __name__ == "__main__":
    with job:
        job.train()  # goes on at the newest checkpoint of model_dir
        print(job.evaluate())
'''

_RUN = """# Fields of trilith.estimator.RunConfig; `--set name=value` of the commands goes over them.
model_dir = "model"
epochs = 3
save_every = 50
# cluster = "zk://host:2181/clicks"    # rows on PS; without it in this process
"""

_TEST = '''"""The job learns what is in its data."""

from job import job


def test_clicks_are_learned(tmp_path):
    job.configure(job.run.overridden(sets=[f"model_dir={tmp_path}", "cluster=local://"]))
    with job:
        found = job.train()
        scores = next(job.predict(job_batch()))["click"]
    assert found["click/auc"] > 0.7
    assert scores.shape == (2,)


def job_batch():
    """Samples of one's own need no file: a batch is a mapping."""
    return [{"user": [1, 2], "item": [3, 4], "context": [[0.0, 1.0], [1.0, 0.0]]}]
'''

_NEXT = """
Next:
  cd {directory}
  python job.py                                      # train and evaluate; again: it goes on where it was
  pytest                                             # see that it learns
  trilith worker job:job --set epochs=10             # the same by the command, SIGTERM saves and ends it
  trilith up --job job:job --ps 2 --workers 2        # the same by two workers with rows on PS; what dies comes back
  trilith evaluate job:job
  trilith predict job:job --data valid.parquet --output scores.parquet
  trilith export job:job exports --mode standalone   # for trilith serving entry --export exports

Put your features into Clicks, your files into train= and evaluate=; columns are found by the attributes' names."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(new)


def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that is empty or is not there yet.")],
) -> None:
    """Write a job to begin with: a model in job.py, made-up data in Parquet files, its run in run.toml, and a test."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "is not empty" if directory.is_dir() else "is a file"
        raise InvalidRequestError(f"{directory} {what}; a job is written into a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("job.py", _JOB), ("run.toml", _RUN), ("test_job.py", _TEST)):
        (directory / name).write_text(text, encoding="utf-8")
    _write_clicks(directory / "train.parquet", 2_000, seed=1)
    _write_clicks(directory / "valid.parquet", 1_000, seed=2)
    typer.echo(f"{directory}: job.py, run.toml, test_job.py, train.parquet, valid.parquet")
    typer.echo(_NEXT.format(directory=directory))


def _write_clicks(path: Path, samples: int, *, seed: int) -> None:
    """Made-up clicks: some users click more, some items are clicked more, and so it is in some contexts."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    tastes = np.random.default_rng(0)
    users, items = tastes.normal(size=50), tastes.normal(size=40)
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, len(users), samples), rng.integers(0, len(items), samples)
    context = rng.random((samples, 2), dtype=np.float32)
    liking = users[user] + items[item] + context @ [1.0, -1.0]
    click = (liking + rng.logistic(scale=0.5, size=samples) > 0).astype(np.float32)
    columns = {"user": user, "item": item, "context": list(context), "click": click}
    pq.write_table(pa.table(columns), path)

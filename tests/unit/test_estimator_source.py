"""Data of every kind trains an Estimator, and a run that was killed goes on in it with the same bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchData

from tests.absent import optional
from trilith.data import from_arrow, from_json, hash_strings, to_json
from trilith.data.pipeline.positions import pack_state, unpack_state
from trilith.errors import InvalidRequestError
from trilith.estimator import Callback, Dense, Embedding, Estimator, Label, RunConfig, Task
from trilith.tables import Adagrad

SAMPLES, BATCH = 54, 9


class Tags(Task):
    user = Embedding(dim=2, optimizer=Adagrad(learning_rate=0.2))
    tag = Embedding(dim=2, pooling="sum", optimizer=Adagrad(learning_rate=0.2))
    price = Dense(1)
    labels: ClassVar = {"click": Label(), "buy": Label()}

    def build(self) -> None:
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.2), nn.Linear(4, 2))

    def forward(self, x):
        found = self.head(torch.cat([x.user.vector, x.tag.vector, x.price], 1))
        return {"click": found[:, 0], "buy": found[:, 1]}


def table() -> pa.Table:
    rng = np.random.default_rng(0)
    users = [None if n % 17 == 0 else f"u{n}" for n in rng.integers(0, 30, SAMPLES).tolist()]
    tags = [rng.integers(0, 20, size).tolist() for size in rng.integers(0, 4, SAMPLES)]
    click = rng.integers(0, 2, SAMPLES).tolist()
    return pa.table(
        {
            "user": pa.array(users, pa.string()),
            "tag": pa.array([None if n % 11 == 3 else each for n, each in enumerate(tags)], pa.list_(pa.int64())),
            "price": pa.array(rng.random(SAMPLES), pa.float64()),
            "click": pa.array(click, pa.int8()),
            "buy": pa.array([None if n % 3 else bool(each) for n, each in enumerate(click)], pa.bool_()),
            "more": pa.array(["passes"] * SAMPLES),
        }
    )


class Samples(TorchData):
    """The same, sample by sample, as torch's map-style datasets are."""

    def __init__(self) -> None:
        self.columns = table().to_pydict()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [each[name] for each in samples] for name in samples[0]}


class Stateful:
    """What torchdata's StatefulDataLoader has: batches in an order drawn anew in each pass, and where it is."""

    def __init__(self) -> None:
        self._numbers = np.random.default_rng(5)
        self._data = Samples()
        self._at, self._order, self._loaded = 0, np.arange(0), False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._loaded:
            self._order, self._at = self._numbers.permutation(SAMPLES), 0
        self._loaded = False
        while self._at < SAMPLES:
            self._at += BATCH
            yield collate([self._data[n] for n in self._order[self._at - BATCH : self._at]])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at, "order": self._order, "numbers": self._numbers.bit_generator.state, 7: (1, b"x")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state[7] == (1, b"x")
        self._at, self._order, self._loaded = state["at"], state["order"], True
        self._numbers.bit_generator.state = state["numbers"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def torchdata_loader(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it takes from torch
        loaders = optional("torchdata.stateful_dataloader")
        return loaders.StatefulDataLoader(Samples(), batch_size=BATCH, collate_fn=collate, **options)


def parquet(path: str) -> str:
    path += "/data"
    os.makedirs(path, exist_ok=True)
    for part in range(3):
        pq.write_table(table().slice(part * 18, 18), f"{path}/part-{part}.parquet", row_group_size=8)
    return path


LOADER = {"batch_size": BATCH, "collate_fn": collate}
SOURCES: dict[str, Callable[[str], Any]] = {
    "a table": lambda path: from_arrow(table()).batch(BATCH),
    "a table, shuffled": lambda path: from_arrow(table()).shuffle(40).batch(BATCH).prefetch(2),
    "parquet files": lambda path: lambda: from_arrow(pads.dataset(parquet(path))).shuffle(20).batch(BATCH),
    "readers": lambda path: from_arrow(lambda: table().to_reader(7)).batch(BATCH),
    "a loader": lambda path: DataLoader(Samples(), **LOADER),
    "a loader that shuffles": lambda path: DataLoader(Samples(), shuffle=True, **LOADER),
    "a function that makes one": lambda path: lambda: DataLoader(Samples(), shuffle=True, **LOADER),
    "a loader with a generator": lambda path: DataLoader(Samples(), shuffle=True, generator=seeded(), **LOADER),
    "a loader with workers": lambda path: DataLoader(Samples(), shuffle=True, num_workers=1, **LOADER),
    "a stateful loader": lambda path: Stateful(),
    "torchdata": lambda path: torchdata_loader(shuffle=True),
    "torchdata with a generator": lambda path: torchdata_loader(shuffle=True, generator=seeded()),
    "a function that makes torchdata's": lambda path: lambda: torchdata_loader(shuffle=True),
    "torchdata with workers": lambda path: torchdata_loader(shuffle=True, num_workers=1),
}


class KilledError(Exception):
    pass


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, event) -> None:
        if event.own_step == self.at:
            raise KilledError


PLACES = [(2, 5, 2), (4, 9, 2), (3, 8, 0)]
"""Steps from save to save; the step behind which it is killed, within passes of six; batches ahead."""


@pytest.mark.parametrize(
    ("make", "every", "at", "prefetch"),
    [(make, *PLACES[n % 3]) for n, make in enumerate(SOURCES.values())],
    ids=SOURCES,
)
def test_a_run_goes_on_in_its_data_with_the_same_bits(make, every, at, prefetch, tmp_path):
    made: list[str] = []

    def job(name: str, *callbacks: Callback) -> Estimator:
        torch.manual_seed(len(made) // 2)  # a loader may draw its seed when it is made; the third finds its own
        made.append(name)
        run = RunConfig(
            epochs=2, seed=3, save_every=every, prefetch=prefetch, progress="none", model_dir=str(tmp_path / name)
        )
        return Estimator(Tags(), run, train=make(str(tmp_path)), callbacks=callbacks)

    def state(estimator: Estimator) -> dict[str, Any]:
        ids = hash_strings([f"u{n}" for n in range(30)])
        rows = {"user": estimator.client.table("user").lookup(ids)}
        rows["tag"] = estimator.client.table("tag").lookup(np.arange(20))
        return rows | {name: value.numpy().copy() for name, value in estimator.task.state_dict().items()}

    with job("whole") as whole:
        whole.train()
        want = state(whole)
        assert whole.step_count == 12
    with job("cut", Kill(at)) as first, pytest.raises(KilledError):
        first.train()
    with job("cut") as again:
        again.train()
        assert again.step_count == 12
        for name, value in state(again).items():
            np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_arrows_nulls_lists_and_strings_are_what_a_task_takes():
    with Estimator(Tags(), RunConfig(progress="none"), train=from_arrow(table()).batch(SAMPLES)) as estimator:
        estimator.open()
        (batch,) = estimator._source(from_arrow(table()).batch(SAMPLES)).epoch(0)
        columns = table().to_pydict()
        ids = [[] if each is None else hash_strings([each]).tolist() for each in columns["user"]]
        assert batch.ids["user"].tolist() == ids
        assert batch.ids["tag"].tolist() == [each or [] for each in columns["tag"]]
        np.testing.assert_array_equal(batch.dense["price"][:, 0], np.float32(columns["price"]))
        want = np.array([np.nan if each is None else each for each in columns["buy"]], np.float32)
        np.testing.assert_array_equal(batch.labels["buy"], want)


def test_the_label_of_a_row_is_that_of_the_first_of_a_task_that_has_no_column():
    class Users(Task):
        user = Embedding(dim=1)
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.user.vector[:, 0]

    rows = from_arrow(pa.table({"user": [1, 2], "label": [1, 0]}))
    with Estimator(Users(), RunConfig(progress="none")) as job:
        job.open()
        for data in (rows, rows.apply(lambda records: records.encoded())):
            (batch,) = job._source(data.batch(2)).epoch(0)
            assert batch.labels["click"].tolist() == [1.0, 0.0]
            assert batch.ids["user"].tolist() == [[1], [2]]


def test_data_that_ends_after_one_pass_is_refused_in_the_second():
    with (
        Estimator(Tags(), RunConfig(progress="none", epochs=2), train=from_arrow(table().to_reader()).batch(9)) as job,
        pytest.raises(InvalidRequestError, match="a RecordBatchReader, which ends after one pass; give from_arrow a"),
    ):
        job.train()
    with (
        Estimator(Tags(), RunConfig(progress="none"), train=table()) as job,
        pytest.raises(InvalidRequestError, match=r"a Table is no iterable of batches.*trilith\.data\.from_arrow"),
    ):
        job.train()


@pytest.mark.parametrize(
    "state",
    [
        {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": torch.tensor([1.5]), 3: (1, (2, b"\0")), "c": None},
        {"nested": {"d": [np.float32(1.5), {(1, 2): True}], "empty": np.zeros((0, 2))}},
    ],
)
def test_states_of_loaders_are_kept_as_text(state):
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | torch.Tensor):
            return type(value), str(value.dtype), tuple(value.shape), value.tolist()
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

    assert plain(unpack_state(from_json(to_json({"state": pack_state(state)}))["state"])) == plain(state)


def test_a_state_that_cannot_be_kept_is_refused_by_its_type():
    with pytest.raises(InvalidRequestError, match="set cannot be part of a saved position"):
        pack_state({"a": {1}})

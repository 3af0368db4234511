"""What an Estimator refuses: one clear line for each mistake, and nothing lost by it."""

from __future__ import annotations

import resource
import signal
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import trilith.data
from trilith.checkpoint import newest_complete
from trilith.errors import CheckpointError, DataError, InvalidRequestError, NonFiniteError
from trilith.estimator import Callback, Dense, EarlyStopping, Embedding, Estimator, Label, RunConfig, Sequence, Task

ROWS = 8


class Shop(Task):
    user = Embedding(dim=2, bias=True)
    item = Embedding(dim=2)
    seen = Sequence(item, length=3)
    context = Dense(2)
    labels: ClassVar = {"click": Label()}

    def build(self) -> None:
        self.layer = nn.LazyLinear(1)

    def forward(self, x):
        seen = x.seen.values.sum(1)
        return self.layer(torch.cat([x.user.vector, x.item.vector, seen, x.context], 1))[:, 0] + x.user.bias


class Lacking(Task):
    user = Embedding(dim=2)
    labels: ClassVar = {"click": Label()}


class Unlabelled(Shop):
    labels: ClassVar = {}


class WithHour(Shop):
    """Newer code of the same job."""

    hour = Embedding(dim=2)

    def forward(self, x):
        seen = x.seen.values.sum(1)
        vectors = [x.user.vector, x.item.vector, seen, x.context, x.hour.vector]
        return self.layer(torch.cat(vectors, 1))[:, 0] + x.user.bias


WithHour.__name__ = "Shop"


class Overflowing(Shop):
    def forward(self, x):
        return super().forward(x) + torch.where(x.context[:, 0] > 1e30, torch.nan, 0.0)


def batch(**changes: object) -> dict[str, object]:
    whole = {
        "user": np.arange(ROWS),
        "item": np.arange(ROWS) % 3,
        "seen": [[1, 2]] * ROWS,
        "context": np.ones((ROWS, 2), np.float32),
        "click": np.arange(ROWS) % 2,
    }
    return whole | changes


def run(**settings: object) -> RunConfig:
    return RunConfig(progress="none", **settings)


def job(data: object, task: Task | None = None, **settings: object) -> Estimator:
    return Estimator(task or Shop(), run(**settings), train=data)


def parquet(path, **changes: object) -> trilith.data.Dataset:
    """A file of such samples, of which some columns are others, or None: not there."""
    columns = {name: list(value) for name, value in (batch() | changes).items() if value is not None}
    pq.write_table(pa.table(columns), path)
    return trilith.data.read(path)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Estimator(nn.Linear(1, 1)), "a Linear is no trilith.estimator.Task"),
        (lambda: Estimator(Shop), r"Shop is a class; an Estimator takes a task: Shop\(...\)"),
        (lambda: Estimator(Shop(), {"epochs": 3}), "run is a dict; an Estimator takes a RunConfig"),
        (lambda: Estimator(Shop(), train="logs/*.pb"), r"train='logs/\*.pb' is a path; train=lambda: trilith"),
        (lambda: Estimator(Shop(), evaluate=batch()), "evaluate is one mapping; an iterable of batches is needed"),
        (lambda: job([batch()], Lacking()).train(), r"Lacking needs a forward\(self, x\)"),
        (lambda: job([batch()], Unlabelled()).train(), "Unlabelled has no labels to learn from"),
        (
            lambda: job([batch()], Shop(dense_optimizer=torch.optim.Adam([torch.zeros(1)]))).train(),
            r"dense_optimizer is Adam\(...\), made before .*: lambda parameters: torch.optim.Adam",
        ),
        (lambda: run().overridden(sets=["epoch=3"]), "--set epoch=3: a run has no 'epoch'; do you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_what_no_estimator_is_made_of_is_said_in_one_line(make, error):
    with pytest.raises(InvalidRequestError, match=error) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([], "the training data has no batch in epoch 0"),
        (lambda: iter(()), "the training data has no batch in epoch 0"),
        (17, "int is no iterable of batches"),
        ([[1, 2]], "a batch is a list of 2, whose columns have no names"),
        ([batch(user=[], item=[], seen=[], context=np.zeros((0, 2)), click=[])], "a batch has no samples"),
        ([{name: each for name, each in batch().items() if name != "item"}], "feature 'item': a batch has no 'item'"),
        ([batch(user=np.arange(3))], "has 3 samples"),
        ([batch(user=np.arange(ROWS) / 2)], "feature 'user': ids are float64, they must be integers"),
        ([batch(context=np.ones((ROWS, 3)))], "feature 'context': 3 values of each sample, dim=2"),
        ([batch(context=[["warm", "cold"]] * ROWS)], "feature 'context' is of <U4, numbers are needed"),
        ([batch(context=np.full((ROWS, 2), np.nan))], "feature 'context': sample 0 of the batch has"),
        ([batch(click=np.full(ROWS, 5))], "label 'click': sample 0 of the batch has 5, outside 0..1"),
        ([batch(click=["yes"] * ROWS)], "label 'click' is of <U3, numbers are needed"),
    ],
)
def test_data_that_cannot_be_learned_from_is_said_in_one_line_and_changes_no_row(data, error):
    with job(data) as estimator:
        with pytest.raises(InvalidRequestError, match=error) as raised:
            estimator.train()
        assert "\n" not in str(raised.value)
        assert estimator.step_count == 0
        assert not estimator.client.table("user").lookup(np.arange(ROWS)).any()


@pytest.mark.parametrize(
    ("settings", "evaluate", "error"),
    [
        ({}, [batch()], r"EarlyStopping\('valid/clik/auc'\): .* but valid/loss; do you mean 'valid/loss'"),
        ({}, None, r"EarlyStopping\('valid/clik/auc'\): there is no evaluation: give the Estimator evaluate="),
        (
            {"evaluate_every_epoch": False},
            [batch()],
            "there is no evaluation: .* set evaluate_every or",
        ),
        ({"keep_best": "valid/click/auc"}, [batch()], r"BestByMetric\('valid/click/auc'\): an evaluation has no such"),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused_before_anything_is_learned(tmp_path, settings, evaluate, error):
    callbacks = [] if "keep_best" in settings else [EarlyStopping("valid/clik/auc")]
    made = run(model_dir=str(tmp_path), **settings)
    with Estimator(Shop(), made, train=[batch()], evaluate=evaluate, callbacks=callbacks) as estimator:
        with pytest.raises(InvalidRequestError, match=error) as raised:
            estimator.train()
        assert "\n" not in str(raised.value)
        assert estimator.step_count == 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"item": None}, "'item': no column of the files read; there are"),
        ({"user": [0.5] * ROWS}, "feature 'user' holds a float_list, which are no ids"),
        ({"context": [[1.0]] * ROWS}, "feature 'context' has 1 values where Dense"),
        ({"click": [7] * ROWS}, "label 'click': sample 0 of the batch has 7, outside 0..1"),
        ({"click": ["yes"] * ROWS}, "feature 'click' holds a bytes_list, which is no list of float values"),
    ],
)
def test_columns_that_are_not_what_the_task_wants_are_said_in_one_line(tmp_path, changes, error):
    with job(parquet(tmp_path / "a.parquet", **changes).batch(4)) as estimator:
        with pytest.raises((InvalidRequestError, DataError), match=error) as raised:
            estimator.train()
        assert "\n" not in str(raised.value)


def test_a_dataset_is_batched_once_and_may_be_parsed(tmp_path):
    data = parquet(tmp_path / "a.parquet")
    with job(data) as estimator, pytest.raises(InvalidRequestError, match=r"gives single records; .batch\(n\)"):
        estimator.train()
    with pytest.raises(InvalidRequestError, match="batch works on records"):
        data.batch(4).batch(2)
    with job(data.batch(4)) as estimator:
        estimator.train()
        assert estimator.step_count == ROWS // 4


def test_a_loss_that_is_nan_ends_a_run_which_goes_on_at_its_last_checkpoint_once_the_data_is_mended(tmp_path):
    good = [batch(user=np.arange(ROWS) + ROWS * number) for number in range(6)]
    bad = [*good[:4], batch(context=np.full((ROWS, 2), 3e38, np.float32)), good[5]]
    settings = {"model_dir": str(tmp_path), "save_every": 2}
    with (
        job(bad, Overflowing(), **settings) as estimator,
        pytest.raises(NonFiniteError, match="the loss of batch 4 of epoch 0 is nan"),
    ):
        estimator.train()
    saved = newest_complete(str(tmp_path))
    assert saved is not None
    with job(good, Overflowing(), **settings) as estimator:
        estimator.train()
        assert estimator.step_count == 6


def test_half_a_checkpoint_is_none_and_a_damaged_one_is_named(tmp_path):
    settings = {"model_dir": str(tmp_path), "save_every": 1}
    with job([batch()] * 3, steps=2, **settings) as estimator:
        estimator.train()
    *_, before, newest = sorted(tmp_path.glob("ckpt-*"))
    (newest / "manifest.json").unlink()
    with job([batch()] * 3, steps=1, **settings) as estimator:
        estimator.train()  # had done its step
        assert estimator.step_count == 1
    for path in before.glob("job.dense*"):
        path.write_bytes(path.read_bytes()[:-4])
    with job([batch()] * 3, **settings) as estimator:
        with pytest.raises(CheckpointError, match="job.dense.safetensors") as raised:
            estimator.train()
        assert "\n" not in str(raised.value)


def test_newer_code_with_a_feature_more_is_refused_before_any_row_is_replaced_and_told_what_does(tmp_path):
    settings = {"model_dir": str(tmp_path / "old")}
    with job([batch()] * 3, **settings) as estimator:
        estimator.train()
    saved = newest_complete(str(tmp_path / "old"))
    assert saved is not None
    data = [batch(hour=np.arange(ROWS))] * 3
    with job(data, WithHour(), **settings) as estimator:
        with pytest.raises(CheckpointError, match=r"warm_start=.*warm_start_parts=rows") as raised:
            estimator.train()
        assert "\n" not in str(raised.value)
        assert not estimator.client.table("user").lookup(np.arange(ROWS)).any()
    with (
        job(data, WithHour(), **settings) as estimator,
        pytest.raises(CheckpointError, match="other shapes of .'layer.weight'."),
    ):
        estimator.evaluate(data)
    with job(
        data, WithHour(), model_dir=str(tmp_path / "new"), warm_start=saved.path, warm_start_parts="rows"
    ) as estimator:
        estimator.train()
        assert estimator.step_count > 3


# ---- disks, signals, others ------------------------------------------------------------------------------------------


class Told(Callback):
    """Keeps events, and does something at some steps."""

    def __init__(self, **at: object) -> None:
        self.events: list = []
        self._at = at

    def on(self, event):
        self.events.append(event)
        if event.name == "step" and (act := self._at.get(f"step_{event.own_step}")):
            act()

    def names(self) -> list[str]:
        return [event.name for event in self.events if event.name != "step"]


def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_while_and_leaves_no_half_of_one(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    told = Told(step_2=lambda: limit(64), step_4=lambda: limit(before[0]))
    settings = {"model_dir": str(tmp_path / "model"), "save_every": 1}
    try:
        with Estimator(Shop(), run(**settings), train=[batch()] * 5, callbacks=[told]) as estimator:
            estimator.train()
    finally:
        limit(before[0])
    assert told.names() == ["started", "saved", "save_failed", "save_failed", "saved", "saved", "epoch", "done"]
    assert "File too large" in next(event.error for event in told.events if event.name == "save_failed")
    assert all((path / "manifest.json").exists() for path in (tmp_path / "model").glob("ckpt-*"))
    with job([batch()] * 5, **settings, epochs=2) as estimator:
        estimator.train()
        assert estimator.step_count == 10


def test_a_signal_cuts_an_evaluation_short_and_what_was_learned_is_saved(tmp_path):
    scored = 0

    def evaluated():
        nonlocal scored
        for scored in range(1, 100):
            if scored == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch()

    told = Told()
    settings = run(model_dir=str(tmp_path), evaluate_every=2)
    with Estimator(Shop(), settings, train=[batch()] * 5, evaluate=evaluated, callbacks=[told]) as estimator:
        assert estimator.train() == {}
    assert scored == 3
    assert told.names() == ["started", "saved", "stopped"]
    with Estimator(Shop(), settings, train=[batch()] * 5, evaluate=[batch()]) as estimator:
        estimator.train()
        assert estimator.step_count == 5


def test_of_two_runs_in_one_model_dir_the_one_that_finds_the_others_checkpoint_ends(tmp_path):
    settings = {"model_dir": str(tmp_path), "save_every": 1}

    def meddle() -> None:
        with job([batch()] * 2, resume="never", **settings) as other:
            other.train()

    told = Told(step_2=meddle)
    with Estimator(Shop(), run(**settings), train=[batch()] * 5, callbacks=[told]) as estimator:
        with pytest.raises(InvalidRequestError, match="another run saves there, too: .*ckpt-") as raised:
            estimator.train()
        assert "\n" not in str(raised.value)
    assert told.names() == ["started", "saved", "failed"]
    saved = newest_complete(str(tmp_path))
    assert saved is not None  # the other's
    with job([batch()] * 2, epochs=2, **settings) as estimator:
        estimator.train()
        assert estimator.step_count == 4


def test_a_run_that_has_done_all_says_so(tmp_path, caplog):
    for _ in range(2):
        with job([batch()] * 2, model_dir=str(tmp_path)) as estimator:
            estimator.train()
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.endswith("has all 1 epochs already, at step 2: epochs=N goes on, another model_dir begins anew")


def test_records_are_not_parsed_into_two_forms_of_one_name():
    class Both(Shop):
        number = Dense(1, feature="user")

    with Estimator(Both(), run(), train=trilith.data.from_records([b""], kind="example").batch(1)) as estimator:
        with pytest.raises(InvalidRequestError, match=r"feature 'number' reads 'user' as Dense.*under two names"):
            estimator.train()

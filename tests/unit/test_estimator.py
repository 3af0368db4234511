"""The Estimator: a user's model on a user's data, trained, evaluated, predicted, saved, killed and resumed."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv
from torch import nn

import trilith.data
from trilith.data import Kind, Ragged, Records, Sparse, hash_strings
from trilith.data.formats.writers import open_writer
from trilith.errors import CheckpointError, InvalidRequestError, NonFiniteError
from trilith.estimator import Callback, Dense, Embedding, Estimator, Label, RunConfig, Sequence, Stop, Task, metrics
from trilith.estimator.batches import LabelColumn, Wanted, arrange
from trilith.estimator.source import Source
from trilith.tables import Adagrad, Sgd
from trilith_proto.example_pb2 import Example
from trilith_services.serving.models import Models

SAMPLES, BATCH = 400, 40


class Ctr(Task):
    user = Embedding(dim=4, optimizer=Adagrad(learning_rate=0.2, initial_accumulator_value=0.1))
    item = Embedding(dim=4, bias=True)
    seen = Sequence(item, length=5)
    context = Dense(2)
    labels: ClassVar = {"click": Label(), "buy": Label(weight=2.0)}
    metrics: ClassVar = {"auc": metrics.Auc(), "logloss": metrics.LogLoss()}

    def build(self) -> None:
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.trunk = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in self.labels})

    def forward(self, x):
        history, _ = self.attention(
            x.item.vector[:, None], x.seen.values, x.seen.values, key_padding_mask=~x.seen.mask, need_weights=False
        )
        history = torch.nan_to_num(history)
        deep = self.trunk(torch.cat([x.user.vector, x.item.vector, history[:, 0], x.context], 1))
        return {name: head(deep)[:, 0] + x.item.bias for name, head in self.heads.items()}


def samples(seed: int = 0) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 30, SAMPLES), rng.integers(0, 20, SAMPLES)
    known = np.random.default_rng(99)
    taste = known.normal(size=30)[:, None] + known.normal(size=20)
    click = (taste[user, item] + rng.normal(size=SAMPLES) * 0.3 > 0).astype(np.float32)
    buy = np.where(rng.random(SAMPLES) < 0.3, np.nan, (taste[user, item] > 0.8)).astype(np.float32)
    lengths = rng.integers(0, 9, SAMPLES)
    return {
        "user": user,
        "item": item,
        "seen": Ragged.of_lengths(rng.integers(0, 20, int(lengths.sum())), lengths),
        "context": rng.normal(size=(SAMPLES, 2)).astype(np.float32),
        "click": click,
        "buy": buy,
        "note": ["passes through"] * SAMPLES,
    }


def batches(seed: int = 0, *, but: tuple[str, ...] = ()) -> list[dict[str, object]]:
    data = {name: value for name, value in samples(seed).items() if name not in but}
    cuts = [np.arange(start, min(start + BATCH, SAMPLES)) for start in range(0, SAMPLES, BATCH)]
    return [
        {
            name: value.take(cut)
            if isinstance(value, Ragged)
            else [value[i] for i in cut]
            if isinstance(value, list)
            else value[cut]
            for name, value in data.items()
        }
        for cut in cuts
    ]


def run_config(**settings) -> RunConfig:
    return RunConfig(progress="none", **settings)


def dense_adam(parameters):
    return torch.optim.AdamW(parameters, 1e-2)


def job(run: RunConfig | None = None, *, task: Task | None = None, **given) -> Estimator:
    given = {"train": batches, "evaluate": lambda: batches(1)} | given
    return Estimator(task or Ctr(dense_optimizer=dense_adam), run, **given)


def rows_of(estimator: Estimator) -> dict[str, np.ndarray]:
    return {name: estimator.client.table(name).lookup(np.arange(30)) for name in ("user", "item")}


class Remember(Callback):
    def __init__(self) -> None:
        self.events = []

    def on(self, event):
        self.events.append(event)

    def named(self, name: str) -> list:
        return [event for event in self.events if event.name == name]


def test_a_task_learns_and_says_how_it_goes():
    told = Remember()
    with job(run_config(epochs=12, seed=1), callbacks=[told]) as estimator:
        results = estimator.train()
    assert results["click/auc"] > 0.75
    assert set(results) == {"click/auc", "click/logloss", "buy/auc", "buy/logloss", "loss"}
    names = [event.name for event in told.events]
    assert (names[0], names[-1]) == ("started", "done")
    assert (names.count("step"), names.count("evaluated")) == (120, 12)
    steps = told.named("step")
    assert steps[-1].own_step == 120
    assert steps[-1].loss < steps[0].loss
    assert {"data", "lookup", "forward", "backward", "push"} <= steps[0].seconds.keys()
    assert steps[-1].metrics["click/auc"] > 0.75
    passes = told.named("epoch")
    assert [(event.epoch, event.samples) for event in passes] == [(epoch, SAMPLES) for epoch in range(12)]
    assert 0 < sum(event.seconds for event in passes) < told.named("done")[0].seconds


def test_evaluation_and_prediction_create_no_row_and_move_no_counter():
    with job() as estimator:
        estimator.open()
        before = estimator.client.global_step()
        estimator.evaluate()
        scores = list(estimator.predict(batches(2, but=("click", "buy"))))
        assert [each["click"].shape for each in scores] == [(BATCH,)] * (SAMPLES // BATCH)
        assert estimator.client.table("user").size() == 0
        assert estimator.client.global_step() == before


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("at", [3, 8, 13])
def test_a_run_that_is_killed_and_resumed_gives_the_same_bits(tmp_path, prefetch, at):
    def run(name: str) -> RunConfig:
        return run_config(
            epochs=2, seed=3, save_every=3, prefetch=prefetch, async_push=prefetch, model_dir=str(tmp_path / name)
        )

    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_step(self, event):
            if event.own_step == at:
                raise KilledError

    with job(run("whole")) as whole:
        whole.train()
        want, dense = rows_of(whole), {name: each.clone() for name, each in whole.task.state_dict().items()}
    first = job(run("cut"), callbacks=[Kill()])
    with pytest.raises(KilledError):
        first.train()
    first.close()
    torch.manual_seed(12345)
    with job(run("cut")) as again:
        again.train()
        assert again.step_count == 20
        for name, rows in rows_of(again).items():
            np.testing.assert_array_equal(rows, want[name], err_msg=name)
        for name, value in again.task.state_dict().items():
            torch.testing.assert_close(value, dense[name], rtol=0, atol=0, msg=name)


def test_a_start_restores_and_destroys_nothing(tmp_path):
    run = run_config(epochs=1, model_dir=str(tmp_path))
    with job(run) as first:
        first.train()
        results = first.evaluate()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with job(run) as second:
        assert second.evaluate() == pytest.approx(results, rel=1e-6)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_dense_parameters_on_the_ps_are_trained_and_resumed(tmp_path):
    run = run_config(epochs=6, model_dir=str(tmp_path), prefetch=1, async_push=1)
    with job(run, task=Ctr(dense_optimizer=Adagrad(learning_rate=0.05))) as estimator:
        assert estimator.placement.dense == "ps"
        assert estimator.train()["click/auc"] > 0.7
        results = estimator.evaluate()
    with job(run, task=Ctr(dense_optimizer=Adagrad(learning_rate=0.05))) as again:
        assert again.evaluate() == pytest.approx(results, rel=1e-5)


def test_accumulation_is_one_step_of_the_sum():
    with job(run_config(accumulate=4)) as estimator:
        estimator.train()
        assert estimator.step_count == 3  # two of four batches, and one of the two that are left


def test_a_loop_of_ones_own_steps_by_batches():
    with job(run_config(clip_norm=1.0)) as estimator:
        losses = [estimator.step(batch) for _ in range(10) for batch in batches()]
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
        assert estimator.step_count == 100


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision):
    with job(run_config(epochs=8, precision=precision)) as estimator:
        assert estimator.train()["click/auc"] > 0.7


def test_a_callback_stops_a_run_which_saves_and_goes_on_later(tmp_path):
    class Halt(Callback):
        def on_step(self, event):
            return Stop("enough") if event.own_step == 4 else None

    told = Remember()
    run = run_config(epochs=1, model_dir=str(tmp_path))
    with job(run, callbacks=[Halt(), told]) as estimator:
        estimator.train()
    (stopped,) = told.named("stopped")
    assert stopped.reason == "enough"
    assert told.named("saved")
    with job(run, callbacks=[again := Remember()]) as estimator:
        estimator.train()
    assert [event.own_step for event in again.named("step")] == list(range(5, 11))


def record(batch: dict[str, object], row: int) -> bytes:
    """A sample as an Example, as it is asked for."""
    example = Example()
    for name in ("user", "item"):
        example.named_feature.add(name=name).feature.fid_v2_list.value.append(int(batch[name][row]))
    example.named_feature.add(name="seen").feature.fid_v2_list.value.extend(batch["seen"][row].tolist())
    example.named_feature.add(name="context").feature.float_list.value.extend(batch["context"][row].tolist())
    return example.SerializeToString()


def test_an_export_scores_as_the_trainer_does(tmp_path):
    run = run_config(epochs=2, model_dir=str(tmp_path / "model"), export_mode="standalone")
    told = Remember()
    with job(run, callbacks=[told]) as estimator:
        estimator.train()
        batch = batches(5)[0]
        (want,) = estimator.predict([batch])
        estimator.export(str(tmp_path / "exports"))
    models = Models(str(tmp_path / "exports"))
    assert models.refresh()
    records = Records.of([record(batch, row) for row in range(BATCH)], Kind.EXAMPLE)
    with models.use() as loaded:
        found = loaded.model.predict(records)
    models.close()
    for label, scores in want.items():
        np.testing.assert_allclose(found[label], scores, rtol=1e-6, atol=1e-6)


def test_steps_of_several_batches_are_counted_saved_and_evaluated_as_steps(tmp_path):
    """Eleven batches are three steps of three, and one of two."""
    told = Remember()
    settings = {"accumulate": 3, "save_every": 2, "evaluate_every": 3, "keep_newest": 9}
    data = batches()[:5] + batches(1)[:6]
    with job(run_config(model_dir=str(tmp_path), **settings), train=data, callbacks=[told]) as estimator:
        estimator.train()
        assert estimator.step_count == 4
    assert [event.step for event in told.named("saved")] == [2, 4]
    assert [event.step for event in told.named("evaluated")] == [3, 4]  # and behind the pass
    assert [event.own_step for event in told.named("step")] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    with job(run_config(accumulate=3, steps=2), train=data, callbacks=[ends := Remember()]) as estimator:
        estimator.train()
        assert estimator.step_count == 2
    assert len(ends.named("step")) == 6


def test_weights_of_ids_views_and_strings_are_learned_and_looked_up_once():
    class Tags(Task):
        tag = Embedding(dim=2, pooling="mean", weights="tag_weights", optimizer=Sgd(learning_rate=1.0))
        other = tag.view(pooling="sum")
        labels: ClassVar = {"y": Label()}

        def forward(self, x):
            return x.tag.vector.sum(1) + x.other.vector.sum(1)

        def loss(self, outputs, labels, weight):
            return outputs["y"].sum()

    batch = {"tag": [["a", "b"], ["c"]], "tag_weights": [[1.0, 3.0], [2.0]], "other": [["a"], []], "y": [1.0, 0.0]}
    with Estimator(Tags(), run_config()) as estimator:
        estimator.step(batch)
        ids = hash_strings(np.array(["a", "b", "c"]))
        before = estimator.client.table("tag").lookup(ids)
        estimator.step(batch)
        moved = before - estimator.client.table("tag").lookup(ids)
        np.testing.assert_allclose(moved, [[0.25 + 1] * 2, [0.75] * 2, [1.0] * 2], rtol=1e-5)
        assert [table.name for table in estimator.client.describe()[0].tables] == ["tag"]


@pytest.mark.parametrize("form", ["parquet", "csv", "tfrecord"])
@pytest.mark.parametrize("own", [False, True], ids=["by the task", "parsed by hand"])
def test_strings_of_files_are_learned_and_served_by_their_hashes(tmp_path, form, own):
    class Names(Task):
        user = Embedding(dim=2)
        item = Embedding(dim=2)
        labels: ClassVar = {"click": Label()}

        def forward(self, x):
            return x.user.vector.sum(1) + x.item.vector.sum(1)

    table = pa.table({"user": ["ann", "Bob", "東京"], "item": [1, 2, 3], "click": [0.0, 1.0, 1.0]})
    path = str(tmp_path / f"clicks.{form}")
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "csv":
        csv.write_csv(table, path)
    else:
        made = []
        for each in table.to_pylist():
            example = Example(label=[each["click"]])
            example.named_feature.add(name="user").feature.bytes_list.value.append(each["user"].encode())
            example.named_feature.add(name="item").feature.int64_list.value.append(each["item"])
            made.append(example.SerializeToString())
        with open_writer(path) as writer:
            writer.write(Records.of(made, Kind.EXAMPLE))
    data = trilith.data.read(path, **({"kind": "example"} if form == "tfrecord" else {}))
    if own:
        data = data.parse(
            {"user": Sparse(strings=True), "item": Sparse(), "click": trilith.data.Label(feature="click")}
        )
    run = run_config(epochs=2, model_dir=str(tmp_path / "model"), export_mode="standalone")
    with Estimator(Names(), run, train=data.batch(2)) as estimator:
        estimator.train()
        rows = estimator.client.table("user")
        assert rows.lookup(hash_strings(["ann", "Bob", "東京"])).any(1).all()
        (scores,) = estimator.predict([{"user": ["東京"], "item": [3]}])
        estimator.export(str(tmp_path / "exports"))
    models = Models(str(tmp_path / "exports"))
    assert models.refresh()
    example = Example()
    example.named_feature.add(name="user").feature.bytes_list.value.append("東京".encode())
    example.named_feature.add(name="item").feature.int64_list.value.append(3)
    with models.use() as loaded:
        found = loaded.model.predict(Records.of([example.SerializeToString()], Kind.EXAMPLE))
    models.close()
    np.testing.assert_allclose(found["click"], scores["click"], rtol=1e-6)


def test_the_largest_of_a_bag_is_learned_exported_and_served(tmp_path):
    class Largest(Task):
        item = Embedding(dim=3, bias=True, pooling="max")
        tags = item.view(pooling="max", weights="tag_weights")
        more = item.view(pooling="sum")
        labels: ClassVar = {"y": Label()}

        def forward(self, x):
            return x.item.vector.sum(1) + x.item.bias + x.tags.vector.sum(1) - x.more.vector.sum(1)

    rng = np.random.default_rng(0)
    lists = [[rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, 40)] for _ in range(3)]
    batch = {"item": lists[0], "tags": lists[1], "more": lists[2], "y": rng.integers(0, 2, 40).astype(np.float32)}
    batch["tag_weights"] = [rng.random(len(each)).astype(np.float32).tolist() for each in lists[1]]
    run = run_config(model_dir=str(tmp_path / "model"), export_mode="standalone")
    with Estimator(Largest(), run, train=[batch] * 30) as estimator:
        first = estimator.evaluate([batch])["loss"]
        estimator.train()
        assert estimator.evaluate([batch])["loss"] < first
        (want,) = estimator.predict([batch])
        estimator.export(str(tmp_path / "exports"))
    payloads = []
    for row in range(40):
        example = Example()
        for name in ("item", "tags", "more"):
            example.named_feature.add(name=name).feature.fid_v2_list.value.extend(batch[name][row])
        example.named_feature.add(name="tag_weights").feature.float_list.value.extend(batch["tag_weights"][row])
        payloads.append(example.SerializeToString())
    models = Models(str(tmp_path / "exports"))
    assert models.refresh()
    with models.use() as loaded:
        found = loaded.model.predict(Records.of(payloads, Kind.EXAMPLE))
    models.close()
    np.testing.assert_allclose(found["y"], want["y"], rtol=1e-6, atol=1e-6)


def test_checkpoints_are_kept_by_rule(tmp_path):
    run = run_config(
        epochs=1, save_every=1, keep_newest=2, keep_best="valid/click/auc", evaluate_every=1, model_dir=str(tmp_path)
    )
    told = Remember()
    with job(run, callbacks=[told]) as estimator:
        estimator.train()
    saved = [event.path.rpartition("/")[2] for event in told.named("saved")]
    aucs = [event.metrics["valid/click/auc"] for event in told.named("evaluated")][: len(saved)]
    there = {path.name for path in tmp_path.iterdir() if (path / "manifest.json").exists()}
    assert {saved[int(np.argmax(aucs))], *saved[-2:]} <= there
    assert len(there) <= 4


def test_a_warm_start_has_the_rows_and_weights_of_another_run_and_its_own_position(tmp_path):
    with job(run_config(epochs=3, model_dir=str(tmp_path / "first"))) as first:
        first.train()
        path = first.save()
        want = rows_of(first)
    told = Remember()
    with job(run_config(warm_start=path, steps=1), callbacks=[told]) as second:
        second.train()
        (restored,) = told.named("restored")
        assert restored.warm_start
        assert [event.own_step for event in told.named("step")] == [1]
        assert np.abs(rows_of(second)["user"] - want["user"]).max() < 0.5
        assert np.abs(want["user"]).max() > 0


def test_columns_of_a_file_are_labels_by_name_and_null_is_a_missing_one(tmp_path):
    columns = {"user": [1, 2, 3], "click": [1, 0, None], "bought": [None, 1.0, 0.0]}
    pq.write_table(pa.table(columns), tmp_path / "by-name.parquet")
    pq.write_table(pa.table({"user": [1, 2, 3], "label": [[1, 0], [0], []]}), tmp_path / "in-order.parquet")

    class Shop(Task):
        user = Embedding(dim=2, bias=True)
        labels: ClassVar = {"click": Label(), "buy": Label(feature="bought")}

        def forward(self, x):
            return {name: x.user.bias + x.user.vector.sum(1) for name in self.labels}

    def labels_of(name: str, task: Task) -> dict[str, list[float]]:
        batches = Source(trilith.data.read(tmp_path / name).batch(3), task, lambda batch: batch).epoch(0)
        found = arrange(next(batches), Wanted(labels={"click": LabelColumn(), "bought": LabelColumn()}))
        batches.close()
        return {each: torch.where(found.masks[each], found.labels[each], -1).tolist() for each in found.labels}

    assert labels_of("by-name.parquet", Shop()) == {"click": [1, 0, -1], "bought": [-1, 1, 0]}
    assert labels_of("in-order.parquet", Shop()) == {"click": [1, 0, -1], "bought": [0, -1, -1]}
    columns["buy"] = columns.pop("bought")
    pq.write_table(pa.table(columns), tmp_path / "misspelt.parquet")
    with pytest.raises(InvalidRequestError, match=r"'bought': no column of the files read; there are \['buy', 'click'"):
        labels_of("misspelt.parquet", Shop())


def test_a_loss_sees_what_is_no_label_and_has_parts_of_its_own():
    class Towers(Ctr):
        def forward(self, x):
            return {**super().forward(x), "vectors": x.user.vector}

        def loss(self, outputs, labels, weight):
            assert outputs["vectors"].shape[1] == 4
            return {**super().loss(outputs, labels, weight), "size": outputs["vectors"].square().mean()}

    told = Remember()
    with job(task=Towers(dense_optimizer=dense_adam), callbacks=[told]) as estimator:
        found = estimator.train()
        (scores, *_) = estimator.predict(batches(2))
    assert sorted(scores) == ["buy", "click"]
    assert {"click/auc", "buy/auc", "loss"} <= found.keys()
    step = told.named("step")[0]
    parts = step.losses
    assert step.loss == pytest.approx(parts["click"] + 2 * parts["buy"] + parts["size"])


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def broken(name: str, value: object) -> list[dict[str, object]]:
    return [{**batch, name: value} for batch in batches()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (batches(but=("seen",)), "feature 'seen': a batch has no 'seen'"),
        (batches(but=("buy",)), "label 'buy': a batch has no 'buy'"),
        (broken("context", np.zeros((BATCH, 3))), "feature 'context': 3 values of each sample, dim=2"),
        (broken("context", np.full((BATCH, 2), np.inf)), "feature 'context': sample 0 of the batch has"),
        (broken("user", np.zeros(BATCH)), "feature 'user'"),
        (broken("user", np.zeros(7, np.int64)), "has 7 samples"),
        (broken("click", np.full(BATCH, 3.0)), "label 'click': sample 0 of the batch has 3, outside 0..1"),
        (17, "int is no iterable of batches"),
    ],
)
def test_wrong_batches_are_one_clear_line(data, message):
    with job(train=data) as estimator, pytest.raises(InvalidRequestError, match=message):
        estimator.train()


def test_a_loss_that_is_not_finite_ends_training_or_is_skipped_and_counted():
    bad = batches()
    bad[3] = {**bad[3], "context": np.full((BATCH, 2), 3e38, np.float32)}
    with job(train=bad) as estimator, pytest.raises(NonFiniteError, match="batch 3 of epoch 0"):
        estimator.train()
    with job(run_config(skip_non_finite=True), train=bad) as estimator:
        estimator.train()
        assert estimator.optimization.skipped == 1
        assert estimator.step_count == SAMPLES // BATCH - 1


def test_a_task_that_is_none_or_gives_the_wrong_shapes_is_refused():
    with pytest.raises(InvalidRequestError, match="Linear is no"):
        Estimator(nn.Linear(1, 1))

    class Wrong(Ctr):
        def forward(self, x):
            return {"click": x.context, "buy": x.context}

    with pytest.raises(InvalidRequestError, match=r"'click' has shape \[2, 2\]"):
        job(task=Wrong()).open()

    class Turned(Ctr):
        def forward(self, x):
            return {**super().forward(x), "vectors": x.user.vector.T}

    with pytest.raises(
        InvalidRequestError, match=r"'vectors' has shape \[4, 2\] for 2 samples; \[2, \.\.\.\] is needed"
    ):
        job(task=Turned()).open()

    class Other(Ctr):
        def forward(self, x):
            return {"clik": x.context[:, 0]}

    with pytest.raises(InvalidRequestError, match="clik"):
        job(task=Other()).open()


def test_a_model_dir_of_another_model_is_refused(tmp_path):
    run = run_config(model_dir=str(tmp_path))
    with job(run) as estimator:
        estimator.train()

    class Wider(Ctr):
        def build(self) -> None:
            super().build()
            self.extra = nn.Linear(1, 1)

    Wider.__name__ = "Ctr"
    with job(run, task=Wider(dense_optimizer=dense_adam)) as other, pytest.raises(CheckpointError, match="extra"):
        other.train()


def test_an_estimator_puts_the_environment_over_what_the_code_says(monkeypatch):
    monkeypatch.setenv("TRILITH_RUN_EPOCHS", "4")
    job = Estimator(Ctr(), RunConfig(epochs=2, steps=7))
    assert (job.run.epochs, job.run.steps) == (4, 7)
    assert job.configure(RunConfig(epochs=3)).run.epochs == 3
    monkeypatch.setenv("TRILITH_RUN_EPOCH", "4")
    with pytest.raises(InvalidRequestError, match="TRILITH_RUN_EPOCH"):
        Estimator(Ctr(), RunConfig())


def test_settings_of_a_task_are_overridden_by_name_and_unknown_ones_refused():
    task = Ctr(sample_weight="weight")
    assert task.sample_weight == "weight"
    with pytest.raises(InvalidRequestError, match="did you mean 'sample_weight'"):
        Ctr(sample_wieght="x")


def test_dense_optimizers_and_places_that_do_not_fit_are_refused():
    with pytest.raises(InvalidRequestError, match="dense='ps'"):
        job(run_config(dense="ps")).open()
    with pytest.raises(InvalidRequestError, match="dense='local'"):
        job(run_config(dense="local"), task=Ctr(dense_optimizer=Sgd())).open()

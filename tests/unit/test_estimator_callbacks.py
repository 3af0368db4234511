"""Events and callbacks: who is told what, who may end training, what is decided by a metric, what is written down."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import sys
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from rich.console import Console

from tests.absent import optional
from trilith.errors import InvalidRequestError, MissingExtraError
from trilith.estimator.callbacks import BestByMetric, Callback, Callbacks, EarlyStopping
from trilith.estimator.config import RunConfig
from trilith.estimator.events import (
    EVENTS,
    Done,
    Epoch,
    Evaluated,
    Event,
    Exported,
    Failed,
    Restored,
    RowsRejoined,
    Saved,
    SaveFailed,
    ShardRestarted,
    Started,
    Step,
    Stop,
    Stopped,
)
from trilith.estimator.loggers import JsonLines, Mlflow, Profiler, ProgressBars, Prometheus, TensorBoard, WandB

AUC = "valid/click/auc"

STORY: list[Event] = [
    Started(rank=0, world_size=2, total_steps=4, config=RunConfig(name="ctr", epochs=2)),
    Restored(path="d/step-10", step=10),
    Step(
        own_step=1, step=11, samples=8, loss=0.5, losses={"click": 0.5}, metrics={"auc": 0.6}, samples_per_s=100.0,
        seconds={"data": 0.001, "forward": 0.01}, rates={"dense": 0.1},
    ),
    Step(own_step=2, step=12, samples=16, loss=math.nan, skipped=1, seconds={"data": 0.002}),
    ShardRestarted(shard=1, step=12),
    RowsRejoined(shard=1, restored_from="d/step-10", restored_step=10, known_step=12, steps_back=2, step=12),
    Evaluated(step=12, metrics={AUC: 0.7, "valid/loss": 0.4}, samples=100, seconds=0.1),
    Saved(path="d/step-12", step=12, seconds=0.2),
    SaveFailed(path="d/step-13", error="disk full", step=13),
    Exported(path="e/1", version=1, step=12),
    Epoch(epoch=0, samples=16, seconds=1.0, step=12),
    Done(step=12, samples=16, seconds=2.0, samples_per_s=90.0, metrics={AUC: 0.7}),
]  # fmt: skip


def tell_story(*callbacks: Callback, story: list[Event] = STORY) -> None:
    with Callbacks(callbacks) as told:
        for event in story:
            assert told.tell(event) is None


# ---- events --------------------------------------------------------------------------------------------------------


def test_an_event_is_frozen_and_named_after_its_class():
    assert [each.name for each in STORY[:2]] == ["started", "restored"]
    assert RowsRejoined.name == "rows_rejoined"
    assert EVENTS["save_failed"] is SaveFailed
    with pytest.raises(dataclasses.FrozenInstanceError):
        Step().loss = 1.0


@pytest.mark.parametrize("event", STORY, ids=lambda event: event.name)
def test_an_event_is_a_line_of_json(event):
    line = json.loads(json.dumps(event.as_dict(), allow_nan=False))
    assert line["event"] == event.name
    assert line["step"] == event.step


def test_no_password_is_in_an_event():
    assert "hidden" not in json.dumps(Started(config=RunConfig(cluster="zk://a:hidden@h/p")).as_dict())


# ---- telling -------------------------------------------------------------------------------------------------------


class ByName(Callback):
    def __init__(self):
        self.told = []

    def on_step(self, event):
        self.told.append(event.step)

    def on_evaluated(self, event):
        return Stop("enough")


class Everything(Callback):
    def __init__(self):
        self.told = []
        self.closed = False

    def on(self, event):
        self.told.append(event.name)

    def close(self):
        self.closed = True


def test_a_callback_has_methods_by_event_or_one_for_all(caplog):
    by_name, everything = ByName(), Everything()
    callbacks = Callbacks([by_name, everything])
    with caplog.at_level(logging.INFO):
        stops = [callbacks.tell(event) for event in STORY]
    assert [stop for stop in stops if stop] == [Stop("enough")]
    assert by_name.told == [11, 12]
    assert everything.told == [event.name for event in STORY]
    assert "ByName ends training: enough" in caplog.text


def test_a_method_of_no_event_is_refused_when_it_is_written():
    with pytest.raises(InvalidRequestError, match=r"Wrong.on_evaluate: no event.*do you mean on_evaluated"):

        class Wrong(Callback):
            def on_evaluate(self, event): ...


class Breaks(Callback):
    def __init__(self, *names):
        self.names = names

    def on(self, event):
        if event.name in self.names:
            raise ZeroDivisionError(event.name)


def test_what_a_callback_raises_comes_out_with_its_name():
    with pytest.raises(ZeroDivisionError) as error:
        Callbacks([Breaks("step")]).tell(Step())
    assert error.value.__notes__ == ["raised by callback Breaks when told of step"]


@pytest.mark.parametrize("event", [Done(), Stopped()])
def test_everybody_hears_of_the_end_before_an_error_comes_out(event):
    everything = Everything()
    with pytest.raises(ZeroDivisionError):
        Callbacks([Breaks("done", "stopped"), everything]).tell(event)
    assert everything.told == [event.name]


def test_of_a_failed_run_the_failure_comes_out(caplog):
    everything = Everything()

    def fail():
        with Callbacks([Breaks("failed"), everything]) as callbacks:
            callbacks.tell(Failed(error=KeyError("x")))
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert everything.told == ["failed"]
    assert everything.closed
    assert "told of a failure" in caplog.text


@pytest.mark.parametrize("returned", [True, Stop, "stop"])
def test_what_is_returned_must_be_a_stop(returned):
    class Returns(Callback):
        def on_step(self, event):
            return returned

    with pytest.raises(InvalidRequestError, match="may return a Stop"):
        Callbacks([Returns()]).tell(Step())


@pytest.mark.parametrize("given_", [print, EarlyStopping])
def test_callbacks_are_callbacks(given_):
    with pytest.raises(InvalidRequestError, match="instances of Callback"):
        Callbacks([given_])


def test_what_would_be_the_same_from_all_only_the_chief_says():
    class Chief(Everything):
        chief_only = True

    chief, all_of_them = Chief(), Everything()
    Callbacks([chief, all_of_them], chief=False).tell(Step())
    assert (chief.told, all_of_them.told) == ([], ["step"])


# ---- early stopping ------------------------------------------------------------------------------------------------


def evaluations(values, metric=AUC):
    return [Evaluated(step=step, metrics={metric: value}) for step, value in enumerate(values)]


@given(
    values=st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, math.nan]), max_size=12),
    patience=st.integers(0, 3),
    min_delta=st.sampled_from([0.0, 0.07]),
    mode=st.sampled_from(["max", "min"]),
    cut=st.integers(0, 12),
)
def test_early_stopping_counts_evaluations_without_improvement(values, patience, min_delta, mode, cut):
    # Written out: the index at which training ends, or None.
    best, waited, wanted = None, 0, None
    for index, value in enumerate(values):
        gain = None if best is None else (value - best if mode == "max" else best - value)
        if not math.isnan(value) and (gain is None or gain > min_delta):
            best, waited = value, 0
        elif (waited := waited + 1) > patience:
            wanted = index
            break
    stopping = EarlyStopping(AUC, patience, mode=mode, min_delta=min_delta)
    found = None
    for index, event in enumerate(evaluations(values)):
        if index == cut:  # a resumed run goes on counting
            state = json.loads(json.dumps(Callbacks([stopping]).state_dict()))
            stopping = EarlyStopping(AUC, patience, mode=mode, min_delta=min_delta)
            Callbacks([stopping]).load_state_dict(state)
        if stopping.on_evaluated(event) is not None:
            found = index
            break
    assert found == wanted


def test_early_stopping_knows_what_is_better_by_the_name():
    losses = EarlyStopping("valid/loss")
    assert losses.on_evaluated(Evaluated(metrics={"valid/loss": 0.5})) is None
    assert losses.on_evaluated(Evaluated(metrics={"valid/loss": 0.4})) is None
    stop = losses.on_evaluated(Evaluated(metrics={"valid/loss": 0.6}))
    assert stop == Stop("valid/loss has not improved for 1 evaluations: 0.6, the best was 0.4")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EarlyStopping("click/calibration"), "give mode"),
        (lambda: EarlyStopping(AUC, -1), "patience=-1"),
        (lambda: EarlyStopping(AUC, min_delta=-0.1), "min_delta=-0.1"),
        (lambda: EarlyStopping(AUC, mode="best"), "mode='best'"),
        (lambda: BestByMetric(AUC, count=0), "count=0"),
        (
            lambda: EarlyStopping("valid/clik/auc").on_evaluated(Evaluated(metrics={AUC: 1.0})),
            "no such figure, but valid/click/auc; do you mean",
        ),
        (lambda: EarlyStopping(AUC).on_evaluated(Evaluated()), "there is no evaluation"),
        (lambda: TensorBoard(every=0), "every=0"),
        (lambda: Profiler("d", active=0), "active=0"),
    ],
)
def test_impossible_callbacks_are_refused(make, said):
    with pytest.raises(InvalidRequestError, match=said):
        make()


# ---- the best checkpoints ------------------------------------------------------------------------------------------


def test_the_best_checkpoints_are_known_whichever_came_first():
    best = BestByMetric(AUC, count=2)
    for step, value, order in ((1, 0.5, "es"), (2, 0.7, "se"), (3, 0.6, "es"), (4, 0.4, "se"), (5, 0.7, "es")):
        for each in order:
            if each == "s":
                best.on_saved(Saved(path=f"p{step}", step=step))
            else:
                best.on_evaluated(Evaluated(step=step, metrics={AUC: value}))
    assert [(each.path, each.value) for each in best.best] == [("p2", 0.7), ("p5", 0.7)]
    best.on_saved(Saved(path="p6", step=6))
    best.on_evaluated(Evaluated(step=6, metrics={AUC: 0.1}))
    assert best.paths == {"p2", "p5", "p6"}, "the newest may yet be evaluated"
    best.on_saved(Saved(path="d7", step=7, dense_only=True))
    assert best.paths == {"p2", "p5", "p6"}
    again = BestByMetric(AUC, count=2)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again.best == best.best


def test_a_checkpoint_without_an_evaluation_is_none_of_the_best():
    best = BestByMetric("valid/loss")
    best.on_saved(Saved(path="a", step=1))
    assert best.best == ()
    best.on_evaluated(Evaluated(step=2, metrics={"valid/loss": math.nan}))
    best.on_saved(Saved(path="b", step=2))
    assert best.best == ()
    assert best.paths == {"b"}


# ---- written down --------------------------------------------------------------------------------------------------


def test_lines_of_json_appear_whole_and_the_last_step_is_among_them(tmp_path):
    clock = iter(range(100))
    lines = JsonLines(tmp_path / "sub" / "events-{rank}.jsonl", every_s=50.0, clock=lambda: float(next(clock)))
    steps = [Step(step=step, loss=float(step)) for step in range(10)]
    begun = [Restored(path="c"), Started(rank=3, world_size=4)]
    tell_story(lines, story=[*begun, *steps, Evaluated(metrics={"a": 1.0}), Done(step=9)])
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["events-3.jsonl"]
    written = [json.loads(line) for line in (tmp_path / "sub" / "events-3.jsonl").read_text().splitlines()]
    assert [(each["event"], each["step"]) for each in written] == [
        ("restored", 0),
        ("started", 0),
        ("step", 0),
        ("evaluated", 0),
        ("step", 9),
        ("done", 9),
    ]
    assert {each["rank"] for each in written} == {3}
    assert [each["time"] for each in written] == [0.0, 1.0, 2.0, 12.0, 11.0, 13.0], "a step has the time of its end"


class Figures(dict):
    """Metrics of a step, which take a while to work out: who looks is counted."""

    looks = 0

    def items(self):
        self.looks += 1
        return super().items()


@pytest.mark.parametrize(
    "make",
    [
        lambda out: JsonLines(out / "events.jsonl", every_s=50.0, clock=lambda: 0.0),
        lambda out: ProgressBars(Console(file=io.StringIO()), every_s=50.0),
        lambda out: ProgressBars(Console(file=io.StringIO(), force_terminal=True), style="bars", every_s=50.0),
        lambda out: Prometheus(CollectorRegistry(), every_s=50.0),
    ],
)
def test_figures_of_a_step_are_worked_out_only_where_they_are_shown(tmp_path, make):
    steps = [Step(step=step, metrics=Figures(auc=0.5)) for step in range(4)]
    with Callbacks([make(tmp_path)]) as callbacks:
        for event in (Started(), *steps):
            callbacks.tell(event)
    assert [step.metrics.looks for step in steps] == [1, 0, 0, 0]


def shown(terminal, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    tell_story(ProgressBars(console, **options))
    return out.getvalue()


def test_progress_is_lines_where_there_is_no_terminal():
    text = shown(False, every_s=0.0)
    assert "step 1 of 4  loss 0.5000  auc 0.6000  100 samples/s" in text
    assert "step 12: valid/click/auc 0.7000  valid/loss 0.4000" in text
    assert "goes on from d/step-10, step 10" in text
    assert "PS 1 is back from d/step-10, 2 steps earlier (step 10); going on" in text
    assert "checkpoint failed: disk full" in text
    assert "done: step 12, 16 samples, 90 samples/s" in text


def test_progress_is_a_bar_on_a_terminal():
    text = shown(True)
    assert "2/4" in text
    assert "ctr" in text
    assert "━" in text


def test_lines_of_progress_are_apart():
    assert shown(False, every_s=1000.0).count("samples/s") == 2  # the first step, and the end


def test_prometheus_shows_the_run_and_takes_its_metrics_back():
    registry = CollectorRegistry()
    for _ in range(2):  # a second run of the process begins anew
        with Callbacks([Prometheus(registry)]) as callbacks:
            for event in STORY:
                callbacks.tell(event)
            value = registry.get_sample_value
            assert value("trilith_train_samples_total") == 16
            assert value("trilith_train_steps_total") == 2
            assert value("trilith_train_skipped_steps_total") == 1
            assert value("trilith_train_step") == 12
            assert math.isnan(value("trilith_train_loss"))
            assert value("trilith_train_metric", {"metric": AUC}) == 0.7
            assert value("trilith_train_phase_seconds_count", {"phase": "data"}) == 2
            assert value("trilith_train_phase_seconds_sum", {"phase": "data"}) == pytest.approx(0.003)
            assert value("trilith_train_saves_total", {"result": "failed"}) == 1
            assert value("trilith_train_shard_restarts_total") == 1
        assert list(registry.collect()) == []


def test_a_profile_is_a_trace_file(tmp_path):
    profiler = Profiler(tmp_path / "traces", skip=2, active=2)
    with Callbacks([profiler]) as callbacks:
        callbacks.tell(Started(rank=1, world_size=2))
        for step in range(6):
            torch.ones(8).sum()
            callbacks.tell(Step(step=step))
    assert [path.name for path in profiler.traces] == ["rank-1-0.json"]
    assert json.loads(profiler.traces[0].read_text())["traceEvents"]
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank-1-0.json"]


# ---- packages of extras --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "make"),
    [("tensorboard", TensorBoard), ("wandb", lambda: WandB("p")), ("mlflow", lambda: Mlflow("e"))],
)
def test_a_missing_package_is_one_line_before_training(module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"trilith\[{module}\]"):
        Callbacks([make()]).tell(STORY[0])


def test_tensorboard_has_the_scalars(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package itself
        optional("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tell_story(TensorBoard(str(tmp_path), every=1))
        found = EventAccumulator(str(tmp_path))
        found.Reload()
        assert [(each.step, each.value) for each in found.Scalars(AUC)] == [(12, pytest.approx(0.7))]
        assert [each.step for each in found.Scalars("seconds/data")] == [11, 12]
        assert found.Scalars("train/click/loss")[0].value == 0.5


def test_wandb_has_the_scalars_without_a_network(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optional("wandb")
        monkeypatch.setenv("WANDB_SILENT", "true")
        tell_story(WandB("shop", every=1, mode="offline", dir=str(tmp_path)))
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # its own process writes the file
    while AUC.encode() not in run.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_mlflow_has_the_scalars_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs mlflow itself, not the client alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optional("mlflow")
        from mlflow import MlflowClient

        uri = (tmp_path / "runs").as_uri()
        tell_story(Mlflow("shop", tracking_uri=uri, every=1))
        client = MlflowClient(tracking_uri=uri)
        runs = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"]
        assert runs[0].data.metrics[AUC] == 0.7
        assert runs[0].data.params["epochs"] == "2"
        assert [each.step for each in client.get_metric_history(runs[0].info.run_id, "seconds/data")] == [11, 12]

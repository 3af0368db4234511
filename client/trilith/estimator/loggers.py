"""Callbacks that write down or show how a run goes: lines of JSON, bars, TensorBoard, Prometheus, traces, trackers."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from trilith.errors import InvalidRequestError, UnavailableError
from trilith.estimator.callbacks import Callback
from trilith.estimator.config import RunConfig
from trilith.estimator.events import (
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
    Stopped,
)
from trilith.runtime.exposure import warn_if_exposed
from trilith.runtime.extras import need

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = [
    "JsonLines",
    "Mlflow",
    "Profiler",
    "ProgressBars",
    "Prometheus",
    "TensorBoard",
    "WandB",
    "callbacks_of",
    "serve_metrics",
]


_BARS_EVERY_S = 0.5
"""Seconds between two looks at the figures beside a bar."""


class JsonLines(Callback):
    """Appends events to a file, a JSON object per line with "time" (Unix seconds), "rank" and "event".

    Lines appear whole, so that several processes may append to one file. Of steps, which are many, one in `every_s` is
    written, and the last.

    Args:
        path: The file; {rank} in it stands for the rank.
        every_s: Seconds between two steps; 0: all are written.
        clock: Source of Unix seconds.
    """

    def __init__(self, path: str | Path, *, every_s: float = 2.0, clock: Callable[[], float] = time.time) -> None:
        self._path = str(path)
        self._every_s = every_s
        self._clock = clock
        self._file: IO[str] | None = None
        self._rank = 0
        self._restored: list[tuple[float, Restored]] = []
        """What comes before it is known whose file it is."""
        self._written = -math.inf
        self._unwritten: tuple[float, Step] | None = None

    def on(self, event: Event) -> None:
        """Write it."""
        now = self._clock()
        if isinstance(event, Started):
            self._rank = event.rank
        elif isinstance(event, Restored) and self._file is None:
            self._restored.append((now, event))
            return
        while self._restored:
            self._write(*self._restored.pop(0))
        if isinstance(event, Step):
            self._unwritten = (
                now,
                event,
            )  # its figures are worked out if it is written, which would slow most steps down
            if now - self._written < self._every_s:
                return
            self._written = now
        elif self._unwritten is not None and isinstance(event, Done | Stopped | Failed):
            self._write(*self._unwritten)
        if isinstance(event, Step | Done | Stopped | Failed):
            self._unwritten = None
        self._write(now, event)

    def _write(self, moment: float, event: Event) -> None:
        line = {"time": moment, "rank": self._rank, **event.as_dict()}
        if self._file is None:
            path = Path(self._path.replace("{rank}", str(self._rank)))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class ProgressBars(Callback):
    """Shows steps, loss, figures and speed: a bar on a terminal, a line now and then anywhere else.

    Args:
        console: Where; None: standard error.
        style: "bars", "lines", or "auto" for bars where there is a terminal.
        every_s: Seconds between two lines.
        clock: Source of seconds.
    """

    chief_only = True

    def __init__(
        self,
        console: Console | None = None,
        *,
        style: Literal["auto", "bars", "lines"] = "auto",
        every_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._style = style
        self._every_s = every_s
        self._clock = clock
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._said = -math.inf
        self._total: int | None = None

    def on_started(self, event: Started) -> None:
        """Draw the bar."""
        from rich.console import Console

        self._console = self._console or Console(stderr=True)
        self._total = event.total_steps
        if self._style == "bars" or (self._style == "auto" and self._console.is_terminal):
            self._bars = _bars(self._console)
            self._task = self._bars.add_task(event.config.name or "training", total=event.total_steps, figures="")
            self._bars.start()

    def on_step(self, event: Step) -> None:
        """Move the bar, or print a line; figures, which take a while to work out, are looked at now and then."""
        now, every_s = self._clock(), self._every_s if self._bars is None else _BARS_EVERY_S
        due = now - self._said >= every_s
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=event.own_step)
            if due:
                self._bars.update(self._task, figures=_figures(event))
        elif due:
            of = "" if self._total is None else f" of {self._total:,}"
            self.say(f"step {event.own_step:,}{of}  {_figures(event)}")
        if due:
            self._said = now

    def on_evaluated(self, event: Evaluated) -> None:
        """Print its figures."""
        self.say(f"step {event.step:,}: " + "  ".join(_short(*each) for each in event.metrics.items()))

    def on_restored(self, event: Restored) -> None:
        """Say from where training goes on."""
        self.say(f"{'begins with' if event.warm_start else 'goes on from'} {event.path}, step {event.step:,}")

    def on_shard_restarted(self, event: ShardRestarted) -> None:
        """Say it."""
        self.say(f"PS {event.shard} restarted" if event.shard >= 0 else "a PS restarted")

    def on_rows_rejoined(self, event: RowsRejoined) -> None:
        """Say what was lost."""
        self.say(
            f"PS {event.shard} is back from {event.restored_from or 'nothing'}, {event.steps_back:,} steps earlier "
            f"(step {event.restored_step:,}); going on"
        )

    def on_save_failed(self, event: SaveFailed) -> None:
        """Say why."""
        self.say(f"checkpoint failed: {event.error}")

    def on_exported(self, event: Exported) -> None:
        """Say where."""
        self.say(f"exported to {event.path}")

    def on_stopped(self, event: Stopped) -> None:
        """Say why."""
        self.say(f"stopped at step {event.step:,}" + (f": {event.reason}" if event.reason else ""))

    def on_done(self, event: Done) -> None:
        """Say how fast it was."""
        self.say(f"done: step {event.step:,}, {event.samples:,} samples, {event.samples_per_s:,.0f} samples/s")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._console is not None:
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),  # on a narrow terminal the bar gives way
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=console.is_terminal,
    )


def _figures(event: Step) -> str:
    metrics = "".join(f"{_short(*each)}  " for each in list(event.metrics.items())[:2])
    return f"loss {event.loss:.4f}  {metrics}{event.samples_per_s:,.0f} samples/s"


def _short(name: str, value: float) -> str:
    return f"{name} {value:.4f}"


# ---- Prometheus ----------------------------------------------------------------------------------------------------


_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)

_GAUGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "loss": ("loss", "Loss of the newest step.", ()),
    "metric": (
        "metric",
        "Figures of the newest samples, and by part/head/metric those of the last evaluation.",
        ("metric",),
    ),
    "rate": ("samples_per_second", "Samples per second of this worker.", ()),
    "step": ("step", "Steps of all workers, as far as this one knows.", ()),
    "epoch": ("epoch", "The pass over the data, from 0.", ()),
    "newest": ("last_step_timestamp_seconds", "When the newest step was done.", ()),
    "save_seconds": ("save_seconds", "What the newest checkpoint took.", ()),
}
_COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "samples": ("samples", "Samples that this worker has trained on.", ()),
    "steps": ("steps", "Steps of this worker since it started.", ()),
    "skipped": ("skipped_steps", "Steps left out because a loss or gradient was not finite.", ()),
    "saves": ("saves", "Checkpoints by result, ok or failed.", ("result",)),
    "exports": ("exports", "Exports.", ()),
    "restarts": ("shard_restarts", "Restarts of PS that this worker has met.", ()),
}


class Prometheus(Callback):
    """Keeps the figures of this worker's run as metrics of the process, for whoever serves them; see docs/metrics.md.

    Args:
        registry: Where they are registered while the run goes on; None: where the client's own metrics are.
        every_s: Seconds between two looks at the figures of the newest samples.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, every_s: float = 2.0) -> None:
        self._registry = registry
        self._every_s = every_s
        self._looked = -math.inf
        self._collectors: dict[str, Any] = {}
        self._samples = 0
        self._skipped = 0

    def register(self) -> None:
        """Register the metrics; the run's start does, unless it is done."""
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        if self._collectors:
            return
        registry = self._registry = self._registry or REGISTRY
        for kind, declared in ((Gauge, _GAUGES), (Counter, _COUNTERS)):
            for key, (name, meaning, labels) in declared.items():
                self._collectors[key] = kind(f"trilith_train_{name}", meaning, labels, registry=registry)
        self._collectors["phase"] = Histogram(
            "trilith_train_phase_seconds",
            "What a step spent on what; data is waiting for the batch.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )

    def on_started(self, event: Started) -> None:
        """Register the metrics."""
        self.register()
        self._collectors["epoch"].set(event.epoch)
        self._collectors["step"].set(event.step)

    def on_step(self, event: Step) -> None:
        """Count it."""
        of = self._collectors
        of["loss"].set(event.loss)
        of["step"].set(event.step)
        of["epoch"].set(event.epoch)
        of["rate"].set(event.samples_per_s)
        of["newest"].set_to_current_time()
        of["steps"].inc()
        of["samples"].inc(max(event.samples - self._samples, 0))
        of["skipped"].inc(max(event.skipped - self._skipped, 0))
        self._samples, self._skipped = event.samples, event.skipped
        if (now := time.monotonic()) - self._looked >= self._every_s:
            self._looked = now
            for name, value in event.metrics.items():
                of["metric"].labels(name).set(value)
        for phase, seconds in event.seconds.items():
            of["phase"].labels(phase).observe(seconds)

    def on_evaluated(self, event: Evaluated) -> None:
        """Show its figures."""
        for name, value in event.metrics.items():
            self._collectors["metric"].labels(name).set(value)

    def on_saved(self, event: Saved) -> None:
        """Count it."""
        self._collectors["saves"].labels("ok").inc()
        self._collectors["save_seconds"].set(event.seconds)

    def on_save_failed(self, event: SaveFailed) -> None:
        """Count it."""
        self._collectors["saves"].labels("failed").inc()

    def on_exported(self, event: Exported) -> None:
        """Count it."""
        self._collectors["exports"].inc()

    def on_shard_restarted(self, event: ShardRestarted) -> None:
        """Count it."""
        self._collectors["restarts"].inc()

    def close(self) -> None:
        """Take the metrics back, so that the next run of this process has its own."""
        collectors, self._collectors = self._collectors, {}
        for each in collectors.values():
            if self._registry is not None:
                self._registry.unregister(each)


# ---- scalars by step: TensorBoard, W&B, MLflow ---------------------------------------------------------------------


class _Scalars(Callback, ABC):
    """Hands numbers by name and step on: of one step in `every`, and of all evaluations."""

    chief_only = True

    def __init__(self, every: int) -> None:
        if every < 1:
            raise InvalidRequestError(
                f"{type(self).__name__}(every={every}): one step in so many is written, at least 1"
            )
        self._every = every

    @abstractmethod
    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of a step of all workers."""

    def on_step(self, event: Step) -> None:
        """Write loss, figures, rates and times."""
        if event.own_step % self._every:
            return
        scalars = {"train/loss": event.loss, "train/samples_per_s": event.samples_per_s, "train/epoch": event.epoch}
        scalars |= {f"train/{head}/loss": loss for head, loss in event.losses.items()}
        scalars |= {f"train/{name}": value for name, value in event.metrics.items()}
        scalars |= {f"rate/{group}": rate for group, rate in event.rates.items()}
        scalars |= {f"seconds/{phase}": seconds for phase, seconds in event.seconds.items()}
        scalars |= {"train/skipped": event.skipped} if event.skipped else {}
        self.write(scalars, event.step)

    def on_evaluated(self, event: Evaluated) -> None:
        """Write its figures."""
        self.write(event.metrics, event.step)

    def on_saved(self, event: Saved) -> None:
        """Write what it took."""
        self.write({"seconds/save": event.seconds}, event.step)

    def on_epoch(self, event: Epoch) -> None:
        """Write what it took."""
        self.write({"seconds/epoch": event.seconds}, event.step)


class TensorBoard(_Scalars):
    """Writes scalars for TensorBoard; the `tensorboard` extra brings the package.

    Args:
        directory: Where; empty: tensorboard in the run's model_dir, else in the working directory.
        every: One step in so many is written.
    """

    def __init__(self, directory: str = "", *, every: int = 10) -> None:
        super().__init__(every)
        self._directory = directory
        self._writer: Any = None

    def on_started(self, event: Started) -> None:
        """Open the files."""
        need("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        model_dir = event.config.model_dir
        directory = self._directory or (f"{model_dir.rstrip('/')}/tensorboard" if model_dir else "tensorboard")
        # What is written again after a restore takes the place of what was there.
        self._writer = SummaryWriter(directory, purge_step=event.step or None)
        self._writer.add_text("config", f"```json\n{event.config.to_json()}\n```", event.step)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WandB(_Scalars):
    """Writes scalars to Weights & Biases; the `wandb` extra brings the package.

    Args:
        project: Where the run belongs.
        name: Of the run; empty: the run's own, else W&B's choice.
        every: One step in so many is written.
        settings: What else `wandb.init` takes, such as mode="offline", dir, entity, tags.
    """

    def __init__(self, project: str, *, name: str = "", every: int = 10, **settings: Any) -> None:
        super().__init__(every)
        self._given = {"project": project, **settings}
        self._name = name
        self._run: Any = None
        self._failed = False

    def on_started(self, event: Started) -> None:
        """Open the run."""
        need("wandb", extra="wandb")
        import wandb

        name = self._name or event.config.name or None
        self._run = wandb.init(name=name, config=json.loads(event.config.to_json()), **self._given)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        self._run.log(dict(scalars), step=step)

    def on_failed(self, event: Failed) -> None:
        """Mark the run as failed."""
        self._failed = True

    def close(self) -> None:
        """Finish the run."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(self._failed))


class Mlflow(_Scalars):
    """Writes scalars to an MLflow tracking server or folder; the `mlflow` extra brings the package.

    Args:
        experiment: Where the run belongs; made if there is none of the name.
        tracking_uri: The server or folder; empty: what MLflow's environment variables say.
        name: Of the run; empty: the run's own, else MLflow's choice.
        every: One step in so many is written.
    """

    def __init__(self, experiment: str, *, tracking_uri: str = "", name: str = "", every: int = 10) -> None:
        super().__init__(every)
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._name = name
        self._client: Any = None
        self._run_id = ""
        self._status = "KILLED"

    def on_started(self, event: Started) -> None:
        """Open the run."""
        need("mlflow", extra="mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self._tracking_uri or None)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        self._run_id = client.create_run(experiment, run_name=self._name or event.config.name or None).info.run_id
        told = event.config.non_defaults()
        client.log_batch(self._run_id, params=[Param(name, str(value)[:500]) for name, value in told.items()])
        self._client = client

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def on_done(self, event: Done) -> None:
        """Mark the run as finished."""
        self._status = "FINISHED"

    def on_failed(self, event: Failed) -> None:
        """Mark the run as failed."""
        self._status = "FAILED"

    def close(self) -> None:
        """End the run; one that was stopped counts as killed."""
        client, self._client = self._client, None
        if client is not None:
            client.set_terminated(self._run_id, self._status)


# ---- traces --------------------------------------------------------------------------------------------------------


class Profiler(Callback):
    """Records some steps with torch.profiler, as traces for Perfetto or chrome://tracing.

    Args:
        directory: Where rank-<rank>-<number>.json files go.
        skip: Steps of this worker before the first record, which compile and warm caches.
        active: Steps recorded.
        repeat: Records, one after every `skip` steps.
        memory: Also record allocations.
    """

    def __init__(
        self, directory: str | Path, *, skip: int = 10, active: int = 3, repeat: int = 1, memory: bool = False
    ) -> None:
        for name, value in (("skip", skip), ("active", active), ("repeat", repeat)):
            if value < 1:
                raise InvalidRequestError(f"Profiler({name}={value}): it must be at least 1")
        self._directory = Path(directory)
        self._steps = (skip, active, repeat)
        self._memory = memory
        self._profiler: Any = None
        self._rank = 0
        self.traces: list[Path] = []
        """Files written so far."""

    def on_started(self, event: Started) -> None:
        """Begin to count steps."""
        from torch import profiler

        skip, active, repeat = self._steps
        self._rank = event.rank
        self._profiler = profiler.profile(
            schedule=profiler.schedule(wait=skip - 1, warmup=1, active=active, repeat=repeat),
            on_trace_ready=self._write,
            profile_memory=self._memory,
        )
        self._profiler.start()

    def on_step(self, event: Step) -> None:
        """Count it."""
        self._profiler.step()

    def _write(self, profiler: Any) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank}-{len(self.traces)}.json"
        fresh = path.with_suffix(f".{os.getpid()}")
        profiler.export_chrome_trace(str(fresh))
        fresh.replace(path)
        self.traces.append(path)

    def close(self) -> None:
        """Write a record that is not whole yet."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()


# ---- by a run's settings -------------------------------------------------------------------------------------------


def callbacks_of(run: RunConfig) -> list[Callback]:
    """What a run's own settings ask for: `events`, `progress`, `metrics_port`."""
    found: list[Callback] = []
    if run.events:
        found.append(JsonLines(run.events, every_s=run.log_every_s))
    if run.progress != "none":
        found.append(ProgressBars(style=run.progress, every_s=run.log_every_s))
    if run.metrics_port is not None:
        found.append(Prometheus())
    return found


def serve_metrics(host: str, port: int) -> Callable[[], None]:
    """Serve this process's metrics for Prometheus; returns what ends that.

    Raises:
        UnavailableError: The port is taken.
    """
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, host)
    except OSError as error:
        raise UnavailableError(f"metrics: cannot listen on {host}:{port}: {error.strerror or error}") from None
    warn_if_exposed("metrics of a job", host, server.server_port)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end

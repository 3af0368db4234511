"""`trilith demo`: trains a click model on MovieLens on a cluster of local processes, and the same model without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trilith.errors import InvalidRequestError
from trilith.runtime.extras import need
from trilith_services.commands import output
from trilith_services.commands.export import ExportMode
from trilith_services.commands.flags import Model, expanded
from trilith_services.options import option

if TYPE_CHECKING:
    from rich.console import Console

    from trilith.estimator import Callback, Estimator
    from trilith_services.commands.training_view import TrainingView
    from trilith_services.demo.baseline import Outcome
    from trilith_services.demo.clicks import Parts
    from trilith_services.local.supervisor import StopRequest, Supervisor

__all__ = ["DemoOptions", "register", "run_demo"]

SERVE_TIMEOUT_S = 600.0
"""On a machine that has never run Trilith the PS compile their kernels first."""

INTERRUPTED = 130

_JOBS = "trilith_services.demo.job"


class Mode(StrEnum):
    """Where the rows are."""

    ps = "ps"
    embedded = "embedded"
    all_to_all = "all-to-all"


@dataclass(slots=True, kw_only=True)
class DemoOptions:
    """What the demo does; what is left out is decided by the rest.

    Raises:
        InvalidRequestError: The mode has no PS, or no workers.
    """

    mode: Mode = option(
        None,
        "ps: rows on PS processes; embedded: everything in one process; all-to-all: rows in the workers.",
        show_default="ps",
    )
    num_ps: int = option(None, "PS processes of mode ps; 0: embedded.", least=0, metavar="N", show_default="2")
    workers: int = option(None, "Worker processes.", least=1, metavar="N", show_default="2, embedded 1")
    model: Model = option(Model.deepfm, "Reference model.")
    data: str = option("movielens", "movielens, or synthetic:SAMPLES for samples that are made up.", metavar="DATA")
    model_dir: Path = option(
        None,
        "Checkpoints and logs go here, and training starts from the newest checkpoint in it; left out: a new directory "
        "in the cache.",
        metavar="DIR",
    )
    epochs: int = option(0, "Passes over the data; 0: the model's own number.", least=0, metavar="N")
    steps: int = option(0, "End after so many steps, shared by the workers; 0: no limit.", least=0, metavar="N")
    batch_size: int = option(512, "Samples per step of a worker.", least=1, metavar="N")
    save_every: int = option(
        500, "Steps between checkpoints, shared by the workers; 0: one at the end.", least=0, metavar="N"
    )
    seed: int = option(0, "Decides initial values and the order of samples.", least=0, metavar="N")
    prefetch: int = option(0, "Batches whose rows are looked up ahead; 0: exact order.", least=0, metavar="N")
    async_push: int = option(0, "Updates that may be on their way; 0: wait for each.", least=0, metavar="N")
    baseline: bool = option(True, "Also train with plain torch, for comparison.")
    export: Path | None = option(None, "Every checkpoint is exported here, for `trilith serving entry`.", metavar="DIR")
    export_mode: ExportMode = option(
        ExportMode.distributed, "distributed: rows come from replicas; standalone: all rows are in the export."
    )

    def __post_init__(self) -> None:
        mode: Mode | None = self.mode
        num_ps: int | None = self.num_ps
        workers: int | None = self.workers
        self.mode = Mode(mode) if mode else (Mode.embedded if num_ps == 0 else Mode.ps)
        if num_ps is not None and (self.mode is Mode.ps) != (num_ps != 0):
            raise InvalidRequestError(f"--mode {self.mode} with --num-ps {num_ps}: only mode ps has PS processes")
        if self.mode is Mode.embedded and workers not in (None, 1):
            raise InvalidRequestError(f"--workers {workers} in mode embedded: one process does everything")
        self.num_ps = (num_ps or 2) if self.mode is Mode.ps else 0
        self.workers = workers or (1 if self.mode is Mode.embedded else 2)
        if self.model_dir is None:
            from trilith_services.demo.movielens import cache_dir

            self.model_dir = cache_dir() / "demo" / time.strftime("%Y%m%d-%H%M%S")
        self.model_dir = self.model_dir.absolute()
        self.model = Model(self.model)

    @property
    def job(self) -> str:
        """Name of the job in `trilith_services.demo.job`: workers that hold the rows take each step together."""
        return f"{self.model.value}_in_step" if self.mode is Mode.all_to_all else self.model.value

    def make(self, *callbacks: Callback) -> Estimator:
        """The job."""
        from trilith_services.demo import job as jobs

        job: Estimator = getattr(jobs, self.job)(*callbacks)
        return job

    def sets(self) -> Iterator[str]:
        """What one worker of the job does, as fields of its run, "name=value" each."""
        names = ("model_dir", "seed", "prefetch", "async_push")
        yield from (f"{name}={getattr(self, name)}" for name in names)
        # In step, each step is one of all workers.
        together = self.workers if self.mode is Mode.all_to_all else 1
        yield from (f"steps={-(-self.steps // self.workers)}", f"save_every={-(-self.save_every // together)}")
        yield from (f"params_override.{name}={getattr(self, name)}" for name in ("data", "batch_size"))
        yield from (f"params_override.user.seed={self.seed}", "progress=none")
        if self.epochs:
            yield f"epochs={self.epochs}"
        if self.export is not None:
            yield from (f"export_dir={self.export.absolute()}", f"export_mode={self.export_mode.value}")
            yield "export_every_save=true"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """What a cluster run came to."""

    auc: float
    samples_per_s: float
    rows: int
    checkpoint: str


class _InterruptedError(Exception):
    """Somebody asked for the end."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(expanded(demo))


def demo(config: DemoOptions) -> None:
    """Train a click model on MovieLens with PS and worker processes of this machine, and say how good it is."""
    need("torch", extra="torch")
    if config.export is not None:
        need("safetensors", extra="serving")
    raise typer.Exit(run_demo(config))


def run_demo(options: DemoOptions, console: Console | None = None) -> int:
    """Run it; returns the exit status.

    Samples per second are counted alike for the cluster and for plain torch: of each trainer from its first step to its
    last, evaluations after each epoch and what it saves meanwhile included, the start and the last evaluation not.

    Raises:
        TrilithError: A process could not start or kept dying, or the data could not be had.
    """
    from trilith_services.demo.datasets import load_dataset
    from trilith_services.local.supervisor import StopRequest

    console = console or output.console()
    goes_on = _check_model_dir(options)
    with StopRequest() as stop:
        parts = load_dataset(options.data, report=lambda line: console.print(line, highlight=False))
        run = _Run(options, parts, console, stop)
        console.print(
            f"{options.data}: {len(parts.train):,} samples to train on, {len(parts.validation):,} to validate, "
            f"{len(parts.test):,} to test; {len(parts.train.features)} features; model {options.model}, "
            f"{run.epochs} epochs",
            highlight=False,
        )
        if goes_on:
            console.print(goes_on, highlight=False, soft_wrap=True)
        try:
            how = {Mode.ps: run.processes, Mode.embedded: run.embedded, Mode.all_to_all: run.all_to_all}
            result = how[options.mode]()
            base = run.baseline() if options.baseline else None
        except _InterruptedError:
            console.print("stopped, as asked")
            return INTERRUPTED
    table = output.grid("", ">test auc", ">samples/s", ">rows")
    where = {
        Mode.ps: f"{options.num_ps} PS, {output.plural(options.workers, 'worker')}",
        Mode.embedded: "embedded",
        Mode.all_to_all: f"{output.plural(options.workers, 'worker')}, all-to-all",
    }[options.mode]
    table.add_row(where, f"{result.auc:.4f}", f"{result.samples_per_s:,.0f}", f"{result.rows:,}")
    if base is not None:
        console.print("the same model, data, epochs and optimizer:")
        name = f"plain torch, 1 process, {output.plural(base.threads, 'thread')}"
        table.add_row(name, f"{base.auc:.4f}", f"{base.samples_per_s:,.0f}", f"{base.rows:,}")
    console.print(table)
    console.print(f"checkpoint: {result.checkpoint}", highlight=False, soft_wrap=True)
    base_auc = f"{base.auc:.4f}" if base is not None else "nan"
    base_rate = f"{base.samples_per_s:.0f}" if base is not None else "nan"
    typer.echo(
        f"demo: auc={result.auc:.4f} baseline_auc={base_auc} samples_per_s={result.samples_per_s:.0f} "
        f"baseline_samples_per_s={base_rate} rows={result.rows} ps={options.num_ps} workers={options.workers}"
    )
    return 0


def _check_model_dir(options: DemoOptions) -> str:
    """Say from where the run goes on, if there are checkpoints; refuse those of a run that was told otherwise."""
    from trilith.checkpoint import newest_complete
    from trilith.estimator.state import is_job, read_job
    from trilith_services.demo import job as jobs

    newest = newest_complete(str(options.model_dir))
    if newest is None:
        return ""
    job = read_job(newest.path) if is_job(newest.path) else None
    models = {type(getattr(jobs, model.value)().task).__name__: model for model in Model}
    if job is None or job.task not in models:
        raise InvalidRequestError(f"--model-dir {options.model_dir} has checkpoints of no demo; name another directory")
    mode: Mode = Mode.embedded if options.mode is Mode.all_to_all else options.mode  # one worker may be in either
    if job.run["cluster"].startswith("peers://"):
        mode = Mode.all_to_all
    elif job.world_size > 1:
        mode = Mode.ps
    task = {"data": jobs.ClickTask.data, "user.seed": jobs.ClickTask.user.seed} | job.run["params_override"]
    wanted = {"model": models[job.task], "mode": mode, "workers": job.world_size}
    wanted |= {"data": task["data"], "seed": task["user.seed"]}
    other = " ".join(f"--{name} {value}" for name, value in wanted.items() if getattr(options, name) != value)
    if other:
        raise InvalidRequestError(
            f"--model-dir {options.model_dir} has checkpoints of a demo with {other}: say so, too, or name another "
            "directory"
        )
    return f"goes on from {newest.path}, step {job.step:,}"


class _Run:
    """A run on a cluster of processes or in this process, and the one without a cluster."""

    def __init__(self, options: DemoOptions, parts: Parts, console: Console, stop: StopRequest) -> None:
        self._options = options
        self._parts = parts
        self._console = console
        self._stop = stop
        self._run_dir = options.model_dir / "runs" / time.strftime("%Y%m%d-%H%M%S")
        self.epochs = self._job("local://").run.epochs
        """Passes over the data."""

    def _job(self, cluster: str, *callbacks: Callback, events: Path | None = None) -> Estimator:
        """The job in this process."""
        from trilith_services.commands.training_view import LOOK_S

        job = self._options.make(*callbacks)
        sets = [*self._options.sets(), f"cluster={cluster}", "rank=0", "world_size=1"]
        if events is not None:
            sets += [f"events={events}", f"log_every_s={LOOK_S}"]
        return job.configure(job.run.overridden(sets=sets))

    def processes(self) -> _Result:
        """PS and workers as processes, watched until the workers are done."""
        from rich.console import Console

        from trilith.runtime.waiting import Wait
        from trilith_services.local.supervisor import PsCluster, Supervisor

        options, console = self._options, self._console
        # What the processes log goes to files; the display shows what they report.
        with Supervisor(Console(quiet=True), self._run_dir) as supervisor:
            cluster = PsCluster(
                supervisor,
                options.num_ps,
                restore_from=str(options.model_dir),
                arguments=["--threads", str(_share(options.num_ps))],
            )
            self._say_starting(f"{options.num_ps} PS and {output.plural(options.workers, 'worker')}")
            waiting = Wait(
                f"{options.num_ps} PS to serve (their logs are in {self._run_dir})",
                most=SERVE_TIMEOUT_S,
                say=console.print,
            )
            with console.status("waiting for the PS"), waiting:
                served = cluster.start(timeout_s=SERVE_TIMEOUT_S, cancelled=lambda: bool(self._stop))
            if not served:
                raise _InterruptedError
            return self._finish(self._watch(supervisor, cluster.address), cluster.address)

    def all_to_all(self) -> _Result:
        """Workers as processes that hold the rows themselves; their last checkpoint is what is scored."""
        from rich.console import Console

        from trilith_services.local.supervisor import Supervisor

        with Supervisor(Console(quiet=True), self._run_dir) as supervisor:
            self._say_starting(f"{output.plural(self._options.workers, 'worker')} that hold the rows")
            view = self._watch(supervisor, "peers://")
        return self._finish(view, "local://")

    def embedded(self) -> _Result:
        """PS and worker in this process."""
        self._console.print("embedded: PS and worker in this process")
        with self._view("embedded") as view:
            job = self._job("local://", view.callback(), events=self._events("embedded"))
            with job:
                job.train()
                view.look()
                if view.stopped or self._stop:
                    raise _InterruptedError
                return self._scored(job, view)

    def _say_starting(self, what: str) -> None:
        from trilith.ops.jit import cache_directory

        self._console.print(f"starting {what}; logs in {self._run_dir}", soft_wrap=True)
        if not cache_directory().is_dir():
            self._console.print("on a machine's first run they compile their kernels, which takes a few minutes")

    def _events(self, name: str) -> Path:
        return self._run_dir / f"{name}.jsonl"

    def _view(self, *names: str) -> TrainingView:
        """Shows trainers, each of which has its share of the samples."""
        from trilith_services.commands.training_view import TrainingView

        samples, steps = (-(-number // len(names)) for number in (len(self._parts.train), self._options.steps))
        total = -(-samples // self._options.batch_size) * self.epochs
        files = {name: self._events(name) for name in names}
        return TrainingView(self._console, files, min(total, steps) if steps else total)

    def _watch(self, supervisor: Supervisor, cluster: str) -> TrainingView:
        """Start workers, and show what they do until they are done."""
        from trilith_services.commands.training_view import LOOK_S
        from trilith_services.local.workers import start_workers

        options = self._options
        sets = [*options.sets(), f"events={self._events('worker-{rank}')}", f"log_every_s={LOOK_S}"]
        with self._view(*(f"worker-{rank}" for rank in range(options.workers))) as view:
            try:
                start_workers(supervisor, f"{_JOBS}:{options.job}", options.workers, cluster=cluster, sets=sets)
                running = True
                while running:
                    running = bool(supervisor.running(prefix="worker-"))
                    if self._stop.wait(0.1):
                        raise _InterruptedError
                    running |= self._started_again(supervisor, view)
                    view.look()
            finally:
                # Before the PS: a worker whose PS is gone waits for it to come back.
                supervisor.stop(supervisor.running(prefix="worker-"))
        return view

    def _started_again(self, supervisor: Supervisor, view: TrainingView) -> bool:
        """Whether a process had died and was started again.

        Raises:
            UnavailableError: A process failed that is not started again.
        """
        from trilith.errors import UnavailableError

        again = False
        for ended in supervisor.poll():
            if ended.status and not ended.restarted:
                raise UnavailableError("\n".join([f"{ended.name} {ended.how}", *ended.tail[-15:]]))
            if ended.restarted:
                again = True
                view.say(f"{ended.name} {ended.how}; starting it again")
        return again

    def _finish(self, view: TrainingView, cluster: str) -> _Result:
        """Score the test part with what the workers have learned."""
        with self._job(cluster) as job:
            return self._scored(job, view)

    def _scored(self, job: Estimator, view: TrainingView) -> _Result:
        """Score the test part, and export the last checkpoint where nothing was left to train."""
        from trilith.estimator.keeping import newest_job

        newest = newest_job(str(self._options.model_dir))
        assert newest is not None  # the last act of training
        score = job.evaluate(self._parts.test.columns(4096))["click/auc"]
        if self._options.export is not None:
            exported = view.exported or job.export(checkpoint=newest)
            self._console.print(f"export: {exported}", highlight=False, soft_wrap=True)
        rows = sum(table.rows for shard in job.client.stats() for table in shard.tables)
        return _Result(auc=score, samples_per_s=view.samples_per_s, rows=rows, checkpoint=newest)

    def baseline(self) -> Outcome:
        """The same in this process, without a cluster."""
        from trilith.estimator import JsonLines
        from trilith.estimator.callbacks import Callbacks
        from trilith_services.commands.training_view import LOOK_S
        from trilith_services.demo.baseline import train_locally

        options = self._options
        self._console.print("the same with plain torch.nn.EmbeddingBag, in one process:")
        job = self._job("local://")
        job.task.override(job.run.params_override)
        with (
            self._view("torch") as view,
            Callbacks([JsonLines(self._events("torch"), every_s=LOOK_S), view.callback()]) as told,
        ):
            outcome = train_locally(
                job.task,
                self._parts,
                told.tell,
                seed=options.seed,
                batch_size=options.batch_size,
                epochs=self.epochs,
                steps=options.steps,
                stop=lambda: bool(self._stop),
            )
        if self._stop:
            raise _InterruptedError
        return outcome


def _share(processes: int) -> int:
    """Cores for each of so many processes."""
    from trilith.runtime.machine import cores

    return max(1, cores() // processes)

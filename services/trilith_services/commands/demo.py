"""`trilith demo`: trains a click model on MovieLens on a cluster of local processes, and the same model without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trilith.errors import InvalidRequestError
from trilith.runtime.extras import need
from trilith_services.commands import output
from trilith_services.commands.export import ExportMode
from trilith_services.commands.flags import Model, expanded
from trilith_services.options import argv_of, flags_of, like, option
from trilith_services.worker.config import Mode as Rows
from trilith_services.worker.config import WorkerConfig

if TYPE_CHECKING:
    from rich.console import Console

    from trilith_services.commands.export_saved import ExportSaved
    from trilith_services.demo.clicks import Parts
    from trilith_services.demo.models import ModelSettings
    from trilith_services.local.supervisor import StopRequest, Supervisor

__all__ = ["DemoOptions", "register", "run_demo"]

SERVE_TIMEOUT_S = 600.0
"""On a machine that has never run Trilith the PS compile their kernels first."""

INTERRUPTED = 130

_WORKERS = ("epochs", "batch_size", "save_every", "seed", "prefetch", "async_push")
"""Options of the demo that its workers have too."""


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
    steps: int = option(0, "End after so many steps of all workers; 0: no limit.", least=0, metavar="N")
    batch_size: int = like(WorkerConfig, "batch_size")
    save_every: int = option(500, "Steps of all workers between checkpoints; 0: none.", least=0, metavar="N")
    seed: int = like(WorkerConfig, "seed")
    prefetch: int = like(WorkerConfig, "prefetch")
    async_push: int = like(WorkerConfig, "async_push")
    baseline: bool = option(True, "Also train with plain torch, for comparison.")
    export: Path | None = option(None, "Every checkpoint is exported here, for `trilith serving entry`.", metavar="DIR")
    export_mode: ExportMode = option(
        ExportMode.distributed, "distributed: rows come from replicas; standalone: all rows are in the export."
    )

    def __post_init__(self) -> None:
        mode: Mode | None = self.mode
        num_ps: int | None = self.num_ps
        workers: int | None = self.workers
        self.mode = mode or (Mode.embedded if num_ps == 0 else Mode.ps)
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

    def worker(self, **where: Any) -> WorkerConfig:
        """What its workers do."""
        same = {each.name: getattr(self, each.name) for _, each in flags_of(self) if each.name in _WORKERS}
        return WorkerConfig(**same, model_dir=str(self.model_dir), steps=-(-self.steps // self.workers), **where)

    def sets(self) -> Iterator[str]:
        """What a job of `trilith_services.demo.job` does, as fields of its run, "name=value" each."""
        names = ("model_dir", "steps", "save_every", "seed", "prefetch", "async_push")
        yield from (f"{name}={getattr(self, name)}" for name in names)
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

    Raises:
        TrilithError: A process could not start or kept dying, or the data could not be had.
    """
    from trilith_services.demo.datasets import load_dataset
    from trilith_services.demo.models import settings_of
    from trilith_services.local.supervisor import StopRequest

    console = console or output.console()
    _check_model_dir(options)
    settings = settings_of(options.model, epochs=options.epochs or None)
    with StopRequest() as stop:
        parts = load_dataset(options.data, report=lambda line: console.print(line, highlight=False))
        console.print(
            f"{options.data}: {len(parts.train):,} samples to train on, {len(parts.validation):,} to validate, "
            f"{len(parts.test):,} to test; {len(parts.train.features)} features; model {options.model}, "
            f"{settings.epochs} epochs",
            highlight=False,
        )
        try:
            run = _Cluster(options, settings, parts, console, stop)
            how = {Mode.ps: run.processes, Mode.embedded: run.embedded, Mode.all_to_all: run.all_to_all}
            result = how[options.mode]()
            base = _baseline(options, settings, parts, console, stop) if options.baseline else None
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


def _check_model_dir(options: DemoOptions) -> None:
    """Refuse checkpoints of the other kind: an embedded run is an Estimator's job, whose layers have other names."""
    from trilith.checkpoint import newest_complete
    from trilith.estimator.state import is_job

    newest = newest_complete(str(options.model_dir))
    if newest is not None and is_job(newest.path) != (options.mode is Mode.embedded):
        of = "PS or of workers with rows" if options.mode is Mode.embedded else "an embedded demo"
        raise InvalidRequestError(f"--model-dir {options.model_dir} has checkpoints of {of}; name another directory")


def _baseline(options: DemoOptions, settings: ModelSettings, parts: Parts, console: Console, stop: StopRequest) -> Any:
    from trilith_services.commands.training_view import TrainingView
    from trilith_services.demo.baseline import train_locally

    console.print("the same with plain torch.nn.EmbeddingBag, in one process:")
    with TrainingView(console, ["torch"]) as view:
        outcome = train_locally(
            settings,
            parts,
            view,
            seed=options.seed,
            batch_size=options.batch_size,
            steps=options.steps,
            stop=lambda: bool(stop),
        )
    if stop:
        raise _InterruptedError
    return outcome


class _Cluster:
    """The run on a cluster: of processes, or embedded."""

    def __init__(
        self, options: DemoOptions, settings: ModelSettings, parts: Parts, console: Console, stop: StopRequest
    ) -> None:
        self._options = options
        self._settings = settings
        self._parts = parts
        self._console = console
        self._stop = stop
        self._run_dir = options.model_dir / "runs" / time.strftime("%Y%m%d-%H%M%S")
        self._exports: ExportSaved | None = None
        if options.export is not None and options.mode is not Mode.embedded:
            from trilith_services.commands.export_saved import ExportSaved
            from trilith_services.demo.exporting import reference_exporter

            exporter = reference_exporter(settings, parts.train.features)
            directory = str(options.export.absolute())
            self._exports = ExportSaved(directory, options.export_mode.value, exporter, console.print)

    def _on_saved(self, event: dict[str, Any]) -> None:
        if self._exports is not None:
            self._exports(event)

    def processes(self) -> _Result:
        """PS and workers as processes, watched until the workers are done."""
        from rich.console import Console

        from trilith.connect import connect
        from trilith.runtime.waiting import Wait
        from trilith_services.commands.training_view import TrainingView
        from trilith_services.local.supervisor import PsCluster, Supervisor

        options, console = self._options, self._console
        # What the processes log goes to files; the display shows what they report.
        with Supervisor(Console(quiet=True), self._run_dir) as supervisor:
            cluster = PsCluster(
                supervisor,
                options.num_ps,
                checkpoint_dir=options.model_dir,
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
            with TrainingView(console, [f"worker-{rank}" for rank in range(options.workers)]) as view:
                try:
                    self._start_workers(supervisor, cluster=cluster.address)
                    self._watch(supervisor, view)
                finally:
                    # Before the PS: a worker whose PS is gone waits for it to come back.
                    supervisor.stop(supervisor.running(prefix="worker-"))
            with connect(cluster.address) as client:
                return self._finish(client, view.samples_per_s)

    def all_to_all(self) -> _Result:
        """Workers as processes that hold the rows themselves; their last checkpoint is what is scored."""
        from rich.console import Console

        from trilith.checkpoint import newest_complete
        from trilith.connect import connect
        from trilith_services.commands.training_view import TrainingView
        from trilith_services.local.supervisor import Supervisor, free_ports

        options = self._options
        with Supervisor(Console(quiet=True), self._run_dir) as supervisor:
            self._say_starting(f"{output.plural(options.workers, 'worker')} that hold the rows")
            with TrainingView(self._console, [f"worker-{rank}" for rank in range(options.workers)]) as view:
                self._start_workers(supervisor, mode=Rows.all_to_all, master=f"127.0.0.1:{free_ports(1)[0]}")
                self._watch(supervisor, view)
        newest = newest_complete(str(options.model_dir))
        assert newest is not None  # the workers' last act
        with connect("local://") as client:
            client.restore(newest.path)
            return self._finish(client, view.samples_per_s, checkpoint=newest.path)

    def _say_starting(self, what: str) -> None:
        from trilith.ops.jit import cache_directory

        self._console.print(f"starting {what}; logs in {self._run_dir}", soft_wrap=True)
        if not cache_directory().is_dir():
            self._console.print("on a machine's first run they compile their kernels, which takes a few minutes")

    def _start_workers(self, supervisor: Supervisor, **where: Any) -> None:
        from trilith_services.local.supervisor import ProcessSpec, trilith_argv

        options = self._options
        together = options.mode is Mode.all_to_all
        for rank in range(options.workers):
            config = options.worker(
                rank=rank,
                world_size=options.workers,
                events=str(self._events(rank)),
                # Workers that take their steps together end together, and go on from a checkpoint, not from a position.
                state_file="" if together else str(self._run_dir / f"worker-{rank}.state"),
                **where,
            )
            argv = trilith_argv("worker", "--model", options.model, "--data", options.data, *argv_of(config))
            supervisor.start(
                ProcessSpec(name=f"worker-{rank}", argv=argv, restart="never" if together else "on-failure")
            )

    def _events(self, rank: int) -> Path:
        return self._run_dir / f"worker-{rank}.jsonl"

    def _watch(self, supervisor: Supervisor, view: Any) -> None:
        from trilith.errors import UnavailableError
        from trilith_services.worker.events import Tail

        tails = [Tail(self._events(rank)) for rank in range(self._options.workers)]
        running = True
        while running:
            running = bool(supervisor.running(prefix="worker-"))
            if self._stop.wait(0.1):
                raise _InterruptedError
            for ended in supervisor.poll():
                if ended.status and not ended.restarted:
                    raise UnavailableError("\n".join([f"{ended.name} {ended.how}", *ended.tail[-15:]]))
                if ended.restarted:
                    running = True
                    view.say(f"{ended.name} {ended.how}; starting it again")
            for tail in tails:
                for event in tail.read():
                    view(event)
                    self._on_saved(event)

    def embedded(self) -> _Result:
        """PS and worker in this process, as a job of an Estimator."""
        from trilith.checkpoint import newest_complete
        from trilith_services.commands.training_view import TrainingView
        from trilith_services.demo import job as jobs

        options = self._options
        self._console.print("embedded: PS and worker in this process")
        with TrainingView(self._console, ["embedded"]) as view:
            shown = view.callback(-(-len(self._parts.train) // options.batch_size) * self._settings.epochs)
            make = {Model.deepfm: jobs.deepfm, Model.ffm: jobs.ffm}[options.model]
            job = make(shown)
            with job.configure(job.run.overridden(sets=options.sets())):
                job.train()
                if shown.stopped or self._stop:
                    raise _InterruptedError
                if options.export is not None and not shown.exported:
                    job.export()  # all was trained and saved before
                score = job.evaluate(self._parts.test.columns(4096))["click/auc"]
                rows = sum(table.rows for shard in job.client.stats() for table in shard.tables)
        newest = newest_complete(str(options.model_dir))
        assert newest is not None  # the last act of training
        if shown.exported:
            self._console.print(f"export: {shown.exported}", highlight=False, soft_wrap=True)
        return _Result(auc=score, samples_per_s=view.samples_per_s, rows=rows, checkpoint=newest.path)

    def _finish(self, client: Any, samples_per_s: float, *, checkpoint: str = "") -> _Result:
        """Score the test part with what the cluster holds, and save it unless it is `checkpoint`."""
        from trilith.nn import DenseOnPs, auc
        from trilith_services.worker.trainer import save_checkpoint

        test, settings = self._parts.test, self._settings
        model = settings.on_cluster(client, test.features, seed=self._options.seed)
        DenseOnPs(client, model.head, settings.dense_optimizer())  # takes the trained values over
        score = auc(test.labels, model.predict(test))
        path = checkpoint or save_checkpoint(client, str(self._options.model_dir))[0]
        if self._exports is not None:
            exported = self._exports.finish(path)
            self._console.print(f"export: {exported}", highlight=False, soft_wrap=True)
        rows = sum(table.rows for shard in client.stats() for table in shard.tables)
        return _Result(auc=score, samples_per_s=samples_per_s, rows=rows, checkpoint=path)


def _share(processes: int) -> int:
    """Cores for each of so many processes."""
    from trilith.runtime.machine import cores

    return max(1, cores() // processes)

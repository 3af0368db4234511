"""Estimator: trains, evaluates, predicts and saves a task on a cluster, alone or as one of several workers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from trilith.connect import connect
from trilith.errors import InvalidRequestError, ShardRestartedError, TrilithError
from trilith.estimator import events
from trilith.estimator.callbacks import Callback, Callbacks
from trilith.estimator.compiling import Compiled
from trilith.estimator.config import RunConfig
from trilith.estimator.control import Control
from trilith.estimator.ending import check_owned, shut_down
from trilith.estimator.exporting import TaskExporter, warm_up_of
from trilith.estimator.group import Ranks, local_device, process_group
from trilith.estimator.identity import WorkerIdentity
from trilith.estimator.importing import Imported
from trilith.estimator.keeping import Keeper, newest_job
from trilith.estimator.loggers import callbacks_of, serve_metrics
from trilith.estimator.notes import Notes
from trilith.estimator.placement import Placement, make_dense
from trilith.estimator.progress import Learned, Progress
from trilith.estimator.rows import Prepared, TaskRows
from trilith.estimator.saving import Saver, as_rows_are
from trilith.estimator.scoring import Scorer
from trilith.estimator.signals import stop_signals
from trilith.estimator.source import EpochBatches, Source
from trilith.estimator.state import RankState, rng_state, set_rng_state
from trilith.estimator.stepping import Stepper
from trilith.estimator.task import Task
from trilith.nn import FetchedRows
from trilith.nn.dense import AllReduced, DenseOnPs
from trilith.nn.optimization import Optimization
from trilith.peers import connect_peers
from trilith.pipelining import Lane
from trilith.runtime.machine import cores
from trilith.serving.debugging import write_debugging_info

__all__ = ["Estimator"]

log = logging.getLogger(__name__)

_NOTES_EVERY_S = 5.0
_LOOK_S = 0.5
_T = TypeVar("_T")


class Estimator:
    """A task, a run and data together: `train`, `evaluate`, `predict`, `save`, `export`, or a loop of one's own.

    Whatever a method needs is opened when it is first called; `close`, or leaving a with block, lets go of it.

    Args:
        task: The model.
        run: What to do, and where; None: all defaults, which are rows in this process and nothing saved. Environment
            variables TRILITH_RUN_* go over it.
        train: An iterable of batches, or a function that makes one; see `trilith.estimator.source.Source`.
        evaluate: The same for evaluation.
        callbacks: Told of everything that happens, in order.
    """

    def __init__(
        self,
        task: Task,
        run: RunConfig | None = None,
        *,
        train: Any = None,
        evaluate: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        _check_parts(task, run, {"train": train, "evaluate": evaluate})
        self.task = task
        self.run = (RunConfig() if run is None else run).overridden()
        self._data = {"train": train, "evaluate": evaluate}
        self._given_callbacks = tuple(callbacks)
        self._callbacks = Callbacks([])
        self._stack: ExitStack | None = None
        self._at = RankState()
        """Where the loop is."""
        self._settled: Callable[[], RankState] = RankState
        """Where it was when its last step was taken: between steps of several batches, gradients wait."""
        self._last: dict[str, float] = {}
        self._begun = self._looked_up = self._done = False
        self._stop_reason, self._signalled = "", False
        self._stopping = self._late = self._paused = False
        """Whether a rank wants to stop, the chief finds that it is time to save, and all are to wait: what all know."""
        self._control: Control | None = None
        self._period_over = False
        """Whether the step that was taken last is the first of another period of `save_every_event_s`."""
        self._looked_step = 0
        self._evaluate_now = self._save_now = self._save_dense_now = False
        """What is due behind the step that was taken last; steps of all workers were `_looked_step` before it."""
        self._exporter: TaskExporter | None = None
        self.step_count = 0
        """Steps of the cluster, as this worker last heard of them."""
        self._saved_step, self._saved_at, self._noted_at = 0, time.monotonic(), 0.0

    # ---- opening and closing -----------------------------------------------------------------------------------------

    def configure(self, run: RunConfig) -> Self:
        """Take another run, as it is, in place of the constructor's: as commands do with their flags; before `open`.

        Raises:
            InvalidRequestError: The estimator is open, and so has begun with its run.
        """
        if self._stack is not None:
            raise InvalidRequestError("the estimator is open; configure(run) before, or after close()")
        self.run = run
        return self

    def open(self) -> Self:
        """Connect, build the task, create its tables; done by itself when it is first needed."""
        if self._stack is None:
            with ExitStack() as stack:
                self._open(stack)
                self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        run = self.run
        self.identity: WorkerIdentity = run.identity()
        me = self.identity
        if run.params_override and not self.task.built:
            self.task.override(run.params_override)
        if run.save_every_event_s and not self.task.request_time:
            raise InvalidRequestError(
                f"save_every_event_s={run.save_every_event_s} needs a task that says when its samples were: "
                f"{type(self.task).__name__} has no request_time = COLUMN"
            )
        self.placement = Placement.of(run.cluster, run.dense, self.task, me.world_size)
        self.device = local_device(me, run.device, use_gpu=run.use_gpu, processes_per_gpu=run.processes_per_gpu)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # else pinned memory and random numbers are those of GPU 0
        torch.set_num_threads(run.threads or max(1, cores() // me.local_world_size))
        if self.placement.synchronous:
            # Others may wait for a PS for as long as this one may, and after that compute.
            stack.enter_context(process_group(me, self.device, timeout_s=max(2 * run.timeout_s, 120.0)))
        self._ranks = Ranks(me, together=self.placement.synchronous)
        stack.callback(self._ranks.close)
        self._data_ranks = self._ranks.beside()
        stack.callback(self._data_ranks.close)
        with self._ranks.explained():
            self._build(stack)

    def _build(self, stack: ExitStack) -> None:
        """Make what the run needs on the cluster."""
        run, me = self.run, self.identity
        self._apart = me.world_size > 1 and not self.placement.synchronous
        """Whether there are other workers, for which this one does not wait."""
        self.client: Any = self._connect()
        stack.callback(self.client.close)
        torch.manual_seed(run.seed + me.rank)
        self.task.prepare(run.seed)
        self.task.to(self.device)
        self._outputs = Compiled(self.task).outputs if run.compile else self.task.outputs
        # Workers that hold the rows have threads of their own for what travels, in step with those of the others.
        lane = Lane() if (run.prefetch or run.async_push) and self.placement.rows != "workers" else None
        if lane is not None:
            stack.callback(lane.close)
        self.rows = self._as_rows_are(
            lambda: TaskRows(self.task, self.client, device=self.device, async_push=run.async_push, lane=lane)
        )
        self.dense = self._as_rows_are(
            lambda: make_dense(
                self.placement, self.task, self.client, prefetch=run.prefetch > 0, async_push=run.async_push, lane=lane
            )
        )
        if self.dense is not None and not isinstance(self.dense, torch.optim.Optimizer):
            stack.callback(self.dense.close)
        learned: list[nn.Module] = [self.task] if self.rows.collection is None else [self.task, self.rows.collection]
        self.optimization = Optimization(
            nn.ModuleList(learned),
            self.dense,
            row_scale=1 / me.world_size if self._ranks.several and run.row_gradients == "mean" else 1.0,
            skip_non_finite=run.skip_non_finite,
            together=self._ranks.several,
        )
        if self.rows.collection is not None:
            stack.callback(self.rows.collection.close)
        stack.callback(self.optimization.close)
        self._stepper = Stepper(
            run,
            self.task,
            self.rows,
            self.optimization,
            self._outputs,
            self.device,
            dated=self._see_time,
            applied=self._count,
        )
        self.scaler = self._stepper.scaler
        keeper = Keeper(run)
        own = [*callbacks_of(run), *([keeper.best] if keeper.best is not None else [])]
        self._callbacks = Callbacks([*self._given_callbacks, *own], chief=me.chief)
        if run.metrics_port is not None:
            port = run.metrics_port and run.metrics_port + me.local_rank
            stack.callback(serve_metrics(run.metrics_host, port))
        self._notes = Notes(run.model_dir, me.rank, me.world_size) if self._apart and run.model_dir else None
        self._saver = Saver(
            run,
            me,
            self.placement,
            self.client,
            task=self.task,
            tables=self.rows.floats,
            optimization=self.optimization,
            dense=self.dense,
            scaler=self.scaler,
            callbacks=self._callbacks,
            keeper=keeper,
            ranks=self._ranks,
            notes=self._notes,
            follows=self._follows,
        )
        self._scorer = Scorer(
            run, self.task, self.rows, self.optimization, self._outputs, self._stepper.autocast, self._ranks
        )
        self.step_count = self._saved_step = self._as_rows_are(lambda: int(self.client.global_step()))

    def _connect(self) -> Any:
        run = self.run
        if self.placement.rows == "process":
            return connect(run.cluster)
        if self.placement.rows == "workers":
            return connect_peers(
                self.device.type,
                float16=run.float16_transfer,
                threads=run.threads or None,
                update_queue=run.update_queue,
            )
        return connect(run.cluster, timeout_s=run.timeout_s, model_name=self.name, float16=run.float16_transfer)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name or type(self.task).__name__.lower()

    @property
    def _ends_ps(self) -> bool:
        return self.run.shut_down_ps and self.placement.rows == "ps"

    @property
    def chief(self) -> bool:
        """Whether this worker saves and exports."""
        return self.identity.chief

    def close(self) -> None:
        """Let go of connections, threads and the process group; what was sent has been applied or is lost.

        Where all is trained, PS that the run is to shut down (`shut_down_ps`) end with it.
        """
        stack, self._stack = self._stack, None
        if stack is not None and self._done and self._ends_ps:
            shut_down(self.client, self._ranks, chief=self.chief)
        self._done = False
        self._at, self._settled, self._exporter = RankState(), RankState, None
        self._begun = self._looked_up = self._stopping = self._late = False
        if stack is not None:
            stack.close()

    def __enter__(self) -> Self:
        """Open."""
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error the PS stay, whatever was trained."""
        self._done = self._done and error is None
        self.close()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, batch: Any) -> float:
        """Learn from a batch: forward, backward and, after `accumulate` batches, a step; returns the loss.

        For loops of one's own: `for batch in loader: job.step(batch)`. Several workers all take as many steps.
        """
        self.open()
        with self._ranks.explained():
            if not self._begun:
                self._resume()
            prepared = self.rows.prepare(batch)
            learned = self._learn(prepared, lambda: self.rows.fetch(prepared))
            if not self._stepper.held:
                self._agree()
        assert learned is not None  # there was a batch
        return learned.loss

    def parameters_and_rows(self) -> list[Tensor]:
        """Dense parameters and the rows that were looked up, with their gradients; see `Optimization`."""
        self.open()
        return self.optimization.parameters_and_rows()

    def _learn(self, prepared: Prepared | None, fetch: Callable[[], FetchedRows | None]) -> Learned | None:
        """Learn from a batch; see `Stepper.learn`."""
        return self._stepper.learn(prepared, fetch, f"batch {self._at.batches} of epoch {self._at.epoch}")

    def _see_time(self, newest: int | None) -> None:
        """A step has samples of a time: whether it is the first behind a full `save_every_event_s`."""
        before, every = self._at.event_time, self.run.save_every_event_s
        self._period_over = False
        if newest is not None:
            now = max(newest, before or 0)
            self._at = replace(self._at, event_time=now)
            self._period_over = before is not None and _passes(every, before, now)

    def _count(self) -> None:
        """A step was taken: its gradients have it counted, which may be on their way."""
        if self.optimization.counts:
            self.step_count = max(self.step_count + 1, int(self.client.known_step))
        elif self.chief or not self._ranks.several:
            self.step_count = int(self.client.global_step(advance=1))

    def _agree(self) -> None:
        """Know what all ranks know: the step that the chief counts, and whether somebody wants to stop or to save."""
        run = self.run
        self._exchange_notes()
        says = self.chief or not self._ranks.several  # who saves, or leaves word, when it likes
        late = says and run.save_every_s > 0 and time.monotonic() - self._saved_at >= run.save_every_s
        paused = False
        if (control := self._control) is not None:
            late, paused = late or control.save_wanted, control.paused
            if control.stop_reason:
                self._ask_to_stop(control.stop_reason)
        known = 0 if self._ranks.several and not self.chief else self.step_count
        stop, late_, waits, step = self._ranks.sums([bool(self._stop_reason), late, paused, known])
        self._stopping, self._late, self._paused, self.step_count = stop > 0, late_ > 0, waits > 0, int(step)

    def _exchange_notes(self) -> None:
        """Now and then: give a sign of life, and see whether all are to stop, where workers do not meet."""
        if self._notes is None or time.monotonic() - self._noted_at < _NOTES_EVERY_S:
            return
        self._noted_at = time.monotonic()
        self._notes.beat()
        self._stop_reason = self._stop_reason or self._notes.stopped()

    @contextmanager
    def _controlled(self) -> Iterator[None]:
        """Have an operator pause the run, save it and end it: by the chief, and others that do not meet it."""
        if not self.run.model_dir or not (self.chief or self._apart):
            yield
            return

        def status() -> dict[str, Any]:
            return {
                "name": self.name,
                "step": self.step_count,
                "epoch": self._at.epoch,
                "epochs": self.run.epochs,
                "samples": self._progress.samples,
                "workers": self.identity.world_size,
                "saved_step": self._saved_step,
            }

        with Control(self.run.model_dir, self.identity.rank, chief=self.chief, status=status) as control:
            self._control = control
            try:
                yield
            finally:
                self._control = None

    def _hold(self) -> bool:
        """Wait while all are to; whether it is to save a checkpoint meanwhile."""
        began = time.monotonic()
        self._tell(events.Paused(step=self.step_count))
        with self._control.waits() if self._control is not None else nullcontext():
            while self._paused and not (self._stopping or self._late):
                time.sleep(_LOOK_S)
                self._agree()
        self._tell(events.Resumed(step=self.step_count, seconds=time.monotonic() - began))
        return self._late and not self._stopping

    def _as_rows_are(self, action: Callable[[], _T]) -> _T:
        """Do something at the start of a worker that does not wait for the chief, who may be restoring rows."""
        return as_rows_are(self.client, action) if self._follows else action()

    @property
    def _follows(self) -> bool:
        """Whether another worker, for which this one does not wait, evaluates, saves and exports."""
        return self._apart and not self.chief

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, data: Any = None) -> dict[str, float]:
        """Train until the epochs are done, the steps are, a callback stops it, or a signal does.

        Args:
            data: In place of the `train=` of the constructor.

        Returns:
            What the last evaluation found, as `evaluate` says it; empty where there was none.
        """
        self.open()
        found = self._data["train"] if data is None else data
        if found is None:
            raise InvalidRequestError("train() needs data: Estimator(..., train=...) or train(data)")
        source = self._source(found, learned=True)
        self._last, self._stop_reason, self._signalled, self._done = {}, "", False, False
        self._progress = Progress(self.task)
        began = time.perf_counter()
        with stop_signals(self._signal), self._callbacks:
            try:
                with self._ranks.explained(), self._controlled():
                    self._begin()
                    finished = self._epochs(source)
                    if finished:
                        self._take_last_step()
                    self._drain()
                    self._agree()
                    self._end_with_others()
                    if self.run.model_dir and (finished or self.run.save_on_stop) and self._unsaved():
                        self._save_at_the_end()
                    self._end(finished, time.perf_counter() - began)
                    self._done = finished
            except BaseException as error:
                self._callbacks.tell(events.Failed(step=self.step_count, error=error))
                raise
        return self._last

    def _begin(self) -> None:
        """Go on where the run's checkpoints say, or where this Estimator is already, and tell."""
        if self._ends_ps:
            check_owned(self.client)
        if self._notes is not None and self.chief:
            self._notes.begin()
        elif self._notes is not None:
            self._notes.join(self.run.timeout_s)
            self._stop_reason = self._stop_reason or self._notes.stopped()
        if not self._begun:
            self._resume()
        elif self._at.epoch >= self.run.epochs:
            self._go_on(replace(self._at, epoch=0, batches=0, source=None))
        else:
            self._go_on(self._settled())
        if self.chief and self._at.epoch >= self.run.epochs:
            log.warning(
                "%s has all %d epochs already, at step %d: epochs=N goes on, another model_dir begins anew",
                self.run.model_dir or "the run",
                self.run.epochs,
                self.step_count,
            )
        if self.chief and self.run.model_dir and self.placement.rows == "ps":
            self._describe()
        self._stepper.give_up()  # gradients that waited for others of a step are learned again
        self._saved_at = time.monotonic()
        self._tell(
            events.Started(
                step=self.step_count,
                rank=self.identity.rank,
                world_size=self.identity.world_size,
                epoch=self._at.epoch,
                config=self.run,
                figures=self._figures(),
            )
        )
        self._agree()
        self._looked_step = self.step_count

    def _figures(self) -> tuple[str, ...]:
        """Names of what evaluations in training find."""
        due = self.run.evaluate_every > 0 or self.run.evaluate_every_epoch
        if self._follows or not due or self._data["evaluate"] is None:
            return ()
        return tuple(f"valid/{name}" for name in self._scorer.names)

    def _describe(self) -> None:
        """Leave word of where the PS are, for those who want to look into them."""
        collection = self.rows.collection
        features = {} if collection is None else {name: each.table.name for name, each in collection.features.items()}
        write_debugging_info(self.run.model_dir, self.client, num_workers=self.identity.world_size, features=features)

    def _end_with_others(self) -> None:
        """Where workers do not meet: the chief's last save is after all of them, if it is not to leave at once."""
        if self._notes is None:
            return
        if self._follows:
            self._note(ended=True)
        elif not self._signalled:
            for rank in self._notes.wait_for_others(self.run.timeout_s, lambda: self._signalled):
                log.warning("rank %d has not ended and gives no sign of life; the last save is without it", rank)
            self.step_count = int(self.client.global_step())  # theirs, too

    def _note(self, *, ended: bool = False) -> None:
        """Leave word of where this worker is, which saves no checkpoint."""
        self._guarded(self.optimization.drain)
        self.step_count = int(self.client.global_step())
        self._saver.note(self._here(), step=self.step_count, ended=ended)
        self._saved_step, self._saved_at, self._noted_at = self.step_count, time.monotonic(), time.monotonic()

    def _end(self, finished: bool, seconds: float) -> None:
        """Tell how it ended."""
        step, samples = self.step_count, self._progress.samples
        if finished:
            rate = self._progress.samples_per_s
            self._tell(events.Done(step=step, samples=samples, seconds=seconds, samples_per_s=rate, metrics=self._last))
        else:
            said = enumerate(self._ranks.gather(self._stop_reason))
            reason = self._stop_reason or next((f"rank {rank}: {each}" for rank, each in said if each), "")
            self._tell(events.Stopped(step=step, reason=reason, samples=samples, seconds=seconds))

    def _drain(self) -> None:
        """Wait until all that was sent has been applied, and so counted."""
        self._guarded(self.optimization.drain)
        self.step_count = int(self.client.known_step)

    def _source(self, data: Any, *, labels: bool = True, learned: bool = False) -> Source:
        me = self.identity
        together = learned or self.placement.rows == "workers"  # whose lookups are made together
        return Source(
            data,
            self.task,
            partial(self.rows.prepare, labels=labels),
            labels=labels,
            share=(0, 1) if self._apart and labels and not learned else (me.rank, me.world_size),
            ranks=self._data_ranks if together and self._ranks.several else None,
        )

    def _epochs(self, source: Source) -> bool:
        """Passes over the data, from where the run is; whether all was done."""
        run = self.run
        while self._at.epoch < run.epochs:
            began, before = time.perf_counter(), self._progress.samples
            batches = source.epoch(self._at.epoch, done=self._at.batches, state=self._at.source)
            if self._at.rng:  # drawn from by loaders that find their place again
                set_rng_state(self._at.rng)
                self._at = replace(self._at, rng={})
            try:
                while (outcome := self._some_batches(batches)) == "due":
                    self._do_what_is_due()
                    batches.rewind()
            finally:
                batches.close()
            if outcome in ("stop", "enough"):
                return outcome == "enough"
            if not batches.done and self.identity.world_size == 1:
                raise InvalidRequestError(
                    f"the training data has no batch in epoch {self._at.epoch}; look at its files and filters"
                )
            self._at = replace(self._at, epoch=self._at.epoch + 1, batches=0, source=batches.after)
            if self._at.epoch == run.epochs:
                self._take_last_step()
            if not self._stepper.held:
                self._settle()
            self._drain()
            self._tell(
                events.Epoch(
                    step=self.step_count,
                    epoch=self._at.epoch - 1,
                    samples=self._progress.samples - before,
                    seconds=time.perf_counter() - began,
                )
            )
            if run.evaluate_every_epoch and self._data["evaluate"] is not None and not self._follows:
                self._evaluated()
            self._agree()  # callbacks may want to stop
        return True

    def _take_last_step(self) -> None:
        """Step with gradients that would wait for batches which do not come."""
        if self._stepper.held:
            self._guarded(self._stepper.apply)
            self._at = replace(self._at, steps=self._at.steps + 1)
            self._settle()

    def _some_batches(self, batches: EpochBatches) -> Literal["end", "stop", "enough", "due"]:
        """Train until the pass ends, the run is stopped or has done enough, or an evaluation or a save is due.

        Rows are looked up ahead until then at most: a run that begins at a checkpoint looks them up then, and both
        shall see the same.
        """
        run = self.run
        with self.rows.prefetch(batches, run.prefetch, lookup_queue=run.lookup_queue) as loop:
            taken = iter(loop)
            while True:
                if (run.steps and self._at.steps >= run.steps) or (run.max_steps and self.step_count >= run.max_steps):
                    return "enough"
                if self._paused and not self._stepper.held and self._hold():
                    self._save_now = True
                    return "due"
                if self._stopping and not self._stepper.held:
                    return "stop"
                began = time.perf_counter()
                found = next(taken, None)
                if found is None:
                    return "end"
                if self._stop_reason and not self._stepper.held and not self._ranks.several:
                    return "stop"  # it came while the batch was waited for
                prepared, fetched = found
                self._one(prepared, fetched, time.perf_counter() - began)
                batches.advance()
                self._at = replace(
                    self._at,
                    batches=batches.done,
                    steps=self._at.steps + (not self._stepper.held),
                    samples=self._at.samples + (0 if prepared is None else prepared.samples),
                )
                if not self._stepper.held:
                    self._settle(batches.place)
                    self._agree()
                    if self._is_due():
                        return "due"

    def _settle(self, place: Callable[[], Any] = lambda: None) -> None:
        """A step is taken: a checkpoint of now has the loop where it is."""
        at = replace(self._at, rng=rng_state()) if self.run.accumulate > 1 else self._at
        self._settled = lambda: replace(at, source=place(), rng=at.rng or rng_state())

    def _here(self) -> RankState:
        """What a checkpoint of now has of this worker; in a loop of one's own that is not where its data is."""
        return replace(self._settled(), event_time=self._at.event_time)

    def _one(self, prepared: Prepared | None, fetched: Any, waited: float) -> None:
        """One batch of the loop; a PS that restarted costs this batch."""
        began = time.perf_counter()
        looked_up = 0.0

        def fetch() -> FetchedRows | None:
            nonlocal looked_up
            rows: FetchedRows | None = fetched.result()
            looked_up = time.perf_counter() - began
            return rows

        try:
            learned = self._learn(prepared, fetch)
        except ShardRestartedError as error:
            self._restarted(error)
            return
        if prepared is None or learned is None:
            return
        self._progress.add(learned)
        self._tell(
            events.Step(
                step=self.step_count,
                own_step=self._at.steps + 1,
                epoch=self._at.epoch,
                samples=self._progress.samples,
                loss=learned.loss,
                losses=learned.losses,
                metrics=self._progress.metrics(),
                rates=self.optimization.rates(),
                samples_per_s=prepared.samples / max(time.perf_counter() - began + waited, 1e-9),
                seconds={"data": waited, "lookup": looked_up, **learned.seconds},
                skipped=self.optimization.skipped,
                event_time=self._at.event_time,
            )
        )

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do something; where a PS restarted meanwhile, take its rows as they are and go on."""
        try:
            action()
        except ShardRestartedError as error:
            self._restarted(error)

    def _restarted(self, error: ShardRestartedError) -> None:
        self._tell(events.ShardRestarted(step=self.step_count, error=str(error)))
        self._rejoin()

    def _is_due(self) -> bool:
        """Whether the step that was taken last is the first behind a full `evaluate_every`, `save_every` or so."""
        run, before, now = self.run, self._looked_step, self.step_count
        self._looked_step = now
        evaluate, save, dense = (
            _passes(every, before, now) for every in (run.evaluate_every, run.save_every, run.save_dense_every)
        )
        self._evaluate_now = evaluate and self._data["evaluate"] is not None and not self._follows
        self._save_now = bool(run.model_dir) and (self._late or self._period_over or save)
        self._save_dense_now = dense and not self._save_now and not self._follows
        return self._evaluate_now or self._save_now or self._save_dense_now

    def _do_what_is_due(self) -> None:
        """Evaluate and save, each where it is due."""
        if self._evaluate_now:
            self._evaluated()
        if self._save_now or self._save_dense_now:
            self._save_in_training(self.save if self._save_now else self._save_dense)
        self._evaluate_now = self._save_now = self._save_dense_now = False
        self._agree()  # callbacks may want to stop

    def _unsaved(self) -> bool:
        return self.step_count != self._saved_step

    def _save_in_training(self, save: Callable[[], Any]) -> None:
        """Save; a save that fails is told, and training goes on. One that can never work ends it."""
        try:
            save()
        except ShardRestartedError as error:
            self._restarted(error)
        except InvalidRequestError:
            raise
        except (TrilithError, OSError) as error:
            log.warning("checkpoint failed: %s", error)
            if self._control is not None:
                self._control.saved("", str(error))
            self._saved_at = time.monotonic()
            self._tell(events.SaveFailed(step=self.step_count, path=self.run.model_dir, error=str(error)))

    def _save_at_the_end(self) -> None:
        """Save; once more where a PS turns out to have restarted."""
        try:
            self.save()
        except ShardRestartedError as error:
            self._restarted(error)
            self.save()

    def _rejoin(self) -> None:
        for shard in self.client.rejoin():
            if shard.missing_variables and isinstance(self.dense, DenseOnPs | AllReduced):
                self.dense.create()
            self._tell(
                events.RowsRejoined(
                    step=self.step_count,
                    shard=shard.index,
                    restored_from=shard.restored_from,
                    restored_step=shard.restored_step,
                    known_step=shard.known_step,
                    steps_back=max(shard.known_step - shard.restored_step, 0),
                )
            )

    # ---- evaluation and prediction -----------------------------------------------------------------------------------

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Metrics and loss over data, by "LABEL/METRIC" and "loss"; creates no row and changes nothing.

        Workers in step all call it, each scores its share of the data, and all get the figures of the whole.

        Args:
            data: In place of the `evaluate=` of the constructor.
        """
        self.open()
        found = self._data["evaluate"] if data is None else data
        if found is None:
            raise InvalidRequestError("evaluate() needs data: Estimator(..., evaluate=...) or evaluate(data)")
        with self._ranks.explained():
            self._restore_if_fresh()
            self._share_buffers()
            done = self._scorer.evaluate(self._source(found))
            return {} if done is None else done[0]

    def _evaluated(self) -> None:
        """Evaluate in the middle of training, and tell; a signal cuts it short."""
        self._drain()
        self._share_buffers()
        began = time.perf_counter()
        try:
            found = self._scorer.evaluate(self._source(self._data["evaluate"]), until=lambda: self._signalled)
        except ShardRestartedError as error:
            self._restarted(error)
            return
        if found is None:  # whoever sent the signal does not wait for all of it: what was learned is saved first
            return
        self._last, samples = found
        self._tell(
            events.Evaluated(
                step=self.step_count,
                epoch=self._at.epoch,
                metrics={f"valid/{name}": value for name, value in self._last.items()},
                samples=samples,
                seconds=time.perf_counter() - began,
            )
        )

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Have every rank take the chief's buffers, such as running means, of which each has its own in between."""
        if self._ranks.several:
            for buffer in self.task.buffers():
                distributed.broadcast(buffer, src=0)

    def predict(self, data: Any) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Predictions batch by batch: by label float32[b]; labels are not needed, and no row is created.

        Each of several workers predicts for its share of the data, and waits for none of the others, except where the
        workers hold the rows and look them up together.
        """
        self.open()
        self._restore_if_fresh()
        yield from self._scorer.predict(self._source(data, labels=False))

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> str:
        """Write a checkpoint of the whole job below `model_dir`; returns its path. Workers in step all call it.

        Of workers that are not in step the chief writes it. Any other leaves word of where it is, which goes into the
        chief's next one, and returns "".
        """
        self.open()
        if not self.run.model_dir:
            raise InvalidRequestError("save() needs model_dir, where checkpoints go")
        if self._follows:
            self._note()
            return ""
        began = time.perf_counter()
        self._gather_dense()
        at = self._here()
        path, self.step_count = self._saver.save(at)
        self._saved_step, self._saved_at = self.step_count, time.monotonic()
        seconds = time.perf_counter() - began
        self._tell(events.Saved(path=path, step=self.step_count, event_time=at.event_time, seconds=seconds))
        if self._control is not None:
            self._control.saved(path)
        self._saver.prune(path)
        if self.run.export_every_save:
            self.export(checkpoint=path)
        return path

    def _save_dense(self) -> None:
        """Save the dense part alone, and export it where every save is and there are rows to go with it."""
        began = time.perf_counter()
        self._gather_dense()
        path = ""
        with self._ranks.alike():
            if self.chief:
                path = self._saver.save_dense(self._at.event_time)
        seconds, at = time.perf_counter() - began, self._at.event_time
        path = self._ranks.first(path)
        self._tell(events.Saved(path=path, step=self.step_count, event_time=at, seconds=seconds, dense_only=True))
        if not self.run.export_every_save:
            return
        if newest := self._ranks.first(newest_job(self.run.model_dir) or ""):
            run = self.run
            self._export(
                newest, self._export_base("export"), mode="distributed", dense_only=True, dense=path,
                keep=run.export_keep, warm_up=run.export_warm_up,
            )  # fmt: skip

    def _gather_dense(self) -> None:
        """Have this process know all that was learned: what is exported of a save is as new as its rows."""
        with self._ranks.alike():
            self.optimization.drain()
            self.optimization.pull()
        self._share_buffers()

    def _resume(self) -> None:
        """Begin at a checkpoint, as the run's `resume` and `warm_start` say; nothing is written."""
        self._begun = True
        self.step_count = self._saved_step = self._as_rows_are(lambda: int(self.client.global_step()))
        plan = self._saver.plan(self.step_count)
        if plan.what == "warm":
            matched = self._saver.warm_start(plan.path)
            self.step_count = self._saved_step = int(self.client.global_step())
            self._tell(
                events.Restored(
                    path=plan.path,
                    step=self.step_count,
                    warm_start=True,
                    renamed=matched.renamed,
                    missing=matched.missing,
                    left=matched.left,
                )
            )
        elif plan.what == "restore":
            self.restore(plan.path)
        elif plan.what == "load":
            job = self._saver.check(plan.path)
            self._go_on(self._as_rows_are(partial(self._saver.load, plan.path, job)))
        elif self._follows:
            self._go_on(self._saver.load_note())
        if self._follows and self._notes is not None:
            self._note()

    def _restore_if_fresh(self) -> None:
        """What is evaluated before anything was trained here is the cluster's rows, with the newest dense part."""
        if not (self._begun or self._looked_up):
            self._looked_up = True
            self._saver.load_to_read(self.step_count)

    def restore(self, path: str) -> None:
        """Replace rows, dense values and the position by those of a checkpoint."""
        self.open()
        self._begun = True
        self._stepper.give_up()
        job = self._saver.check(path)
        self._saver.restore_rows(path, variables={} if job is not None and self._saver.resets(job) else None)
        self._go_on(self._saver.load(path, job))
        self._tell(events.Restored(path=path, step=self.step_count, epoch=self._at.epoch))

    def _go_on(self, at: RankState) -> None:
        self._at = at
        self._settled = lambda: at
        self.step_count = self._saved_step = int(self.client.global_step())

    def export(
        self,
        base: str = "",
        *,
        checkpoint: str = "",
        mode: str = "",
        dense_only: bool = False,
        keep: int | None = None,
        warm_up: int | Any = None,
    ) -> str:
        """Write what `trilith serving entry` loads; returns the path of its version.

        Workers in step all call it, and the chief writes. Of others the chief does, and the rest get "".

        Args:
            base: Directory or URL of exports; empty: the run's `export_dir`, or exports in its `model_dir`.
            checkpoint: Which; empty: the newest of the run's `model_dir`, saved first where training has gone on.
            mode: "distributed" or "standalone"; empty: the run's `export_mode`.
            dense_only: Of a distributed export the model alone: its rows come from replicas that training keeps fresh.
            keep: Newest versions of `base` that are kept, beside one that entries are pinned to; None: the run's
                `export_keep`.
            warm_up: What entries score before the version answers: so many samples of the job's data, the ones that it
                saw last or else its first ones; or batches, all of whose samples are taken. None: the run's
                `export_warm_up`.

        Raises:
            CheckpointError: The checkpoint is incomplete, damaged, or of another model.
        """
        self.open()
        run = self.run
        base = base or self._export_base("export")
        if self._follows:
            return ""
        path = checkpoint or self._saved_now()
        options = {"mode": mode or run.export_mode, "dense_only": dense_only}
        options |= {"keep": run.export_keep if keep is None else keep}
        options |= {"warm_up": run.export_warm_up if warm_up is None else warm_up}
        return self._export(path, base, **options)

    def _export(self, path: str, base: str, *, warm_up: int | Any, **options: Any) -> str:
        """Have the chief write a version; returns its path."""
        began = time.perf_counter()
        version = ""
        with self._ranks.alike():
            if self.chief or not self._ranks.several:
                if self._exporter is None:
                    self._exporter = TaskExporter(self.name, self.task, self.rows, self._saver.read)
                done = self._exporter.export(path, base, warm_up=self._warm_up(warm_up), **options)
                version = str(done.path)
                seconds = time.perf_counter() - began
                self._tell(events.Exported(step=done.step, path=done.path, version=done.version, seconds=seconds))
        return self._ranks.first(version)

    def import_(self, path: str = "", *, replicas: str | Sequence[str] = ()) -> Imported:
        """Open an export of the task, to score batches with it as an entry would; to be closed, or used by `with`.

        Args:
            path: A version, or a directory of them, of which it is the newest; empty: where `export` writes to.
            replicas: Where the rows of a distributed export are: a directory's URL, or SHARD=host:port each.
        """
        self.open()
        where = path or self._export_base("import_")
        return Imported(
            where,
            self.task,
            partial(self.rows.prepare, labels=False),
            replicas=[replicas] if isinstance(replicas, str) and replicas else list(replicas),
        )

    def _export_base(self, method: str) -> str:
        """Where exports go if nobody says otherwise."""
        run = self.run
        base = run.export_dir or (f"{run.model_dir.rstrip('/')}/exports" if run.model_dir else "")
        if not base:
            raise InvalidRequestError(
                f"{method}() needs a directory: {method}(DIR), or export_dir or model_dir of the run"
            )
        return base

    def _warm_up(self, wanted: int | Any) -> bytes:
        """A warm-up file of so many samples, or of those of batches."""
        if not isinstance(wanted, int):
            return warm_up_of(self.task, filter(None, self._source(wanted, labels=False).epoch(0)), None)
        if wanted < 0:
            raise InvalidRequestError(f"warm_up={wanted}: how many samples, from 0, or batches of them")
        if not wanted or self._stepper.sample is not None:
            return warm_up_of(self.task, [] if self._stepper.sample is None else [self._stepper.sample], wanted)
        data = self._data["evaluate"] if self._data["evaluate"] is not None else self._data["train"]
        if data is None:
            raise InvalidRequestError(f"warm_up={wanted}: the job has no data to take samples from; give batches")
        batches = self._source(data, labels=False).epoch(0)
        try:
            return warm_up_of(self.task, filter(None, batches), wanted)
        finally:
            batches.close()

    def _saved_now(self) -> str:
        """A checkpoint of the state as it is."""
        run = self.run
        if not self._begun:
            self._resume()
        if not run.model_dir:
            raise InvalidRequestError(
                "export() needs a checkpoint: export(DIR, checkpoint=PATH), or model_dir of the run"
            )
        newest = self._ranks.first(newest_job(run.model_dir) or "")
        if newest and self.step_count == self._saved_step:
            return newest
        return self.save()

    # ---- around ------------------------------------------------------------------------------------------------------

    def _tell(self, event: events.Event) -> None:
        stop = self._callbacks.tell(event)
        if stop is not None:
            self._ask_to_stop(stop.reason or "a callback stops")

    def _ask_to_stop(self, reason: str) -> None:
        """Have all workers stop after their step."""
        if not self._stop_reason:
            self._stop_reason = reason
            if self._notes is not None:
                self._notes.stop(reason)

    def _signal(self, name: str) -> None:
        """SIGTERM or SIGINT: training is to end."""
        self._signalled = True
        self._stop_reason = self._stop_reason or name


def _passes(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies behind `before`, up to `now`; of 0 none does."""
    return every > 0 and now // every > before // every


def _check_parts(task: Any, run: Any, data: Mapping[str, Any]) -> None:
    """Refuse what an Estimator cannot be made of."""
    if isinstance(task, type) and issubclass(task, Task):
        raise InvalidRequestError(f"{task.__name__} is a class; an Estimator takes a task: {task.__name__}(...)")
    if not isinstance(task, Task):
        raise InvalidRequestError(f"a {type(task).__name__} is no trilith.estimator.Task")
    if run is not None and not isinstance(run, RunConfig):
        raise InvalidRequestError(f"run is a {type(run).__name__}; an Estimator takes a RunConfig(...)")
    for name, given in data.items():
        if isinstance(given, str | os.PathLike):
            raise InvalidRequestError(
                f"{name}={str(given)!r} is a path; {name}=lambda: trilith.data.read({str(given)!r}).batch(n) reads it"
            )
        if isinstance(given, Mapping):
            raise InvalidRequestError(f"{name} is one mapping; an iterable of batches is needed, such as [batch]")

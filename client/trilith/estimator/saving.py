"""Saver: checkpoints of a whole job, one cut of rows and of all else; and at which of them a run begins."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from trilith.checkpoint import read_manifest
from trilith.errors import CheckpointError, DeadlineExceededError, InvalidRequestError, ShardRestartedError
from trilith.estimator.callbacks import Callbacks
from trilith.estimator.config import RunConfig
from trilith.estimator.group import Ranks
from trilith.estimator.identity import WorkerIdentity
from trilith.estimator.keeping import Keeper, newest_job
from trilith.estimator.matching import Matched, match
from trilith.estimator.notes import Notes
from trilith.estimator.placement import Placement
from trilith.estimator.reloading import load_optimizer, stepped_names, tell, values_of, variables_of
from trilith.estimator.state import (
    Job,
    RankState,
    dense_state,
    has_rank,
    is_job,
    read_job,
    read_rank,
    set_rng_state,
    write_job,
    write_rank,
)
from trilith.estimator.task import Task
from trilith.nn.dense import AllReduced, DenseOnPs
from trilith.nn.optimization import Optimization
from trilith.runtime.waiting import Wait
from trilith.shard import VariablePiece

__all__ = ["Plan", "Saver", "as_rows_are"]

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run begins.

    Attributes:
        what: "anew"; "restore", rows and all else; "load", all but the rows, which are there; "warm", as a new run with
            what a checkpoint has; "refuse".
        path: Of the checkpoint; of "refuse" the reason.
    """

    what: Literal["anew", "restore", "load", "warm", "refuse"]
    path: str = ""


def as_rows_are(client: Any, action: Callable[[], _T]) -> _T:
    """Do something on PS that the chief may be restoring one by one: to other workers they restart."""
    while True:
        try:
            return action()
        except ShardRestartedError:
            if not client.rejoin():
                raise


class Saver:
    """Writes and reads the checkpoints of one run. What it holds is the Estimator's.

    Args:
        run: What the run does.
        identity: Which worker this is.
        placement: Where things are.
        client: The cluster's.
        task: The model.
        tables: Its tables, see `Job`.
        optimization: Its optimizer.
        dense: What steps the dense part.
        scaler: Of losses.
        callbacks: Whose state is kept.
        keeper: Says where the next checkpoint goes and which old ones do.
        ranks: Those that save and begin together with this worker.
        notes: Of workers that do not wait for each other; None: it is alone, or they do, or nothing is saved.
        follows: Whether another worker, for which this one does not wait, restores rows and saves.
    """

    def __init__(
        self,
        run: RunConfig,
        identity: WorkerIdentity,
        placement: Placement,
        client: Any,
        *,
        task: Task,
        tables: Mapping[str, tuple[int, ...]],
        optimization: Optimization,
        dense: torch.optim.Optimizer | DenseOnPs | AllReduced | None,
        scaler: torch.amp.GradScaler,
        callbacks: Callbacks,
        keeper: Keeper,
        ranks: Ranks,
        notes: Notes | None,
        follows: bool,
    ) -> None:
        self._run, self._me, self._placement, self._client = run, identity, placement, client
        self._task, self._optimization, self._dense = task, optimization, dense
        self._tables = dict(tables)
        self._scaler, self._callbacks = scaler, callbacks
        self._keeper = keeper
        self._ranks, self._notes = ranks, notes
        self._follows = follows
        self._holds_rows = placement.rows == "workers"

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, at: RankState) -> tuple[str, int]:
        """Write a checkpoint of the state as it is, with nothing on its way; returns its path and step.

        Raises:
            TrilithError: It could not be written, by this rank or another one.
        """
        ranks, chief = self._ranks, self._me.chief
        with ranks.alike():
            path = self._keeper.next_path() if chief else ""
        path = ranks.first(path)
        state = self._whole(at)
        with ranks.alike():
            write_rank(path, self._me.rank, self._me.world_size, state)
        step = 0
        with ranks.alike():
            if isinstance(self._dense, AllReduced):
                self._dense.publish()
            if chief:
                now = int(self._client.global_step())
                times = [state.event_time]
                for rank, other in self._notes.others(now) if self._notes is not None else ():
                    write_rank(path, rank, self._me.world_size, other)
                    times.append(other.event_time)
                write_job(path, self._job(now, max((each for each in times if each is not None), default=None)))
            if chief or self._holds_rows:
                step = int(self._client.save(path))
        return path, int(ranks.first(str(step)))

    def save_dense(self, event_time: int | None) -> str:
        """Write the dense part alone, by the chief; returns its path."""
        path = self._keeper.next_dense_path()
        write_job(path, replace(self._job(int(self._client.global_step()), event_time), optimizer={}, stepped=()))
        self._keeper.prune_dense()
        return path

    def note(self, at: RankState, *, step: int, ended: bool) -> None:
        """Leave word of where this worker is, with the cluster at `step` and nothing on its way."""
        if self._notes is not None:
            self._notes.write(self._whole(at), step=step, ended=ended)

    def _whole(self, at: RankState) -> RankState:
        """Where this worker is, with all that it has for itself."""
        return replace(at, scaler=dict(self._scaler.state_dict()), callbacks=self._callbacks.state_dict())

    def prune(self, newest: str) -> None:
        """Remove checkpoints that no rule keeps."""
        if self._me.chief:
            self._keeper.prune(newest)

    def _job(self, step: int, event_time: int | None) -> Job:
        return Job(
            step=step,
            world_size=self._me.world_size,
            task=type(self._task).__name__,
            tables=self._tables,
            texts=tuple(sorted(self._task.texts)),
            event_time=event_time,
            run=json.loads(self._run.to_json()),
            dense=dense_state(self._task),
            optimizer=self._optimization.state_dict(),
            stepped=stepped_names(self._task, self._dense),
        )

    # ---- beginning ---------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> Plan:
        """Where this run begins, on a cluster at `step`; the chief decides for all.

        Raises:
            InvalidRequestError: Rows and checkpoints do not go together.
            DeadlineExceededError: The chief did not restore the rows in time, in a worker that does not wait for it
                otherwise.
        """
        if self._follows:
            return self._followed()
        if self._notes is not None and self._run.resume == "never":
            self._notes.forget()
        plan = Plan("anew")
        with self._ranks.alike():
            if self._me.chief or not self._ranks.several:
                plan = self._plan(step)
                if plan.what == "refuse":
                    raise InvalidRequestError(plan.path)
        return Plan(**json.loads(self._ranks.first(json.dumps(asdict(plan)))))

    def _plan(self, mine: int) -> Plan:
        run = self._run
        newest = newest_job(run.model_dir) if run.resume != "never" and run.model_dir else None
        if newest is None and run.resume not in ("latest", "never"):
            if mine and not (run.owns_cluster or self._placement.rows != "ps"):
                return Plan("refuse", f"resume={run.resume}: the cluster is at step {mine}, and not this run's alone")
            return Plan("restore", run.resume)
        if newest is None:
            return Plan("warm", run.warm_start) if run.warm_start and mine == 0 else Plan("anew")
        step = read_manifest(newest).global_step
        owns = run.owns_cluster or self._placement.rows != "ps"
        # Also at the same step, as rows may have been stepped that nobody counted any more; but not under other
        # workers, who may have been at work all the time.
        if mine == 0 or (owns and (self._notes is None or mine < step)):
            return Plan("restore", newest)
        if step == mine:
            return Plan("load", newest)
        if step > mine:
            return Plan(
                "refuse",
                f"model_dir={run.model_dir} is ahead of the cluster: its newest checkpoint, {newest}, is of step {step}"
                f", the cluster is at step {mine}. Restore the PS (Client.restore, or start them with --restore-from "
                f"{run.model_dir}), say owns_cluster=true where the PS are this run's alone, or name another model_dir",
            )
        log.warning("the cluster's rows, of step %d, are ahead of %s, of step %d; they stay", mine, newest, step)
        return Plan("load", newest)

    def _followed(self) -> Plan:
        """Where a worker begins that leaves it to the chief to restore rows: when that is done."""
        run = self._run
        path = newest_job(run.model_dir) if run.resume != "never" and run.model_dir else None
        if path is None and run.resume not in ("latest", "never"):
            path = run.resume
        warm = path is None and run.warm_start_parts != "dense"
        if begins := path or (run.warm_start if warm else ""):
            anew = warm and not run.warm_start_keep_step
            self._wait_for_rows(begins, None if anew else read_manifest(begins).global_step)
        return Plan("anew") if path is None else Plan("load", path)

    def _wait_for_rows(self, path: str, step: int | None) -> None:
        """Until the cluster has as many steps as a checkpoint; None: until all PS have been restored, to any step."""
        deadline = time.monotonic() + self._run.timeout_s
        with Wait(f"rank 0 to restore {path}", most=self._run.timeout_s):
            while not as_rows_are(self._client, lambda: self._has_rows(step)):
                if time.monotonic() > deadline:
                    found = as_rows_are(self._client, lambda: int(self._client.global_step()))
                    raise DeadlineExceededError(
                        f"rank {self._me.rank}: the cluster is at step {found}, and rank 0 did not restore {path}"
                        f"{'' if step is None else f', of step {step}'}, within {self._run.timeout_s:g} s; start rank 0"
                    )
                time.sleep(_LOOK_S)

    def _has_rows(self, step: int | None) -> bool:
        restored = step is None and all(each.restored_from for each in self._client.describe())
        found = int(self._client.global_step())  # after that: it notices that PS are others since they were restored
        return restored if step is None else found >= step

    def restore_rows(
        self, path: str, *, variables: Mapping[str, Sequence[VariablePiece]] | None = None, step: int | None = None
    ) -> None:
        """Replace the rows of the cluster by those of a checkpoint; of ranks that share PS, the chief does it.

        `variables` and `step`: as of `Client.restore`.
        """
        shared = self._ranks.several and not self._holds_rows
        with self._ranks.alike():
            if self._me.chief or not shared:
                self._client.restore(path, variables=variables, step=step)
        if shared:
            with self._ranks.alike():
                self._client.rejoin()  # to the others it is as if the PS had restarted

    def load(self, path: str, job: Job | None) -> RankState:
        """Take over what a checkpoint has beside its rows, which is what `check` gave; returns where this worker is.

        Raises:
            CheckpointError: It is damaged.
        """
        if job is None:
            return RankState()
        self.load_dense(job)
        rank, size = self._me.rank, self._me.world_size
        state = self._noted()
        if state is None and self._follows and not has_rank(path, rank, size):
            return RankState()  # it came later than the checkpoint
        return self._taken(read_rank(path, rank, size) if state is None else state)

    def load_note(self) -> RankState:
        """Take over what this worker left before there was a checkpoint, if rows that go with it are still there."""
        return self._taken(self._noted() or RankState())

    def _noted(self) -> RankState | None:
        """What this worker has left word of, where it does not wait for the chief, and rows have learned."""
        if self._notes is None or not self._follows or self._run.resume == "never":
            return None
        return self._notes.mine(int(self._client.global_step()))

    def _taken(self, state: RankState) -> RankState:
        """Take over what a worker has for itself."""
        if state.rng:
            set_rng_state(state.rng)  # and again when the data is at its place
        if state.scaler:
            self._scaler.load_state_dict(dict(state.scaler))
        self._callbacks.load_state_dict(state.callbacks)
        return state

    def check(self, path: str) -> Job | None:
        """What a checkpoint has beside its rows, if it has that; to be called before anything is replaced.

        Raises:
            CheckpointError: It is of another model, or damaged.
            InvalidRequestError: It is of another number of workers.
        """
        if not is_job(path):
            return None
        job = read_job(path)
        if job.task != type(self._task).__name__:
            raise CheckpointError(f"{path} is of the task {job.task}, this one is {type(self._task).__name__}")
        if job.world_size != self._me.world_size:
            raise InvalidRequestError(
                f"{path} was written by {job.world_size} workers, and there are {self._me.world_size}: their positions "
                f"in the data do not fit; go on with {job.world_size}, or begin the data anew: resume=never and "
                f"warm_start={path}, with another model_dir"
            )
        if self.resets(job):
            self._check_reset(path)
            return replace(job, dense={}, optimizer={})
        self._check_model(path, job, trains=True)
        return job

    def resets(self, job: Job) -> bool:
        """Whether the dense part begins anew where this run goes on at a job's checkpoint."""
        return self._run.reset_dense not in ("", job.run.get("reset_dense"))

    def _check_reset(self, path: str) -> None:
        """Refuse to begin the dense part anew where PS may have the old one."""
        if self._placement.rows == "ps" and isinstance(self._dense, DenseOnPs | AllReduced):
            raise InvalidRequestError(
                f"reset_dense={self._run.reset_dense!r}: the PS may have the dense parameters of {path}; use "
                f"warm_start={path} with warm_start_parts=rows, PS without them and another model_dir"
            )

    def read(self, path: str) -> Job:
        """What a checkpoint has beside its rows, for whoever does not go on with it: of any number of workers.

        Raises:
            CheckpointError: It has rows alone, is of another model, or damaged.
        """
        read_manifest(path)
        job = read_job(path)
        self._check_model(path, job)
        return job

    def _check_model(self, path: str, job: Job, *, tables: bool = True, trains: bool = False) -> None:
        """Refuse the parameters, and the tables where they are asked for, of another model.

        `trains`: whether to say how one trains on all the same.

        Raises:
            CheckpointError: What differs, in one line.
        """
        wrong: list[str] = []
        rows_fit = True
        if tables and job.tables:
            wrong += _differing("tables", self._tables.keys(), job.tables.keys())
            for name in sorted(self._tables.keys() & job.tables.keys()):
                if job.tables[name] != self._tables[name]:
                    wrong.append(
                        f"its table {name!r} has rows of {_sum(job.tables[name])}, not {_sum(self._tables[name])}"
                    )
                    rows_fit = False
        mine: Mapping[str, torch.Tensor] = self._task.state_dict()
        wrong += _differing("dense values", mine.keys(), job.dense.keys())
        shapes = sorted(name for name in mine.keys() & job.dense.keys() if mine[name].shape != job.dense[name].shape)
        wrong += [f"it has other shapes of {shapes}"] if shapes else []
        if wrong:
            own = type(self._task).__name__
            hint = f"; a new model_dir with warm_start={path} and warm_start_parts=rows begins with its rows"
            of = f"the task {job.task}, this one is {own}" if job.task != own else f"another {own}"
            raise CheckpointError(f"{path} is of {of}: {', '.join(wrong)}{hint if trains and rows_fit else ''}")

    def load_dense(self, job: Job) -> None:
        """Take over parameters, buffers and the optimizer's state of a job that was checked."""
        if job.dense:
            self._task.load_state_dict(dict(job.dense))
        elif self.resets(job):
            log.warning("dense parameters begin anew, as reset_dense=%r says", self._run.reset_dense)
        self._task.texts |= set(job.texts)
        if job.optimizer:
            self._optimization.load_state_dict(dict(job.optimizer))
        if isinstance(self._dense, DenseOnPs):
            self._dense.drain()  # values that were read ahead are older
            self._dense.pull()

    def load_to_read(self, step: int) -> None:
        """Have what is evaluated or predicted with, on a cluster at `step`: its rows, and the newest dense part.

        Rows are replaced only where they are in this process or in the workers.

        Raises:
            InvalidRequestError: There is nothing that was trained.
        """
        run = self._run
        path: str | None = run.resume
        if run.resume in ("latest", "never"):
            path = newest_job(run.model_dir) if run.model_dir else None
        job = read_job(path) if path is not None and is_job(path) else None
        if path is not None and job is not None:
            if self.resets(job):
                job = replace(job, dense={}, optimizer={})
            else:
                self._check_model(path, job)
        if path is not None and self._placement.rows != "ps":
            self.restore_rows(path, variables={} if job is not None and self.resets(job) else None)
        if path is not None and job is not None:
            self.load_dense(job)
        elif step > 0 and not isinstance(self._dense, DenseOnPs):
            log.warning("no checkpoint of model_dir=%r has the dense part: it is as it was made", run.model_dir)

    def warm_start(self, path: str) -> Matched:
        """Begin a new run with what a checkpoint has; the position in the data is that of a new run.

        Returns:
            Which of its dense parameters and buffers are taken.

        Raises:
            CheckpointError: It lacks what the run takes, or has it in another shape; nothing was changed.
            InvalidRequestError: The run takes something for a parameter that the model does not have.
        """
        run = self._run
        rows, dense = run.warm_start_parts != "dense", run.warm_start_parts != "rows"
        job = read_job(path) if dense and (is_job(path) or not rows) else None
        matched = Matched({})
        if job is not None:
            mine, theirs = (
                {name: tuple(each.shape) for name, each in values.items()}
                for values in (self._task.state_dict(), job.dense)
            )
            matched = match(path, mine, theirs, aliases=run.warm_start_aliases, how=run.warm_start_match)
            tell(path, matched)
        if rows:
            on_ps = isinstance(self._dense, DenseOnPs)
            variables = variables_of(matched, job, self._task) if job is not None and on_ps else {}
            step = None if run.warm_start_keep_step else 0
            self.restore_rows(path, variables=None if dense and job is None else variables, step=step)
        if job is not None:
            self._take(matched, job)
        return matched

    def _take(self, matched: Matched, job: Job) -> None:
        """Begin with values and optimizer state of another run."""
        self._task.load_state_dict({**self._task.state_dict(), **values_of(matched, job.dense)})
        self._task.texts |= set(job.texts)
        load_optimizer(self._dense, self._task, matched, job)
        if isinstance(self._dense, DenseOnPs):
            self._dense.drain()  # values that were read ahead are older
            self._dense.publish()
            self._dense.pull()


def _differing(what: str, mine: Collection[str], its: Collection[str]) -> list[str]:
    """Which names a checkpoint lacks, and has beside."""
    lacking, strange = sorted({*mine} - {*its}), sorted({*its} - {*mine})
    return [
        *([f"it lacks the {what} {lacking}"] if lacking else []),
        *([f"it has the {what} {strange} beside"] if strange else []),
    ]


def _sum(floats: Iterable[int]) -> str:
    """Floats of a row, as a person says them: 1 + 16."""
    return f"{' + '.join(map(str, floats))} floats"

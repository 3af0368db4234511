"""Trainer: one worker's loop over its shard of the data, from the first batch to the last checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.nn import functional

from trilith.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    mark_order,
    newest_complete,
    next_number,
    prune,
    read_manifest,
)
from trilith.errors import InvalidRequestError, ShardRestartedError, TrilithError
from trilith.nn import AllReduced, ClippedBackward, DenseOnPs, FetchedRows, auc, pick_device
from trilith.nn.bags import IdsLike
from trilith.pipelining import Fetch, Pending
from trilith.rows import Rows
from trilith.serving.debugging import write_debugging_info
from trilith_services.worker.config import WorkerConfig
from trilith_services.worker.events import Emit
from trilith_services.worker.meter import Meter
from trilith_services.worker.position import Position
from trilith_services.worker.task import Batch, Task

__all__ = ["Trainer", "save_checkpoint"]

log = logging.getLogger(__name__)

STEP_EVERY = 8
"""Steps of this worker between two advances of the cluster's counter: a call each would cost more than it tells."""

KEEP_CHECKPOINTS = 3


class Trainer:
    """Trains until the epochs are done, `stop` says so, or the cluster cannot be reached.

    Args:
        config: What to do.
        client: An open `trilith.Client`, or the `PeerClient` of workers that hold the rows themselves.
        task: The model and the whole data, of which the trainer takes its shard.
        emit: Is told how it goes.
        clock: Source of Unix seconds, for checkpoint names.
    """

    def __init__(
        self,
        config: WorkerConfig,
        client: Rows,
        task: Task,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._client = client
        self._task = task
        self._leads = config.rank == 0
        self._saves = bool(config.model_dir) and (self._leads or client.together)
        self._emit = emit
        self._clock = clock
        self._epochs = config.epochs or task.epochs
        self._shard = task.train.shard(config.rank, config.world_size)
        self.model = task.build(
            client, seed=config.seed, device=pick_device(config.device), async_push=config.async_push
        )
        self._embeddings = self.model.embeddings
        self._dense = self._make_dense()
        self._clipped: Callable[[torch.Tensor], None] | None = None
        if config.clip_norm:
            self._clipped = ClippedBackward(self._embeddings, self.model.head, clip_norm=config.clip_norm)
        self._meter = Meter()
        self._samples_per_epoch = self._agree_on_samples()
        self._position = Position.load(config.state_file, config)
        self._uncounted = 0
        self._cluster_step = 0
        self._saved_step = 0
        self._first_save = False  # whether there is no checkpoint yet that a PS could come back from

    def _make_dense(self) -> DenseOnPs | AllReduced:
        config, task, head = self._config, self._task, self.model.head
        if not config.synchronous:
            return DenseOnPs(
                self._client,
                head,
                task.dense_optimizer,
                prefetch=config.prefetch > 0,
                async_push=config.async_push,
            )
        return AllReduced(
            self._client,
            head,
            task.torch_optimizer(head.parameters()),
            stored_as=task.dense_optimizer,
            all_publish=self._client.together,
        )

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train; returns whether all was done rather than stopped before."""
        config = self._config
        self._cluster_step = self._saved_step = self._client.global_step()
        if self._saves:
            self._check_model_dir()
        self._describe()
        self._emit(
            {"event": "start", "rank": config.rank, "total_steps": self._total_steps(), **asdict(self._position)}
        )
        try:
            finished = self._train(stop)
            self._drain()
        finally:
            self._embeddings.close()
            self._dense.close()
        self._count_steps(flush=True)
        unsaved = self._cluster_step != self._saved_step
        if self._saves and (self._client.together or (config.save_every and finished and unsaved)):
            self._save()  # what workers hold themselves ends with them
        elif isinstance(self._dense, AllReduced):
            self._dense.publish()
        self._progress(self._meter.summary())
        self._emit({"event": "done" if finished else "stopped", "rank": config.rank, "samples": self._meter.samples})
        return finished

    def _train(self, stop: Callable[[], bool]) -> bool:
        config = self._config
        while self._position.epoch < self._epochs:
            with self._embeddings.prefetch(
                self._batches(), config.prefetch, ids=_ids, lookup_queue=config.lookup_queue
            ) as batches:
                for batch, fetched in batches:
                    if self._should_stop(stop):
                        return False
                    if config.steps and self._position.steps >= config.steps:
                        return True
                    self._guarded(partial(self._step, batch, fetched))
                    self._position = Position(self._position.epoch, self._position.batch + 1, self._position.steps + 1)
                    self._count_steps()
                    if self._meter.due():
                        self._progress(self._meter.report())
                    self._save_if_due()
            self._position = Position(self._position.epoch + 1, 0, self._position.steps)
            self._drain()
            self._position.save(config.state_file, config)
            if config.validate and self._client.together:
                if self._should_stop(stop):
                    return False
                self._validate()
            elif config.validate and self._leads and not stop():
                self._guarded(self._validate)
        return True

    def _total_steps(self) -> int:
        batches = -(-self._samples_per_epoch // self._config.batch_size)
        total = batches * self._epochs
        return min(total, self._config.steps) if self._config.steps else total

    def _agree_on_samples(self) -> int:
        """Samples per epoch: all-reduce needs as many steps from everyone, so there the smallest shard counts."""
        size = len(self._shard)
        return _all_reduced(size, distributed.ReduceOp.MIN) if self._config.synchronous else size

    def _should_stop(self, stop: Callable[[], bool]) -> bool:
        """Whether to stop; with all-reduce everyone stops as soon as anyone must, or the rest would wait forever."""
        wanted = stop()
        return bool(_all_reduced(int(wanted), distributed.ReduceOp.MAX)) if self._config.synchronous else wanted

    def _batches(self) -> Iterator[Batch]:
        """What is left of the present epoch; its order depends on seed, epoch and rank only."""
        config, at = self._config, self._position
        return self._shard.epoch(
            config.batch_size, seed=config.seed, epoch=at.epoch, samples=self._samples_per_epoch, skip=at.batch
        )

    def _drain(self) -> None:
        """Wait for all updates that are on their way."""
        self._guarded(self._embeddings.drain)
        self._guarded(self._dense.drain)

    def _step(self, batch: Batch, fetched: Fetch[FetchedRows] | Pending[FetchedRows]) -> None:
        """Forward, backward, and both kinds of parameters stepped."""
        try:
            self._dense.pull()
            logits = self.model(fetched.result())
            labels = torch.from_numpy(batch.labels).to(logits.device)
            loss = functional.binary_cross_entropy_with_logits(logits, labels)
            # The rows' gradients are applied here.
            if self._clipped is None:
                loss.backward()
            else:
                self._clipped(loss)
        except ShardRestartedError:
            self._dense.zero_grad()  # what was given up shall not be in the next step
            # The others wait in their all-reduce: take part, with nothing to say.
            if isinstance(self._dense, AllReduced):
                self._dense.step()
            raise
        self._dense.step()
        self._meter.add(batch.labels, logits.detach().cpu().numpy(), loss.item())

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run something; if a PS restarted meanwhile, accept its state and go on without repeating."""
        try:
            action()
        except ShardRestartedError:
            self._rejoin()

    def _describe(self) -> None:
        """Leave word of where the PS are, for those who want to look into them."""
        if self._leads and self._config.model_dir and not self._client.together:
            write_debugging_info(self._config.model_dir, self._client, num_workers=self._config.world_size)

    def _rejoin(self) -> None:
        for shard in self._client.rejoin():
            if shard.missing_variables and isinstance(self._dense, DenseOnPs):
                self._dense.create()
            back = max(shard.known_step - shard.restored_step, 0)
            log.warning(
                "PS %d restarted and went back %d steps; going on with the next batch",
                shard.index,
                back,
                extra={
                    "restored_from": shard.restored_from or "nothing",
                    "restored_step": shard.restored_step,
                    "known_step": shard.known_step,
                },
            )
            self._emit(
                {
                    "event": "rejoined",
                    "rank": self._config.rank,
                    "shard": shard.index,
                    "restored_from": shard.restored_from,
                    "restored_step": shard.restored_step,
                    "known_step": shard.known_step,
                    "steps_back": back,
                }
            )
        self._describe()

    # ---- around the loop ---------------------------------------------------------------------------------------------

    def _count_steps(self, *, flush: bool = False) -> None:
        """Advance the cluster's step counter now and then."""
        self._uncounted += not flush
        if self._uncounted >= STEP_EVERY or (flush and self._uncounted):
            count, self._uncounted = self._uncounted, 0
            self._guarded(partial(self._advance, count))

    def _advance(self, count: int) -> None:
        self._cluster_step = self._client.global_step(advance=count)

    def _progress(self, figures: dict[str, Any]) -> None:
        self._position.save(self._config.state_file, self._config)
        at = self._position
        self._emit(
            {
                **figures,
                "event": "progress",
                "rank": self._config.rank,
                "epoch": at.epoch,
                "steps": at.steps,
            }
        )

    def _validate(self) -> None:
        if isinstance(self._dense, DenseOnPs):
            self._dense.pull()
        samples = self._task.validation
        score = auc(samples.labels, self.model.predict(samples))
        if not self._leads:
            return
        self._emit({"event": "validation", "rank": 0, "epoch": self._position.epoch, "auc": score})
        log.info("validated", extra={"epoch": self._position.epoch, "auc": f"{score:.4f}"})

    def _check_model_dir(self) -> None:
        """See that what this run will save is not less than what is there already; nothing is written.

        Raises:
            InvalidRequestError: The newest checkpoint is ahead of the cluster.
        """
        directory = self._config.model_dir
        newest = newest_complete(directory)
        self._first_save = self._cluster_step == 0 if self._client.together else newest is None
        if newest is None:
            return
        step = read_manifest(newest.path).global_step
        if step > self._cluster_step:
            raise InvalidRequestError(
                f"--model-dir {directory} is ahead of the cluster: its newest checkpoint, {newest.path}, is of step "
                f"{step}, the cluster is at step {self._cluster_step}. Start the PS with --checkpoint-dir {directory}, "
                "or restore it (Client.restore), or name another directory"
            )

    def _save_if_due(self) -> None:
        config = self._config
        if not self._saves:
            return
        if self._first_save and self._cluster_step > self._saved_step:
            self._first_save = False
            self._save()  # so that a PS that dies early has something to start from
            return
        if not config.save_every:
            return
        # The counter goes back when PS 0 does.
        self._saved_step = min(self._saved_step, self._cluster_step)
        if self._cluster_step - self._saved_step >= config.save_every:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint; one that fails is reported, and training goes on."""
        self._drain()
        if isinstance(self._dense, AllReduced):
            self._dense.publish()
        try:
            path, step = save_checkpoint(self._client, self._config.model_dir, clock=self._clock, tidy=self._leads)
        except ShardRestartedError:
            self._rejoin()
            return
        except (TrilithError, OSError) as error:
            log.warning("checkpoint failed: %s", error)
            self._emit({"event": "save_failed", "rank": self._config.rank, "error": str(error)})
            return
        self._cluster_step = self._saved_step = step
        if not self._leads:
            return
        log.info("saved", extra={"path": path, "step": step})
        self._emit({"event": "saved", "rank": self._config.rank, "path": path, "step": step})


def _ids(batch: Batch) -> Mapping[str, IdsLike]:
    return batch.features


def _all_reduced(value: int, how: distributed.ReduceOp.RedOpType) -> int:
    shared = torch.tensor([value])
    distributed.all_reduce(shared, how)
    return int(shared[0])


def save_checkpoint(
    client: Rows, model_dir: str, *, clock: Callable[[], float] = time.time, tidy: bool = True
) -> tuple[str, int]:
    """Write the next numbered checkpoint below `model_dir` and, if `tidy`, drop old ones; returns its path and step."""
    there = list_checkpoints(model_dir)
    number = next_number(there, int(clock() * 1000))
    path = f"{model_dir.rstrip('/')}/{checkpoint_name(number)}"
    if tidy:
        mark_order(path, there, number)
    step = int(client.save(path))
    if tidy:
        used = set() if client.together else {answer.restored_from for answer in client.describe()}
        prune(model_dir, KEEP_CHECKPOINTS, used=used)
    return path, step

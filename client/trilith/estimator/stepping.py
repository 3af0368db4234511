"""Stepper: one step of training, from batches to what rows and dense parameters become of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilith.errors import NonFiniteError, ShardRestartedError
from trilith.estimator.config import RunConfig
from trilith.estimator.progress import Learned, Watch
from trilith.estimator.rows import Prepared, TaskRows
from trilith.estimator.task import Task
from trilith.nn import FetchedRows
from trilith.nn.optimization import Optimization

__all__ = ["Stepper"]


class Stepper:
    """Learns from batches, and takes the step of as many as the run accumulates. What it holds is the Estimator's.

    Args:
        run: What the run does.
        task: The model.
        rows: Of its features.
        optimization: Steps rows and dense parameters.
        outputs: Calls the model.
        device: Where it computes.
        dated: Told of every step, before it is taken: the latest time of its samples, of all ranks in step.
        applied: Told that a step was taken with a gradient.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        rows: TaskRows,
        optimization: Optimization,
        outputs: Callable[[Any], dict[str, Tensor]],
        device: torch.device,
        *,
        dated: Callable[[int | None], None],
        applied: Callable[[], None],
    ) -> None:
        self._run, self._task, self._rows, self._optimization = run, task, rows, optimization
        self._outputs, self._device = outputs, device
        self._dated, self._applied = dated, applied
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.held = 0
        """Batches whose gradients wait for others of their step."""
        self.sample: Prepared | None = None
        """The newest batch that was learned from."""
        self._buffers: list[Tensor] = []

    def learn(self, prepared: Prepared | None, fetch: Callable[[], FetchedRows | None], where: str) -> Learned | None:
        """Learn from a batch, and take the step where one is due; None where this rank had no batch for it.

        A rank that has nothing to give, since its data has ended or a PS has restarted, takes the step all the same:
        the others wait for it.
        """
        failed: ShardRestartedError | None = None
        learned: Learned | None = None
        try:
            if self.held == 0:
                self._optimization.pull()
                self._keep_buffers()
            rows = fetch()
            if prepared is not None:
                learned = self._learn(prepared, rows, where)
        except ShardRestartedError as error:
            self._optimization.zero_grad()
            failed = error
        except BaseException:
            self.give_up()
            raise
        self.held += 1
        if self.held >= self._run.accumulate:
            began = time.perf_counter()
            self.apply()
            if learned is not None:
                learned.seconds["push"] = time.perf_counter() - began
        if failed is not None:
            raise failed
        return learned

    def _learn(self, prepared: Prepared, rows: FetchedRows | None, where: str) -> Learned:
        """Forward and backward."""
        run, watch = self._run, Watch()
        self.sample = prepared
        self._task.train()
        if self._task.request_time:
            newest = max(self._rows.request_time(prepared), self._optimization.request_time or 0)
            self._optimization.request_time = newest
        with self.autocast():
            outputs = self._outputs(self._rows.inputs(prepared, rows))
            labels, weight = self._rows.labels(prepared)
            losses = self._task.loss(outputs, labels, weight)
            loss = self._task.total(losses)
        value = float(loss.detach())
        watch.lap("forward")
        if not math.isfinite(value) and not run.skip_non_finite:
            raise NonFiniteError(
                f"the loss of {where} is {value}; look at its labels "
                "and dense values, lower the learning rate or bound gradients with clip_norm; skip_non_finite=true "
                "leaves such steps out"
            )
        self.scaler.scale(loss / run.accumulate if run.accumulate > 1 else loss).backward()
        watch.lap("backward")
        parts = {} if isinstance(losses, Tensor) else {name: float(each.detach()) for name, each in losses.items()}
        seen = {name: each.detach() for name, each in outputs.items()}
        return Learned(value, parts, seen, replace(prepared, ids={}, weights={}, dense={}, rest={}), watch.seconds)

    def give_up(self) -> None:
        """Forget the gradients of a batch that failed."""
        self._optimization.zero_grad()
        self.held = 0

    def apply(self) -> None:
        """Take a step with the gradients since the last one."""
        self.held = 0
        optimization = self._optimization
        before = optimization.applied
        try:
            optimization.average()
            self._dated(optimization.request_time)
            scaled = self._run.precision == "fp16" and optimization.has_gradients()
            if scaled:
                self.scaler.scale(torch.zeros((), device=self._device))  # where this rank has had no loss yet
                self.scaler.unscale_(optimization)
            if self._run.clip_norm:
                optimization.clip(self._run.clip_norm)
            if scaled:
                self._step_scaled()
            else:
                optimization.step()
        finally:
            optimization.zero_grad()
        if optimization.applied > before:
            self._applied()
        else:
            self._restore_buffers()

    def _keep_buffers(self) -> None:
        """Have running means and the like as they were, should the step be left out: they may become NaN with it."""
        may_skip = self._run.skip_non_finite or self._run.precision == "fp16"
        self._buffers = [each.clone() for each in self._task.buffers()] if may_skip else []

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        # None are kept where nothing is left out.
        for each, was in zip(self._task.buffers(), self._buffers, strict=False):
            each.copy_(was)

    def _step_scaled(self) -> None:
        try:
            self.scaler.step(self._optimization)
        finally:
            self.scaler.update()

    def autocast(self) -> Any:
        """Within it the model computes in what the run's `precision` says."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._run.precision)
        return torch.autocast(self._device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

"""Placement: where the rows of a run are and where its dense parameters: which pairs there are, what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from trilith.errors import InvalidRequestError
from trilith.estimator.task import Task
from trilith.nn.anchored import dense_parameters
from trilith.nn.dense import AllReduced, DenseOnPs
from trilith.pipelining import Lane
from trilith.tables import Adam, Sgd
from trilith.tables.optimizers import Optimizer as RowOptimizer

__all__ = ["Placement", "make_dense"]

RowsAt: TypeAlias = Literal["process", "ps", "workers"]
DenseAt: TypeAlias = Literal["local", "ps", "allreduce"]

# Where rows and dense parameters are: whether several workers may, and what else there is where that does not work.
_PAIRS: dict[tuple[RowsAt, DenseAt], bool] = {
    ("process", "local"): False,
    ("process", "ps"): False,
    ("process", "allreduce"): False,
    ("ps", "local"): False,
    ("ps", "ps"): True,
    ("ps", "allreduce"): True,
    ("workers", "allreduce"): True,
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where things are.

    Attributes:
        rows: In this process, on the PS, or in the workers.
        dense: In this process, on the PS, or in all workers alike.
    """

    rows: RowsAt
    dense: DenseAt

    @classmethod
    def of(cls, cluster: str, dense: str, task: Task, world_size: int) -> Placement:
        """By a run's `cluster` and `dense`.

        Raises:
            InvalidRequestError: The two do not go together, or not with so many workers.
        """
        rows: RowsAt = "process" if cluster.startswith("local://") else "ps"
        if cluster.startswith("peers://"):
            rows = "workers"
        on_ps = isinstance(task.dense_optimizer, RowOptimizer)
        if dense == "auto":
            dense = "ps" if on_ps else "allreduce" if world_size > 1 or rows == "workers" else "local"
        where: Any = dense
        scheme, _, _ = cluster.partition("://")
        if (rows, where) not in _PAIRS:
            legal = [pair[1] for pair in _PAIRS if pair[0] == rows]
            raise InvalidRequestError(f"dense={dense!r} with cluster={scheme}://: it may be {legal}")
        if world_size > 1 and not _PAIRS[rows, where]:
            raise InvalidRequestError(
                f"dense={dense!r} with cluster={scheme}:// is for one worker, and there are {world_size}"
            )
        if on_ps != (dense == "ps") and task.dense_optimizer is not None:
            kind = type(task.dense_optimizer).__name__
            need = "one of trilith.tables" if dense == "ps" else "a function that makes a torch optimizer"
            raise InvalidRequestError(f"dense={dense!r} with dense_optimizer={kind}: it needs {need}")
        return cls(rows, where)

    @property
    def synchronous(self) -> bool:
        """Whether workers take every step together."""
        return self.dense == "allreduce"


def make_dense(
    placement: Placement, task: Task, client: Any, *, prefetch: bool, async_push: int, lane: Lane | None
) -> torch.optim.Optimizer | DenseOnPs | AllReduced | None:
    """What steps a task's dense parameters; None where it has none."""
    named = [parameter for _, parameter in dense_parameters(task)]
    if not named:
        return None
    if placement.dense == "ps":
        optimizer = task.dense_optimizer or Adam(learning_rate=1e-3)
        return DenseOnPs(client, task, optimizer, prefetch=prefetch, async_push=async_push, lane=lane)
    make: Callable[[Iterable[nn.Parameter]], Any] = task.dense_optimizer or _adam
    if not callable(make):
        raise InvalidRequestError(
            f"dense_optimizer is {type(make).__name__}(...), made before there were parameters; give a function: "
            f"lambda parameters: torch.optim.{type(make).__name__}(parameters, ...)"
        )
    made = make(named)
    if not isinstance(made, torch.optim.Optimizer):
        raise InvalidRequestError(
            f"dense_optimizer made a {type(made).__name__} of the parameters; a torch optimizer is needed"
        )
    if placement.dense == "allreduce":
        return AllReduced(client, task, made, stored_as=Sgd(learning_rate=0.0), all_publish=placement.rows == "workers")
    return made


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)

"""How tasks get labels out of actions: the text form "pos:neg:rate;…" and its protos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilith.errors import InvalidRequestError
from trilith_proto import data_op_config_pb2

__all__ = ["TaskLabel", "fill_tasks", "label_conf", "parse_tasks", "tasks_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLabel:
    """Which actions make a sample positive or negative for one task.

    Attributes:
        pos_actions: At least one, none of them negative too.
        neg_actions: Without any, every sample that is not positive is negative.
        sample_rate: Probability that a negative gets a label; within [0, 1].
    """

    pos_actions: tuple[int, ...]
    neg_actions: tuple[int, ...] = ()
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pos_actions", "neg_actions"):
            outside = [each for each in getattr(self, name) if not -(2**31) <= each < 2**31]
            if outside:
                raise InvalidRequestError(f"{name} has {outside[0]}; an action is an int32")
        if not self.pos_actions:
            raise InvalidRequestError("pos_actions is empty; a task needs a positive action")
        both = sorted(set(self.pos_actions) & set(self.neg_actions))
        if both:
            raise InvalidRequestError(f"pos_actions and neg_actions both have {both[0]}")
        if not 0.0 <= self.sample_rate <= 1.0:
            raise InvalidRequestError(f"sample_rate={self.sample_rate} is outside [0, 1]")


def parse_tasks(config: str) -> tuple[TaskLabel, ...]:
    """The tasks of a text such as "1,2:3:1.0;4::0.5"; empty parts between semicolons are skipped."""
    tasks = [_parse_task(part, config) for part in config.split(";") if part.strip()]
    if not tasks:
        raise InvalidRequestError(f"config is {config!r}; it needs a task such as '1,2:3:1.0'")
    return tuple(tasks)


def _parse_task(part: str, config: str) -> TaskLabel:
    pieces = part.split(":")
    if len(pieces) != 3:
        raise InvalidRequestError(f"config {config!r}: {part!r} has {len(pieces)} parts; a task is pos:neg:rate")
    try:
        positive, negative = (tuple(int(each) for each in piece.split(",") if each.strip()) for piece in pieces[:2])
        rate = float(pieces[2])
    except ValueError:
        raise InvalidRequestError(f"config {config!r}: {part!r} is no pos:neg:rate of integers and a number") from None
    try:
        return TaskLabel(pos_actions=positive, neg_actions=negative, sample_rate=rate)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"config {config!r}: {error}") from None


def fill_tasks(target: Any, tasks: Sequence[TaskLabel]) -> None:
    """Append tasks to a repeated field of TaskLabelConf or AddLabelConfig.TaskLabelConfig."""
    for task in tasks:
        target.add(pos_actions=task.pos_actions, neg_actions=task.neg_actions, sample_rate=task.sample_rate)


def tasks_of(configs: Any) -> tuple[TaskLabel, ...]:
    """The tasks in a repeated field of TaskLabelConf or AddLabelConfig.TaskLabelConfig."""
    return tuple(
        TaskLabel(
            pos_actions=tuple(each.pos_actions),
            neg_actions=tuple(each.neg_actions),
            sample_rate=float(np.float32(each.sample_rate)),
        )
        for each in configs
    )


def label_conf(config: str) -> data_op_config_pb2.LabelConf:
    """The LabelConf of a text such as "1,2:3:1.0;4::0.5"."""
    made = data_op_config_pb2.LabelConf()
    fill_tasks(made.conf, parse_tasks(config))
    return made

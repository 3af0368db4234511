"""Events: what a run tells its callbacks, one frozen dataclass for each thing that happens.

Every worker has its own; figures that are agreed upon, such as those of an evaluation, are the same in all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trilith.estimator.config import RunConfig

__all__ = [
    "EVENTS",
    "Done",
    "Epoch",
    "Evaluated",
    "Event",
    "Exported",
    "Failed",
    "Paused",
    "Restored",
    "Resumed",
    "RowsRejoined",
    "SaveFailed",
    "Saved",
    "ShardRestarted",
    "Started",
    "Step",
    "Stop",
    "Stopped",
]

EVENTS: dict[str, type[Event]] = {}
"""Class by name: "rows_rejoined" is RowsRejoined."""


@dataclass(frozen=True, slots=True)
class Stop:
    """What a callback returns to end training after this step, in every worker; it is no failure.

    Attributes:
        reason: For people, such as "valid/click/auc has not improved for 2 evaluations".
    """

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        name: Of the class, in lower case with underscores: the method `on_<name>` of a callback, and "event" in lines.
        step: Steps of all workers, as far as this one knows.
    """

    name: ClassVar[str] = "event"

    step: int = 0

    def __init_subclass__(cls, **named: Any) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        EVENTS[cls.name] = cls

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values by field, and the name as "event"; a number that is not finite is None."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {"event": self.name, **{name: _plain(value) for name, value in fields.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, RunConfig):
        return value.non_defaults()  # shows no passwords
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """Training is about to begin, or to go on after a restore.

    Attributes:
        rank: Of this worker.
        world_size: How many there are.
        epoch: Passes done before.
        total_steps: Steps that this worker will have done in the end; None where the data does not say.
        config: The run.
        figures: Names in the metrics of its evaluations to come; empty: there will be none.
    """

    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    total_steps: int | None = None
    config: RunConfig = field(default_factory=RunConfig)
    figures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Event):
    """This worker has done a step.

    Attributes:
        own_step: Steps of this worker, earlier starts included.
        epoch: The pass, from 0.
        samples: Samples of this worker since it started.
        loss: Of this step, summed over heads.
        losses: Of each head.
        metrics: Of the newest samples, predicted before the model learned from them.
        rates: Learning rates by group of parameters.
        samples_per_s: Since the step before.
        seconds: What took how long, by phase: "data" (waiting for the batch), "lookup", "forward", "backward", "push",
            "dense" and whatever else the loop times.
        skipped: Steps left out so far because a loss or gradient was not finite.
        event_time: The latest time of the samples that were learned from, Unix seconds; None where the task has no
            `request_time`.
    """

    own_step: int = 0
    epoch: int = 0
    samples: int = 0
    loss: float = math.nan
    losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    samples_per_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0
    event_time: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch(Event):
    """A pass over this worker's data is done.

    Attributes:
        epoch: Which, from 0.
        samples: In it, since this worker started.
        seconds: It took since then, with evaluations and saves in the middle of it.
    """

    epoch: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """An evaluation is done, over the samples of all workers.

    Attributes:
        epoch: Passes done, or the pass that goes on.
        metrics: Figures by "part/head/metric", such as "valid/click/auc", with "valid/loss" among them.
        samples: Counted.
        seconds: It took.
    """

    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """This worker waits, as an operator asked for (`trilith control pause`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """It goes on, or ends.

    Attributes:
        seconds: It has waited.
    """

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A checkpoint is whole.

    Attributes:
        path: Of it.
        event_time: The latest time of the samples that this worker had learned from, Unix seconds; of workers in step,
            of all. None where the task has no `request_time`.
        dense_only: It holds no rows.
        seconds: It took.
    """

    path: str = ""
    event_time: int | None = None
    dense_only: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """A checkpoint could not be written; training goes on, and the one before is still there.

    Attributes:
        path: Where it would have been.
        error: Why.
    """

    path: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """Training goes on from a checkpoint, or begins with one.

    Attributes:
        path: Of it.
        epoch: Passes done in it.
        warm_start: It is the beginning of another run, and these are its dense parameters and buffers:
        renamed: Those that come from another name of the checkpoint, or from rows of several, by their own.
        missing: Those that the checkpoint lacks, which begin as they were made.
        left: Those of the checkpoint that are not taken.
    """

    path: str = ""
    epoch: int = 0
    warm_start: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRestarted(Event):
    """A PS came back without what it had; the batch that met it is given up.

    Attributes:
        shard: Its index; -1: not known yet.
        error: What was met.
    """

    shard: int = -1
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsRejoined(Event):
    """Training goes on with the rows that a restarted PS has.

    Attributes:
        shard: Its index.
        restored_from: The checkpoint it came back from; empty: none.
        restored_step: The step of that.
        known_step: The step that it had been at.
        steps_back: How many steps its rows lost.
    """

    shard: int = 0
    restored_from: str = ""
    restored_step: int = 0
    known_step: int = 0
    steps_back: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Event):
    """An export is whole.

    Attributes:
        path: Of it.
        version: Its number.
        seconds: It took.
    """

    path: str = ""
    version: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """Training ends with an error, which is raised when all callbacks know.

    Attributes:
        error: It.
    """

    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """Training ends before its end, as asked by a signal, another worker, or a callback.

    Attributes:
        reason: Who asked, and why.
        samples: Of this worker since it started.
        seconds: Since then.
    """

    reason: str = ""
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Event):
    """All is trained.

    Attributes:
        samples: Of this worker since it started.
        seconds: Since then.
        samples_per_s: From the first step to the last.
        metrics: Of the last evaluation.
    """

    samples: int = 0
    seconds: float = 0.0
    samples_per_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

"""Ops that change the labels and actions of samples; all samples stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import line_field, line_fields
from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.filters import line_domain, relation_of_line_field
from trilith.data.samples.label_conf import TaskLabel, parse_tasks
from trilith.data.samples.relations import Bits, Domain, Relation, count_distinct
from trilith.data.samples.rows import INVALID_LABEL, appended, at, with_first
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = [
    "AddAction",
    "AddLabel",
    "FillMultiRankOutput",
    "LabelNormalization",
    "LabelUpperBound",
    "UseFieldAsLabel",
]

Float32Array = npt.NDArray[np.float32]
_ACTIONS = frozenset(("actions",))
_SCALAR_OPERATORS = ("gt", "ge", "eq", "lt", "le", "neq", "between", "in")


@dataclass(frozen=True)
class AddAction(SampleOp):
    """Append an action to samples whose LineId satisfies a relation; a list or unknown field satisfies none.

    Attributes:
        field_name: Of LineId.
        op: gt, ge, eq, lt, le, neq, between or in.
        operand: As in `FilterByValue`.
        action: To append.
    """

    field_name: str
    op: str
    operand: Any
    action: int

    def __post_init__(self) -> None:
        if self.op not in _SCALAR_OPERATORS:
            raise InvalidRequestError(f"op is {self.op!r}; it can be {', '.join(_SCALAR_OPERATORS)}")
        if not -(2**31) <= self.action < 2**31:
            raise InvalidRequestError(f"action={self.action} is no int32")
        _ = self._relation

    @cached_property
    def _relation(self) -> Relation | None:
        described = line_fields().get(self.field_name)
        if described is None or described.repeated:
            return None
        return relation_of_line_field(described, self.op, self.operand)

    @property
    def needs(self) -> Needs:
        return Needs(line_id=_ACTIONS | {self.field_name}) if self._relation else Needs()

    def apply(self, samples: Samples) -> None:
        if self._relation:
            hits = samples.relation(self.field_name, self._relation)
            action = np.full((len(samples), 1), self.action, np.int64)
            if hits.any():
                samples.put("actions", appended(samples.rows("actions"), action, hits))


@dataclass(frozen=True)
class AddLabel(SampleOp):
    """Append one label per task, made of the sample's actions.

    A first label that is there and not above 0 becomes INVALID_LABEL before. A task's label is 1 if an action is
    positive for it; else INVALID_LABEL if it has negative actions and none hits; else `negative_value`, with the task's
    probability, or INVALID_LABEL. The sample's rate becomes `new_sample_rate`.

    Attributes:
        config: Tasks, or a text such as "1,2:3:1.0;4::0.5".
        negative_value: See above.
        new_sample_rate: Within (0, 1].
        seed: Of the draws.
    """

    config: str | Sequence[TaskLabel]
    negative_value: float = 0.0
    new_sample_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.new_sample_rate <= 1.0:
            raise InvalidRequestError(f"new_sample_rate={self.new_sample_rate} is outside (0, 1]")
        if not self.tasks:
            raise InvalidRequestError("config has no task")

    @cached_property
    def tasks(self) -> tuple[TaskLabel, ...]:
        """The tasks of `config`."""
        return parse_tasks(self.config) if isinstance(self.config, str) else tuple(self.config)

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=_ACTIONS | {"sample_rate"})

    def apply(self, samples: Samples) -> None:
        labels, actions = samples.labels, samples.rows("actions")
        invalid = np.full(len(samples), INVALID_LABEL, np.float32)
        labels = with_first(labels, invalid, at(labels, 0, 1.0) <= 0)
        made = np.empty((len(samples), len(self.tasks)), np.float32)
        for index, task in enumerate(self.tasks):
            positive = _hits(actions, task.pos_actions)
            negative = _hits(actions, task.neg_actions) if task.neg_actions else np.ones(len(samples), np.bool_)
            if task.sample_rate < 1.0:
                negative &= samples.uniform(self.seed, index) < task.sample_rate
            made[:, index] = np.where(positive, 1.0, np.where(negative, self.negative_value, INVALID_LABEL))
        samples.labels = appended(labels, made)
        samples.put("sample_rate", np.full(len(samples), self.new_sample_rate, np.float32))


def _hits(actions: Ragged[Any], wanted: Sequence[int]) -> npt.NDArray[np.bool_]:
    return count_distinct(np.unique(np.array(wanted, np.int64).view(np.uint64)), Bits(actions)) > 0


@dataclass(frozen=True)
class LabelUpperBound(SampleOp):
    """Bound labels from above; samples with fewer labels than bounds stay as they are.

    Attributes:
        label_upper_bounds: One per label from the first.
    """

    label_upper_bounds: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_upper_bounds", tuple(map(float, self.label_upper_bounds)))

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def apply(self, samples: Samples) -> None:
        labels = samples.labels
        rows = np.flatnonzero(labels.lengths >= len(self.label_upper_bounds))
        values = labels.values.copy()
        for index, bound in enumerate(self.label_upper_bounds):
            where = labels.row_splits[rows] + index
            values[where] = np.minimum(values[where], np.float32(bound))
        samples.labels = Ragged(values, labels.row_splits)


@dataclass(frozen=True)
class LabelNormalization(SampleOp):
    """Normalise every label by some methods in order, in float32.

    Attributes:
        norm_methods: log ln(max(l + v, 0)), scale l / v, scale2int trunc(l / v), pow (l + 1)^v, repow l^v where l > 0,
            else 0, and scalelog ln(max(l / v + 1, 0)).
        norm_values: v of each method.
    """

    norm_methods: Sequence[str]
    norm_values: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm_methods", tuple(self.norm_methods))
        object.__setattr__(self, "norm_values", tuple(map(float, self.norm_values)))
        if len(self.norm_methods) != len(self.norm_values):
            sizes = f"{len(self.norm_values)} values for {len(self.norm_methods)} methods"
            raise InvalidRequestError(f"norm_values has {sizes}; every method needs one")
        for method in self.norm_methods:
            if method not in _NORMALIZATIONS:
                raise InvalidRequestError(f"norm_methods has {method!r}; it can be {', '.join(_NORMALIZATIONS)}")

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def apply(self, samples: Samples) -> None:
        labels = samples.labels
        values = labels.values
        with np.errstate(all="ignore"):
            for method, value in zip(self.norm_methods, self.norm_values, strict=True):
                values = _NORMALIZATIONS[method](values, np.float32(value)).astype(np.float32)
        samples.labels = Ragged(values, labels.row_splits)


_ONE, _NOTHING = np.float32(1), np.float32(0)
_NORMALIZATIONS: dict[str, Callable[[Float32Array, np.float32], npt.NDArray[Any]]] = {
    "log": lambda labels, v: np.log(np.maximum(labels + v, _NOTHING)),
    "scale": lambda labels, v: labels / v,
    "scale2int": lambda labels, v: np.trunc(labels / v),
    "pow": lambda labels, v: np.power(labels + _ONE, v),
    "repow": lambda labels, v: np.where(labels > 0, np.power(np.maximum(labels, _NOTHING), v), _NOTHING),
    "scalelog": lambda labels, v: np.log(np.maximum(labels / v + _ONE, _NOTHING)),
}


@dataclass(frozen=True)
class UseFieldAsLabel(SampleOp):
    """Raise every label to at least the value of a LineId field.

    Attributes:
        field_name: Of a single number.
        overwrite_invalid_value: Whether a value at or above the threshold counts as 0.
        label_threshold: See above.
    """

    field_name: str
    overwrite_invalid_value: bool = False
    label_threshold: float = 0.0

    def __post_init__(self) -> None:
        described = line_field(self.field_name)
        if described.repeated or line_domain(described) is Domain.BYTES:
            raise InvalidRequestError(f"field_name is {self.field_name!r}, which is not a single number")

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset((self.field_name,)))

    def apply(self, samples: Samples) -> None:
        labels = samples.labels
        values = samples.numbers(self.field_name).astype(np.float32)
        if self.overwrite_invalid_value:
            values = np.where(values >= np.float32(self.label_threshold), np.float32(0), values)
        spread = np.repeat(values, labels.lengths)
        samples.labels = Ragged(np.maximum(labels.values, spread), labels.row_splits)


@dataclass(frozen=True, kw_only=True)
class FillMultiRankOutput(SampleOp):
    """Append the sample's rank as a label; the first enabled source counts.

    Attributes:
        enable_draw_as_rank: 1 if drawn, else 0.
        enable_chnid_as_rank: 0 for channel 0, 1 for channel 1, 2 for the others.
        enable_lineid_rank_as_rank: The rank in the LineId, at most `rank_num` - 1.
        rank_num: At least 1.
    """

    enable_draw_as_rank: bool = False
    enable_chnid_as_rank: bool = False
    enable_lineid_rank_as_rank: bool = False
    rank_num: int = 18

    def __post_init__(self) -> None:
        if not (self.enable_draw_as_rank or self.enable_chnid_as_rank or self.enable_lineid_rank_as_rank):
            names = "enable_draw_as_rank, enable_chnid_as_rank, enable_lineid_rank_as_rank"
            raise InvalidRequestError(f"no source of ranks is enabled; set one of {names}")
        if self.rank_num < 1:
            raise InvalidRequestError(f"rank_num={self.rank_num} is below 1")

    @property
    def _source(self) -> str:
        if self.enable_draw_as_rank:
            return "is_draw"
        return "chnid" if self.enable_chnid_as_rank else "rank"

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset((self._source,)))

    def apply(self, samples: Samples) -> None:
        values = samples.numbers(self._source)
        if self._source == "chnid":
            values = np.where((values == 0) | (values == 1), values, 2)
        elif self._source == "rank":
            values = np.minimum(values, self.rank_num - 1)
        samples.labels = appended(samples.labels, values.astype(np.float32)[:, None])

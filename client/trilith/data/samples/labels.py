"""Ops that change the labels and actions of samples; all samples stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.label_conf import TaskLabel, parse_tasks
from trilith.data.line_ids import line_field, line_fields
from trilith.data.ragged import Ragged
from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.filters import line_domain, relation_of_line_field
from trilith.data.samples.relations import Domain, Relation, count_distinct
from trilith.data.samples.rows import INVALID_LABEL, Priorities, appended, at, matrix_rows, with_first
from trilith.errors import InvalidRequestError

__all__ = [
    "AddAction",
    "AddLabel",
    "FillMultiRankOutput",
    "LabelNormalization",
    "LabelUpperBound",
    "MultiLabelGen",
    "ScatterLabel",
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
    return count_distinct(actions, np.unique(np.array(wanted, np.int64).view(np.uint64))) > 0


@dataclass(frozen=True)
class ScatterLabel(SampleOp):
    """Put the first label of a sample at the place of its channel; all other labels become INVALID_LABEL.

    Attributes:
        config: Places of channels such as "100:3,200:1"; there are as many labels as the largest place needs.
    """

    config: str

    def __post_init__(self) -> None:
        _ = self._places

    @cached_property
    def _places(self) -> dict[int, int]:
        places = {}
        for part in self.config.split(","):
            if part.strip():
                channel, _, index = part.partition(":")
                try:
                    places[int(channel)] = int(index)
                except ValueError:
                    raise InvalidRequestError(f"config has {part!r}; it must be channel:index") from None
        _check_places(places, "config", None)
        return places

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset(("chnid",)))

    def apply(self, samples: Samples) -> None:
        first = at(samples.labels, 0, INVALID_LABEL)
        places = _placed(samples.numbers("chnid"), self._places)
        samples.labels = _scattered(first, places, max(self._places.values()) + 1)


def _check_places(places: Mapping[Any, int], name: str, width: int | None) -> None:
    if not places:
        raise InvalidRequestError(f"{name} is empty; it needs the place of at least one label")
    for key, index in places.items():
        if not 0 <= index < (2**16 if width is None else width):
            bound = f"below task_num={width}" if width is not None else "of a label"
            raise InvalidRequestError(f"{name} puts {key!r} at {index}, which is no place {bound}")


def _placed(values: npt.NDArray[np.int64], places: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """int64[n]: the place of each value, -1 where it has none."""
    keys = np.array(sorted(places), values.dtype)
    indices = np.array([places[int(key)] for key in keys], np.int64)
    found = np.minimum(np.searchsorted(keys, values), keys.size - 1)
    return np.where(keys[found] == values, indices[found], -1)


def _scattered(values: Float32Array, places: npt.NDArray[np.int64], width: int) -> Ragged[Any]:
    made = np.full((values.size, width), INVALID_LABEL, np.float32)
    rows = np.flatnonzero(places >= 0)
    made[rows, places[rows]] = values[rows]
    return matrix_rows(made)


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


@dataclass(frozen=True, kw_only=True)
class MultiLabelGen(SampleOp):
    """Put one label at the place of the sample's head; all other labels become INVALID_LABEL.

    The label is the sample's first one, or comes from its most-prior action: `pos_label` or `neg_label` if the action
    is listed as such, else INVALID_LABEL.

    Attributes:
        head_to_index: Place of each head, by the text of the head field.
        head_field: A string or integer field of LineId.
        pos_actions: See above.
        neg_actions: See above.
        use_origin_label: Whether the label is the sample's first one; then there are no action lists.
        pos_label: See above.
        neg_label: See above.
        action_priority: Actions such as "2,7,0", the first being the most prior; without them a sample's first action
            counts.
        task_num: Number of labels; as many as the largest place needs by default.
    """

    head_to_index: Mapping[str, int]
    head_field: str = "chnid"
    pos_actions: Sequence[int] = ()
    neg_actions: Sequence[int] = ()
    use_origin_label: bool = False
    pos_label: float = 1.0
    neg_label: float = 0.0
    action_priority: str = ""
    task_num: int | None = None

    def __post_init__(self) -> None:
        described = line_field(self.head_field)
        if described.repeated or line_domain(described) in (Domain.FLOAT, Domain.DOUBLE):
            raise InvalidRequestError(f"head_field is {self.head_field!r}, which is neither a string nor an integer")
        if self.use_origin_label and (self.pos_actions or self.neg_actions):
            raise InvalidRequestError("pos_actions and neg_actions must be empty with use_origin_label")
        if not (self.use_origin_label or self.pos_actions or self.neg_actions):
            raise InvalidRequestError("pos_actions and neg_actions are empty; list some, or set use_origin_label")
        _check_places(self.head_to_index, "head_to_index", self.task_num)
        _ = self._priorities

    @cached_property
    def _priorities(self) -> Priorities:
        return Priorities.parse(self.action_priority, "action_priority")

    @property
    def _width(self) -> int:
        return max(self.head_to_index.values()) + 1 if self.task_num is None else self.task_num

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, line_id=frozenset(("actions", self.head_field)))

    def apply(self, samples: Samples) -> None:
        samples.labels = _scattered(self._values(samples), self._heads(samples), self._width)

    def _values(self, samples: Samples) -> Float32Array:
        if self.use_origin_label:
            return at(samples.labels, 0, INVALID_LABEL)
        actions = samples.rows("actions")
        _, top = self._priorities.best(actions)
        acted = actions.lengths > 0
        values = np.where(np.isin(top, self.neg_actions), self.neg_label, INVALID_LABEL)
        return np.where(acted, np.where(np.isin(top, self.pos_actions), self.pos_label, values), INVALID_LABEL).astype(
            np.float32
        )

    def _heads(self, samples: Samples) -> npt.NDArray[np.int64]:
        described = line_field(self.head_field)
        domain = line_domain(described)
        if domain is Domain.BYTES:
            places = np.full(len(samples), -1)
            for head, index in self.head_to_index.items():
                places[samples.relation(self.head_field, relation_of_line_field(described, "eq", head))] = index
            return places
        bounds = (0, 2**64) if domain is Domain.UINT64 else (-(2**63), 2**63)
        numbers = {int(head): index for head, index in self.head_to_index.items() if _is_decimal(head)}
        numbers = {head: index for head, index in numbers.items() if bounds[0] <= head < bounds[1]}
        values = samples.numbers(self.head_field)
        return _placed(values, numbers) if numbers else np.full(len(samples), -1)


def _is_decimal(text: str) -> bool:
    """Whether a text is how an integer is printed."""
    try:
        return str(int(text)) == text
    except ValueError:
        return False

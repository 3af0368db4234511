"""Ops that give each head of a model its own label: one label of a sample at the place of its head, none elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import line_field
from trilith.data.samples.chunk import Needs, SampleOp, Samples
from trilith.data.samples.filters import line_domain, relation_of_line_field
from trilith.data.samples.relations import Domain
from trilith.data.samples.rows import INVALID_LABEL, Priorities, at, matrix_rows
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["MultiLabelGen", "ScatterLabel"]

Float32Array = npt.NDArray[np.float32]


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

"""What a model wants of a batch: typed feature specs, and the parsers that `Dataset.parse` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import line_field
from trilith.errors import InvalidRequestError

__all__ = [
    "INVALID_LABEL",
    "Dense",
    "Extra",
    "FeatureSpec",
    "Features",
    "InstanceWeight",
    "Label",
    "Slot",
    "Sparse",
    "check_specs",
    "dense_dtype",
]

INVALID_LABEL = np.finfo(np.float32).min
"""What a label is where there is none."""

Features: TypeAlias = dict[str, Any]
"""A parsed batch: `Ragged` int64 fids, and arrays [rows, dim] of float32, int64 or bytes objects, by name."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "int64": np.dtype(np.int64),
    "string": np.dtype(np.object_),
}


@dataclass(frozen=True, slots=True)
class Sparse:
    """Ids of a named feature, as a `Ragged` of int64: fids, or an Example's integers as they are.

    A feature that holds floats is refused, and so are strings unless they are allowed.

    Attributes:
        feature: Name of the feature in the records; the output's name by default.
        strings: Of strings in Examples and Instances the hash is the id (`trilith.ops.strings`); a batch with such ids
            has them as `HashedIds`, which are a `Ragged`.
    """

    feature: str | None = None
    strings: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """Fids of one slot among an Instance's flat v1 fids, as a `Ragged` of int64.

    Attributes:
        slot: 0 to 1023.
    """

    slot: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Numbers or strings of a named feature, as an array [rows, dim]; an Example's integers are floats, too.

    Attributes:
        dim: Elements per row.
        dtype: "float32", "int64" or "string" (bytes objects).
        feature: Name of the feature in the records; the output's name by default.
        lengths: "exact": a record has `dim` elements or, without such a feature, none, which reads zeros; any other
            number is damage. "fit": what is too long is cut, what is too short is filled up with zeros.
    """

    dim: int = 1
    dtype: str = "float32"
    feature: str | None = None
    lengths: Literal["exact", "fit"] = "exact"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise InvalidRequestError(f"dim={self.dim} of a dense feature is not positive")
        if self.lengths not in ("exact", "fit"):
            raise InvalidRequestError(f"lengths={self.lengths!r} of a dense feature is neither 'exact' nor 'fit'")
        dense_dtype(self.dtype)


@dataclass(frozen=True, slots=True)
class Label:
    """The labels, as float32[rows, dim]; for a task of `trilith.estimator`, one of its labels.

    Attributes:
        dim: Labels of a record.
        weight: Of a task's label: what its loss counts in their sum.
        feature: Of a task's label: its name in batches and records; the name that the task has for it by default. A
            parser takes a named label from the feature (or column) of that name; a record without it has it among
            its own labels, or not at all, which reads `INVALID_LABEL`.
        place: Which of a record's own labels a named one is.
    """

    dim: int = 1
    weight: float = 1.0
    feature: str | None = None
    place: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise InvalidRequestError(f"dim={self.dim} of the labels is not positive")
        if self.feature is not None and self.dim != 1:
            raise InvalidRequestError(f"dim={self.dim} of the label {self.feature!r}: one that has a name is one")
        if self.place < 0:
            raise InvalidRequestError(f"place={self.place} of a label is negative")
        if not 0 <= self.weight < float("inf"):
            raise InvalidRequestError(f"weight={self.weight} of a label is not a number from 0")


@dataclass(frozen=True, slots=True)
class InstanceWeight:
    """The weight of each row, as float32[rows, dim]; columns but the first are zero."""

    dim: int = 1


@dataclass(frozen=True, slots=True)
class Extra:
    """A field of LineId: int64 for every integer, float32, or bytes objects, as an array [rows, dim].

    Attributes:
        dim: Elements per row; a scalar fills the first.
        field: Name of the field; the output's name by default.
    """

    dim: int = 1
    field: str | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise InvalidRequestError(f"dim={self.dim} of a LineId field is not positive")
        if self.field is not None:
            _ = line_field(self.field).batch_dtype


FeatureSpec: TypeAlias = Sparse | Slot | Dense | Label | InstanceWeight | Extra
"""What one output of a parser is."""


def dense_dtype(dtype: Any) -> np.dtype[Any]:
    """The array dtype for a name or NumPy dtype of a dense feature."""
    name = dtype if isinstance(dtype, str) else None
    if name is None:
        kind: npt.DTypeLike = dtype
        found = np.dtype(kind)
        name = "string" if found.kind in "OSU" else found.name
    if name not in _DTYPES:
        raise InvalidRequestError(f"dtype {dtype!r} of a dense feature is not one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def check_specs(specs: Mapping[str, FeatureSpec]) -> None:
    """Refuse outputs that no parser could give."""
    if not specs:
        raise InvalidRequestError("no features are asked for")
    for name, spec in specs.items():
        if not isinstance(spec, Sparse | Slot | Dense | Label | InstanceWeight | Extra):
            raise InvalidRequestError(f"{name!r}: {spec!r} is no feature spec")
        if isinstance(spec, Extra):
            _ = line_field(spec.field or name).batch_dtype

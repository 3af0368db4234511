"""Ragged features taken apart for code that knows plain arrays only, and functions applied to what was parsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["ParseSteps", "contract", "expand"]


def expand(features: Mapping[str, Any], *, nrows: bool = True, value_rowids: bool = False) -> dict[str, Any]:
    """Take every ragged array of a batch apart.

    Args:
        features: Arrays by name; those that are no `Ragged` stay as they are.
        nrows: Add the number of rows.
        value_rowids: Add the row of each element.

    Returns:
        Per ragged array {"values", "row_splits", "nrows", "value_rowids"}.
    """
    out: dict[str, Any] = {}
    for name, value in features.items():
        if isinstance(value, Ragged):
            parts: dict[str, Any] = {"values": value.values, "row_splits": value.row_splits}
            if nrows:
                parts["nrows"] = np.int64(len(value))
            if value_rowids:
                parts["value_rowids"] = value.value_rowids
            out[name] = parts
        else:
            out[name] = value
    return out


def contract(features: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `expand`; parts that disagree with each other are refused."""
    out: dict[str, Any] = {}
    for name, value in features.items():
        if not (isinstance(value, Mapping) and {"values", "row_splits"} <= set(value)):
            out[name] = value
            continue
        ragged: Ragged[Any] = Ragged(value["values"], value["row_splits"])
        if "nrows" in value and int(value["nrows"]) != len(ragged):
            raise InvalidRequestError(
                f"{name!r}: nrows is {int(value['nrows'])}, but row_splits has {len(ragged) + 1} elements"
            )
        if "value_rowids" in value and not np.array_equal(value["value_rowids"], ragged.value_rowids):
            raise InvalidRequestError(f"{name!r}: value_rowids and row_splits speak of different rows")
        out[name] = ragged
    return out


class ParseSteps:
    """Functions to apply to a parsed batch, first come first served; each runs once.

    The object belongs to whoever parses: it is no global.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[dict[str, Any]], dict[str, Any]]] = []

    def add(self, step: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Queue a function from features to features."""
        self._steps.append(step)

    def apply(self, features: dict[str, Any]) -> dict[str, Any]:
        """Take the queued functions off and apply them in order."""
        while self._steps:
            features = self._steps.pop(0)(features)
        return features

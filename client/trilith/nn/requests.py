"""Parsers of the records of requests: what an export's features need, text as ids, weights of ids, numbers checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.messages import message_of
from trilith.data.parse.columns import Element, Fields
from trilith.data.parse.parsers import ExampleParser, InstanceParser
from trilith.data.parse.specs import Dense, Features, FeatureSpec, Slot, Sparse
from trilith.data.records import Kind, Records
from trilith.data.scan.count import count_named
from trilith.data.scan.result import Scan
from trilith.errors import DataError
from trilith.ops.ragged import Ragged
from trilith.serving.exports import ModelConfig, ProgramInput

__all__ = ["OnUnknown", "RequestExamples", "RequestInstances", "RequestParser", "dense_name", "make_parser", "names_of"]

OnUnknown: TypeAlias = Callable[[Records, npt.NDArray[np.int64]], None]
"""Gets the records of a request, and of each how many named features it has that the model does not know."""

_Strings: TypeAlias = frozenset[str]
_Weights: TypeAlias = Mapping[str, str]


class RequestExamples(ExampleParser):
    """Parses the Examples of requests.

    Args:
        specs: Ids and numbers, by name.
        strings: Features of the records whose ids may be text.
        weights: Name in the records of the weights of ids, by the feature whose ids they are of.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], strings: _Strings, weights: _Weights) -> None:
        self._weights_of = weights
        super().__init__(specs, texts=strings)

    def _fields(self) -> Fields:
        return _with_weights(super()._fields(), self._weights_of, (Element.FLOAT, Element.INT))

    def score(self, records: Records, on_unknown: OnUnknown | None) -> tuple[Features, dict[str, Ragged[np.float32]]]:
        """Read the records of a request; returns what `specs` want, and the weights of ids by feature.

        Raises:
            DataError: A record is damaged, or a feature holds something that the model cannot take.
        """
        return _parse(self, records, on_unknown)

    def weights(self, name: str, scan: Scan) -> Ragged[np.float32]:
        """Numbers of a feature, as many as there are; integers are, too."""
        return self._merged(name, Element.FLOAT, scan)


class RequestInstances(InstanceParser):
    """Parses the Instances of requests; see `RequestExamples`."""

    def __init__(self, specs: Mapping[str, FeatureSpec], strings: _Strings, weights: _Weights) -> None:
        self._weights_of = weights
        super().__init__(specs, texts=strings)

    def _fields(self) -> Fields:
        return _with_weights(super()._fields(), self._weights_of, (Element.FLOAT,))

    def score(self, records: Records, on_unknown: OnUnknown | None) -> tuple[Features, dict[str, Ragged[np.float32]]]:
        """See `RequestExamples`."""
        return _parse(self, records, on_unknown)

    def weights(self, name: str, scan: Scan) -> Ragged[np.float32]:
        """See `RequestExamples`."""
        column = self._scanner.schema.named_columns[name, Element.FLOAT]
        return Ragged(scan.values[column], scan.splits[column])


RequestParser: TypeAlias = RequestExamples | RequestInstances


def make_parser(config: ModelConfig, kind: Literal[Kind.EXAMPLE, Kind.INSTANCE]) -> RequestParser:
    """What reads the records of requests for a model: ids by feature, and dense inputs by `dense_name`."""
    specs: dict[str, FeatureSpec] = {}
    # Those that no input takes, too: a request may have them, but not with anything inside.
    for name, feature in config.features.items():
        by_slot = kind is Kind.INSTANCE and feature.slot is not None
        specs[name] = Slot(feature.slot or 0) if by_slot else Sparse(feature.feature or name)
    for each in config.every_input:
        if each.kind == "dense":
            lengths: Literal["exact", "fit"] = "fit" if each.pad else "exact"
            specs[dense_name(each)] = Dense(each.dim, feature=each.names[0], lengths=lengths)
    strings = frozenset(name for name, each in config.record_features().items() if each.strings)
    weights = {name: each.weights for name, each in config.features.items() if each.weights is not None}
    return (RequestExamples if kind is Kind.EXAMPLE else RequestInstances)(specs, strings, weights)


def dense_name(wanted: ProgramInput) -> str:
    """What a dense input is called in parsed records."""
    return f"dense {wanted.dim}{' or so' if wanted.pad else ''} {wanted.names[0]}"


def names_of(records: Records, row: int) -> list[str]:
    """Names of the features of one record."""
    message: Any = message_of(records.payload(row), records.kind)
    if records.kind is Kind.EXAMPLE:
        return [each.name for each in message.named_feature]
    return [each.name for each in message.feature]


def _with_weights(fields: Fields, weights: _Weights, numbers: tuple[Element, ...]) -> Fields:
    """What to read beside what the specs want."""
    more = [(name, element) for name in weights.values() for element in numbers]
    return replace(fields, named=tuple(dict.fromkeys((*fields.named, *more))))


def _parse(
    parser: RequestParser, records: Records, on_unknown: OnUnknown | None
) -> tuple[Features, dict[str, Ragged[np.float32]]]:
    scan = parser._fitting(parser._scanner.scan(records))
    if on_unknown is not None:
        named = count_named(records)
        # A name that occurs twice in a record counts as unknown, which costs a second look and nothing else.
        if int(named.sum()) != np.count_nonzero(scan.seen):
            on_unknown(records, named - np.count_nonzero(scan.seen, axis=1))
    found = {name: make(scan) for name, make in parser._outputs}
    parser._hash_texts(scan, found)
    for name, feature in parser._names(Dense).items():
        _check_finite(records, feature, found[name])
    weights = {
        name: _checked_weights(records, name, column, found[name], parser.weights(column, scan))
        for name, column in parser._weights_of.items()
    }
    return found, weights


def _check_finite(records: Records, feature: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        row, place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DataError(
            f"{records.where(row)}: feature {feature!r} has {values[row, place]}; the model takes finite numbers"
        )


def _checked_weights(
    records: Records, name: str, column: str, ids: Ragged[np.int64], weights: Ragged[np.float32]
) -> Ragged[np.float32]:
    """Weights, one for each id of every record."""
    odd = ids.lengths != weights.lengths
    if odd.any():
        row = int(odd.argmax())
        raise DataError(
            f"{records.where(row)}: feature {name!r} has {ids.lengths[row]} ids, and {weights.lengths[row]} weights "
            f"in {column!r}"
        )
    if not np.isfinite(weights.values).all():
        at = int(np.flatnonzero(~np.isfinite(weights.values))[0])
        row = int(weights.value_rowids[at])
        raise DataError(
            f"{records.where(row)}: feature {column!r} has {weights.values[at]}; weights are finite numbers"
        )
    return weights

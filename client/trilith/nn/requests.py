"""Parsers of requests: strict ones, that tell of features which the model does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.messages import message_of
from trilith.data.parse.parsers import ExampleParser, InstanceParser
from trilith.data.parse.specs import Dense, Features
from trilith.data.records import Kind, Records
from trilith.data.scan.count import count_named
from trilith.errors import DataError

__all__ = ["OnUnknown", "RequestExamples", "RequestInstances", "RequestParser", "names_of"]

OnUnknown: TypeAlias = Callable[[Records, npt.NDArray[np.int64]], None]
"""Gets the records of a request, and of each how many named features it has that the model does not know."""


class RequestExamples(ExampleParser):
    """Parses the Examples of requests."""

    def score(self, records: Records, on_unknown: OnUnknown | None) -> Features:
        """Read the records of a request.

        Raises:
            DataError: A record is damaged, or a feature holds something that the model cannot take.
        """
        return _parse(self, records, on_unknown)


class RequestInstances(InstanceParser):
    """Parses the Instances of requests."""

    def score(self, records: Records, on_unknown: OnUnknown | None) -> Features:
        """See `RequestExamples`."""
        return _parse(self, records, on_unknown)


RequestParser: TypeAlias = RequestExamples | RequestInstances


def _parse(parser: RequestParser, records: Records, on_unknown: OnUnknown | None) -> Features:
    scan = parser._fitting(parser._scanner.scan(records))
    if on_unknown is not None:
        named = count_named(records)
        # A name that occurs twice in a record counts as unknown, which costs a second look and nothing else.
        if int(named.sum()) != np.count_nonzero(scan.seen):
            on_unknown(records, named - np.count_nonzero(scan.seen, axis=1))
    found = {name: make(scan) for name, make in parser._outputs}
    for name, feature in parser._names(Dense).items():
        values = found[name]
        if not np.isfinite(values).all():
            row, place = np.argwhere(~np.isfinite(values))[0].tolist()
            raise DataError(
                f"{records.where(row)}: feature {feature!r} has {values[row, place]}; the model takes finite numbers"
            )
    return found


def names_of(records: Records, row: int) -> list[str]:
    """Names of the features of one record."""
    message: Any = message_of(records.payload(row), records.kind)
    if records.kind is Kind.EXAMPLE:
        return [each.name for each in message.named_feature]
    return [each.name for each in message.feature]

"""Parsers of requests: as those of training, but what a model cannot take is refused, not padded, cut or left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.columns import member_of
from trilith.data.convert import message_of
from trilith.data.parsers import ExampleParser, InstanceParser
from trilith.data.quantized import PREFIX
from trilith.data.records import Kind, Records
from trilith.data.scan.count import count_named
from trilith.data.scan.scanner import Scan
from trilith.data.scan.schema import Element, Fields
from trilith.data.specs import Dense, Features, FeatureSpec, Sparse
from trilith.errors import InvalidRequestError
from trilith_proto import example_pb2

__all__ = ["OnUnknown", "RequestExamples", "RequestInstances", "RequestParser", "names_of"]

OnUnknown: TypeAlias = Callable[[Records, npt.NDArray[np.int64]], None]
"""Gets the records of a request, and of each how many named features it has that the model does not know."""

_IDS, _FLOATS, _OTHER = 1, 2, 4
# What a Feature of an Example holds, by the number of its member; 0 is absent and 255 empty.
_HOLDS = np.full(256, _OTHER, np.uint8)
_HOLDS[[0, 255]] = 0
_HOLDS[[1, 2]] = _IDS
_HOLDS[[3, 4]] = _FLOATS
_ABSENT = 0, 255
_INSTANCE_ELEMENTS = {Element.FID: "ids", Element.FLOAT: "floats", Element.INT: "integers", Element.BYTES: "bytes"}


class RequestExamples(ExampleParser):
    """Parses the Examples of requests.

    Args:
        specs: What the model takes.
        padded: Names and sizes of dense features whose lists may be of any length, as in training.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], padded: Collection[tuple[str, int]] = ()) -> None:
        super().__init__(specs, strict=False)
        self._padded = frozenset(padded)
        numbers = self._scanner.schema.name_numbers
        self._refused = np.zeros(len(numbers), np.uint8)
        for kind, held in ((Sparse, _IDS), (Dense, _FLOATS)):
            for name in self._names(kind).values():
                self._refused[numbers[name]] |= 0xFF ^ held

    def score(self, records: Records, on_unknown: OnUnknown | None) -> Features:
        """Read the records of a request.

        Raises:
            DataError: A record is damaged.
            InvalidRequestError: A feature holds something that the model cannot take.
        """
        scan = self._scanner.scan(records)
        self._check(scan)
        if on_unknown is not None:
            _tell_unknown(records, scan, on_unknown)
        return {name: make(scan) for name, make in self._outputs}

    def _check(self, scan: Scan) -> None:
        wrong = _HOLDS[scan.seen] & self._refused
        if not wrong.any():
            return
        row, number = np.argwhere(wrong)[0].tolist()
        name, member = self._scanner.schema.names[number], int(scan.seen[row, number])
        held = example_pb2.Feature.DESCRIPTOR.fields_by_number[member].name
        wanted = "ids (fid_v2_list)" if self._refused[number] & _IDS == 0 else "numbers (float_list)"
        raise InvalidRequestError(
            f"{scan.records.where(row)}: feature {name!r} holds a {held}; the model takes {wanted}"
        )

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        if (feature, dim) in self._padded:
            return _finite(super()._dense(feature, dim, element, scan), feature, scan)
        schema = self._scanner.schema
        column = schema.named_columns[feature, element]
        lengths = np.diff(scan.splits[column])
        wrong = lengths != dim
        if wrong.any():
            _refuse_lengths(feature, dim, lengths, wrong & ~np.isin(member_of(schema, scan, feature), _ABSENT), scan)
        return _finite(_rows(scan.values[column], ~wrong, dim), feature, scan)


class RequestInstances(InstanceParser):
    """Parses the Instances of requests.

    Args:
        specs: What the model takes.
        padded: As of `RequestExamples`; such a feature counts as missing if it is of another length.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], padded: Collection[tuple[str, int]] = ()) -> None:
        self._padded = frozenset(padded)
        super().__init__(specs, strict=False)

    def score(self, records: Records, on_unknown: OnUnknown | None) -> Features:
        """See `RequestExamples`."""
        scan = self._scanner.scan(records)
        for name in self._names(Sparse).values():
            self._check(scan, name, "ids (fid)", (Element.FLOAT, Element.INT, Element.BYTES))
        for name in self._names(Dense).values():
            self._check(scan, name, "numbers (float_value)", (Element.FID, Element.INT))
        if on_unknown is not None:
            _tell_unknown(records, scan, on_unknown)
        return {name: make(scan) for name, make in self._outputs}

    def _fields(self) -> Fields:
        names = dict.fromkeys((*self._names(Sparse).values(), *self._names(Dense).values()))
        named = tuple((name, element) for name in names for element in _INSTANCE_ELEMENTS)
        return super()._fields() | Fields(named=named, slots_as_v2=bool(self._names(Sparse)))

    def _check(self, scan: Scan, name: str, wanted: str, refused: tuple[Element, ...]) -> None:
        for element in refused:
            splits = scan.splits[self._scanner.schema.named_columns[name, element]]
            if splits[-1]:
                row = int(np.flatnonzero(np.diff(splits))[0])
                held = _INSTANCE_ELEMENTS[element]
                raise InvalidRequestError(
                    f"{scan.records.where(row)}: feature {name!r} holds {held}; the model takes {wanted}"
                )

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        if (feature, dim) not in self._padded:
            columns = self._scanner.schema.named_columns
            lengths = np.diff(scan.splits[columns[feature, element]])
            _refuse_lengths(feature, dim, lengths, (lengths != dim) & (lengths != 0), scan)
            column = columns[feature, Element.BYTES]
            spans = scan.values[column]
            if len(spans):
                sound = (spans[:, 1] >= len(PREFIX)) & (
                    scan.records.buffer[spans[:, :1] + np.arange(len(PREFIX))] == np.frombuffer(PREFIX, np.uint8)
                ).all(axis=1)
                if not sound.all():
                    row = int(np.searchsorted(scan.splits[column], np.flatnonzero(~sound)[0], "right")) - 1
                    raise InvalidRequestError(
                        f"{scan.records.where(row)}: feature {feature!r} holds bytes that are no quantized vector; "
                        "the model takes numbers (float_value)"
                    )
        return _finite(super()._dense(feature, dim, element, scan), feature, scan)


RequestParser: TypeAlias = RequestExamples | RequestInstances


def names_of(records: Records, row: int) -> list[str]:
    """Names of the features of one record."""
    message: Any = message_of(records.payload(row), records.kind)
    if records.kind is Kind.EXAMPLE:
        return [each.name for each in message.named_feature]
    return [each.name for each in message.feature]


def _tell_unknown(records: Records, scan: Scan, on_unknown: OnUnknown) -> None:
    # A name that occurs twice in a record counts as unknown, which costs a second look and nothing else.
    unknown = count_named(records) - np.count_nonzero(scan.seen, axis=1)
    if (unknown > 0).any():
        on_unknown(records, unknown)


def _refuse_lengths(
    feature: str, dim: int, lengths: npt.NDArray[np.int64], wrong: npt.NDArray[np.bool_], scan: Scan
) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InvalidRequestError(
            f"{scan.records.where(row)}: feature {feature!r} holds {int(lengths[row])} numbers; the model takes {dim}"
        )


def _rows(values: npt.NDArray[np.float32], there: npt.NDArray[np.bool_], dim: int) -> npt.NDArray[np.float32]:
    """float32[rows, dim]: the values of the rows that are there, zeros for the others."""
    if there.all():
        return values.reshape(-1, dim)
    out = np.zeros((len(there), dim), np.float32)
    out[there] = values.reshape(-1, dim)
    return out


def _finite(values: npt.NDArray[Any], feature: str, scan: Scan) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        row, place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InvalidRequestError(
            f"{scan.records.where(row)}: feature {feature!r} holds {values[row, place]}; the model takes finite float32"
        )
    return values

"""Parsers: feature specs compiled once, then applied to any number of chunks of records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.choices import OnError, check_on_error
from trilith.data.columns import member_of, ragged_of, scalars_of
from trilith.data.line_ids import LineField, line_field
from trilith.data.quantized import PREFIX, dequantize_rows
from trilith.data.ragged import Ragged
from trilith.data.records import Kind, Records
from trilith.data.scan.scanner import BatchScan, BatchScanner, LineIdScanner, Scan, Scanner
from trilith.data.scan.schema import Element, Fields, Schema
from trilith.data.specs import (
    INVALID_LABEL,
    Dense,
    Extra,
    Features,
    FeatureSpec,
    InstanceWeight,
    Label,
    Slot,
    Sparse,
    check_specs,
    dense_dtype,
)
from trilith.errors import DataError, InvalidRequestError
from trilith_proto import example_pb2

__all__ = ["BatchParser", "ExampleParser", "InstanceParser", "ParseSpec", "Parser"]

_TINY = np.finfo(np.float32).tiny
_ELEMENTS = {"f": Element.FLOAT, "i": Element.INT, "O": Element.BYTES}
_LABEL, _WEIGHT, _LINE_ID = "__LABEL__", "instance_weight", "__LINE_ID__"
_SHARED = 1
_FID_MEMBERS = (1, 2)
_DENSE_MEMBERS = {Element.FLOAT: (3, 4), Element.INT: (5,), Element.BYTES: (6,)}


class Parser(ABC):
    """Makes a batch of arrays out of records.

    Args:
        specs: What is wanted, by the name that it gets in the batch.
        on_error: Raise `DataError` for the first damaged record, or leave damaged records out and count them.

    Attributes:
        skipped: Damaged records left out so far, by this parser.
    """

    kind: Kind

    def __init__(self, specs: Mapping[str, FeatureSpec], *, on_error: OnError = "raise") -> None:
        check_specs(specs)
        check_on_error(on_error)
        self.specs = dict(specs)
        self.skipped = 0
        self._on_error = on_error

    @abstractmethod
    def parse(self, records: Records, *, promote: bool = True) -> Features:
        """Read records.

        Args:
            records: Of the parser's kind.
            promote: Let reserved features of Examples stand for the fields they name.
        """

    def _names(self, kind: type[Sparse | Dense]) -> dict[str, str]:
        return {out: spec.feature or out for out, spec in self.specs.items() if isinstance(spec, kind)}

    def _line_fields(self) -> dict[str, LineField]:
        return {out: line_field(spec.field or out) for out, spec in self.specs.items() if isinstance(spec, Extra)}

    def _has(self, kind: type[Label | InstanceWeight]) -> bool:
        return any(isinstance(spec, kind) for spec in self.specs.values())


_Make: TypeAlias = Callable[[Scan], Any]


class _ColumnParser(Parser):
    """A parser of what a scanner reads row by row. How each output is made of a scan is found out once."""

    def __init__(self, specs: Mapping[str, FeatureSpec], *, on_error: OnError = "raise") -> None:
        super().__init__(specs, on_error=on_error)
        self._scanner = Scanner(self.kind, self._fields(), np.int64)
        self._outputs = [(name, self._output(name, spec)) for name, spec in self.specs.items()]

    def parse(self, records: Records, *, promote: bool = True) -> Features:
        """See `Parser`."""
        scan = self._scanner.scan(records, on_error=self._on_error, promote=promote)
        self.skipped += scan.skipped
        return {name: make(scan) for name, make in self._outputs}

    @abstractmethod
    def _fields(self) -> Fields:
        """What the outputs need."""

    @abstractmethod
    def _output(self, name: str, spec: FeatureSpec) -> _Make:
        """How an output is made."""

    def _line_output(self, name: str, spec: Extra) -> _Make:
        return partial(_extra, self._scanner.schema, line_field(spec.field or name), spec.dim)


def _fids(column: int) -> _Make:
    """A column of fids as it is."""
    return lambda scan: Ragged(scan.values[column], scan.splits[column])


def _extra(schema: Schema, about: LineField, dim: int, scan: Scan) -> npt.NDArray[Any]:
    """A LineId field as [rows, dim]."""
    fill: Any = b"" if about.dtype == np.object_ else 0
    out: npt.NDArray[Any]
    if about.repeated:
        out = ragged_of(schema, scan, schema.line_columns[about.name]).dense(dim, fill)
        return _batch_dtype(out, about)
    found = scalars_of(scan, schema.line_cells[about.name], about.dtype, about.default)
    values = _batch_dtype(found.values, about)
    if dim == 1:
        return values.reshape(-1, 1)
    out = np.full((len(values), dim), fill, values.dtype)
    out[:, 0] = values
    return out


def _batch_dtype(values: npt.NDArray[Any], about: LineField) -> npt.NDArray[Any]:
    wanted = np.dtype(about.batch_dtype)
    return values.view(np.int64) if values.dtype == np.uint64 else values.astype(wanted, copy=False)


def _first_column(values: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
    out = np.zeros((len(values), dim), values.dtype)
    out[:, 0] = values
    return out


# ---- instances -------------------------------------------------------------------------------------------------------


class InstanceParser(_ColumnParser):
    """Parses Instances.

    Fids of slots come as logged (v1), and as v2 once any named fid feature is asked for; a dense feature whose length
    is not `dim` counts as missing.
    """

    kind = Kind.INSTANCE

    def _fields(self) -> Fields:
        sparse, dense = self._names(Sparse), self._names(Dense)
        named = dict.fromkeys((name, Element.FID) for name in sparse.values())
        for out, name in dense.items():
            element = _ELEMENTS[dense_dtype(self.specs[out].dtype).kind]  # type: ignore[union-attr]
            named[name, element] = None
            if element is Element.FLOAT:
                named[name, Element.BYTES] = None  # where a quantized vector would be
        slots = dict.fromkeys(spec.slot for spec in self.specs.values() if isinstance(spec, Slot))
        return Fields(
            label=self._has(Label),
            instance_weight=self._has(InstanceWeight),
            line_id=tuple(dict.fromkeys(about.name for about in self._line_fields().values())),
            named=tuple(named),
            slots=tuple(slots),
            slots_as_v2=bool(sparse),
        )

    def _output(self, name: str, spec: FeatureSpec) -> _Make:
        schema = self._scanner.schema
        if isinstance(spec, Slot):
            return _fids(schema.slot_columns[spec.slot])
        if isinstance(spec, Sparse):
            return _fids(schema.named_columns[spec.feature or name, Element.FID])
        if isinstance(spec, Dense):
            return partial(self._dense, spec.feature or name, spec.dim, _ELEMENTS[dense_dtype(spec.dtype).kind])
        if isinstance(spec, Label):
            return lambda scan: ragged_of(schema, scan, schema.label_column).dense(spec.dim)
        if isinstance(spec, InstanceWeight):
            return partial(self._weights, spec.dim)
        return self._line_output(name, spec)

    def _weights(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        weight = scalars_of(scan, self._scanner.schema.weight_cell, np.dtype(np.float32), 1.0)
        return _first_column(weight.values, dim)

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        ragged = ragged_of(schema, scan, schema.named_columns[feature, element])
        out = ragged.dense(dim, b"" if element is Element.BYTES else 0, exact=True)
        if element is Element.FLOAT:
            self._dequantize(scan, feature, dim, out)
        return out

    def _dequantize(self, scan: Scan, feature: str, dim: int, out: npt.NDArray[Any]) -> None:
        """Overwrite rows whose feature holds a quantized vector."""
        column = self._scanner.schema.named_columns[feature, Element.BYTES]
        spans, splits = scan.values[column], scan.splits[column]
        if not len(spans):
            return
        buffer, prefix = scan.records.buffer, np.frombuffer(PREFIX, np.uint8)
        heads = buffer[spans[:, :1] + np.arange(prefix.size)]
        squeezed = (spans[:, 1] >= prefix.size) & (heads == prefix).all(axis=1)
        rows = np.repeat(np.arange(len(out)), np.diff(splits))[squeezed]
        spans = spans[squeezed]
        last = np.append(rows[1:] != rows[:-1], True)[: rows.size]  # the last vector of a feature counts
        rows, starts, sizes = rows[last], spans[last, 0] + prefix.size, spans[last, 1] - prefix.size
        lengths = np.where(sizes > 8, sizes - 4, np.where(sizes % 2 == 0, sizes // 2, -1))
        if (lengths != dim).any():
            wrong = int(np.flatnonzero(lengths != dim)[0])
            raise DataError(
                f"{scan.records.where(int(rows[wrong]))}: quantized feature {feature!r} has {int(sizes[wrong])} bytes, "
                f"which are not {dim} floats"
            )
        for size in np.unique(sizes).tolist():
            same = sizes == size
            out[rows[same]] = dequantize_rows(buffer[starts[same, None] + np.arange(size)])


# ---- examples --------------------------------------------------------------------------------------------------------


class ExampleParser(_ColumnParser):
    """Parses Examples. Fids come as v2; lists are cut to `dim` or filled up with zeros, labels with `INVALID_LABEL`."""

    kind = Kind.EXAMPLE

    def _fields(self) -> Fields:
        named, _ = _named_elements(self)
        if self._has(Label):
            named["label", Element.FLOAT] = None
        if self._has(InstanceWeight):
            named[_WEIGHT, Element.FLOAT] = None
        return Fields(
            label=self._has(Label),
            instance_weight=self._has(InstanceWeight),
            line_id=tuple(dict.fromkeys(about.name for about in self._line_fields().values())),
            named=tuple(named),
        )

    def _output(self, name: str, spec: FeatureSpec) -> _Make:
        if isinstance(spec, Sparse):
            return _fids(self._scanner.schema.named_columns[spec.feature or name, Element.FID_V2])
        if isinstance(spec, Dense):
            return partial(self._dense, spec.feature or name, spec.dim, _ELEMENTS[dense_dtype(spec.dtype).kind])
        if isinstance(spec, Label):
            return partial(self._labels, spec.dim)
        if isinstance(spec, InstanceWeight):
            return partial(self._weights, spec.dim)
        assert isinstance(spec, Extra)
        return self._line_output(name, spec)

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        member = member_of(schema, scan, feature)
        _check_members(scan.records, feature, member, element)
        return _padded(ragged_of(schema, scan, schema.named_columns[feature, element]), member, dim, element)

    def _labels(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        out = ragged_of(schema, scan, schema.label_column).dense(dim, INVALID_LABEL)
        member = member_of(schema, scan, "label")
        named = member != 0
        if named.any():
            _check_members(scan.records, "label", member, Element.FLOAT)
            instead = ragged_of(schema, scan, schema.named_columns["label", Element.FLOAT]).dense(dim, INVALID_LABEL)
            out[named] = instead[named]
        return out

    def _weights(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        weight = scalars_of(scan, schema.weight_cell, np.dtype(np.float32), 1.0).values
        out = _first_column(np.where(weight > 0, weight, np.float32(1)), dim)
        member = member_of(schema, scan, _WEIGHT)
        named = (member != 0) & (member != 255)
        if named.any():
            _check_members(scan.records, _WEIGHT, member, Element.FLOAT)
            ragged = ragged_of(schema, scan, schema.named_columns[_WEIGHT, Element.FLOAT])
            out[named] = _padded(ragged, member, dim, Element.FLOAT)[named]
        return out


def _named_elements(parser: Parser) -> tuple[dict[tuple[str, Element], None], bool]:
    """Named features that the specs of an Example or ExampleBatch want; and whether any is a LineId field."""
    if any(isinstance(spec, Slot) for spec in parser.specs.values()):
        raise InvalidRequestError("only Instances have fids of slots; name the feature, such as Sparse('fc_slot_3')")
    named: dict[tuple[str, Element], None] = {}
    for out, spec in parser.specs.items():
        if isinstance(spec, Sparse):
            named[spec.feature or out, Element.FID_V2] = None
        elif isinstance(spec, Dense):
            dtype = dense_dtype(spec.dtype)
            if dtype == np.object_ and spec.dim != 1:
                raise InvalidRequestError(f"{out!r}: strings of an Example have dim 1, not {spec.dim}")
            named[spec.feature or out, _ELEMENTS[dtype.kind]] = None
    return named, any(isinstance(spec, Extra) for spec in parser.specs.values())


def _check_members(records: Records, name: str, member: npt.NDArray[np.uint8], element: Element) -> None:
    """Refuse a feature that holds something else than what was asked for."""
    wrong = ~np.isin(member, (0, 255, *_DENSE_MEMBERS[element]))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        at = records.where(row if len(records) == len(member) else 0)
        held = example_pb2.Feature.DESCRIPTOR.fields_by_number[int(member[row])].name
        raise DataError(f"{at}: feature {name!r} holds a {held}, which is no list of {element} values")


def _padded(ragged: Ragged[Any], member: npt.NDArray[np.uint8], dim: int, element: Element) -> npt.NDArray[Any]:
    """[rows, dim] of the first elements; a list of floats that is there and empty reads FLT_MIN if dim is 1."""
    out = ragged.dense(dim, b"" if element is Element.BYTES else 0)
    if element is Element.FLOAT and dim == 1:
        out[np.isin(member, (3, 4)) & (ragged.lengths == 0)] = _TINY
    return out


# ---- batches of examples ---------------------------------------------------------------------------------------------


class BatchParser(Parser):
    """Parses an ExampleBatch, which is a batch already: one record gives one batch of its `batch_size` rows.

    Lists that are shared are repeated for every row. Labels, weights and LineId fields are zero, not their defaults,
    where the batch has no list of them.
    """

    kind = Kind.EXAMPLE_BATCH

    def __init__(self, specs: Mapping[str, FeatureSpec], *, on_error: OnError = "raise") -> None:
        super().__init__(specs, on_error=on_error)
        named, extras = _named_elements(self)
        if self._has(Label):
            named[_LABEL, Element.FLOAT] = None
        if self._has(InstanceWeight):
            named[_WEIGHT, Element.FLOAT] = None
        if extras:
            named[_LINE_ID, Element.BYTES] = None
        self._scanner = BatchScanner(Fields(named=tuple(named)), np.int64)
        self._line_ids = LineIdScanner(list(dict.fromkeys(about.name for about in self._line_fields().values())))

    def parse(self, records: Records, *, promote: bool = True) -> Features:
        """Read one or more ExampleBatches; the rows of several come one behind another."""
        parts = []
        for row in range(len(records)):
            try:
                parts.append(self.parse_one(records, row))
            except DataError:
                if self._on_error == "raise":
                    raise
                self.skipped += 1
        if len(parts) == 1:
            return parts[0]
        return {name: _joined([part[name] for part in parts], self.specs[name]) for name in self.specs}

    def parse_one(self, records: Records, row: int) -> Features:
        """Read one ExampleBatch."""
        batch = self._scanner.scan(records, row)
        lines = (
            self._lines(batch, records, row) if any(isinstance(spec, Extra) for spec in self.specs.values()) else None
        )
        out: Features = {}
        for name, spec in self.specs.items():
            if isinstance(spec, Sparse):
                out[name] = self.sparse(batch, spec.feature or name)
            elif isinstance(spec, Dense):
                element = _ELEMENTS[dense_dtype(spec.dtype).kind]
                out[name] = self._dense(batch, spec.feature or name, element, spec.dim)
            elif isinstance(spec, Label):
                ragged, member = self.column(batch, _LABEL, Element.FLOAT)
                _check_members(batch.scan.records, _LABEL, member, Element.FLOAT)
                out[name] = ragged.dense(spec.dim)
            elif isinstance(spec, InstanceWeight):
                out[name] = self._weights(batch, spec.dim)
            elif isinstance(spec, Extra):
                out[name] = self._extra(lines, batch.batch_size, line_field(spec.field or name), spec.dim)
        return out

    def column(self, batch: BatchScan, name: str, element: Element) -> tuple[Ragged[Any], npt.NDArray[np.uint8]]:
        """Values and kinds of one list, a row for each row of the batch."""
        schema, rows = self._scanner.schema, batch.batch_size
        number = schema.name_numbers[name]
        features, shape = int(batch.lists[number, 0]), int(batch.lists[number, 1])
        ragged = ragged_of(schema, batch.scan, schema.named_columns[name, element])
        member = batch.scan.seen[:, number]
        if features < 0:
            return Ragged(ragged.values[:0], np.zeros(rows + 1, np.int64)), np.zeros(rows, np.uint8)
        if shape == _SHARED:
            if not features:
                raise DataError(f"{batch.scan.records.where(0)}: the shared list {name!r} has no feature")
            first = Ragged(ragged.values[: ragged.row_splits[1]], ragged.row_splits[:2])
            return first.take(np.zeros(rows, np.int64)), np.repeat(member[:1], rows)
        if features < rows:
            raise DataError(f"{batch.scan.records.where(0)}: the list {name!r} has {features} features for {rows} rows")
        splits = ragged.row_splits[: rows + 1]
        return Ragged(ragged.values[: splits[-1]], splits), member[:rows]

    def sparse(self, batch: BatchScan, name: str) -> Ragged[np.int64]:
        """Fids of one list."""
        return self.column(batch, name, Element.FID_V2)[0]

    def _dense(self, batch: BatchScan, name: str, element: Element, dim: int) -> npt.NDArray[Any]:
        ragged, member = self.column(batch, name, element)
        _check_members(batch.scan.records, name, member, element)
        return _padded(ragged, member, dim, element)

    def _weights(self, batch: BatchScan, dim: int) -> npt.NDArray[Any]:
        if batch.lists[self._scanner.schema.name_numbers[_WEIGHT], 0] < 0:
            return np.zeros((batch.batch_size, dim), np.float32)
        ragged, member = self.column(batch, _WEIGHT, Element.FLOAT)
        _check_members(batch.scan.records, _WEIGHT, member, Element.FLOAT)
        first = ragged.dense(1)[:, 0]
        return _first_column(np.where(first > 0, first, np.float32(1)), dim)

    def _lines(self, batch: BatchScan, records: Records, row: int) -> Scan | None:
        """The LineIds of all rows; None if the batch has none."""
        schema = self._scanner.schema
        number = schema.name_numbers[_LINE_ID]
        features, shape = int(batch.lists[number, 0]), int(batch.lists[number, 1])
        if features < 0:
            return None
        column = schema.named_columns[_LINE_ID, Element.BYTES]
        spans, splits = batch.scan.values[column], batch.scan.splits[column]
        wanted = 1 if shape == _SHARED else batch.batch_size
        if features < wanted:
            raise DataError(f"{records.where(row)}: the list {_LINE_ID!r} has {features} features for {wanted} rows")
        there = splits[1 : wanted + 1] > splits[:wanted]
        starts, sizes = np.zeros(wanted, np.int64), np.zeros(wanted, np.int64)
        starts[there], sizes[there] = spans[splits[:wanted][there]].T
        if shape == _SHARED:
            starts, sizes = np.repeat(starts, batch.batch_size), np.repeat(sizes, batch.batch_size)
        at = np.zeros(batch.batch_size, np.int64)
        lines = batch.scan.records.take(at)
        try:
            return self._line_ids.scan(
                lines.replace(buffer=lines.buffer, offsets=starts, lengths=sizes, kind=Kind.INSTANCE)
            )
        except DataError as error:
            raise DataError(
                f"{records.where(row)}: a feature {_LINE_ID!r} holds no serialized LineId: {error}"
            ) from None

    def _extra(self, lines: Scan | None, rows: int, about: LineField, dim: int) -> npt.NDArray[Any]:
        if lines is None:
            fill: Any = b"" if about.dtype == np.object_ else 0
            return np.full((rows, dim), fill, about.batch_dtype)
        return _extra(self._line_ids.schema, about, dim, lines)


def _joined(parts: list[Any], spec: FeatureSpec) -> Any:
    """Batches one behind another."""
    if isinstance(spec, Sparse):
        values = np.concatenate([np.empty(0, np.int64), *(part.values for part in parts)])
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        return Ragged.of_lengths(values, lengths)
    if not parts:
        dtype: Any = np.float32
        if isinstance(spec, Dense):
            dtype = dense_dtype(spec.dtype)
        elif isinstance(spec, Extra):
            dtype = line_field(spec.field).batch_dtype if spec.field else np.int64
        return np.empty((0, getattr(spec, "dim", 1)), dtype)
    return np.concatenate(parts)


# ---- any of them -----------------------------------------------------------------------------------------------------

_PARSERS: dict[Kind, type[Parser]] = {each.kind: each for each in (InstanceParser, ExampleParser, BatchParser)}


class ParseSpec:
    """What a model wants of a batch, for `Dataset.parse`, whatever the records are.

        spec = ParseSpec(user=Slot(1), item=Sparse("fc_item"), context=Dense(8), label=Label(2), uid=Extra())

    Args:
        features: More outputs, whose names are no identifiers.
        on_error: Raise `DataError` for the first damaged record, or leave damaged records out and count them.
        named: Outputs by name.
    """

    def __init__(
        self, features: Mapping[str, FeatureSpec] | None = None, *, on_error: OnError = "raise", **named: FeatureSpec
    ) -> None:
        self.features = {**(features or {}), **named}
        check_specs(self.features)
        check_on_error(on_error)
        self._on_error = on_error
        self._parsers: dict[Kind, Parser] = {}

    @property
    def skipped(self) -> int:
        """Damaged records left out so far."""
        return sum(parser.skipped for parser in self._parsers.values())

    def parse(self, records: Records) -> Features:
        """Make a batch of records."""
        parser = self._parsers.get(records.kind)
        if parser is None:
            if records.kind not in _PARSERS:
                raise InvalidRequestError(f"records of kind {records.kind} cannot be parsed; say what they are")
            parser = self._parsers[records.kind] = _PARSERS[records.kind](self.features, on_error=self._on_error)
        return parser.parse(records)

"""Parsers: feature specs compiled once, then applied to any number of chunks of records."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.choices import OnError, check_on_error
from trilith.data.line_ids import LineField, line_field
from trilith.data.parse.columns import member_of, ragged_of, scalars_of
from trilith.data.parse.quantized import PREFIX, dequantize_rows
from trilith.data.parse.specs import (
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
from trilith.data.records import Kind, Records
from trilith.data.scan.result import Scan
from trilith.data.scan.rows import Rows, merged
from trilith.data.scan.scanner import BatchScan, BatchScanner, LineIdScanner, Scanner
from trilith.data.scan.schema import Element, Fields, Schema
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith.ops.strings import HashedIds, hash_spans
from trilith_proto import example_pb2, feature_pb2

__all__ = ["BatchParser", "ExampleParser", "InstanceParser", "ParseSpec", "Parser"]

_LOG = logging.getLogger(__name__)
_TINY = np.finfo(np.float32).tiny
_LARGEST = float(np.finfo(np.float32).max)
_ELEMENTS = {"f": Element.FLOAT, "i": Element.INT, "O": Element.BYTES}
_LABEL, _WEIGHT, _LINE_ID = "__LABEL__", "instance_weight", "__LINE_ID__"
_OWN = (None, _LABEL, "label")
"""Names of a label that mean the labels of the record itself."""
_SHARED = 1
_DENSE_MEMBERS = {Element.FLOAT: (3, 4), Element.INT: (5,), Element.BYTES: (6,)}
_TEXT_MEMBERS = {Kind.EXAMPLE: 6, Kind.INSTANCE: 5}
_INT_MEMBER, _DOUBLE_MEMBER, _EMPTY = 5, 4, 255
_INSTANCE_MEMBERS = {Element.FLOAT: (3, 5), Element.INT: (4,), Element.BYTES: (5,)}  # bytes may hold quantized floats


class Parser(ABC):
    """Makes a batch of arrays out of records.

    Args:
        specs: What is wanted, by the name that it gets in the batch.
        on_error: Raise `DataError` for the first damaged record, or leave damaged records out and count them.
        strict: Take a feature that holds something else than its spec wants, or another number of elements, for damage;
            otherwise it reads as the reference's parse functions read it, which is mostly as if it were not there.

    Attributes:
        strict: As given.
        skipped: Damaged records left out so far, by this parser.
        unseen: Outputs of which no record had the feature so far, with the names that it could have; what has a default
            (weights) is not among them. Kept by strict parsers only.
    """

    kind: Kind

    def __init__(self, specs: Mapping[str, FeatureSpec], *, on_error: OnError = "raise", strict: bool = True) -> None:
        check_specs(specs)
        check_on_error(on_error)
        self.specs = dict(specs)
        self.skipped = 0
        self.unseen = {out: self._feature_names(out, spec) for out, spec in specs.items()} if strict else {}
        self.unseen = {out: names for out, names in self.unseen.items() if names}
        self._on_error = on_error
        self.strict = strict

    def __reduce__(self) -> tuple[Any, ...]:
        """A parser of the same specs, which in its process finds out for itself how to read them."""
        return partial(type(self), on_error=self._on_error, strict=self.strict), (self.specs,)

    def _feature_names(self, out: str, spec: FeatureSpec) -> tuple[str, ...]:
        """What the feature of an output can be called in records; empty for one that need not be there."""
        match spec:
            case Sparse() | Dense():
                return (spec.feature or out,)
            case Slot():
                return (f"slot {spec.slot}",)
            case Label():
                return (_LABEL, "label") if spec.feature in _OWN else (spec.feature, _LABEL, "label")
            case Extra():
                about = line_field(spec.field or out)
                return (_LINE_ID,) if self.kind is Kind.EXAMPLE_BATCH else (f"__{about.name.upper()}__",)
            case _:
                return ()

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

    def _named_labels(self) -> list[str]:
        """Features that hold a label."""
        names = [spec.feature for spec in self.specs.values() if isinstance(spec, Label)]
        return [name for name in dict.fromkeys(names) if name is not None and name not in _OWN]

    def _has(self, kind: type[Label | InstanceWeight]) -> bool:
        return any(isinstance(spec, kind) for spec in self.specs.values())


_Make: TypeAlias = Callable[[Scan], Any]
_Wrong: TypeAlias = tuple[npt.NDArray[np.bool_], Callable[[int], str]]
"""bool[rows] of records whose feature is not what was asked for, and the reason by row."""


class _ColumnParser(Parser):
    """A parser of what a scanner reads row by row. How each output is made of a scan is found out once.

    Args:
        specs: See `Parser`.
        on_error: See `Parser`.
        strict: See `Parser`.
        texts: Features of the records that are looked at for strings from the first batch on. Others that may have some
            are once they do, as each costs a column.
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        *,
        on_error: OnError = "raise",
        strict: bool = True,
        texts: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(specs, on_error=on_error, strict=strict)
        self.texts = texts
        fields = self._fields()
        # Behind what the specs want, so that places among names stay as they are.
        named = dict.fromkeys((*fields.named, *((name, Element.BYTES) for name in sorted(texts))))
        self._scanner = Scanner(self.kind, replace(fields, named=tuple(named)), np.int64)
        self._outputs = [(name, self._output(name, spec)) for name, spec in self.specs.items()]
        numbers = self._scanner.schema.name_numbers
        self._dense_specs = [
            (spec.feature or out, spec, _ELEMENTS[dense_dtype(spec.dtype).kind])
            for out, spec in self.specs.items()
            if isinstance(spec, Dense)
        ]
        self._sparse_names = list(dict.fromkeys(self._names(Sparse).values()))
        places = [numbers[name] for name in self._sparse_names]
        # They are the first, but for reserved names; a slice of what was seen is no copy.
        self._sparse_places = slice(len(places)) if places == list(range(len(places))) else np.array(places)
        sparse, columns = self._names(Sparse), self._scanner.schema.named_columns
        self._texts = [
            (out, sparse[out], make, columns[sparse[out], Element.BYTES])
            for out, make in self._outputs
            if sparse.get(out) in texts
        ]
        """Output, feature, how its ids are made, and the column of its strings, of those that are looked at."""
        allowed = [
            spec.feature or out
            for out, spec in self.specs.items()
            if strict and isinstance(spec, Sparse) and spec.strings
        ]
        self._allowed = [(numbers[name], name) for name in dict.fromkeys(allowed) if name not in self.texts]
        """Numbers and names of features that may have strings, and had none so far."""
        self._successor: _ColumnParser | None = None

    def parse(self, records: Records, *, promote: bool = True) -> Features:
        """See `Parser`."""
        successor = self._successor
        if successor is None:
            scan = self._scanner.scan(records, on_error=self._on_error, promote=promote)
            texts = {name for number, name in self._allowed if (scan.seen[:, number] == _TEXT_MEMBERS[self.kind]).any()}
            if not texts:
                return self._batch(scan)
            # Other threads may be in the middle of a batch: so this parser stays as it is.
            successor = self._successor = self._reading(texts)
        before = successor.skipped
        batch = successor.parse(records, promote=promote)
        self.skipped += successor.skipped - before
        return batch

    def _reading(self, texts: set[str]) -> _ColumnParser:
        """The same parser, which looks at more features for strings."""
        more = self.texts | texts
        successor = type(self)(self.specs, on_error=self._on_error, strict=self.strict, texts=more)
        successor.unseen = self.unseen
        return successor

    def _batch(self, scan: Scan) -> Features:
        self.skipped += scan.skipped
        if self.strict:
            scan = self._fitting(scan)
            if self.unseen:
                self._see(scan)
        batch = {name: make(scan) for name, make in self._outputs}
        if isinstance(scan.records, Rows):  # other batches are of the same rows, and whoever gets one may change it
            for name, made in batch.items():
                if isinstance(made, Ragged):
                    batch[name] = Ragged(made.values.copy(), made.row_splits.copy())
        self._hash_texts(scan, batch)
        return batch

    def _hash_texts(self, scan: Scan, batch: Features) -> None:
        """Put ids of strings to those of features that are looked at for them."""
        for out, _, _, column in self._texts:
            spans, splits = scan.values[column], scan.splits[column]
            if len(spans):
                hashed = Ragged(hash_spans(scan.text, spans).view(np.int64), splits)
                found = merged([batch[out], hashed], np.int64)
                batch[out] = HashedIds(found.values, found.row_splits.copy())

    def _odd_texts(self, scan: Scan) -> Iterator[_Wrong]:
        """Per feature that is looked at for strings, records with ids beside them."""
        for _, feature, make, column in self._texts:
            if len(scan.values[column]):
                both = (np.diff(scan.splits[column]) > 0) & (make(scan).lengths > 0)
                if both.any():
                    yield both, partial(_ids_and_text, feature)

    def _fitting(self, scan: Scan) -> Scan:
        """The scan without records whose features are not what was asked for, or `DataError` for the first of them."""
        wrong = [
            each
            for each in (self._odd_sparse(scan), *self._odd_dense(scan), *self._odd_texts(scan))
            if each is not None
        ]
        if not wrong:
            return scan
        if self._on_error == "raise":
            odd, reason = min(wrong, key=lambda each: int(each[0].argmax()))
            row = int(odd.argmax())
            raise DataError(f"{scan.records.where(row)}: {reason(row)}")
        keep = ~np.logical_or.reduce([odd for odd, _ in wrong])
        row = int((~keep).argmax())
        why = next(reason(row) for odd, reason in wrong if odd[row])
        if not self.skipped:  # the first of them; all are counted
            _LOG.warning("skipped: %s: %s", scan.records.where(row), why)
        self.skipped += int(keep.size - keep.sum())
        return scan.take(keep)

    def _odd_sparse(self, scan: Scan) -> _Wrong | None:
        """Records with something else than ids where ids are wanted."""
        names = self._sparse_names
        if not names:
            return None
        seen = scan.seen[:, self._sparse_places]
        odd = seen - np.uint8(3) < np.uint8(252)  # all but 0, 1, 2 and 255
        if self.kind is Kind.EXAMPLE:
            odd &= seen != _INT_MEMBER
        else:
            odd &= seen != 6  # lists of fids
            if odd.any():
                for number in np.flatnonzero(odd.any(axis=0)):
                    column = self._scanner.schema.named_columns[names[number], Element.FID]
                    odd[:, number] &= np.diff(scan.splits[column]) == 0
        for place, name in enumerate(names) if self.texts else ():
            if name in self.texts:
                odd[:, place] &= seen[:, place] != _TEXT_MEMBERS[self.kind]
        if not odd.any():
            return None
        rows: npt.NDArray[np.bool_] = np.asarray(odd.any(axis=1))

        def reason(row: int) -> str:
            column = int(odd[row].argmax())
            return _no_ids(names[column], int(seen[row, column]), self.kind)

        return rows, reason

    def _odd_dense(self, scan: Scan) -> list[_Wrong]:
        """Per dense feature that has any, records with something else than `dim` elements of the type wanted."""
        return []

    def _dense_to_check(self, scan: Scan) -> Iterator[tuple[str, Dense, Element, bool]]:
        """Names and specs of dense features; and whether every record has all `dim` elements of the type wanted."""
        for name, spec, element in self._dense_specs:
            column = self._scanner.schema.named_columns[name, element]
            yield name, spec, element, Ragged(scan.values[column], scan.splits[column]).uniform(spec.dim)

    def _see(self, scan: Scan) -> None:
        """Note the outputs whose features were there."""
        schema = self._scanner.schema
        for out in list(self.unseen):
            spec = self.specs[out]
            match spec:
                case Sparse() | Dense():
                    there = bool(scan.seen[:, schema.name_numbers[spec.feature or out]].any())
                case Slot():
                    there = len(scan.values[schema.slot_columns[spec.slot]]) > 0
                case Extra():
                    about = line_field(spec.field or out)
                    if about.repeated:
                        there = len(scan.values[schema.line_columns[about.name]]) > 0
                    else:
                        there = bool(scan.present[schema.line_cells[about.name]].any())
                case _:
                    there = len(scan.values[schema.label_column]) > 0
                    for name in self.unseen.get(out, ()):  # another thread may have seen it
                        if name != _LABEL and name in schema.name_numbers:
                            there |= bool(scan.seen[:, schema.name_numbers[name]].any())
            if there:
                self.unseen.pop(out, None)

    def _odd_labels(self, scan: Scan, members: tuple[int, ...]) -> list[_Wrong]:
        """Per named label that has any, records with something else than a number, or with two labels of that name."""
        wrong: list[_Wrong] = []
        schema = self._scanner.schema
        for name in self._named_labels():
            member = member_of(schema, scan, name)
            if not member.any():
                continue
            odd = _others(member, members)
            if odd is not None:
                wrong.append((odd, partial(_no_floats, name, member, self.kind)))
                continue
            lengths = self._label_values(name, scan).lengths
            if (lengths > 1).any():
                counts = lengths

                def several(row: int, name: str = name, counts: npt.NDArray[np.int64] = counts) -> str:
                    return f"label {name!r} has {int(counts[row])} values; a label is one number"

                wrong.append((lengths > 1, several))
            twice = (member != 0) & (np.diff(scan.splits[schema.label_column]) > 0)
            if self.kind is Kind.EXAMPLE:
                twice |= (member != 0) & (member_of(schema, scan, "label") != 0)
            if twice.any():

                def doubtful(row: int, name: str = name) -> str:
                    return _label_twice(name)

                wrong.append((twice, doubtful))
        return wrong

    def _label_values(self, feature: str, scan: Scan) -> Ragged[Any]:
        """What a feature that holds a label has."""
        schema = self._scanner.schema
        return ragged_of(schema, scan, schema.named_columns[feature, Element.FLOAT])

    def _named_label(self, feature: str, place: int, scan: Scan) -> npt.NDArray[Any]:
        """[rows, 1] of the feature, or of the record's own labels where it has no such feature."""
        schema = self._scanner.schema
        own = self._labels(place + 1, scan)[:, place:].copy()
        there = member_of(schema, scan, feature) != 0
        if there.any():
            own[there] = self._label_values(feature, scan).dense(1, INVALID_LABEL)[there]
        return own

    @abstractmethod
    def _labels(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        """[rows, dim] of the records' own labels, filled up with `INVALID_LABEL`."""

    @abstractmethod
    def _fields(self) -> Fields:
        """What the outputs need."""

    @abstractmethod
    def _output(self, name: str, spec: FeatureSpec) -> _Make:
        """How an output is made."""

    def _line_output(self, name: str, spec: Extra) -> _Make:
        return partial(_extra, self._scanner.schema, line_field(spec.field or name), spec.dim)


def _label_twice(name: str) -> str:
    """Why a record does not say what a label is."""
    return (
        f"it has a feature {name!r} and labels of its own, so that the label {name!r} may be either; drop one, or give "
        "the label another name"
    )


def _label_output(parser: _ColumnParser, spec: Label) -> _Make:
    """How one label is made, by its name."""
    if spec.feature in _OWN or spec.feature is None:
        return lambda scan: parser._labels(spec.place + 1, scan)[:, spec.place :]
    return partial(parser._named_label, spec.feature, spec.place)


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

    Fids of slots come as logged (v1), and as v2 once any named fid feature is asked for; to a parser that is not strict
    a dense feature whose length is not `dim` counts as missing.
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
        named |= dict.fromkeys((name, Element.FLOAT) for name in self._named_labels())
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
            make = self._fitted if self.strict and spec.lengths == "fit" else self._dense
            return partial(make, spec.feature or name, spec.dim, _ELEMENTS[dense_dtype(spec.dtype).kind])
        if isinstance(spec, Label):
            if spec.feature is not None:
                return _label_output(self, spec)
            return lambda scan: ragged_of(schema, scan, schema.label_column).dense(spec.dim)
        if isinstance(spec, InstanceWeight):
            return partial(self._weights, spec.dim)
        return self._line_output(name, spec)

    def _labels(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        return ragged_of(self._scanner.schema, scan, self._scanner.schema.label_column).dense(dim, INVALID_LABEL)

    def _weights(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        weight = scalars_of(scan, self._scanner.schema.weight_cell, np.dtype(np.float32), 1.0)
        return _first_column(weight.values, dim)

    def _odd_dense(self, scan: Scan) -> list[_Wrong]:
        """See `_ColumnParser`; a quantized vector is checked where it is unpacked."""
        wrong = self._odd_labels(scan, _INSTANCE_MEMBERS[Element.FLOAT])
        schema = self._scanner.schema
        for name, spec, element, whole in self._dense_to_check(scan):
            if whole:
                continue
            member = member_of(schema, scan, name)
            lengths = np.diff(scan.splits[schema.named_columns[name, element]])
            found = _odd_values(name, spec, element, member, _INSTANCE_MEMBERS[element], lengths, self.kind)
            if found is None and element is Element.FLOAT and (member == 5).any():
                rows, _, squeezed = self._vectors(scan, name)
                odd = member == 5
                odd[rows[squeezed]] = False
                if odd.any():
                    found = odd, partial(_no_floats, name, member, self.kind)
            if found is not None:
                wrong.append(found)
        return wrong

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        return self._filled(feature, dim, element, scan, exact=True)

    def _fitted(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        return self._filled(feature, dim, element, scan, exact=False)

    def _filled(self, feature: str, dim: int, element: Element, scan: Scan, *, exact: bool) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        ragged = ragged_of(schema, scan, schema.named_columns[feature, element])
        out = ragged.dense(dim, b"" if element is Element.BYTES else 0, exact=exact)
        if element is Element.FLOAT:
            self._dequantize(scan, feature, dim, out)
        return out

    def _vectors(
        self, scan: Scan, feature: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Rows and spans of the byte strings of a feature, and which of them are quantized vectors."""
        column = self._scanner.schema.named_columns[feature, Element.BYTES]
        spans, splits = scan.values[column], scan.splits[column]
        prefix = np.frombuffer(PREFIX, np.uint8)
        heads = scan.records.buffer[spans[:, :1] + np.arange(prefix.size)]
        squeezed = (spans[:, 1] >= prefix.size) & (heads == prefix).all(axis=1)
        return np.repeat(np.arange(splits.size - 1), np.diff(splits)), spans, squeezed

    def _dequantize(self, scan: Scan, feature: str, dim: int, out: npt.NDArray[Any]) -> None:
        """Overwrite rows whose feature holds a quantized vector."""
        rows, spans, squeezed = self._vectors(scan, feature)
        if not len(spans):
            return
        buffer, rows, spans = scan.records.buffer, rows[squeezed], spans[squeezed]
        last = np.append(rows[1:] != rows[:-1], True)[: rows.size]  # the last vector of a feature counts
        rows, starts, sizes = rows[last], spans[last, 0] + len(PREFIX), spans[last, 1] - len(PREFIX)
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
    """Parses Examples. Fids come as v2; labels are cut or filled up with `INVALID_LABEL`.

    A parser that is not strict cuts lists to `dim` or fills them up with zeros.
    """

    kind = Kind.EXAMPLE

    def _fields(self) -> Fields:
        named, _ = _named_elements(self)
        for name in ["label", *self._named_labels()] * self._has(Label) + [_WEIGHT] * self._has(InstanceWeight):
            named[name, Element.FLOAT] = None
            if self.strict:
                named[name, Element.INT] = None
        return Fields(
            label=self._has(Label),
            instance_weight=self._has(InstanceWeight),
            line_id=tuple(dict.fromkeys(about.name for about in self._line_fields().values())),
            named=tuple(named),
        )

    def _output(self, name: str, spec: FeatureSpec) -> _Make:
        if isinstance(spec, Sparse):
            columns = self._scanner.schema.named_columns
            feature = spec.feature or name
            if (feature, Element.ID) in columns:
                return _fids(columns[feature, Element.ID])
            if self.strict:  # its integers are asked for by another name, too
                return partial(self._merged, feature, Element.FID_V2)
            return _fids(columns[feature, Element.FID_V2])
        if isinstance(spec, Dense):
            return partial(self._dense, spec.feature or name, spec.dim, _ELEMENTS[dense_dtype(spec.dtype).kind])
        if isinstance(spec, Label):
            return _label_output(self, spec) if spec.feature is not None else partial(self._labels, spec.dim)
        if isinstance(spec, InstanceWeight):
            return partial(self._weights, spec.dim)
        assert isinstance(spec, Extra)
        return self._line_output(name, spec)

    def _merged(self, feature: str, element: Element, scan: Scan) -> Ragged[Any]:
        """Values of a feature, of which some records may have integers instead."""
        schema = self._scanner.schema
        own = ragged_of(schema, scan, schema.named_columns[feature, element])
        if (feature, Element.INT) not in schema.named_columns:
            return own
        return merged([own, ragged_of(schema, scan, schema.named_columns[feature, Element.INT])], own.values.dtype)

    def _odd_dense(self, scan: Scan) -> list[_Wrong]:
        """See `_ColumnParser`."""
        schema, wrong = self._scanner.schema, self._odd_labels(scan, _held(Element.FLOAT))
        for name, spec, element, whole in self._dense_to_check(scan):
            column = schema.named_columns[name, element]
            found = None
            if not whole:
                splits = (
                    self._merged(name, element, scan).row_splits if element is Element.FLOAT else scan.splits[column]
                )
                member = member_of(schema, scan, name)
                found = _odd_values(name, spec, element, member, _held(element), np.diff(splits), self.kind)
            if found is None and element is Element.FLOAT and np.isinf(scan.values[column]).any():
                found = self._too_large(scan, name)
            if found is not None:
                wrong.append(found)
        for name in (_LABEL,) * self._has(Label) + (_WEIGHT,) * self._has(InstanceWeight):
            member = member_of(schema, scan, name)
            odd = _others(member, (3,) if name == _LABEL else (3, 4, _INT_MEMBER))
            if odd is not None:
                wrong.append((odd, partial(_no_floats, name, member, self.kind)))
        if self._has(Label):
            member = member_of(schema, scan, "label")
            odd = _others(member, _held(Element.FLOAT))
            if odd is not None:
                wrong.append((odd, partial(_no_floats, "label", member, self.kind)))
        return wrong

    def _too_large(self, scan: Scan, name: str) -> _Wrong | None:
        """Records with a double that is no float32; an infinite one is."""
        if not (member_of(self._scanner.schema, scan, name) == _DOUBLE_MEMBER).any():
            return None
        exact = Scanner(self.kind, Fields(named=((name, Element.DOUBLE),)))
        doubles = ragged_of(exact.schema, exact.scan(scan.records), exact.schema.named_columns[name, Element.DOUBLE])
        over = np.isfinite(doubles.values) & (np.abs(doubles.values) > _LARGEST)
        odd = np.zeros(len(doubles), np.bool_)
        odd[doubles.value_rowids[over]] = True
        if not odd.any():
            return None
        return (
            odd,
            lambda row: f"feature {name!r}: {doubles[row].tolist()} is beyond float32, whose largest is {_LARGEST}",
        )

    def _dense(self, feature: str, dim: int, element: Element, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        member = member_of(schema, scan, feature)
        if not self.strict:
            _check_members(scan.records, feature, member, element)
        if self.strict and element is Element.FLOAT:
            return self._merged(feature, element, scan).dense(dim)
        return _padded(ragged_of(schema, scan, schema.named_columns[feature, element]), member, dim, element)

    def _label_values(self, feature: str, scan: Scan) -> Ragged[Any]:
        return self._merged(feature, Element.FLOAT, scan)

    def _labels(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        out = ragged_of(schema, scan, schema.label_column).dense(dim, INVALID_LABEL)
        member = member_of(schema, scan, "label")
        named = member != 0
        if named.any():
            if not self.strict:
                _check_members(scan.records, "label", member, Element.FLOAT)
            out[named] = self._merged("label", Element.FLOAT, scan).dense(dim, INVALID_LABEL)[named]
        return out

    def _weights(self, dim: int, scan: Scan) -> npt.NDArray[Any]:
        schema = self._scanner.schema
        weight = scalars_of(scan, schema.weight_cell, np.dtype(np.float32), 1.0).values
        out = _first_column(np.where(weight > 0, weight, np.float32(1)), dim)
        member = member_of(schema, scan, _WEIGHT)
        named = (member != 0) & (member != _EMPTY)
        if named.any():
            if not self.strict:
                _check_members(scan.records, _WEIGHT, member, Element.FLOAT)
            ragged = self._merged(_WEIGHT, Element.FLOAT, scan)
            # A strict parser takes an empty list for none.
            named &= (ragged.lengths > 0) | (not self.strict)
            out[named] = _padded(ragged, member, dim, Element.FLOAT)[named]
        return out


def _named_elements(parser: Parser) -> tuple[dict[tuple[str, Element], None], bool]:
    """Named features that the specs of an Example or ExampleBatch want; and whether any is a LineId field."""
    if any(isinstance(spec, Slot) for spec in parser.specs.values()):
        raise InvalidRequestError("only Instances have fids of slots; name the feature, such as Sparse('fc_slot_3')")
    named: dict[tuple[str, Element], None] = {}
    dense: dict[tuple[str, Element], None] = {}
    for out, spec in parser.specs.items():
        if isinstance(spec, Dense):
            dtype = dense_dtype(spec.dtype)
            if dtype == np.object_ and spec.dim != 1:
                raise InvalidRequestError(f"{out!r}: strings of an Example have dim 1, not {spec.dim}")
            element = _ELEMENTS[dtype.kind]
            dense[spec.feature or out, element] = None
            if parser.strict and element is Element.FLOAT:  # which integers are, too
                dense[spec.feature or out, Element.INT] = None
    for out, spec in parser.specs.items():
        if isinstance(spec, Sparse):
            name = spec.feature or out
            ids = parser.strict and (name, Element.INT) not in dense
            named[name, Element.ID if ids else Element.FID_V2] = None
    named |= dense
    return named, any(isinstance(spec, Extra) for spec in parser.specs.values())


def _held(element: Element) -> tuple[int, ...]:
    """Members of an Example's feature that a strict parser reads as elements of a type."""
    return (*_DENSE_MEMBERS[element], _INT_MEMBER) if element is Element.FLOAT else _DENSE_MEMBERS[element]


def _holds(name: str, member: int, kind: Kind) -> str:
    """What a feature holds, in words."""
    message = feature_pb2.Feature if kind is Kind.INSTANCE else example_pb2.Feature
    held = message.DESCRIPTOR.fields_by_number.get(member)
    return f"feature {name!r} holds a {held.name if held else 'value of another type'}"


def _no_ids(name: str, member: int, kind: Kind) -> str:
    """Why a feature cannot be read as ids."""
    if member == _TEXT_MEMBERS.get(kind):
        advice = "Sparse takes integers; Sparse(strings=True) takes hashes of strings"
    elif kind is Kind.INSTANCE:
        advice = "Sparse reads the fids of an Instance; write them as fid, or read the feature as Dense"
    elif member in _DENSE_MEMBERS[Element.BYTES]:
        advice = "Sparse takes integers; make integers of the strings first, by a dictionary or a hash"
    elif member in _DENSE_MEMBERS[Element.FLOAT]:
        advice = (
            f"Sparse takes integers; where whole numbers are stored as floats, read the column as "
            f"Column({name!r}, 'fid_v2'), or read the feature as Dense"
        )
    else:
        advice = "Sparse takes a list of fids or of integers"
    return f"{_holds(name, member, kind)}, which are no ids: {advice}"


def _ids_and_text(name: str, row: int) -> str:
    return f"feature {name!r} holds ids and text at once"


def _no_floats(name: str, member: npt.NDArray[np.uint8], kind: Kind, row: int) -> str:
    return f"{_holds(name, int(member[row]), kind)}, which is no list of float values"


def _odd_values(
    name: str,
    spec: Dense,
    element: Element,
    member: npt.NDArray[np.uint8],
    members: tuple[int, ...],
    lengths: npt.NDArray[np.int64],
    kind: Kind,
) -> _Wrong | None:
    """Records whose dense feature is of another type, or has another number of elements than wanted."""
    odd = _others(member, members)
    # A feature of an Instance may hold several kinds of values; then the one that is wanted counts.
    if odd is not None and (odd := odd & (lengths == 0)).any():

        def held(row: int) -> str:
            return f"{_holds(name, int(member[row]), kind)}, which is no list of {element} values"

        return odd, held
    if spec.lengths == "exact":
        odd = (lengths != spec.dim) & (lengths != 0)
        if odd.any():
            return (
                odd,
                lambda row: (
                    f"feature {name!r} has {int(lengths[row])} values where Dense({spec.dim}) takes {spec.dim}; "
                    f"Dense(..., lengths='fit') cuts them or fills them up with zeros"
                ),
            )
    return None


def _others(member: npt.NDArray[np.uint8], members: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """bool[rows] of features that hold something, and none of some members; None if there are none."""
    if member.size and member[0] in (0, _EMPTY, *members) and (member == member[0]).all():
        return None
    odd: npt.NDArray[np.bool_] = ~np.isin(member, (0, _EMPTY, *members))
    return odd if odd.any() else None


def _check_members(records: Records, name: str, member: npt.NDArray[np.uint8], element: Element) -> None:
    """Refuse a feature that holds something else than what was asked for."""
    wrong = _others(member, _DENSE_MEMBERS[element])
    if wrong is not None:
        row = int(wrong.argmax())
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
    where the batch has no list of them. What is damaged costs the whole batch.
    """

    kind = Kind.EXAMPLE_BATCH

    def __init__(self, specs: Mapping[str, FeatureSpec], *, on_error: OnError = "raise", strict: bool = True) -> None:
        super().__init__(specs, on_error=on_error, strict=strict)
        named, extras = _named_elements(self)
        labels = [_LABEL, "label"][: 1 + self.strict] * self._has(Label)
        for name in labels + self._named_labels() + [_WEIGHT] * self._has(InstanceWeight):
            named[name, Element.FLOAT] = None
            if self.strict:
                named[name, Element.INT] = None
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
                out[name] = self._dense(batch, spec.feature or name, element, spec)
            elif isinstance(spec, Label):
                out[name] = self._label(batch, spec)
            elif isinstance(spec, InstanceWeight):
                out[name] = self._weights(batch, spec.dim)
            elif isinstance(spec, Extra):
                out[name] = self._extra(lines, batch.batch_size, line_field(spec.field or name), spec.dim)
        for name, features in list(self.unseen.items()):
            numbers = self._scanner.schema.name_numbers
            if any(each in numbers and batch.lists[numbers[each], 0] >= 0 for each in features):
                self.unseen.pop(name, None)
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
        if not self.strict:
            return self.column(batch, name, Element.FID_V2)[0]
        apart = (name, Element.ID) not in self._scanner.schema.named_columns
        ragged, member = self.column(batch, name, Element.FID_V2 if apart else Element.ID)
        odd = _others(member, (1, 2, _INT_MEMBER))
        if odd is not None:
            row = int(odd.argmax())
            reason = _no_ids(name, int(member[row]), self.kind)
            raise DataError(f"{batch.scan.records.where(0)}: row {row} of the batch: {reason}")
        return self._with_integers(batch, name, ragged) if apart else ragged

    def _with_integers(self, batch: BatchScan, name: str, own: Ragged[Any]) -> Ragged[Any]:
        """Values of one list, of which some rows may have integers instead."""
        return merged([own, self.column(batch, name, Element.INT)[0]], own.values.dtype)

    def _floats(self, batch: BatchScan, name: str) -> tuple[Ragged[Any], npt.NDArray[np.uint8]]:
        """Floats of one list, integers among them if the parser is strict; and what the rows hold."""
        ragged, member = self.column(batch, name, Element.FLOAT)
        if not self.strict:
            _check_members(batch.scan.records, name, member, Element.FLOAT)
            return ragged, member
        odd = _others(member, _held(Element.FLOAT))
        if odd is not None:
            row = int(odd.argmax())
            reason = _no_floats(name, member, self.kind, row)
            raise DataError(f"{batch.scan.records.where(0)}: row {row} of the batch: {reason}")
        return self._with_integers(batch, name, ragged), member

    def _dense(self, batch: BatchScan, name: str, element: Element, spec: Dense) -> npt.NDArray[Any]:
        if element is Element.FLOAT:
            ragged, member = self._floats(batch, name)
        else:
            ragged, member = self.column(batch, name, element)
            _check_members(batch.scan.records, name, member, element)
        if self.strict:
            wrong = _odd_values(name, spec, element, member, _held(element), ragged.lengths, self.kind)
            if wrong is not None:
                row = int(wrong[0].argmax())
                raise DataError(f"{batch.scan.records.where(0)}: row {row} of the batch: {wrong[1](row)}")
        if self.strict and element is Element.FLOAT:
            return ragged.dense(spec.dim)
        return _padded(ragged, member, spec.dim, element)

    def _label(self, batch: BatchScan, spec: Label) -> npt.NDArray[Any]:
        numbers = self._scanner.schema.name_numbers
        if spec.feature is not None and spec.feature not in _OWN and batch.lists[numbers[spec.feature], 0] >= 0:
            if any(name in numbers and batch.lists[numbers[name], 0] >= 0 for name in (_LABEL, "label")):
                raise DataError(f"{batch.scan.records.where(0)}: {_label_twice(spec.feature)}")
            return self._floats(batch, spec.feature)[0].dense(1, INVALID_LABEL)
        own = batch.lists[numbers[_LABEL], 0] >= 0 or "label" not in numbers
        values = self._floats(batch, _LABEL if own else "label")[0]
        if spec.feature is None:
            return values.dense(spec.dim)
        return values.dense(spec.place + 1, INVALID_LABEL)[:, spec.place :]

    def _weights(self, batch: BatchScan, dim: int) -> npt.NDArray[Any]:
        if batch.lists[self._scanner.schema.name_numbers[_WEIGHT], 0] < 0:
            return np.zeros((batch.batch_size, dim), np.float32)
        first = self._floats(batch, _WEIGHT)[0].dense(1)[:, 0]
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

    def __reduce__(self) -> tuple[Any, ...]:
        """What is wanted, without the parsers made of it: their tables hold addresses, which mean nothing elsewhere."""
        return partial(type(self), on_error=self._on_error), (self.features,)

    @property
    def skipped(self) -> int:
        """Damaged records left out so far."""
        return sum(parser.skipped for parser in self._parsers.values())

    @property
    def unseen(self) -> dict[str, tuple[str, ...]]:
        """Outputs of which no record had the feature so far, with the names that it could have."""
        parsers = list(self._parsers.values())
        found = dict(parsers[0].unseen) if parsers else {}
        return {out: names for out, names in found.items() if all(out in each.unseen for each in parsers)}

    def parse(self, records: Records) -> Features:
        """Make a batch of records."""
        parser = self._parsers.get(records.kind)
        if parser is None:
            if records.kind not in _PARSERS:
                raise InvalidRequestError(f"records of kind {records.kind} cannot be parsed; say what they are")
            parser = self._parsers[records.kind] = _PARSERS[records.kind](self.features, on_error=self._on_error)
        return parser.parse(records)

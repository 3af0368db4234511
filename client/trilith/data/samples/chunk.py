"""What every sample op is, and the chunk of samples that ops read and change.

An op says which columns it reads and what it makes of them, for all records of a chunk at once. A chain of ops extracts
the union of their columns once, lets each op see what those before it changed, and writes changed records once.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.data.choices import OnError
from trilith.data.fids import MAX_SLOTS
from trilith.data.line_ids import line_field
from trilith.data.messages import Message
from trilith.data.parse.columns import member_of, ragged_of, scalars_of
from trilith.data.records import Kind, Records
from trilith.data.samples.relations import Bits, Domain, Relation, Strings
from trilith.data.samples.rewrite import rewrite
from trilith.data.scan.scanner import scanner
from trilith.data.scan.schema import Element, Fields
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["Feature", "Needs", "SampleOp", "Samples", "apply_ops", "default_ordinals"]

_M = TypeVar("_M", bound=Message)

_MASK64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Per type the list of an Example's feature that has it: its field number, and how the scanner calls its values.
_LISTS = {
    Domain.FLOAT: (3, Element.FLOAT),
    Domain.DOUBLE: (4, Element.DOUBLE),
    Domain.INT64: (5, Element.INT),
    Domain.BYTES: (6, Element.BYTES),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Columns that an op reads or changes.

    Attributes:
        labels: The labels.
        line_id: Names of fields of LineId.
        fids: The fids of `FilterByFids`.
        slots: The slots of `FilterByFids`.
        features: Names of features of Examples, each with the type of the list that is wanted.
    """

    labels: bool = False
    line_id: frozenset[str] = frozenset()
    fids: bool = False
    slots: bool = False
    features: frozenset[tuple[str, Domain]] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            labels=self.labels or other.labels,
            line_id=self.line_id | other.line_id,
            fids=self.fids or other.fids,
            slots=self.slots or other.slots,
            features=self.features | other.features,
        )


class SampleOp(ABC):
    """A rule about samples: an immutable value that says what it reads and what it makes of a chunk."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The columns that `apply` uses."""

    @abstractmethod
    def apply(self, samples: Samples) -> npt.NDArray[Any] | None:
        """Change `samples` in place, and say what stays.

        Returns:
            bool[n], which samples stay; or int64[n], how many copies of each; or None, all of them.
        """

    def __call__(self, records: Records, ordinals: npt.NDArray[np.int64] | None = None) -> Records:
        """The records that stay, changed; see `apply_ops`."""
        return apply_ops((self,), records, ordinals)

    def on(self, message: _M, ordinal: int = 0) -> list[_M]:
        """What becomes of one Instance or Example: a changed copy, as often as it stays.

        Args:
            message: As it is, that is, without promoting reserved features.
            ordinal: What the draws depend on.
        """
        kind = Kind(message.DESCRIPTOR.name.lower())
        records = Records.of([message.SerializeToString()], kind)
        made = apply_ops((self,), records, np.array([ordinal]), promote=False)
        cls: Any = type(message)
        return [cls.FromString(payload) for payload in made.payloads()]


def apply_ops(
    ops: Sequence[SampleOp],
    records: Records,
    ordinals: npt.NDArray[np.int64] | None = None,
    *,
    on_error: OnError = "raise",
    lost: Callable[[int], None] | None = None,
    promote: bool = True,
) -> Records:
    """Run ops over records, in order; a record dropped by one is gone.

    Args:
        ops: Any number.
        records: Instances or Examples.
        ordinals: int64[n], what the draws of each record depend on besides the seed of an op, such as the number of
            records seen before; by default the record's file and number, so that every pass draws the same.
        on_error: Raise `DataError` for the first damaged record, or leave damaged records out.
        lost: Called with how many records were left out, if any.
        promote: Let reserved features of Examples stand for the fields they name.
    """
    if records.kind not in (Kind.INSTANCE, Kind.EXAMPLE):
        raise InvalidRequestError(f"sample ops work on instances and examples; these records are {str(records.kind)!r}")
    if not ops or not len(records):
        return records
    needs = ops[0].needs
    for op in ops[1:]:
        needs |= op.needs
    samples = Samples(records, needs, ordinals, on_error=on_error, promote=promote)
    if lost is not None and samples.skipped:
        lost(samples.skipped)
    copies: npt.NDArray[Any] | None = None
    for op in ops:
        stays = op.apply(samples)
        if stays is not None:
            copies = stays if copies is None else copies * stays
    return samples.written(copies)


def default_ordinals(records: Records) -> npt.NDArray[np.int64]:
    """int64[n]: a number for each record that depends on its file, its number there and its row if it is of a batch."""
    files = np.array([zlib.crc32(name.encode()) for name in records.sources], np.int64)[records.source_index]
    keys = (files << 32) ^ records.numbers
    fresh = np.ones(len(records), np.bool_)
    fresh[1:] = keys[1:] != keys[:-1]
    place = np.arange(len(records))
    row = place - np.maximum.accumulate(np.where(fresh, place, 0))
    return keys ^ (row << 48)


class Samples:
    """The columns of a chunk of records; what ops change is kept here until `written`.

    Args:
        records: Instances or Examples.
        needs: The columns that may be asked for.
        ordinals: int64[n]; see `apply_ops`.
        on_error: Whether damaged records raise or are left out.
        promote: Whether reserved features of Examples stand for the fields they name.
    """

    def __init__(
        self,
        records: Records,
        needs: Needs,
        ordinals: npt.NDArray[np.int64] | None = None,
        *,
        on_error: OnError = "raise",
        promote: bool = True,
    ) -> None:
        if ordinals is not None and len(ordinals) != len(records):
            raise InvalidRequestError(f"{len(ordinals)} ordinals for {len(records)} records; each record needs one")
        self.kind = records.kind
        self._reader = scanner(records.kind, _fields(records.kind, needs))
        if on_error == "skip":
            # Numbered from 0, the records left by the scan say which they are; nothing else reads these numbers.
            numbered = records.renumbered(np.arange(len(records)))
            self._scan = self._reader.scan(numbered, on_error=on_error, promote=promote)
            if self._scan.skipped:
                rows = self._scan.records.numbers
                records = records.take(rows)
                ordinals = None if ordinals is None else ordinals[rows]
        else:
            self._scan = self._reader.scan(records, promote=promote)
        # As they came, not as the scan may have rewritten some.
        self._records = records
        self._promote = promote
        self._ordinals = ordinals
        self._labels: Ragged[np.float32] | None = None
        self._line_id: dict[str, npt.NDArray[Any] | Ragged[Any]] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def skipped(self) -> int:
        """Damaged records that were left out."""
        return self._scan.skipped

    def where(self, index: int) -> str:
        """Where a sample came from, for messages."""
        return self._records.where(index)

    # ---- columns -----------------------------------------------------------------------------------------------------

    @property
    def labels(self) -> Ragged[np.float32]:
        """The labels; may be set."""
        return self._column(self._reader.schema.label_column) if self._labels is None else self._labels

    @labels.setter
    def labels(self, labels: Ragged[np.float32]) -> None:
        self._labels = labels

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """[n]: a single number of LineId (uint64, int64, float32 or bool), its default where unset."""
        if name in self._line_id:
            return self._line_id[name]  # type: ignore[return-value]
        described = line_field(name)
        return scalars_of(self._scan, self._reader.schema.line_cells[name], described.dtype, described.default).values

    def rows(self, name: str) -> Ragged[Any]:
        """int64: a list of LineId."""
        if name in self._line_id:
            return self._line_id[name]  # type: ignore[return-value]
        return self._column(self._reader.schema.line_columns[name])

    def put(self, name: str, values: npt.NDArray[Any] | Ragged[Any]) -> None:
        """Set a number or list of LineId."""
        self._line_id[name] = values

    def relation(self, name: str, relation: Relation) -> npt.NDArray[np.bool_]:
        """bool[n]: whose single value of LineId satisfies a relation."""
        if relation.domain is not Domain.BYTES:
            return relation.of_numbers(self.numbers(name))
        cell = self._reader.schema.line_cells[name]
        starts, sizes = (self._scan.cells[place].view(np.int64) for place in (cell, cell + 1))
        return relation.of_strings(Strings(self._scan.text, starts, sizes))

    @property
    def fids(self) -> list[Bits]:
        """Of an Instance the flat fids, of an Example those of all v1 and v2 lists."""
        schema = self._reader.schema
        columns = (schema.fids_column,) if self.kind is Kind.INSTANCE else schema.every
        return [Bits(self._column(each)) for each in columns]

    @property
    def slots(self) -> list[Bits]:
        """Slots of the fids, and of the fids of an Instance's features."""
        schema = self._reader.schema
        v1, v2 = schema.every
        if self.kind is Kind.INSTANCE:
            v1 = schema.fids_column
        return [Bits(self._column(v1), 54), Bits(self._column(v2), 48, MAX_SLOTS - 1)]

    def feature(self, name: str, domain: Domain) -> Feature:
        """The last feature of that name in each Example, where it holds a list of that type."""
        number, element = _LISTS[domain]
        schema, scan = self._reader.schema, self._scan
        if (name, element) not in schema.named_columns:
            reader = scanner(self.kind, Fields(named=((name, element),)))
            schema, scan = reader.schema, reader.scan(self._records, promote=self._promote)
        column = schema.named_columns[name, element]
        splits = scan.splits[column]
        held = member_of(schema, scan, name) == number
        return Feature(
            lengths=np.where(held, np.diff(splits), 0),
            starts=splits[:-1],
            values=scan.values[column],
            buffer=scan.text,
        )

    def _column(self, column: int) -> Ragged[Any]:
        return ragged_of(self._reader.schema, self._scan, column)

    # ---- chance ------------------------------------------------------------------------------------------------------

    def draws(self, seed: int, salt: int = 0) -> npt.NDArray[np.uint64]:
        """uint64[n], uniform: the same for the same seed, salt and ordinal."""
        if self._ordinals is None:
            self._ordinals = default_ordinals(self._records)
        stream = _mixed(np.array([seed & _MASK64, salt], np.uint64))
        with np.errstate(over="ignore"):
            start = _mixed(stream[:1] + stream[1:] * _GOLDEN)
            return _mixed(start + (self._ordinals.view(np.uint64) + np.uint64(1)) * _GOLDEN)

    def uniform(self, seed: int, salt: int = 0) -> npt.NDArray[np.float64]:
        """float64[n], uniform on [0, 1)."""
        return (self.draws(seed, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    # ---- the end -----------------------------------------------------------------------------------------------------

    def written(self, copies: npt.NDArray[Any] | None) -> Records:
        """The records as ops left them.

        Args:
            copies: [n], how many of each; one by default.
        """
        records = self._records
        if copies is not None and not (copies == 1).all():
            kept = np.flatnonzero(copies)
            records = records.take(kept)
        else:
            copies, kept = None, None
        if self._labels is not None or self._line_id:
            records = rewrite(
                records,
                label=None if self._labels is None else _taken(self._labels, kept),
                line_id={name: _taken(values, kept) for name, values in self._line_id.items()},
                promoted=self._promote,
            )
        if copies is not None and kept is not None and (copies > 1).any():
            records = records.take(np.repeat(np.arange(kept.size), copies[kept]))
        return records


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Feature:
    """One list of a named feature in every row.

    Attributes:
        lengths: int64[n], values in the list; 0 also where the feature is absent or holds something else.
        starts: int64[n], where each row begins in `values`.
        values: Numbers, or spans int64[m, 2] of (offset in the buffer, length) of byte strings.
        buffer: uint8[size], what spans are of.
    """

    lengths: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    buffer: npt.NDArray[np.uint8]

    def relation(self, relation: Relation) -> npt.NDArray[np.bool_]:
        """bool[n]: whose list has one value, and one that satisfies a relation."""
        single = np.flatnonzero(self.lengths == 1)
        values = self.values[self.starts[single]]
        found = np.zeros(self.lengths.size, np.bool_)
        if relation.domain is Domain.BYTES:
            found[single] = relation.of_strings(Strings(self.buffer, values[:, 0], values[:, 1]))
        else:
            found[single] = relation.of_numbers(values)
        return found

    def sets(self, relation: Relation) -> npt.NDArray[np.bool_]:
        """bool[n]: whose list of integers satisfies a relation of sets."""
        return relation.of_sets(Ragged(self.values, np.append(self.starts, self.values.size)))


def _fields(kind: Kind, needs: Needs) -> Fields:
    instance = kind is Kind.INSTANCE
    # One scan reads a feature as floats or as doubles; who wants both gets the doubles from a scan of their own.
    features = {each for each in needs.features if (each[0], Domain.FLOAT) not in needs.features or each[1] != "double"}
    return Fields(
        label=needs.labels,
        line_id=tuple(sorted(needs.line_id)),
        fids=instance and (needs.fids or needs.slots),
        every_fid=needs.slots or (needs.fids and not instance),
        named=tuple(sorted({(name, _LISTS[domain][1]) for name, domain in features})),
    )


def _taken(values: Any, rows: npt.NDArray[np.int64] | None) -> Any:
    if rows is None:
        return values
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`ops.hashing.mix64` of an array."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

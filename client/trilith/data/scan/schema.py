"""What a user wants of every record, and the tables that tell the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from trilith.data.choices import Choice
from trilith.data.line_ids import Wire, line_field, line_fields
from trilith.data.records import Kind
from trilith.data.scan import wire
from trilith.data.scan.plan import NOWHERE, REPEATED, WANTED, Slot
from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of

__all__ = ["LINE_NUMBERS", "V1_SLOTS", "Element", "Fields", "NameTable", "Schema", "line_table", "name_hash"]

_T = TypeVar("_T")

_K1, _K2, _MASK64 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 2**64 - 1
_MEMBERS = 17
_NO_SLOT = 0xFFFF
_MAX_COLUMNS = 60_000
V1_SLOTS = 1024
"""Slots that a v1 fid can have."""
LINE_NUMBERS = 256
"""Numbers of LineId fields that the scanner knows, and more than producers use."""


class Element(Choice):
    """Which values of a named feature are wanted.

    FID: fids as logged (uint64): those of an Instance's fid, then of its fid_lists; of either list of an Example.
    FID_V2: the same as v2, the form that tables know.
    ID: as FID_V2; of an Example also integers, which are ids as they are.
    FLOAT: float32; a list of doubles is narrowed.
    DOUBLE: float64, lists of doubles only; FLOAT and DOUBLE of one feature cannot be had together.
    INT: int64. BYTES: bytes.
    """

    FID = "fid"
    FID_V2 = "fid_v2"
    ID = "id"
    FLOAT = "float"
    DOUBLE = "double"
    INT = "int"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What to read out of records of one kind.

    Attributes:
        label: The labels; of an Example with those of a reserved feature behind its own.
        instance_weight: The weight.
        line_id: Names of LineId fields.
        named: (name, element) of named features; a name may occur with several elements.
        slots: v1 slots of an Instance's flat fids.
        slots_as_v2: Give fids of `slots` as v2.
        fids: An Instance's flat fids, all of them, as logged.
        every_fid: Fids of all named features, whatever their names, as logged: of an Instance's `fid`, of an Example's
            v1 and v2 lists.
    """

    label: bool = False
    instance_weight: bool = False
    line_id: tuple[str, ...] = ()
    named: tuple[tuple[str, Element], ...] = ()
    slots: tuple[int, ...] = ()
    slots_as_v2: bool = False
    fids: bool = False
    every_fid: bool = False

    def __post_init__(self) -> None:
        for slot in self.slots:
            if not 0 <= slot < V1_SLOTS:
                raise InvalidRequestError(f"slot {slot} is outside 0..{V1_SLOTS - 1}, the slots of v1 fids")
        for name in self.line_id:
            line_field(name)
        for what, items in (("slots", self.slots), ("line_id", self.line_id), ("named", self.named)):
            if len(set(items)) != len(items):
                raise InvalidRequestError(f"{what} names something twice: {items}")

    def __or__(self, other: Fields) -> Fields:
        """Everything that either wants."""
        if self.slots and other.slots and self.slots_as_v2 != other.slots_as_v2:
            raise InvalidRequestError("one wants fids of slots as v2, the other as v1")
        return Fields(
            label=self.label or other.label,
            instance_weight=self.instance_weight or other.instance_weight,
            line_id=_union(self.line_id, other.line_id),
            named=_union(self.named, other.named),
            slots=_union(self.slots, other.slots),
            slots_as_v2=self.slots_as_v2 or other.slots_as_v2,
            fids=self.fids or other.fids,
            every_fid=self.every_fid or other.every_fid,
        )


def _union(a: Sequence[_T], b: Sequence[_T]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def name_hash(name: bytes) -> int:
    """What `wire.name_hash` computes."""
    value = len(name) * _K1 & _MASK64
    for at in range(0, len(name), 8):
        word = int.from_bytes(name[at : at + 8], "little")
        value = (value ^ word) * _K2 & _MASK64
        value ^= value >> 29
    return value


def line_table() -> npt.NDArray[np.int64]:
    """int64[256]: the table LINE where no field of LineId is wanted."""
    table = np.zeros(LINE_NUMBERS, np.int64)
    for field in line_fields().values():
        if field.number < LINE_NUMBERS:
            # Lists are checked even where nobody wants them, as the protobuf library does.
            table[field.number] = int(field.wire) | (REPEATED if field.repeated else 0)
    return table


class NameTable:
    """Names for `wire.find_name`.

    Attributes:
        table: int64[mask + 1, 3].
        mask: Entries minus one.
        texts: int64[names or 1, 2]: address and length of each name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode() for name in names]
        starts = np.cumsum([0] + [len(name) + 8 for name in encoded]).tolist()
        self._text = np.zeros(starts[-1] + 64, np.uint8)  # the table points into it
        self.mask = (1 << max(4 * len(encoded) - 1, 1).bit_length()) - 1
        self.table = np.zeros((self.mask + 1, 3), np.int64)
        self.texts = np.full((max(len(encoded), 1), 2), -1, np.int64)
        base = address_of(self._text)
        for number, (name, start) in enumerate(zip(encoded, starts, strict=False)):
            self._text[start : start + len(name)] = np.frombuffer(name, np.uint8)
            self.texts[number] = base + start, len(name)
            bucket = name_hash(name) & self.mask
            while self.table[bucket, 2]:
                bucket = (bucket + 1) & self.mask
            self.table[bucket] = base + start, len(name), number + 1


class Schema:
    """Fields of one kind of message as the tables of the kernels.

    Args:
        kind: Of the message.
        fields: What is wanted.
        fids: What fids come as: uint64, or int64 with the same bits.

    Attributes:
        names: Names that are looked up, reserved ones last.
        reserved: Number of the first reserved name.
        columns: Per column the dtype of its elements: object for byte strings.
        cells: Number of scalars, two for a string.
        dtypes: The dtypes that occur in `columns`.
        dtype_numbers: Per column the index of its dtype among them.
        widths: int64[columns], bytes of an element in the kernels' memory: 16 for a byte string's span.
        plan: int64[Slot.SIZE]: what every scan is told, to be copied and completed.
    """

    def __init__(self, kind: Kind, fields: Fields, fids: npt.DTypeLike = np.uint64) -> None:
        if kind is Kind.PLAINTEXT:
            raise InvalidRequestError("plaintext has no fields; read it as instance, example or examplebatch")
        if kind is not Kind.INSTANCE and (fields.slots or fields.fids):
            raise InvalidRequestError(f"only Instances have flat fids with slots, not records of kind {kind}")
        if kind is Kind.EXAMPLE_BATCH and (fields.label or fields.instance_weight or fields.line_id):
            raise InvalidRequestError("an ExampleBatch carries labels, weights and line ids as named features")
        self.kind = kind
        self.fields = fields
        self._fid = np.dtype(fids)
        self.columns: list[np.dtype[np.generic]] = []
        self.cells = 0
        self.every = [-1, -1]
        self.named_columns: dict[tuple[str, Element], int] = {}
        self.slot_columns: dict[int, int] = {}
        self.line_columns: dict[str, int] = {}
        self.line_cells: dict[str, int] = {}
        self.label_column = self.fids_column = self.weight_cell = -1
        self.top = np.zeros(128, np.int64)
        self.line = line_table()
        reserved = ("__LINE_ID__", "__LABEL__", "instance_weight") if kind is Kind.EXAMPLE else ()
        plain = dict.fromkeys(name for name, _ in fields.named if name not in reserved)
        self.reserved = len(plain)
        self.names = (*plain, *reserved)
        self.name_numbers = {name: number for number, name in enumerate(self.names)}
        self.members = np.full((max(len(self.names), 1), _MEMBERS), NOWHERE, np.int64)
        for name, element in fields.named:
            self._add_named(name, element)
        self.slot_table = np.full(V1_SLOTS, _NO_SLOT, np.uint16)
        for slot in fields.slots:
            self.slot_columns[slot] = column = self._column(self._fid)
            self.slot_table[slot] = column
        self._add_line_id()
        self._add_top()
        if fields.every_fid:
            self.every = [self._column(self._fid), self._column(self._fid)]
        if len(self.columns) > _MAX_COLUMNS:
            raise InvalidRequestError(f"{len(self.columns)} columns are more than {_MAX_COLUMNS}")
        self.dtypes = list(dict.fromkeys(self.columns))
        self.dtype_numbers = [self.dtypes.index(each) for each in self.columns]
        self.widths = np.array([16 if each == np.object_ else each.itemsize for each in self.columns], np.int64)
        self._lookup = NameTable(self.names)
        self.plan = self._plan()

    def _plan(self) -> npt.NDArray[np.int64]:
        plan = np.zeros(Slot.SIZE, np.int64)
        told = {
            Slot.NAMES: address_of(self._lookup.table),
            Slot.MASK: self._lookup.mask,
            Slot.TEXTS: address_of(self._lookup.texts),
            Slot.NAME_COUNT: len(self.names),
            Slot.RESERVED: self.reserved,
            Slot.MEMBERS: address_of(self.members),
            Slot.SLOTS: address_of(self.slot_table) if self.slot_columns else 0,
            Slot.CONVERT: int(self.fields.slots_as_v2),
            Slot.TOP: address_of(self.top),
            Slot.LINE: address_of(self.line),
            Slot.COLUMNS: len(self.columns),
            Slot.LABEL: self.label_column,
            Slot.WEIGHT: self.weight_cell,
            Slot.EVERY_V1: self.every[0],
            Slot.EVERY_V2: self.every[1],
        }
        plan[list(told)] = list(told.values())
        return plan

    def _column(self, dtype: npt.DTypeLike) -> int:
        self.columns.append(np.dtype(dtype))
        return len(self.columns) - 1

    def _add_named(self, name: str, element: Element) -> None:
        element = Element(element)
        number = self.name_numbers[name]
        instance = self.kind is Kind.INSTANCE
        places: dict[int, int]
        dtype: npt.DTypeLike
        if element in (Element.FID, Element.FID_V2, Element.ID):
            dtype = self._fid
            first = wire.FIXED64 if element is Element.FID else wire.V1_TO_V2
            places = {2: wire.FIXED64, 6: wire.FIXED64} if instance else {1: first, 2: wire.FIXED64}
            if element is Element.ID and not instance:
                places[5] = wire.VARINT
        elif element is Element.FLOAT:
            dtype = np.float32
            places = {3: wire.FIXED32} if instance else {3: wire.FIXED32, 4: wire.DOUBLE_TO_FLOAT}
        elif element is Element.DOUBLE:
            dtype = np.float64
            places = {} if instance else {4: wire.FIXED64}
        elif element is Element.INT:
            dtype = np.int64
            places = {4: wire.VARINT} if instance else {5: wire.VARINT}
        else:
            dtype = np.object_
            places = {5: wire.BYTES} if instance else {6: wire.BYTES}
        column = self._column(dtype)
        self.named_columns[name, element] = column
        for place, how in places.items():
            if self.members[number, place] != NOWHERE:
                wanted = [str(each) for other, each in self.fields.named if other == name]
                raise InvalidRequestError(f"feature {name!r} cannot be read as {wanted} at once")
            self.members[number, place] = column << 8 | how

    def _add_line_id(self) -> None:
        for name in self.fields.line_id:
            field = line_field(name)
            if field.number >= LINE_NUMBERS:
                raise InvalidRequestError(f"LineId.{name} has number {field.number}; numbers below 256 can be read")
            if field.repeated:
                place = self.line_columns[name] = self._column(field.dtype)
            else:
                place = self.line_cells[name] = self.cells
                self.cells += 2 if field.wire == Wire.BYTES else 1
            self.line[field.number] |= WANTED | place << 16

    def _add_top(self) -> None:
        fields, instance = self.fields, self.kind is Kind.INSTANCE
        if instance:
            lists = {1: wire.FIXED64, 2: wire.FIXED32, 3: wire.FIXED32, 6: wire.FIXED32, 8: wire.FIXED64}
            label, weight, key = 3, 4, 100
        else:
            lists = {101: wire.FIXED32}
            label, weight, key = 101, 102, 103
        if self.kind is Kind.EXAMPLE_BATCH:
            return
        for number, element in lists.items():
            self.top[number] = element | REPEATED
        self.top[weight] = wire.FIXED32
        self.top[key] = wire.UNSIGNED32
        if fields.label:
            self.label_column = self._column(np.float32)
            self.top[label] |= WANTED | self.label_column << 16
        if fields.fids:
            self.fids_column = self._column(self._fid)
            self.top[1] |= WANTED | self.fids_column << 16
        if fields.instance_weight:
            self.weight_cell = self.cells
            self.cells += 1
            self.top[weight] |= WANTED | self.weight_cell << 16

"""Fields of serialized records as arrays, for code that looks at whole chunks of samples at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.choices import OnError
from trilith.data.line_ids import LineField, line_field
from trilith.data.records import Records
from trilith.data.scan.result import Scalars, Scan, byte_strings
from trilith.data.scan.scanner import scanner
from trilith.data.scan.schema import Element, Fields, Schema
from trilith.ops.ragged import Ragged

__all__ = [
    "Columns",
    "Element",
    "Fields",
    "Named",
    "Scalars",
    "columns_of",
    "extract",
    "member_of",
    "ragged_of",
    "scalars_of",
]


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """One kind of value of a named feature.

    Attributes:
        ragged: The values of each row; byte strings are objects.
        member: uint8[rows]: field number of what the feature holds in each row, whether or not it was asked for; 0
            where the row has no such feature, 255 where the feature is there and empty.
    """

    ragged: Ragged[Any]
    member: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Columns:
    """What `extract` found. What was not asked for is absent.

    Attributes:
        records: The records described: those given, without those skipped.
        skipped: How many damaged records were skipped.
        label: float32, the labels of each row.
        instance_weight: float32; 1.0 where unset.
        line_id: Per name a `Scalars`, or a `Ragged` for lists. uint64, int64, float32, bool, or bytes.
        named: Per name and element.
        slots: Per v1 slot its fids.
        fids: uint64, an Instance's flat fids.
        every_fid: uint64, v1 and v2 fids of all named features of each row.
    """

    records: Records
    skipped: int = 0
    label: Ragged[np.float32] | None = None
    instance_weight: Scalars | None = None
    line_id: dict[str, Scalars | Ragged[Any]] = field(default_factory=dict)
    named: dict[tuple[str, Element], Named] = field(default_factory=dict)
    slots: dict[int, Ragged[np.uint64]] = field(default_factory=dict)
    fids: Ragged[np.uint64] | None = None
    every_fid: tuple[Ragged[np.uint64], Ragged[np.uint64]] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def line_scalars(self, name: str) -> Scalars:
        """A scalar LineId field."""
        found = self.line_id[name]
        if not isinstance(found, Scalars):
            raise TypeError(f"LineId.{name} is a list")
        return found


def extract(records: Records, fields: Fields, *, on_error: OnError = "raise", promote: bool = True) -> Columns:
    """Read some fields of Instances or Examples.

    Arrays of values may share one block of memory; copy what is to be kept for long.

    Args:
        records: Of kind instance or example.
        fields: What to read.
        on_error: "raise" stops at a damaged record with `DataError`; "skip" leaves such records out and counts them.
        promote: Let the reserved features of an Example stand for its line id, labels and weight.
    """
    reader = scanner(records.kind, fields)
    return columns_of(reader.schema, reader.scan(records, on_error=on_error, promote=promote))


def columns_of(schema: Schema, scan: Scan) -> Columns:
    """The result of a scan by name."""
    fields = schema.fields
    return Columns(
        records=scan.records,
        skipped=scan.skipped,
        label=ragged_of(schema, scan, schema.label_column) if fields.label else None,
        instance_weight=_weight(schema, scan) if fields.instance_weight else None,
        line_id={name: _line(schema, scan, line_field(name)) for name in fields.line_id},
        named={
            (name, element): Named(ragged_of(schema, scan, column), member_of(schema, scan, name))
            for (name, element), column in schema.named_columns.items()
        },
        slots={slot: ragged_of(schema, scan, column) for slot, column in schema.slot_columns.items()},
        fids=ragged_of(schema, scan, schema.fids_column) if fields.fids else None,
        every_fid=(ragged_of(schema, scan, schema.every[0]), ragged_of(schema, scan, schema.every[1]))
        if fields.every_fid
        else None,
    )


def ragged_of(schema: Schema, scan: Scan, column: int) -> Ragged[Any]:
    """One column."""
    values = scan.strings(column) if schema.columns[column] == np.object_ else scan.values[column]
    return Ragged(values, scan.splits[column])


def member_of(schema: Schema, scan: Scan, name: str) -> npt.NDArray[np.uint8]:
    """uint8[rows]: what a named feature holds."""
    return scan.seen[:, schema.name_numbers[name]]


def _weight(schema: Schema, scan: Scan) -> Scalars:
    cell = schema.weight_cell
    return scalars_of(scan, cell, np.dtype(np.float32), 1.0)


def _line(schema: Schema, scan: Scan, about: LineField) -> Scalars | Ragged[Any]:
    if about.repeated:
        return ragged_of(schema, scan, schema.line_columns[about.name])
    return scalars_of(scan, schema.line_cells[about.name], about.dtype, about.default)


def scalars_of(scan: Scan, cell: int, dtype: np.dtype[np.generic], default: Any) -> Scalars:
    """One scalar field."""
    present = scan.present[cell].view(np.bool_)
    raw = scan.cells[cell]
    values: npt.NDArray[Any]
    if dtype == np.object_:
        values = byte_strings(scan.text, raw.view(np.int64), scan.cells[cell + 1].view(np.int64))
    elif dtype.itemsize == 4:
        values = raw.astype(np.uint32).view(dtype)
    else:
        values = raw.astype(np.bool_) if dtype == np.bool_ else raw.view(dtype)
    if default:
        values[~present] = default
    return Scalars(values, present)

"""Changed copies of serialized records: labels, weights and LineId fields replaced, everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.data.line_ids import Wire, line_field
from trilith.data.messages import INSTANCE_WEIGHT, LABEL, LINE_ID, message_of, promote
from trilith.data.records import PADDING, Kind, Records
from trilith.data.scan.changes import Changes, Column
from trilith.data.scan.encode import Edit, rewrite_records
from trilith.data.scan.result import Scalars
from trilith.data.scan.scanner import bounds_of, damage, replace_payloads
from trilith.data.scan.schema import NameTable, line_table
from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.ops.ragged import Ragged

__all__ = ["rewrite"]

_LABEL_FIELDS = {Kind.INSTANCE: (5, 3, 4), Kind.EXAMPLE: (100, 101, 102)}


def rewrite(
    records: Records,
    *,
    label: Ragged[np.float32] | None = None,
    instance_weight: npt.NDArray[np.float32] | Scalars | None = None,
    line_id: Mapping[str, Column] | None = None,
    promoted: bool = True,
) -> Records:
    """Replace some fields of all records.

    A field given as `Scalars` is unset in records where it is not present. Reserved features of an Example whose
    meaning is replaced are left out, or they would have the last word when the copy is read.

    Args:
        records: Of kind instance or example.
        label: The labels of each record.
        instance_weight: The weight of each record.
        line_id: New values of LineId fields by name.
        promoted: Take reserved features of Examples for what they stand for.

    Returns:
        Records of their own buffer, as many and in the same order.
    """
    if records.kind not in _LABEL_FIELDS:
        raise InvalidRequestError(f"only instances and examples can be rewritten, not records of kind {records.kind}")
    line_number, label_number, weight_number = _LABEL_FIELDS[records.kind]
    changes = Changes(len(records))
    reserved = []
    for name, values in (line_id or {}).items():
        changes.add_line(line_field(name), values)
    if line_id:
        reserved.append(LINE_ID)
    if label is not None:
        changes.add_top(label_number, Wire.FIXED32, np.dtype(np.float32), label, packed=True, what="label")
        reserved.append(LABEL)
    if instance_weight is not None:
        changes.add_top(
            weight_number, Wire.FIXED32, np.dtype(np.float32), instance_weight, packed=False, what="instance_weight"
        )
        reserved.append(INSTANCE_WEIGHT)
    names = NameTable(reserved) if records.kind is Kind.EXAMPLE and reserved else None
    flags = np.full(len(records), int(promoted), np.uint8)
    while True:
        out, status, places = _copy(records, changes, line_number if line_id else 0, names, flags)
        bad = np.flatnonzero(status < 0)
        if bad.size:
            raise damage(records, int(bad[0]), status, places)
        odd = np.flatnonzero(status > 0)
        if not odd.size:
            return out
        payloads = []
        for row in odd.tolist():
            message: Any = message_of(records.payload(row), records.kind)
            if flags[row]:
                promote(message)
            kept = [each for each in message.named_feature if each.name not in reserved]
            del message.named_feature[:]
            message.named_feature.extend(kept)
            payloads.append(message.SerializeToString(deterministic=True))
        flags[odd] = 0
        records = replace_payloads(records, odd, payloads)


def _copy(
    records: Records, changes: Changes, line_number: int, names: NameTable | None, flags: npt.NDArray[np.uint8]
) -> tuple[Records, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rows = len(records)
    offsets, lengths, _ = bounds_of(records)
    rooms = lengths + changes.room
    out = np.empty(int(rooms.sum()) + 2 * PADDING, np.uint8)
    scratch = np.empty(int(rooms.max(initial=0)) + 2 * PADDING, np.uint8)
    top, line = np.array(changes.top, np.int64), np.array(changes.line, np.int64)
    out_offsets, out_lengths = np.empty(rows, np.int64), np.empty(rows, np.int64)
    status, places = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    table = line_table()
    edit = np.zeros(Edit.SIZE, np.int64)
    edit[Edit.ROWS], edit[Edit.BUFFER] = rows, address_of(records.buffer)
    edit[Edit.OFFSETS], edit[Edit.LENGTHS] = address_of(offsets), address_of(lengths)
    edit[Edit.LINE_FIELD] = line_number
    edit[Edit.DROP_TOP], edit[Edit.DROP_LINE] = address_of(changes.drop_top), address_of(changes.drop_line)
    edit[Edit.TOP], edit[Edit.TOP_COUNT] = address_of(top), len(changes.top)
    edit[Edit.LINE], edit[Edit.LINE_COUNT] = address_of(line), len(changes.line)
    edit[Edit.LINE_NAME] = -1
    if names is not None:
        edit[Edit.NAMES], edit[Edit.MASK] = address_of(names.table), names.mask
        edit[Edit.LINE_NAME] = 0 if line_number else -1
    edit[Edit.LINE_TABLE], edit[Edit.SCRATCH] = address_of(table), address_of(scratch)
    edit[Edit.OUT], edit[Edit.OUT_OFFSETS], edit[Edit.OUT_LENGTHS] = (
        address_of(array) for array in (out, out_offsets, out_lengths)
    )
    edit[Edit.STATUS], edit[Edit.PLACES] = address_of(status), address_of(places)
    edit[Edit.PROMOTE] = address_of(flags)
    rewrite_records(address_of(edit))
    end = int(out_offsets[-1] + out_lengths[-1]) if rows else 0
    out[end:] = 0
    return records.replace(buffer=out[: end + PADDING], offsets=out_offsets, lengths=out_lengths), status, places

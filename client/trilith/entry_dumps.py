"""Rows as people ask for them and read them: ids as text, EntryDumps as plain values."""

from __future__ import annotations

from typing import Any

from trilith.errors import InvalidRequestError
from trilith_proto import hash_table_pb2

__all__ = ["describe_entry", "parse_id", "signed_id"]


def parse_id(text: str) -> int:
    """The id as unsigned 64-bit number that `text` writes: decimal (signed or unsigned) or 0x….

    Raises:
        InvalidRequestError: It is no number, or one that does not fit in 64 bits.
    """
    try:
        value = int(text, 0)
    except ValueError:
        raise InvalidRequestError(f"{text!r} is no id; ids are numbers such as 42, -1 or 0x2a") from None
    if not -(2**63) <= value < 2**64:
        raise InvalidRequestError(f"{text} does not fit in 64 bits")
    return value % 2**64


def signed_id(value: int) -> int:
    """An id as the signed number that dumps write."""
    return value - 2**64 if value >= 2**63 else value


def describe_entry(entry: bytes) -> dict[str, Any]:
    """A serialized EntryDump as weights, optimizer state by segment and slot, and time of the last update."""
    dump = hash_table_pb2.EntryDump.FromString(entry)
    return {
        "weights": list(dump.num),
        "optimizers": [_describe_optimizer(single) for single in dump.opt.dump],
        "last_update_unix_s": dump.last_update_ts_sec,
    }


def _describe_optimizer(single: hash_table_pb2.SingleOptimizerDump) -> dict[str, Any]:
    kind = single.WhichOneof("type") or ""
    dump = getattr(single, kind) if kind else None
    slots: dict[str, Any] = {}
    if dump is not None:
        for field in dump.DESCRIPTOR.fields:
            value = getattr(dump, field.name)
            slots[field.name] = value if isinstance(value, int | float) else list(value)
    return {"optimizer": kind, "slots": slots}

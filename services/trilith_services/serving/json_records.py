"""Records in JSON as Examples: every value becomes what the model declares, whatever literal it was written as."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from trilith.errors import InvalidRequestError
from trilith.serving.exports import RecordFeature
from trilith_proto.example_pb2 import Example

__all__ = ["encode_records", "unknown_feature"]

_MAX_ID = (1 << 64) - 1
_EXACT = 1 << 53  # beyond it a number with a decimal point may have lost digits
_MAX_FLOAT = 3.4028235677973366e38  # float32 rounds what is below to a finite number
_MAX_SHOWN = 60
_MAX_NAMES = 20


def encode_records(
    records: Iterable[Mapping[str, Any]],
    declared: Mapping[str, RecordFeature],
    on_unknown: Callable[[int, str], None],
) -> list[bytes]:
    """Serialized Examples.

    Args:
        records: Per record its features by name: one number, or a list of them.
        declared: What the model takes, by name.
        on_unknown: Told the record's number and the name of every feature that the model does not know; it is left out.

    Raises:
        InvalidRequestError: A value is none that its feature can have.
    """
    return [_encode(number, record, declared, on_unknown) for number, record in enumerate(records)]


def _encode(
    number: int,
    record: Mapping[str, Any],
    declared: Mapping[str, RecordFeature],
    on_unknown: Callable[[int, str], None],
) -> bytes:
    example = Example()
    for name, given in record.items():
        about = declared.get(name)
        if about is None:
            on_unknown(number, name)
            continue
        where = f"record {number}: feature {name!r}"
        values = given if isinstance(given, list) else [given]
        if about.kind == "both":
            raise InvalidRequestError(f"{where} is ids and numbers in this model, which only Instances can hold")
        feature = example.named_feature.add(name=name).feature
        if about.kind == "ids":
            feature.fid_v2_list.value.extend([_id(value, where) for value in values])
            continue
        if len(values) != about.dim and not about.pad:
            raise InvalidRequestError(f"{where} has {len(values)} numbers; the model takes {about.dim}")
        feature.float_list.value.extend([_float(value, where) for value in values])
    return example.SerializeToString()


def unknown_feature(where: str, name: str, declared: Iterable[str]) -> InvalidRequestError:
    """What is wrong with a record whose feature the model does not know."""
    names = sorted(declared)
    near = get_close_matches(name, names, 1)
    meant = f" (is {near[0]!r} meant?)" if near else ""
    shown = ", ".join(names[:_MAX_NAMES]) + (f", … ({len(names)} in all)" if len(names) > _MAX_NAMES else "")
    return InvalidRequestError(f"{where}: the model has no feature {name!r}{meant}; it has {shown}")


def _id(value: Any, where: str) -> int:
    """An id: a whole number, or the digits of one."""
    digits = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    found = int(value) if digits or whole else value
    if type(found) is not int or not 0 <= found <= _MAX_ID:
        exact = "; numbers from 2^53 on without a decimal point or exponent, or as text" if _is_large(value) else ""
        raise InvalidRequestError(
            f"{where} has {_shown(value)}; ids are whole numbers from 0 to 2^64 - 1, or their digits as text{exact}"
        )
    return found


def _is_large(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and _EXACT <= value <= _MAX_ID


def _float(value: Any, where: str) -> float:
    """A number that float32 can hold."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_FLOAT:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(f"{where} has {value}; the model takes finite numbers")
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise InvalidRequestError(f"{where} has {_shown(value)}, which is beyond float32; it ends at 3.4e38")
    raise InvalidRequestError(f"{where} has {_shown(value)}; the model takes numbers")


def _shown(value: Any) -> str:
    """A value as JSON has it, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "a list inside its list" if value else "an empty list inside its list"
    if isinstance(value, dict):
        return "an object"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python turns into text
        text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"

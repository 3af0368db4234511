"""Records in JSON as Examples: every value becomes what the model declares, whatever literal it was written as."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from trilith.errors import InvalidRequestError
from trilith.ops.strings import hash_strings
from trilith.serving.exports import RecordFeature
from trilith_proto.example_pb2 import Example, Feature

__all__ = ["encode_records", "unknown_feature"]

_MAX_ID = (1 << 64) - 1
_EXACT = 1 << 53  # beyond it a number with a decimal point may have lost digits
_MAX_FLOAT = 3.4028235677973366e38  # float32 rounds what is below to a finite number
_MAX_SHOWN = 60
_MAX_NAMES = 20
_MAX_PROBLEMS = 10


def encode_records(
    records: Iterable[Mapping[str, Any]],
    declared: Mapping[str, RecordFeature],
    on_unknown: Callable[[int, str], None],
    needed: Collection[str] = (),
) -> list[bytes]:
    """Serialized Examples.

    Args:
        records: Per record its features by name: one number, or a list of them.
        declared: What the model takes, by name.
        on_unknown: Told the record's number and the name of every feature that the model does not know; it is left out.
        needed: Features that every record must have, if only as null or an empty list; another that it does not have
            is empty, or zeros.

    Raises:
        InvalidRequestError: A value is none that its feature can have, or a feature is missing; the message has the
            first ten of such, each with its record's number.
    """
    problems: list[str] = []
    found = []
    for number, record in enumerate(records):
        found.append(_encode(number, record, declared, on_unknown, problems))
        missing = [name for name in needed if name not in record]
        if missing:
            problems.append(_missing(number, missing))
        if len(problems) > _MAX_PROBLEMS:
            break
    if problems:
        more = "; and more" if len(problems) > _MAX_PROBLEMS else ""
        raise InvalidRequestError("; ".join(problems[:_MAX_PROBLEMS]) + more)
    return found


def _missing(number: int, names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_MAX_NAMES]))
    if len(names) > _MAX_NAMES:
        shown += f", … ({len(names)} in all)"
    return f"record {number}: {f'feature {shown} is' if len(names) == 1 else f'features {shown} are'} missing"


def _encode(
    number: int,
    record: Mapping[str, Any],
    declared: Mapping[str, RecordFeature],
    on_unknown: Callable[[int, str], None],
    problems: list[str],
) -> bytes:
    """A record; what is wrong with it is added to `problems`."""
    example = Example()
    for name, given in record.items():
        about = declared.get(name)
        try:
            if about is None:
                on_unknown(number, name)
            elif given is not None or (about.kind != "ids" and not about.pad):  # null is what an empty list is
                feature = example.named_feature.add(name=name).feature
                _add(
                    feature, given if isinstance(given, list) else [given], about, f"record {number}: feature {name!r}"
                )
        except InvalidRequestError as error:
            problems.append(str(error))
    return b"" if problems else example.SerializeToString()


def _add(feature: Feature, values: list[Any], about: RecordFeature, where: str) -> None:
    """What a feature has."""
    if about.kind == "ids":
        _add_ids(feature, values, about, where)
        return
    if about.kind != "weights" and len(values) != about.dim and not about.pad:
        raise InvalidRequestError(f"{where} has {len(values)} numbers; the model takes {about.dim}")
    if about.kind == "both":
        feature.int64_list.value.extend([_whole(value, where) for value in values])
    else:
        feature.float_list.value.extend([_float(value, where) for value in values])


def _add_ids(feature: Feature, values: list[Any], about: RecordFeature, where: str) -> None:
    """Ids as they are; text as it is, too, where it may be an id."""
    texts = [value for value in values if isinstance(value, str)] if about.strings else []
    if texts and len(texts) == len(values):
        feature.bytes_list.value.extend([_encoded(text, where) for text in texts])
        return
    hashed = iter(hash_strings([_encoded(text, where) for text in texts]).tolist() if texts else ())
    feature.fid_v2_list.value.extend(
        [next(hashed) if about.strings and isinstance(value, str) else _id(value, where, about) for value in values]
    )


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise InvalidRequestError(f"{where} has {_shown(text)}, which is no Unicode text") from None


def unknown_feature(where: str, name: str, declared: Iterable[str]) -> InvalidRequestError:
    """What is wrong with a record whose feature the model does not know."""
    names = sorted(declared)
    near = get_close_matches(name, names, 1)
    meant = f" (is {near[0]!r} meant?)" if near else ""
    shown = ", ".join(names[:_MAX_NAMES]) + (f", … ({len(names)} in all)" if len(names) > _MAX_NAMES else "")
    return InvalidRequestError(f"{where}: the model has no feature {name!r}{meant}; it has {shown}")


def _id(value: Any, where: str, about: RecordFeature) -> int:
    """An id: a whole number, or the digits of one."""
    digits = isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    found = int(value) if digits or whole else value
    if type(found) is not int or not 0 <= found <= _MAX_ID:
        exact = "; numbers from 2^53 on without a decimal point or exponent, or as text" if _is_large(value) else ""
        text = "text" if about.strings else "their digits as text"
        raise InvalidRequestError(
            f"{where} has {_shown(value)}; ids are whole numbers from 0 to 2^64 - 1, or {text}{exact}"
        )
    return found


def _whole(value: Any, where: str) -> int:
    """What is an id and a number at once."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    found = int(value) if whole else value
    if type(found) is not int or not 0 <= found < 1 << 63:
        raise InvalidRequestError(
            f"{where} has {_shown(value)}; it is ids and numbers in this model: whole numbers from 0 to 2^63 - 1"
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

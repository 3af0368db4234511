"""Differences between the config a table has and the one it is asked for: which matter, and what works instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from google.protobuf.message import Message

from trilith_proto import ps_pb2

__all__ = ["explain", "field_differences", "same_table", "tell"]

_ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("learning_rate", "warmup_steps"),
        "for another rate leave the optimizer as it is and give table(…, learning_rate=…), a number or a schedule",
    ),
    (("init_config", "seed"), "initial values are of new rows only and stay as they are"),
    (
        ("slot_expire_time_config", "feature_evict", "occurrence_thresholds", "filter", "skip_zero"),
        "lifetimes, filters and thresholds stay as the table was made with",
    ),
    (
        ("opt_config", "comp_config", "dim_size", "segments", "entry_type"),
        "rows of another shape, optimizer or compressor need a table of another name",
    ),
)
"""By a part of the field's path, the first that fits: what to do about it."""


def same_table(here: ps_pb2.TableConfig, asked: ps_pb2.TableConfig) -> bool:
    """Whether the configs are those of one table: all the same but for hints, which only matter when it is made."""
    return here == asked or _without_hints(here) == _without_hints(asked)


def _without_hints(config: ps_pb2.TableConfig) -> ps_pb2.TableConfig:
    plain = ps_pb2.TableConfig()
    plain.CopyFrom(config)
    plain.hash_table.ClearField("initial_capacity")
    return plain


def explain(name: str, here: ps_pb2.TableConfig, asked: ps_pb2.TableConfig, *, where: str = "here") -> str:
    """What differs, field by field, and what works instead; `where` is the place that has the config `here`."""
    differences = field_differences(here, asked)
    advice = "; ".join(_advice(field for field, _, _ in differences))
    return (
        f"{tell(differences, where, 'asked')}. {advice[0].upper()}{advice[1:]}."
        f" table({name!r}) without a config opens the table as it is"
    )


def tell(differences: Sequence[tuple[str, str, str]], here: str, there: str) -> str:
    """Differences as text."""
    return "; ".join(f"{field} is {ours} {here}, {theirs} {there}" for field, ours, theirs in differences)


def _advice(fields: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for field in fields:
        for parts, advice in _ADVICE:
            if any(part in field for part in parts):
                found[advice] = None
                break
    return list(found) or ["the config of a table that exists stays as it is"]


def field_differences(here: Message, asked: Message) -> list[tuple[str, str, str]]:
    """What differs: path of the field, its value here and its value asked."""
    ours, theirs = _fields(here), _fields(asked)
    return [
        (name, ours.get(name, "not set"), theirs.get(name, "not set"))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _fields(message: Message, prefix: str = "") -> dict[str, str]:
    """Values of the fields that are set, by path; of an empty message, that it is there."""
    found: dict[str, str] = {}
    for field, value in message.ListFields():
        many = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        for number, each in enumerate(value if many else [value]):
            name = f"{prefix}{field.name}[{number}]" if many else f"{prefix}{field.name}"
            if isinstance(each, Message):
                found |= _fields(each, f"{name}.") or {name: "set"}
            elif isinstance(each, float) and np.float32(each) == each:
                found[name] = str(np.float32(each))  # 0.05, not 0.05000000074505806
            else:
                found[name] = str(each)
    return found

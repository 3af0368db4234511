"""What values the fields of table configs may take: one table of ranges, for wrappers and ready messages alike."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from trilith.errors import InvalidRequestError

__all__ = ["MAX_DIM", "RANGES", "Range", "check_fields", "check_value"]

MAX_DIM = 4096
"""Floats in the widest row."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`, whole ones if `high` is; `above` leaves out `low` itself, `below` `high`."""

    low: float
    high: float = _FLOAT32_MAX
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        if isinstance(self.high, int):
            return f"outside {self.low}..{self.high}"
        if self.high >= _FLOAT32_MAX:
            if self.low <= -_FLOAT32_MAX:
                return "not a finite float32"
            return f"not a finite float32 {'above' if self.above else 'of at least'} {self.low:g}"
        return f"outside {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


_ANY = Range(-_FLOAT32_MAX)
_NOT_NEGATIVE = Range(0.0)
_POSITIVE = Range(0.0, above=True)
_SHARE = Range(0.0, 1.0)

RANGES: dict[str, Range] = {
    # optimizers
    "learning_rate": _NOT_NEGATIVE,
    "initial_accumulator_value": _NOT_NEGATIVE,
    "hessian_compression_times": Range(1, _INT32_MAX),
    "weight_decay_factor": _NOT_NEGATIVE,
    "warmup_steps": Range(0, _INT64_MAX),
    "beta": _NOT_NEGATIVE,
    "l1_regularization_strength": _NOT_NEGATIVE,
    "l2_regularization_strength": _NOT_NEGATIVE,
    "dynamic_wd_temperature": _POSITIVE,
    "averaging_ratio": _SHARE,
    "epsilon": _NOT_NEGATIVE,
    # At 1 the bias correction 1 - beta^t of the first step would be 0.
    "beta1": Range(0.0, 1.0, below=True),
    "beta2": Range(0.0, 1.0, below=True),
    "momentum": _SHARE,
    "lambda_": _ANY,
    # initializers
    "constant": _ANY,
    "minval": _ANY,
    "maxval": _ANY,
    # compressors
    "r": _POSITIVE,
    "step_size": Range(1, _INT64_MAX),
    "init_scale": _POSITIVE,
    "max_scale": _POSITIVE,
    "amplitude": _POSITIVE,
}
"""Range by field name; a name means the same in every message that has it."""


def check_value(owner: str, name: str, field: Any, value: Any) -> None:
    """Refuse a value that a field cannot take.

    Args:
        owner: Begins the message.
        name: What the owner calls the field.
        field: Its protobuf FieldDescriptor.
        value: Any Python value.
    """
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, (bool, np.bool_)):
            raise InvalidRequestError(f"{owner}: {name}={value!r} is not a bool")
        return
    if callable(value):
        raise InvalidRequestError(
            f"{owner}: {name}={value!r} is not a number; a schedule is given to the table, as its learning_rate"
        )
    integral = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral if integral else numbers.Real):
        raise InvalidRequestError(f"{owner}: {name}={value!r} is not {'an integer' if integral else 'a number'}")
    allowed = RANGES[field.name]
    number: Any = value if integral else float(value)
    if math.isnan(number) or number not in allowed:
        raise InvalidRequestError(f"{owner}: {name}={value!r} is {allowed}")


def check_fields(owner: str, message: Message) -> None:
    """Check every number in `message`, which is one kind of optimizer, initializer or compressor."""
    for field in message.DESCRIPTOR.fields:
        if field.name != "dim_size":  # the segment's own dim_size overrides it
            check_value(owner, field.name, field, getattr(message, field.name))

"""The model's step: which numbers one can be, and how far a write may be ahead of the counter it raises."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from trilith.errors import InvalidRequestError

__all__ = ["MAX_STEP", "MAX_STEPS_AHEAD", "as_step"]

MAX_STEP = 2**53
"""The largest step: every whole number up to here is one in floating point and in JSON too."""

MAX_STEPS_AHEAD = 2**30
"""How far a write's step may be ahead of the counter. Who means to go further sets the counter itself."""


def as_step(value: Any, what: str = "global_step") -> int:
    """A step that a caller gave, as an int.

    Raises:
        InvalidRequestError: It is no whole number, or outside 0..MAX_STEP.
    """
    try:
        step = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        step = None
    if step is None:
        raise InvalidRequestError(f"{what}={' '.join(repr(value).split())[:60]} is no whole number")
    if not 0 <= step <= MAX_STEP:
        raise InvalidRequestError(f"{what}={step} is outside 0..{MAX_STEP}")
    return step

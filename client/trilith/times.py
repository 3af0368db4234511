"""Times that callers give, in whole Unix seconds: what is one, and what the mistake was where it is none."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError

__all__ = ["MAX_AHEAD_S", "MAX_TIME", "check_ahead", "latest", "whole_seconds"]

MAX_TIME = 2**32 - 1
"""The latest time that a row can carry, in the year 2106."""

MAX_AHEAD_S = 86_400
"""How far ahead of the clock of whoever takes it a time may be: clocks differ a little, never by more than a day."""

_UNITS = (("milliseconds", 1_000), ("microseconds", 1_000_000), ("nanoseconds", 1_000_000_000))
_LONG_AGO = 946_684_800  # the year 2000: a time that is given in another unit lies behind it


def whole_seconds(value: Any, what: str = "request_time") -> int:
    """A time that a caller gave, as an int.

    Args:
        value: Unix seconds: an integer of Python or numpy, or a float that is whole.
        what: The argument's name, for the message.

    Raises:
        InvalidRequestError: It is something else, negative, or later than a row's time can be.
    """
    if isinstance(value, (bool, np.bool_)):
        raise InvalidRequestError(f"{what}={value} is no time; whole Unix seconds are needed")
    try:
        seconds = (
            int(value) if isinstance(value, (float, np.floating)) and value.is_integer() else operator.index(value)
        )
    except TypeError:
        raise InvalidRequestError(
            f"{what}={_short(value)} is no whole number of seconds; Unix seconds are needed, as int(time.time()) gives"
        ) from None
    if seconds < 0:
        raise InvalidRequestError(f"{what}={seconds} is negative; Unix seconds from 0 are needed")
    if seconds > MAX_TIME:
        raise InvalidRequestError(f"{what}={seconds} {_fault(seconds)}")
    return seconds


def check_ahead(seconds: int, now: float, what: str = "request_time", *, clock: str = "this shard's clock") -> None:
    """Raise InvalidRequestError for a time more than a day ahead of `now`, Unix seconds, which is that of `clock`."""
    if seconds > now + MAX_AHEAD_S:
        raise InvalidRequestError(
            f"{what}={seconds} is {(seconds - now) / 86_400:.1f} days ahead of {clock}, which says {int(now)}; "
            "a time may be one day ahead, in Unix seconds"
        )


def latest(values: npt.ArrayLike, now: float, what: str) -> int | None:
    """The latest of the times of a batch's records, or None if there is no record.

    Args:
        values: One time per record, Unix seconds.
        now: This machine's clock, Unix seconds.
        what: The argument's name, for the message.

    Raises:
        InvalidRequestError: A time is none, or more than a day ahead of `now`; the message says which record's.
    """
    times = np.asarray(values).reshape(-1)
    if times.size == 0:
        return None
    whole = times.dtype.kind in "iu"
    newest = 0
    for place in (int(times.argmin()), int(times.argmax())) if whole else range(times.size):
        seconds = whole_seconds(times[place], f"{what}[{place}]")
        check_ahead(seconds, now, f"{what}[{place}]", clock="this machine's clock")
        newest = max(newest, seconds)
    return newest


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def _fault(seconds: int) -> str:
    for unit, factor in _UNITS:
        if _LONG_AGO <= seconds // factor <= MAX_TIME:
            return f"looks like {unit}; Unix seconds are needed, here {seconds // factor}"
    return f"is beyond the year 2106; Unix seconds up to {MAX_TIME} are needed"

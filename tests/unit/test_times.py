"""Times that callers give: what is taken, and what the message says where it is refused."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.times import MAX_AHEAD_S, MAX_TIME, check_ahead, latest, whole_seconds

NOW = 1_800_000_000


@pytest.mark.parametrize("value", [0, 5, NOW, float(NOW), np.int32(7), np.uint64(NOW), np.float64(NOW), MAX_TIME])
def test_whole_seconds_are_taken(value):
    taken = whole_seconds(value)
    assert (taken, type(taken)) == (int(value), int)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-1, r"request_time=-1 is negative"),
        (np.int64(-5), r"request_time=-5 is negative"),
        (1.5, r"request_time=1\.5 is no whole number"),
        (np.float32(0.5), "no whole number"),
        (float("nan"), "no whole number"),
        (float("inf"), "no whole number"),
        ("now", r"request_time='now' is no whole number"),
        (b"5", "no whole number"),
        (None, "no whole number"),
        (True, "request_time=True is no time"),
        (np.bool_(False), "is no time"),
        (np.array([1, 2]), "no whole number"),
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "no whole number"),
        (2**32, r"request_time=4294967296 is beyond the year 2106"),
        (NOW * 1_000, rf"looks like milliseconds; .*, here {NOW}$"),
        (NOW * 1_000_000, rf"looks like microseconds; .*, here {NOW}$"),
        (NOW * 10**9, rf"looks like nanoseconds; .*, here {NOW}$"),
        (2**63, "looks like nanoseconds|beyond the year 2106"),
        (2**200, "beyond the year 2106"),
        (1e300, "beyond the year 2106"),
    ],
)
def test_what_is_no_time_is_refused_with_its_value(value, match):
    with pytest.raises(InvalidRequestError, match=match):
        whole_seconds(value)


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.binary(), st.none(), st.lists(st.integers())))
def test_nothing_but_an_invalid_request_comes_of_any_value(value):
    try:
        taken = whole_seconds(value)
    except InvalidRequestError as error:
        message = str(error)
        assert "\n" not in message
    else:
        assert 0 <= taken <= MAX_TIME


def test_a_day_ahead_is_taken_and_more_is_not():
    check_ahead(NOW + MAX_AHEAD_S, NOW)
    with pytest.raises(InvalidRequestError, match=rf"request_time={NOW + 864_000} is 10\.0 days ahead of this shard"):
        check_ahead(NOW + 864_000, NOW)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([NOW, NOW, NOW * 1000], r"req_time\[2\]=.* looks like milliseconds"),
        ([NOW, -1], r"req_time\[1\]=-1 is negative"),
        ([NOW, NOW + 365 * 86_400, 3], r"req_time\[1\]=.* is 365\.0 days ahead of this machine's clock"),
        ([1.0, 2.5], r"req_time\[1\]=.*2\.5.* is no whole number"),
        ([float(NOW), float(NOW + 9 * 86_400)], r"req_time\[1\]=.* days ahead"),
        (["a"], r"req_time\[0\]"),
    ],
)
def test_the_latest_of_a_batch_names_the_record_that_is_wrong(values, match):
    with pytest.raises(InvalidRequestError, match=match):
        latest(values, NOW, "req_time")


def test_the_latest_of_a_batch():
    assert latest([5, NOW, 7], NOW, "req_time") == NOW
    assert latest(np.array([5.0, 3.0]), NOW, "req_time") == 5
    assert latest([], NOW, "req_time") is None

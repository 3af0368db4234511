"""A write that is refused has changed nothing, on every shape of cluster, whichever way its values came."""

from __future__ import annotations

import time

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.shard import IdPart, UpdatePart, Write
from trilith.tables import Sgd

YEAR = 365 * 86_400
ONES = np.ones((6, 2), np.float32)
IDS = np.arange(6, dtype=np.uint64)


def rows_of(table):
    return table.size(), table.lookup(np.arange(12)).tolist()


@pytest.fixture
def kept(client, name):
    """A table with a lifetime, whose rows were written now."""
    table = client.table(name, dim=2, optimizer=Sgd(learning_rate=1.0), ttl_days=30)
    table.assign(IDS, ONES)
    return table


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda now: now * 1000, "milliseconds; Unix seconds are needed, here"),
        (lambda now: now * 1_000_000, "microseconds"),
        (lambda now: now * 1_000_000_000, "nanoseconds"),
        (lambda now: now + YEAR, "days ahead of this shard's clock"),
        (lambda now: now + 2 * 86_400, "2.0 days ahead of this shard's clock"),
        (lambda now: 2**32, "2106"),
        (lambda now: 2**63, "request_time="),
        (lambda now: 2**70, "request_time="),
        (lambda now: -1, "negative"),
        (lambda now: 1.5, "no whole number"),
        (lambda now: "now", "no whole number"),
        (lambda now: np.float64("nan"), "no whole number"),
        (lambda now: True, "no time"),
    ],
)
def test_a_time_that_cannot_be_right_is_refused_and_harms_no_row(client, kept, given, match):
    when = given(int(time.time()))
    before = rows_of(kept)
    for call in (
        lambda: kept.apply_gradients([5, 9], ONES[:2], request_time=when),
        lambda: kept.assign([5, 9], ONES[:2], request_time=when),
        lambda: kept.assign_add([5, 9], ONES[:2], request_time=when),
        lambda: client.reinitialize(kept.name, [5, 9], request_time=when),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            call()
    with pytest.raises(InvalidRequestError, match=match.replace("request_time", "now")):
        kept.evict(now=when)
    assert kept.evict() == 0
    assert rows_of(kept) == before


def test_a_shard_refuses_by_itself_what_a_client_let_through(client, kept):
    """Other clients may check nothing."""
    before = rows_of(kept)
    shard = client._cluster.shards[0]
    owned = IDS[IDS % client.shards == 0]
    ones = ONES[: owned.size]
    now = int(time.time())
    for when in (now * 1000, now + YEAR, -1, 2**63 - 1):
        for verb in ("apply_gradients", "assign", "assign_add"):
            with pytest.raises(InvalidRequestError, match="request_time="):
                getattr(shard, verb)([UpdatePart(kept.name, owned, ones)], Write(request_time=when))
        with pytest.raises(InvalidRequestError, match="request_time="):
            shard.reinitialize(IdPart(kept.name, owned), Write(request_time=when))
        with pytest.raises(InvalidRequestError, match="now="):
            shard.evict([kept.name], Write(), now=when)
    assert kept.evict() == 0
    assert rows_of(kept) == before


def test_rows_expire_by_the_clock_of_their_shard_whatever_others_wrote(local, shape):
    day = 86_400
    clock = [20_000 * day]
    cluster = local(shape, clock=lambda: clock[0])
    with cluster.connect() as client:
        table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), ttl_days=30)
        table.assign(IDS[:3], ONES[:3])  # dated by the shard
        clock[0] += 10 * day
        table.assign(IDS[3:], ONES[3:], request_time=clock[0] + day)  # as far ahead as may be
        assert table.evict() == 0
        clock[0] += 20 * day
        assert table.evict() == 3, "30 days old, the others 20"
        clock[0] += 11 * day
        assert table.evict() == 3

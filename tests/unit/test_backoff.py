"""Pauses between attempts."""

from __future__ import annotations

from trilith.runtime.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_are_out_of_step():
    backoff = Backoff(1.0, 5.0)
    pauses = [backoff.next_s() for _ in range(5)]
    assert all(full / 2 <= pause <= full for pause, full in zip(pauses, (1, 2, 4, 5, 5), strict=True))
    backoff.reset()
    assert backoff.next_s() <= 1.0
    assert len({Backoff(1.0, 5.0).next_s() for _ in range(16)}) > 1

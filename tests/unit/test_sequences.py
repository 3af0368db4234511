"""Sequences: each write once, against a model that remembers everything; and what is kept stays bounded."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilith.errors import InDoubtError, InternalError, InvalidRequestError, MemoryLimitError, OverloadedError
from trilith.rpc.identity import OPEN_WRITES, Identity
from trilith.shard import Write
from trilith_services.ps.engine.sequences import Sequences

NOW = 1_800_000_000


class Clock:
    def __init__(self):
        self.now = float(NOW)

    def __call__(self):
        return self.now


def named(sequence, lowest=1, client=7, started=NOW, origin=0):
    return Write(
        client_id=client, sequence=sequence, lowest_open=lowest, client_started=int(1e6 * started), origin=origin
    )


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sequences(clock):
    return Sequences(clock=clock)


# ---- against a model -------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 5)),
        st.tuples(st.just("send"), st.integers(0, 5), st.integers(0, 9), st.sampled_from(["ok", "refused", "broken"])),
        st.tuples(st.just("end"), st.integers(0, 5), st.integers(0, 9)),
        st.tuples(st.just("pass"), st.integers(0, 4000)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, clients=st.integers(1, 6), window=st.integers(1, 8), skew=st.integers(-10_000, 10_000))
def test_a_write_is_done_once_and_never_refused_as_done_when_it_was_not(steps, clients, window, skew):
    """Clients come and go, repeat late, and are forgotten; the clock jumps. Every effect is counted."""
    clock = Clock()
    sequences = Sequences(clock=clock, window=window, max_clients=clients, answer_bytes=700)
    started, numbers, open_writes, done = {}, {}, {}, {}
    for step in steps:
        if step[0] == "pass":
            clock.now += step[1] - (skew if step[1] == 3000 else 0)
            continue
        client = step[1]
        held = open_writes.setdefault(client, [])
        if step[0] == "begin":
            started.setdefault(client, clock.now)
            numbers[client] = numbers.get(client, 0) + 1
            held.append((numbers[client], min([number for number, _ in held], default=numbers[client])))
            continue
        if not held:
            continue
        number, lowest = held[step[2] % len(held)]
        if step[0] == "end":
            held.remove((number, lowest))
            continue
        key = client, number
        before = done.get(key, 0)
        write = named(number, lowest, client=client + 1, started=started[client])
        ran = []

        def work(key=key, ran=ran, how=step[3]):
            ran.append(key)
            done[key] = done.get(key, 0) + 1
            if how == "broken":
                raise RuntimeError("half way")
            return key

        def check(how=step[3]):
            if how == "refused":
                raise MemoryLimitError("full")

        outcome, repeated = None, False
        try:
            outcome, repeated = sequences.once(write, work, check=check)
        except (MemoryLimitError, RuntimeError, InternalError, OverloadedError, InDoubtError) as raised:
            outcome = raised
        said_done = repeated or isinstance(outcome, InternalError) or "was done before, and not again" in str(outcome)
        assert said_done <= before, "only one that was done is called done"
        assert len(ran) <= 1 - before, "and is not done again"
        if isinstance(outcome, tuple):
            assert outcome == key
            assert len(ran) + repeated == 1
        elif isinstance(outcome, OverloadedError):
            assert number - lowest >= window
        assert done.get(key, 0) <= 1
        assert len(sequences._clients) <= clients


# ---- what clients do -------------------------------------------------------------------------------------------------


def test_a_write_that_retries_for_long_is_done_although_thousands_of_younger_ones_pass(sequences):
    identity = Identity(0, NOW)
    waiting = identity.write()
    for _ in range(5000):
        write = identity.write()
        assert sequences.once(write, lambda: 1) == (1, False)
        assert sequences.once(write, lambda: 2) == (1, True)
        write.ticket.close()
    assert sequences.once(waiting, lambda: "done") == ("done", False)
    assert sequences.once(waiting, lambda: "again") == ("done", True)


def test_what_a_client_has_ended_is_kept_no_longer(sequences):
    identity = Identity(0, NOW)
    first = identity.write()
    sequences.once(first, lambda: np.zeros(1_000_000, np.int8))
    assert sequences.memory_bytes > 1_000_000
    first.ticket.close()
    sequences.once(identity.write(), lambda: None)
    assert sequences.memory_bytes < 2_000
    with pytest.raises(InDoubtError, match="not done now"):
        sequences.once(first, lambda: pytest.fail("done twice"))


def test_an_identity_knows_its_lowest_open_write():
    identity = Identity(3, NOW)
    writes = [identity.write() for _ in range(4)]
    assert [write.lowest_open for write in writes] == [1, 1, 1, 1]
    assert {write.origin for write in writes} == {3}
    writes[1].ticket.close()
    assert identity.write().lowest_open == 1
    writes[0].ticket.close()
    assert identity.write().lowest_open == 3
    del writes  # also what was named and never sent
    assert identity.write().lowest_open == 7


def test_a_write_that_nobody_ends_holds_up_no_others(sequences):
    identity = Identity(0, NOW)
    kept = identity.write()
    for _ in range(OPEN_WRITES + 10):
        last = identity.write()
        last.ticket.close()
    assert last.sequence - last.lowest_open < OPEN_WRITES
    assert kept.sequence < last.lowest_open
    assert sequences.once(last, lambda: 5) == (5, False)


def test_a_client_that_took_another_id_has_sequences_of_its_own(sequences):
    identity = Identity(0, NOW)
    old = identity.write()
    identity.renew(NOW + 5)
    new = identity.write()
    assert new.client_id != old.client_id
    assert 0 <= 1e-6 * new.client_started - (NOW + 5) < 60
    assert sequences.once(old, lambda: 1) == (1, False)
    assert sequences.once(new, lambda: 2) == (2, False)


def test_an_unknown_client_of_more_than_an_hour_ago_is_in_doubt(sequences, clock):
    assert sequences.once(named(1), lambda: 1) == (1, False)
    clock.now += 3601
    assert sequences.once(named(1), lambda: 2) == (1, True), "known ones are known for as long as there is room"
    with pytest.raises(InDoubtError, match="may have been forgotten"):
        sequences.once(named(1, client=8), lambda: 1)
    assert sequences.once(named(1, client=9, started=NOW + 3600), lambda: 1) == (1, False)


def test_a_forgotten_client_never_writes_twice_whatever_the_clock_says(clock):
    sequences = Sequences(clock=clock, max_clients=10)
    done = []
    for client in range(1, 31):
        clock.now += 1
        write = named(1, client=client, started=clock.now)
        sequences.once(write, lambda client=client: done.append(client))
    for jump in (0, -1000, 5000, -5000):
        clock.now += jump
        for client in range(1, 31):
            write = named(1, client=client, started=NOW + client)
            try:
                assert sequences.once(write, lambda: pytest.fail("done twice"))[1]
            except InDoubtError:
                assert client <= 20
    assert done == list(range(1, 31))


def test_more_clients_than_are_remembered_leave_none_that_writes_twice(clock):
    sequences = Sequences(clock=clock, max_clients=100)
    counts = dict.fromkeys(range(1, 5001), 0)

    def work(client):
        counts[client] += 1

    for client in counts:
        clock.now += 0.01
        for _ in range(2):
            sequences.once(named(1, client=client, started=NOW + client / 100), lambda client=client: work(client))
    for client in counts:
        with contextlib.suppress(InDoubtError):
            sequences.once(named(1, client=client, started=NOW + client / 100), lambda client=client: work(client))
    assert set(counts.values()) == {1}
    assert sequences.memory_bytes < 100_000


def test_clients_that_do_not_date_themselves_are_trusted_until_one_was_forgotten(clock):
    sequences = Sequences(clock=clock, max_clients=2)
    for client in (1, 2, 3):
        assert sequences.once(named(1, client=client, started=0), lambda: 1) == (1, False)
    with pytest.raises(InDoubtError, match="forgotten"):
        sequences.once(named(1, client=1, started=0), lambda: pytest.fail("done twice"))


def test_more_clients_at_work_than_can_be_remembered_are_too_many(clock):
    sequences = Sequences(clock=clock, max_clients=1)
    inside, leave = threading.Event(), threading.Event()

    def wait():
        inside.set()
        leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sequences.once, named(1, client=1), wait)
        inside.wait(30)
        with pytest.raises(OverloadedError):
            sequences.once(named(1, client=2), lambda: 1)
        leave.set()
        first.result()
    assert sequences.once(named(1, client=2, started=NOW + 1), lambda: 1) == (1, False)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_bounded_and_a_write_without_its_answer_is_not_done_again(clock):
    sequences = Sequences(clock=clock, answer_bytes=10_000)
    for number in range(1, 21):
        sequences.once(named(number), lambda: np.zeros(1000, np.int8))
    assert sequences.memory_bytes < 12_000
    with pytest.raises(InDoubtError, match="write 1 .* was done before, and not again now; its answer was too large"):
        sequences.once(named(1), lambda: pytest.fail("done twice"))
    assert sequences.once(named(20), lambda: None)[0].size == 1000


def test_an_answer_too_large_to_keep_at_all(clock):
    sequences = Sequences(clock=clock, answer_bytes=10_000)
    assert sequences.once(named(1), lambda: np.zeros(100_000, np.int8))[0].size == 100_000
    assert sequences.memory_bytes < 2_000
    with pytest.raises(InDoubtError, match="was done before"):
        sequences.once(named(1), lambda: pytest.fail("done twice"))


def test_everything_together_is_bounded(clock):
    sequences = Sequences(clock=clock, max_bytes=1 << 20)
    for client in range(1, 200):
        sequences.once(named(1, client=client, started=NOW + client), lambda: np.zeros(50_000, np.int8))
        assert sequences.memory_bytes <= 1 << 20


def test_a_client_may_be_ahead_of_its_lowest_open_write_by_the_window(clock):
    sequences = Sequences(clock=clock, window=10)
    assert sequences.once(named(10), lambda: 1) == (1, False)
    with pytest.raises(OverloadedError, match="write 1 is still open"):
        sequences.once(named(11), lambda: 1)
    assert sequences.once(named(11, lowest=2), lambda: 1) == (1, False)
    with pytest.raises(OverloadedError):
        sequences.once(named(2**63, lowest=5), lambda: 1)  # takes no memory


def test_a_lowest_open_write_above_the_write_itself_is_refused(sequences):
    with pytest.raises(InvalidRequestError, match="write 3 is below the lowest open one, 4"):
        sequences.once(named(3, lowest=4), lambda: 1)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_what_a_check_refuses_may_be_repeated(sequences):
    def full():
        raise MemoryLimitError("full")

    for _ in range(2):
        with pytest.raises(MemoryLimitError):
            sequences.once(named(1), lambda: pytest.fail("done"), check=full)
    assert sequences.once(named(1), lambda: 1, check=lambda: None) == (1, False)


@pytest.mark.parametrize(
    ("error", "expected"), [(MemoryLimitError("stripe full"), MemoryLimitError), (OSError("no memory"), InternalError)]
)
def test_what_fails_after_it_began_is_not_done_again(sequences, error, expected):
    def work():
        raise error

    with pytest.raises(type(error)):
        sequences.once(named(1), work, check=lambda: None)
    with pytest.raises(expected, match="not done again"):
        sequences.once(named(1), lambda: pytest.fail("done again"), check=lambda: None)


def test_work_without_a_check_that_fails_was_not_done(sequences):
    def work():
        raise InvalidRequestError("no such queue")

    with pytest.raises(InvalidRequestError):
        sequences.once(named(1), work)
    assert sequences.once(named(1), lambda: 1) == (1, False)


def test_a_repetition_waits_for_the_first(sequences):
    inside, leave = threading.Event(), threading.Event()

    def slow():
        inside.set()
        leave.wait(30)
        return 1

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sequences.once, named(1), slow)
        inside.wait(30)
        second = pool.submit(sequences.once, named(1), lambda: 2)
        assert not second.done()
        leave.set()
        assert [first.result(30), second.result(30)] == [(1, False), (1, True)]


def test_after_a_clear_everything_is_new_but_what_cleared_it(sequences):
    sequences.once(named(1), lambda: 1)

    def restore():
        sequences.clear()
        return "restored"

    assert sequences.once(named(2), restore) == ("restored", False)
    assert sequences.once(named(2), lambda: pytest.fail("done twice")) == ("restored", True)
    assert sequences.once(named(1, client=8), lambda: 3) == (3, False)

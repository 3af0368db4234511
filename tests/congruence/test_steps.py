"""Steps counted with the gradients that make them: once each, whatever becomes of the call."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import trilith
from tests.congruence.clusters import SHAPES
from tests.congruence.faults import Failing, LosingProxy
from trilith.errors import InvalidRequestError, NonFiniteError, UnavailableError
from trilith.shard import UpdatePart, Write
from trilith.steps import MAX_STEP
from trilith.tables import PolynomialDecay, Sgd, Zeros

IDS = np.arange(9)
ONES = np.ones((9, 4), np.float32)
RISING = PolynomialDecay(0.0, 100, end_learning_rate=1.0)
"""A rate of a hundredth of the step."""
ALL_SHAPES = pytest.mark.parametrize("shape", list(SHAPES), scope="session")


def sgd(client, name="user", rate=1.0):
    return client.table(name, dim=4, optimizer=Sgd(learning_rate=1.0), initializer=Zeros(), learning_rate=rate)


@ALL_SHAPES
def test_gradients_are_applied_at_the_step_before_and_schedules_follow(local, shape):
    with local(shape).connect() as client:
        table = sgd(client, rate=RISING)
        for step in range(5):
            assert client.known_step == step
            table.apply_gradients(IDS, ONES, advance=1)
        assert client.known_step == client.global_step() == 5
        np.testing.assert_allclose(table.lookup(IDS), -(0 + 1 + 2 + 3 + 4) / 100 * ONES, rtol=1e-6)
        assert client.global_step(advance=2) == 7


def test_ps_0_counts_whether_or_not_the_gradients_are_its_own(local):
    with local("3-ps").connect() as client:
        table = sgd(client)
        table.apply_gradients([1, 2], ONES[:2], advance=1)  # of shards 1 and 2
        client.apply_gradients({}, advance=2)
        client.create_variables({"w": np.zeros(3, np.float32)}, optimizer=Sgd(learning_rate=1.0))
        client.apply_dense_gradients({"w": np.ones(3, np.float32)}, advance=1)
        client.apply_dense_gradients({}, advance=1)
        assert client.known_step == client.global_step() == 5
        assert client.describe()[0].global_step == 5
        np.testing.assert_array_equal(table.lookup([1, 2]), -ONES[:2])


def test_other_clients_count_on_and_are_heard_with_the_next_answer(local):
    cluster = local("3-ps")
    with cluster.connect() as one, cluster.connect() as two:
        table = sgd(one)
        sgd(two).apply_gradients(IDS, ONES, advance=3)
        table.apply_gradients(IDS, ONES, advance=1)
        assert (one.known_step, two.known_step) == (4, 3)
        two.hear_step(4)
        two.hear_step(2)  # older news change nothing
        assert two.known_step == 4


@ALL_SHAPES
def test_a_step_whose_answer_was_lost_is_counted_once(local, shape):
    made = []

    def wrap(store):
        made.append(Failing(store))
        return made[-1]

    with local(shape, wrap=wrap).connect() as client:
        table = sgd(client)
        client.create_variables({"w": np.zeros(3, np.float32)}, optimizer=Sgd(learning_rate=1.0))
        calls = [
            partial(table.apply_gradients, IDS, ONES, advance=1),
            partial(client.apply_dense_gradients, {"w": np.ones(3, np.float32)}, advance=1),
        ]
        for done, call in enumerate(calls, 1):
            made[0].errors = [UnavailableError("lost")]
            try:
                call()  # over a network it is sent again by itself
            except UnavailableError as error:
                assert shape == "embedded"
                client.retry(error)
            assert client.known_step == client.global_step() == done
        np.testing.assert_array_equal(table.lookup(IDS), -ONES)


def test_a_connection_that_breaks_before_the_answer_does_not_count_twice(local):
    cluster = local("1-ps")
    proxy = LosingProxy(cluster.ports[0])
    try:
        with trilith.connect(f"static://127.0.0.1:{proxy.port}") as client:
            table = sgd(client)
            for step in range(1, 4):
                proxy.lose_next_answer()
                table.apply_gradients(IDS, ONES, advance=1)
                assert proxy.lost == client.known_step == step
            assert client.global_step() == 3
    finally:
        proxy.close()


def test_gradients_in_several_messages_count_with_the_last(local):
    with local("3-ps").connect(chunk_bytes=100) as client:
        table = sgd(client, rate=RISING)
        client.global_step(set_to=10)
        table.apply_gradients(IDS, ONES, advance=1)
        assert client.known_step == client.global_step() == 11
        np.testing.assert_allclose(table.lookup(IDS), -0.1 * ONES, rtol=1e-6)


@ALL_SHAPES
def test_what_is_refused_counts_nothing(local, shape):
    cluster = local(shape)
    with cluster.connect() as client:
        table = sgd(client)
        with pytest.raises(NonFiniteError):
            table.apply_gradients(IDS, ONES * np.nan, advance=1)
        for advance in (-1, 1.5, "1"):
            with pytest.raises(InvalidRequestError, match="advance="):
                table.apply_gradients(IDS, ONES, advance=advance)
            with pytest.raises(InvalidRequestError, match="advance="):
                client.apply_dense_gradients({}, advance=advance)
        client.global_step(set_to=MAX_STEP - 1)
        with pytest.raises(InvalidRequestError, match=r"advance=\d+ is outside"):
            table.apply_gradients(IDS, ONES, advance=2)
        part = UpdatePart(table.name, np.array([3], np.uint64), ONES[:1])
        with pytest.raises(InvalidRequestError, match=r"advance=\d+ is outside"):
            cluster.stores[0].apply_gradients([part], Write(advance=MAX_STEP + 1))
        assert client.global_step() == MAX_STEP - 1
        assert not table.contains(IDS).any()

"""Every error a caller can meet is the same class, with a message that helps, on every shape of cluster."""

from __future__ import annotations

import numpy as np
import pytest

from trilith import errors
from trilith.errors import (
    CheckpointError,
    ClosedError,
    InvalidRequestError,
    MemoryLimitError,
    NonFiniteError,
    TableExistsError,
    UnknownTableError,
    UnknownVariableError,
)
from trilith.tables import Adagrad, RandomUniform, Sgd, Zeros

ONES = np.ones((2, 4), np.float32)


def unchanged(table, call, error, match):
    """`call` raises and changes no row of `table`."""
    table.assign([1, 2], ONES)
    before = table.size(), table.lookup([1, 2, 3])
    with pytest.raises(error, match=match):
        call()
    assert table.size() == before[0]
    np.testing.assert_array_equal(table.lookup([1, 2, 3]), before[1])


# ---- the call itself is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[1, 2]], "one-dimensional"),
        (7, "one-dimensional"),
        ([1.5, 2.0], "float64, they must be integers"),
        (["a", "b"], "must be integers"),
        ([True, False], "bool, they must be integers"),
        ([1, 2**64], "must be integers|not an array"),
        ([[1], [2, 3]], "not an array"),
        (None, "one-dimensional"),
        (np.empty(0, np.float32), "must be integers"),
    ],
)
def test_ids_of_the_wrong_kind_are_refused(client, table, ids, match):
    for call in (
        lambda: table.lookup(ids),
        lambda: table.apply_gradients(ids, ONES),
        lambda: table.assign(ids, ONES),
        lambda: table.contains(ids),
        lambda: table.reinitialize(ids),
        lambda: table.erase(ids),
        lambda: table.lookup_entries(ids),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            call()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.ones((2, 3), np.float32), r"have shape \(2, 3\), 2 ids of dim 4 need \(2, 4\)"),
        (np.ones((3, 4), np.float32), r"have shape \(3, 4\)"),
        (np.ones(8, np.float32), r"have shape \(8,\)"),
        (np.ones((2, 4), np.int64), "int64, they must be floating-point"),
        (np.ones((2, 4), np.complex64), "complex64, they must be floating-point"),
        ([["a"] * 4] * 2, "must be floating-point"),
        ([[1.0] * 4, [1.0] * 3], "not an array"),
        ([], r"have shape \(0,\)"),
    ],
)
@pytest.mark.parametrize("verb", ["apply_gradients", "assign", "assign_add"])
def test_rows_of_the_wrong_kind_are_refused_and_nothing_changes(table, verb, rows, match):
    unchanged(table, lambda: getattr(table, verb)([1, 2], rows), InvalidRequestError, match)


@pytest.mark.parametrize("verb", ["apply_gradients", "assign", "assign_add"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ids", [[1, 2], [1, 1]])
def test_what_is_not_finite_is_refused_by_place_and_nothing_changes(table, verb, bad, ids):
    rows = ONES.copy()
    rows[1, 2] = bad
    unchanged(table, lambda: getattr(table, verb)(ids, rows), NonFiniteError, rf"\[1, 2\] is {bad}")


def test_a_sum_that_is_not_finite_is_refused(table):
    huge = np.full((2, 4), 3e38, np.float32)
    unchanged(table, lambda: table.apply_gradients([1, 1], huge), NonFiniteError, "sum of gradients")


def test_one_bad_table_keeps_all_tables_of_a_call_unchanged(client, table, name):
    other = client.table(f"{name}_b", dim=4, optimizer=Sgd(), initializer=Zeros())
    bad = ONES * np.float32(np.nan)
    unchanged(
        table,
        lambda: client.apply_gradients({table.name: ([1, 2], ONES), other.name: ([1, 2], bad)}),
        NonFiniteError,
        other.name,
    )
    assert other.size() == 0


@pytest.mark.parametrize("verb", ["apply_gradients", "assign", "assign_add"])
def test_what_is_not_finite_is_accepted_on_request(client, name, verb):
    table = client.table(name, dim=4, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
    getattr(table, verb)([1, 2], ONES * np.float32(np.inf), allow_non_finite=True)
    assert np.isinf(table.lookup([1, 2])).all()


@pytest.mark.parametrize("timeout_s", [0, -1.0])
def test_a_timeout_must_be_above_zero(client, table, timeout_s):
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        client.lookup({table.name: [1]}, timeout_s=timeout_s)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_an_unknown_table_is_a_key_error_that_says_what_there_is(client, table):
    for call in (
        lambda: client.table("nowhere"),
        lambda: client.lookup({"nowhere": [1]}),
        lambda: client.apply_gradients({"nowhere": ([1], ONES[:1])}),
        lambda: client.assign({"nowhere": ([1], ONES[:1])}),
        lambda: client.contains("nowhere", [1]),
        lambda: client.reinitialize("nowhere", [1]),
        lambda: client.lookup_entries("nowhere", [1]),
        lambda: client.erase("nowhere", [1]),
        lambda: client.evict(["nowhere"]),
        lambda: client.clear(["nowhere"]),
        lambda: list(client.dump_entries("nowhere")),
    ):
        with pytest.raises(UnknownTableError, match=table.name) as caught:
            call()
        assert isinstance(caught.value, KeyError)


def test_a_name_where_names_are_due_is_refused(client, table):
    with pytest.raises(InvalidRequestError, match="sequence of names"):
        client.clear(table.name)


@pytest.mark.parametrize(
    "other",
    [
        {"dim": 5},
        {"optimizer": Adagrad(learning_rate=0.06)},
        {"initializer": RandomUniform(-0.5, 0.6)},
        {"seed": 8},
        {"ttl_days": 3},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_table_with_another_config_is_refused_with_both_shown(client, table, other):
    config = {
        "dim": 4,
        "optimizer": Adagrad(learning_rate=0.05),
        "initializer": RandomUniform(-0.5, 0.5),
        "seed": 7,
    }
    unchanged(table, lambda: client.table(table.name, **config | other), TableExistsError, table.name)
    with pytest.raises(TableExistsError) as caught:
        client.table(table.name, **config | {"dim": 11})
    assert "exists with another config: hash_table.entry_config.segments[0].dim_size is 4 here, 11 asked\n" in str(
        caught.value
    )
    assert "dim_size: 4" in str(caught.value)
    assert "dim_size: 11" in str(caught.value)
    with pytest.raises(TableExistsError, match=r"learning_rate[^ ]* is 0\.05 here, 0\.05000001 asked"):
        client.table(table.name, **config | {"optimizer": Adagrad(learning_rate=0.05000001)})


def test_unknown_variables_are_a_key_error(client):
    for call in (
        lambda: client.pull_variables(["nowhere"]),
        lambda: client.apply_dense_gradients({"nowhere": np.ones(3, np.float32)}),
        lambda: client.assign_variables({"nowhere": np.ones(3, np.float32)}),
    ):
        with pytest.raises(UnknownVariableError, match="nowhere"):
            call()


# ---- the cluster -----------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_said_to_be_missing(client, tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        client.restore(str(tmp_path / "nothing-here"))


def test_a_closed_client_refuses_everything(local, shape, name):
    cluster = local(shape)
    client = cluster.connect()
    table = client.table(name, dim=4, optimizer=Sgd(), initializer=Zeros())
    client.close()
    client.close()
    for call in (
        lambda: table.lookup([1]),
        lambda: table.apply_gradients([1], ONES[:1]),
        client.stats,
        lambda: client.table("other", dim=4, optimizer=Sgd(), initializer=Zeros()),
        client.global_step,
    ):
        with pytest.raises(ClosedError):
            call()


def test_new_rows_beyond_the_memory_limit_are_refused_and_old_ones_served(local, shape, name):
    cluster = local(shape, memory_limit_bytes=4 << 20)
    with cluster.connect() as client:
        table = client.table(name, dim=64, optimizer=Adagrad(learning_rate=0.1), initializer=Zeros())
        rows = np.ones((512, 64), np.float32)

        def fill():
            for start in range(0, 1 << 17, 512):
                table.assign(np.arange(start, start + 512), rows)

        with pytest.raises(MemoryLimitError, match=name):
            fill()
        assert table.size() > 1000
        np.testing.assert_array_equal(table.lookup(np.arange(100)), rows[:100])
        table.assign(np.arange(100), 2 * rows[:100])
        np.testing.assert_array_equal(table.lookup(np.arange(100)), 2 * rows[:100])
        with pytest.raises(MemoryLimitError):
            table.assign(np.arange(1 << 30, (1 << 30) + 512), rows)


def test_an_error_keeps_its_class_and_its_text_over_the_wire(local, shape, name):
    """Whatever the engine raises, embedded and remote callers see the same."""

    class Raising:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, attribute):
            return getattr(self._store, attribute)

        def stats(self, *, timeout_s=None):
            raise self.error

    made = []

    def wrap(store):
        made.append(Raising(store))
        return made[-1]

    with local(shape, wrap=wrap).connect(timeout_s=0.2) as client:
        for cls in errors.BY_NAME.values():
            for shard in made:
                shard.error = cls(f"because of {cls.__name__}: ünïcode,\na second line")
            with pytest.raises(cls) as caught:
                client.stats()
            assert type(caught.value) is cls
            assert str(caught.value) == str(made[0].error)


def test_a_fault_of_the_engine_is_an_internal_error(local, name):
    class Broken:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, attribute):
            return getattr(self._store, attribute)

        def stats(self, *, timeout_s=None):
            raise ZeroDivisionError("by zero")

    with local("1-ps", wrap=Broken).connect() as client, pytest.raises(errors.InternalError, match="ZeroDivisionError"):
        client.stats()

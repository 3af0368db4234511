"""Every error a caller can meet is the same class, with a message that helps, on every shape of cluster."""

from __future__ import annotations

import copy
import queue

import numpy as np
import pytest
import torch

from tests.congruence.faults import Meddled
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


def test_errors_are_those_of_python_too():
    kin = {
        InvalidRequestError: ValueError,
        UnknownTableError: KeyError,
        MemoryLimitError: MemoryError,
        errors.DeadlineExceededError: TimeoutError,
        errors.UnavailableError: ConnectionError,
        errors.QueueFullError: queue.Full,
        errors.InternalError: RuntimeError,
    }
    for ours, pythons in kin.items():
        assert issubclass(ours, pythons)
    for name, each in errors.BY_NAME.items():  # as they come over the wire
        told = each("what was wrong")
        again = copy.deepcopy(told)
        assert (type(again).__name__, str(again), repr(again)) == (name, "what was wrong", repr(told))


@pytest.mark.parametrize("shape", ["1-ps", "3-ps"])
def test_nobody_at_an_address_is_a_connection_error_and_no_answer_a_timeout(local, shape, name):
    with local(shape) as cluster, cluster.connect(timeout_s=1.0) as client:
        table = client.table(name, dim=4)
        cluster.kill(0)
        with pytest.raises(ConnectionError, match="refused"):
            table.lookup([0, 1, 2])


@pytest.mark.parametrize(
    "ids",
    [
        [5, 2**63 + 9],
        (5, 2**63 + 9),
        [np.uint64(5), np.int64(-(2**63) + 9)],
        np.array([5, 2**63 + 9], object),
        np.array([5, 2**63 + 9], ">u8"),
        np.array([5, 0, -(2**63) + 9], np.int64)[::2],
        torch.tensor([5, -(2**63) + 9]),
    ],
    ids=str,
)
def test_ids_are_integers_of_any_kind_and_keep_all_bits(client, table, ids):
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    table.assign(ids, rows)
    exact = np.array([5, 2**63 + 9], np.uint64)
    np.testing.assert_array_equal(table.lookup(exact), rows)
    np.testing.assert_array_equal(table.lookup(ids), rows)
    assert table.contains(ids).all()
    assert table.lookup_entries(ids) == table.lookup_entries(exact)
    assert list(table.reinitialize(ids)) == [1, 1]
    assert table.erase(ids) == 2


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_width_are_the_same_ids(table, dtype):
    table.assign(range(100, 103), ONES[[0, 0, 0]])
    for ids in (np.arange(100, 103, dtype=dtype), torch.from_numpy(np.arange(100, 103, dtype=dtype))):
        assert table.contains(ids).all()


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([[1, 2]], "one-dimensional"),
        (7, "one-dimensional"),
        ([1.5, 2.0], "float64, they must be integers"),
        (["a", "b"], "must be integers"),
        ([True, False], "bool, they must be integers"),
        ([1, 2**64], r"ids\[1\] is 18446744073709551616, ids must be integers of 64 bits"),
        ([-(2**63) - 1, 2**63], r"ids\[0\] is -9223372036854775809"),
        ([2**63, -1, True], "such as True|float64"),
        ([2**63, 1.0], "float64, they must be integers"),
        (np.array([1.0, 2.0]), "float64, they must be integers; integers that became floats"),
        (np.array([1, None]), "such as None"),
        ([[1], [2, 3]], "not an array"),
        (None, "None .NoneType., they must be integers"),
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
    assert str(caught.value) == (
        f"table {table.name!r} exists with another config: hash_table.entry_config.segments[0].dim_size is 4 here, 11"
        " asked. Rows of another shape, optimizer or compressor need a table of another name."
        f" table({table.name!r}) without a config opens the table as it is"
    )
    with pytest.raises(TableExistsError, match=r"learning_rate[^ ]* is 0\.05 here, 0\.05000001 asked"):
        client.table(table.name, **config | {"optimizer": Adagrad(learning_rate=0.05000001)})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"optimizer": Adagrad(learning_rate=0.01)}, r"table\(…, learning_rate=…\)"),
        ({"ttl_days": 30}, "lifetimes, filters and thresholds stay"),
        ({"occurrence_threshold": 2}, "lifetimes, filters and thresholds stay"),
        ({"initializer": Zeros()}, "initial values are of new rows only"),
        ({"optimizer": Sgd()}, "need a table of another name"),
    ],
    ids=lambda other: next(iter(other)) if isinstance(other, dict) else "",
)
def test_a_table_with_another_config_says_what_works_instead(client, name, other, says):
    config = {"dim": 4, "optimizer": Adagrad(learning_rate=0.05), "initializer": RandomUniform(-0.5, 0.5)}
    client.table(name, **config)
    with pytest.raises(TableExistsError, match=f"(?i){says}") as caught:
        client.table(name, **config | other)
    assert len(str(caught.value)) < 800


def test_hints_and_rates_beside_the_optimizer_do_not_make_another_table(client, name):
    config = {"dim": 4, "optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()}
    client.table(name, **config).assign([1, 2], ONES)
    for other in ({"initial_capacity": 1000}, {"learning_rate": 0.5}):
        np.testing.assert_array_equal(client.table(name, **config | other).lookup([1, 2]), ONES)
    client.table(name).apply_gradients([1, 2], ONES)  # the rate given last
    np.testing.assert_array_equal(client.table(name).lookup([1, 2]), ONES / 2)


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

    class Raising(Meddled):
        def stats(self):
            raise self.error

    made = []

    def wrap(store):
        made.append(Raising(store))
        return made[-1]

    # A pause that is longer than the deadline: errors that are tried again elsewhere are raised at once here.
    with local(shape, wrap=wrap).connect(timeout_s=30, retry_first_s=100, retry_max_s=100) as client:
        for cls in errors.BY_NAME.values():
            for shard in made:
                shard.error = cls(f"because of {cls.__name__}: ünïcode,\na second line")
            with pytest.raises(cls) as caught:
                client.stats()
            assert type(caught.value) is cls
            assert str(caught.value) == str(made[0].error)


def test_a_fault_of_the_engine_is_an_internal_error(local, name):
    class Broken(Meddled):
        def stats(self):
            raise ZeroDivisionError("by zero")

    with local("1-ps", wrap=Broken).connect() as client, pytest.raises(errors.InternalError, match="ZeroDivisionError"):
        client.stats()

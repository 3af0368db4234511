"""Rows of embedding tables through the public client, on every shape of cluster."""

from __future__ import annotations

import numpy as np
import pytest

import trilith
from trilith.errors import InvalidRequestError
from trilith.tables import Adagrad, Constants, FixedR8, PolynomialDecay, RandomUniform, Segment, Sgd, Zeros
from trilith_proto import hash_table_pb2


def u64(*ids):
    return np.array(ids, np.uint64)


def floats(rows, dim=4, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def sgd(client, name, dim=4, **options):
    options = {"optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()} | options
    return client.table(name, dim=dim, **options)


# ---- lookup ----------------------------------------------------------------------------------------------------------


def test_an_id_without_a_row_reads_zeros_and_is_not_inserted(table):
    rows = table.lookup([1, 2, 3])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.zeros((3, 4), np.float32))
    assert not table.contains([1, 2, 3]).any()
    assert table.size() == 0


def test_rows_come_in_the_order_of_the_ids_repeats_included(table):
    ids = u64(5, 0, 2**64 - 1, 5, 7, 0)
    values = floats(4)
    table.assign(u64(0, 5, 7, 2**64 - 1), values)
    np.testing.assert_array_equal(table.lookup(ids), values[[1, 0, 3, 1, 2, 0]])


def test_looked_up_rows_belong_to_the_caller(table):
    ids = u64(1, 2, 3)
    table.assign(ids, floats(3))
    rows = table.lookup(ids)
    assert rows.flags.writeable
    assert rows.flags.aligned
    rows[:] = 9
    np.testing.assert_array_equal(table.lookup(ids), floats(3))


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4, 5],
        (3, 4, 5),
        np.array([3, 4, 5], np.int32),
        np.array([3, 4, 5], np.uint8),
        np.array([3, 4, 5], np.int64),
        np.array([3, 9, 4, 9, 5, 9], np.uint64)[::2],
    ],
    ids=["list", "tuple", "int32", "uint8", "int64", "strided"],
)
def test_ids_may_be_integers_of_any_kind(table, ids):
    table.assign(u64(3, 4, 5), floats(3))
    np.testing.assert_array_equal(table.lookup(ids), floats(3))


def test_ids_may_be_a_tensor(table):
    torch = pytest.importorskip("torch")
    table.assign(torch.tensor([3, 4, 5]), torch.from_numpy(floats(3)))
    np.testing.assert_array_equal(table.lookup(torch.tensor([5, 3])), floats(3)[[2, 0]])


def test_negative_ids_are_their_unsigned_selves(table):
    table.assign([-1, -2], floats(2))
    np.testing.assert_array_equal(table.lookup(u64(2**64 - 1, 2**64 - 2)), floats(2))


def test_one_call_reads_many_tables(client, name):
    user, item = sgd(client, f"{name}_u", 3), sgd(client, f"{name}_i", 5)
    user.assign(u64(1, 2), floats(2, 3))
    item.assign(u64(7), floats(1, 5))
    rows = client.lookup({item.name: u64(7, 8), user.name: u64(2, 1), f"{name}_u": u64(2, 1)})
    np.testing.assert_array_equal(rows[user.name], floats(2, 3)[::-1])
    np.testing.assert_array_equal(rows[item.name], np.vstack([floats(1, 5), np.zeros((1, 5))]))


def test_empty_batches_do_nothing(client, table):
    assert table.lookup([]).shape == (0, 4)
    assert client.lookup({}) == {}
    assert client.lookup({table.name: u64()})[table.name].shape == (0, 4)
    for write in (table.apply_gradients, table.assign, table.assign_add):
        write([], np.empty((0, 4), np.float32))
        write([], [])
    client.apply_gradients({})
    assert table.contains([]).shape == (0,)
    assert table.reinitialize([]).shape == (0,)
    assert table.lookup_entries([]) == []
    assert table.erase([]) == 0
    assert table.size() == 0


def test_an_empty_batch_of_one_table_does_not_disturb_another(client, name):
    user, item = sgd(client, f"{name}_u"), sgd(client, f"{name}_i")
    client.assign({user.name: ([], np.empty((0, 4), np.float32)), item.name: (u64(3), floats(1))})
    rows = client.lookup({user.name: [], item.name: [3]})
    assert rows[user.name].shape == (0, 4)
    np.testing.assert_array_equal(rows[item.name], floats(1))


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_a_repeated_id_are_one_step_of_their_sum(client, name):
    table = client.table(name, dim=4, optimizer=Adagrad(learning_rate=0.1), initializer=Zeros())
    ones = np.ones((2, 4), np.float32)
    table.apply_gradients(u64(5, 5), ones)
    table.apply_gradients(u64(6), 2 * ones[:1])
    five, six = table.lookup(u64(5, 6))
    np.testing.assert_array_equal(five, six)


def test_gradients_are_added_up_in_input_order_in_float32(client, name):
    table = sgd(client, name, 1)
    grads = np.array([[1e8], [1.0], [-1e8], [1.0]], np.float32)
    table.apply_gradients(u64(3, 3, 3, 3), grads)
    assert table.lookup([3])[0, 0] == -np.float32(((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(1))


def test_a_new_row_starts_from_its_initial_value(client, name):
    fresh = client.table(name, dim=4, optimizer=Sgd(learning_rate=0.5), initializer=RandomUniform(-1, 1), seed=3)
    ids = u64(*range(50))
    fresh.reinitialize(ids)
    start = fresh.lookup(ids)
    assert len(np.unique(start)) > 150
    fresh.erase(ids)
    grads = floats(50)
    fresh.apply_gradients(ids, grads)
    np.testing.assert_allclose(fresh.lookup(ids), start - np.float32(0.5) * grads, rtol=1e-6, atol=1e-7)


def test_many_tables_step_in_one_call(client, name):
    user, item = sgd(client, f"{name}_u", 3), sgd(client, f"{name}_i", 5)
    client.apply_gradients({user.name: (u64(1, 1, 2), floats(3, 3)), item.name: (u64(9), floats(1, 5))})
    want = np.stack([floats(3, 3)[0] + floats(3, 3)[1], floats(3, 3)[2]])
    np.testing.assert_array_equal(user.lookup([1, 2]), -want)
    np.testing.assert_array_equal(item.lookup([9]), -floats(1, 5))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_gradients_of_other_float_types_are_converted(client, name, dtype):
    table = sgd(client, name)
    grads = floats(2).astype(dtype)
    table.apply_gradients([1, 2], grads)
    np.testing.assert_array_equal(table.lookup([1, 2]), -grads.astype(np.float32))


def test_schedules_are_evaluated_at_the_step_of_the_call(client, name):
    rate = PolynomialDecay(initial_learning_rate=1.0, decay_steps=10, end_learning_rate=0.0)
    table = client.table(name, dim=2, optimizer=Sgd(), initializer=Zeros(), learning_rate=rate)
    grads = np.ones((1, 2), np.float32)
    table.apply_gradients([1], grads, global_step=0)
    np.testing.assert_allclose(table.lookup([1]), [[-1, -1]], rtol=1e-6)
    table.apply_gradients([1], grads, global_step=5)
    np.testing.assert_allclose(table.lookup([1]), [[-1.5, -1.5]], rtol=1e-6)


def test_each_segment_has_its_own_optimizer_and_rate(client, name):
    segments = [
        Segment(dim=1, initializer=Zeros(), optimizer=Sgd(learning_rate=1.0)),
        Segment(dim=2, initializer=Zeros(), optimizer=Sgd(learning_rate=0.5)),
    ]
    table = client.table(name, segments=segments)
    assert table.dim == 3
    table.apply_gradients([4], np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(table.lookup([4]), [[-1, -0.5, -0.5]])


def test_occurrence_thresholds_count_repeats(client, name):
    table = sgd(client, name, filter="sliding", occurrence_threshold=3, filter_capacity=1000)
    one = np.ones((1, 4), np.float32)
    table.apply_gradients([1, 1, 2], np.repeat(one, 3, axis=0))
    table.apply_gradients([1, 1, 2], np.repeat(one, 3, axis=0))
    assert table.contains([1, 2]).tolist() == [False, False]
    table.apply_gradients([1, 2], np.repeat(one, 2, axis=0))  # four occurrences of 1 came before, two of 2
    assert table.contains([1, 2]).tolist() == [True, False]


# ---- assign and the rest ---------------------------------------------------------------------------------------------


def test_of_a_repeated_id_the_last_assigned_row_stays(table):
    values = floats(5)
    table.assign(u64(8, 9, 8, 9, 8), values)
    np.testing.assert_array_equal(table.lookup([8, 9]), values[[4, 3]])


def test_assign_add_adds_every_occurrence(client, name):
    table = sgd(client, name)
    values = floats(3)
    table.assign_add(u64(8, 9, 8), values)
    np.testing.assert_allclose(table.lookup([8, 9]), [values[0] + values[2], values[1]], rtol=1e-6)


def test_reinitialize_says_what_existed_and_gives_back_the_initial_row(table):
    assert table.reinitialize([1, 2, 1]).tolist() == [0, 0, 1]
    start = table.lookup([1, 2])
    table.assign([1], floats(1))
    assert table.reinitialize(u64(2, 1, 3)).tolist() == [1, 1, 0]
    np.testing.assert_array_equal(table.lookup([1, 2]), start)


def test_contains_answers_in_order(table):
    table.assign(u64(0, 2, 4), floats(3))
    assert table.contains(u64(4, 3, 2, 1, 0, 4)).tolist() == [True, False, True, False, True, True]


def test_erased_rows_are_gone(table):
    table.assign(u64(*range(10)), floats(10))
    assert table.erase([1, 3, 77, 3]) == 2
    assert table.size() == 8
    np.testing.assert_array_equal(table.lookup([1, 3]), np.zeros((2, 4)))


def test_cleared_tables_are_empty_and_others_are_not(client, name):
    user, item = sgd(client, f"{name}_u"), sgd(client, f"{name}_i")
    user.assign(u64(1, 2, 3), floats(3))
    item.assign(u64(1, 2), floats(2))
    assert user.clear() == 3
    assert (user.size(), item.size()) == (0, 2)
    assert client.clear([user.name, item.name]) == {user.name: 0, item.name: 2}


def test_entries_are_whole_rows(table):
    ids = u64(10, 11, 12)
    table.assign(ids, floats(3), request_time=1234)
    entries = table.lookup_entries(u64(12, 99, 10))
    assert entries[1] == b""
    for entry, row in ((entries[0], 2), (entries[2], 0)):
        dump = hash_table_pb2.EntryDump.FromString(entry)
        assert not dump.HasField("id")
        np.testing.assert_array_equal(np.array(dump.num, np.float32), floats(3)[row])
        assert dump.last_update_ts_sec == 1234
        assert len(dump.opt.dump[0].adagrad.norm) == 4


@pytest.mark.parametrize("page", [1, 7, 1000])
def test_dumped_entries_are_every_row_once(client, table, page):
    table.assign(u64(*range(40)), floats(40))
    dumps = [hash_table_pb2.EntryDump.FromString(entry) for entry in client.dump_entries(table.name, page=page)]
    assert sorted(dump.id for dump in dumps) == list(range(40))
    for dump in dumps:
        np.testing.assert_array_equal(np.array(dump.num, np.float32), floats(40)[dump.id])


def test_rows_expire_by_the_time_of_their_last_write(client, name):
    day = 86400
    table = sgd(client, name, ttl_days=1)
    table.assign(u64(*range(6)), floats(6), request_time=10 * day)
    table.assign(u64(3, 4, 5), floats(3), request_time=11 * day - 1)
    assert table.evict(now=11 * day - 1) == 0
    assert client.evict([name], now=11 * day) == {name: 3}
    assert table.contains(u64(*range(6))).tolist() == [False] * 3 + [True] * 3


def test_stats_count_rows_and_ids(client, table):
    table.assign(u64(*range(9)), floats(9))
    table.lookup(u64(*range(5, 14)))
    totals = [stats for reply in client.stats() for stats in reply.tables if stats.table == table.name]
    assert sum(stats.rows for stats in totals) == 9
    assert sum(stats.lookup_ids for stats in totals) == 9
    assert sum(stats.lookup_hits for stats in totals) == 4
    assert sum(stats.update_ids for stats in totals) == 9
    assert all(stats.bytes > 0 for stats in totals if stats.rows)


def test_describe_says_who_each_shard_is(client, table):
    answers = client.describe()
    assert [(a.shard_index, a.shard_count) for a in answers] == [(i, len(answers)) for i in range(len(answers))]
    assert all(a.owner_rule == "mod" and a.incarnation for a in answers)
    assert all(table.config in list(a.tables) for a in answers)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_creating_a_table_again_gives_the_same_table(client, name):
    sgd(client, name).assign([1], floats(1))
    np.testing.assert_array_equal(sgd(client, name).lookup([1]), floats(1))


def test_a_table_is_found_by_name_alone(client, table):
    table.assign([1], floats(1))
    again = client.table(table.name)
    assert again.dim == 4
    np.testing.assert_array_equal(again.lookup([1]), floats(1))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_ids_in_one_call(client, name):
    table = sgd(client, name, 2)
    ids = np.arange(1_000_000, dtype=np.uint64) * np.uint64(11400714819323198485)  # wraps: ids all over the range
    values = np.arange(2_000_000, dtype=np.float32).reshape(-1, 2)
    table.assign(ids, values)
    np.testing.assert_array_equal(table.lookup(ids[::-1]), values[::-1])
    table.apply_gradients(ids, values)
    assert not table.lookup(ids).any()
    assert table.size() == 1_000_000
    table.clear()


@pytest.mark.parametrize("ids", [1, 2, 7, 31, 32, 33, 1000])
def test_batches_larger_than_a_message_are_cut(local, shape, name, ids):
    cluster = local(shape)
    with cluster.connect() as whole, cluster.connect(chunk_bytes=100) as cut:
        rng = np.random.default_rng(ids)
        drawn = rng.integers(0, 2 * ids, ids).astype(np.uint64)
        options = {"optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1, 1), "seed": 5}
        entries = []
        for client, table in ((whole, f"{name}_w"), (cut, f"{name}_c")):
            handle = client.table(table, dim=4, **options)
            handle.assign_add(drawn, floats(ids), request_time=3)
            handle.apply_gradients(drawn, floats(ids, seed=1), request_time=4)
            entries.append(handle.lookup_entries(drawn))
            handle.reinitialize(drawn[: ids // 3])
            handle.erase(drawn[ids // 2 :])
        np.testing.assert_array_equal(cut.table(f"{name}_c").lookup(drawn), whole.table(f"{name}_w").lookup(drawn))
        both = (whole.table(f"{name}_w"), cut.table(f"{name}_c"))
        assert both[0].contains(drawn).tolist() == both[1].contains(drawn).tolist()
        assert entries[0] == entries[1]


# ---- float16 on the wire ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [None, 100])
def test_float16_rows_are_rounded_once_each_way(local, name, chunk_bytes):
    cluster = local("3-ps")
    with cluster.connect(float16=True, chunk_bytes=chunk_bytes) as client, cluster.connect() as exact:
        table = sgd(client, name)
        ids = u64(1, 2, 3, 1, 9)
        grads = floats(5)
        table.apply_gradients(ids, grads)
        summed = np.stack([grads[0] + grads[3], grads[1], grads[2], grads[4]]).astype(np.float16)
        np.testing.assert_array_equal(exact.table(name).lookup([1, 2, 3, 9]), -summed.astype(np.float32))
        exact.table(name).assign([1, 2], floats(2, seed=4))
        np.testing.assert_array_equal(
            table.lookup([2, 1, 2]), floats(2, seed=4)[[1, 0, 1]].astype(np.float16).astype(np.float32)
        )
        with pytest.raises(trilith.errors.NonFiniteError, match="float16"):
            table.apply_gradients([1], np.full((1, 4), 7e4, np.float32))
        with pytest.raises(trilith.errors.NonFiniteError, match="float16"):
            table.assign(u64(*range(30)), np.full((30, 4), 7e4, np.float32))
        table.apply_gradients([1], np.full((1, 4), 7e4, np.float32), allow_non_finite=True)
        assert np.isinf(exact.table(name).lookup([1])).all()


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(4, RandomUniform(-0.5, 0.25), Sgd(learning_rate=1.0))],
        [Segment(3, RandomUniform(1.0, 3.0), Sgd()), Segment(1, Zeros(), Sgd()), Segment(2, Constants(0.5), Adagrad())],
        [Segment(2, Zeros(), Sgd())],
    ],
    ids=["random", "mixed", "zeros"],
)
def test_missing_rows_may_be_looked_up_as_they_begin(client, name, segments):
    table = client.table(name, segments=segments, seed=2**64 - 5)
    ids = np.array([0, 1, 2, 7, 2**40, 2**63 + 9, 2**64 - 1, 7], np.uint64)
    table.assign(ids[:2], np.stack([np.zeros(table.dim), np.full(table.dim, 9.0)]).astype(np.float32))
    before = table.lookup(ids, missing="initial")
    np.testing.assert_array_equal(before[:2, 0], [0.0, 9.0], "rows that are there, of zeros too")
    assert table.size() == 2, "nothing was inserted"
    np.testing.assert_array_equal(table.lookup(ids)[2:], np.zeros((6, table.dim)))
    table.reinitialize(ids[2:])
    np.testing.assert_array_equal(table.lookup(ids), before)
    with pytest.raises(InvalidRequestError, match="missing='ones' is neither 'zeros' nor 'initial'"):
        table.lookup(ids, missing="ones")


def test_missing_rows_read_through_a_compressor_are_refused(client, name):
    table = client.table(name, segments=[Segment(2, RandomUniform(-1, 1), Sgd(), FixedR8())])
    with pytest.raises(InvalidRequestError, match="read through fixed_r8"):
        table.lookup([1], missing="initial")


def test_missing_rows_travel_as_other_rows_do(local, shape, name):
    with local(shape).connect(**({"float16": True} if shape != "embedded" else {})) as client:
        table = client.table(name, dim=3, optimizer=Sgd(), initializer=RandomUniform(-1, 1))
        before = table.lookup(range(9), missing="initial")
        table.reinitialize(range(9))
        np.testing.assert_array_equal(table.lookup(range(9)), before)

"""A write that is refused has changed nothing, on every shape of cluster, whichever way its values came."""

from __future__ import annotations

import itertools
import secrets
import time

import numpy as np
import pytest

from trilith.errors import (
    InDoubtError,
    InvalidRequestError,
    MemoryLimitError,
    NonFiniteError,
    ShardRestartedError,
    TrilithError,
)
from trilith.shard import DensePart, IdPart, UpdatePart, Write
from trilith.steps import MAX_STEP, MAX_STEPS_AHEAD
from trilith.tables import BatchSoftmax, Sgd, Zeros
from trilith_proto import ps_pb2

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


# ---- several tables in one request -----------------------------------------------------------------------------------


def naming(answer):
    """Make writes of one client as one that may repeat them all names them."""
    client_id, numbers = secrets.randbits(62) | 1, itertools.count(1)
    return lambda: Write(
        client_id=client_id,
        sequence=next(numbers),
        lowest_open=1,
        client_started=int(1e6 * answer.unix_time),
        incarnation=answer.incarnation,
    )


def first_shard(client):
    """Shard 0 as others may call it, who check nothing, and the ids of IDS that it owns."""
    return client._cluster.shards[0], IDS[IDS % client.shards == 0]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        ({"values": np.ones((1, 3), np.float32)}, InvalidRequestError),
        ({"values": np.full((1, 2), np.nan, np.float32)}, NonFiniteError),
        ({"learning_rates": np.array([np.inf], np.float32)}, NonFiniteError),
        ({"learning_rates": np.array([-0.5], np.float32)}, InvalidRequestError),
        ({"learning_rates": np.array([0.5, 0.5], np.float32)}, InvalidRequestError),
        ({"table": "nowhere"}, TrilithError),
    ],
)
def test_a_request_with_one_bad_part_changes_no_table(client, name, spoil, error):
    good, other = (
        client.table(f"{name}{k}", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros()) for k in "ab"
    )
    shard, owned = first_shard(client)
    write = naming(client.describe()[0])()
    fine = UpdatePart(good.name, owned, ONES[: owned.size])
    one = {"table": other.name, "ids": owned[:1], "values": np.ones((1, 2), np.float32)}
    for _ in range(2):
        with pytest.raises(error):
            shard.apply_gradients([fine, UpdatePart(**one | spoil)], write)
        assert good.size() == other.size() == 0
    shard.apply_gradients([fine, UpdatePart(**one)], write)
    shard.apply_gradients([fine, UpdatePart(**one)], write)  # a repetition
    np.testing.assert_array_equal(good.lookup(owned), -ONES[: owned.size])
    np.testing.assert_array_equal(other.lookup(owned[:1]), -ONES[:1])


def test_a_step_that_one_table_cannot_take_changes_no_other(client, name):
    good = client.table(f"{name}a", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
    client.table(f"{name}b", dim=1, optimizer=BatchSoftmax(learning_rate=1.0))
    shard, owned = first_shard(client)
    parts = [
        UpdatePart(good.name, owned, ONES[: owned.size]),
        UpdatePart(f"{name}b", owned, np.ones((owned.size, 1), np.float32)),
    ]
    with pytest.raises(InvalidRequestError, match="global_step=-1"):
        shard.apply_gradients(parts, Write(global_step=-1))
    assert good.size() == 0


def test_tables_that_fit_one_by_one_but_not_together_are_refused_whole(local, shape):
    cluster = local(shape, memory_limit_bytes=250_000)
    with cluster.connect() as client:
        for table in "ab":
            client.table(table, dim=64, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        shard = client._cluster.shards[0]
        write = naming(client.describe()[0])()
        owned = np.arange(0, 600 * client.shards, client.shards, dtype=np.uint64)
        parts = [UpdatePart(table, owned, np.ones((owned.size, 64), np.float32)) for table in "ab"]
        for _ in range(2):
            with pytest.raises(MemoryLimitError, match="nothing was written"):
                shard.apply_gradients(parts, write)
            assert [client.table(table).size() for table in "ab"] == [0, 0]
        half = [UpdatePart(part.table, part.ids[:300], part.values[:300]) for part in parts]
        shard.apply_gradients(half, write)
        shard.apply_gradients(half, write)
        np.testing.assert_array_equal(client.table("a").lookup(owned[:300]), -half[0].values)


# ---- steps and rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, MAX_STEP + 1, 2**62, 2**63, 2**64, 1.5, "7", True, None, float("nan")])
def test_a_step_that_is_none_leaves_the_counter_and_the_cluster_alone(client, kept, step):
    before, rows = client.global_step(), rows_of(kept)
    for option in ("advance", "set_to"):
        if step is not None:
            with pytest.raises(InvalidRequestError, match=f"{option}="):
                client.global_step(**{option: step})
    if step is not None:
        with pytest.raises(InvalidRequestError, match="global_step="):
            kept.apply_gradients(IDS, ONES, global_step=step)
    client.describe()
    client.stats()
    assert (client.global_step(), rows_of(kept)) == (before, rows)


def test_a_shard_bounds_its_step_by_itself(client, kept):
    shard, owned = first_shard(client)
    before, rows = client.global_step(set_to=5), rows_of(kept)
    for advance in (2**63, 2**64 - 1, MAX_STEP):
        with pytest.raises(InvalidRequestError, match="advance"):
            shard.global_step(advance=advance)
    for set_to in (-1, 2**63 - 1):
        with pytest.raises(InvalidRequestError, match="set_to="):
            shard.global_step(set_to=set_to)
    part = UpdatePart(kept.name, owned, ONES[: owned.size])
    for step in (-1, 5 + MAX_STEPS_AHEAD + 1, 2**62, 2**63 - 1):
        with pytest.raises(InvalidRequestError, match=f"global_step={step} is"):
            shard.apply_gradients([part], Write(global_step=step))
    client.describe()
    client.stats()
    assert (client.global_step(), rows_of(kept)) == (before, rows)
    shard.apply_gradients([part], Write(global_step=1000))
    assert client.global_step() == 1000
    assert client.global_step(set_to=0) == 0


def test_a_rate_that_is_none_leaves_dense_variables_alone(client, name):
    client.create_variables({name: np.ones(3, np.float32)}, optimizer=Sgd(learning_rate=1.0))
    owner = next(i for i, answer in enumerate(client.describe()) if any(v.name == name for v in answer.variables))
    shard = client._cluster.shards[owner]
    size = next(v.size for v in client.describe()[owner].variables if v.name == name)
    part = DensePart(name, 0, np.ones(size, np.float32))
    for rate in (float("nan"), float("inf"), -float("inf"), -1.0):
        with pytest.raises(InvalidRequestError, match="learning_rate="):
            shard.apply_dense_gradients([part], Write(), learning_rate=rate)
    for rate in (float("nan"), float("inf"), -1.0, 0, 1e39, "1", True, [0.1]):
        with pytest.raises(InvalidRequestError, match="learning_rate="):
            client.apply_dense_gradients({name: np.ones(3, np.float32)}, learning_rate=rate)
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], np.ones(3))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("initial_capacity", 2**63, InvalidRequestError),
        ("initial_capacity", 2**40, InvalidRequestError),
        ("initial_capacity", 2**33, MemoryLimitError),
        ("filter_capacity", 2**40, InvalidRequestError),
        ("filter_capacity", 2**36, MemoryLimitError),
    ],
)
def test_a_table_that_is_too_large_to_begin_with_leaves_room_for_the_others(local, shape, field, value, error):
    cluster = local(shape, memory_limit_bytes=100_000_000)
    with cluster.connect() as client:
        kept = client.table("kept", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        config = ps_pb2.TableConfig()
        config.CopyFrom(kept.config)
        config.name = "huge"
        if field == "initial_capacity":
            config.hash_table.initial_capacity = value
        else:
            config.filter, config.filter_capacity = ps_pb2.TableConfig.SLIDING, value
        with pytest.raises(error):
            client._cluster.shards[0].create_tables([config])
        kept.assign(IDS, ONES)
        assert [table.name for table in client.describe()[0].tables] == ["kept"]
        assert client.stats()[0].memory_bytes < 1_000_000


def test_a_dense_variable_does_not_begin_with_what_is_no_number(client, name):
    shard = client._cluster.shards[0]
    spec = ps_pb2.VariableSpec(name=name, partition=0, size=2, optimizer=Sgd(learning_rate=1.0).as_proto())
    for value in (np.nan, np.inf):
        with pytest.raises(NonFiniteError):
            shard.create_variables([spec], [np.full(2, value, np.float32)])
    assert all(variable.name != name for variable in client.describe()[0].variables)


def test_numbers_of_queues_that_are_none_are_refused(client, name):
    client.queues.create(name, ["a"])
    for capacity in (-1, 2**64, 1.5, "9", True):
        with pytest.raises(InvalidRequestError, match="capacity="):
            client.queues.create(f"{name}x", capacity=capacity)
    for lease_s in (-1, float("nan"), float("inf"), "9", None):
        with pytest.raises(InvalidRequestError, match="lease_s="):
            client.queues.dequeue(name, "w", lease_s=lease_s)
        with pytest.raises(InvalidRequestError, match="lease_s="):
            client.queues.hold_leases("w", lease_s)
    for lease in (-1, 2**64, 1.5, "9"):
        with pytest.raises(InvalidRequestError, match="lease="):
            client.queues.acknowledge("w", lease)
    assert client.queues.dequeue(name, "w", lease_s=0).element == "a"


# ---- restores, and calls repeated behind them ------------------------------------------------------------------------


def test_a_restore_gives_another_incarnation_and_no_write_from_before_counts(local, shape, tmp_path):
    cluster = local(shape)
    with cluster.connect() as client, cluster.connect() as other:
        table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        theirs = other.table("t")
        path = str(tmp_path / "saved")
        client.save(path)
        shard, owned = first_shard(client)
        part = UpdatePart("t", owned, ONES[: owned.size])
        incarnation = client.describe()[0].incarnation
        write = naming(client.describe()[0])()
        shard.apply_gradients([part], write)
        client.restore(path)
        assert client.describe()[0].incarnation != incarnation
        assert table.size() == 0
        with pytest.raises(ShardRestartedError):
            shard.apply_gradients([part], write)
        assert table.size() == 0
        # Whoever restored goes on; who did not is told.
        table.apply_gradients(IDS, ONES)
        with pytest.raises(ShardRestartedError):
            theirs.apply_gradients(IDS, ONES)
        if cluster.remote:  # within a process a lookup does not say what it knows
            with pytest.raises(ShardRestartedError):
                theirs.lookup(IDS)
        np.testing.assert_array_equal(table.lookup(IDS), -ONES)
        assert other.rejoin()[0].restored_from == path
        theirs.apply_gradients(IDS, ONES)
        np.testing.assert_array_equal(table.lookup(IDS), -2 * ONES)


def test_calls_repeated_after_a_lost_answer_do_not_act_twice(local, shape, tmp_path):
    cluster = local(shape)
    with cluster.connect() as client:
        table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        table.assign(IDS, ONES)
        shard, owned = first_shard(client)
        write = naming(client.describe()[0])
        saving = write()
        saved = shard.save(str(tmp_path / "saved"), saving)
        assert shard.save(str(tmp_path / "saved"), saving) == saved
        assert len(list((tmp_path / "saved").glob("*.arrow"))) == len(
            [f for f in saved.files if f.name.endswith("arrow")]
        )
        client.save(str(tmp_path / "whole"))
        # Whatever comes between the two is not undone by the second.
        for call in (
            lambda write: shard.clear(["t"], write),
            lambda write: shard.erase(IdPart("t", owned), write),
            lambda write: shard.reinitialize(IdPart("t", owned), write).tolist(),
            lambda write: shard.evict(["t"], write, now=4_000) or 0,
        ):
            mine = write()
            first = call(mine)
            table.assign(IDS, ONES)
            assert call(mine) == first
            np.testing.assert_array_equal(table.lookup(IDS), ONES)
        making = write()
        assert shard.create_queue("q", ["a", "b"], making) is True
        assert shard.create_queue("q", ["a", "b"], making) is True
        assert shard.create_queue("q", ["a", "b"], write()) is False
        leased = shard.dequeue(["q"], "w", write(), lease_s=100.0)
        giving_back = write()
        assert shard.hold_leases("w", 0.0, giving_back) == 1
        assert shard.dequeue(["q"], "w", write(), lease_s=100.0).element == leased.element
        assert shard.hold_leases("w", 0.0, giving_back) == 1, "what was leased since stays leased"
        assert shard.hold_leases("w", 5.0, write()) == 1
        restoring = write()
        restored = shard.restore(str(tmp_path / "whole"), restoring)
        if shape == "embedded":
            shard.assign([UpdatePart("t", owned, 3 * ONES[: owned.size])], Write())
        else:
            cluster.stores[0].assign([UpdatePart("t", owned, 3 * ONES[: owned.size])], Write())
        assert shard.restore(str(tmp_path / "whole"), restoring) == restored
        rows = cluster.stores[0].lookup([IdPart("t", owned)])[0]
        np.testing.assert_array_equal(rows, 3 * ONES[: owned.size])


def test_nothing_that_changes_a_shard_is_done_behind_its_restart(local, shape, tmp_path):
    cluster = local(shape)
    with cluster.connect() as client:
        table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        table.assign(IDS, ONES)
        path = str(tmp_path / "saved")
        client.save(path)
        shard, owned = first_shard(client)
        # As a request that was on its way while the shard restarted, of a client that has adopted it since.
        stale = Write(client_id=5, sequence=1, incarnation=client.describe()[0].incarnation)
        client.restore(path)
        part = UpdatePart("t", owned, ONES[: owned.size])
        for call in (
            lambda: shard.clear(["t"], stale),
            lambda: shard.evict([], stale),
            lambda: shard.erase(IdPart("t", owned), stale),
            lambda: shard.reinitialize(IdPart("t", owned), stale),
            lambda: shard.assign([part], stale),
            lambda: shard.save(str(tmp_path / "late"), stale),
            lambda: shard.restore(path, stale),
            lambda: shard.create_tables([table.config], stale),
            lambda: shard.create_variables([], [], stale),
            lambda: shard.create_queue("q", [], stale),
            lambda: shard.hold_leases("w", 0.0, stale),
            lambda: shard.global_step(set_to=9, write=stale),
        ):
            with pytest.raises(ShardRestartedError):
                call()
        assert not (tmp_path / "late").exists()
        assert client.global_step() == 0
        np.testing.assert_array_equal(table.lookup(IDS), ONES)


def test_a_client_that_was_forgotten_is_in_doubt_once_and_goes_on(local, shape):
    cluster = local(shape)
    with cluster.connect() as client:
        table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        table.apply_gradients(IDS, ONES)
        # As when more clients came than a PS remembers.
        while cluster.stores[0]._sequences._forget_one():
            pass
        owned = IDS[IDS % client.shards == 0]
        with pytest.raises(InDoubtError, match="not done now"):
            table.apply_gradients(owned, ONES[: owned.size])
        table.apply_gradients(owned, ONES[: owned.size])
        np.testing.assert_array_equal(table.lookup(owned), -2 * ONES[: owned.size])

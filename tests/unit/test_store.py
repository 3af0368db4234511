"""A shard: what holds when writers, restores and the memory limit meet."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from trilith.errors import MemoryLimitError, ShardRestartedError
from trilith.shard import IdPart, UpdatePart, Write
from trilith.tables import Sgd, Zeros, table_config
from trilith_services.ps.process.shard import LocalShard


def config(name, dim=4, **options):
    return table_config(name, dim=dim, optimizer=Sgd(learning_rate=1.0), initializer=Zeros(), **options).proto


@pytest.fixture
def make_store():
    stores = []

    def make(**options):
        stores.append(LocalShard(threads=1, **options))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def part(table, ids, dim=4):
    ids = np.asarray(ids, np.uint64)
    return UpdatePart(table, ids, np.ones((ids.size, dim), np.float32))


@pytest.mark.filterwarnings("error")
def test_a_write_that_asks_for_room_in_the_middle_of_a_clear_is_done(make_store, monkeypatch):
    store = make_store(memory_limit_bytes=10_000_000)
    store.create_tables([config("a")])
    table = store.table("a")
    point, sizes = table._stripes._point, []

    def ask(s):  # of a clear, before this stripe has an index
        sizes.append(table.expect(100, all_new=True))
        table.unexpect(100)
        point(s)

    monkeypatch.setattr(table._stripes, "_point", ask)
    table.clear()
    assert len(sizes) == table.stripes
    assert max(sizes) <= 2 * store.budget.used + 100 * table._stripes.row_bytes
    assert table._pending == 0


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_writers_at_once_never_exceed_the_limit_and_each_is_whole(make_store):
    store = make_store(memory_limit_bytes=700_000)
    store.create_tables([config(name, 32) for name in "ab"])
    begin = threading.Barrier(16)

    def write(k):
        begin.wait(60)
        ids = np.arange(300 * k, 300 * (k + 1))
        try:
            store.apply_gradients([part("a", ids, 32), part("b", ids, 32)], Write(client_id=k + 1, sequence=1))
        except MemoryLimitError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(write, range(16)))
    assert store.budget.used <= store.budget.limit
    assert store.budget.reserved == 0
    assert 0 < sum(done) < 16
    for table in "ab":
        held = store.contains(IdPart(table, np.arange(4800, dtype=np.uint64))).reshape(16, 300)
        assert held.all(axis=1).tolist() == done, table
        assert held.any(axis=1).tolist() == done, table


def test_writers_who_need_no_rows_pass_one_that_takes_all_there_is(make_store):
    store = make_store(memory_limit_bytes=400_000)
    store.create_tables([config("a", 32)])
    ids = np.arange(500)
    store.apply_gradients([part("a", ids, 32)], Write())
    rest = store.budget.limit - store.budget.used
    assert store.budget.reserve(rest)
    try:
        store.apply_gradients([part("a", ids, 32)], Write())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.apply_gradients, [part("a", [9000], 32)], Write())
            time.sleep(0.05)
            assert not waiting.done(), "what is reserved may not be needed"
            store.budget.release(rest)
            rest = 0
            waiting.result(60)
    finally:
        store.budget.release(rest)
    assert store.contains(IdPart("a", np.array([9000], np.uint64))).all()


def test_a_refused_write_was_not_counted_by_the_filter(make_store):
    store = make_store(memory_limit_bytes=120_000)
    store.create_tables(
        [
            config("rare", 4, filter="sliding", filter_capacity=1000, occurrence_threshold=2),
            config("full", 64),
        ]
    )
    once = part("rare", [1, 2, 3])
    for _ in range(5):
        with pytest.raises(MemoryLimitError):
            store.apply_gradients([once, part("full", np.arange(2000), 64)], Write())
    for _ in range(2):
        store.apply_gradients([once], Write())
        assert len(store.table("rare")) == 0, "seen once and twice"
    store.apply_gradients([once], Write())
    assert len(store.table("rare")) == 3


def test_ids_that_the_filter_leaves_out_need_no_memory(make_store):
    store = make_store(memory_limit_bytes=120_000)
    store.create_tables([config("rare", 64, filter="sliding", filter_capacity=10_000, occurrence_threshold=9)])
    store.apply_gradients([part("rare", np.arange(3000), 64)], Write())
    assert len(store.table("rare")) == 0
    counts = np.full(3000, 20, np.uint32)
    many = part("rare", np.arange(3000), 64)
    with pytest.raises(MemoryLimitError):
        store.apply_gradients([UpdatePart(many.table, many.ids, many.values, np.maximum(counts, 9)), many], Write())


@pytest.mark.parametrize("end", ["restore", "put_table", "drop_table"])
def test_a_write_under_way_on_a_table_that_ends_leaves_nothing_on_the_account(make_store, monkeypatch, tmp_path, end):
    store = make_store(memory_limit_bytes=50_000_000)
    store.create_tables([config("a")])
    store.save(str(tmp_path))
    from trilith import checkpoint

    saved = checkpoint.part_of(0, 1, store.save(str(tmp_path / "whole")))
    checkpoint.write_manifest(str(tmp_path / "whole"), [saved])
    table = store.table("a")
    inside, leave = threading.Event(), threading.Event()
    write = table._stripes.write

    def slow(ids, work):
        inside.set()
        leave.wait(60)
        write(ids, work)

    monkeypatch.setattr(table._stripes, "write", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(store.apply_gradients, [part("a", np.arange(5000))], Write())
        inside.wait(60)
        if end == "restore":
            ending = pool.submit(store.restore, str(tmp_path / "whole"))
        elif end == "put_table":
            ending = pool.submit(store.put_table, store.new_table(config("a")))
        else:
            ending = pool.submit(store.drop_table, "a")
        time.sleep(0.05)
        leave.set()
        writing.result(60)
        ending.result(60)
    left = sum(each.memory_bytes for each in store.tables.values())
    assert store.budget.used == left
    assert store.budget.reserved == 0


# ---- time ------------------------------------------------------------------------------------------------------------


def test_maintenance_evicts_by_the_clock_and_not_by_what_rows_say(make_store):
    day = 86_400
    clock = [20_000.0 * day]
    store = make_store(clock=lambda: clock[0])
    store.create_tables([config("a", ttl_days=2, evict_every_hours=1)])
    store.assign([part("a", [1])], Write())
    store.assign([part("a", [2])], Write(request_time=int(clock[0]) + day))
    store._maintenance.tick()
    clock[0] += day
    store._maintenance.tick()
    assert len(store.table("a")) == 2
    clock[0] += day
    store._maintenance.tick()
    assert store.contains(IdPart("a", np.array([1, 2], np.uint64))).tolist() == [False, True]


# ---- restores --------------------------------------------------------------------------------------------------------


def test_no_write_falls_between_the_old_content_and_the_new(make_store, tmp_path):
    """Every acknowledged write is in the content of the incarnation that it names."""
    from trilith import checkpoint

    store = make_store()
    store.create_tables([config("a", 1)])
    checkpoint.write_manifest(str(tmp_path), [checkpoint.part_of(0, 1, store.save(str(tmp_path)))])
    ids = np.arange(8, dtype=np.uint64)
    stop = threading.Event()
    acknowledged = {}

    def write(k):
        sequence = 0
        while not stop.is_set():
            sequence += 1
            incarnation = store.incarnation
            try:
                store.apply_gradients(
                    [part("a", ids[k : k + 1], 1)],
                    Write(client_id=k + 1, sequence=sequence, lowest_open=sequence, incarnation=incarnation),
                )
            except ShardRestartedError:
                continue
            key = incarnation, k
            acknowledged[key] = acknowledged.get(key, 0) + 1

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(write, k) for k in range(8)]
        for _ in range(10):
            store.restore(str(tmp_path))
            time.sleep(0.01)
        stop.set()
        for job in jobs:
            job.result(60)
    rows = -store.lookup([IdPart("a", ids)])[0][:, 0]
    assert rows.tolist() == [acknowledged.get((store.incarnation, k), 0) for k in range(8)]

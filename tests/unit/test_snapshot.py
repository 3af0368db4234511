"""Snapshots: what was saved comes back, on any number of PS; what is damaged is refused by name."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith import checkpoint
from trilith.checkpoint import signed
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.errors import CheckpointError, InvalidRequestError, TableExistsError
from trilith.folder import Folder
from trilith.routing import partition_owner, partition_sizes
from trilith.shard import DensePart, IdPart, UpdatePart, Write
from trilith.tables import Adagrad, Adam, RandomUniform, Sgd, table_config
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.checkpoint import queue_files, snapshot, variable_files
from trilith_services.ps.checkpoint.checkpointer import Checkpointer, restore_newest
from trilith_services.ps.engine.filters import SlidingFilter
from trilith_services.ps.engine.queues import QueueState
from trilith_services.ps.engine.stripes import STRIPES, Stripes
from trilith_services.ps.engine.variables import VariableState
from trilith_services.ps.process.shard import LocalShard

IDS = np.array([0, 1, 2, 3, 5, 8, 2**63, 2**64 - 1, *range(1000, 1060)], np.uint64)
CONFIGS = [
    table_config("user", dim=3, optimizer=Adam(learning_rate=0.1), initializer=RandomUniform(-1, 1)).proto,
    table_config("item/x:1", dim=2, optimizer=Sgd(learning_rate=0.1)).proto,
    table_config(
        "rare",
        dim=1,
        optimizer=Adagrad(learning_rate=0.1),
        filter="sliding",
        filter_capacity=100_000,
        occurrence_threshold=2,
    ).proto,
]
NOW = 1_700_000_000

Make = Callable[..., LocalShard]


@pytest.fixture
def make_store() -> Iterator[Make]:
    stores = []

    def make(index: int = 0, count: int = 1) -> LocalShard:
        stores.append(LocalShard(index=index, count=count, threads=1))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def filled_cluster(make: Make, count: int, *, step: int = 41) -> list[LocalShard]:
    stores = [make(index, count) for index in range(count)]
    rng = np.random.default_rng(1)
    for store in stores:
        store.create_tables(CONFIGS)
        mine = IDS[IDS % np.uint64(count) == store.index]
        for config, dim in zip(CONFIGS, (3, 2, 1), strict=True):
            for _ in range(3 if config.name != "rare" else 1):
                grads = rng.standard_normal((mine.size, dim)).astype(np.float32)
                store.apply_gradients([UpdatePart(config.name, mine, grads)], Write(request_time=NOW, global_step=step))
        spec = ps_pb2.VariableSpec(name="bias", size=4)
        spec.optimizer.adam.learning_rate = 0.1
        if partition_owner("bias", 0, count) == store.index:
            store.create_variables([spec], [np.arange(4, dtype=np.float32)])
            store.apply_dense_gradients([DensePart("bias", 0, np.ones(4, np.float32))], Write(global_step=step))
    return stores


def save_all(stores: list[LocalShard], path: Path) -> str:
    parts = [
        checkpoint.part_of(store.index, store.count, store.save(str(path)), finished_unix_s=1.0) for store in stores
    ]
    checkpoint.write_manifest(str(path), parts)
    return str(path)


def restored_cluster(make: Make, path: str, count: int) -> list[LocalShard]:
    stores = [make(index, count) for index in range(count)]
    for store in stores:
        store.restore(path)
    return stores


def content(stores: list[LocalShard]) -> dict[str, list[bytes]]:
    """Per table the entry dump (weights, optimizer state, time) of every id, at its owner."""
    return {
        name: [
            stores[int(i) % len(stores)].lookup_entries(IdPart(name, np.array([i], np.uint64)))[0] for i in IDS.tolist()
        ]
        for name in sorted(stores[0].tables)
    }


def dense(stores: list[LocalShard], name: str) -> list[tuple[list[float], list[float]]]:
    return [
        (state.values.tolist(), state.state.tolist())
        for store in stores
        for state in store.variables.export()
        if state.spec.name == name
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_checkpoint_of_two_ps_restores_row_for_row_into_any_number(make_store, tmp_path, count) -> None:
    saved = filled_cluster(make_store, 2)
    path = save_all(saved, tmp_path / "ckpt")
    restored = restored_cluster(make_store, path, count)
    assert content(restored) == content(saved)
    for store in restored:
        ids = np.concatenate(
            [table.export_stripe(s).ids for table in store.tables.values() for s in range(table.stripes)]
        )
        assert np.all(ids % np.uint64(count) == store.index)
        assert store.global_step() == 41
    assert dense(restored, "bias") == dense(saved, "bias")


def test_two_to_three_to_one_loses_nothing(make_store, tmp_path) -> None:
    saved = filled_cluster(make_store, 2)
    three = restored_cluster(make_store, save_all(saved, tmp_path / "two"), 3)
    one = restored_cluster(make_store, save_all(three, tmp_path / "three"), 1)
    assert content(one) == content(saved)
    assert sum(len(table) for table in one[0].tables.values()) == 2 * IDS.size


def test_training_goes_on_alike_after_a_restore(make_store, tmp_path) -> None:
    (saved,) = filled_cluster(make_store, 1)
    (restored,) = restored_cluster(make_store, save_all([saved], tmp_path / "ckpt"), 1)
    ids = np.arange(980, 1080, dtype=np.uint64)
    for store in (saved, restored):
        for step in range(3):
            grads = np.full((ids.size, 3), 0.1 * step, np.float32)
            store.apply_gradients([UpdatePart("user", ids, grads)], Write(request_time=NOW + step))
    part = [IdPart("user", ids)]
    np.testing.assert_array_equal(saved.lookup(part)[0], restored.lookup(part)[0])


@pytest.mark.parametrize("count", [2, 4])
def test_ids_below_their_threshold_stay_counted_where_the_filter_can_follow(make_store, tmp_path, count) -> None:
    saved = filled_cluster(make_store, 2)  # each id of "rare" was seen once and needs two more
    restored = restored_cluster(make_store, save_all(saved, tmp_path / "ckpt"), count)
    for store in restored:
        mine = IDS[IDS % np.uint64(count) == store.index]
        ones = np.ones((mine.size, 1), np.float32)
        store.apply_gradients([UpdatePart("rare", mine, ones)], Write())
        assert not store.contains(IdPart("rare", mine)).any()
        store.apply_gradients([UpdatePart("rare", mine, ones)], Write())
        assert store.contains(IdPart("rare", mine)).all()


def test_counts_start_anew_where_the_filter_cannot_follow(make_store, tmp_path) -> None:
    saved = filled_cluster(make_store, 2)
    (one,) = restored_cluster(make_store, save_all(saved, tmp_path / "ckpt"), 1)
    gate = one.table("rare").filter
    assert isinstance(gate, SlidingFilter)
    assert gate.elements == 0


def test_a_checkpoint_holds_every_row_and_eviction_alone_drops_what_has_expired(make_store, tmp_path) -> None:
    store = make_store()
    store.create_tables([table_config("t", dim=1, optimizer=Sgd(), ttl_days=1).proto])
    both = np.array([1, 2], np.uint64)
    now = int(time.time())
    for each, when in zip(both, (now - 2 * 86_400, now), strict=True):
        store.assign([UpdatePart("t", np.array([each]), np.ones((1, 1), np.float32))], Write(request_time=when))
    (restored,) = restored_cluster(make_store, save_all([store], tmp_path / "ckpt"), 1)
    assert restored.contains(IdPart("t", both)).tolist() == [True, True]
    assert restored.evict([], Write()) == {"t": 1}
    assert restored.contains(IdPart("t", both)).tolist() == [False, True]


def test_rows_that_a_wrong_clock_dated_ahead_live_no_longer_than_others(tmp_path) -> None:
    day, ids = 86_400, np.array([1, 2], np.uint64)
    clock = [NOW + 900 * day]
    stores = [LocalShard(threads=1, clock=lambda: clock[0]) for _ in range(2)]
    stores[0].create_tables([table_config("t", dim=1, optimizer=Sgd(), ttl_days=3).proto])
    stores[0].assign([UpdatePart("t", ids[:1], np.ones((1, 1), np.float32))], Write())
    stores[0].assign([UpdatePart("t", ids[1:], np.ones((1, 1), np.float32))], Write(request_time=NOW))
    path = save_all(stores[:1], tmp_path / "ckpt")
    clock[0] = NOW + day
    stores[1].restore(path)
    assert stores[1].table("t").newest_update == NOW + day
    assert stores[1].evict([], Write()) == {"t": 0}
    clock[0] = NOW + 3 * day
    assert stores[1].evict([], Write()) == {"t": 1}
    clock[0] = NOW + 4 * day
    assert stores[1].evict([], Write()) == {"t": 1}, "three days after the restore, not in three years"
    for store in stores:
        store.close()


def test_rows_restored_by_a_clock_that_is_behind_keep_their_times(tmp_path) -> None:
    """As on a machine that has not heard of the time yet: when it has, the rows must not all expire at once."""
    clock, ids = [float(NOW)], np.array([1, 2], np.uint64)
    stores = [LocalShard(threads=1, clock=lambda: clock[0]) for _ in range(2)]
    stores[0].create_tables([table_config("t", dim=1, optimizer=Sgd(), ttl_days=3).proto])
    stores[0].assign([UpdatePart("t", ids, np.ones((2, 1), np.float32))], Write())
    path = str(tmp_path / "ckpt")
    response = stores[0].save(path)
    checkpoint.write_manifest(path, [checkpoint.part_of(0, 1, response, finished_unix_s=NOW + 5)])
    clock[0] = 1e9
    stores[1].restore(path)
    clock[0] = NOW + 60.0
    assert stores[1].evict([], Write()) == {"t": 0}
    clock[0] = NOW + 4 * 86_400.0
    assert stores[1].evict([], Write()) == {"t": 2}
    for store in stores:
        store.close()


def test_what_is_no_checkpoint_is_left_as_it_is(make_store, tmp_path) -> None:
    missing = tmp_path / "ckpt-00000000000000000007"
    with pytest.raises(CheckpointError):
        make_store().restore(str(missing))
    assert not missing.exists()


def test_a_restore_replaces_what_was_there(make_store, tmp_path) -> None:
    saved = filled_cluster(make_store, 1)
    path = save_all(saved, tmp_path / "ckpt")
    store = make_store()
    store.create_tables([*CONFIGS, table_config("other", dim=1, optimizer=Sgd()).proto])
    stray = np.array([77_777], np.uint64)
    store.assign([UpdatePart("user", stray, np.ones((1, 3), np.float32))], Write())
    store.restore(path)
    assert not store.contains(IdPart("user", stray)).any()
    assert sorted(store.tables) == sorted([*(config.name for config in CONFIGS), "other"]), "an empty table stays"
    store.assign([UpdatePart("other", stray, np.ones((1, 1), np.float32))], Write())
    with pytest.raises(
        InvalidRequestError, match=r"does not hold the tables 'other' \(1 rows\).*Client.clear\(\['other'\]"
    ):
        store.restore(path)
    assert store.contains(IdPart("other", stray)).all()
    store.clear(["other"], Write())
    store.restore(path)
    store.assign([UpdatePart("other", stray, np.ones((1, 1), np.float32))], Write())
    store.drop_table("other")
    assert content([store]) == content(saved)


def test_tables_that_are_made_while_a_checkpoint_is_read_are_not_lost(make_store, tmp_path, monkeypatch) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    store = make_store()
    ids = np.array([5], np.uint64)
    load = snapshot._load_filters
    rows = 0

    def others_go_on(*args: Any) -> None:
        load(*args)
        if "late" not in store.tables:
            store.create_tables([table_config("late", dim=1, optimizer=Sgd()).proto])
        if rows:
            store.assign([UpdatePart("late", ids, np.ones((rows, 1), np.float32))], Write())

    monkeypatch.setattr(snapshot, "_load_filters", others_go_on)  # the last of what is read
    store.restore(path)
    assert "late" in store.tables, "it was there when everything was replaced"
    before, rows = store.incarnation, 1
    with pytest.raises(InvalidRequestError, match=r"does not hold the tables 'late' \(1 rows\)"):
        store.restore(path)
    assert store.contains(IdPart("late", ids)).all()
    assert store.incarnation == before


def test_a_restore_that_would_take_rows_of_one_ps_changes_none(tmp_path) -> None:
    stores = [LocalShard(index=index, count=2, threads=1) for index in range(2)]
    with Client(Cluster(stores, ClientConfig())) as client:
        table = client.table("user", dim=1, optimizer=Sgd())
        table.assign([0, 1], np.ones((2, 1), np.float32))
        client.save(str(tmp_path / "old"))
        table.assign([0, 1], np.full((2, 1), 2, np.float32))
        client.table("new", dim=1, optimizer=Sgd()).assign([1], np.ones((1, 1), np.float32))  # on PS 1 only
        with pytest.raises(InvalidRequestError, match="does not hold the tables 'new'"):
            client.restore(str(tmp_path / "old"))
        assert table.lookup([0, 1]).tolist() == [[2.0], [2.0]]


def test_variables_and_queues_that_a_checkpoint_does_not_hold_go_with_a_word(make_store, tmp_path, caplog) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    store = make_store()
    spec = ps_pb2.VariableSpec(name="later", size=1)
    spec.optimizer.sgd.learning_rate = 0.1
    store.create_variables([spec], [np.zeros(1, np.float32)])
    store.create_queue("files", ["a"])
    store.restore(path)
    (record,) = [record for record in caplog.records if "they are gone" in record.getMessage()]
    assert (record.variables, record.queues) == (["later"], ["files"])


def test_a_table_of_another_config_is_refused_before_anything_changes(make_store, tmp_path) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    store = make_store()
    store.create_tables([table_config("user", dim=5, optimizer=Sgd()).proto])
    with pytest.raises(TableExistsError, match="table 'user' exists with another config than in"):
        store.restore(path)
    assert list(store.tables) == ["user"]


def test_any_arrow_reader_understands_a_row_file(make_store, tmp_path) -> None:
    (store,) = filled_cluster(make_store, 1)
    save_all([store], tmp_path / "ckpt")
    (name,) = (path for path in (tmp_path / "ckpt").iterdir() if path.name.startswith("table-user."))
    with pa.memory_map(str(name)) as source:
        reader = pa.ipc.open_file(source)
        assert 1 < reader.num_record_batches <= store.table("user").stripes  # a stripe without rows leaves none
        table = reader.read_all()
    assert table.schema.names == ["id", "weights", "state", "last_update"]
    assert table.schema.field("weights").type == pa.list_(pa.float32(), 3)
    assert table.schema.field("state").type == pa.list_(pa.float32(), 8)
    assert sorted(table["id"].to_pylist()) == sorted(IDS.tolist())
    assert b"beta1_power" in table.schema.metadata[b"trilith.layout"]


def test_serving_rows_have_no_state_and_come_back(make_store, tmp_path) -> None:
    store = make_store()
    store.create_tables([table_config("t", dim=2, optimizer=Sgd(), entry_type="serving").proto])
    values = np.array([[1.5, -2.0]], np.float32)
    ids = np.array([9], np.uint64)
    store.assign([UpdatePart("t", ids, values)], Write())
    (restored,) = restored_cluster(make_store, save_all([store], tmp_path / "ckpt"), 1)
    np.testing.assert_array_equal(restored.lookup([IdPart("t", ids)])[0], values)


@pytest.mark.parametrize("kind", ["table-user.", "variables.", "filter-rare."])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused_by_name_and_nothing_changes(make_store, tmp_path, kind, damage) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    (file,) = (file for file in (tmp_path / "ckpt").iterdir() if file.name.startswith(kind))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    said = {"flip": "damaged: CRC-32C is", "cut": "damaged: .* bytes; the manifest says", "remove": "missing"}[damage]
    store = make_store()
    store.create_tables(CONFIGS[:1])
    with pytest.raises(CheckpointError, match=said) as caught:
        store.restore(path)
    assert file.name in str(caught.value)
    assert list(store.tables) == ["user"]
    problems = [problem for _, problem in snapshot.verify(path) if problem]
    assert len(problems) == 1
    assert file.name in problems[0]


def test_a_whole_checkpoint_verifies(make_store, tmp_path) -> None:
    path = save_all(filled_cluster(make_store, 2), tmp_path / "ckpt")
    assert [problem for _, problem in snapshot.verify(path)] == [""] * 10  # 2 x (3 tables, a filter, the variables)


def test_only_the_files_that_can_hold_its_ids_are_read(make_store, tmp_path) -> None:
    path = save_all(filled_cluster(make_store, 4), tmp_path / "ckpt")
    manifest = checkpoint.read_manifest(path)

    def parts(index: int, count: int) -> list[int]:
        return [part.shard_index for part in snapshot.parts_for(manifest, index, count)]

    assert parts(2, 4) == [2]
    assert parts(1, 2) == [1, 3]
    assert parts(5, 8) == [1]
    assert parts(1, 6) == [1, 3]
    assert parts(0, 3) == [0, 1, 2, 3]


def test_memory_is_a_path(make_store) -> None:
    (saved,) = filled_cluster(make_store, 1)
    path = "memory://test-snapshot/ckpt"
    checkpoint.write_manifest(path, [checkpoint.part_of(0, 1, saved.save(path))])
    assert content(restored_cluster(make_store, path, 2)) == content([saved])


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 1), (4, 2)])
def test_indexes_hardly_grow_while_rows_come_whose_number_is_known(make_store, tmp_path, monkeypatch, old, new) -> None:
    config = table_config("user", dim=2, optimizer=Sgd(learning_rate=1.0)).proto
    ids = np.arange(30_000, dtype=np.uint64)
    stores = [make_store(index, old) for index in range(old)]
    client = Client(Cluster(stores, ClientConfig()))
    for store in stores:
        store.create_tables([config])
    client.table("user").assign(ids, np.ones((ids.size, 2), np.float32))
    path = str(tmp_path / "ckpt")
    client.save(path)
    grown, grow = [], Stripes._grow
    monkeypatch.setattr(Stripes, "_grow", lambda *arguments: grown.append(grow(*arguments)))
    restored = [make_store(index, new) for index in range(new)]
    for store in restored:
        store.restore(path)
    assert sum(len(store.table("user")) for store in restored) == ids.size
    assert len(grown) <= new * STRIPES  # once, where chance gave a stripe more than its share; not again and again


# ---- dense variables -------------------------------------------------------------------------------------------------


@given(floats=st.sampled_from([1, 7, 2**20 + 5]), old=st.integers(1, 5), new=st.integers(1, 5))
def test_variables_are_cut_as_a_cluster_of_the_new_size_cuts_them(floats: int, old: int, new: int) -> None:
    values = np.arange(floats, dtype=np.float32)

    def cut(count: int) -> list[VariableState]:
        bounds = np.cumsum([0, *partition_sizes(floats, count)])
        states = []
        for partition, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            spec = ps_pb2.VariableSpec(name="w", partition=partition, size=stop - start)
            spec.optimizer.CopyFrom(hash_table_pb2.OptimizerConfig(adam=hash_table_pb2.AdamOptimizerConfig()))
            piece = values[start:stop]
            state = np.concatenate([piece + 1, piece + 2, np.array([0.9, 0.99], np.float32)])
            slots = (("m", piece.size), ("v", piece.size), ("beta1_power", 1), ("beta2_power", 1))
            states.append(VariableState(spec, piece, state, slots))
        return states

    found = {
        state.spec.partition: (index, state)
        for index in range(new)
        for state in variable_files.place(cut(old), index, new)
    }
    wanted = cut(new)
    assert sorted(found) == [state.spec.partition for state in wanted]
    for want in wanted:
        index, state = found[want.spec.partition]
        assert index == partition_owner("w", want.spec.partition, new)
        assert state.spec == want.spec
        assert state.slots == want.slots
        np.testing.assert_array_equal(state.values, want.values)
        np.testing.assert_array_equal(state.state, want.state)


def test_a_variable_with_a_hole_is_refused() -> None:
    spec = ps_pb2.VariableSpec(name="w", partition=1, size=1)
    state = VariableState(spec, np.zeros(1, np.float32), np.zeros(0, np.float32), ())
    with pytest.raises(CheckpointError, match=r"dense variable 'w': the checkpoint holds partitions \[1\]"):
        list(variable_files.place([state], 0, 1))


# ---- the checkpointer ------------------------------------------------------------------------------------------------


class Time:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_the_last_ps_to_write_its_part_completes_the_checkpoint(make_store, tmp_path) -> None:
    stores = filled_cluster(make_store, 2)
    clock = Time(100.0)
    writers = [Checkpointer(store, str(tmp_path), every_s=10, clock=clock) for store in stores]
    assert writers[0].write(100_000)
    assert checkpoint.newest_complete(str(tmp_path)) is None
    assert writers[0].last[0].endswith("ckpt-00000000000000100000")
    assert restore_newest(make_store(), str(tmp_path)) is None
    assert writers[1].write(100_000)
    newest = checkpoint.newest_complete(str(tmp_path))
    assert newest is not None
    restored = make_store(1, 2)
    assert restore_newest(restored, str(tmp_path)) == newest
    assert restored.describe().restored_from == newest.path
    assert restored.describe().restored_step == 41


def test_every_ps_numbers_its_ticks_alike(make_store, tmp_path) -> None:
    store = make_store()
    early = Checkpointer(store, str(tmp_path), every_s=10, clock=Time(100.1))
    late = Checkpointer(store, str(tmp_path), every_s=10, clock=Time(109.9))
    for writer in (early, late):
        writer.stop(final=True)
    assert [info.number for info in checkpoint.list_checkpoints(str(tmp_path))] == [110_000]


def test_ps_that_stop_on_two_sides_of_a_tick_complete_a_last_checkpoint_together(make_store, tmp_path) -> None:
    clock = Time(109.9)
    for every_s in (0, 10):
        directory = str(tmp_path / str(every_s))
        writers = [
            Checkpointer(store, directory, every_s=every_s, clock=clock) for store in filled_cluster(make_store, 2)
        ]
        for writer in writers:
            writer.start()
        writers[0].stop()
        clock.now += 0.2
        assert writers[1].stop()
        newest = checkpoint.newest_complete(directory)
        assert newest is not None
        assert len(checkpoint.read_manifest(newest.path).parts) == 2
        clock.now = 109.9


def test_old_checkpoints_go_when_a_new_one_is_complete(make_store, tmp_path) -> None:
    writer = Checkpointer(make_store(), str(tmp_path), every_s=10, keep=2)
    for number in (10, 20, 30):
        writer.write(number)
    assert [info.number for info in checkpoint.list_checkpoints(str(tmp_path))] == [20, 30]


def test_writing_a_tick_again_replaces_the_part_and_keeps_the_checkpoint_whole(make_store, tmp_path) -> None:
    (store,) = filled_cluster(make_store, 1)
    writer = Checkpointer(store, str(tmp_path), every_s=10)
    writer.write(10)
    store.global_step(set_to=50)
    writer.write(10)
    (info,) = checkpoint.list_checkpoints(str(tmp_path))
    assert checkpoint.read_manifest(info.path).global_step == 50
    assert all(problem == "" for _, problem in snapshot.verify(info.path))


def test_a_failed_save_is_reported_and_training_goes_on(make_store, tmp_path, caplog) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    seen = []
    writer = Checkpointer(
        make_store(), str(blocked / "ckpt"), every_s=10, observe=lambda seconds, size, good: seen.append((size, good))
    )
    assert not writer.write(10)
    assert seen == [(0, False)]
    assert "checkpoint failed" in caplog.text


def test_the_thread_writes_at_ticks_and_stops(make_store, tmp_path) -> None:
    (store,) = filled_cluster(make_store, 1)
    done = []
    writer = Checkpointer(store, str(tmp_path), every_s=0.05, observe=lambda *saved: done.append(saved))
    writer.start()
    from tests.waiting import eventually

    eventually(lambda: len(done) >= 2)
    writer.stop(final=False)
    assert checkpoint.newest_complete(str(tmp_path)) is not None
    assert all(good for _, _, good in done)


def test_creating_an_empty_table_again_keeps_it(make_store) -> None:
    store = make_store()
    store.create_tables(CONFIGS)
    before = store.table("user")
    store.create_tables(CONFIGS)
    assert store.table("user") is before
    with pytest.raises(TableExistsError, match="table 'user' exists with another config"):
        store.create_tables([table_config("user", dim=5, optimizer=Sgd()).proto])


# ---- what stands in files is not trusted -----------------------------------------------------------------------------


def forge(path: str, kind: str, change: Callable[[pa.Schema, list[pa.RecordBatch]], tuple], **options) -> None:
    """Rewrite the first Arrow file of a kind, with the size and checksum that the manifest then says."""
    import google_crc32c

    manifest = checkpoint.read_manifest(path)
    record = next(file for part in manifest.parts for file in part.files if file.kind == kind)
    file = Path(path) / record.name
    with pa.ipc.open_file(file.read_bytes()) as reader:
        schema, batches = change(reader.schema, [reader.get_batch(k) for k in range(reader.num_record_batches)])
    with pa.ipc.new_file(str(file), schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    raw = file.read_bytes()
    body = json.loads((Path(path) / checkpoint.MANIFEST).read_bytes())
    for part in body["parts"]:
        for each in part["files"]:
            if each["name"] == record.name:
                each |= {"bytes": len(raw), "crc32c": google_crc32c.value(raw)}
    repack(path, body)


def repack(path: str, body: dict) -> None:
    kind = body.pop("format")
    del body["crc32c"], body["version"]
    (Path(path) / checkpoint.MANIFEST).write_bytes(signed.pack(kind, body))


def state_with(word: int, value: int) -> Callable:
    def change(schema, batches):
        metadata = {key.decode(): text.decode() for key, text in schema.metadata.items()}
        state = json.loads(metadata["trilith.state"])
        state[word] = value
        schema = schema.with_metadata(metadata | {"trilith.state": json.dumps(state)})
        return schema, [batch.replace_schema_metadata(schema.metadata) for batch in batches]

    return change


def cells_with(column: str, value: int) -> Callable:
    def change(schema, batches):
        columns = {name: batches[0].column(name).to_numpy().copy() for name in schema.names}
        columns[column][0] = value
        return schema, [pa.record_batch([pa.array(each) for each in columns.values()], schema=schema), *batches[1:]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(state_with(0, 1_000_000_000), id="head-far-behind-the-last-block"),
        pytest.param(state_with(0, -1), id="head-before-the-first-block"),
        pytest.param(state_with(1, -(2**62)), id="moves"),
        pytest.param(state_with(2, -1), id="failures"),
        pytest.param(cells_with("block", 60_000), id="block"),
        pytest.param(cells_with("cell", 2**32 - 1), id="cell"),
    ],
)
def test_a_filter_with_forged_numbers_is_refused_before_a_kernel_follows_them(make_store, tmp_path, change) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    forge(path, "filter", change)
    store = make_store()
    with pytest.raises(CheckpointError, match="filter-rare"):
        store.restore(path)
    assert dict(store.tables) == {}
    assert any("filter-rare" in problem for _, problem in snapshot.verify(path))


@pytest.mark.parametrize(
    "slots", [[["m", 2], ["v", 3], ["beta", 3]], [["m", 3]], [["m", -1]], [["m", 2**40]], [[7, 3]], "x", None]
)
def test_a_layout_that_does_not_fit_its_rows_is_refused(make_store, tmp_path, slots) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")

    def change(schema, batches):
        metadata = {key.decode(): text.decode() for key, text in schema.metadata.items()}
        layout = json.loads(metadata["trilith.layout"])
        layout[0]["slots"] = slots
        schema = schema.with_metadata(metadata | {"trilith.layout": json.dumps(layout)})
        return schema, [batch.replace_schema_metadata(schema.metadata) for batch in batches]

    forge(path, "rows", change)
    with pytest.raises(CheckpointError, match="damaged"):
        make_store().restore(path)


@pytest.mark.parametrize("kind", ["rows", "filter", "variables"])
def test_a_compressed_file_is_refused_before_it_is_unpacked(make_store, tmp_path, kind) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    forge(path, kind, lambda schema, batches: (schema, batches), compression="zstd")
    with pytest.raises(CheckpointError, match="compressed record batches"):
        make_store().restore(path)


def test_nulls_in_a_row_file_are_damage(make_store, tmp_path) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")

    def without_first(schema, batches):
        batch = batches[0]
        ids = pa.array([None, *batch.column(0).to_pylist()[1:]], pa.uint64())
        return schema, [pa.record_batch([ids, *batch.columns[1:]], schema=schema), *batches[1:]]

    forge(path, "rows", without_first)
    with pytest.raises(CheckpointError, match="nulls in column 'id'"):
        make_store().restore(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a/b", 7])
def test_a_manifest_names_files_of_its_own_directory_only(make_store, tmp_path, name) -> None:
    path = save_all(filled_cluster(make_store, 1), tmp_path / "ckpt")
    body = json.loads((Path(path) / checkpoint.MANIFEST).read_bytes())
    body["parts"][0]["files"][0]["name"] = name
    repack(path, body)
    with pytest.raises(
        CheckpointError, match=r"parts\.0\.files\.0.*(is no name of a file in the checkpoint's directory|valid string)"
    ):
        make_store().restore(path)


def test_a_failed_save_leaves_nothing_and_says_so_in_a_line(make_store, tmp_path, monkeypatch, caplog) -> None:
    (store,) = filled_cluster(make_store, 1)

    def full(*args: object) -> None:
        raise CheckpointError("no space left on device")

    monkeypatch.setattr(variable_files, "write", full)  # behind the rows
    writer = Checkpointer(store, str(tmp_path), every_s=10)
    assert not writer.write(10)
    (place,) = checkpoint.list_checkpoints(str(tmp_path))
    assert [name for name in place.names if not name.startswith("round.")] == []
    (record,) = [record for record in caplog.records if "checkpoint failed" in record.getMessage()]
    assert "no space left on device" in record.getMessage()
    assert not record.exc_info


def test_a_queue_file_is_read_as_a_queue_or_refused(tmp_path) -> None:
    folder = Folder(str(tmp_path))
    queue_files.write(
        folder, "queues.json", [QueueState(name="q", capacity=3, waiting=("a",), leased=((1, "w", 2.0, "b"),))]
    )
    good = json.loads(folder.read("queues.json"))
    assert queue_files.read(folder, "queues.json")[0].waiting == ("a",)
    for field, value in [
        ("waiting", "abc"),
        ("waiting", [1]),
        ("capacity", -1),
        ("capacity", 2**64),
        ("leased", [[2**63, "w", 2.0, "b"]]),
        ("leased", [[1, "w", float("inf"), "b"]]),
        ("leased", [[1, "w", 2.0, "b"], [1, "w", 2.0, "c"]]),
        ("name", None),
    ]:
        bad = json.loads(json.dumps(good))
        bad["queues"][0][field] = value
        folder.write("queues.json", json.dumps(bad).encode())
        with pytest.raises(CheckpointError, match="damaged"):
            queue_files.read(folder, "queues.json")
    folder.write("queues.json", b"[" * 100_000)
    with pytest.raises(CheckpointError, match="damaged"):
        queue_files.read(folder, "queues.json")


def test_a_part_says_when_it_was_begun(make_store, tmp_path) -> None:
    (store,) = filled_cluster(make_store, 1)
    moments = itertools.count(100)
    snapshot.save_shard(store, str(tmp_path), clock=lambda: float(next(moments)))
    (part,) = checkpoint.collect_parts(Folder(str(tmp_path)), 1) or []
    assert (part.began_unix_s, part.finished_unix_s, part.life) == (100.0, 101.0, store.life)

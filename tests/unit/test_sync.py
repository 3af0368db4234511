"""Parameter sync inside one process: touched ids, the change log, messages, replicas, and targets under faults."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToJson
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st

import trilith
from trilith.client import Client
from trilith.cluster import Cluster as TrilithCluster
from trilith.config import ClientConfig
from trilith.discovery.serving import ServingDirectory
from trilith.errors import ClusterMismatchError, InvalidRequestError, ReadOnlyError, UnavailableError
from trilith.ops.jit import JIT_DISABLED
from trilith.ops.memory import address_of
from trilith.rpc.remote import RemoteShard
from trilith.shard import ANY_WRITE, DensePart, IdPart, UpdatePart, Write
from trilith.tables import Fp16, RandomUniform, Sgd, table_config
from trilith_proto import parameter_sync_pb2, ps_pb2
from trilith_services.cli import main
from trilith_services.grpc.serve import Limits
from trilith_services.ps.engine.kernels import gather
from trilith_services.ps.engine.row_layout import serving_config
from trilith_services.ps.engine.stripes import Stripes
from trilith_services.ps.engine.table import Table
from trilith_services.ps.engine.touched import Touched, distinct
from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica, read_configs
from trilith_services.ps.replicas.sync import wire
from trilith_services.ps.replicas.sync.changes import ChangeLog
from trilith_services.ps.replicas.sync.encoded import EncodedChanges
from trilith_services.ps.replicas.sync.options import SyncOptions
from trilith_services.ps.replicas.sync.syncer import Syncer
from trilith_services.ps.replicas.sync.target import Target

DIM = 4
FAST = SyncOptions(interval_s=0.1, heartbeat_s=0.1, dense_every_s=0.1, retry_most_s=0.2, message_bytes=4096)
PATIENCE_S = 60.0


def u64(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint64)


def config(name: str = "user", **options) -> ps_pb2.TableConfig:
    given = {"dim": DIM, "optimizer": Sgd(learning_rate=1.0), "initializer": RandomUniform(-1, 1), "compressor": Fp16()}
    return table_config(name, **{**given, **options}).proto


def until(true: Callable[[], object]) -> None:
    """Wait for a state that must come."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what was touched ------------------------------------------------------------------------------------------------


def test_touched_gives_every_id_and_forgets_what_it_gave() -> None:
    touched = Touched(1 << 20)
    touched.add(u64(3, 1, 3))
    touched.add(u64(1, 2**64 - 1))
    ids, everything = touched.take()
    assert set(ids.tolist()) == {1, 3, 2**64 - 1}
    assert not everything
    assert touched.take()[0].size == 0


def test_more_ids_than_are_kept_make_the_whole_table_count_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilith_services.ps.engine.touched._MOST_ROOM", 64)
    touched = Touched(200)
    for _ in range(100):
        touched.add(np.arange(50, dtype=np.uint64))  # repeats are dropped and need no room
    ids, everything = touched.take()
    assert set(ids.tolist()) == set(range(50))
    assert not everything
    for start in range(0, 5000, 50):
        touched.add(np.arange(start, start + 50, dtype=np.uint64))
    ids, everything = touched.take()
    assert everything
    assert len(ids) == 0
    touched.add(u64(7))
    assert touched.take()[0].tolist() == [7]


def write_all_kinds(table: Table) -> set[int]:
    """Every kind of write, and the ids that it concerns."""
    ones = np.ones((2, DIM), np.float32)
    table.apply_gradients(u64(1, 2), ones, request_time=1)
    table.assign(u64(3, 4), ones, request_time=10**9)
    table.assign_add(u64(5, 6), ones, request_time=10**9)
    table.reinitialize(u64(7), request_time=10**9)
    table.import_rows(table.export_rows(u64(3))[1])
    table.erase(u64(4, 99))
    table.lookup(u64(1000))
    table.contains(u64(1001))
    return {1, 2, 3, 4, 5, 6, 7, 99}


def test_every_write_erasure_and_eviction_is_touched_and_no_read() -> None:
    table = Table(config())
    table.touched = Touched(1 << 16)
    want = write_all_kinds(table)
    assert set(table.touched.take()[0].tolist()) == want
    table.evict(10**9 + 36501 * 86400)
    gone = set(table.touched.take()[0].tolist())
    assert gone == {1, 2, 3, 5, 6, 7}
    table.clear()
    assert table.touched.take()[1]


def test_writes_go_on_while_it_is_begun_and_ended_to_note_what_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(config())
    kept = Touched(1 << 16)
    told = itertools.cycle([kept, None])  # somebody else changes it between any two looks
    monkeypatch.setattr(Stripes, "touched", property(lambda stripes: next(told)), raising=False)
    for _ in range(3):
        table.assign(u64(1, 2), np.ones((2, DIM), np.float32))
        table.evict(1)
        table.clear()
    assert len(table) == 0


def test_gather_gives_raw_rows_and_names_the_missing() -> None:
    table = Table(config())
    ids = np.arange(100, dtype=np.uint64)
    values = np.random.default_rng(0).normal(size=(100, DIM)).astype(np.float32)
    table.assign(ids, values)
    found, weights, missing = table.gather(u64(7, 200, 3, 2**64 - 1))
    assert found.tolist() == [7, 3]
    np.testing.assert_array_equal(weights, values[[7, 3]])
    assert missing.tolist() == [200, 2**64 - 1]
    assert sorted(i for s in range(table.stripes) for i in table.stripe_ids(s).tolist()) == ids.tolist()


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_reader_of_the_log_gets_what_came_after_its_cursor() -> None:
    log = ChangeLog(1000)
    log.append({"a": u64(1)}, [], ["a"], 0.0, 1.0)
    cursor, tables = log.join()
    assert tables == {"a"}
    log.append({"a": u64(2, 3)}, [], ["a"], 1.0, 2.0)
    log.append({"a": u64(3, 4), "b": u64(9)}, ["b"], ["a", "b"], 2.0, 3.0)
    changes = log.read(cursor)
    assert sorted(changes.ids["a"].tolist()) == [2, 3, 4]
    assert changes.ids["b"].tolist() == [9]
    assert changes.whole == {"b"}
    assert (changes.since, changes.until) == (1.0, 3.0)
    assert log.waiting(cursor) == (5, 1.0)
    assert log.waiting(changes.cursor) == (0, 0.0)


def test_a_log_that_is_full_merges_its_batches_and_then_drops_them() -> None:
    log = ChangeLog(100)
    start, _ = log.join()
    for _ in range(20):
        log.append({"a": np.arange(30, dtype=np.uint64)}, [], ["a"], 0.0, 1.0)
    changes = log.read(start)
    assert len(changes.ids["a"]) == 30
    for part in range(20):
        log.append({"a": np.arange(30 * part, 30 * part + 30, dtype=np.uint64)}, [], ["a"], 0.0, 1.0)
    lost = log.read(start)
    assert lost.whole == {"a"}
    assert not lost.ids
    assert log.read(lost.cursor).whole == frozenset()


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=20), min_size=1, max_size=4))
def test_distinct_is_the_union(pieces: list[list[int]]) -> None:
    got = distinct(*(np.array(piece, np.uint64) for piece in pieces)).tolist()
    assert len(got) == len(set(got))
    assert set(got) == {i for piece in pieces for i in piece}


VARINTS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda bit: 2**bit))


@given(st.lists(st.one_of(VARINTS, VARINTS.map(lambda i: max(0, i - 1))), min_size=1, max_size=40))
def test_ids_are_packed_as_the_protobuf_library_packs_them(ids: list[int]) -> None:
    array = np.array(ids, np.uint64)
    out = np.zeros(10 * len(ids), np.uint8)
    size = gather.pack_ids(address_of(array), len(ids), address_of(out))
    want = parameter_sync_pb2.DeltaEmbeddingHashTable(fids=array.view(np.int64).tolist()).SerializeToString()
    assert want.endswith(out[:size].tobytes())
    back = np.zeros(size, np.uint64)
    assert gather.unpack_ids(address_of(out), size, address_of(back)) == len(ids)
    assert back[: len(ids)].tolist() == ids
    cut = gather.unpack_ids(address_of(out), size - 1, address_of(back))
    assert cut == (len(ids) - 1 if ids[-1] < 128 else -1)


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(0, 6))
def test_dropping_repeats_drops_no_id(ids: list[int], bits: int) -> None:
    array, out, recent = np.array(ids, np.uint64), np.zeros(len(ids), np.uint64), np.zeros(1 << bits, np.uint64)
    count = gather.drop_repeats(address_of(array), len(ids), address_of(recent), len(recent) - 1, address_of(out))
    kept = out[:count].tolist()
    assert set(kept) == set(ids)
    rest = iter(ids)
    assert all(each in rest for each in kept)  # in their order


# ---- messages --------------------------------------------------------------------------------------------------------


def a_delta(**options) -> wire.Delta:
    weights = np.arange(3 * DIM, dtype=np.float32).reshape(3, DIM)
    return wire.Delta("user", DIM, u64(1, 2**63, 2**64 - 1), weights, u64(5), **options)


def check_delta(got: wire.Delta, want: wire.Delta) -> None:
    assert (got.table, got.dim, got.copy_begins, got.copy_ends) == (
        want.table,
        want.dim,
        want.copy_begins,
        want.copy_ends,
    )
    assert got.config == want.config
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.weights, want.weights)
    np.testing.assert_array_equal(got.erased, want.erased)


def test_a_push_is_what_the_protobuf_library_reads_and_writes() -> None:
    delta = a_delta(config=config(), copy_begins=True, copy_ends=True)
    header = parameter_sync_pb2.PushRequest(model_name="ps_0", stream=7, sequence=300, as_of=1.5)
    data = wire.pack_push(header, [delta])
    whole = parameter_sync_pb2.PushRequest.FromString(data)
    (table,) = whole.delta_hash_tables
    assert (table.unique_id, table.dim_size, whole.sequence) == ("user", DIM, 300)
    assert list(table.fids) == [1, -(2**63), -1]
    assert list(table.embeddings) == delta.weights.ravel().tolist()
    assert list(table.erased) == [5]
    for encoded in (data, whole.SerializeToString()):
        head, (got,) = wire.unpack_push(encoded)
        assert head == header
        check_delta(got, delta)


def test_unpacked_arrays_of_other_programs_are_read() -> None:
    # 3: fids, one varint each; 4: embeddings, one fixed32 each; as proto2 writes them without [packed].
    body = b"\x0a\x04user\x10\x01" + b"\x18\x05\x18\x06" + b"\x25\x00\x00\x80\x3f\x25\x00\x00\x00\x40"
    _, (delta,) = wire.unpack_push(b"\x2a" + bytes([len(body)]) + body)  # in delta_multi_hash_tables
    check_delta(delta, wire.Delta("user", 1, u64(5, 6), np.array([[1], [2]], np.float32)))


@settings(max_examples=100)
@given(st.data())
def test_damaged_pushes_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    good = wire.pack_push(parameter_sync_pb2.PushRequest(stream=1), [a_delta()])
    broken = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.unpack_push(bytes(broken))
    except InvalidRequestError:
        pass


# ---- the replica -----------------------------------------------------------------------------------------------------


class Pushes:
    """Pushes by hand."""

    def __init__(self, **options) -> None:
        self.replica = Replica(LocalShard(threads=1), **options)
        self.stream, self.sequence = 1, 0

    def __call__(self, *deltas: wire.Delta, **fields) -> parameter_sync_pb2.PushResponse:
        self.sequence += 1
        given = {"stream": self.stream, "sequence": self.sequence, "shard_index": 0, "shard_count": 1}
        return self.replica.push(wire.pack_push(parameter_sync_pb2.PushRequest(**{**given, **fields}), deltas))

    def begin(self) -> None:
        self.stream += 1
        assert self(stream_begins=True).status_code == 0

    def rows(self, *ids: int) -> list[bool]:
        return self.replica.store.contains(IdPart("user", u64(*ids))).tolist()


def rows_of(*ids: int, value: float = 1.0, **options) -> wire.Delta:
    return wire.Delta("user", DIM, u64(*ids), np.full((len(ids), DIM), value, np.float32), **options)


BEGIN = {"config": config(), "copy_begins": True}


def test_a_replica_compresses_what_it_is_sent() -> None:
    push = Pushes()
    push.begin()
    assert push(rows_of(1, 2, value=0.1, **BEGIN)).update_num == 2
    (rows,) = push.replica.store.lookup([IdPart("user", u64(1, 2, 3))])
    np.testing.assert_array_equal(rows[:2], np.full((2, DIM), np.float16(0.1), np.float32))
    assert not rows[2].any()
    assert push.replica.store.table("user").layout.serving


def test_rows_that_a_copy_does_not_bring_are_dropped_when_it_ends_and_not_before() -> None:
    push = Pushes()
    push.begin()
    push(rows_of(1, 2, **BEGIN))
    push(rows_of(3, copy_ends=True))
    push(rows_of(4))
    push.begin()
    push(rows_of(2, **BEGIN))
    assert push.rows(1, 2, 3, 4) == [True] * 4
    push(rows_of(5))  # a change beside the copy
    push(rows_of(**BEGIN))  # the answer to the first was lost
    push(rows_of(2, 3, copy_ends=True))
    assert push.rows(1, 2, 3, 4) == [False, True, True, False]


def test_a_push_that_arrives_late_does_nothing() -> None:
    push = Pushes()
    push.begin()
    push(rows_of(1, value=1.0, **BEGIN))
    push(rows_of(1, value=2.0), sequence=10)
    assert push(rows_of(1, value=3.0), sequence=9).status_code == grpc.StatusCode.ABORTED.value[0]
    assert push(rows_of(1, value=3.0), sequence=10).status_code == grpc.StatusCode.ABORTED.value[0]
    assert push.replica.store.lookup([IdPart("user", u64(1))])[0][0, 0] == 2.0


def test_a_replica_that_does_not_know_the_stream_asks_for_a_copy() -> None:
    push = Pushes()
    unknown = grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert push(rows_of(1)).status_code == unknown
    push.begin()
    assert push(rows_of(1)).status_code == unknown  # a table whose copy did not begin
    push.begin()
    assert push(rows_of(1, **BEGIN)).status_code == 0


def test_tables_and_variables_that_are_gone_go() -> None:
    push = Pushes()
    push.begin()
    spec = ps_pb2.VariableSpec(name="w", size=2)
    spec.optimizer.sgd.SetInParent()
    half = np.ones(1, np.float32).tobytes()
    pieces = [parameter_sync_pb2.DeltaVariable(spec=spec, offset=i, values=half) for i in range(2)]
    push(rows_of(1, **BEGIN), delta_variables=pieces[:1])
    assert len(push.replica.store.variables) == 0  # half of it
    push(delta_variables=pieces[1:])
    assert push.replica.store.pull_variables([("w", 0)])[0][0].tolist() == [1.0, 1.0]
    kept = parameter_sync_pb2.Inventory(tables=["user"])
    kept.variables.add(name="w", partition=0)
    push(inventory=kept)
    assert (len(push.replica.store.variables), set(push.replica.store.tables)) == (1, {"user"})
    push(inventory=parameter_sync_pb2.Inventory())
    assert (len(push.replica.store.variables), set(push.replica.store.tables)) == (0, set())


def test_a_table_of_another_config_replaces_the_old_one_when_its_copy_ends() -> None:
    push = Pushes()
    push.begin()
    push(rows_of(1, copy_ends=True, **BEGIN))
    push.begin()
    wide = np.ones((1, 2 * DIM), np.float32)
    other = config(dim=2 * DIM)
    push(wire.Delta("user", 2 * DIM, u64(2), wide, config=other, copy_begins=True))
    assert push.rows(1, 2) == [True, False]
    push(wire.Delta("user", 2 * DIM, u64(3), wide, copy_ends=True))
    assert push.rows(1, 2, 3) == [False, True, True]


def test_a_replicas_own_config_is_kept_and_a_wrong_one_refused() -> None:
    own = serving_config(config())
    own.hash_table.entry_config.segments[0].comp_config.fixed_r8.r = 1.0
    push = Pushes(configs=read_configs(f"[{MessageToJson(own)}]"))
    push.begin()
    push(rows_of(1, value=0.3, **BEGIN))
    row = push.replica.store.lookup([IdPart("user", u64(1))])[0][0, 0]
    assert row not in (np.float32(0.3), np.float32(np.float16(0.3)))
    assert row == pytest.approx(0.3, abs=0.01)
    with pytest.raises(InvalidRequestError, match="table name ''"):
        read_configs("[{}]")
    with pytest.raises(InvalidRequestError, match="SERVING rows, not TRAINING"):
        read_configs(f"[{MessageToJson(config())}]")


def test_pushes_of_another_shard_are_refused() -> None:
    with pytest.raises(ClusterMismatchError, match="shard 0 of 1; the push comes from shard 1 of 2"):
        Pushes()(shard_index=1, shard_count=2)


def variable(**options) -> ps_pb2.VariableSpec:
    spec = ps_pb2.VariableSpec(**{"name": "w", "size": 2, **options})
    spec.optimizer.sgd.SetInParent()
    return spec


def piece(offset: int = 0, floats: int = 1, extra: bytes = b"", **options) -> parameter_sync_pb2.DeltaVariable:
    return parameter_sync_pb2.DeltaVariable(spec=variable(**options), offset=offset, values=bytes(4 * floats) + extra)


WIDE = np.ones((1, 2 * DIM), np.float32)
FORGED = {
    "a time to come": ((), {"as_of": time.time() + 10 * 86400}, "as_of=.* is no time up to now"),
    "milliseconds": ((), {"as_of": 1000 * time.time()}, "as_of="),
    "no time": ((), {"as_of": float("nan")}, "as_of=nan"),
    "a step below 0": ((), {"global_step": -1}, "global_step=-1"),
    "no stream": ((), {"stream": 0, "stream_begins": True}, "stream 0"),
    "another service": ((), {"signature_name": "predict"}, "signature 'predict'"),
    "another size": ((wire.Delta("user", 2 * DIM, u64(9), WIDE),), {}, "rows of 4 floats here and of 8 in the push"),
    "no config": ((rows_of(9, copy_begins=True),), {}, "begins without a config"),
    "another's config": ((rows_of(9, copy_begins=True, config=config("item")),), {}, "its config is of table 'item'"),
    "a config of another size": ((rows_of(9, copy_begins=True, config=config(dim=5)),), {}, "rows of 5 floats"),
    "a config that is none": ((rows_of(9, copy_begins=True, config=ps_pb2.TableConfig(name="user")),), {}, "no type"),
    "a huge variable": ((), {"delta_variables": [piece(size=2**60)]}, "of 1152921504606846976 floats"),
    "an empty variable": ((), {"delta_variables": [piece(size=0)]}, "of 0 floats"),
    "a nameless variable": ((), {"delta_variables": [piece(name="")]}, "it takes a name"),
    "the middle of a variable": ((), {"delta_variables": [piece(1)]}, r"floats 1\.\.2 of 2"),
    "too much of it": ((), {"delta_variables": [piece(floats=3)]}, r"floats 0\.\.3 of 2"),
    "a gap": ((), {"delta_variables": [piece(size=9), piece(3, size=9)]}, r"floats 3\.\.4 of 9"),
    "another size in the middle": ((), {"delta_variables": [piece(size=9), piece(1, size=99)]}, r"1\.\.2 of 99"),
    "a broken float": ((), {"delta_variables": [piece(floats=0, extra=b"abc")]}, r"\(3 bytes\)"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_push_that_makes_no_sense_is_refused_before_it_changes_anything(what: str) -> None:
    deltas, fields, why = FORGED[what]
    push = Pushes()
    push.begin()
    push(rows_of(1, copy_ends=True, **BEGIN), delta_variables=[piece(floats=2, name="kept")], as_of=5.0)
    before = push.replica.stats
    with pytest.raises(InvalidRequestError, match=why):
        push(rows_of(2, 3), *deltas, inventory=parameter_sync_pb2.Inventory(tables=["user"]), **fields)
    assert push.rows(1, 2, 3, 9) == [True, False, False, False]
    assert [each.spec.name for each in push.replica.store.variables] == ["kept"]
    assert push.replica.stats == before
    push.sequence -= 1  # nor is it the last one seen
    assert push(rows_of(2)).status_code == 0


def test_rows_that_an_export_brought_are_not_changed_before_their_copy_begins(tmp_path) -> None:
    push = Pushes()
    push.replica.store.put_table(push.replica.store.new_table(serving_config(config())))
    push.begin()
    assert push(rows_of(1)).status_code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert push.rows(1) == [False]


def test_pushes_of_another_ps_by_name_are_refused() -> None:
    with pytest.raises(ClusterMismatchError, match="serves ps_0; the push is of clicks:ps_1"):
        Pushes()(model_name="clicks:ps_1")
    assert Pushes()(model_name="clicks:ps_0", stream_begins=True).status_code == 0


# ---- all of it -------------------------------------------------------------------------------------------------------


class Cluster:
    """A training store, its syncer, and replicas behind real gRPC servers."""

    def __init__(self, options: SyncOptions = FAST) -> None:
        self.store = LocalShard(threads=1)
        self.store.create_tables([config()])
        self.syncer = Syncer(self.store, options)
        self.replicas: dict[str, ReplicaServer] = {}
        self.stores: dict[str, LocalShard] = {}
        self.ports: dict[str, int] = {}

    def start(self, name: str, *, port: int = 0, reflection: bool = False) -> None:
        store = LocalShard(threads=1)
        options = ReplicaOptions(limits=Limits(reflection=reflection))
        self.replicas[name], self.stores[name] = ReplicaServer(Replica(store), options), store
        self.ports[name] = self.replicas[name].start(f"127.0.0.1:{port}")

    def add(self, name: str) -> None:
        self.syncer.add(name, f"127.0.0.1:{self.ports[name]}")

    def end(self, name: str) -> None:
        self.replicas.pop(name).stop()

    def synced(self) -> bool:
        self.syncer.look()
        return all(not each.lag_rows and not each.lag_seconds and not each.copying for each in self.syncer.stats())

    def check(self) -> None:
        """Every row at every replica equals the compressed training row; nothing else is there."""
        until(self.synced)
        for name in self.replicas:
            until(lambda there=self.stores[name]: set(there.tables) == set(self.store.tables))
            for table in self.store.tables.values():
                there = self.stores[name].table(table.name)
                ids = np.concatenate([table.stripe_ids(s) for s in range(table.stripes)])
                assert len(there) == len(ids)
                _, weights, _ = table.gather(ids)
                np.testing.assert_array_equal(there.lookup(table.gather(ids)[0]), weights.astype(np.float16))

    def close(self) -> None:
        self.syncer.stop()
        for replica in self.replicas.values():
            replica.stop()
        self.store.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def steps(store: LocalShard, seed: int, count: int = 300, *, table: str = "user") -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2000, count).astype(np.uint64)
    store.apply_gradients([UpdatePart(table, ids, rng.normal(size=(count, DIM)).astype(np.float32))], ANY_WRITE)


def test_replicas_that_come_and_go_under_traffic_end_equal_to_training(cluster: Cluster) -> None:
    stop = threading.Event()

    def train() -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            steps(cluster.store, seed, 20 if JIT_DISABLED else 300)
            cluster.store.erase(IdPart("user", u64(seed % 2000, (7 * seed) % 2000)), ANY_WRITE)
            stop.wait(0.002)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        cluster.start("a")
        cluster.add("a")
        until(lambda: cluster.syncer.stats()[0].rows > 100)
        cluster.start("b")
        cluster.add("b")
        port = cluster.ports["a"]
        for _ in range(2):  # killed and restarted, empty
            cluster.end("a")
            until(lambda: cluster.syncer.stats()[0].error)
            cluster.start("a", port=port)
            until(lambda: not cluster.syncer.stats()[0].error)
        cluster.store.create_tables([config("item")])
        steps(cluster.store, 1, table="item")
        until(lambda: "item" in cluster.stores["b"].tables)
    finally:
        stop.set()
        trainer.join()
    cluster.check()
    found = {each.name: each for each in cluster.syncer.stats()}
    assert found["a"].copies >= 3
    assert found["b"].copies == 1
    assert found["b"].failures == 0


class Unreliable:
    """Loses pushes and answers, and does old pushes again."""

    def __init__(self, replica: Replica, seed: int) -> None:
        self._push = replica.push
        self._random = random.Random(seed)
        self._old: list[bytes] = []
        self.lost = 0
        self.reliable = False
        replica.push = self.push  # type: ignore[method-assign]

    def push(self, data: bytes) -> parameter_sync_pb2.PushResponse:
        if self.reliable:
            return self._push(data)
        what = self._random.random()
        self.lost += what < 0.5
        if what < 0.25:
            self._old.append(data)
            raise UnavailableError("the push was lost")
        answer = self._push(data)
        if what < 0.5:
            raise UnavailableError("the answer was lost")
        if self._old and what < 0.6:
            assert self._push(self._old.pop(0)).status_code != 0  # it was given up, and comes late
        return answer


@pytest.mark.parametrize("seed", range(1 if JIT_DISABLED else 4))
def test_lost_pushes_lost_answers_and_late_pushes_change_nothing_in_the_end(seed: int) -> None:
    options = SyncOptions(
        interval_s=0.1, heartbeat_s=0.05, dense_every_s=0.1, retry_first_s=0.001, retry_most_s=0.002, message_bytes=4096
    )
    made = Cluster(options)
    try:
        made.start("a")
        unreliable = Unreliable(made.replicas["a"].servicer._replica, seed)
        made.store.create_tables([config("item")])
        made.add("a")
        count = 20 if JIT_DISABLED else 120
        for number in range(count):
            for table in ("user", "item"):
                steps(made.store, number, 20 if JIT_DISABLED else 200, table=table)
                made.store.erase(IdPart(table, np.arange(number, 2000, 97, dtype=np.uint64)), ANY_WRITE)
            if number == count // 3:
                made.store.clear(["user"], ANY_WRITE)
            if number == count // 2:
                made.store.put_table(made.store.new_table(config("item")))
            if number % 5 == 0:
                made.syncer.look()
            time.sleep(0.004)
        until(lambda: unreliable.lost > 20)
        unreliable.reliable = True
        made.check()
        assert len(made.stores["a"].table("item")) > 0
    finally:
        made.close()


def test_clearing_and_restoring_reach_the_replica(cluster: Cluster) -> None:
    steps(cluster.store, 1)
    cluster.start("a")
    cluster.add("a")
    cluster.check()
    assert len(cluster.stores["a"].table("user")) > 0
    cluster.store.clear(["user"], ANY_WRITE)
    cluster.check()
    assert len(cluster.stores["a"].table("user")) == 0
    other = cluster.store.new_table(config())
    other.assign(u64(5), np.ones((1, DIM), np.float32))
    steps(cluster.store, 2)
    cluster.check()
    cluster.store.replace_content({"user": other}, [], [], 3, "ckpt")  # as a restore does
    cluster.check()
    assert len(cluster.stores["a"].table("user")) == 1
    cluster.store.clear(["user"], ANY_WRITE)
    cluster.store.replace_content({}, [], [], 4, "ckpt")
    cluster.check()


def test_a_replica_that_lags_beyond_what_is_kept_is_given_whole_tables() -> None:
    made = Cluster(SyncOptions(interval_s=0.1, heartbeat_s=0.1, retry_most_s=0.1, noted_bytes=8192, message_bytes=4096))
    try:
        made.start("a")
        made.add("a")
        made.check()
        made.end("a")
        port = made.ports["a"]
        for start in range(0, 1500 if JIT_DISABLED else 20_000, 500):
            ids = np.arange(start, start + 500, dtype=np.uint64)
            made.store.assign([UpdatePart("user", ids, np.ones((500, DIM), np.float32))], ANY_WRITE)
            made.syncer.look()
        made.start("a", port=port)
        made.check()
    finally:
        made.close()


def test_a_replica_of_a_table_that_changes_all_over_all_the_time_is_filled() -> None:
    made = Cluster(SyncOptions(interval_s=30.0, heartbeat_s=0.1, noted_bytes=8192, message_bytes=4096))
    ids = np.arange(3000, dtype=np.uint64)
    busy = threading.Event()
    busy.set()

    def write() -> None:
        made.store.assign([UpdatePart("user", ids, np.full((3000, DIM), time.time() % 97, np.float32))], ANY_WRITE)
        made.syncer.look()  # which finds more than is noted

    try:
        write()
        made.start("a")
        replica = made.replicas["a"].servicer._replica
        push = replica.push

        def push_while_all_changes(data: bytes) -> parameter_sync_pb2.PushResponse:
            if busy.is_set():
                write()
            return push(data)

        replica.push = push_while_all_changes  # type: ignore[method-assign]
        made.add("a")
        until(replica.complete.is_set)
        first = replica.stats.as_of
        assert 0 < time.time() - first < PATIENCE_S
        until(lambda: replica.stats.as_of > first)  # another copy has ended
        assert made.syncer.stats()[0].copying
        assert made.syncer.stats()[0].lag_seconds < PATIENCE_S
        busy.clear()
        made.check()
    finally:
        busy.clear()
        made.close()


class FakeChannel(Target):
    """A target whose pushes are kept; the test takes its turns."""

    def __init__(self, name: str, store: LocalShard, changes: ChangeLog, encoded: EncodedChanges) -> None:
        super().__init__(name, "127.0.0.1:1", store, changes, FAST, encoded)
        self.pushed: list[bytes] = []
        self._push = self.keep

    def keep(self, message: bytes, *, timeout: float) -> bytes:
        self.pushed.append(message)
        return parameter_sync_pb2.PushResponse().SerializeToString()


def test_a_copy_goes_on_however_much_changes_beside_it() -> None:
    store = LocalShard(threads=1)
    store.create_tables([config()])
    ids = np.arange(3000, dtype=np.uint64)
    store.assign([UpdatePart("user", ids, np.ones((3000, DIM), np.float32))], ANY_WRITE)
    changes = ChangeLog(1 << 20)
    changes.append({}, (), ["user"], 1.0, 2.0)
    target = FakeChannel("a", store, changes, EncodedChanges())
    target._turn()  # the copy has begun
    begun = wire.unpack_push(target.pushed[-1])[0].rows_to_come
    assert begun > 2000
    changes.append({"user": ids}, (), ["user"], 2.0, 3.0)  # as much as there is to be copied
    target.pushed.clear()
    target._turn()
    target._channel.close()
    sent = sum(len(delta.ids) for each in target.pushed for delta in wire.unpack_push(each)[1])
    assert sent > 3000 + 2000
    assert wire.unpack_push(target.pushed[-1])[0].rows_to_come < 500
    store.close()


def test_what_changed_is_encoded_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalShard(threads=1)
    store.create_tables([config()])
    gathered: list[int] = []
    gather_rows = Table.gather

    def counted(table: Table, ids: np.ndarray, *room: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gathered.append(len(ids))
        return gather_rows(table, ids, *room)

    changes, encoded = ChangeLog(1 << 20), EncodedChanges()
    changes.append({}, (), ["user"], 1.0, 2.0)
    encoded.wanted = True
    targets = [FakeChannel(name, store, changes, encoded) for name in ("a", "b", "c")]
    for each in targets:
        each._turn()  # of an empty table
    ids = np.arange(500, dtype=np.uint64)
    store.assign([UpdatePart("user", ids, np.ones((500, DIM), np.float32))], ANY_WRITE)
    store.erase(IdPart("user", u64(7)), ANY_WRITE)
    changes.append({"user": ids}, (), ["user"], 2.0, 3.0)
    monkeypatch.setattr(Table, "gather", counted)
    for each in targets:
        each.pushed.clear()
        each._turn()
        each._channel.close()
    assert sum(gathered) == 500
    for each in targets:
        deltas = [delta for push in each.pushed for delta in wire.unpack_push(push)[1]]
        sent = [one for delta in deltas for one in delta.ids.tolist()]
        assert sorted(sent) == [one for one in range(500) if one != 7]
        assert [one for delta in deltas for one in delta.erased.tolist()] == [7]
        assert wire.unpack_push(each.pushed[-1])[0].as_of == 3.0
        assert (each.stats().rows, each.stats().erased) == (499, 1)
        assert each.stats().bytes >= sum(map(len, each.pushed))
    # What is restored under the same name is not what was encoded.
    fresh = store.new_table(config())
    fresh.assign(u64(1), np.full((1, DIM), 5.0, np.float32))
    delta = wire.Delta("user", DIM, ids[:1].copy(), np.empty((0, DIM), np.float32))
    assert encoded.get(1, 0, delta, fresh).erased == 1
    assert encoded.nbytes > 0
    encoded.forget(1 << 20)
    assert encoded.nbytes == 0
    store.close()


def test_dense_variables_and_the_step_travel_and_the_replica_says_how_fresh_it_is(cluster: Cluster) -> None:
    spec = ps_pb2.VariableSpec(name="w", size=3000)  # more than one message
    spec.optimizer.sgd.learning_rate = 1.0
    cluster.store.create_variables([spec], [np.zeros(3000, np.float32)])
    cluster.start("a")
    before = time.time()
    cluster.add("a")
    there = cluster.stores["a"]
    until(lambda: len(there.variables))
    grads = -np.arange(3000, dtype=np.float32)
    cluster.store.apply_dense_gradients([DensePart("w", 0, grads)], Write(global_step=7))
    until(lambda: there.pull_variables([("w", 0)])[0][0][1] == 1.0)
    np.testing.assert_array_equal(there.pull_variables([("w", 0)])[0][0], -grads)
    until(lambda: there.global_step() == 7)
    stats = cluster.replicas["a"].servicer.stats()
    until(lambda: cluster.replicas["a"].servicer.stats().replica.as_of > before)
    assert stats.HasField("replica")


def test_a_replica_answers_reads_and_refuses_writes(cluster: Cluster) -> None:
    steps(cluster.store, 1)
    cluster.start("a")
    shard = RemoteShard(lambda: f"127.0.0.1:{cluster.ports['a']}", ClientConfig(timeout_s=20))
    assert shard.describe().shard_count == 1
    cluster.add("a")
    cluster.check()
    ids = np.arange(2000, dtype=np.uint64)
    (rows,) = shard.lookup([IdPart("user", ids)])
    np.testing.assert_array_equal(rows, cluster.store.lookup([IdPart("user", ids)])[0].astype(np.float16))
    assert shard.contains(IdPart("user", ids)).any()
    assert shard.global_step() == 0
    row = np.ones((1, DIM), np.float32)
    for write in (
        lambda: shard.assign([UpdatePart("user", u64(1), row)], ANY_WRITE),
        lambda: shard.apply_gradients([UpdatePart("user", u64(1), row)], ANY_WRITE),
        lambda: shard.erase(IdPart("user", u64(1)), ANY_WRITE),
        lambda: shard.clear(["user"], ANY_WRITE),
        lambda: shard.global_step(set_to=4),
        lambda: shard.create_tables([config("x")]),
    ):
        with pytest.raises(ReadOnlyError):
            write()
    with trilith.connect(f"static://127.0.0.1:{cluster.ports['a']}") as client:  # the plain client reads it too
        assert client.table("user").lookup(ids).shape == (2000, DIM)
    shard.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nonsense"], "neither name=host:port nor the URL"),
        (["a=b"], "not host:port"),
        (["a=h:1", "a=h:2"], "names 'a' twice"),
    ],
)
def test_what_cannot_be_a_target_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ps", *(word for each in given for word in ("--sync-to", each))])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_replicas_are_found_in_a_directory_and_forgotten_when_they_leave_it(cluster: Cluster, tmp_path) -> None:
    url = f"hosts://{tmp_path}"
    listed = ServingDirectory(url, "clicks").replicas(0)
    try:
        cluster.syncer.follow(listed)
        assert cluster.syncer.stats() == []
        for name, number in (("a", 3), ("b", 7)):
            store = LocalShard(threads=1)
            options = ReplicaOptions(replica=number)
            cluster.stores[name] = store
            cluster.replicas[name] = ReplicaServer(
                Replica(store), options, listed=ServingDirectory(url, "clicks").replicas(0)
            )
            cluster.ports[name] = cluster.replicas[name].start()
        steps(cluster.store, 1)
        until(lambda: [each.name for each in cluster.syncer.stats()] == ["replica-3", "replica-7"])
        until(lambda: all(len(store.tables) for store in cluster.stores.values()))
        cluster.check()
        cluster.end("a")
        until(lambda: [each.name for each in cluster.syncer.stats()] == ["replica-7"])
        other = ServingDirectory(url, "clicks").replicas(1)
        other.announce(0, "127.0.0.1:1", available=True)  # another shard's
        other.close()
        steps(cluster.store, 2)
        cluster.check()
        assert [each.name for each in cluster.syncer.stats()] == ["replica-7"]
    finally:
        cluster.syncer.stop()
        listed.close()


def test_a_replica_is_described_by_reflection_and_healthy_once_it_is_filled(cluster: Cluster) -> None:
    cluster.start("a", reflection=True)
    with grpc.insecure_channel(f"127.0.0.1:{cluster.ports['a']}") as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"trilith.ParameterServer", "monolith.parameter_sync.ParameterSync"} <= set(services)
        health = health_pb2_grpc.HealthStub(channel)

        def status(service: str) -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=service)).status

        assert status("") == health_pb2.HealthCheckResponse.NOT_SERVING
        cluster.add("a")
        for service in ("", "trilith.ParameterServer", "monolith.parameter_sync.ParameterSync"):
            until(lambda service=service: status(service) == health_pb2.HealthCheckResponse.SERVING)


def test_exported_rows_are_served_until_training_sends_its_own(cluster: Cluster, tmp_path) -> None:
    exported = LocalShard(threads=1)
    exported.create_tables([serving_config(config())])
    exported.assign([UpdatePart("user", u64(1, 2), np.ones((2, DIM), np.float32))], ANY_WRITE)
    with Client(TrilithCluster([exported], ClientConfig())) as client:
        client.save(str(tmp_path))
    store = LocalShard(threads=1)
    server = ReplicaServer(Replica(store), ReplicaOptions(rows=str(tmp_path)))
    cluster.replicas["a"], cluster.stores["a"] = server, store
    cluster.ports["a"] = server.start()
    shard = RemoteShard(lambda: f"127.0.0.1:{cluster.ports['a']}", ClientConfig(timeout_s=20))
    assert shard.contains(IdPart("user", u64(1, 2, 3))).tolist() == [True, True, False]
    cluster.store.assign([UpdatePart("user", u64(2, 3), np.zeros((2, DIM), np.float32))], ANY_WRITE)
    cluster.add("a")
    cluster.check()
    assert shard.contains(IdPart("user", u64(1, 2, 3))).tolist() == [False, True, True]
    shard.close()


def test_what_is_not_sent_yet_is_sent_before_the_training_ps_ends() -> None:
    made = Cluster(SyncOptions(interval_s=30.0, heartbeat_s=30.0, dense_every_s=30.0))
    try:
        spec = ps_pb2.VariableSpec(name="w", size=2)
        spec.optimizer.sgd.learning_rate = 1.0
        made.store.create_variables([spec], [np.zeros(2, np.float32)])
        made.start("a")
        made.add("a")
        until(lambda: "user" in made.stores["a"].tables and not made.syncer.stats()[0].copying)
        steps(made.store, 1)
        until(lambda: len(made.stores["a"].variables))
        made.store.assign_variables([DensePart("w", 0, np.ones(2, np.float32))], ANY_WRITE)
        made.syncer.stop(flush_s=PATIENCE_S)
        assert len(made.stores["a"].table("user")) == len(made.store.table("user"))
        assert made.stores["a"].pull_variables([("w", 0)])[0][0].tolist() == [1.0, 1.0]
    finally:
        made.close()


def test_without_targets_nothing_is_noted(cluster: Cluster) -> None:
    table = cluster.store.table("user")
    cluster.start("a")
    cluster.add("a")
    until(lambda: table.touched is not None)
    cluster.syncer.remove("a")
    until(lambda: table.touched is None)
    cluster.syncer.remove("a")
    assert cluster.syncer.stats() == []

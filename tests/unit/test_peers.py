"""Ranks as threads of this process: what does not need processes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import distributed

import trilith
from tests.ranks import Rank, Ranks, on_every_rank
from trilith.data.parse.sharding import FeatureFids
from trilith.errors import (
    ClosedError,
    ClusterMismatchError,
    InvalidRequestError,
    NonFiniteError,
    UnknownTableError,
    UnknownVariableError,
)
from trilith.nn import EmbeddingBag, EmbeddingCollection, Feature, FusedLayouts
from trilith.ops.layout_config import OutConfig, OutType, SliceConfig
from trilith.ops.ragged import Ragged
from trilith.peers import PeerClient, connect_peers
from trilith.tables import Adagrad, HashTableConfig, RandomUniform, Sgd, Zeros
from trilith.tables.config import Segment
from trilith.tables.factories import create_merged_tables, create_partitioned_tables
from trilith.tables.partitioned import PartitionedFeature
from trilith_proto.hash_table_pb2 import EmbeddingHashTableConfig

TABLE = {"dim": 1, "optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()}


def together(size, work, **options):
    """Call work(client, rank) on every rank; what each gave."""
    meetings = [Ranks(size) for _ in range(5)]  # one for each of a client's threads that exchange

    def run(rank):
        made = iter(meetings)
        with PeerClient(lambda rows: Rank(next(made), rank), threads=1, **options) as client:
            return work(client, rank)

    return on_every_rank(meetings, run)


def test_from_five_ranks_on_rank_0_holds_no_rows_and_its_checkpoint_is_of_four_shards(tmp_path):
    def work(client, rank):
        client.table("t", **TABLE)
        client.apply_gradients({"t": (np.arange(20), np.full((20, 1), rank, np.float32))})
        client.create_variables({"w": np.full(3, 2, np.float32)}, optimizer=Sgd())
        client.save(str(tmp_path / "five"))
        return sum(table.rows for shard in client.stats() for table in shard.tables), client.pull_variables()[0]["w"]

    found = together(5, work)
    assert [rows for rows, _ in found] == [0, 5, 5, 5, 5]
    assert all(values.tolist() == [2, 2, 2] for _, values in found)
    with trilith.connect("local://", threads=1) as client:
        client.restore(str(tmp_path / "five"))
        assert client.lookup({"t": range(20)})["t"].ravel().tolist() == [-10] * 20


def test_verbs_on_ids_and_tables_are_those_of_a_client():
    high = 2**63 + 9  # as the first version's fids of high slots are

    def work(client, rank):
        table = client.table("t", ttl_days=1, **TABLE)
        other = client.table("other", **TABLE)
        mine = [high + rank, 5 + rank, 2**64 - 1]
        table.assign(mine, [[1.0 + rank], [2.0], [3.0]])
        other.assign([1], [[1.0]], request_time=1_000)
        seen = table.lookup([high, high + 1, high + 2]).ravel().tolist()
        there = table.contains([*mine, 77]).tolist()
        sizes = [table.size(), other.size()]
        erased = table.erase([mine[0], mine[0], 99])
        evicted = [table.evict(), other.evict()]
        left = table.size()
        cleared = client.clear(["other"]), client.clear()
        return seen, there, sizes, erased, evicted, left, cleared, table.size(), client.variables(), client.addresses

    for size in (3, 5):
        for rank, got in enumerate(together(size, work)):
            rows = 2 * size + 1
            assert got == (
                [1.0, 2.0, 3.0], [True, True, True, False], [rows, 1], 1, [0, 0], rows - size,
                ({"other": 1}, {"other": 0, "t": rows - size}), 0, {}, [],
            ), rank  # fmt: skip


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda client: client.table("t").lookup_entries([1]), "lookup_entries: .* save\\(\\) a checkpoint"),
        (lambda client: client.dump_entries("t"), "dump_entries: .* save"),
        (lambda client: client.table("t").lookup([1], timeout_s=1.0), "timeout_s=1.0: an exchange waits"),
        (lambda client: client.table("t").erase([1], timeout_s=1.0), "timeout_s=1.0: an exchange waits"),
        (lambda client: client.evict("t"), "is a string"),
        (lambda client: client.queues, "kept by PS"),
        (lambda client: client.apply_dense_gradients({}), "AllReduced"),
        (lambda client: client.assign_variables({"w": [np.nan]}), "nan"),
    ],
)
def test_what_ranks_cannot_do_names_what_to_use(call, match):
    def work(client, rank):
        client.table("t", **TABLE)
        with pytest.raises(InvalidRequestError, match=match):
            call(client)

    together(2, work)


def test_missing_rows_may_be_looked_up_as_they_begin_on_any_rank():
    def work(client, rank):
        table = client.table("t", dim=3, optimizer=Sgd(), initializer=RandomUniform(-1, 1))
        ids = [rank, 2**63 + 5, 7] if rank else []
        before = table.lookup(ids, missing="initial")
        table.reinitialize([rank, 2**63 + 5, 7])
        return np.array_equal(table.lookup(ids), before), bool((before != 0).all())

    assert together(2, work) == [(True, True)] * 2


def test_a_forked_child_of_a_rank_has_no_part_in_its_exchanges():
    def work(client, rank):
        table = client.table("t", **TABLE)
        exchanges = dict(vars(client))
        client.after_fork()  # as in the child
        for call in (lambda: table.lookup([1]), lambda: client.pull_variables(["w"]), lambda: client.save("x")):
            with pytest.raises((ClosedError, UnknownVariableError)):
                call()
        client.close()
        vars(client).update(exchanges)

    together(2, work)


def test_thresholds_count_occurrences_of_every_rank():
    def work(client, rank):
        client.table("t", occurrence_threshold=3, **TABLE)
        client.apply_gradients({"t": ([4, 4, 5], np.ones((3, 1), np.float32))})
        client.apply_gradients({"t": ([4, 5], np.ones((2, 1), np.float32))})
        return client.lookup({"t": [4, 5]})["t"].ravel().tolist()

    # What workers of a PS do one after another.
    with trilith.connect("local://", threads=1) as client:
        client.table("t", occurrence_threshold=3, **TABLE)
        for ids in ([4, 4, 5], [4, 4, 5], [4, 5], [4, 5]):
            client.apply_gradients({"t": (ids, np.ones((len(ids), 1), np.float32))})
        wanted = client.lookup({"t": [4, 5]})["t"].ravel().tolist()
    assert together(2, work) == [wanted, wanted]
    assert wanted[0] < wanted[1] < 0


def test_ranks_that_disagree_about_a_table_are_told():
    with pytest.raises(ClusterMismatchError, match="rank 1 makes tables"):
        together(2, lambda client, rank: client.table("t", **{**TABLE, "dim": 1 + rank}))


def test_what_is_not_there_is_refused():
    def work(client, rank):
        with pytest.raises(InvalidRequestError, match="no tables yet"):
            client.lookup({"t": [1]})
        table = client.table("t", **TABLE)
        assert (table.dim, client.table("t").name) == (1, "t")
        with pytest.raises(InvalidRequestError, match="process group"):
            client.batches().lookup({"t": [1]}, 1.0)
        with pytest.raises(InvalidRequestError, match="float16=True"):
            client.batches(float16=True)
        with pytest.raises(InvalidRequestError, match="2 parts"):
            client.lookup_owned([{}, {}])
        with pytest.raises(UnknownVariableError, match="'w'"):
            client.pull_variables(["w"])
        assert client.restore_newest("memory://nothing") == ""

    together(1, work)


# ---- every write, tables and layouts: as workers of PS would do it one after another ---------------------------------

RANDOM = {"dim": 3, "optimizer": Adagrad(learning_rate=0.3), "initializer": RandomUniform(-1.0, 1.0)}
VERBS = ("assign", "assign_add", "apply_gradients")


def written(verb, rank):
    """A rank's ids, repeats among them, and rows."""
    rng = np.random.default_rng([VERBS.index(verb), rank])
    return rng.integers(0, 12, 9), rng.normal(size=(9, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("queue", [0, 2])
def test_writes_of_every_kind_are_those_of_workers_in_the_order_of_the_ranks(size, queue):
    def work(client, rank):
        client.table("t", **RANDOM)
        for verb in VERBS:
            getattr(client, verb)({"t": written(verb, rank)}, request_time=5)
        client.drain()
        client._wait()
        return client.lookup({"t": range(12)})["t"]

    with trilith.connect("local://", threads=1) as client:
        client.table("t", **RANDOM)
        for verb in VERBS:
            for rank in range(size):
                getattr(client, verb)({"t": written(verb, rank)}, request_time=5)
        wanted = client.lookup({"t": range(12)})["t"]
    for rows in together(size, work, update_queue=queue):
        np.testing.assert_array_equal(rows, wanted)


def test_what_one_rank_refuses_the_others_do():
    def work(client, rank):
        client.table("t", **TABLE)
        bad = np.full((1, 1), np.nan if rank == 0 else 1.0, np.float32)
        for verb in ("assign", "assign_add", "apply_gradients"):
            if rank == 0:
                with pytest.raises(NonFiniteError):
                    getattr(client, verb)({"t": ([3], bad)})
                continue
            getattr(client, verb)({"t": ([3], bad)})
        huge = np.full((2, 1), 3e38, np.float32)  # finite, but not their sum
        with pytest.raises(NonFiniteError, match="sum"):
            client.apply_gradients({"t": ([3, 3], huge)})
        return client.lookup({"t": [3]})["t"].item()

    assert together(2, work) == [1.0, 1.0]


def test_float16_must_hold_what_travels():
    def work(client, rank):
        client.table("t", **TABLE)
        with pytest.raises(NonFiniteError, match="float16"):
            client.apply_gradients({"t": ([3], np.full((1, 1), 1e6, np.float32))})

    together(1, work, float16=True)


def test_rows_are_reset_rank_after_rank_and_each_is_told_of_its_own_ids_in_their_order():
    def work(client, rank):
        client.table("t", **TABLE)
        client.table("u", **TABLE)
        client.assign({"t": ([4, 7], np.ones((2, 1), np.float32))} if rank == 0 else {})
        return client.reinitialize("t" if rank == 0 else "u", [9, 4, 7] if rank == 0 else [4]).tolist()

    assert together(2, work) == [[0, 1, 1], [0]]


def test_rows_of_an_unknown_table_are_not_reset():
    def work(client, rank):
        client.table("t", **TABLE)
        with pytest.raises(UnknownTableError):
            client.reinitialize("u", [1, 2])
        return client._tables().assigns.reinitialize("u", np.array([1, 2]), lambda name, ids: ids).tolist()

    assert together(2, work) == [[-1, -1], [-1, -1]]


def test_rows_that_are_missing_are_created_by_all_ranks_together():
    def work(client, rank):
        table = client.table("t", **{**RANDOM, "seed": 3})
        bag = EmbeddingBag(table, combiner="sum", init_missing=True)
        return bag(np.array([[5], [6]][rank : rank + 1], np.uint64)).detach().numpy(), bag(
            np.array([[5]], np.uint64)
        ).detach().numpy()

    with trilith.connect("local://", threads=1) as client:
        bag = EmbeddingBag(client.table("t", **{**RANDOM, "seed": 3}), combiner="sum", init_missing=True)
        wanted = bag(np.array([[5], [6]], np.uint64)).detach().numpy()
    for rank, (own, five) in enumerate(together(2, work)):
        np.testing.assert_array_equal(own, wanted[rank : rank + 1])
        np.testing.assert_array_equal(five, wanted[:1])
        assert own.all()


def test_merged_tables_stand_on_workers_that_hold_the_rows():
    configs = {name: HashTableConfig(**config_of(dim)) for name, dim in (("a", 2), ("b", 2), ("c", 1))}

    def steps(client, rank):
        tables = create_merged_tables(client, configs)
        tables.apply_gradients(
            {"a": ([1, 2], np.ones((2, 2), np.float32)), "c": ([1], np.ones((1, 1), np.float32))}, global_step=0
        )
        return {name: rows.tolist() for name, rows in tables.lookup({"b": [1, 2], "c": [1]}).items()}

    with trilith.connect("local://", threads=1) as client:
        wanted = [steps(client, rank) for rank in range(2)][-1]

    assert together(2, steps) == [wanted, wanted]
    assert wanted["b"] == [[-2, -2], [-2, -2]]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("merge", [False, True])
def test_fused_layouts_stand_on_workers_that_hold_the_rows(size, merge):
    features = {
        name: PartitionedFeature(config=HashTableConfig(**config_of(3)), slice_dims=(1, 2), combiner=combiner)
        for name, combiner in (("x", "sum"), ("y", "mean"))
    }
    layouts = {
        "bias": OutConfig(slices=(SliceConfig("x", 0, 1), SliceConfig("y", 0, 1)), out_type=OutType.ADDN),
        "vec": OutConfig(slices=(SliceConfig("x", 1, 3), SliceConfig("y", 1, 3)), out_type=OutType.CONCAT),
    }

    def batch(rank):
        rng = np.random.default_rng(rank)
        return {
            name: FeatureFids(Ragged.of([rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(4)]))
            for name in features
        }

    def step(client, rank):
        tables = create_partitioned_tables(client, features, layouts, native=not merge)
        module = FusedLayouts(tables)
        fetched = tables.fetch(tables.shard(batch(rank), 4), req_time=7)
        tensors = module(fetched)
        sum((each * (1 + i)).sum() for i, each in enumerate(tensors.values())).backward()
        module.drain()
        return {name: each.detach().numpy() for name, each in tensors.items()}, tables

    def work(client, rank):
        step(client, rank)
        client._wait()
        _, tables = before = step(client, rank)
        client._wait()
        return before[0], tables.lookup(batch(99), 4)

    with trilith.connect("local://", threads=1) as client:
        for rank in range(size):
            step(client, rank)
        second = [create_partitioned_tables(client, features, layouts, native=not merge) for _ in range(size)]
        seen = [tables.lookup(batch(rank), 4) for rank, tables in enumerate(second)]
        for rank in range(size):
            step(client, rank)
        last = second[0].lookup(batch(99), 4)
    for rank, (tensors, after) in enumerate(together(size, work)):
        for name in layouts:
            np.testing.assert_allclose(tensors[name], seen[rank][name], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(after[name], last[name], rtol=1e-6, atol=1e-6)
    assert np.abs(last["bias"]).max() > 1


@pytest.mark.parametrize(("depth", "queue"), [(0, 1), (2, 0), (2, 3)])
def test_rows_may_wait_between_their_owners_and_their_journey(depth, queue):
    def work(client, rank):
        collection = EmbeddingCollection(client, {"f": Feature(client.table("t", **TABLE), "sum")})
        seen = []
        batches = [{"f": np.array([[5]], np.uint64)}] * 9
        with collection.prefetch(batches, depth, ids=lambda each: each, lookup_queue=queue) as ahead:
            for _, fetched in ahead:
                rows = collection(fetched.result())["f"]
                seen.append(-round(rows.item()))
                rows.sum().backward()
                if len(seen) == 7:
                    break
        collection.drain()
        client._wait()
        return seen, client.lookup({"t": [5]})["t"].item()

    bound = depth + (queue + 1 if queue else 0)
    for seen, last in together(2, work, update_queue=1):
        assert last == -14
        # Two ranks step the row; this rank's lookups lack at most what is stated.
        assert all(each >= 2 * (step - bound - 1) - 1 for step, each in enumerate(seen)), seen


def test_a_queue_before_the_journey_is_for_workers_that_hold_the_rows():
    with trilith.connect("local://", threads=1) as client:
        collection = EmbeddingCollection(client, {"f": Feature(client.table("t", **TABLE), "sum")})
        with collection.prefetch([{"f": np.array([[5]])}], 0, ids=lambda each: each, lookup_queue=1) as ahead:
            ((_, fetched),) = ahead
            with pytest.raises(InvalidRequestError, match="hold the rows"):
                fetched.result()


def config_of(dim):
    table = EmbeddingHashTableConfig()
    table.cuckoo.SetInParent()
    table.entry_config.segments.append(Segment(dim, Zeros(), Sgd(learning_rate=1.0)).as_proto())
    return {"table_config": table, "learning_rate_fns": [1.0]}


def test_ranks_count_steps_for_themselves_and_change_rates_alike():
    def work(client, rank):
        client.table("t", **TABLE)
        for factor in (1.0, 0.25):
            client.apply_gradients({"t": ([1, 2], [[1.0], [2.0]])}, advance=1, rate_factors={"t": factor})
        return client.known_step, client.lookup({"t": [1, 2]})["t"].ravel().tolist()

    assert together(2, work) == [(2, [-2.5, -5.0])] * 2


def test_a_client_that_is_closed_leaves_its_process_groups_and_their_threads():
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        connect_peers().close()  # what is made once per process is there then
        before = threads()
        client = connect_peers()
        table = client.table("a", dim=2)
        table.assign([1], [[1.0, 2.0]])
        assert threads() > before
        client.close()
        client.close()
        assert threads() <= before
        with pytest.raises(ClosedError):
            table.lookup([1])
    finally:
        distributed.destroy_process_group()

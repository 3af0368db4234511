"""Tables by name over a cluster: the same rows on every shape, and one request per PS and step."""

from __future__ import annotations

import secrets
import time
from collections import Counter

import numpy as np
import pytest

from tests.congruence.clusters import SHAPES, LocalCluster
from tests.congruence.faults import Blocking, Meddled
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.errors import DeadlineExceededError, InvalidRequestError
from trilith.runtime.timers import EMBEDDING_LOOKUP
from trilith.tables import Adagrad, HashTableConfig, PolynomialDecay, RandomUniform, Segment, Sgd, TableSpec, Zeros
from trilith.tables.distributed import DistributedTables
from trilith.tables.factories import create_merged_tables, create_tables
from trilith_proto.hash_table_pb2 import EmbeddingHashTableConfig
from trilith_services.ps.process.shard import LocalShard


def config(*dims, optimizer=None, initializer=None, rates=None):
    table = EmbeddingHashTableConfig()
    table.cuckoo.SetInParent()
    optimizer, initializer = optimizer or Sgd(learning_rate=1.0), initializer or Zeros()
    table.entry_config.segments.extend(Segment(dim, initializer, optimizer).as_proto() for dim in dims)
    return HashTableConfig(table, rates or [1.0] * len(dims))


@pytest.fixture
def prefix():
    return f"t{secrets.token_hex(6)}/"


class Counting(Meddled):
    """A shard that counts its requests."""

    def __init__(self, shard):
        super().__init__(shard)
        self.requests = Counter()

    def __getattr__(self, name):
        found = super().__getattr__(name)
        if name not in {"lookup", "apply_gradients", "assign", "assign_add", "reinitialize"}:
            return found

        def count(*args, **kwargs):
            self.requests[name] += 1
            return found(*args, **kwargs)

        return count


@pytest.fixture
def counted():
    """A client over three counting shards."""
    shards = [Counting(LocalShard(index=index, count=3, threads=1)) for index in range(3)]
    with Client(Cluster(shards, ClientConfig())) as client:
        yield client, shards


def table_of(client, name, made):
    return client.create_tables([TableSpec.of_config(name, made)])[name]


def requests(shards):
    return [dict(shard.requests) for shard in shards]


def test_rows_come_back_in_the_order_asked_and_the_last_assignment_wins(client, prefix):
    table = table_of(client, prefix, config(2))
    table.assign([1, 2, 3], np.array([[1, 1], [2, 2], [3, 3]], np.float32))
    assert table.lookup([1, 1, 3]).tolist() == [[1, 1], [1, 1], [3, 3]]
    table.assign([2, 3, 4, 4], np.array([[1, 1], [2, 2], [9, 9], [3, 3]], np.float32))
    assert table.lookup([1, 2, 3, 4]).tolist() == [[1, 1], [1, 1], [2, 2], [3, 3]]


def test_gradients_of_repeated_ids_are_one_step(client, prefix):
    table = table_of(client, prefix, config(1))
    table.apply_gradients([0, 3, 0, 1], np.full((4, 1), 2, np.float32))
    assert table.lookup([0, 3, 0, 1]).ravel().tolist() == [-4, -2, -4, -2]


def test_a_buffer_of_ids_may_be_filled_anew_between_lookup_and_step(client, prefix):
    table = table_of(client, prefix, config(1))
    ids = np.array([1, 2, 1, 3])
    for _ in range(6):  # longer than splits are remembered
        table.lookup(ids)
        ids += 1
        table.apply_gradients(ids, np.ones((4, 1), np.float32))
        table.lookup(ids)
        table.apply_gradients(ids.copy(), np.ones((4, 1), np.float32))
    assert table.lookup(range(1, 11)).ravel().tolist() == [0, -4, -6, -8, -8, -8, -8, -4, -2, 0]


def test_every_repeat_adds(client, prefix):
    table = table_of(client, prefix, config(1))
    table.assign_add([7, 7, 2], np.array([[1], [2], [4]], np.float32))
    assert table.lookup([7, 2]).ravel().tolist() == [3, 4]


def test_schedules_are_evaluated_at_the_step_of_the_update(client, prefix):
    tables = create_tables(
        client, {"1": config(1, rates=[PolynomialDecay(1.0, 10, 2.0)]), "2": config(2)}, prefix=prefix
    )
    tables.assign_add({"1": ([1, 2], [[-1.0], [-2.0]]), "2": ([3], [[-3.0, -3.0]])})
    grads = {"1": ([1, 2], [[-0.5], [-1.0]]), "2": ([3], [[-1.5, -1.5]])}
    tables.apply_gradients(grads, global_step=0)
    found = tables.lookup({"1": [1, 2], "2": [3]})
    np.testing.assert_allclose(found["1"].ravel(), [-0.5, -1.0])
    np.testing.assert_allclose(found["2"].ravel(), [-1.5, -1.5])
    tables.apply_gradients(grads, global_step=1)
    found = tables.lookup({"1": [1, 2], "2": [3]})
    np.testing.assert_allclose(found["1"].ravel(), [0.05, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found["2"].ravel(), [0, 0])


def test_a_schedule_is_evaluated_once_per_step_whatever_the_number_of_ps(counted):
    client, _ = counted
    asked = []
    tables = create_tables(client, {"a": config(1, rates=[lambda: asked.append(1) or 0.5]), "b": config(1)})
    tables.apply_gradients({"a": (range(9), np.ones((9, 1), np.float32)), "b": ([1], [[1.0]])}, global_step=4)
    assert len(asked) == 1


def test_a_step_is_one_lookup_and_one_update_per_ps_for_all_tables(counted):
    client, shards = counted
    tables = create_tables(client, {f"slot{i}": config(i + 1) for i in range(5)})
    ids = {f"slot{i}": np.arange(40) for i in range(5)}
    tables.lookup(ids)
    tables.apply_gradients({name: (each, tables.lookup({name: each})[name]) for name, each in ids.items()})
    assert [each["apply_gradients"] for each in requests(shards)] == [1, 1, 1]
    for shard in shards:
        shard.requests.clear()
    tables.lookup(ids)
    assert requests(shards) == [{"lookup": 1}] * 3


def test_merged_tables_share_requests(counted):
    client, shards = counted
    features = {"a": config(1), "b": config(1), "c": config(2)}
    tables = create_merged_tables(client, features)
    ids = {name: np.arange(30) for name in features}
    rows = tables.lookup(ids)
    tables.apply_gradients({name: (ids[name], rows[name] + 1) for name in features})
    assert requests(shards) == [{"lookup": 1, "apply_gradients": 1}] * 3
    # a and b are the same rows, and their gradients one step.
    assert tables.lookup({"b": [5]})["b"].tolist() == [[-2.0]]
    assert tables.lookup({"c": [5]})["c"].tolist() == [[-1.0, -1.0]]


def test_statuses_of_reinitialize_are_in_the_order_of_the_ids(client, prefix):
    tables = create_tables(client, {"a": config(1)}, prefix=prefix)
    tables.assign({"a": ([5, 0, 4], np.ones((3, 1), np.float32))})
    assert tables.reinitialize("a", [9, 5, 0, 1, 4], request_time=1).tolist() == [0, 1, 1, 0, 1]
    assert tables.lookup({"a": [5, 0, 4]})["a"].ravel().tolist() == [0, 0, 0]
    assert tables.reinitialize("nobody", [1, 2]).tolist() == [-1, -1]


def test_thresholds_count_occurrences_although_ids_travel_once(client, prefix):
    spec = TableSpec.of_config(prefix + "a", config(1), occurrence_threshold=2)
    tables = create_tables(client, {"a": spec}, prefix=prefix)
    tables.apply_gradients({"a": ([1, 1, 2], np.ones((3, 1), np.float32))})
    tables.apply_gradients({"a": ([1, 2], np.ones((2, 1), np.float32))})
    assert tables.lookup({"a": [1, 2]})["a"].ravel().tolist() == [-1, 0]


def test_unknown_names_are_refused(client, prefix):
    tables = create_tables(client, {"a": config(1)}, prefix=prefix)
    with pytest.raises(InvalidRequestError, match="no table 'b'"):
        tables.lookup({"b": [1]})
    with pytest.raises(InvalidRequestError, match="no table 'b'"):
        tables.apply_gradients({"b": ([1], [[1.0]])})


def test_all_shapes_give_the_same_bits():
    """A few steps of skewed ids with random rows, on every shape of cluster."""
    found = {}
    for shape in SHAPES:
        with LocalCluster(shape) as cluster, cluster.connect() as client:
            tables = create_tables(
                client,
                {
                    name: config(
                        dim, 1, optimizer=Adagrad(learning_rate=0.1), initializer=RandomUniform(-1.0, 1.0), rates=[1, 2]
                    )
                    for name, dim in (("x", 3), ("y", 7))
                },
            )
            rng = np.random.default_rng(3)
            for step in range(4):
                ids = {name: rng.zipf(1.3, 60).astype(np.int64) for name in tables.names}
                tables.apply_gradients(
                    {
                        name: (each, rng.standard_normal((60, dim)).astype(np.float32))
                        for (name, each), dim in zip(ids.items(), tables.dims, strict=True)
                    },
                    global_step=step,
                    req_time=1,
                )
            found[shape] = tables.lookup({name: np.arange(1, 50) for name in tables.names})
    for rows in found.values():
        for name, each in found["embedded"].items():
            assert np.array_equal(each, rows[name])
            assert each.any()


def test_float16_transfer_halves_the_precision_of_what_travels_only():
    with LocalCluster("3-ps") as cluster, cluster.connect() as client:
        plain = table_of(client, "t", config(1))
        short = create_tables(client, {"t": config(1)}, transfer_float16=True)
        plain.assign([1, 2, 3], np.full((3, 1), 1 + 2.0**-12, np.float32))
        assert short.lookup({"t": [1, 2, 3]})["t"].ravel().tolist() == [1.0] * 3
        assert plain.lookup([1, 2, 3]).ravel().tolist() == [1 + 2.0**-12] * 3
        short.apply_gradients({"t": ([1], np.array([[2.0**-12 + 2.0**-24]], np.float32))})
        assert plain.lookup([1]).item() == 1.0


def test_a_call_that_takes_longer_than_its_deadline_fails():
    stores = []
    with LocalCluster("1-ps", wrap=lambda store: stores.append(Blocking(store)) or stores[-1]) as cluster:
        with cluster.connect() as client:
            tables = DistributedTables(client, {"a": config(1)}, timeout_s=0.2)
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                tables.lookup({"a": [1]})
            assert time.monotonic() - started < 15  # not after the 30 s that calls have otherwise
        stores[0].release.set()


@pytest.mark.parametrize("shape", ["1-ps", "3-ps"])
def test_lookups_are_timed_by_model_and_ps(shape):
    def counted_calls():
        found = {}
        for metric in EMBEDDING_LOOKUP.collect():
            for sample in metric.samples:
                if sample.name.endswith("_count") and sample.labels["model_name"] == f"timed {shape}":
                    found[sample.labels["ps"]] = sample.value
        return found

    with LocalCluster(shape) as cluster, cluster.connect(model_name=f"timed {shape}") as client:
        client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0))
        shards = client.shards
        for _ in range(2):
            client.lookup({"t": np.arange(9)})
        create_tables(client, {"u": config(1)}, transfer_float16=True).lookup({"u": np.arange(9)})
        assert counted_calls() == {str(index): 3 for index in range(shards)}
        if shards > 1:
            client.lookup({"t": [2]})  # that of PS 2 alone
            assert counted_calls() == {"0": 3, "1": 3, "2": 4}

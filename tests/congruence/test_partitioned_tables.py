"""Fused layouts over a cluster: the worked example of the specification, request counts, and steps per feature."""

from __future__ import annotations

import secrets
import time

import numpy as np
import pytest
from torch import nn

from tests.congruence.clusters import SHAPES, LocalCluster
from tests.congruence.test_distributed_tables import Counting, config, requests
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.data.parse.sharding import FeatureFids
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.nn import ClippedLayouts, FusedLayouts
from trilith.ops.layout_config import OutConfig, OutType, SliceConfig
from trilith.ops.ragged import Ragged
from trilith.tables import Adagrad, PolynomialDecay, RandomUniform
from trilith.tables.factories import create_partitioned_tables
from trilith.tables.partitioned import PartitionedFeature
from trilith_services.ps.process.shard import LocalShard

BATCH = {
    "a": FeatureFids(Ragged.of([[4, 5, 4], [7]])),
    "b": FeatureFids(Ragged.of([[5, 6]]), shared=True),
    "c": FeatureFids(Ragged.of([[8, 9, 10], []])),
}
LAYOUTS = {
    "bias": OutConfig(slices=(SliceConfig("a", 0, 1), SliceConfig("b", 0, 1)), out_type=OutType.ADDN),
    "vec": OutConfig(slices=(SliceConfig("b", 1, 3), SliceConfig("a", 1, 3)), out_type=OutType.CONCAT),
    "st": OutConfig(slices=(SliceConfig("a", 1, 3), SliceConfig("b", 1, 3)), out_type=OutType.STACK),
    "seq": OutConfig(slices=(SliceConfig("c", 0, 2),), out_type=OutType.NONE),
}


def features(**options):
    two = config(1, 2, **options)
    return {
        "a": PartitionedFeature(config=two, slice_dims=(1, 2)),
        "b": PartitionedFeature(config=two, slice_dims=(1, 2), combiner="mean"),
        "c": PartitionedFeature(config=config(2), slice_dims=(2,), combiner="first(2)"),
    }


def make(client, prefix="", **options):
    return create_partitioned_tables(client, features(), LAYOUTS, prefix=prefix, **options)


def fill(tables, shards):
    """Element j of id x becomes x + 0.1 j."""
    ids = np.arange(4, 11)
    parts = []
    for shard in range(shards):
        mine = ids[ids % shards == shard]
        parts.append(
            {
                table: (mine, (mine[:, None] + 0.1 * np.arange(dim)).astype(np.float32))
                for table, dim in zip(tables.table_names, tables.dims, strict=True)
            }
        )
    tables.assign(parts)


@pytest.mark.parametrize("native", [True, False])
def test_the_worked_example_gives_its_layouts(client, native):
    tables = make(client, f"t{secrets.token_hex(6)}/", native=native)
    fill(tables, client.shards)
    found = tables.lookup(BATCH, 2)
    np.testing.assert_allclose(found["bias"], [[18.5], [12.5]], rtol=1e-6)
    np.testing.assert_allclose(found["vec"], [[5.6, 5.7, 13.3, 13.6], [5.6, 5.7, 7.1, 7.2]], rtol=1e-6)
    np.testing.assert_allclose(found["st"], [[[13.3, 13.6], [5.6, 5.7]], [[7.1, 7.2], [5.6, 5.7]]], rtol=1e-6)
    np.testing.assert_allclose(found["seq"][0], [[[8, 8.1], [9, 9.1]], [[0, 0], [0, 0]]], rtol=1e-6)


@pytest.fixture
def counted():
    shards = [Counting(LocalShard(index=index, count=2, threads=1)) for index in range(2)]
    with Client(Cluster(shards, ClientConfig())) as client:
        yield client, shards


@pytest.mark.parametrize("native", [True, False])
def test_a_step_is_one_lookup_and_one_update_per_ps(counted, native):
    client, shards = counted
    asked = []
    made = features(rates=[lambda: asked.append(1) or 1.0, 1.0])
    tables = create_partitioned_tables(client, made, LAYOUTS, native=native)
    fetched = tables.fetch(tables.shard(BATCH, 2))
    tensors = tables.lay_out(fetched)
    tables.apply_gradients(fetched, [np.ones_like(each) for each in tensors])
    assert requests(shards) == [{"lookup": 1, "apply_gradients": 1}] * 2
    assert len(asked) == (2 if native else 1)  # once per table, whatever the number of PS


@pytest.mark.parametrize("native", [True, False])
def test_gradients_of_the_worked_example_arrive_at_their_rows(counted, native):
    client, _ = counted
    tables = make(client, native=native)
    fetched = tables.fetch(tables.shard(BATCH, 2))
    tensors = tables.lay_out(fetched)
    tables.apply_gradients(fetched, [np.ones_like(each) for each in tensors], scale=2.0)
    rows = tables.lookup_raw(
        [
            {tables.table_of["a"]: np.array([4, 6], np.uint64), tables.table_of["c"]: np.array([8, 10], np.uint64)},
            {tables.table_of["b"]: np.array([5, 7], np.uint64), tables.table_of["c"]: np.array([9], np.uint64)},
        ]
    )
    # An id that two features of one table have is stepped by each.
    five = [-2 * each for each in ([1, 2, 2] if native else [2, 4, 4])]
    six = [0, 0, 0] if native else [-2, -4, -4]
    seven = [0, 0, 0] if native else [-2, -4, -4]
    assert rows[0][tables.table_of["a"]].tolist() == [[-4, -8, -8], six]
    assert rows[1][tables.table_of["b"]].tolist() == [five, seven]
    assert rows[0][tables.table_of["c"]].tolist() == [[-2, -2], [0, 0]]
    assert rows[1][tables.table_of["c"]].tolist() == [[-2, -2]]


def test_tensors_without_a_gradient_leave_rows_alone(counted):
    client, _ = counted
    tables = make(client)
    fetched = tables.fetch(tables.shard(BATCH, 2))
    tables.lay_out(fetched)
    tables.apply_gradients(fetched, [None] * 3 + [np.ones((2, 4), np.float32)])
    assert tables.lookup(BATCH, 2)["bias"].tolist() == [[0], [0]]
    with pytest.raises(InvalidRequestError, match="3 gradients for 4"):
        tables.apply_gradients(fetched, [None] * 3)


def test_ids_of_another_shard_are_refused(counted):
    client, _ = counted
    with pytest.raises(InvalidRequestError, match="id 5 belongs to shard 1"):
        make(client).assign([{"c": ([5], [[1.0, 1.0]])}, {}])


def test_a_late_update_keeps_its_step_and_its_error(counted, monkeypatch):
    client, _ = counted
    made = features(rates=[PolynomialDecay(1.0, 10, 11.0), 1.0])
    tables = create_partitioned_tables(client, made, LAYOUTS, async_push=1)
    fetched = tables.fetch(tables.shard(BATCH, 2))
    ones = [np.ones_like(each) for each in tables.lay_out(fetched)]
    tables.apply_gradients(fetched, ones, global_step=2)
    tables.drain()
    assert tables.lookup_raw([{"a": np.array([4], np.uint64)}, {}])[0]["a"][0, 0] == -6  # two occurrences at rate 3
    cause = UnavailableError("gone")

    def broken(*arguments, **options):
        raise cause

    monkeypatch.setattr(tables._batches, "update_owned", broken)
    tables.apply_gradients(fetched, ones)
    with pytest.raises(UnavailableError) as caught:
        tables.drain()
    assert caught.value is cause
    tables.pusher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_layouts_as_a_module_step_their_rows(counted, depth):
    client, shards = counted
    tables = make(client, async_push=depth)
    layouts = FusedLayouts(tables)
    with layouts.prefetch([BATCH], depth, sharded=lambda batch: tables.shard(batch, 2)) as ahead:
        for _, fetched in ahead:
            found = layouts(fetched.result())
            assert {name: found[name].shape for name in ("bias", "st")} == {"bias": (2, 1), "st": (2, 2, 2)}
            (found["bias"].sum() + 2 * found["seq"][0].sum()).backward()
    layouts.drain()
    assert requests(shards) == [{"lookup": 1, "apply_gradients": 1}] * 2
    rows = tables.lookup(BATCH, 2)
    # Of the bias each feature's part: a has id 4 twice in the first sample; b's mean is over both samples.
    assert rows["bias"].tolist() == [[-6], [-2]]
    assert rows["seq"][0].tolist() == [[[-2, -2], [-2, -2]], [[0, 0], [0, 0]]]
    assert not rows["vec"].any()
    layouts.trainable = False
    assert not layouts(tables.fetch(tables.shard(BATCH, 2)))["bias"].requires_grad
    tables.pusher.close()


def test_gradients_of_layouts_are_clipped_with_the_dense_ones_before_rows_are_stepped(counted):
    client, shards = counted
    tables = make(client)
    layouts, head = FusedLayouts(tables), nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    backward = ClippedLayouts(layouts, head, clip_norm=1.0)
    found = layouts(tables.fetch(tables.shard(BATCH, 2)))
    backward(2 * found["bias"].sum() + found["seq"][0].sum() * 0 + head.weight.sum(), found)
    # The norm of (2, 2) of the bias and 1 of the head is 3.
    np.testing.assert_allclose(head.weight.grad, [[1 / 3]])
    assert backward.update.global_step == 1
    assert [each["apply_gradients"] for each in requests(shards)] == [1, 1]
    np.testing.assert_allclose(tables.lookup(BATCH, 2)["bias"], [[-4.0], [-4 / 3]], rtol=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_all_shapes_give_the_same_bits(native):
    found = {}
    for shape in SHAPES:
        with LocalCluster(shape) as cluster, cluster.connect() as client:
            made = features(optimizer=Adagrad(learning_rate=0.1), initializer=RandomUniform(-1.0, 1.0))
            tables = create_partitioned_tables(client, made, LAYOUTS, native=native)
            rng = np.random.default_rng(3)
            for step in range(4):
                batch = {
                    name: FeatureFids(Ragged.of([rng.zipf(1.5, rng.integers(0, 5)).tolist() for _ in range(6)]))
                    for name in made
                }
                fetched = tables.fetch(tables.shard(batch, 6), req_time=[1, 2])
                grads = [rng.standard_normal(each.shape).astype(np.float32) for each in tables.lay_out(fetched)]
                tables.apply_gradients(fetched, grads, global_step=step)
            found[shape] = tables.lay_out(tables.fetch(tables.shard(batch, 6)))
    for tensors in found.values():
        for one, two in zip(found["embedded"], tensors, strict=True):
            assert np.array_equal(one, two)
            assert one.any()


@pytest.mark.parametrize("native", [True, False])
def test_the_sample_whose_time_cannot_be_right_is_named(client, native):
    tables = make(client, f"t{secrets.token_hex(6)}/", native=native)
    now = int(time.time())
    sharded = tables.shard(BATCH, 2)
    for wrong, match in ((now * 1000, "milliseconds"), (now + 365 * 86_400, "days ahead"), (-1, "negative")):
        with pytest.raises(InvalidRequestError, match=rf"req_time\[1\]=.*{match}"):
            tables.fetch(sharded, req_time=[now, wrong])

"""One model written against features, on every shape of cluster and with the rows in the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.conformance.worker_ops.exchange import _Rank, _Ranks
from tests.congruence.clusters import SHAPES, LocalCluster
from trilith.data.clicks import fid
from trilith.data.ragged import Ragged
from trilith.errors import InvalidRequestError
from trilith.features import FeatureRegistry, FeatureSlotConfig, FirstN, ReduceMean, ReduceSum
from trilith.nn import FeatureEmbeddings, FeatureModel
from trilith.peers import PeerClient
from trilith.tables import Adagrad, Adam, RandomUniform, Sgd


class Model(nn.Module):
    """A bias and vectors of a user, the mean of what was seen, and the first of what was clicked."""

    def __init__(self, features: FeatureRegistry) -> None:
        super().__init__()
        user = features.create_feature_slot(FeatureSlotConfig(slot_id=1, has_bias=True, expire_time=30))
        self.vector = user.add_feature_slice(4)
        self.other = user.add_feature_slice(2, optimizer=Sgd(learning_rate=0.5), initializer=RandomUniform(-1, 1))
        item = features.create_feature_slot(FeatureSlotConfig(slot_id=2, default_vec_optimizer=Adam()))
        self.item = item.add_feature_slice(4)
        self.user = features.create_feature_column(user, "user")
        self.seen = features.create_feature_column(item, "seen", ReduceMean())
        self.clicked = features.create_feature_column(item, "clicked", FirstN(2))
        self.liked = features.create_feature_column(item, "liked", ReduceSum())

    def forward(self):
        vector = self.user.embedding_lookup(self.vector)
        rest = self.user.get_all_embedding_slices()[2]
        items = self.seen.embedding_lookup(self.item) + self.clicked.embedding_lookup(self.item).sum(1)
        items = items * self.liked.embedding_lookup(self.item)
        return self.user.get_bias()[:, 0] + (vector * items).sum(1) + rest.sum(1)


def batches():
    rng = np.random.default_rng(3)
    for _ in range(5):
        yield {
            "user": Ragged.of([[u] for u in fid(1, rng.integers(0, 9, 6)).tolist()], np.uint64),
            **{
                name: Ragged.of([fid(2, rng.integers(0, 20, rng.integers(0, 4))).tolist() for _ in range(6)], np.uint64)
                for name in ("seen", "clicked", "liked")
            },
        }


def as_bags(batch):
    from trilith.data.clicks import Ragged as Lists

    return {name: Lists(each.values, each.row_splits) for name, each in batch.items()}


def outputs(client, **options):
    registry = FeatureRegistry()
    body = Model(registry)
    model = FeatureModel(FeatureEmbeddings(client, registry, **options), body)
    seen = []
    for batch in batches():
        logits = model(as_bags(batch))
        seen.append(logits.detach().numpy().copy())
        torch.square(logits - 1).sum().backward()
    return np.concatenate(seen)


def test_a_model_gives_the_same_wherever_its_rows_are():
    found = {}
    for shape in SHAPES:
        with LocalCluster(shape) as cluster, cluster.connect() as client:
            found[shape] = outputs(client)
    ranks = [_Ranks(1) for _ in range(5)]
    with PeerClient(lambda rows: _Rank(ranks.pop(), 0), threads=1) as client:
        found["all-to-all"] = outputs(client)
    assert np.unique(found["embedded"]).size > 10
    for each in found.values():
        np.testing.assert_array_equal(each, found["embedded"])


def test_lookups_give_shapes_until_there_is_a_batch():
    registry = FeatureRegistry(batch_size=7)
    model = Model(registry)
    assert model.user.embedding_lookup(model.vector) == (7, 4)
    assert model.clicked.embedding_lookup(model.item) == (7, 2, 4)
    with LocalCluster("embedded") as cluster, cluster.connect() as client:
        embeddings = FeatureEmbeddings(client, registry)
        with embeddings.looked_up(as_bags(next(batches()))):
            assert model.clicked.embedding_lookup(model.item).shape == (6, 2, 4)
        assert model.user.get_bias() == (7, 1)


def test_slots_of_equal_rows_may_share_a_table_with_their_own_thresholds_and_expiry():
    def registry(**second):
        made = FeatureRegistry()
        for number, options in ((1, {"occurrence_threshold": 2, "expire_time": 5}), (2, second)):
            slot = made.create_feature_slot(
                FeatureSlotConfig(slot_id=number, default_vec_optimizer=Adagrad(), **options)
            )
            slot.add_feature_slice(3)
            made.create_feature_column(slot, f"f{number}")
        return made

    with LocalCluster("embedded") as cluster, cluster.connect() as client:
        embeddings = FeatureEmbeddings(client, registry(), merge_tables=True)
        (table,) = client.describe()[0].tables
        assert {each.slot: each.expire_time for each in table.hash_table.slot_expire_time_config.slot_expire_times} == {
            1: 5,
            2: 36500,
        }
        batch = {f"f{number}": fid(number, [[4]]) for number in (1, 2)}
        for _ in range(2):
            rows = embeddings(batch)
            sum(each.sum() for each in rows.values()).backward()
        assert client.table(table.name).contains([fid(1, 4), fid(2, 4)]).tolist() == [False, True]
    unnamed = FeatureRegistry()
    unnamed.create_feature_slot(FeatureSlotConfig(name="x")).add_feature_slice(1)
    with pytest.raises(InvalidRequestError, match="no slot_id"):
        unnamed.merged_table_specs()

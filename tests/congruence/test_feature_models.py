"""One model written against features, on every shape of cluster and with the rows in the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trilith.data
from tests.congruence.clusters import SHAPES, LocalCluster
from tests.ranks import Rank, Ranks
from trilith.data.fids import make_fid_v2
from trilith.data.formats.writers import open_writer
from trilith.data.parse.specs import Label, Sparse
from trilith.data.records import Records
from trilith.errors import InvalidRequestError
from trilith.features import FeatureRegistry, FeatureSlotConfig, FirstN
from trilith.nn import EmbeddingBag, EmbeddingCollection, Feature, FeatureEmbeddings, FeatureModel, ServedFeatures
from trilith.ops.ragged import Ragged
from trilith.peers import PeerClient
from trilith.tables import Adagrad, Adam, RandomUniform, Sgd, Zeros
from trilith_proto.example_pb2 import Example
from trilith_services.exporting import Exporter
from trilith_services.serving.models import Models


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
        self.seen = features.create_feature_column(item, "seen", "mean")
        self.clicked = features.create_feature_column(item, "clicked", FirstN(2))
        self.liked = features.create_feature_column(item, "liked", "sum")

    def forward(self, vectors):
        vector = self.user.embedding_lookup(vectors, self.vector)
        rest = self.user.get_all_embedding_slices(vectors)[2]
        items = self.seen.embedding_lookup(vectors, self.item) + self.clicked.embedding_lookup(vectors, self.item).sum(
            1
        )
        items = items * self.liked.embedding_lookup(vectors, self.item)
        return self.user.get_bias(vectors)[:, 0] + (vector * items).sum(1) + rest.sum(1)


def batches():
    rng = np.random.default_rng(3)
    for _ in range(5):
        yield {
            "user": Ragged.of([[u] for u in make_fid_v2(1, rng.integers(0, 9, 6)).tolist()], np.uint64),
            **{
                name: Ragged.of(
                    [make_fid_v2(2, rng.integers(0, 20, rng.integers(0, 4))).tolist() for _ in range(6)], np.uint64
                )
                for name in ("seen", "clicked", "liked")
            },
        }


def outputs(client, **options):
    registry = FeatureRegistry()
    body = Model(registry)
    model = FeatureModel(FeatureEmbeddings(client, registry, **options), body)
    seen = []
    for batch in batches():
        logits = model(batch)
        seen.append(logits.detach().numpy().copy())
        torch.square(logits - 1).sum().backward()
    return np.concatenate(seen)


def test_a_model_gives_the_same_wherever_its_rows_are():
    found = {}
    for shape in SHAPES:
        with LocalCluster(shape) as cluster, cluster.connect() as client:
            found[shape] = outputs(client)
    ranks = [Ranks(1) for _ in range(5)]
    with PeerClient(lambda rows: Rank(ranks.pop(), 0), threads=1) as client:
        found["all-to-all"] = outputs(client)
    assert np.unique(found["embedded"]).size > 10
    for each in found.values():
        np.testing.assert_array_equal(each, found["embedded"])


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_of_slots_is_exported_and_scores_as_it_did(merged, tmp_path):
    registry = FeatureRegistry()
    with LocalCluster("1-ps") as cluster, cluster.connect() as client:
        body = Model(registry)
        model = FeatureModel(FeatureEmbeddings(client, registry, merge_tables=merged), body)
        for batch in batches():
            torch.square(model(batch) - 1).sum().backward()
        want = model.eval()(batch).detach().numpy()
        checkpoint = f"{tmp_path}/checkpoints/1"
        client.save(checkpoint)
    served = ServedFeatures(model)
    exporter = Exporter("slots", served, dense=body, features=served.features, inputs=served.inputs)
    exporter.export(checkpoint, f"{tmp_path}/exports", mode="standalone")
    payloads = []
    for row in range(6):
        example = Example()
        for name, bags in batch.items():
            example.named_feature.add(name=name).feature.fid_v2_list.value.extend(bags[row].tolist())
        payloads.append(example.SerializeToString())
    models = Models(f"{tmp_path}/exports")
    assert models.refresh()
    with models.use() as loaded:
        found = loaded.model.predict(Records.of(payloads, "example"))["score"]
    models.close()
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-3)  # serving keeps slices as float16


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
        batch = {f"f{number}": make_fid_v2(number, [[4]]) for number in (1, 2)}
        for _ in range(2):
            rows = embeddings(batch)
            sum(each.sum() for each in rows.values()).backward()
        assert client.table(table.name).contains([make_fid_v2(1, 4), make_fid_v2(2, 4)]).tolist() == [False, True]
    unnamed = FeatureRegistry()
    unnamed.create_feature_slot(FeatureSlotConfig(name="x")).add_feature_slice(1)
    with pytest.raises(InvalidRequestError, match="no slot_id"):
        unnamed.merged_table_specs()


# ---- from a file to a step -------------------------------------------------------------------------------------------

LOADERS = {
    "dataset": lambda samples: samples,
    "torch": lambda samples: samples.torch(),
    "loader of 0": lambda samples: DataLoader(samples.torch(), batch_size=None),
    "loader of 2": lambda samples: DataLoader(samples.torch(), batch_size=None, num_workers=2),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("widest", [0, 3])
def test_parsed_batches_of_a_file_are_what_embeddings_take(tmp_path, loader, widest):
    """Ids of 0 to `widest` more per row, or of one length for all rows, where numpy would make a matrix of them."""
    rng = np.random.default_rng(5)
    lists = [(make_fid_v2(2, rng.integers(0, 9, 2 + rng.integers(0, widest + 1)))).tolist() for _ in range(40)]
    for part in range(2):
        payloads = []
        for ids in lists[part::2]:
            example = Example(label=[len(ids)])
            example.named_feature.add(name="genres").feature.fid_v2_list.value.extend(ids)
            example.named_feature.add(name="user").feature.fid_v2_list.value.append(ids[0])
            payloads.append(example.SerializeToString())
        with open_writer(str(tmp_path / f"part-{part}")) as out:
            out.write(Records.of(payloads, "example"))
    samples = trilith.data.read(str(tmp_path / "part-*"), kind="example")
    samples = samples.parse({"genres": Sparse(), "user": Sparse(), "label": Label()}).batch(8)

    with LocalCluster("embedded") as cluster, cluster.connect() as client:
        table = client.table("ids", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        other = client.table("users", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        embeddings = EmbeddingCollection(client, {"genres": Feature(table, "sum"), "user": Feature(other)})
        bag = EmbeddingBag(table, combiner="sum")
        rows = 0
        for batch in LOADERS[loader](samples):
            vectors = embeddings({name: batch[name] for name in ("genres", "user")})
            assert torch.equal(bag(batch["genres"]), vectors["genres"])
            assert vectors["user"].shape == (len(batch["label"]), 2)
            (vectors["genres"].sum() + vectors["user"].sum()).backward()
            rows += len(batch["label"])
        assert rows == 40
        # With SGD of rate 1 a row has moved by -1 each time its id occurred.
        ids, counts = np.unique(np.concatenate(lists).astype(np.uint64), return_counts=True)
        np.testing.assert_array_equal(table.lookup(ids), np.repeat(-counts[:, None], 2, 1))
        users, counts = np.unique(np.array([each[0] for each in lists], np.uint64), return_counts=True)
        np.testing.assert_array_equal(other.lookup(users), np.repeat(-counts[:, None], 2, 1))

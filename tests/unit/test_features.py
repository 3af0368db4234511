"""Features: combiners, slices, slots and the tables that follow, and one step's gradients."""

from __future__ import annotations

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.features import (
    ClipType,
    FeatureRegistry,
    FeatureSlotConfig,
    FirstN,
    GradientUpdate,
    UserEmbeddingCheck,
    clip_by_global_norm,
    clip_gradients,
    create_embedding_slices,
    global_norm,
    row_mask,
)
from trilith.pipelining import Pusher
from trilith.tables import Adagrad, PolynomialDecay, Sgd

# ---- slices --------------------------------------------------------------------------------------------


def test_a_mask_says_where_rows_have_values():
    assert row_mask(3, [2, 0, 5]).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    with pytest.raises(InvalidRequestError, match="seq_length"):
        row_mask(0, [1])


def test_slices_are_cut_from_the_last_axis():
    vectors = np.array([[1, 2], [2, 3], [3, 5], [10, 11]], np.float32)
    names = {"f": [0, 1, 1, 4]}
    slices = create_embedding_slices({"f": vectors}, names, {"f": FirstN(2)}, {"f": [1, 1]})
    assert slices["f:0_1"].tolist() == [[[1], [0]], [[0], [0]], [[2], [3]]]
    assert slices["f:1_2"].tolist() == [[[2], [0]], [[0], [0]], [[3], [5]]]
    with pytest.raises(InvalidRequestError, match="do not cut 2 columns"):
        create_embedding_slices({"f": vectors}, names, {"f": "sum"}, {"f": [1, 2]})


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_becomes_a_table_of_merged_slices():
    registry = FeatureRegistry()
    slot = registry.create_feature_slot(
        FeatureSlotConfig(slot_id=7, has_bias=True, occurrence_threshold=3, expire_time=9)
    )
    first = slot.add_feature_slice(4)
    slot.add_feature_slice(8)
    slot.add_feature_slice(2, optimizer=Sgd(learning_rate=0.5))
    assert [(each.start, each.end) for each in slot.slices] == [(0, 1), (1, 5), (5, 13), (13, 15)]
    assert slot.unmerged_slice_dims == [1, 4, 8, 2]
    (spec,) = registry.table_specs()
    assert spec.name == "7"
    assert [each.dim_size for each in spec.proto.hash_table.entry_config.segments] == [1, 12, 2]
    assert list(spec.learning_rates) == pytest.approx([0.01, 0.01, 0.5])
    (expiry,) = spec.proto.hash_table.slot_expire_time_config.slot_expire_times
    assert (expiry.slot, expiry.expire_time) == (7, 9)
    assert registry.slot_occurrence_thresholds() == {7: 3}
    assert registry.slot_expire_times() == {7: 9}
    column = registry.create_feature_column(slot, "user", FirstN(5))
    vectors = {"user": np.arange(4 * 5 * 15).reshape(4, 5, 15), "item": np.arange(4 * 15).reshape(4, 15)}
    np.testing.assert_array_equal(column.embedding_lookup(vectors, first), vectors["user"][:, :, 1:5])
    assert registry.create_feature_column(slot, "item").get_bias(vectors).tolist() == [[0], [15], [30], [45]]
    assert registry.features_of("7") == ["item", "user"]
    assert [each.shape[-1] for each in column.get_all_embedding_slices(vectors)] == [1, 4, 8, 2]


def test_a_slice_without_a_rate_takes_its_optimizers_warmed_up():
    slot = FeatureRegistry().create_feature_slot(FeatureSlotConfig(name="t", default_vec_learning_rate=0.25))
    slot.add_feature_slice(2)
    slot.add_feature_slice(3, learning_rate=PolynomialDecay(0.1, 5, 0.2))
    assert slot.table_spec().learning_rates == (0.25, PolynomialDecay(0.1, 5, 0.2))
    warm = FeatureRegistry().create_feature_slot(FeatureSlotConfig(name="t"))
    warm.add_feature_slice(1, optimizer=Adagrad(learning_rate=0.5, warmup_steps=10))
    assert warm.table_spec().learning_rates == (PolynomialDecay(0.0, 10, end_learning_rate=0.5),)


def test_a_model_that_does_not_fit_together_is_refused():
    registry = FeatureRegistry()
    slot = registry.create_feature_slot(FeatureSlotConfig(name="a"))
    other = registry.create_feature_slot(FeatureSlotConfig(name="b"))
    with pytest.raises(InvalidRequestError, match="exists"):
        registry.create_feature_slot(FeatureSlotConfig(name="a"))
    with pytest.raises(InvalidRequestError, match="no slices"):
        registry.table_specs()
    column = registry.create_feature_column(slot, "f")
    with pytest.raises(InvalidRequestError, match="'a' already"):
        registry.create_feature_column(other, "f")
    with pytest.raises(InvalidRequestError, match="has no bias"):
        column.get_bias({})
    with pytest.raises(InvalidRequestError, match="one of 'b'"):
        column.embedding_lookup({}, other.add_feature_slice(1))
    with pytest.raises(InvalidRequestError, match="name or a slot_id"):
        FeatureSlotConfig()
    with pytest.raises(InvalidRequestError, match="not made here"):
        FeatureRegistry().create_feature_column(slot, "f")


# ---- updates ---------------------------------------------------------------------------------------------------------


def floats(*values):
    return np.array(values, np.float32)


def test_clipping_by_the_global_norm_scales_all_and_changes_no_input():
    given_ = [floats(-3, 0, 0), floats(4, 0, 0)]
    assert [each.tolist() for each in clip_by_global_norm(given_, 4)] == [
        [pytest.approx(-2.4), 0, 0],
        [pytest.approx(3.2), 0, 0],
    ]
    assert given_[0].tolist() == [-3, 0, 0]
    assert global_norm(given_) == 5
    assert clip_by_global_norm([floats(1, 0), floats(1, 0)], 4)[0].tolist() == [1, 0]
    infinite = clip_by_global_norm([floats(np.inf, 1)], 4)[0]
    assert np.isnan(infinite[0])
    assert infinite[1] == 0
    assert np.isnan(clip_by_global_norm([floats(np.nan, 9)], 4)[0]).tolist() == [True, False]
    with pytest.raises(InvalidRequestError, match="clip_norm"):
        clip_by_global_norm(given_, 0)


@pytest.mark.parametrize(
    ("kind", "bound", "sparse_bound", "warmup", "dense", "sparse"),
    [
        (ClipType.GLOBAL_NORM, 1.0, None, 1.0, [0.6], [0.8]),
        (ClipType.GLOBAL_NORM, 1.0, 2.5, 1.0, [0.6], [2.0]),
        (ClipType.GLOBAL_NORM, 1.0, 2.5, 0.0, [0.6], [0.0]),
        (ClipType.GLOBAL_NORM, None, 2.5, 1.0, [3.0], [4.0]),
        (ClipType.DENSE_AND_SPARSE, 1.0, None, 1.0, [1.0], [4.0]),
        (ClipType.DENSE_AND_SPARSE, None, 2.0, 1.0, [3.0], [2.0]),
        (ClipType.VALUE, 3.5, None, 1.0, [3.0], [3.5]),
        (ClipType.NORM, 2.0, None, 1.0, [2.0], [2.0]),
        (ClipType.NONE, 2.0, 2.0, 1.0, [3.0], [4.0]),
    ],
)
def test_every_kind_of_clipping(kind, bound, sparse_bound, warmup, dense, sparse):
    got = clip_gradients({"d": floats(3)}, {"s": floats(4)}, kind, bound, sparse_bound, warmup)
    np.testing.assert_allclose(got[0]["d"], dense, rtol=1e-6)
    np.testing.assert_allclose(got[1]["s"], sparse, rtol=1e-6)


class Model:
    """A dense variable and an embedding under SGD with a rate of 1."""

    def __init__(self, **options):
        self.values = {"var": floats(1), "emb": floats(1, 1, 1, 1)}
        self.steps = []
        self.update = GradientUpdate(
            apply_dense=self.subtract, apply_sparse=self.subtract, read_dense=self.values.__getitem__, **options
        )

    def subtract(self, grads, step=None):
        self.steps.append(step)
        for name, grad in grads.items():
            self.values[name] = self.values[name] - grad


def test_one_step_clips_updates_and_counts():
    model = Model(clip_norm=1.0)
    model.update.step({"var": floats(1)}, {"emb": floats(1, 1, 1, 0)})
    np.testing.assert_allclose(model.values["var"], [0.5])
    np.testing.assert_allclose(model.values["emb"], [0.5, 0.5, 0.5, 1])
    assert model.update.global_step == 1
    assert model.steps == [None, 0]  # the embedding's update sees the step before it counts up


def test_no_gradients_are_no_step():
    model = Model()
    model.update.step({"var": None}, {"emb": None})
    assert model.update.global_step == 0
    assert model.steps == []


def test_weight_decay_comes_after_clipping_and_the_sparse_bound_warms_up():
    model = Model(clip_norm=1.0, dense_weight_decay=0.5, sparse_norm_warmup_steps=2)
    model.update.step({"var": floats(2)}, {"emb": floats(0, 0, 0, 0)})
    np.testing.assert_allclose(model.values["var"], [1 - 1 - 0.5])
    for want in (0.5, 1.0, 1.0):
        before = model.values["emb"][0]
        model.update.step({}, {"emb": floats(8, 0, 0, 0)})
        np.testing.assert_allclose(before - model.values["emb"][0], want)
    with pytest.raises(InvalidRequestError, match="read_dense"):
        GradientUpdate(apply_dense=print, apply_sparse=print, dense_weight_decay=0.1)


def test_asynchronous_dense_updates_are_one_step_late_and_drain():
    pusher = Pusher(1, background=False)
    model = Model(pusher=pusher)
    for _ in range(3):
        model.update.step({"var": floats(1)}, {"emb": floats(1, 1, 1, 0)})
    assert model.values["var"].tolist() == [-1]
    assert model.values["emb"].tolist() == [-2, -2, -2, 1]
    pusher.drain()
    assert model.values["var"].tolist() == [-2]


@pytest.mark.parametrize("kind", list(ClipType))
def test_dense_gradients_of_a_sum_become_means_before_they_are_clipped(kind):
    model = Model(dense_reduce_mean=True, clip_type=kind, clip_norm=0.5, sparse_clip_norm=100.0)
    model.update.step({"var": floats(4)}, {}, batch_size=8)
    assert model.values["var"].tolist() == [0.5]
    for size in (None, 0):
        with pytest.raises(InvalidRequestError, match="batch_size"):
            model.update.step({"var": floats(4)}, {}, batch_size=size)


def test_gradients_of_user_embeddings_count_only_where_there_is_one():
    check = UserEmbeddingCheck(features=["user_vector"], threshold=1.0)
    grads = dict.fromkeys(("tower/user_vector/w", "uue_bias", "item/w"), floats(1, 1))
    there = check.checked(grads, {"user_vector": [[0.9, 0.9]], "uue": [[0.5], [0.5]]})
    assert [each.tolist() for each in there.values()] == [[1, 1], [0, 0], [1, 1]]
    model = Model(embedding_check=UserEmbeddingCheck(features=["emb"], threshold=1.0))
    sparse = {"emb": floats(1, 1, 1, 1)}
    model.update.step({"var": floats(1)}, sparse, features={"emb": [[1.0, 0.0]]})
    assert (model.values["emb"].tolist(), model.values["var"].tolist()) == ([1, 1, 1, 1], [0])
    model.update.step({}, sparse, features={"emb": [[1.0, 0.1]]})
    assert model.values["emb"].tolist() == [0, 0, 0, 0]
    with pytest.raises(InvalidRequestError, match="'emb' is needed"):
        model.update.step({}, sparse)

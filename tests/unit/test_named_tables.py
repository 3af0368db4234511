"""Several tables behind one object: by name, flat, fused and merged."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.tables import (
    CuckooHashTable,
    Fp32,
    HashTableConfig,
    Momentum,
    Ones,
    PolynomialDecay,
    Segment,
    Sgd,
    Zeros,
)
from trilith.tables.merged import MergedTables, merge_configs, merged_name
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.filters import SlidingFilter, Thresholds
from trilith_services.ps.reference.delay_compensation import delay_compensated
from trilith_services.ps.reference.fused import fused_apply_gradient, fused_lookup, integer_ids
from trilith_services.ps.reference.hash_filters import create_hash_filters
from trilith_services.ps.reference.multi_table import MultiTable
from trilith_services.ps.reference.multi_type_table import MultiTypeTable
from trilith_services.ps.reference.norms import almost_equal, norm_square
from trilith_services.ps.reference.scope import Scope
from trilith_services.ps.reference.single_table import SingleTable


def config(dim=1, rate=1.0, *, segments=None, initializer=None, ttl_days=None, optimizer=None, extra=None):
    table = hash_table_pb2.EmbeddingHashTableConfig()
    CuckooHashTable().mutate_table(table)
    if ttl_days is not None:
        table.slot_expire_time_config.default_expire_time = ttl_days
    parts = segments or [Segment(dim, initializer or Zeros(), optimizer or Sgd(), Fp32())]
    table.entry_config.segments.extend(each.as_proto() for each in parts)
    return HashTableConfig(table, rate if isinstance(rate, list) else [rate] * len(parts), extra)


def rows(result):
    return {name: each.tolist() for name, each in result.items()}


# ---- single tables -------------------------------------------------------------------------------------------------


def test_names_are_unique_within_a_model_only():
    model = Scope()
    assert SingleTable(model, config(), name_suffix="x").name == "MonolithHashTable_x"
    with pytest.raises(ValueError, match="MonolithHashTable_x"):
        SingleTable(model, config(), name_suffix="x")
    SingleTable(Scope(), config(), name_suffix="x")
    MultiTable(model, {"a": config()}, name_suffix="x")
    with pytest.raises(ValueError, match="MonolithMultiHashTable_x"):
        MultiTable(model, {"a": config()}, name_suffix="x")


def test_rates_must_be_one_per_segment_and_the_type_chosen():
    with pytest.raises(ValueError, match="2 learning rates for 1 segments"):
        SingleTable(Scope(), config(rate=[1.0, 2.0]))
    bare = config()
    bare.table_config.ClearField("cuckoo")
    with pytest.raises(ValueError, match="cuckoo"):
        SingleTable(Scope(), bare)


def test_schedules_read_the_models_step():
    model = Scope()
    table = SingleTable(model, config(rate=PolynomialDecay(1.0, 10, 0.0)))
    table.apply_gradients([1], [[1.0]], global_step=10)
    model.global_step = 5
    table.apply_gradients([1], [[1.0]])
    assert table.lookup([1]).tolist() == [[-1.5]]
    table.apply_gradients([1], [[1.0]], learning_rates=[2.0])
    assert table.lookup([1]).tolist() == [[-3.5]]


def test_an_exporting_model_makes_serving_rows():
    table = SingleTable(Scope(exporting=True), config(2))
    table.assign([1], [[1, 2]])
    assert table.table.layout.serving
    with pytest.raises(InvalidRequestError):
        table.apply_gradients([1], [[1, 2]])


def test_writes_chain_and_ids_may_be_any_integers():
    table = SingleTable(Scope(), config(2), name_suffix="t")
    got = table.assign([-1], [[1, 2]]).assign_add(np.array([2**64 - 1], np.uint64), [[1, 1]]).lookup([-1, 5])
    assert got.tolist() == [[2, 3], [0, 0]]
    assert table.lookup([]).shape == (0, 2)
    assert table.assign([], []).size() == 1
    assert integer_ids(np.array([-2], np.int32)).tolist() == [2**64 - 2]
    assert integer_ids([2**64 - 1, 2**63]).tolist() == [2**64 - 1, 2**63]
    for wrong in ([1.5], [[1]], ["a"]):
        with pytest.raises((InvalidRequestError, ValueError)):
            integer_ids(wrong)
    with pytest.raises(InvalidRequestError):
        table.assign([1], [[1, 2, 3]])


def test_a_single_table_filters_and_expires(tmp_path):
    thresholds = hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=1)
    (hash_filter,) = create_hash_filters(0, True, thresholds)
    table = SingleTable(Scope(), config(ttl_days=1), hash_filter=hash_filter)
    table.assign([1], [[5]], req_time=86_400)
    assert table.size() == 0
    table.assign([1], [[5]], req_time=0)
    assert table.size() == 1
    assert table.save(f"{tmp_path}/t").restore(f"{tmp_path}/t").size() == 0


def test_a_table_restores_from_an_earlier_name(tmp_path):
    old = SingleTable(Scope(), config(), name_suffix="old").assign([1], [[4]])
    old.save(f"{tmp_path}/MonolithHashTable_old")
    new = SingleTable(Scope(), config(extra=["MonolithHashTable_old"]), name_suffix="new")
    assert new.restore_from_assets(f"{tmp_path}/").lookup([1]).tolist() == [[4]]
    with pytest.raises(ValueError, match="MonolithHashTable_other"):
        SingleTable(Scope(), config(), name_suffix="other").restore_from_assets(f"{tmp_path}/")


def test_delay_compensation_looks_at_what_the_worker_had_read():
    grads, now, read = (np.array([[x]], np.float32) for x in (10.0, 0.0, 0.1))
    assert delay_compensated(grads, now, read, 0.1).tolist() == [[9.0]]
    table = SingleTable(Scope(), config())
    table.assign([1], [[1.0]])
    table.apply_delayed_gradients([1, 2], [[2.0], [2.0]], [[0.5], [0.0]], lambda_=0.5)
    assert table.lookup([1, 2]).tolist() == [[1.0 - 3.0], [-2.0]]


# ---- the native multi-table ----------------------------------------------------------------------------------------


def make_multi(**options):
    return MultiTable(Scope(), {"b": config(2, 2.0), "a": config(1, 0.5), "c": config(3, 1.0)}, **options)


def test_tables_are_ordered_by_name_everywhere():
    table = make_multi()
    assert (table.names, table.dims) == (["a", "b", "c"], [1, 2, 3])
    assert table.learning_rates().tolist() == [0.5, 2.0, 1.0]
    table.apply_gradients({"b": ([1], [[1, 1]]), "a": ([1], [[1]])})
    assert rows(table.lookup({"b": [1], "a": [1, 2]})) == {"b": [[-2, -2]], "a": [[-0.5], [0]]}
    table.raw_apply_gradients([1, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1, 1, 1])
    assert table.raw_lookup([1, 1, 1], [0, 1, 2, 3]).tolist() == [-1, -4, -4, -1, -1, -1]


def test_stacked_requests_each_use_their_own_splits():
    table = make_multi()
    table.raw_assign([1, 2, 7], [0, 2, 3, 3], [10, 20, 7, 8])
    got = table.raw_lookup([1, 7, 2, 1, 7, 9], [0, 1, 2, 2, 4, 5, 6])
    assert got.tolist() == [10, 7, 8, 20, 10, 7, 8, 0, 0, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.raw_lookup([1], [0, 1]),
        lambda t: t.raw_lookup([1], [0, 1, 1, 2]),
        lambda t: t.raw_lookup([1, 2], [0, 2, 1, 2]),
        lambda t: t.raw_assign([1], [0, 1, 1, 1, 1, 1, 1], [1]),
        lambda t: t.raw_assign_add([1], [0, 0, 1, 1], [1]),
        lambda t: t.raw_apply_gradients([1], [0, 1, 1, 1], [1], learning_rates=[1.0, 1.0]),
        lambda t: t.assign({"a": ([1], [[1, 2]])}),
        lambda t: t.assign({"nope": ([1], [[1]])}),
        lambda t: t.lookup({"nope": [1]}),
        lambda t: MultiTable(Scope(), {}),
    ],
)
def test_wrong_flat_lengths_and_names_are_refused(call):
    table = make_multi()
    with pytest.raises(InvalidRequestError):
        call(table)
    assert set(table.size().values()) == {0}


@pytest.mark.parametrize("strict", [False, True])
def test_the_quirks_hold_unless_strict(tmp_path, strict):
    occurrences = SlidingFilter(300, thresholds=Thresholds.constant(2))
    model = Scope()

    configs = {"a": config(1), "b": config(1, ttl_days=1), "c": config(1)}
    table = MultiTable(model, configs, hash_filter=occurrences, strict=strict)
    one = {"a": ([1 << 17], [[1.0]])}
    for _ in range(3):
        table.assign(one, req_time=50)
    assert table.size()["a"] == 1
    assert table.tables["a"].export_stripe(0) is not None
    _, found = table.tables["a"].export_rows(np.array([1 << 17]))
    assert found.last_update.tolist() == [50 if strict else 0]
    counted = occurrences.get(integer_ids([1 << 17])).tolist()
    table.assign_add(one, 7)
    assert occurrences.get(integer_ids([1 << 17])).tolist() == [counted[0] + (not strict)]
    assert table.lookup({"a": [1 << 17]})["a"].tolist() == [[2.0]]
    plain = MultiTable(Scope(), configs, strict=strict)
    for name in configs:
        plain.assign_add({name: ([1], [[1.0]])}, 0)
        plain.assign_add({name: ([2], [[1.0]])}, 86_400)
    plain.save(f"{tmp_path}/m")
    fresh = MultiTable(Scope(), configs).restore(f"{tmp_path}/m")
    assert fresh.size() == ({"a": 2, "b": 1, "c": 2} if strict else {"a": 1, "b": 1, "c": 1})


def test_reinitialize_says_what_it_did():
    table = MultiTable(Scope(), {"a": config(1, initializer=Ones())})
    table.assign({"a": ([1], [[5]])})
    assert table.reinitialize("a", [1, 2], request_time=9).tolist() == [1, 0]
    assert rows(table.lookup({"a": [1, 2, 3]})) == {"a": [[1], [1], [0]]}
    assert table.reinitialize("nope", [1, 2], request_time=9).tolist() == [-1, -1]
    with pytest.raises(NotImplementedError):
        MultiTypeTable(Scope(), {"a": config()}).reinitialize("a", [1], request_time=0)


def test_a_multi_type_table_saves_and_restores_each_table(tmp_path):
    table = MultiTypeTable(Scope(), {"b": config(2), "a": config(1)})
    table.assign({"a": ([1], [[1]]), "b": ([2], [[2, 2]])}).assign_add({"a": ([1], [[1]])}).save(f"{tmp_path}/")
    other = MultiTypeTable(Scope(), {"b": config(2), "a": config(1)}).restore(f"{tmp_path}/")
    assert rows(other.lookup({"a": [1], "b": [2]})) == {"a": [[2]], "b": [[2, 2]]}
    assert (other.size(), other.names) == ({"a": 1, "b": 1}, ["a", "b"])
    with pytest.raises(InvalidRequestError, match="nope"):
        other.lookup({"nope": [1]})


# ---- fused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MultiTable, MultiTypeTable])
def test_fused_calls_go_block_by_block(kind):
    table = kind(Scope(), {"a": config(1, 0.5), "b": config(2, 2.0)})
    table.assign({"a": ([1, 2], [[1], [2]]), "b": ([1], [[5, 6]])})
    found = table.fused_lookup([1, 1, 2, 3], [1, 1, 1, 1], 2)
    assert found.embeddings.tolist() == [1, 5, 6, 2, 0, 0]
    assert found.splits.tolist() == [3, 3]
    assert found.id_offsets.tolist() == [0, 1, 2, 3, 4]
    assert found.emb_offsets.tolist() == [0, 1, 3, 4, 6]
    assert found.indices.tolist() == [1, 1, 2, 3]
    table.fused_apply_gradient(
        [1, 1, 2, 3], found.indices, [1, 1, 1, 1], [1] * 6, found.id_offsets, found.emb_offsets, num_of_shards=2
    )
    assert table.fused_lookup([1, 1, 2, 3], [1, 1, 1, 1], 2).embeddings.tolist() == [0.5, 3, 4, 1.5, -2, -2]


@pytest.mark.parametrize("together", [False, True])
def test_accumulation_is_within_a_block(together):
    # Momentum tells one step with the sum from two steps.
    table = MultiTypeTable(Scope(), {"a": config(1, optimizer=Momentum(momentum=0.5))})
    table.fused_apply_gradient(
        [1, 1, 1], [1, 1, 1], [2, 1], [1.0, 1.0, 1.0], [0, 2, 3], [0, 2, 3], num_of_shards=2,
        enable_grad_accumulation=together,
    )  # fmt: skip
    steps = [2.0, 1.0] if together else [1.0, 1.0, 1.0]
    weight = moment = 0.0
    for grad in steps:
        moment = 0.5 * moment - grad
        weight += moment
    assert table.lookup({"a": [1]})["a"].tolist() == [[weight]]


def test_fused_calls_refuse_what_does_not_fit():
    table = SingleTable(Scope(), config(2)).table
    good = ([1], [1], [1], [1.0, 1.0], [0, 1], [0, 2], [1.0])
    fused_apply_gradient([table], *good)
    for at, wrong in [(0, [1, 2]), (2, [1, 1]), (2, [2]), (3, [1.0]), (4, [0, 2]), (5, [0, 1]), (6, [1.0, 1.0])]:
        arguments = list(good)
        arguments[at] = wrong
        with pytest.raises(InvalidRequestError):
            fused_apply_gradient([table], *arguments)
    with pytest.raises(InvalidRequestError):
        fused_lookup([table], [1], [1], 2)
    with pytest.raises(InvalidRequestError):
        fused_lookup([table], [1], [-1, 2], 2)


# ---- merged --------------------------------------------------------------------------------------------------------


def make_merged(names=("s0", "s1", "s2"), rates=(1.0, 1.0, 0.5)):
    configs = {name: config(1, rate) for name, rate in zip(names, rates, strict=True)}
    return MergedTables(configs, lambda inner: MultiTypeTable(Scope(), inner))


def test_features_of_one_config_share_a_table_named_by_their_md5():
    table = make_merged()
    digest = hashlib.md5(b"s0,s1", usedforsecurity=False).hexdigest()
    assert digest in table.inner_names
    assert table.inner_names == sorted([digest, merged_name(["s2"])])
    assert table.dims == [1, 1]
    table.apply_gradients({"s1": ([1], [[1]]), "s0": ([1, 2], [[1], [1]]), "s2": ([1], [[1]])})
    assert rows(table.lookup({"s2": [1], "s0": [1], "s1": [2, 1]})) == {
        "s2": [[-0.5]],
        "s0": [[-2]],
        "s1": [[-1], [-2]],
    }


def test_signed_unsigned_and_pythons_ids_of_features_that_share_a_table_keep_all_bits():
    table = make_merged()
    high = 2**63 + 9
    table.assign({"s0": (np.array([high], np.uint64), [[7]]), "s1": (np.array([5, -1]), [[8], [9]])})
    exact = {"s0": np.array([high, 5, 2**64 - 1], np.uint64), "s1": [5, high]}
    assert rows(table.lookup(exact)) == {"s0": [[7], [8], [9]], "s1": [[8], [7]]}
    mixed = {"s0": [5, high], "s1": np.array([high - 2**64])}
    assert rows(table.lookup(mixed)) == {"s0": [[8], [7]], "s1": [[7]]}


def test_the_last_assignment_in_sorted_order_wins():
    table = make_merged()
    table.assign({"s1": ([1], [[1]]), "s0": ([1], [[7]])}).assign_add({"s1": ([], [])})
    assert rows(table.lookup({"s0": [1], "s1": []})) == {"s0": [[1]], "s1": []}


def test_names_from_before_the_feature_prefix_are_extra_restore_names():
    configs = {"fc_slot_2": config(), "fc_slot_1": config(extra=["mine"]), "fc_slot_x": config(2)}
    inner, inner_of = merge_configs(configs)
    merged = merged_name(["fc_slot_1", "fc_slot_2"])
    assert inner[merged].extra_restore_names == ["mine", merged_name(["slot_1", "slot_2"])]
    assert inner[merged_name(["fc_slot_x"])].extra_restore_names == []
    assert inner_of["fc_slot_2"] == merged
    assert configs["fc_slot_1"].extra_restore_names == ["mine"], "the given configs stay as they are"


def test_the_synchronous_path_gets_sizes_and_passes_gradients_on():
    table = make_merged()
    table.assign({"s0": ([1, 2], [[1], [2]])})
    sizes = {}
    found, auxiliary = table.lookup({"s1": [2], "s0": [1, 2]}, sizes)
    assert rows(found) == {"s1": [[2]], "s0": [[1], [2]]}
    assert auxiliary is sizes
    merged = merged_name(["s0", "s1"])
    assert sizes == {merged: [2, 1]}
    again = table.lookup({"s1": [2], "s0": [1, 2]}, merged_ids={merged: [2, 1, 1]})
    assert rows(again) == {"s1": [[1]], "s0": [[2], [1]]}

    class Sink:
        def apply_gradients(self, updates, *, global_step=0, req_time=0):
            self.seen = {name: each.tolist() for name, each in updates.items()}

    table.inner = Sink()
    table.apply_gradients({"s1": [[3.0]], "s0": [[1.0], [2.0]]}, skip_merge_id=True)
    assert table.inner.seen == {merged: [[1.0], [2.0], [3.0]]}


def test_merged_tables_refuse_what_they_cannot_do():
    table = make_merged()
    with pytest.raises(NotImplementedError):
        table.reinitialize("s0", [1], request_time=0)
    with pytest.raises(InvalidRequestError, match="nope"):
        table.lookup({"nope": [1]})


# ---- norms ---------------------------------------------------------------------------------------------------------


def test_a_row_is_zero_below_the_smallest_normal_float():
    values = np.array([[0, 0], [1e-20, 0], [1e-18, 0], [3, 4]], np.float32)
    assert almost_equal(norm_square(values), 0).tolist() == [True, True, False, False]
    assert almost_equal(1.0, np.float32(1) + np.finfo(np.float32).eps)
    assert not almost_equal(1.0, 1.0001)

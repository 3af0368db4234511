"""Occurrence filters: kernels against their naive twins, the counting rule, and files."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_files as naive
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.ops.jit import JIT_DISABLED
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.filters import (
    ProbabilisticFilter,
    SlidingFilter,
    Thresholds,
    make_filter,
)
from trilith_services.ps.reference.filter_shards import read_filter_meta, restore_filter, save_filter
from trilith_services.ps.reference.hash_filters import (
    CountingFilter,
    DummyFilter,
    create_hash_filters,
    intercept_gradient,
    should_be_filtered,
)
from trilith_services.ps.reference.shard_files import find_shard_files, shard_file_name

# Few distinct ids, so that they meet again; with bits in and above the signature, and the extremes.
FIDS = st.sampled_from([0, 1, 2, 3, 131072, 131073, 1 << 17 | 1 << 48, 2**63, 2**64 - 1, 10000002961562801052]) | (
    st.integers(0, 2**64 - 1)
)
ADDS = st.lists(st.tuples(FIDS, st.integers(0, 20)), max_size=80)


def u64(*values):
    return np.array(values, np.uint64)


def u32(*values):
    return np.array(values, np.uint32)


def slot(number, fid):
    return number << 48 | fid


# ---- kernels and twins ---------------------------------------------------------------------------------------------


@given(adds=ADDS, bits=st.sampled_from([8, 16]), capacity=st.integers(1, 20))
def test_counting_add_matches_naive(adds, bits, capacity):
    fast = CountingFilter(capacity, bits=bits)
    slow = naive.Block(capacity, int(capacity * 1.5), bits, 64)
    got = fast.add(u64(*(fid for fid, _ in adds)), u32(*(count for _, count in adds)))
    assert got.tolist() == [slow.add(fid, count) for fid, count in adds]
    assert fast._cells.tolist() == slow.raw_cells()
    assert (fast.elements, fast.failures) == (slow.elements, slow.failures)


@given(seed=st.integers(0, 2**32), n=st.integers(0, 400), splits=st.integers(1, 9))
def test_sliding_add_matches_naive(seed, n, splits):
    random = np.random.default_rng(seed)
    fids = (random.integers(0, 150, n) << 17).astype(np.uint64)
    counts = random.integers(0, 4, n).astype(np.uint32)
    fast, slow = SlidingFilter(300, splits), naive.Sliding(300, splits)
    got = fast.add(fids, counts)
    assert got.tolist() == [slow.add(*each) for each in zip(fids.tolist(), counts.tolist(), strict=True)]
    assert (fast.head, fast.moves, fast.failures) == (slow.head, slow.moves, slow.failures)
    assert fast._cells.tolist() == [block.raw_cells() for block in slow.blocks]
    assert fast.elements == sum(block.elements for block in slow.blocks)


@given(adds=ADDS, by_slot=st.dictionaries(st.integers(0, 3), st.integers(0, 17)), default=st.integers(0, 3))
def test_sliding_filter_matches_naive(adds, by_slot, default):
    config = hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=default)
    for number, threshold in by_slot.items():
        config.slot_occurrence_thresholds.add(slot=number, occurrence_threshold=threshold)
    fast, slow = SlidingFilter(300, 7, thresholds=Thresholds.of(config)), naive.Sliding(300, 7)
    fids = [fid for fid, _ in adds]
    present = [fid % 3 == 0 for fid in fids]
    got = fast.filtered(u64(*fids), u32(*(count for _, count in adds)), present=np.array(present, np.bool_))
    want = []
    for (fid, count), there in zip(adds, present, strict=True):
        threshold = by_slot.get((fid >> 48) & 0x7FFF, default)
        want.append(not there and slow.filtered(fid, count, threshold))
    assert got.tolist() == want
    assert fast._cells.tolist() == [block.raw_cells() for block in slow.blocks]


def test_a_full_neighbourhood_counts_a_failure_and_passes():
    block = CountingFilter(1, bits=16)  # one home cell and 64 more; 64 signatures fill them
    ids = (np.arange(65, dtype=np.uint64)) << np.uint64(17)
    assert block.add(ids).tolist() == [0] * 64 + [15]
    assert block.failures == 1
    assert block.get(ids).tolist() == [1] * 64 + [15]
    assert block.failures == 1, "reading is no failure"


# ---- the counting rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: SlidingFilter(300), lambda: CountingFilter(300)], ids=["sliding", "block"])
@pytest.mark.parametrize("threshold", [0, 1, 3, 15])
def test_an_id_passes_from_the_occurrence_after_its_threshold(make, threshold):
    occurrences = make()
    limit = Thresholds.constant(threshold)
    got = [bool(occurrences.filtered(u64(7), thresholds=limit)[0]) for _ in range(20)]
    assert got == [True] * threshold + [False] * (20 - threshold)
    assert occurrences.elements == (threshold > 0), "threshold 0 counts nothing"


def test_a_threshold_above_15_never_passes_and_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        limit = Thresholds.constant(16)
    assert "16" in caplog.text
    occurrences = SlidingFilter(300, thresholds=limit)
    assert all(occurrences.filtered(u64(*[9] * 100)))


def test_occurrences_that_travel_together_count_together():
    occurrences = SlidingFilter(300, thresholds=Thresholds.constant(3))
    assert occurrences.filtered(u64(1), u32(4)).tolist() == [True], "old count 0 decides"
    assert occurrences.filtered(u64(1), u32(1)).tolist() == [False]


def test_thresholds_go_by_the_slot_of_v2_ids_without_the_top_bit():
    config = hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=1)
    config.slot_occurrence_thresholds.add(slot=5, occurrence_threshold=0)
    occurrences = SlidingFilter(300, thresholds=Thresholds.of(config))
    ids = u64(slot(5, 1), slot(5, 1) | 1 << 63, slot(6, 1))
    assert occurrences.filtered(ids).tolist() == [False, False, True]
    config.slot_occurrence_thresholds.add(slot=32768)
    with pytest.raises(InvalidRequestError, match="32768"):
        Thresholds.of(config)


def test_ids_with_rows_pass_uncounted():
    occurrences = SlidingFilter(300, thresholds=Thresholds.constant(1))
    present = np.array([True, False])
    assert occurrences.filtered(u64(1, 2), present=present).tolist() == [False, True]
    assert occurrences.get(u64(1, 2)).tolist() == [0, 1]


def test_threads_lose_no_occurrence():
    occurrences = SlidingFilter(100_000 if not JIT_DISABLED else 1000)
    ids = (np.arange(2000 if not JIT_DISABLED else 50, dtype=np.uint64)) << np.uint64(17)
    threads = [threading.Thread(target=lambda: [occurrences.add(ids) for _ in range(3)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (occurrences.get(ids) == 12).all()


# ---- the filters that remember nothing -----------------------------------------------------------------------------


class AllPresent:
    def contains(self, ids):
        return np.ones(ids.size, np.bool_)


@pytest.mark.parametrize(("equal", "keep"), [(False, 3 / 7), (True, 1 - 0.05 ** (3 / 7))])
def test_probabilistic_filter_matches_naive_in_the_mean(equal, keep):
    n = 20_000 if not JIT_DISABLED else 2000
    drawn = ProbabilisticFilter(Thresholds.constant(7), equal=equal, seed=5)
    passed = ~drawn.filtered(np.arange(n, dtype=np.uint64), np.full(n, 3, np.uint32))
    assert abs(passed.mean() - keep) < 4 * np.sqrt(keep * (1 - keep) / n)


def test_probabilistic_draws_differ_by_call_and_repeat_by_seed():
    ids = np.arange(200, dtype=np.uint64)
    one, two = (ProbabilisticFilter(Thresholds.constant(2), seed=1) for _ in range(2))
    first, second = one.filtered(ids), one.filtered(ids)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, two.filtered(ids))


def test_probabilistic_filter_keeps_what_it_must():
    drawn = ProbabilisticFilter(Thresholds.constant(100))
    ids = np.arange(100, dtype=np.uint64)
    assert not should_be_filtered(drawn, ids).any(), "no table at hand"
    assert not should_be_filtered(drawn, ids, table=AllPresent()).any()
    assert not drawn.filtered(ids, np.full(100, 100, np.uint32)).any(), "min(1, count / t)"
    assert not drawn.filtered(ids, thresholds=Thresholds.constant(0)).any()


def test_intercept_zeroes_rows_and_leaves_the_callers_array():
    grads = np.ones((3, 2), np.float32)
    occurrences = SlidingFilter(100, thresholds=Thresholds.constant(1))
    assert intercept_gradient(occurrences, [1, -1, 1], grads).tolist() == [[0, 0], [0, 0], [1, 1]]
    assert (grads == 1).all()
    assert (intercept_gradient(DummyFilter(), [1, -1, 1], grads) == 1).all()
    assert intercept_gradient(occurrences, [], np.ones((0, 2), np.float32)).shape == (0, 2)


# ---- making filters ------------------------------------------------------------------------------------------------


def test_a_config_makes_its_filter():
    config = ps_pb2.TableConfig(name="t")
    assert make_filter(config) is None
    config.filter = ps_pb2.TableConfig.SLIDING
    config.occurrence_thresholds.default_occurrence_threshold = 2
    made = make_filter(config)
    assert isinstance(made, SlidingFilter)
    assert (made.capacity, made.split_num, made.thresholds.values.tolist()) == (300_000_000, 7, [2])
    config.filter_capacity, config.filter_splits = 400, 9
    made = make_filter(config)
    assert (made.capacity, made.blocks, made.block_capacity, made.total) == (400, 9, 50, 60)
    for kind, equal in (("PROBABILISTIC", False), ("PROBABILISTIC_EQUAL", True)):
        config.filter = ps_pb2.TableConfig.FilterKind.Value(kind)
        made = make_filter(config)
        assert isinstance(made, ProbabilisticFilter)
        assert made.equal == equal


def test_filters_are_made_one_per_ps():
    config = hash_table_pb2.SlotOccurrenceThresholdConfig(default_occurrence_threshold=3)
    made = create_hash_filters(3, True, config.SerializeToString(), filter_capacity=1000)
    assert [type(each) for each in made] == [SlidingFilter] * 3
    assert made[0].thresholds.values.tolist() == [3]
    assert [type(each) for each in create_hash_filters(0, False, config)] == [DummyFilter]
    (drawn,) = create_hash_filters(0, True, config, filter_type="probabilistic_filter", filter_equal_probability=True)
    assert isinstance(drawn, ProbabilisticFilter)
    assert drawn.equal
    assert isinstance(create_hash_filters(1, True, config, filter_type="no_filter")[0], DummyFilter)
    with pytest.raises(ValueError, match="bloom"):
        create_hash_filters(1, True, config, filter_type="bloom")


@pytest.mark.parametrize(
    "make", [lambda: SlidingFilter(300, 0), lambda: CountingFilter(0), lambda: CountingFilter(10, bits=12)]
)
def test_impossible_shapes_are_refused(make):
    with pytest.raises(InvalidRequestError):
        make()


# ---- files ---------------------------------------------------------------------------------------------------------


def filled(capacity=300, splits=7, n=300):
    occurrences = SlidingFilter(capacity, splits, thresholds=Thresholds.constant(2))
    occurrences.add(np.arange(n, dtype=np.uint64) << np.uint64(17))
    return occurrences


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7, 12])
def test_a_saved_filter_reads_back_whatever_the_number_of_splits(tmp_path, splits):
    saved, restored = filled(splits=splits), SlidingFilter(300, splits)
    save_filter(saved, f"{tmp_path}/f")
    assert len(find_shard_files(f"{tmp_path}/f")) == splits
    restore_filter(restored, f"{tmp_path}/f")
    assert restored == saved
    assert restored.moves > 0


def test_large_blocks_are_cut_into_records_of_ten_thousand_cells(tmp_path):
    saved = SlidingFilter(60_000, 5, thresholds=Thresholds.constant(2))
    saved.add(u64(1, 2, 1 << 17))
    save_filter(saved, f"{tmp_path}/f")
    restored = SlidingFilter(60_000, 5)
    restore_filter(restored, f"{tmp_path}/f")
    assert restored == saved
    meta = read_filter_meta(shard_file_name(f"{tmp_path}/f", 0, 5))
    shared = meta.sliding_hash_filter_meta
    assert (meta.total_size, meta.fill_rate, meta.num_elements) == (18_000, 1.2, saved.elements)
    assert (shared.max_forward_step, shared.max_backward_step, shared.max_step) == (2, 3, 16)


@pytest.mark.parametrize("other", [(300, 8), (400, 7), (300, 5)])
def test_a_filter_of_another_shape_is_refused_and_stays(tmp_path, other):
    save_filter(filled(), f"{tmp_path}/f")
    restored, untouched = filled(*other, n=5), filled(*other, n=5)
    with pytest.raises(CheckpointError):
        restore_filter(restored, f"{tmp_path}/f")
    assert restored == untouched


def test_missing_and_damaged_filter_files_are_refused(tmp_path):
    saved = filled()
    restored = SlidingFilter(300, 7)
    with pytest.raises(CheckpointError, match="no file"):
        restore_filter(restored, f"{tmp_path}/f")
    save_filter(saved, f"{tmp_path}/f")
    victim = tmp_path / "f-00003-of-00007"
    whole = victim.read_bytes()
    for damaged in (whole[:-1], whole[:20], whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :], b""):
        victim.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="f-00003-of-00007"):
            restore_filter(restored, f"{tmp_path}/f")
    victim.unlink()
    with pytest.raises(CheckpointError, match="f-00003-of-00007 is missing"):
        restore_filter(restored, f"{tmp_path}/f")
    assert restored.elements == 0


def test_a_clone_is_equal_and_its_own():
    for original in (filled(), CountingFilter(50)):
        twin = original.clone()
        assert twin == original
        twin.add(u64(1 << 40))
        assert twin != original
    assert filled() != CountingFilter(50)


@pytest.mark.parametrize(
    "make", [SlidingFilter, lambda: CountingFilter(300), lambda: ProbabilisticFilter(Thresholds.constant(2))]
)
def test_arrays_of_another_layout_are_read_rightly_or_refused(make):
    ids = np.arange(40, dtype=np.uint64)
    for each in (np.stack([ids, ids], 1)[:, 0], ids.view(np.int64), np.repeat(ids, 2)[::2]):
        np.testing.assert_array_equal(make().filtered(each), make().filtered(ids))
    counts = np.arange(40) * 7 % 20
    for each in (counts, counts.astype(np.uint8), np.repeat(counts, 3)[::3]):
        np.testing.assert_array_equal(make().filtered(ids, each), make().filtered(ids, counts.astype(np.uint32)))
    for wrong in (
        {"counts": counts.astype(float)},
        {"counts": counts[:-1].astype(np.uint32)},
        {"counts": counts - 1},
        {"present": np.zeros(40, np.uint8)},
        {"present": np.zeros(39, np.bool_)},
    ):
        with pytest.raises(InvalidRequestError):
            make().filtered(ids, **wrong)
    with pytest.raises(InvalidRequestError):
        make().filtered(ids.astype(np.float32))
    with pytest.raises(InvalidRequestError, match="thresholds are int64"):
        Thresholds(np.ones(1, np.int64))


def test_a_state_of_other_types_is_refused():
    made = SlidingFilter(300)
    state, cells = made.export_state(), np.stack([made.export_block(b)[0] for b in range(made.blocks)])
    with pytest.raises(InvalidRequestError, match="state is int32"):
        made.import_all(state.astype(np.int32), cells)
    with pytest.raises(InvalidRequestError, match="cells are uint8"):
        made.import_all(state, cells.astype(np.uint8))

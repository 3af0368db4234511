"""Table semantics: a state machine against a dict, growth, eviction, filters, memory limits, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests import naive_engine as naive
from trilith.errors import InvalidRequestError, MemoryLimitError, NonFiniteError
from trilith.ops.hashing import unmix64
from trilith.ops.jit import JIT_DISABLED
from trilith_proto import ps_pb2
from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.kernels.index import STRIPES, group_by_stripe
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

DIM = 3
DAY = 86400
PICKS = st.lists(st.integers(0, 59), min_size=1, max_size=24)


def config(name: str = "t", *, dim: int = DIM, days: int = 1, optimizer: str = "sgd") -> ps_pb2.TableConfig:
    made = ps_pb2.TableConfig(name=name)
    made.hash_table.cuckoo.SetInParent()
    made.hash_table.slot_expire_time_config.default_expire_time = days
    segment = made.hash_table.entry_config.segments.add(dim_size=dim)
    segment.init_config.zeros.SetInParent()
    getattr(segment.opt_config, optimizer).SetInParent()
    return made


def colliding_ids(count: int) -> np.ndarray:
    """uint64[count], at most 256: ids whose hashes differ in bits that choose neither stripe nor lines."""
    return u64(*(int(unmix64(np.uint64(k << 51))) for k in range(count)))


def u64(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint64)


class TableMachine(RuleBasedStateMachine):
    """Random writes, erasures and evictions keep a table equal to a dict."""

    known: tuple[int, ...] = (0, 1, 2, 3, 5, 8, 2**48 + 1, 2**63, 2**64 - 1)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.model = Table(config()), naive.DictTable(DIM, 0.5)

    def choose(self, picks: list[int]) -> list[int]:
        return [self.known[pick % len(self.known)] for pick in picks]

    @rule(
        picks=PICKS,
        time=st.integers(0, 3 * DAY),
        verb=st.sampled_from(["assign", "assign_add", "apply"]),
        seed=st.integers(0, 99),
    )
    def write(self, picks: list[int], time: int, verb: str, seed: int) -> None:
        ids = self.choose(picks)
        values = np.random.default_rng(seed).integers(-4, 5, (len(ids), DIM)).astype(np.float32)
        if verb == "apply":
            self.table.apply_gradients(u64(*ids), values, learning_rates=[0.5], request_time=time)
        else:
            getattr(self.table, verb)(u64(*ids), values, request_time=time)
        self.model.write(ids, values, time, verb)

    @rule(picks=PICKS)
    def erase(self, picks: list[int]) -> None:
        ids = self.choose(picks)
        assert self.table.erase(u64(*ids)) == self.model.erase(ids)

    @rule(now=st.integers(0, 5 * DAY))
    def evict(self, now: int) -> None:
        assert self.table.evict(now) == self.model.evict(now, DAY)

    @rule(picks=PICKS)
    def look_up(self, picks: list[int]) -> None:
        ids = self.choose(picks)
        np.testing.assert_array_equal(self.table.lookup(u64(*ids)), self.model.lookup(ids))
        assert self.table.contains(u64(*ids)).tolist() == [i in self.model.rows for i in ids]

    @invariant()
    def same_rows(self) -> None:
        found = Rows.concatenate([self.table.export_stripe(s) for s in range(self.table.stripes)])
        assert {int(i): int(t) for i, t in zip(found.ids, found.last_update, strict=True)} == {
            i: time for i, (_, time) in self.model.rows.items()
        }
        assert len(self.table) == len(self.model.rows)


class CollidingMachine(TableMachine):
    """The same with ids of which an index has room for half in their lines."""

    known = tuple(colliding_ids(60).tolist())


TableMachine.TestCase.settings = settings(
    max_examples=20 if JIT_DISABLED else 40, stateful_step_count=30, deadline=None
)
TestTableAgainstDict = TableMachine.TestCase
CollidingMachine.TestCase.settings = settings(max_examples=5 if JIT_DISABLED else 40, deadline=None)
TestTableOfCollidingIds = CollidingMachine.TestCase


def test_ids_made_to_collide_cost_no_memory_and_lose_nothing() -> None:
    table = Table(config())
    ids = colliding_ids(250)
    values = np.arange(3 * 250, dtype=np.float32).reshape(250, DIM)
    for start in range(0, 250, 50):
        table.assign(ids[start : start + 50], values[start : start + 50], request_time=start)
    np.testing.assert_array_equal(table.lookup(ids), values)
    assert table.memory_bytes < 50_000
    pages = [table.scan(part, 3, 1000, 0)[0].ids for part in range(3)]
    assert sorted(np.concatenate(pages)) == sorted(ids)
    assert table.erase(ids[::2]) == 125
    assert table.contains(ids).tolist() == [False, True] * 125
    assert table.erase_before(100) == 50  # of those left, the first hundred
    assert sorted(np.concatenate([table.stripe_ids(s) for s in range(table.stripes)])) == sorted(ids[101::2])
    np.testing.assert_array_equal(table.lookup(ids[101::2]), values[101::2])


def test_ids_that_come_and_go_leave_the_index_as_large_as_it_was() -> None:
    size, rounds = (1000, 20) if JIT_DISABLED else (20_000, 60)
    table = Table(config())
    fresh = iter(np.random.default_rng(5).integers(0, 2**64, (rounds + 1, size), np.uint64))
    kept = next(fresh)
    ones = np.ones((size, DIM), np.float32)
    table.assign(kept, ones)
    used = table.memory_bytes
    half = size // 2
    for new in fresh:
        table.erase(kept[:half])
        table.assign(new[:half], ones[:half])
        kept = np.concatenate([kept[half:], new[:half]])
    assert table.contains(kept).all()
    assert len(table) == size
    assert table.memory_bytes < 2 * used


def test_a_hash_leads_back_to_its_id() -> None:
    ids = [0, 1, 2**63, 2**64 - 1, *np.random.default_rng(3).integers(0, 2**64, 100, np.uint64).tolist()]
    assert [int(unmix64(np.uint64(naive.mix64(each)))) for each in ids] == ids


@pytest.mark.parametrize("count", [1, 100, 20_000])
def test_a_table_grows_without_losing_or_moving_rows(count: int) -> None:
    table = Table(config(optimizer="adagrad"))
    ids = np.random.default_rng(count).permutation(np.arange(count, dtype=np.uint64) * np.uint64(2**40 + 1))
    for piece in np.array_split(ids, 7):
        values = np.repeat((piece % np.uint64(1000)).astype(np.float32)[:, None], DIM, axis=1)
        table.assign(piece, values, request_time=5)
    assert len(table) == count
    np.testing.assert_array_equal(table.lookup(ids)[:, 0], (ids % np.uint64(1000)).astype(np.float32))
    assert not table.contains(ids + np.uint64(1)).any()


def test_pages_of_a_dump_cover_every_row_once() -> None:
    table = Table(config())
    ids = np.arange(5000, dtype=np.uint64)
    table.assign(ids, np.ones((5000, DIM), np.float32))
    seen = []
    for part in range(7):
        offset = 0
        while True:
            rows, offset = table.scan(part, 7, 300, offset)
            assert offset != 0
            seen.append(rows.ids)
            if len(rows) < 300:
                break
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), ids)


def test_rows_go_out_and_back_verbatim() -> None:
    source, target = Table(config(optimizer="adam")), Table(config(optimizer="adam"))
    ids = np.arange(1000, dtype=np.uint64)
    grads = np.random.default_rng(0).normal(size=(1000, DIM)).astype(np.float32)
    source.apply_gradients(ids, grads, learning_rates=[0.1], request_time=77)
    for s in range(source.stripes):
        target.import_rows(source.export_stripe(s))
    assert target.newest_update == 77
    for table in (source, target):
        table.apply_gradients(ids, grads, learning_rates=[0.1], request_time=78)
    np.testing.assert_array_equal(source.lookup(ids), target.lookup(ids))


def test_expiry_goes_by_the_v2_slot_of_the_id() -> None:
    made = config(days=10)
    made.hash_table.slot_expire_time_config.slot_expire_times.add(slot=3, expire_time=2)
    table = Table(made)
    ids = u64(3 << 48, 4 << 48, (3 << 48) | (1 << 63))
    table.assign(ids, np.ones((3, DIM), np.float32), request_time=0)
    assert table.evict(2 * DAY - 1) == 0
    assert table.evict(2 * DAY) == 2  # the top bit is no part of the slot
    assert table.contains(ids).tolist() == [False, True, False]


def test_repeated_ids_are_steps_in_order_or_one_summed_step() -> None:
    ids, grads = u64(5, 5, 6), np.ones((3, DIM), np.float32)
    apart, summed = Table(config(optimizer="adagrad")), Table(config(optimizer="adagrad"))
    apart.apply_gradients(ids, grads, learning_rates=[1.0])
    summed.apply_gradients(ids, grads, learning_rates=[1.0], dedup=True)
    np.testing.assert_allclose(apart.lookup(u64(5))[0, 0], -1 / 1.1**0.5 - 1 / 2.1**0.5, rtol=1e-6)
    np.testing.assert_allclose(summed.lookup(u64(5))[0, 0], -2 / 4.1**0.5, rtol=1e-6)
    np.testing.assert_array_equal(apart.lookup(u64(6)), summed.lookup(u64(6)))


def test_reinitialize_says_which_rows_there_were() -> None:
    table = Table(config())
    table.assign(u64(1), np.ones((1, DIM), np.float32), request_time=9)
    assert table.reinitialize(u64(1, 2, 1), request_time=4).tolist() == [1, 0, 1]
    assert not table.lookup(u64(1, 2)).any()
    assert table.newest_update == 9
    assert table.export_rows(u64(1))[1].last_update.tolist() == [4]


def test_skipping_zeros_erases_the_id_whose_last_value_is_zero() -> None:
    made = config()
    made.hash_table.skip_zero_embedding = True
    table = Table(made)
    zero, one = np.zeros(DIM), np.ones(DIM)
    table.assign(u64(1, 1, 2, 2, 3), np.float32([zero, one, one, zero, zero]))
    assert table.contains(u64(1, 2, 3)).tolist() == [True, False, False]


class ThirdTime:
    """A filter that passes an id from its third asking on."""

    memory_bytes = 0

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def filtered(self, ids, counts=None, thresholds=None, present=None):
        out = []
        for k, i in enumerate(ids.tolist()):
            before = self.seen.get(i, 0)
            self.seen[i] = before + (int(counts[k]) if counts is not None else 1)
            out.append(before < 2 and not present[k])
        return np.array(out)


def test_the_filter_decides_before_the_first_row_changes() -> None:
    table = Table(config(), filter=ThirdTime())
    ones = np.ones((2, DIM), np.float32)
    table.apply_gradients(u64(1, 1), ones, learning_rates=[1.0], request_time=50)
    assert len(table) == 0
    assert table.newest_update == 50
    assert table.counters.filtered_ids == 2
    table.apply_gradients(u64(1, 2), ones, learning_rates=[1.0])
    assert table.contains(u64(1, 2)).tolist() == [True, False]


def test_at_the_memory_limit_new_rows_are_refused_and_old_ones_served() -> None:
    budget = MemoryBudget(200_000)
    table = Table(config(dim=16), budget=budget)
    batch = np.ones((100, 16), np.float32)

    def fill() -> None:
        for start in range(0, 100_000, 100):
            table.assign(np.arange(start, start + 100, dtype=np.uint64), batch)

    with pytest.raises(MemoryLimitError, match="100 new rows need"):
        fill()
    stored = len(table)
    assert stored > 0
    assert stored % 100 == 0  # the refused batch left nothing behind
    assert budget.used <= budget.limit
    table.apply_gradients(np.arange(100, dtype=np.uint64), batch, learning_rates=[1.0])  # old rows go on
    assert not table.lookup(np.arange(100, dtype=np.uint64)).any()
    table.erase(np.arange(300, dtype=np.uint64))
    used = budget.used
    table.assign(np.arange(10**6, 10**6 + 100, dtype=np.uint64), batch)  # freed rows are used again
    assert len(table) == stored - 200
    assert budget.used == used
    table.clear()
    assert budget.used < 10_000


def test_threads_give_the_result_of_one_and_every_step_counts() -> None:
    rng = np.random.default_rng(1)
    size = 2_500 if JIT_DISABLED else 40_000  # plain Python takes a minute for more
    ids = rng.integers(0, 50_000, size).astype(np.uint64)
    grads = rng.integers(-3, 4, (size, DIM)).astype(np.float32)
    alone = Table(config())
    for _ in range(4):
        alone.apply_gradients(ids, grads, learning_rates=[1.0])
    with ThreadPoolExecutor(4) as pool:
        shared = Table(config(), pool=pool)
        jobs = [pool.submit(shared.apply_gradients, ids, grads, learning_rates=[1.0]) for _ in range(2)]
        for job in jobs:
            job.result()
        for _ in range(2):
            shared.apply_gradients(ids, grads, learning_rates=[1.0])
        np.testing.assert_array_equal(shared.lookup(ids), alone.lookup(ids))


def test_lookup_writes_float16_and_into_unaligned_memory() -> None:
    table = Table(config(dim=5))
    values = np.float32([[1.0, 1.0009, -3.25, 1e-7, 7e4]])
    table.assign(u64(1), values)
    half = table.lookup(u64(1, 2), np.empty((2, 5), np.float16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, np.concatenate([values, values * 0]).astype(np.float16))
    raw = np.zeros(3 + 2 * 5 * 4, np.uint8)
    out = np.ndarray((2, 5), np.float32, raw, offset=3)
    table.lookup(u64(1, 2), out)
    np.testing.assert_array_equal(out[0], values[0])


def step(table: Table, **options: object) -> None:
    table.apply_gradients(u64(1), np.ones((1, DIM), np.float32), **options)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint64, ">i4"])
def test_counts_of_other_integers_count_as_they_say(dtype: str) -> None:
    table = Table(config(), filter=ThirdTime())
    grads = np.ones((3, DIM), np.float32)
    table.apply_gradients(u64(1, 2, 3), grads, counts=np.array([1, 2, 1, 9, 9], dtype)[:3])
    table.apply_gradients(u64(1, 2, 3), grads, counts=np.array([1, 0, 2, 0, 1], dtype)[::2])
    assert table.contains(u64(1, 2, 3)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.lookup(np.zeros(3, np.float32)), r"ids are float32\[3\]"),
        (lambda t: t.lookup([1, 2]), "ids are list, expected an array"),
        (lambda t: t.lookup(u64(1), np.zeros((1, 9), np.float32)), r"out is \(1, 9\), expected \(1, 3\)"),
        (lambda t: t.lookup(u64(1), np.zeros((1, 3))), "out is float64, expected float32 or float16"),
        (lambda t: t.lookup(u64(1), np.zeros((1, 3), ">f4")), "out is >f4, expected float32 or float16"),
        (lambda t: t.lookup(u64(1, 2), np.zeros((2, 6), np.float32)[:, ::2]), "out is no C-contiguous array"),
        (lambda t: t.lookup(u64(1, 2), np.zeros((4, 3), np.float32)[::-2]), "out is no C-contiguous array"),
        (lambda t: t.lookup(u64(1), np.frombuffer(bytes(12), np.float32).reshape(1, 3)), "out is read-only"),
        (lambda t: t.gather(u64(1), np.zeros((1, 3))), "weights is float64, expected float32"),
        (lambda t: t.gather(u64(1), np.zeros((1, 2), np.float32)), r"weights is \(1, 2\), expected \(1, 3\)"),
        (lambda t: t.assign(u64(1), [[1, 2, 3]]), "values are list, expected an array"),
        (lambda t: step(t, counts=np.ones(1)), r"counts are float64\[1\], expected uint32\[1\]"),
        (lambda t: step(t, counts=np.ones(2, np.uint32)), r"counts are uint32\[2\], expected uint32\[1\]"),
        (lambda t: step(t, counts=np.array([-1])), r"counts from -1 to -1 are outside 0\.\.4294967295"),
        (lambda t: step(t, counts=[1]), "counts are list, expected uint32"),
        (
            lambda t: t.import_rows(
                Rows(u64(1), np.ones((1, 3), np.float32), np.ones((1, 0), np.float32), u64().view("u4"))
            ),
            r"\(0,\) times for 1 rows",
        ),
        (lambda t: t.assign(u64(1), np.zeros((1, 2), np.float32)), r"expected float32 or float16 \[1, 3\]"),
        (lambda t: t.assign(u64(1), np.zeros((1, 3))), "values are float64"),
        (
            lambda t: t.apply_gradients(u64(1), np.zeros((1, 3), np.float32), learning_rates=[1, 2]),
            "2,.*for 1 segments",
        ),
        (lambda t: t.scan(3, 3, 10), r"part=3 is outside 0\.\.2"),
        (lambda t: t.scan(0, 3, 0), "limit=0 is below 1"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        call(Table(config()))


def test_rates_must_be_finite() -> None:
    with pytest.raises(NonFiniteError):
        Table(config()).apply_gradients(u64(1), np.zeros((1, 3), np.float32), learning_rates=[np.nan])


def test_a_table_that_is_emptied_while_a_page_is_read_gives_what_is_left(monkeypatch) -> None:
    table = Table(config())
    ids = np.arange(5000, dtype=np.uint64)
    table.assign(ids, np.ones((ids.size, 3), np.float32))

    class Turns:
        """The readers' turns, before the third of which somebody empties the table and begins to fill it again."""

        taken = 0
        reading = table._stripes.reading

        def __enter__(self) -> None:
            self.taken += 1
            if self.taken == 3:
                table.clear()
                table.assign(ids[:300], np.ones((300, 3), np.float32))
            self.reading.__enter__()

        def __exit__(self, *error: object) -> None:
            self.reading.__exit__(*error)

    turns = Turns()
    monkeypatch.setattr(table._stripes, "reading", turns)
    found, _ = table.scan(0, 1, ids.size)
    assert turns.taken >= STRIPES
    assert 0 < len(found) < ids.size // 8
    assert np.isin(found.ids, ids).all()
    assert len(np.unique(found.ids)) == len(found)


def test_a_batch_is_grouped_by_stripe_in_order() -> None:
    ids = np.random.default_rng(2).integers(0, 50, 500).astype(np.uint64)
    starts, work, hashes, positions = (np.empty(500, np.uint64) for _ in range(4))
    arrays = ids, work, hashes, positions, starts
    where, *rest = (array.__array_interface__["data"][0] for array in arrays)
    group_by_stripe(where, 500, *rest)
    for s in range(STRIPES):
        want = [(naive.mix64(int(i)), k) for k, i in enumerate(ids) if naive.mix64(int(i)) >> 59 == s]
        span = slice(int(starts[s]), int(starts[s + 1]))
        assert want == list(zip(hashes[span].tolist(), positions[span].tolist(), strict=True))

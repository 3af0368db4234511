"""Tables whose stripes are gone through range by range: copies, sweeps, rebuilds, and rows that are closed up."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.unit.test_table import DAY, DIM, TableMachine, colliding_ids, config, u64
from trilith.errors import MemoryLimitError
from trilith.ops.jit import JIT_DISABLED
from trilith.ops.memory import address_of
from trilith_services.ps.engine import stripe_memory, stripes, table_reads
from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.group_lock import group_lock
from trilith_services.ps.engine.kernels import index, sweep
from trilith_services.ps.engine.maintenance import Maintenance
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

SMALL = {"_SPLIT_SLOTS": 16, "_STEP": 1, "_STEP_PER_ROW": 2, "RANGE": 8, "_GIVEN_BACK": 64}


def make_small(patch: pytest.MonkeyPatch) -> None:
    for module in (stripe_memory, stripes, table_reads):
        for name, value in SMALL.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that goes by pieces goes by tiny ones."""
    make_small(monkeypatch)


def values_of(ids: np.ndarray) -> np.ndarray:
    """float32[n, DIM] that tell an id by its row."""
    return np.repeat((ids % np.uint64(99991)).astype(np.float32)[:, None], DIM, axis=1)


def spread_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.unique(np.random.default_rng(seed).integers(0, 2**64, count, np.uint64))


class PiecewiseMachine(TableMachine):
    """The machine of `test_table` with tiny pieces, rows in one stripe, and rows closed up now and then."""

    known = tuple(colliding_ids(40).tolist()) + tuple(range(20))

    @initialize()
    def small(self) -> None:
        self.patch = pytest.MonkeyPatch()
        make_small(self.patch)

    @rule(least=st.sampled_from([0.0, 0.3]))
    def compact(self, least: float) -> None:
        self.table.compact(least)
        if least == 0.0:
            used = self.table._stripes.columns[:, index.USED]
            assert (used <= self.table._stripes.columns[:, index.SIZE] * 65 // 64).all()

    def teardown(self) -> None:
        self.patch.undo()


PiecewiseMachine.TestCase.settings = settings(
    max_examples=2 if JIT_DISABLED else 60, stateful_step_count=30, deadline=None
)
TestTableByPieces = PiecewiseMachine.TestCase


@pytest.mark.usefixtures("small_steps")
def test_an_index_is_rebuilt_piece_by_piece_and_leads_to_every_row_meanwhile() -> None:
    table = Table(config())
    ids = spread_ids(3000)
    known: list[int] = []
    seen = 0
    for start in range(0, len(ids), 25):
        table.assign(ids[start : start + 25], values_of(ids[start : start + 25]))
        known += ids[start : start + 25].tolist()
        if start % 3 == 0:
            gone = known[:: 11 + start % 7]
            assert table.erase(u64(*gone)) == len(gone)
            known = [i for i in known if i not in set(gone)]
        seen += len(table._stripes._rebuilds)
        assert len(table) == len(known)
        np.testing.assert_array_equal(table.lookup(u64(*known)), values_of(u64(*known)))
    assert seen > 100  # there were rebuilds under way


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("seed", range(3))
def test_a_write_that_fails_in_the_middle_leaves_no_index_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    table, plan = Table(config()), stripe_memory._plan_index
    ids = spread_ids(4000, seed)
    monkeypatch.setattr(stripe_memory, "_plan_index", lambda *given: 1 // 0 if rng.random() < 0.3 else plan(*given))
    written: list[np.ndarray] = []
    failed = 0
    for start in range(0, len(ids), 40):
        some = ids[start : start + 40]
        try:
            table.assign(some, values_of(some))
            written.append(some)
        except ZeroDivisionError:
            failed += 1
    assert failed > 10
    assert table.contains(np.concatenate(written)).all()
    found = ids[table.contains(ids)]
    assert len(found) == len(table) == len(np.unique(table_ids(table)))
    np.testing.assert_array_equal(table.lookup(found), values_of(found))


def table_ids(table: Table) -> np.ndarray:
    return np.concatenate([table.stripe_ids(s) for s in range(table.stripes)])


@pytest.mark.usefixtures("small_steps")
def test_memory_of_freed_rows_goes_back_to_the_machine_and_to_other_tables() -> None:
    budget = MemoryBudget(400_000)
    full, other = (Table(config(name, dim=16), budget=budget) for name in "ab")
    budget.reclaim, budget.free = lambda: (full.compact(), None)[1], lambda: full.free_bytes
    ids = np.arange(100_000, dtype=np.uint64)
    ones = np.ones((100, 16), np.float32)
    count = 0
    while budget.used + 40_000 < budget.limit:
        full.assign(ids[count : count + 100], ones)
        count += 100
    with pytest.raises(MemoryLimitError):
        other.assign(ids[:500], np.ones((500, 16), np.float32))
    kept = ids[:count:7]
    full.erase(np.setdiff1d(ids[:count], kept))
    other.assign(ids[:1500], np.ones((1500, 16), np.float32))
    assert budget.used <= budget.limit
    assert full.contains(kept).all()
    assert (full.lookup(kept) == 1).all()
    assert len(full) == len(kept)


def test_eviction_gives_the_memory_of_expired_rows_back() -> None:
    budget = MemoryBudget(1 << 30)
    table = Table(config(dim=16), budget=budget)
    count = 3_000 if JIT_DISABLED else 100_000
    ids = np.arange(count, dtype=np.uint64)
    table.assign(ids, np.ones((count, 16), np.float32), request_time=1)
    table.assign(ids[::10], np.ones((len(ids[::10]), 16), np.float32), request_time=DAY)
    full = budget.used
    assert table.evict(DAY + 1) == count - len(ids[::10])
    assert budget.used == table.memory_bytes < full / 4
    assert (table.lookup(ids[::10]) == 1).all()


def test_a_sweep_that_frees_little_is_not_repeated_at_once_nor_told_again(caplog: pytest.LogCaptureFixture) -> None:
    budget = MemoryBudget(2)
    table = Table(config(dim=16), budget=budget)
    sweeps: list[int] = []
    table.evict = lambda now: sweeps.append(now) or 0  # type: ignore[method-assign]
    now = 0.0
    maintenance = Maintenance({"t": table}, budget, clock=lambda: now)
    for tick in range(600):
        now = 1000.0 + 10 * tick
        maintenance.tick()
    assert 3 <= len(sweeps) <= 12
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1


def test_rows_that_were_freed_are_no_reason_to_evict() -> None:
    budget = MemoryBudget(400_000)
    table = Table(config(dim=16), budget=budget)
    budget.free = lambda: table.free_bytes
    count = 0
    while not budget.above_soft_limit:
        table.assign(np.arange(count, count + 100, dtype=np.uint64), np.ones((100, 16), np.float32))
        count += 100
    table.erase(np.arange(count // 2, dtype=np.uint64))
    assert not budget.above_soft_limit


class Turns:
    """The readers' turns; after each something else happens."""

    def __init__(self, table: Table, work: Callable[[int], None]) -> None:
        self.reading, self.work, self.taken, self.busy = table._stripes.reading, work, 0, False

    def __enter__(self) -> None:
        self.reading.__enter__()

    def __exit__(self, *error: object) -> None:
        self.reading.__exit__(None, None, None)
        if not self.busy:
            self.busy = True
            self.taken += 1
            self.work(self.taken)
            self.busy = False


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("seed", range(1 if JIT_DISABLED else 4))
def test_a_copy_has_every_row_that_stays_once_whatever_happens_between_its_turns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = Table(config())
    # In one stripe, so that every turn matters; some share their lines, so that there is a stash.
    pool = spread_ids(40_000, seed)
    pool = np.concatenate([colliding_ids(60), one_stripe(pool)[:240]])
    stay, come_and_go = pool[::2], pool[1::2]
    table.assign(stay, values_of(stay), request_time=2)
    table.assign(come_and_go[:100], values_of(come_and_go[:100]), request_time=1)

    def happen(turn: int) -> None:
        some = rng.choice(come_and_go, 12)
        match rng.integers(0, 5):
            case 0:
                table.erase(some)
            case 1 | 2:
                table.assign(some, values_of(some), request_time=1)
            case 3:
                table.erase_before(2)
            case 4:
                table.compact()

    table._stripes.reading = Turns(table, happen)  # type: ignore[assignment]
    copied = Rows.concatenate([piece for s in range(table.stripes) for piece in table.export_pieces(s)])
    listed = np.concatenate([table.stripe_ids(s) for s in range(table.stripes)])
    assert table._stripes.reading.taken > 20  # type: ignore[attr-defined]
    for ids in (copied.ids, listed):
        assert len(np.unique(ids)) == len(ids)
        assert np.isin(stay, ids).all()
        assert np.isin(ids, pool).all()
    np.testing.assert_array_equal(copied.weights, values_of(copied.ids))


def one_stripe(ids: np.ndarray) -> np.ndarray:
    """Those of the ids whose hashes begin with zeros, as those of `colliding_ids` do."""
    value = ids.copy()
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return ids[value >> np.uint64(59) == 0]


@pytest.mark.skipif(JIT_DISABLED, reason="plain Python is too slow to race")
def test_threads_write_erase_sweep_copy_and_close_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripe_memory, "_SPLIT_SLOTS", 64)
    table = Table(config(optimizer="adagrad"))
    ids = spread_ids(60_000)
    stay, come_and_go, new = ids[::3], ids[1::3], ids[2::3]
    table.assign(stay, values_of(stay), request_time=2)
    failures: list[BaseException] = []
    ended = threading.Event()

    def run(work: Callable[[], Iterator[None]]) -> threading.Thread:
        def loop() -> None:
            try:
                for _ in work():
                    if ended.is_set():
                        return
            except BaseException as error:  # noqa: BLE001 - told below
                failures.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    def come() -> Iterator[None]:
        rng = np.random.default_rng(1)
        while True:
            some = rng.choice(come_and_go, 300)
            table.assign(some, values_of(some), request_time=1)
            yield
            table.erase(rng.choice(come_and_go, 300))
            yield

    def sweep() -> Iterator[None]:
        while True:
            table.erase_before(2)
            yield
            table.compact()
            yield

    def look_up() -> Iterator[None]:
        while True:
            np.testing.assert_array_equal(table.lookup(stay), values_of(stay))
            yield

    threads = [run(come), run(sweep), run(look_up)]
    for piece in np.array_split(new, 16):
        table.assign(piece, values_of(piece), request_time=2)
        if failures:
            break
        if piece[0] % np.uint64(2):
            copied = np.concatenate([part.ids for s in range(table.stripes) for part in table.export_pieces(s)])
            assert len(np.unique(copied)) == len(copied)
            assert np.isin(stay, copied).all()
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    table.erase(come_and_go)
    np.testing.assert_array_equal(table.lookup(ids[::3]), values_of(ids[::3]))
    np.testing.assert_array_equal(table.lookup(new), values_of(new))
    assert len(table) == len(stay) + len(new)


def test_a_stack_of_freed_rows_that_others_have_changed_is_sorted_again_before_rows_move() -> None:
    """Fewer numbers may be on it than were above the bound: what lies beyond its top is no row's to take."""
    table = Table(config())
    ids = spread_ids(4000)
    table.assign(ids, values_of(ids), request_time=1)
    table.erase(ids[::2])
    columns = table._stripes.columns[0]
    stripe, places = address_of(columns), int(table._stripes.places[0])
    freed, bound = int(columns[index.FREED]), int(columns[index.SIZE])
    assert 0 < sweep.sort_freed(stripe, bound) < freed
    before = np.sort(np.frombuffer((ctypes.c_uint32 * freed).from_address(int(columns[index.FREE])), np.uint32))
    for high in (freed, freed + 1):
        assert sweep.move_rows(stripe, 0, places, bound, high) == -1
    after = np.sort(np.frombuffer((ctypes.c_uint32 * freed).from_address(int(columns[index.FREE])), np.uint32))
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(table.lookup(ids[1::2]), values_of(ids[1::2]))


def test_both_groups_get_their_turn_together() -> None:
    readers, writers = group_lock()
    order: list[str] = []
    inside = threading.Barrier(3)

    def enter(room, name: str, together: bool) -> threading.Thread:
        def visit() -> None:
            with room:
                order.append(name)
                if together:
                    inside.wait(10)

        thread = threading.Thread(target=visit)
        thread.start()
        return thread

    with writers:
        threads = [enter(readers, "reader", True) for _ in range(3)]
        while len(readers._waiting) < 3:
            pass
        threads.append(enter(writers, "writer", False))
        while len(writers._waiting) < 1:
            pass
    for thread in threads:  # the three readers meet inside: none waits for the second writer
        thread.join(10)
    assert order == ["reader"] * 3 + ["writer"]
    assert readers._inside == writers._inside == 0


def test_a_table_that_outgrows_its_address_space_moves_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripe_memory, "commits_strictly", lambda: True)
    monkeypatch.setattr(stripe_memory, "_FIRST_COUNTED", 1 << 14)
    table = Table(config(dim=16, optimizer="adagrad"))
    count = 2_000 if JIT_DISABLED else 200_000
    ids = spread_ids(count)
    wide = np.repeat(values_of(ids)[:, :1], 16, axis=1)
    for start in range(0, len(ids), 5000):
        table.assign(ids[start : start + 5000], wide[start : start + 5000], request_time=3)
    assert min(table._stripes._room) > 100 * count // 2000
    np.testing.assert_array_equal(table.lookup(ids), wide)
    table.erase(ids[::2])
    table.compact()
    np.testing.assert_array_equal(table.lookup(ids[1::2]), wide[1::2])


def test_a_thousand_tables_fit_the_address_space_and_an_empty_one_takes_little() -> None:
    before = address_space()
    tables = [Table(config(f"t{k}", optimizer="adagrad")) for k in range(20)]
    assert address_space() - before < 20 << 32
    assert sum(table.memory_bytes for table in tables) < 20 * (64 << 10)


def address_space() -> int:
    """Bytes of it that this process has reserved."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

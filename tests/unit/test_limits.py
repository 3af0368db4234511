"""What one call or one PS may take, whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.unit.test_table import config, u64
from trilith.errors import MemoryLimitError
from trilith.ops.jit import JIT_DISABLED
from trilith.shard import ANY_WRITE, UpdatePart, Write
from trilith_proto import ps_pb2
from trilith_services.ps.engine import store as store_module
from trilith_services.ps.engine.touched import Touched
from trilith_services.ps.process.shard import LocalShard

MB = 1 << 20


def filled(count: int, dim: int = 3) -> LocalShard:
    store = LocalShard(threads=1)
    store.create_tables([config(dim=dim)])
    ids = np.arange(count, dtype=np.uint64)
    store.assign([UpdatePart("t", ids, np.ones((count, dim), np.float32))], ANY_WRITE)
    return store


def pages(store: LocalShard, limit: int) -> list[int]:
    """How many entries the pages of a dump have; the ids of all are counted on the way."""
    sizes, offset, first = [], 0, True
    while offset or first:
        page = store.dump_entries("t", part=0, parts=1, limit=limit, offset=offset)
        sizes.append(len(page.entries))
        offset, first = page.offset, False
    return sizes


def test_a_page_of_a_dump_is_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 500 if JIT_DISABLED else 3000
    store = filled(count, dim=64)
    monkeypatch.setattr(store_module, "_PAGE_ROWS", 150)
    monkeypatch.setattr(store_module, "_PAGE_STEP", 16)
    sizes = pages(store, 2**32 - 1)
    assert sum(sizes) == count
    assert max(sizes) == 150
    monkeypatch.setattr(store_module, "_PAGE_BYTES", 10_000)
    sizes = pages(store, 2**32 - 1)
    assert sum(sizes) == count
    assert 32 <= max(sizes) <= 64  # of 260 bytes and more
    store.close()


def test_the_room_that_is_kept_for_indexes_is_enough_for_rows_as_chance_spreads_them() -> None:
    store = LocalShard(threads=1)
    store.create_tables([config(dim=3)])
    table = store.table("t")
    stripes, step = table._stripes, 97 if JIT_DISABLED else 997
    for start in range(0, 60 * step, step):
        expected = stripes.growth_bytes(step) + step * stripes.row_bytes
        before = table.memory_bytes
        ids = np.arange(start, start + step, dtype=np.uint64)
        store.assign([UpdatePart("t", ids, np.ones((step, 3), np.float32))], ANY_WRITE)
        assert table.memory_bytes - before <= expected, f"rows {start} to {start + step}"
    store.close()


def test_the_bounds_themselves_hold_back_a_large_table() -> None:
    assert store_module._PAGE_ROWS <= 100_000
    assert store_module._PAGE_BYTES <= 16 << 20


@pytest.fixture
def store() -> Iterator[LocalShard]:
    """One that may use a megabyte."""
    made = LocalShard(threads=1, memory_limit_bytes=MB)
    yield made
    made.close()


def used(store: LocalShard) -> int:
    """What Stats say; it is what the limit is compared with."""
    return int(store.stats().memory_bytes)


def filtered_config(capacity: int, name: str = "f") -> ps_pb2.TableConfig:
    made = config(name)
    made.filter, made.filter_capacity = ps_pb2.TableConfig.SLIDING, capacity
    made.occurrence_thresholds.default_occurrence_threshold = 2
    return made


def variable(name: str, size: int, optimizer: str = "adam") -> ps_pb2.VariableSpec:
    spec = ps_pb2.VariableSpec(name=name, size=size)
    getattr(spec.optimizer, optimizer).SetInParent()
    return spec


def test_a_filter_counts_with_all_its_cells_and_is_refused_by_their_size(store: LocalShard) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"table 'f' needs 8192 bytes .* and 840\d{6} for its filter of 300000000"
    ):
        store.create_tables([filtered_config(0)])
    assert not store.tables
    assert used(store) == 0
    store.create_tables([filtered_config(100_000)])
    (table,) = store.stats().tables
    assert 270_000 < table.bytes < 320_000
    assert used(store) == table.bytes
    with pytest.raises(MemoryLimitError, match="table 'g'"):
        store.create_tables([filtered_config(10_000, "e"), filtered_config(300_000, "g")])
    assert used(store) == store.stats().tables[0].bytes
    store.drop_table("f")
    assert used(store) == 0


def test_an_index_that_does_not_fit_is_refused(store: LocalShard) -> None:
    made = config()
    made.hash_table.initial_capacity = 1_000_000
    with pytest.raises(MemoryLimitError, match=r"table 't' needs \d{8} bytes for its index"):
        store.create_tables([made])
    assert used(store) == 0


def test_variables_count_with_their_state_and_are_refused_whole(store: LocalShard) -> None:
    values = np.zeros(20_000, np.float32)
    assert store.create_variables([variable("a", 20_000)], [values]) == [True]
    size = used(store)
    assert 240_000 <= size < 241_000  # adam keeps twice as much state
    assert store.create_variables([variable("a", 20_000)], [values]) == [False]
    assert used(store) == size
    many = [variable(name, 20_000) for name in "abcde"]
    with pytest.raises(MemoryLimitError, match="variables 'b', 'c', 'd', 'e': 9600.. more bytes are needed"):
        store.create_variables(many, [values] * 5)
    assert len(store.variables) == 1
    assert used(store) == size
    store.variables.keep([])
    assert used(store) == 0


def test_elements_of_queues_count_until_they_are_done(store: LocalShard) -> None:
    element = "x" * 1000
    store.create_queue("q", [element] * 10)
    size = used(store)
    assert 10_000 < size < 12_000
    with pytest.raises(MemoryLimitError, match="queue 'q': 2000 elements"):
        store.enqueue("q", [element] * 2000, ANY_WRITE)
    given = store.dequeue(["q"], "w", ANY_WRITE, lease_s=60)
    assert used(store) == size
    assert store.acknowledge("w", given.lease, ANY_WRITE)
    store.dequeue(["q"], "w", ANY_WRITE, lease_s=0)
    assert used(store) == size * 8 // 10
    (state,) = store.queues.export()
    store.queues.replace([state])
    assert used(store) == size * 8 // 10
    store.queues.replace([])
    assert used(store) == 0


def test_what_is_remembered_of_writes_counts(store: LocalShard) -> None:
    store.create_tables([config()])
    before = used(store)
    one = np.ones((1, 3), np.float32)
    store.assign([UpdatePart("t", u64(1), one)], Write(client_id=7, sequence=1))
    assert used(store) > before + 12
    table = store.table("t")
    before = used(store)
    table.touched = touched = Touched(1 << 20)
    assert used(store) == before + 8 * 1024
    touched.add(np.arange(5000, dtype=np.uint64))
    assert used(store) == before + 8 * 8192
    touched.take()
    table.touched = None
    assert used(store) == before


def test_rows_are_refused_for_what_others_use(store: LocalShard) -> None:
    store.create_tables([config(dim=16)])
    store.create_variables([variable("a", 200_000, "sgd")], [np.zeros(200_000, np.float32)])
    with pytest.raises(MemoryLimitError, match="3000 new rows need"):
        store.assign([UpdatePart("t", np.arange(3000, dtype=np.uint64), np.ones((3000, 16), np.float32))], ANY_WRITE)
    assert used(store) <= MB

"""What one call or one PS may take, whatever is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_table import config
from trilith.ops.jit import JIT_DISABLED
from trilith.shard import ANY_WRITE, UpdatePart
from trilith_services.ps import store as store_module
from trilith_services.ps.store import Store


def filled(count: int, dim: int = 3) -> Store:
    store = Store(threads=1)
    store.create_tables([config(dim=dim)])
    ids = np.arange(count, dtype=np.uint64)
    store.assign([UpdatePart("t", ids, np.ones((count, dim), np.float32))], ANY_WRITE)
    return store


def pages(store: Store, limit: int) -> list[int]:
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


def test_the_bounds_themselves_hold_back_a_large_table() -> None:
    assert store_module._PAGE_ROWS <= 100_000
    assert store_module._PAGE_BYTES <= 16 << 20

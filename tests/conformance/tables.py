"""The kind of single tables: several of them by name in one model, with filters and files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tests.conformance.compare import Partial
from tests.conformance.configs import filter_of, floats, hash_table_config
from tests.conformance.runner import Kind
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.entry_codec import (
    decode_entries,
    entry_list,
    extract_slot_from_entry,
    iterate_table_and_apply,
)
from trilith_services.ps.reference.filter_shards import restore_filter, save_filter
from trilith_services.ps.reference.fused import FusedLookup, fused_apply_gradient, fused_lookup
from trilith_services.ps.reference.norms import almost_equal, norm_square
from trilith_services.ps.reference.scope import Scope
from trilith_services.ps.reference.single_table import SingleTable

__all__ = ["Linalg", "Tables", "fused_result", "offsets_of"]


def signed(ids: np.ndarray) -> list[int]:
    return sorted(ids.astype(np.int64).tolist())


def fused_result(found: FusedLookup) -> dict[str, Any]:
    names = ("embeddings", "splits", "id_offsets", "emb_offsets")
    return {name: getattr(found, name) for name in names}


def offsets_of(sizes: Sequence[int], dims: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks begin among ids and among gradients, as a fused lookup would say."""
    counts = np.array(sizes, np.int64)
    widths = np.tile(dims, counts.size // len(dims))
    zero = np.zeros(1, np.int64)
    return np.concatenate([zero, np.cumsum(counts)]), np.concatenate([zero, np.cumsum(counts * widths)])


class Tables(Kind):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = Scope()
        self.filters = {name: filter_of(each) for name, each in self.config.get("filters", {}).items()}
        self.tables: dict[str, SingleTable] = {}
        for name, each in self.config["tables"].items():
            self.op_create(name, each)

    def op_create(self, t: str, config: Mapping[str, Any]) -> None:
        self.tables[t] = SingleTable(
            self.model,
            hash_table_config(config),
            hash_filter=self.filters.get(config.get("filter", "")),
            name_suffix=config.get("name_suffix", t),
            saver_parallel=config.get("saver_parallel", -1),
        )

    def op_set_global_step(self, value: int) -> None:
        self.model.global_step = value

    # ---- reads and writes --------------------------------------------------------------------------------------

    def op_lookup(self, ids: Sequence[int], t: str = "t", **options: Any) -> np.ndarray:
        return self.tables[t].lookup(ids, **options)

    def op_lookup_entry(self, ids: Sequence[int], t: str = "t") -> list[Any]:
        return [self._described(entry) if entry else None for entry in self.tables[t].lookup_entry(ids)]

    def op_lookup_entry_num(self, ids: Sequence[int], t: str = "t") -> list[list[float]]:
        entries = map(hash_table_pb2.EntryDump.FromString, self.tables[t].lookup_entry(ids))
        return [list(entry.num) for entry in entries]

    @staticmethod
    def _described(data: bytes) -> Partial:
        entry = hash_table_pb2.EntryDump.FromString(data)
        assert not entry.HasField("id")
        return Partial(num=list(entry.num), last_update_ts_sec=entry.last_update_ts_sec)

    def op_assign(self, ids: Sequence[int], values: Any, t: str = "t", req_time: int | None = None) -> None:
        self.tables[t].assign(ids, floats(values), req_time)

    def op_assign_add(self, ids: Sequence[int], values: Any, t: str = "t", req_time: int | None = None) -> None:
        self.tables[t].assign_add(ids, floats(values), req_time)

    def op_apply_gradients(self, ids: Sequence[int], grads: Any, t: str = "t", **options: Any) -> None:
        self.tables[t].apply_gradients(ids, floats(grads), **options)

    def op_reinitialize(self, ids: Sequence[int], t: str = "t", req_time: int = 0) -> np.ndarray:
        return self.tables[t].reinitialize(ids, request_time=req_time)

    def op_contains(self, ids: Sequence[int], t: str = "t") -> np.ndarray:
        return self.tables[t].table.contains(np.array(ids, np.int64))

    def op_size(self, t: str = "t") -> int:
        return self.tables[t].size()

    def op_clear(self, t: str = "t") -> None:
        self.tables[t].table.clear()

    def op_evict(self, now: int, t: str = "t") -> None:
        self.tables[t].table.evict(now)

    def op_max_update_ts(self, t: str = "t") -> int:
        return self.tables[t].table.newest_update

    def op_dim(self, t: str = "t") -> int:
        return self.tables[t].dim_size

    op_dim_size = op_dim

    def op_parallel_add_and_optimize(
        self,
        ids: Sequence[int],
        add_scale: float,
        grad_scale: float,
        learning_rates: Sequence[float] | None = None,
        t: str = "t",
    ) -> None:
        table = self.tables[t]
        column = np.repeat(np.array(ids, np.float32)[:, None], table.dim_size, axis=1)
        together = threading.Barrier(2)

        def add() -> None:
            together.wait()
            table.assign_add(ids, np.float32(add_scale) * column)

        def step() -> None:
            together.wait()
            table.apply_gradients(ids, np.float32(grad_scale) * column, learning_rates=learning_rates)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(add), pool.submit(step)]:
                done.result()

    def op_periodic_apply(self, steps: int, period_to_id: Sequence[Sequence[int]], grad: float, t: str = "t") -> None:
        table = self.tables[t]
        for step in range(steps):
            ids = [fid for period, fid in period_to_id if step % period == 0]
            if ids:
                table.apply_gradients(ids, np.full((len(ids), table.dim_size), grad), global_step=step)

    def op_lookup_max_of(self, ids: Sequence[int], floor: float, t: str = "t") -> np.ndarray:
        """How often an id is sampled, where its value is the interval between two occurrences."""
        return 1 / np.maximum(self.op_lookup(ids, t), floor)

    # ---- ranges of ids -----------------------------------------------------------------------------------------

    def _range(self, first: int, count: int, rule: str, t: str) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(count)
        ids = first + index
        rules = {"index": index, "parity": index % 2, "zero": 0 * index, "one": 0 * index + 1, "id": ids}
        return ids, np.repeat(rules[rule].astype(np.float32)[:, None], self.tables[t].dim_size, axis=1)

    def op_assign_range(self, first: int, count: int, rule: str, t: str = "t", req_time: int | None = None) -> None:
        self.tables[t].assign(*self._range(first, count, rule, t), req_time)

    def op_check_range(self, first: int, count: int, rule: str, t: str = "t") -> bool:
        ids, values = self._range(first, count, rule, t)
        return bool(np.array_equal(self.tables[t].lookup(ids), values))

    def op_count_present(self, first: int, count: int, t: str = "t") -> int:
        return int(self.op_contains(range(first, first + count), t).sum())

    # ---- dumps -------------------------------------------------------------------------------------------------

    def op_copy_by_shards(self, src: str, dst: str, nshards: int, limit: int = 1000) -> int:
        from trilith_services.ps.reference.entry_files import import_rows

        copied = 0

        def copy(entries: list[bytes]) -> None:
            nonlocal copied
            copied += len(entries)
            target = self.tables[dst].table
            import_rows(target, decode_entries(target.layout, entries))

        iterate_table_and_apply(self.tables[src].table, copy, limit=limit, nshards=nshards)
        return copied

    def op_iterate_count(self, limit: int = 1000, nshards: int = 4, t: str = "t") -> int:
        sizes: list[int] = []
        iterate_table_and_apply(
            self.tables[t].table, lambda entries: sizes.append(len(entries)), limit=limit, nshards=nshards
        )
        assert max(sizes, default=0) <= limit
        return sum(sizes)

    def op_dump_ids(self, shard: int, total: int, limit: int, offset: int = 0, t: str = "t") -> list[int]:
        _, entries = self.tables[t].save_as_tensor(shard, total, limit, offset)
        return signed(decode_entries(self.tables[t].table.layout, entries).ids)

    def op_dump_twice(self, limit: int, t: str = "t") -> list[Any]:
        layout = self.tables[t].table.layout
        offset, first = self.tables[t].save_as_tensor(0, 1, limit, 0)
        _, second = self.tables[t].save_as_tensor(0, 1, limit, offset)
        return [len(first), signed(decode_entries(layout, first + second).ids)]

    def op_dump_count_stop_first(self, t: str = "t") -> int:
        calls = []

        def stop(entries: list[bytes]) -> bool:
            calls.append(entries)
            return False

        iterate_table_and_apply(self.tables[t].table, stop, limit=1, nshards=1)
        return len(calls)

    def op_slot_of_entry(self, id: int, t: str = "t", fid_v2: bool = True) -> int:  # noqa: A002
        table = self.tables[t]
        table.assign([id], np.zeros((1, table.dim_size)))
        _, rows = table.table.export_rows(np.array([id]).astype(np.uint64))
        (slot,) = extract_slot_from_entry(entry_list(table.table.layout, rows), fid_v2=fid_v2)
        return int(slot)

    # ---- files -------------------------------------------------------------------------------------------------

    def op_save(self, basename: str, t: str = "t") -> None:
        self.tables[t].save(self.path(basename))

    def op_restore(self, basename: str, t: str = "t") -> None:
        self.tables[t].restore(self.path(basename))

    def op_filter_save(self, f: str, basename: str) -> None:
        save_filter(self.filters[f], self.path(basename))

    def op_filter_restore(self, f: str, basename: str) -> None:
        restore_filter(self.filters[f], self.path(basename))

    def op_count_files(self, basename: str) -> int:
        return len([each for each in self.folder.rglob("*") if self._relative(each).startswith(basename)])

    def op_delete_files(self, prefix: str) -> None:
        for each in list(self.folder.rglob("*")):
            if each.is_file() and self._relative(each).startswith(prefix):
                each.unlink()

    def _relative(self, path: Any) -> str:
        return str(path.relative_to(self.folder))

    # ---- several tables ----------------------------------------------------------------------------------------

    def op_fused_lookup(
        self,
        tables: Sequence[str],
        ids: Sequence[int],
        fused_slot_size: Sequence[int],
        num_of_shards: int,
        req_time: int = 0,
    ) -> dict[str, Any]:
        rows = [self.tables[t].table for t in tables]
        return fused_result(fused_lookup(rows, ids, fused_slot_size, num_of_shards, req_time))

    def op_fused_apply_gradient(
        self,
        tables: Sequence[str],
        ids: Sequence[int],
        fused_slot_size: Sequence[int],
        id_grads: Sequence[float],
        num_of_shards: int,
        learning_rates: Sequence[float] | None = None,
        global_step: int = 0,
        req_time: int = 0,
        enable_grad_accumulation: bool = False,
    ) -> None:
        chosen = [self.tables[t] for t in tables]
        rates = np.concatenate([each.learning_rates() for each in chosen]) if learning_rates is None else learning_rates
        id_offsets, grad_offsets = offsets_of(fused_slot_size, [each.dim_size for each in chosen])
        fused_apply_gradient(
            [each.table for each in chosen],
            ids,
            ids,
            fused_slot_size,
            id_grads,
            id_offsets,
            grad_offsets,
            rates,
            req_time,
            global_step,
            num_of_shards,
            enable_grad_accumulation,
        )


class Linalg(Kind):
    def op_almost_equal(self, x: float, y: float) -> bool:
        return bool(almost_equal(floats(x), floats(y)))

    def op_norm_square(self, values: Sequence[float]) -> float:
        return float(norm_square(np.array(floats(list(values)), np.float32)))

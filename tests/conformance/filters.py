"""Kinds of occurrence filters: filter, probabilistic_filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.conformance.configs import filter_of
from tests.conformance.rows import build_table
from tests.conformance.runner import Kind
from trilith_proto import ps_pb2
from trilith_services.ps.engine.filters import ProbabilisticFilter, Thresholds
from trilith_services.ps.engine.table import Table
from trilith_services.ps.reference.filter_shards import read_filter_meta, restore_filter, save_filter
from trilith_services.ps.reference.hash_filters import intercept_gradient, should_be_filtered
from trilith_services.ps.reference.shard_files import find_shard_files

__all__ = ["Filter", "Probabilistic"]


def fids(*values: int) -> np.ndarray:
    return np.array([each & (2**64 - 1) for each in values], np.uint64)


def counts(count: int, n: int) -> np.ndarray:
    return np.full(n, count, np.uint32)


class Filter(Kind):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filter: Any = filter_of(self.config)
        self.random = np.random.default_rng(11)
        self.distinct = 0

    def op_add(self, fid: int, count: int = 1) -> int:
        return int(self.filter.add(fids(fid), counts(count, 1))[0])

    def op_get(self, fid: int) -> int:
        return int(self.filter.get(fids(fid))[0])

    def op_add_sequence(self, fid: int, count: int, times: int) -> list[int]:
        return [self.op_add(fid, count) for _ in range(times)]

    def op_add_get_sequence(self, fid: int, count: int, times: int) -> list[list[int]]:
        return [[self.op_add(fid, count), self.op_get(fid)] for _ in range(times)]

    def op_add_random(self, how_many: int, count: int) -> None:
        self.filter.add(self.random.integers(0, 2**64, how_many, np.uint64), counts(count, how_many))

    def op_random_stream(self, keys: int, count: int) -> float:
        """Count random 31-bit ids; the share of distinct ones whose count comes out wrong."""
        stream = self.random.integers(0, 2**31, keys, np.uint64)
        self.filter.add(stream, counts(count, keys))
        distinct, times = np.unique(stream, return_counts=True)
        self.distinct = distinct.size
        return float((self.filter.get(distinct) != np.minimum(count * times, 15)).mean())

    def op_stat(self, field: str) -> Any:
        if field == "elements_le_keys":
            return self.filter.elements <= self.distinct
        names = {
            "failures": "failures",
            "failure_count": "failures",
            "elements": "elements",
            "num_elements": "elements",
        }
        return getattr(self.filter, names.get(field, field))

    def op_total_elements(self) -> int:
        return self.filter.elements

    def op_full(self) -> bool:
        return self.filter.full

    def op_clone_equals(self) -> bool:
        return self.filter.clone() == self.filter

    def op_should_be_filtered(self, fids: Sequence[int], count: int = 1, threshold: int | None = None) -> np.ndarray:
        ids = globals()["fids"](*fids)
        limit = None if threshold is None else Thresholds.constant(threshold)
        return should_be_filtered(self.filter, ids, counts(count, ids.size), thresholds=limit)

    def op_intercept(self, ids: Sequence[int], grad: Any) -> np.ndarray:
        return intercept_gradient(self.filter, ids, np.array(grad, np.float32))

    def op_save(self, basename: str) -> None:
        save_filter(self.filter, self.path(basename))

    def op_restore(self, basename: str) -> None:
        restore_filter(self.filter, self.path(basename))

    def op_count_files(self, basename: str) -> int:
        base = self.folder / basename
        return len(list(base.parent.glob(f"{base.name}-*"))) if base.parent.is_dir() else 0

    def op_split_meta(self, basename: str, splits: Sequence[int]) -> list[Any]:
        """What all files of a range say alike."""
        files = find_shard_files(self.path(basename))[slice(*splits)]
        found = []
        for each in map(read_filter_meta, files):
            shared = each.sliding_hash_filter_meta
            meta = [each.total_size, each.num_elements, shared.split_num, shared.head, shared.head_increment]
            if meta not in found:
                found.append(meta)
        return found[0] if len(found) == 1 else found


class Probabilistic(Kind):
    """Draws decide; of the trials of a vector so many pass that any seed keeps within its tolerance."""

    def _filter(self, threshold: int, equal: bool) -> ProbabilisticFilter:
        return ProbabilisticFilter(Thresholds.constant(threshold), equal=equal, seed=threshold)

    def op_count_inserted(self, trials: int, count: int, threshold: int, equal: bool = False) -> int:
        plain = build_table({"dim": 1}).config
        table = Table(
            ps_pb2.TableConfig(name="trials", hash_table=plain.hash_table), filter=self._filter(threshold, equal)
        )
        ids = np.repeat(np.arange(trials, dtype=np.uint64), count)
        table.apply_gradients(ids, np.ones((ids.size, 1), np.float32), dedup=True)
        return len(table)

    def op_count_passed(self, trials: int, count: int, threshold: int, table: str, equal: bool = False) -> int:
        ids = np.arange(trials, dtype=np.uint64)
        rows = None if table == "none" else build_table({"dim": 1})
        if table not in {"none", "empty"}:
            rows.assign(ids, np.zeros((trials, 1), np.float32))
        filtered = should_be_filtered(self._filter(threshold, equal), ids, counts(count, trials), table=rows)
        return int((~filtered).sum())

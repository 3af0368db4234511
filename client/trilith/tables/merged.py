"""MergedTables: features whose configs are the same share one inner table, and its ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trilith.arrays import id_array
from trilith.errors import InvalidRequestError
from trilith.tables.config import HashTableConfig

__all__ = ["MergedTables", "NamedTables", "merge_configs", "merged_name"]

Floats = npt.NDArray[np.float32]
Update = tuple[npt.ArrayLike, npt.ArrayLike]

_FEATURE_SLOT = re.compile(r"^fc_slot_[0-9]*$")


class NamedTables(Protocol):
    """Tables by name: what MergedTables stands on, and offers itself."""

    def lookup(self, ids: Mapping[str, Any]) -> Mapping[str, Floats]:
        """float32[n, dim] for each requested name."""

    def assign(self, updates: Mapping[str, Any], req_time: int = 0) -> Any:
        """Set weights."""

    def assign_add(self, updates: Mapping[str, Any], req_time: int = 0) -> Any:
        """Add to weights."""

    def apply_gradients(self, updates: Mapping[str, Any], *, global_step: int = 0, req_time: int = 0) -> Any:
        """Take optimizer steps."""


def merged_name(names: Iterable[str]) -> str:
    """Name of the inner table of features: md5 of their sorted names, in hex."""
    return hashlib.md5(",".join(sorted(names)).encode(), usedforsecurity=False).hexdigest()


def merge_configs(configs: Mapping[str, HashTableConfig]) -> tuple[dict[str, HashTableConfig], dict[str, str]]:
    """Find the inner tables.

    Args:
        configs: By feature. Not changed.

    Returns:
        Configs by inner name, sorted, and the inner name by feature. An inner config also lists the name that its table
        had when features were called "slot_1" rather than "fc_slot_1".
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(configs):
        groups.setdefault(str(configs[name]), []).append(name)
    inner: dict[str, HashTableConfig] = {}
    inner_of: dict[str, str] = {}
    for names in groups.values():
        merged = merged_name(names)
        first = configs[names[0]]
        extra = list(first.extra_restore_names)
        legacy = merged_name(re.sub("^fc_", "", name) if _FEATURE_SLOT.match(name) else name for name in names)
        if legacy != merged:
            extra.append(legacy)
        inner[merged] = HashTableConfig(first.table_config, first.learning_rate_fns, extra)
        inner_of.update(dict.fromkeys(names, merged))
    return {name: inner[name] for name in sorted(inner)}, inner_of


class MergedTables:
    """Features by name over inner tables: an id means the same row in all features that share one.

    Calls concatenate the features of an inner table in the order of their sorted names.

    Attributes:
        inner: The inner tables.
        inner_configs: Their configs, by sorted name.
    """

    def __init__(
        self,
        configs: Mapping[str, HashTableConfig],
        factory: Callable[[Mapping[str, HashTableConfig]], NamedTables],
    ) -> None:
        """Merge.

        Args:
            configs: By feature.
            factory: Makes the inner tables from configs by name.
        """
        self.inner_configs, self._inner_of = merge_configs(configs)
        self.inner: NamedTables = factory(self.inner_configs)

    @property
    def inner_names(self) -> list[str]:
        """Names of the inner tables, sorted."""
        return list(self.inner_configs)

    @property
    def dims(self) -> list[int]:
        """Floats per row of the inner tables, by sorted name."""
        return [
            sum(segment.dim_size for segment in config.table_config.entry_config.segments)
            for config in self.inner_configs.values()
        ]

    def lookup(
        self,
        ids: Mapping[str, npt.ArrayLike],
        auxiliary: MutableMapping[str, Any] | None = None,
        *,
        merged_ids: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Any:
        """Look up every feature's ids.

        Args:
            ids: By feature.
            auxiliary: Filled with the sizes by which each inner table's rows are cut, {inner name: [n, ...]}. If it is
                given and not empty afterwards, it is returned as a second value.
            merged_ids: The ids by inner table, already concatenated; `ids` then only says how to cut.

        Returns:
            float32[n, dim] by feature, or that and `auxiliary`.
        """
        groups = self._groups(ids)
        sizes = {inner: [np.asarray(ids[name]).size for name in names] for inner, names in groups.items()}
        if merged_ids is None:
            merged_ids = {inner: _concatenate_ids(ids, names) for inner, names in groups.items()}
        found = self.inner.lookup(merged_ids)
        rows: dict[str, Floats] = {}
        for inner, names in groups.items():
            rows.update(zip(names, np.split(found[inner], np.cumsum(sizes[inner])[:-1]), strict=True))
        result = {name: rows[name] for name in ids}
        if auxiliary is None:
            return result
        auxiliary.update(sizes)
        return (result, auxiliary) if auxiliary else result

    def assign(self, updates: Mapping[str, Update], req_time: int | None = None) -> MergedTables:
        """Set weights; of features that share rows the last in sorted order wins."""
        self.inner.assign(self._merge(updates), **_given(req_time=req_time))
        return self

    def assign_add(self, updates: Mapping[str, Update], req_time: int | None = None) -> MergedTables:
        """Add to weights."""
        self.inner.assign_add(self._merge(updates), **_given(req_time=req_time))
        return self

    def apply_gradients(
        self,
        updates: Mapping[str, Any],
        *,
        global_step: int | None = None,
        req_time: int | None = None,
        skip_merge_id: bool = False,
    ) -> MergedTables:
        """Take optimizer steps, of repeated ids as the inner tables do.

        Args:
            updates: (ids, gradients) by feature; gradients alone if `skip_merge_id`.
            global_step: For schedules, optimizers and readers that use it; None takes the inner tables' default.
            req_time: Becomes the rows' last update; None takes the inner tables' default.
            skip_merge_id: Pass on gradients by inner table, whose ids the inner tables have.
        """
        merged = self._merge_values(updates) if skip_merge_id else self._merge(updates)
        self.inner.apply_gradients(merged, **_given(global_step=global_step, req_time=req_time))
        return self

    def reinitialize(self, name: str, ids: npt.ArrayLike, *, request_time: int) -> npt.NDArray[np.int8]:
        """Not offered: the rows belong to other features too."""
        raise NotImplementedError("merged tables share rows between features, so none can reinitialize its own")

    def _groups(self, features: Iterable[str]) -> dict[str, list[str]]:
        """Features by inner table, all sorted."""
        groups: dict[str, list[str]] = {}
        for name in sorted(features):
            if name not in self._inner_of:
                raise InvalidRequestError(f"no feature {name!r}; there are {sorted(self._inner_of)}")
            groups.setdefault(self._inner_of[name], []).append(name)
        return dict(sorted(groups.items()))

    def _merge(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        return {
            inner: (
                _concatenate_ids({name: updates[name][0] for name in names}, names),
                _concatenate([updates[name][1] for name in names], np.float32),
            )
            for inner, names in self._groups(updates).items()
        }

    def _merge_values(self, values: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        return {
            inner: _concatenate([values[name] for name in names], np.float32)
            for inner, names in self._groups(values).items()
        }


def _given(**options: int | None) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


def _concatenate_ids(ids: Mapping[str, npt.ArrayLike], names: Sequence[str]) -> npt.NDArray[np.uint64]:
    """The ids of features one after another; signed and unsigned ones would become floats together."""
    return np.concatenate([id_array(f"feature {name!r}", ids[name]).reshape(-1) for name in names])


def _concatenate(pieces: Sequence[npt.ArrayLike], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The pieces one after another; empty ones say nothing about width."""
    arrays = [array for piece in pieces if (array := np.asarray(piece, dtype)).size]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)

"""Kinds of many named tables: multi_table, multi_type_table, merged_table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.conformance.configs import filter_of, floats, hash_table_config
from tests.conformance.runner import Kind
from tests.conformance.tables import fused_result, offsets_of
from trilith.tables import HashTableConfig
from trilith.tables.merged import MergedTables
from trilith_services.ps.reference.entry_files import feature_stat
from trilith_services.ps.reference.multi_table import MultiTable as MultiTableObject
from trilith_services.ps.reference.multi_type_table import MultiTypeTable as MultiTypeTableObject
from trilith_services.ps.reference.scope import Scope

__all__ = ["MergedTable", "MultiTable", "MultiTypeTable"]

Data = Mapping[str, Mapping[str, Any]]


class Named(Kind):
    """Objects by name that hold tables by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = Scope()
        self.filters = {name: filter_of(each) for name, each in self.config.get("filters", {}).items()}
        self.tables: dict[str, Any] = {}
        for name, slots in self.objects().items():
            named = {each["filter"] for each in slots.values() if "filter" in each}
            chosen = self.config.get("filter") or next(iter(named), "")
            configs = {slot: hash_table_config(each) for slot, each in slots.items()}
            self.tables[name] = self.make(name, configs, self.filters.get(chosen))

    def objects(self) -> Mapping[str, Data]:
        return self.config["tables"]

    def make(self, name: str, configs: Mapping[str, HashTableConfig], hash_filter: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def pairs(data: Data) -> dict[str, Any]:
        return {name: (each["ids"], floats(each.get("values", each.get("grads")))) for name, each in data.items()}

    def op_set_global_step(self, value: int) -> None:
        self.model.global_step = value

    def op_lookup(self, ids: Mapping[str, Sequence[int]], t: str = "t") -> dict[str, np.ndarray]:
        return self.tables[t].lookup(ids)

    def op_assign(self, data: Data, t: str = "t", **options: Any) -> None:
        self.tables[t].assign(self.pairs(data), **options)

    def op_assign_add(self, data: Data, t: str = "t", **options: Any) -> None:
        self.tables[t].assign_add(self.pairs(data), **options)

    def op_apply_gradients(self, data: Data, t: str = "t", **options: Any) -> None:
        self.tables[t].apply_gradients(self.pairs(data), **options)

    def op_reinitialize(self, slot: str, ids: Sequence[int], t: str = "t") -> np.ndarray:
        return self.tables[t].reinitialize(slot, ids, request_time=0)

    def op_save(self, basename: str, t: str = "t") -> None:
        self.tables[t].save(self.path(basename))

    def op_restore(self, basename: str, t: str = "t") -> None:
        self.tables[t].restore(self.path(basename))

    def op_feature_stat(self, basename: str) -> dict[str, int]:
        return feature_stat(self.path(basename))

    def op_size(self, t: str = "t") -> dict[str, int]:
        return self.tables[t].size()

    def op_dims(self, t: str = "t") -> list[int]:
        return self.tables[t].dims

    def op_fused_lookup(
        self, ids: Sequence[int], fused_slot_size: Sequence[int], num_of_shards: int, t: str = "t", req_time: int = 0
    ) -> dict[str, Any]:
        return fused_result(self.tables[t].fused_lookup(ids, fused_slot_size, num_of_shards, req_time))

    def op_fused_apply_gradient(
        self,
        ids: Sequence[int],
        fused_slot_size: Sequence[int],
        id_grads: Sequence[float],
        num_of_shards: int,
        t: str = "t",
        **options: Any,
    ) -> None:
        id_offsets, grad_offsets = offsets_of(fused_slot_size, self.tables[t].dims)
        self.tables[t].fused_apply_gradient(
            ids,
            ids,
            fused_slot_size,
            id_grads,
            id_offsets,
            grad_offsets,
            num_of_shards=num_of_shards,
            **options,
        )


class MultiTable(Named):
    def make(self, name: str, configs: Mapping[str, HashTableConfig], hash_filter: Any) -> Any:
        return MultiTableObject(self.model, configs, hash_filter=hash_filter, name_suffix=name)

    def op_raw_lookup(self, ids: Sequence[int], splits: Sequence[int], t: str = "t") -> np.ndarray:
        return self.tables[t].raw_lookup(ids, splits)

    def op_raw_assign(self, ids: Sequence[int], splits: Sequence[int], values: Any, t: str = "t") -> None:
        self.tables[t].raw_assign(ids, splits, values)

    def op_raw_assign_add(
        self, ids: Sequence[int], splits: Sequence[int], values: Any, t: str = "t", req_time: int = 0
    ) -> None:
        self.tables[t].raw_assign_add(ids, splits, values, req_time)

    def op_raw_apply_gradients(
        self, ids: Sequence[int], splits: Sequence[int], grads: Any, t: str = "t", **options: Any
    ) -> None:
        self.tables[t].raw_apply_gradients(ids, splits, grads, **options)


class MultiTypeTable(Named):
    def make(self, name: str, configs: Mapping[str, HashTableConfig], hash_filter: Any) -> Any:
        # Table names are unique in a model, so every object has its own.
        self.models = getattr(self, "models", [self.model])
        model = self.models[0] if not self.tables else Scope()
        self.models.append(model)
        return MultiTypeTableObject(model, configs, hash_filter=hash_filter)

    def op_set_global_step(self, value: int) -> None:
        for model in self.models:
            model.global_step = value


class MergedTable(Named):
    def objects(self) -> Mapping[str, Data]:
        return {"t": self.config["slots"]}

    def make(self, name: str, configs: Mapping[str, HashTableConfig], hash_filter: Any) -> Any:
        return MergedTables(configs, lambda inner: MultiTypeTableObject(self.model, inner, hash_filter=hash_filter))

    def op_merged_names(self) -> list[str]:
        return self.tables["t"].inner_names

    def op_extra_restore_names(self) -> list[str]:
        return [name for config in self.tables["t"].inner_configs.values() for name in config.extra_restore_names]

    def op_save(self, basename: str, t: str = "t") -> None:
        self.tables[t].inner.save(self.path(basename))

    def op_restore(self, basename: str, t: str = "t") -> None:
        self.tables[t].inner.restore(self.path(basename))

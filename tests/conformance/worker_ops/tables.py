"""Vectors of the tables that a worker sees: distributed, merged, partitioned, exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tests.conformance.compare import Partial
from tests.conformance.configs import floats, optimizer_of, rate_of
from tests.conformance.tables import fused_result, offsets_of
from tests.conformance.worker_ops.layouts import configs_of, pooling_of
from tests.conformance.worker_ops.primitives import ragged_of
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.data.parse.sharding import FeatureFids
from trilith.ops.ragged import Ragged
from trilith.tables import HashTableConfig, Sgd, Zeros
from trilith.tables.config import Segment
from trilith.tables.factories import create_merged_tables, create_partitioned_tables, create_tables
from trilith.tables.merged import MergedTables, merge_configs
from trilith.tables.partitioned import PartitionedFeature
from trilith_proto.hash_table_pb2 import EmbeddingHashTableConfig, InitializerConfig, OptimizerConfig
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.reference.multi_table import MultiTable
from trilith_services.ps.reference.multi_type_table import MultiTypeTable
from trilith_services.ps.reference.scope import Scope

__all__ = ["OPS", "cluster"]

Json = Mapping[str, Any]


def cluster(shards: int) -> Client:
    """A client over so many shards in this process; 0 is one too."""
    count = max(shards, 1)
    return Client(Cluster([LocalShard(index=index, count=count, threads=1) for index in range(count)], ClientConfig()))


def config_of(slot: Json) -> HashTableConfig:
    """A slot's config: one segment of `dim`, or `segments`; SGD and zeros where nothing else is said."""
    table = EmbeddingHashTableConfig()
    table.cuckoo.SetInParent()
    segments = slot.get("segments", [slot])
    rates = []
    for segment in segments:
        optimizer, initializer = segment.get("opt"), segment.get("init")
        proto = Segment(int(segment["dim"]), _initializer(initializer), _optimizer(optimizer)).as_proto()
        table.entry_config.segments.append(proto)
        rates.append(segment.get("lr", slot.get("lr", 1.0)))
    return HashTableConfig(table, [rate_of(rate) for rate in slot.get("lrs", rates)])


def _optimizer(given: Any) -> Sgd | OptimizerConfig:
    if given is None:
        return Sgd(learning_rate=1.0)
    return optimizer_of({"type": given} if isinstance(given, str) else given)


def _initializer(given: Any) -> Zeros | InitializerConfig:
    if given is None:
        return Zeros()
    message = InitializerConfig()
    kind = given if isinstance(given, str) else given["type"]
    chosen = getattr(message, kind)
    chosen.SetInParent()
    for name, value in ({} if isinstance(given, str) else given).items():
        if name != "type":
            setattr(chosen, name, value)
    return message


# ---- scenarios -------------------------------------------------------------------------------------------------------


class Scenario:
    """Tables by name, and the calls that vectors make on them."""

    def __init__(self, inputs: Json) -> None:
        configs = {name: config_of(slot) for name, slot in inputs["slots"].items()}
        kind, shards = inputs["table"], inputs.get("num_ps", 0)
        self.model: Scope | None = None
        self.step = 0
        if kind in ("MultiTypeHashTable", "MultiHashTable"):
            self.model = Scope()
            self.tables: Any = (MultiTable if kind == "MultiHashTable" else MultiTypeTable)(self.model, configs)
        elif kind == "MergedMultiTypeHashTable":
            # Without PS the inner tables take repeated ids one by one.
            local = MergedTables(configs, partial(MultiTypeTable, Scope())) if not shards else None
            self.tables = local or create_merged_tables(cluster(shards), configs)
        else:
            float16 = inputs.get("transfer_float16")
            self.tables = create_tables(cluster(shards), configs, transfer_float16=float16)

    def run(self, step: Json) -> Any:
        return getattr(self, step["call"])({name: value for name, value in step.items() if name != "call"})

    def set_global_step(self, step: Json) -> None:
        self.step = int(next(iter(step.values())))
        if self.model is not None:
            self.model.global_step = self.step

    def lookup(self, step: Json) -> Any:
        return self.tables.lookup({name: np.array(ids, np.int64) for name, ids in step["ids"].items()})

    def _updates(self, step: Json) -> dict[str, Any]:
        dims = dict(zip(sorted(self._names()), self.tables.dims, strict=False))
        updates = {}
        for name, (ids, values) in step["data"].items():
            rows = np.array(floats(values), np.float32)
            updates[name] = (np.array(ids, np.int64), rows.reshape(len(ids), dims[name]) if name in dims else rows)
        return updates

    def _names(self) -> list[str]:
        return getattr(self.tables, "names", None) or []

    def assign(self, step: Json) -> None:
        self.tables.assign(self._updates(step), **_time(step))

    def assign_add(self, step: Json) -> None:
        self.tables.assign_add(self._updates(step), **_time(step))

    def apply_gradients(self, step: Json) -> None:
        at = step.get("global_step", self.step)
        if self.model is not None:
            self.model.global_step = at
        self.tables.apply_gradients(self._updates(step), global_step=at, **_time(step))

    def reinitialize(self, step: Json) -> Any:
        if step["slot"] not in getattr(self.tables, "names", [step["slot"]]):
            return [-1] * len(step["ids"])  # the reference's answer; ours is an error that names the table
        return self.tables.reinitialize(step["slot"], np.array(step["ids"], np.int64), request_time=0)

    def get_table_dim_sizes(self, step: Json) -> Any:
        return self.tables.dims

    def raw_lookup(self, step: Json) -> Any:
        return self.tables.raw_lookup(*_ragged(step["ids"]))

    def raw_assign(self, step: Json) -> None:
        self.tables.raw_assign(*_ragged(step["ids"]), floats(step["values"]))

    def raw_apply_gradients(self, step: Json) -> None:
        step_of = {"global_step": step.get("global_step", self.step), **_time(step)}
        self.tables.raw_apply_gradients(*_ragged(step["ids"]), floats(step["grads"]), **step_of)

    def fused_lookup(self, step: Json) -> Any:
        found = fused_result(self.tables.fused_lookup(step["ids"], step["fused_slot_size"], step["num_of_shards"]))
        return {"recv_splits" if name == "splits" else name: value for name, value in found.items()}

    def fused_apply_gradient(self, step: Json) -> None:
        id_offsets, grad_offsets = offsets_of(step["fused_slot_size"], self.tables.dims)
        if self.model is not None:
            self.model.global_step = step.get("global_step", self.step)
        self.tables.fused_apply_gradient(
            step["ids"],
            step["ids"],
            step["fused_slot_size"],
            floats(step["id_grads"]),
            id_offsets,
            grad_offsets,
            num_of_shards=step["num_of_shards"],
            global_step=step.get("global_step", self.step),
        )


def _ragged(given: Any) -> tuple[np.ndarray, np.ndarray]:
    values, splits = ragged_of(given)
    return np.array(values, np.int64), np.array(splits, np.int64)


def _time(step: Json) -> dict[str, int]:
    return {"req_time": step["req_time"]} if "req_time" in step else {}


def scenario(inputs: Json) -> Any:
    """What the reading steps of a scenario give."""
    tables = Scenario(inputs)
    results = [tables.run(step) for step in inputs["steps"]]
    return [result for result in results if result is not None]


# ---- partitioned -----------------------------------------------------------------------------------------------------


def partitioned(inputs: Json) -> Any:
    """Features of several segments, filled by a rule, read or stepped through their layouts."""
    shards = inputs["num_ps"]
    features = {
        name: PartitionedFeature(
            config=config_of(each),
            slice_dims=tuple(segment["dim"] for segment in each["segments"]),
            combiner=pooling_of(each),
        )
        for name, each in inputs["features"].items()
    }
    shapes = {name: {"table": name, "slice_dims": feature.slice_dims} for name, feature in features.items()}
    layouts = configs_of(shapes, inputs["out_configs"]).layouts
    with cluster(shards) as client:
        tables = create_partitioned_tables(client, features, layouts, native=inputs.get("native", True))
        widths = dict(zip(tables.table_names, tables.dims, strict=True))
        filled = {
            table: [shard + shards * np.arange(width) for shard in range(shards)] for table, width in widths.items()
        }
        for verb, rule in inputs.get("init", ()):
            getattr(tables, verb)(
                [
                    {
                        table: (filled[table][shard], _rows(rule, filled[table][shard], width))
                        for table, width in widths.items()
                    }
                    for shard in range(shards)
                ]
            )
        if inputs["action"] == "lookup_raw":
            found = tables.lookup_raw(
                [{table: filled[table][shard].astype(np.uint64) for table in widths} for shard in range(shards)]
            )
            return [[each[tables.table_of[name]] for name in sorted(features)] for each in found]
        fids = {
            name: FeatureFids(Ragged.of([example.get(name, {}).get("fid_v2", []) for example in inputs["examples"]]))
            for name in features
        }
        if inputs["action"] == "lookup":
            return tables.lookup(fids, len(inputs["examples"]))
        fetched = tables.fetch(tables.shard(fids, len(inputs["examples"])))
        tensors = tables.lay_out(fetched)
        for _ in range(inputs.get("runs", 1)):
            tables.apply_gradients(fetched, [np.full_like(each, inputs["grad"]) for each in tensors], global_step=0)
        return _read(tables, inputs["read"], shards)


def _rows(rule: Any, ids: np.ndarray, width: int) -> np.ndarray:
    """A number everywhere, or a * id + b * column."""
    if isinstance(rule, (int, float)):
        return np.full((ids.size, width), rule, np.float32)
    by_id, by_column = rule
    return (by_id * ids[:, None] + by_column * np.arange(width)).astype(np.float32)


def _read(tables: Any, wanted: Json, shards: int) -> dict[str, np.ndarray]:
    rows = {}
    for name, ids in wanted.items():
        asked = np.array(ids, np.uint64)
        table = tables.table_of[name]
        owners = (asked % np.uint64(shards)).astype(np.int64)
        found = tables.lookup_raw([{table: asked[owners == shard]} for shard in range(shards)])
        out = np.empty((asked.size, found[0][table].shape[1]), np.float32)
        for shard, each in enumerate(found):
            out[owners == shard] = each[table]
        rows[name] = out
    return rows


def merge_slot_names(inputs: Json) -> Any:
    """Names of merged tables; configs are equal where their strings are."""
    table = EmbeddingHashTableConfig()
    table.cuckoo.SetInParent()
    given = inputs["slot_to_config"]
    kinds = {kind: 0.5 + number for number, kind in enumerate(sorted(set(map(str, given.values()))))}
    configs = {slot: HashTableConfig(table, [kinds[str(kind)]]) for slot, kind in given.items()}
    merged, inner_of = merge_configs(configs)
    extra = {name: config.extra_restore_names for name, config in merged.items()}
    return {"slot_mapping": inner_of, "extra_restore_names": Partial(**extra)}


OPS = {"table_scenario": scenario, "partitioned_hash_table": partitioned, "merge_slot_names": merge_slot_names}

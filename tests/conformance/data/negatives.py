"""Vectors of negatives: generation, the item pool's files, flows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance.compare import differ
from tests.conformance.data.members import spread, unknown
from trilith.data.fids import data_source_key
from trilith.data.formats.framing import Framing
from trilith.data.messages import message_of
from trilith.data.pipeline.dataset import Dataset, from_records, read
from trilith.data.pipeline.flows import with_source_names
from trilith.data.records import Kind
from trilith.data.samples.item_pool import ItemPool, PooledItem, pool_path
from trilith.data.samples.negatives import NegativeConfig
from trilith_proto.example_pb2 import NamedFeature

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

FLAGS = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")
NEGATIVES = ("instances_hex", "examples_hex", "params", "expected", "expected_one_of")


# ---- negative_gen ----------------------------------------------------------------------------------------------------


def rows_of(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a case's records become."""
    params = dict(case["params"])
    kind = Kind(params.pop("variant_type", "instance"))
    payloads = [bytes.fromhex(text) for text in case.get("instances_hex") or case["examples_hex"]]
    found = []
    for records in from_records(payloads, kind).negatives(NegativeConfig(**params), seed=1).chunks():
        for payload in records.payloads():
            message: Any = message_of(payload, kind)
            if kind is Kind.INSTANCE:
                fids = list(message.fid)
            else:
                lists = [(each.feature.fid_v1_list, each.feature.fid_v2_list) for each in message.named_feature]
                fids = [fid for pair in lists for held in pair for fid in held.value]
            found.append(
                {
                    "item_id": message.line_id.item_id,
                    "label": list(message.label),
                    "fids": fids,
                    "weight": message.instance_weight,
                    "actions": list(message.line_id.actions),
                }
            )
    return found


def row_failures(place: int, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in wanted.items():
        mine = got.get(name)
        if name == "fids":
            mine, value = sorted(mine or ()), sorted(value)
        elif name == "label" and not isinstance(value, list):
            mine = mine[0] if mine else None
        found += differ(f"row {place} {name}", mine, value)
    return found


def rows_failures(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    if len(got) != len(wanted):
        return [f"{len(got)} rows instead of {len(wanted)}"]
    return [
        failure
        for place, (one, other) in enumerate(zip(got, wanted, strict=True))
        for failure in row_failures(place, one, other)
    ]


def case_failures(case: Mapping[str, Any]) -> list[str]:
    found = [f"nothing knows {name}" for name in unknown(case, NEGATIVES)]
    got = rows_of(case)
    choices = case.get("expected_one_of") or ([case["expected"]] if "expected" in case else [got])
    tried = [rows_failures(got, wanted) for wanted in choices]
    return [f"{case.get('id')}: {failure}" for failure in found + min(tried, key=len)]


def check_negative_gen(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        return [failure for case in cases for failure in case_failures(case)]

    return spread(content, {"cases": cases})


# ---- item_pool -------------------------------------------------------------------------------------------------------


def features_of(item: PooledItem) -> dict[str, list[int]]:
    found = {}
    for payload in item.features:
        named = NamedFeature.FromString(payload)
        found[named.name] = [*named.feature.fid_v1_list.value, *named.feature.fid_v2_list.value]
    return found


def pool_failures(pool: ItemPool, expected: Mapping[str, Any]) -> list[str]:
    found = differ("channels", sorted(map(str, pool.channels)), sorted(expected))
    for channel, items in expected.items():
        got = [
            {
                "gid": item.gid,
                "fids": list(item.fids),
                "features": features_of(item),
                "origin_cnt": item.origin_cnt,
                "sample_cnt": item.sample_cnt,
            }
            for item in pool.channels.get(int(channel), ())
        ]
        found += differ(f"channel {channel}", got, items)
    return found


def pool_of(content: Mapping[str, Any]) -> ItemPool:
    """The pool that the vector expects, item by item."""
    pool = ItemPool(content["start_num"], content["max_item_num_per_channel"])
    for channel, items in content["expected"].items():
        for item in items:
            features = []
            for name, fids in item["features"].items():
                feature = NamedFeature(name=name)
                feature.feature.fid_v2_list.value.extend(fids)
                features.append(feature.SerializeToString())
            pool.add(
                int(channel),
                PooledItem(item["gid"], tuple(item["fids"]), tuple(features), item["origin_cnt"], item["sample_cnt"]),
            )
    return pool


def check_item_pool(content: dict[str, Any], folder: Path) -> Found:
    @contextmanager
    def files_of(where: Mapping[str, Any]) -> Iterator[str]:
        path = folder / where["model_path"]
        if path.is_dir():
            yield str(path)
            return
        with tempfile.TemporaryDirectory() as scratch:  # the vectors came without their files: ours are read back
            pool_of(content).save(scratch, where["global_step"], nshards=where["nshards"])
            yield scratch

    def restored(where: Mapping[str, Any], capacity: int) -> ItemPool | None:
        pool = ItemPool(content["start_num"], capacity)
        with files_of(where) as path:
            found = pool.restore(path, where["global_step"], nshards=where["nshards"])
        return pool if found else None

    def restore(places: list[Any]) -> list[str]:
        """Each place is restored, and what is saved again is restored from there."""
        found = []
        for where in places:
            pool = restored(where, content["max_item_num_per_channel"])
            if pool is None:
                found.append(f"{where}: nothing was restored")
                continue
            with tempfile.TemporaryDirectory() as scratch:
                pool.save(scratch, 3, nshards=2)
                fresh = ItemPool(0, content["max_item_num_per_channel"])
                fresh.restore(scratch, 4, nshards=2)
            found += pool_failures(fresh, content["expected"])
        return found

    def expected(wanted: dict[str, Any]) -> list[str]:
        pools = [restored(where, content["max_item_num_per_channel"]) for where in content["restore"]]
        return [failure for pool in pools if pool is not None for failure in pool_failures(pool, wanted)]

    def capped(case: dict[str, Any]) -> list[str]:
        found = []
        for pool in [restored(where, case["max_item_num_per_channel"]) for where in content["restore"]]:
            channels = pool.channels.items() if pool is not None else ()
            gids = {str(channel): [item.gid for item in items] for channel, items in channels}
            found += differ("gids", gids, case["expected_gids"])
        return found

    def saved_name(case: dict[str, Any]) -> list[str]:
        names = ("model_path", "global_step", "worker_index", "shard", "worker_num")
        return differ("path", pool_path(*(case[name] for name in names)), case["path"])

    checks = {"restore": restore, "expected": expected, "capped": capped, "saved_name": saved_name}
    return spread(content, checks, "max_item_num_per_channel", "start_num")


# ---- split_merge_flow ------------------------------------------------------------------------------------------------


def item_ids(dataset: Dataset) -> list[int]:
    return [message_of(payload, Kind.INSTANCE).line_id.item_id for payload in dataset]  # type: ignore[union-attr]


def check_split_merge_flow(content: dict[str, Any], folder: Path) -> Found:
    framing = Framing(**{name: content[name] for name in FLAGS if name in content})
    whole = read(str(folder / content["file"]), kind="instance", framing=framing)
    names = content["data_flow"]

    def merged() -> list[Any]:
        flows = whole.split(names)
        first, *others = (flows[name] for name in names)
        return [message_of(payload, Kind.INSTANCE) for payload in first.merge(*others).apply(with_source_names)]

    def split_ids(wanted: dict[str, list[int]]) -> list[str]:
        flows = whole.split(names)
        return differ("ids", {name: item_ids(flows[name]) for name in wanted}, wanted)

    def merged_ids(wanted: list[int]) -> list[str]:
        return differ("ids", sorted(message.line_id.item_id for message in merged()), sorted(wanted))

    def source_names(wanted: dict[str, str]) -> list[str]:
        counts = Counter(message.line_id.data_source_name for message in merged())
        keys = {name: f"data_source{data_source_key(name)}" for name in wanted}
        found = differ("sources", keys, wanted)
        if "split_item_ids" in content:
            held = {source: len(content["split_item_ids"][name]) for name, source in wanted.items()}
            found += differ("rows of sources", dict(counts), held)
        return found

    checks = {
        "split_item_ids": split_ids,
        "merged_item_ids_as_set": merged_ids,
        "merged_data_source_name": source_names,
    }
    return spread(content, checks, "file", "data_flow", *FLAGS)


GROUPS: dict[str, Check] = {
    "item_pool": check_item_pool,
    "negative_gen": check_negative_gen,
    "split_merge_flow": check_split_merge_flow,
}

"""Vectors of negatives: generation, the item pool's files, flows."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance.compare import mismatch
from trilith.data.convert import message_of
from trilith.data.dataset import Dataset, from_records, read
from trilith.data.fids import data_source_key
from trilith.data.flows import with_source_names
from trilith.data.framing import Framing
from trilith.data.item_pool import ItemPool, PooledItem, pool_path
from trilith.data.negatives import NegativeConfig
from trilith.data.records import Kind
from trilith_proto.example_pb2 import NamedFeature

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

_CHUNK = 2  # records per chunk, so that what flows between chunks counts


def differ(what: str, got: Any, wanted: Any) -> list[str]:
    wrong = mismatch(got, {"value": wanted, "rel_tol": 1e-6})
    return [f"{what}: {wrong}"] if wrong else []


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
    got = rows_of(case)
    choices = case.get("expected_one_of") or [case["expected"]]
    tried = [rows_failures(got, wanted) for wanted in choices]
    best = min(tried, key=len)
    return [f"{case.get('id')}: {failure}" for failure in best]


def check_negative_gen(content: dict[str, Any], folder: Path) -> Found:
    for key, value in content.items():
        cases = value if key == "cases" else ()
        yield key, [failure for case in cases for failure in case_failures(case)]


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
    found: dict[str, list[str]] = {key: [] for key in content}
    for where in content["restore"]:
        with tempfile.TemporaryDirectory() as scratch:
            path = folder / where["model_path"]
            if not path.is_dir():  # the vectors came without their files: ours, then, are read back
                path = Path(scratch)
                pool_of(content).save(str(path), where["global_step"], nshards=where["nshards"])
            pool = ItemPool(content["start_num"], content["max_item_num_per_channel"])
            if not pool.restore(str(path), where["global_step"], nshards=where["nshards"]):
                found["restore"].append(f"{where}: nothing was restored")
            found["expected"] += pool_failures(pool, content["expected"])
            capped = ItemPool(content["start_num"], content["capped"]["max_item_num_per_channel"])
            capped.restore(str(path), where["global_step"], nshards=where["nshards"])
            gids = {str(channel): [item.gid for item in items] for channel, items in capped.channels.items()}
            found["capped"] += differ("gids", gids, content["capped"]["expected_gids"])
            again = Path(scratch) / "again"
            pool.save(str(again), 3, nshards=2)
            fresh = ItemPool(0, content["max_item_num_per_channel"])
            fresh.restore(str(again), 4, nshards=2)
            found["notes"] += pool_failures(fresh, content["expected"])
    name = content["saved_name"]
    path = pool_path(name["model_path"], name["global_step"], name["worker_index"], name["shard"], name["worker_num"])
    found["saved_name"] += differ("path", path, name["path"])
    yield from found.items()


# ---- split_merge_flow ------------------------------------------------------------------------------------------------


def item_ids(dataset: Dataset) -> list[int]:
    return [message_of(payload, Kind.INSTANCE).line_id.item_id for payload in dataset]  # type: ignore[union-attr]


def check_split_merge_flow(content: dict[str, Any], folder: Path) -> Found:
    found: dict[str, list[str]] = {key: [] for key in content}
    framing = Framing(lagrangex_header=content["lagrangex_header"])
    whole = read(str(folder / content["file"]), kind="instance", framing=framing)
    names = content["data_flow"]
    flows = whole.split(names)
    for name, wanted in content["split_item_ids"].items():
        found["split_item_ids"] += differ(name, item_ids(flows[name]), wanted)
    flows = whole.split(names)
    merged = flows[names[0]].merge(*(flows[name] for name in names[1:])).apply(with_source_names)
    messages = [message_of(payload, Kind.INSTANCE) for payload in merged]
    ids = sorted(message.line_id.item_id for message in messages)  # type: ignore[union-attr]
    found["merged_item_ids_as_set"] += differ("ids", ids, sorted(content["merged_item_ids_as_set"]))
    sources = Counter(message.line_id.data_source_name for message in messages)  # type: ignore[union-attr]
    for name, wanted in content["merged_data_source_name"].items():
        count = len(content["split_item_ids"][name])
        found["merged_data_source_name"] += differ(name, sources[wanted], count)
        found["merged_data_source_name"] += differ(name, f"data_source{data_source_key(name)}", wanted)
    yield from found.items()


GROUPS: dict[str, Check] = {
    "item_pool": check_item_pool,
    "negative_gen": check_negative_gen,
    "split_merge_flow": check_split_merge_flow,
}

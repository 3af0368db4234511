"""Vectors of the sharding op: records made from the vector's JSON, spread by `trilith.data.parse.sharding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.conformance.compare import Partial
from trilith.data.parse.sharding import ShardingConfig, shard_fids
from trilith.data.records import Records
from trilith_proto import example_pb2, proto_parser_pb2

__all__ = ["OPS"]

Json = Mapping[str, Any]


def _feature(given: Json, message: example_pb2.Feature) -> None:
    for kind, target in (("fid_v1", message.fid_v1_list), ("fid_v2", message.fid_v2_list)):
        if kind in given:
            target.SetInParent()
            target.value.extend(given[kind])


def _example(given: Json) -> bytes:
    example = example_pb2.Example()
    for name, each in given.items():
        named = example.named_feature.add(name=name)
        if "sorted_id" in each:
            named.sorted_id = each["sorted_id"]
        _feature(each, named.feature)
    return example.SerializeToString()


def _batch(given: Json) -> bytes:
    batch = example_pb2.ExampleBatch(batch_size=given["batch_size"])
    for name, each in given["features"].items():
        named = batch.named_feature_list.add(name=name, type=each["type"])
        for value in each["values"]:
            _feature(value, named.feature.add())
    return batch.SerializeToString()


def _instance(given: Json) -> bytes:
    instance = proto_parser_pb2.Instance(fid=given.get("fid", ()))
    for name, each in given.get("features", {}).items():
        feature = instance.feature.add(name=name, fid=each.get("fid", ()))
        for values in each.get("fid_list", ()):
            feature.fid_list.add(value=values)
    return instance.SerializeToString()


def sharding_sparse_fids(inputs: Json) -> Any:
    """Entries by list become lists, in the order of tables and shards."""
    kind, data = inputs["input_type"], inputs["data"]
    payloads = [_batch(data)] if kind == "examplebatch" else [*map(_example if kind == "example" else _instance, data)]
    config = ShardingConfig(
        features={name: (each["table"], each["slice_dims"]) for name, each in inputs["feature_configs"].items()},
        ps_num=inputs["ps_num"],
        unique=inputs["unique"],
        version=inputs["version"],
    )
    sharded = shard_fids(Records.of(payloads, kind), config)
    found = Partial({name: list(each.values()) if isinstance(each, dict) else each for name, each in sharded.items()})
    found["fid_list_shard_row_lenth"] = sharded.get("fid_list_shard_row_length")
    found["fid_list_emb_row_lenth"] = sharded.get("fid_list_emb_row_length")
    if "emb_size" in sharded:
        found["emb_size"] = [int(each[0]) for each in found["emb_size"]]
    return found


OPS = {"sharding_sparse_fids": sharding_sparse_fids}

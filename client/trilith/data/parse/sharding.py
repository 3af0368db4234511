"""Fids of a batch spread over parameter servers: what each is asked for, and where each answer belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trilith.data.parse.parsers import ParseSpec
from trilith.data.parse.specs import Features
from trilith.data.records import Kind, Records
from trilith.data.scan.scanner import BatchScanner, scanner
from trilith.data.scan.schema import V1_SLOTS, Element, Fields
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.dedup import FIRST, split_by_owner, split_distinct
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2

__all__ = [
    "FeatureFids",
    "ShardingConfig",
    "flatten",
    "parse_fused",
    "read_fids",
    "shard_fids",
    "shard_ragged",
    "unflatten",
]

_SLOT_NAME = re.compile(r"(?:fc_)?slot_(\d+)", re.ASCII)
_SHARED_BIT = np.uint32(1 << 31)
_PREFIX = "__sharding_sparse_fids__"
_VERSIONS = range(1, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingConfig:
    """Which features there are, which table holds their embeddings, and over how many servers a table is spread.

    Attributes:
        features: Per feature its table and the widths of the slices of its embedding.
        ps_num: Servers; 0 means 1.
        unique: Ask for a fid once per feature, however often it occurs.
        version: Layout of the result, 1 to 5; see `shard_ragged`.
    """

    features: Mapping[str, tuple[str, tuple[int, ...] | list[int]]]
    ps_num: int = 1
    unique: bool = False
    version: int = 5

    def __post_init__(self) -> None:
        if self.ps_num < 0:
            raise InvalidRequestError(f"ps_num={self.ps_num} is negative")
        if self.version not in _VERSIONS:
            raise InvalidRequestError(f"version={self.version} is not one of {list(_VERSIONS)}")
        if not self.features:
            raise InvalidRequestError("no feature is configured")

    @classmethod
    def of(cls, configs: example_pb2.FeatureConfigs, **options: Any) -> ShardingConfig:
        """From the message that models carry."""
        features = {name: (each.table, tuple(each.slice_dims)) for name, each in configs.feature_configs.items()}
        return cls(features=features, **options)

    @property
    def shards(self) -> int:
        """Servers, at least one."""
        return max(self.ps_num, 1)


class FeatureFids(NamedTuple):
    """Fids of one feature.

    Attributes:
        fids: uint64|int64, v2; one row for each row of the batch, or a single one if `shared`.
        shared: Whether one row stands for all: a shared list of an ExampleBatch, or one that is absent.
    """

    fids: Ragged[Any]
    shared: bool = False


def shard_fids(records: Records, config: ShardingConfig) -> dict[str, Any]:
    """Spread the fids of records over the servers.

    Args:
        records: Instances, Examples, or one ExampleBatch.
        config: What to look for. Names `slot_N` and `fc_slot_N` mean the flat fids of that slot of Instances.

    Returns:
        As `shard_ragged`.
    """
    features, batch_size = read_fids(records, config)
    return shard_ragged(features, config, batch_size)


def read_fids(records: Records, config: ShardingConfig) -> tuple[dict[str, FeatureFids], int]:
    """Fids of the configured features as v2, and the rows of the batch."""
    names = sorted(config.features)
    if records.kind is Kind.EXAMPLE_BATCH:
        return _batch_fids(records, names)
    slots = {}
    if records.kind is Kind.INSTANCE:
        matches = {name: _SLOT_NAME.fullmatch(name) for name in names}
        slots = {name: int(match[1]) for name, match in matches.items() if match}
    element = Element.FID if records.kind is Kind.INSTANCE else Element.FID_V2
    fields = Fields(
        named=tuple((name, element) for name in names if name not in slots),
        slots=tuple(sorted({slot for slot in slots.values() if slot < V1_SLOTS})),
        slots_as_v2=records.kind is Kind.INSTANCE,
    )
    reader = scanner(records.kind, fields)
    scan = reader.scan(records)
    empty: Ragged[np.uint64] = Ragged(np.empty(0, np.uint64), np.zeros(len(records) + 1, np.int64))
    out = {}
    for name in names:
        slot = slots.get(name)
        if slot is not None:
            column = reader.schema.slot_columns.get(slot)
        else:
            column = reader.schema.named_columns[name, element]
        out[name] = FeatureFids(empty if column is None else Ragged(scan.values[column], scan.splits[column]))
    return out, len(records)


def _batch_fids(records: Records, names: list[str]) -> tuple[dict[str, FeatureFids], int]:
    if len(records) != 1:
        raise InvalidRequestError(f"one ExampleBatch can be spread at a time, not {len(records)}")
    reader = BatchScanner(Fields(named=tuple((name, Element.FID_V2) for name in names)))
    batch = reader.scan(records)
    out = {}
    for name in names:
        number, column = reader.schema.name_numbers[name], reader.schema.named_columns[name, Element.FID_V2]
        features, shape = int(batch.lists[number, 0]), int(batch.lists[number, 1])
        shared = features < 0 or shape == example_pb2.SHARED
        rows = 1 if shared else batch.batch_size
        if 0 <= features < rows:
            raise DataError(f"{records.where(0)}: the list {name!r} has {features} features for {rows} rows")
        splits = batch.scan.splits[column][: rows + 1]
        if splits.size < rows + 1:  # no list of the batch has a row
            splits = np.zeros(rows + 1, np.int64)
        out[name] = FeatureFids(Ragged(batch.scan.values[column][: splits[-1]], splits), shared)
    return out, batch.batch_size


class _Spread(NamedTuple):
    """One feature over the shards."""

    lists: list[npt.NDArray[np.uint64]]
    owners: npt.NDArray[np.uint64]
    places: npt.NDArray[np.uint64]


def _spread(fids: npt.NDArray[Any], shards: int, unique: bool) -> _Spread:
    """What each shard is asked for; per fid its shard and its place in that shard's list."""
    ids = np.ascontiguousarray(fids).view(np.uint64)
    split = split_distinct(ids, shards) if unique else split_by_owner(ids, shards)
    bounds = np.array(split.bounds, np.uint64)
    lists = [split.owned(shard) for shard in range(shards)]
    owners = ids % np.uint64(shards)
    if split.positions is None:
        places = np.arange(ids.size, dtype=np.uint64)
    else:
        places = (split.positions & np.uint32(FIRST - 1)).astype(np.uint64)
    return _Spread(lists, owners, places - bounds[owners.view(np.int64)])


def shard_ragged(features: Mapping[str, FeatureFids], config: ShardingConfig, batch_size: int) -> dict[str, Any]:
    """Spread parsed fids over the servers: fid modulo the number of servers decides.

    Tables and features are in the order of their names. Entries keyed "table:shard":

    - fid_list: int64, what the shard is asked for: the fids of the table's features, feature after feature.
    - fid_list_row_splits: int64[features of the table + 1], where each feature begins in it (not in version 1).
    - emb_size (version 5): floats of the answer; fid_list_row_splits_size.

    and of the whole batch:

    - fid_offset: uint64 per fid, features in order, row after row: which list (high 32 bits) and where in it.
      Versions 3 to 5: table index * shards + shard, and the first float in the flattened answer. Version 1: the place
      in the list instead of the float. Version 2: every feature has lists of its own, counted table by table and in a
      table shard by shard, and the place in that.
    - feature_offset: int32, where each row of each feature begins in fid_offset; ends with its length.
    - nfl_offset: uint32[features + 1], where each feature begins in feature_offset, bit 31 set where one row stands for
      all; ends with the length of feature_offset.
    - batch_size: int32, in version 5 of shape [1]; there also nfl_size, feature_size and fid_size.

    Version 4 has one fid_list for all, shard after shard and in a shard table after table, with its pieces in
    fid_list_row_length (per shard, table and feature; fid_list_row_splits has them as row splits, from 0 again for each
    table), fid_list_table_row_length and, in floats, fid_list_emb_row_length (per shard and table), and
    fid_list_shard_row_length (per shard).
    """
    shards, version = config.shards, config.version
    names = sorted(config.features)
    tables: dict[str, list[str]] = {table: [] for table in sorted({table for table, _ in config.features.values()})}
    for name in names:
        tables[config.features[name][0]].append(name)
    spread = {name: _spread(features[name].fids.values, shards, config.unique) for name in names}
    dims = {name: int(sum(config.features[name][1])) for name in names}
    out: dict[str, Any] = {"fid_list": {}, "fid_list_row_splits": {}, "emb_size": {}, "fid_list_row_splits_size": {}}
    offsets: dict[str, npt.NDArray[np.uint64]] = {}
    before_table = 0
    for table_index, (table, members) in enumerate(tables.items()):
        counts = np.array([[piece.size for piece in spread[name].lists] for name in members], np.int64)
        widths = np.array([dims[name] for name in members], np.int64)
        floats = np.zeros((len(members) + 1, shards), np.int64)
        np.cumsum(counts * widths[:, None], axis=0, out=floats[1:])
        splits = np.zeros((len(members) + 1, shards), np.int64)
        np.cumsum(counts, axis=0, out=splits[1:])
        if version != 2 and int(floats[-1].max()) >= 2**32:
            raise InvalidRequestError(f"table {table!r}: an answer of {int(floats[-1].max())} floats is too large")
        for index, name in enumerate(members):
            _, owners, places = spread[name]
            at = owners.view(np.int64)
            if version == 2:
                high, low = owners * np.uint64(len(members)) + np.uint64(before_table + index), places
            else:
                high = owners + np.uint64(table_index * shards)
                if version == 1:
                    low = places + splits[index][at].view(np.uint64)
                else:
                    low = places * np.uint64(dims[name]) + floats[index][at].view(np.uint64)
            offsets[name] = high << np.uint64(32) | low
        before_table += len(members) * shards
        for shard in range(shards):
            key = f"{table}:{shard}"
            pieces = [spread[name].lists[shard] for name in members]
            out["fid_list"][key] = np.concatenate(pieces).view(np.int64)
            out["fid_list_row_splits"][key] = splits[:, shard].copy()
            out["emb_size"][key] = np.array([floats[-1, shard]], np.int32 if floats[-1, shard] < 2**31 else np.int64)
            out["fid_list_row_splits_size"][key] = np.array([len(members) + 1], np.int32)
    out["fid_offset"] = np.concatenate([offsets[name] for name in names])
    starts = np.cumsum([0] + [features[name].fids.values.size for name in names])
    rows = [
        features[name].fids.row_splits[:-1] + start for name, start in zip(names, starts[:-1].tolist(), strict=True)
    ]
    out["feature_offset"] = np.concatenate([*rows, starts[-1:]]).astype(np.int32)
    begins = np.cumsum([0] + [each.size for each in rows])
    begins[-1] += 1
    flags = np.array([features[name].shared for name in names] + [False])
    out["nfl_offset"] = begins.astype(np.uint32) | np.where(flags, _SHARED_BIT, np.uint32(0))
    out["batch_size"] = np.array([batch_size], np.int32) if version == 5 else np.int32(batch_size)
    if version == 5:
        for what, of in (("nfl_size", "nfl_offset"), ("feature_size", "feature_offset"), ("fid_size", "fid_offset")):
            out[what] = np.array([out[of].size], np.int32)
    else:
        del out["fid_list_row_splits_size"]
    if version == 4:
        return _together(out, tables, shards)
    if version != 5:
        del out["emb_size"]
    if version == 1:
        del out["fid_list_row_splits"]
    return out


def _together(out: dict[str, Any], tables: Mapping[str, list[str]], shards: int) -> dict[str, Any]:
    """Version 4: all lists in one."""
    keys = [f"{table}:{shard}" for shard in range(shards) for table in tables]
    lists, splits, floats = out.pop("fid_list"), out.pop("fid_list_row_splits"), out.pop("emb_size")
    lengths = np.array([lists[key].size for key in keys], np.int64)
    return {
        "fid_list": np.concatenate([lists[key] for key in keys]),
        "fid_list_row_length": np.concatenate([np.diff(splits[key]) for key in keys]),
        "fid_list_row_splits": np.concatenate([splits[key] for key in keys]),
        "fid_list_emb_row_length": np.concatenate([floats[key] for key in keys]),
        "fid_list_table_row_length": lengths,
        "fid_list_shard_row_length": lengths.reshape(shards, len(tables)).sum(axis=1),
        **out,
    }


def parse_fused(records: Records, spec: ParseSpec | None = None, config: ShardingConfig | None = None) -> Features:
    """Parse what is not sparse, and spread the sparse features instead of decoding them (the fused layout).

    Args:
        records: As for `shard_fids`.
        spec: Dense features, labels, LineId fields; none by default.
        config: How to spread; without it the records themselves come back, to be spread where the servers are known.

    Returns:
        The outputs of `spec`, and under keys that begin with `__sharding_sparse_fids__` either the records
        (`…sparse_features`) or what `flatten` makes of `shard_fids`.
    """
    features = spec.parse(records) if spec is not None else {}
    if config is None:
        return {**features, f"{_PREFIX}sparse_features": records}
    return {**features, **flatten(shard_fids(records, config))}


# ---- inside a flat batch ---------------------------------------------------------------------------------------------


def flatten(sharded: Mapping[str, Any]) -> dict[str, Any]:
    """As entries of a batch, keyed `__sharding_sparse_fids__<name>` or `__sharding_sparse_fids__<name>/<part>`."""
    out = {}
    for name, value in sharded.items():
        if isinstance(value, Mapping):
            out.update({f"{_PREFIX}{name}/{key}": each for key, each in value.items()})
        else:
            out[f"{_PREFIX}{name}"] = value
    return out


def unflatten(features: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spread fids that `flatten` put into a batch, and the rest of the batch."""
    sharded: dict[str, Any] = {}
    rest = {}
    for key, value in features.items():
        if not key.startswith(_PREFIX):
            rest[key] = value
            continue
        name, nested, part = key.removeprefix(_PREFIX).partition("/")
        if nested:
            sharded.setdefault(name, {})[part] = value
        else:
            sharded[name] = value
    return sharded, rest

"""Features over a cluster as fused layouts: ids spread by shard, rows as they come, tensors in one walk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trilith.arrays import as_ids
from trilith.batches import UpdateVerb, WriteOptions
from trilith.errors import InvalidRequestError
from trilith.ops.combiners import CombinerLike, combiner_of
from trilith.ops.layout import FidOffsets, fused_embedding_to_layout, fused_embedding_to_layout_grad, nest_layout
from trilith.ops.layout_config import FeatureConfig, FeatureConfigs, OutConfig
from trilith.pipelining import Pusher
from trilith.steps import as_step
from trilith.tables.config import HashTableConfig
from trilith.tables.merged import merge_configs
from trilith.tables.spec import TableSpec
from trilith.times import latest

if TYPE_CHECKING:
    from trilith.data.parse.sharding import FeatureFids
    from trilith.data.records import Records
    from trilith.rows import Rows

__all__ = ["Fetched", "PartitionedFeature", "PartitionedTables"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint64]
VERSION = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionedFeature:
    """One feature.

    Attributes:
        config: Its rows and rates.
        slice_dims: Widths of the slices that layouts may take; they make up the row.
        combiner: How the rows of a sample become one.
    """

    config: HashTableConfig
    slice_dims: tuple[int, ...]
    combiner: CombinerLike = "sum"

    def __post_init__(self) -> None:
        dim = sum(segment.dim_size for segment in self.config.table_config.entry_config.segments)
        if sum(self.slice_dims) != dim:
            raise InvalidRequestError(f"slices {list(self.slice_dims)} do not make up a row of {dim} floats")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A batch with its rows: all that the layouts and, later, the update need.

    Attributes:
        ids: Per shard and table uint64[n], what was asked for.
        rows: Per table, and in it per shard, float32[n, dim].
        offsets: Where each occurrence's row is.
        request_time: The latest of the samples' times, Unix seconds; None: the time of the update.
    """

    ids: list[dict[str, Ids]]
    rows: list[Floats]
    offsets: FidOffsets
    request_time: int | None = None


class PartitionedTables:
    """The tables of a model's features, whose rows become the model's tensors without passing through features' own.

    A lookup is one request per PS and a step's update another, for all tables. Ids are asked for once per feature: one
    that occurs in two features of a merged table is stepped twice. A prefetch queue fits between `fetch`, which talks
    to the cluster, and `lay_out`, which does not.

    Args:
        client: An open cluster, or the workers that hold the rows themselves.
        features: By name.
        layouts: By name, made of slices of the features.
        merge: Whether features of equal config share a table; otherwise each has its own.
        prefix: Goes before the names of the cluster's tables.
        spec_options: What the tables' specs have beyond their configs; see `TableSpec.of_config`.
        unique: Whether an id that a feature repeats is asked for once.
        transfer_float16: Whether rows and gradients travel as float16; None: as the client was opened.
        timeout_s: Deadline of a call; None takes the client's.
        async_push: How many updates may be on their way; see `trilith.pipelining`.
    """

    def __init__(
        self,
        client: Rows,
        features: Mapping[str, PartitionedFeature],
        layouts: Mapping[str, OutConfig],
        *,
        merge: bool = False,
        prefix: str = "",
        spec_options: Mapping[str, Any] | None = None,
        unique: bool = True,
        transfer_float16: bool | None = None,
        timeout_s: float | None = None,
        async_push: int = 0,
    ) -> None:
        tables = {name: feature.config for name, feature in features.items()}
        self.table_of = {name: name for name in sorted(features)}
        if merge:
            tables, self.table_of = merge_configs(tables)
        self.configs = FeatureConfigs(
            {
                name: FeatureConfig(
                    table=self.table_of[name],
                    slice_dims=feature.slice_dims,
                    combiner=combiner_of(feature.combiner),
                )
                for name, feature in features.items()
            },
            layouts,
        )
        self.pusher = Pusher(async_push)
        self._client = client
        self._unique = unique
        self._timeout_s = timeout_s
        specs = {
            name: TableSpec.of_config(prefix + name, tables[name], **(spec_options or {})) for name in sorted(tables)
        }
        self._named = {name: spec.name for name, spec in specs.items()}
        self._dims = {name: spec.dim for name, spec in specs.items()}
        client.create_tables(list(specs.values()))
        client.record_features({prefix + feature: self._named[table] for feature, table in self.table_of.items()})
        self._batches = client.batches(float16=transfer_float16)

    def __deepcopy__(self, memo: dict[int, Any]) -> PartitionedTables:
        """The tables themselves: copies of a model look at the same rows."""
        return self

    @property
    def table_names(self) -> list[str]:
        """Sorted."""
        return list(self._dims)

    @property
    def dims(self) -> list[int]:
        """Floats per row, by sorted table."""
        return list(self._dims.values())

    # ---- reading -----------------------------------------------------------------------------------------------

    def shard(self, batch: Records | Mapping[str, FeatureFids], batch_size: int | None = None) -> dict[str, Any]:
        """Spread a batch's ids over the shards; data pipelines may do it, see `trilith.data.parse.sharding`.

        Args:
            batch: Records, or fids by feature.
            batch_size: Samples, with fids by feature.
        """
        from trilith.data.parse.sharding import ShardingConfig, shard_fids, shard_ragged

        config = ShardingConfig(
            features={name: (each.table, each.slice_dims) for name, each in self.configs.features.items()},
            ps_num=self._client.shards,
            unique=self._unique,
            version=VERSION,
        )
        if not isinstance(batch, Mapping):
            return shard_fids(batch, config)
        if batch_size is None:
            raise InvalidRequestError("fids by feature do not say how many samples there are; give batch_size")
        return shard_ragged(batch, config, batch_size)

    def fetch(self, sharded: Mapping[str, Any], *, req_time: npt.ArrayLike | None = None) -> Fetched:
        """Look a batch up: one request per PS.

        Args:
            sharded: What `shard` gives.
            req_time: int64[samples], Unix seconds; the latest becomes the rows' last update.

        Raises:
            InvalidRequestError: A sample's time is none, or more than a day ahead of this machine's clock; the message
                says which sample.
        """
        request_time = None if req_time is None else latest(req_time, time.time(), "req_time")
        ids = [
            {
                table: np.ascontiguousarray(sharded["fid_list"][f"{table}:{shard}"]).view(np.uint64)
                for table in self._dims
            }
            for shard in range(self._client.shards)
        ]
        found = self.lookup_raw(ids)
        rows = [of_shard[table] for table in self._dims for of_shard in found]
        names = ("fid_offset", "feature_offset", "nfl_offset", "batch_size", "nfl_size", "feature_size", "fid_size")
        offsets = FidOffsets(version=VERSION, ps_num=self._client.shards, **{name: sharded[name] for name in names})
        return Fetched(ids, rows, offsets, request_time)

    def lookup_raw(self, ids: Sequence[Mapping[str, Ids]]) -> list[dict[str, Floats]]:
        """Rows of ids that are spread already: per shard and table uint64[n] gives float32[n, dim]."""
        found = self._batches.lookup_owned(
            [{self._named[table]: each for table, each in of_shard.items()} for of_shard in ids], self._timeout_s
        )
        return [dict(zip(asked, rows.values(), strict=True)) for asked, rows in zip(ids, found, strict=True)]

    def lay_out(self, fetched: Fetched) -> list[Floats]:
        """The layouts' tensors, by sorted layout."""
        return fused_embedding_to_layout([rows.reshape(-1) for rows in fetched.rows], fetched.offsets, self.configs)

    def lookup(self, batch: Records | Mapping[str, FeatureFids], batch_size: int | None = None) -> dict[str, Any]:
        """All at once, for readers: by layout its tensor, or its tensors."""
        return nest_layout(self.lay_out(self.fetch(self.shard(batch, batch_size))), self.configs)

    # ---- writing -----------------------------------------------------------------------------------------------

    def apply_gradients(
        self,
        fetched: Fetched,
        grads: Sequence[npt.ArrayLike | None],
        *,
        global_step: int | None = None,
        scale: float = 1.0,
    ) -> PartitionedTables:
        """Step the rows of a batch: one request per PS, with exactly the ids that were looked up.

        Args:
            fetched: The batch.
            grads: Per tensor of `lay_out` its gradient, float32 of the same shape; None where it has none.
            global_step: At which schedules are evaluated; None takes the step that the client knows then.
            scale: What all gradients are multiplied by.
        """
        batch = int(fetched.offsets.batch_size.sum())
        shapes = [shape for name in sorted(self.configs.layouts) for shape in self.configs.tensor_shapes(name)]
        if len(grads) != len(shapes):
            raise InvalidRequestError(f"{len(grads)} gradients for {len(shapes)} layout tensors")
        whole = [
            np.zeros((batch, *shape), np.float32) if grad is None else grad
            for grad, shape in zip(grads, shapes, strict=True)
        ]
        flat = [rows.reshape(-1) for rows in fetched.rows]
        row_grads = fused_embedding_to_layout_grad(whole, flat, fetched.offsets, self.configs, scale=scale)
        self.push(fetched, row_grads, global_step=global_step)
        return self

    def push(self, fetched: Fetched, row_grads: Sequence[Floats], *, global_step: int | None = None) -> None:
        """Step the rows of a batch by gradients of its rows, flat, in the order of `Fetched.rows`."""
        shards = self._client.shards
        updates = [
            {
                self._named[table]: (of_shard[table], row_grads[t * shards + shard].reshape(-1, dim))
                for t, (table, dim) in enumerate(self._dims.items())
            }
            for shard, of_shard in enumerate(fetched.ids)
        ]
        # The step is the batch's own also if the update is late.
        step = self._client.known_step if global_step is None else as_step(global_step)
        options = WriteOptions(step, fetched.request_time, timeout_s=self._timeout_s)
        self.pusher.push(lambda: self._batches.update_owned("apply_gradients", updates, options))

    def assign(
        self, parts: Sequence[Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]], req_time: int | None = None
    ) -> PartitionedTables:
        """Set weights: per shard and table (ids uint64[n], rows float32[n, dim]), the ids being that shard's."""
        return self._write("assign", parts, req_time)

    def assign_add(
        self, parts: Sequence[Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]], req_time: int | None = None
    ) -> PartitionedTables:
        """Add to weights: per shard and table (ids uint64[n], rows float32[n, dim]), the ids being that shard's."""
        return self._write("assign_add", parts, req_time)

    def drain(self) -> None:
        """Wait until all updates have been applied; raises what a push in the background ended with."""
        self.pusher.drain()
        self._client.drain()

    def _write(self, verb: UpdateVerb, parts: Sequence[Mapping[str, Any]], req_time: int | None) -> PartitionedTables:
        shards = self._client.shards
        updates = []
        for shard, of_shard in enumerate(parts):
            checked = {}
            for table, (ids, values) in of_shard.items():
                if table not in self._named:
                    raise InvalidRequestError(f"no table {table!r}; there are {self.table_names}")
                mine = as_ids(table, ids)
                astray = mine % np.uint64(shards) != shard
                if astray.any():
                    raise InvalidRequestError(
                        f"table {table!r}: id {mine[astray][0]} belongs to shard {mine[astray][0] % np.uint64(shards)}"
                        f" of {shards}, it is among those of shard {shard}"
                    )
                checked[self._named[table]] = (mine, np.asarray(values, np.float32))
            updates.append(checked)
        self._batches.update_owned(
            verb, updates, WriteOptions(self._client.known_step, req_time, timeout_s=self._timeout_s)
        )
        return self

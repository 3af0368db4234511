"""The ways to put a model's tables together, each by one function; over PS, in this process or in the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trilith.tables.config import HashTableConfig
from trilith.tables.distributed import DistributedTables, TableLike
from trilith.tables.merged import MergedTables
from trilith.tables.partitioned import PartitionedFeature, PartitionedTables
from trilith.tables.spec import TableSpec

if TYPE_CHECKING:
    from trilith.ops.layout_config import OutConfig
    from trilith.rows import Rows

__all__ = ["create_merged_tables", "create_partitioned_tables", "create_tables"]


def create_tables(client: Rows, configs: Mapping[str, TableLike], **options: Any) -> DistributedTables:
    """A table for each name.

    Args:
        client: An open cluster; with `local://` the tables are in this process.
        configs: By name.
        **options: As for `DistributedTables`.
    """
    return DistributedTables(client, configs, **options)


def create_merged_tables(
    client: Rows,
    configs: Mapping[str, HashTableConfig],
    *,
    spec_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> MergedTables:
    """One table for all features of equal config.

    Args:
        client: An open cluster.
        configs: By feature.
        spec_options: What the tables' specs have beyond their configs: thresholds, filter, seed; see
            `TableSpec.of_config`.
        **options: As for `DistributedTables`.
    """

    def make(inner: Mapping[str, HashTableConfig]) -> DistributedTables:
        prefix, more = options.get("prefix", ""), spec_options or {}
        specs = {name: TableSpec.of_config(prefix + name, config, **more) for name, config in inner.items()}
        return DistributedTables(client, specs, **options)

    return MergedTables(configs, make)


def create_partitioned_tables(
    client: Rows,
    features: Mapping[str, PartitionedFeature],
    layouts: Mapping[str, OutConfig],
    *,
    native: bool = True,
    transfer_float16: bool | None = None,
    **options: Any,
) -> PartitionedTables:
    """The tables of features that become fused layouts.

    Args:
        client: An open cluster.
        features: By name.
        layouts: By name.
        native: A table for each feature, unless rows travel as float16; otherwise features of equal config share one.
        transfer_float16: Whether rows and gradients travel as float16; None: as the client was opened.
        **options: As for `PartitionedTables`.
    """
    return PartitionedTables(
        client,
        features,
        layouts,
        merge=not native or bool(transfer_float16),
        transfer_float16=transfer_float16,
        **options,
    )

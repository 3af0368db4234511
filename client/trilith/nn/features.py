"""Models written against features: slots and columns on one side, whatever holds the rows on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from trilith.features.slots import FeatureColumn, FeatureRegistry, FeatureSlice
from trilith.nn.bags import IdsLike
from trilith.nn.eager import outside_graphs
from trilith.nn.embedding import EmbeddingCollection, Feature, FetchedRows, TableLike
from trilith.nn.exchange import RowClient
from trilith.tables.spec import TableSpec

__all__ = ["FeatureEmbeddings", "FeatureModel", "TableMaker"]


class TableMaker(RowClient, Protocol):
    """`trilith.Client`, of PS or embedded, or `trilith.peers.PeerClient`, whose rows are in the workers."""

    def create_tables(self, specs: Sequence[TableSpec], /) -> Mapping[str, TableLike]:
        """Handles by name."""

    def record_features(self, tables: Mapping[str, str], /) -> None:
        """Put the table of each feature into the cluster's record, where there is one."""


class FeatureEmbeddings(EmbeddingCollection):
    """The embeddings of all columns of a registry; makes their tables.

    Args:
        client: What holds the rows: PS, this process, or the workers together.
        registry: The model's slots and columns, with all slices that it will ask for.
        merge_tables: Whether slots of equal rows share a table; see `FeatureRegistry.merged_table_specs`.
        **options: As for `EmbeddingCollection`.
    """

    def __init__(
        self, client: TableMaker, registry: FeatureRegistry, *, merge_tables: bool = False, **options: Any
    ) -> None:
        table_of = {name: name for name in registry.slots}
        specs = registry.table_specs()
        if merge_tables:
            specs, table_of = registry.merged_table_specs()
        tables = client.create_tables(specs)
        features = {
            name: Feature(tables[table_of[column.slot.name]], column.combiner)
            for name, column in registry.columns.items()
        }
        client.record_features({name: table_of[column.slot.name] for name, column in registry.columns.items()})
        super().__init__(client, features, **options)
        self.registry = registry

    @contextmanager
    def looked_up(self, batch: Mapping[str, IdsLike] | FetchedRows) -> Iterator[None]:
        """Inside, columns give their slices' values for this batch: float32[b, width], of FirstN(n) [b, n, width]."""
        vectors = self(batch)

        def lookup(column: FeatureColumn, slice_: FeatureSlice) -> Tensor:
            values: Tensor = vectors[column.feature_name][..., slice_.start : slice_.end]
            return values

        with self.registry.bound(lookup):
            yield


class FeatureModel(nn.Module):
    """A model that asks its columns for what it computes with.

    Args:
        embeddings: Of the columns.
        body: Called without arguments, while columns give the values of a batch.
    """

    def __init__(self, embeddings: FeatureEmbeddings, body: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.body = body

    @partial(outside_graphs, inside=True)
    def forward(self, batch: Mapping[str, IdsLike] | FetchedRows) -> Any:
        """What the body makes of a batch."""
        with self.embeddings.looked_up(batch):
            return self.body()

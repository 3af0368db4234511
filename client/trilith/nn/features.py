"""Models written against features: slots and columns on one side, whatever holds the rows on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trilith.features.slots import FeatureRegistry
from trilith.nn.bags import IdsLike
from trilith.nn.embedding import EmbeddingCollection, Feature, FetchedRows, TableLike
from trilith.nn.exchange import RowClient
from trilith.serving.exports import ProgramInput, ServedFeature
from trilith.tables.spec import TableSpec

__all__ = ["FeatureEmbeddings", "FeatureModel", "ServedFeatures", "TableMaker"]


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


class FeatureModel(nn.Module):
    """Embeddings, and a model that computes with slices of them.

    Args:
        embeddings: Of the columns.
        body: Is given a batch's vectors by feature, of which its columns take their slices.
    """

    def __init__(self, embeddings: FeatureEmbeddings, body: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.body = body

    def forward(self, batch: Mapping[str, IdsLike] | FetchedRows) -> Any:
        """What the body makes of a batch."""
        return self.body(self.embeddings(batch))


class ServedFeatures(nn.Module):
    """A `FeatureModel` as an exporter takes it: the vectors of each column in, what the body makes of them out.

    `trilith_services.exporting.Exporter(name, served, dense=body, features=served.features, inputs=served.inputs)`.

    Args:
        model: What is served; its body takes any number of samples and gives a tensor, or several in a tuple.

    Attributes:
        features: By column where an entry finds its rows; records have it under the column's name.
        inputs: Columns, in order.
    """

    def __init__(self, model: FeatureModel) -> None:
        super().__init__()
        self.body = model.body
        columns = model.embeddings.features
        self.features = {
            name: ServedFeature(table=each.table.name, combiner=each.combiner) for name, each in columns.items()
        }
        self.inputs = [ProgramInput(kind="feature", names=(name,)) for name in columns]
        self._names = list(columns)

    def forward(self, *tensors: Tensor) -> Any:
        """What the body makes of vectors float32[b, ...], column after column."""
        return self.body(dict(zip(self._names, tensors, strict=True)))

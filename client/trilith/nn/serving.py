"""ServedModel: an export loaded to score records: parser, embeddings, program."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.data import parsers
from trilith.data.clicks import Ragged
from trilith.data.records import Kind, Records
from trilith.data.specs import Dense, FeatureSpec, Slot, Sparse
from trilith.errors import InvalidRequestError
from trilith.exports import GRAPH, MODEL, WEIGHTS, ExportManifest, ModelConfig, ServedFeature, read_export, read_file
from trilith.folder import Folder
from trilith.nn.bags import Combiner, FirstN
from trilith.nn.embedding import EmbeddingCollection, Feature
from trilith.nn.program import Program, load_program, unpack_weights

__all__ = ["Lookup", "Scores", "ServedModel", "load_model"]

Float32Array = npt.NDArray[np.float32]

Lookup = Callable[[Mapping[str, Any], float | None], Mapping[str, Float32Array]]
"""Rows by table for ids by table, within so many seconds."""


class Scores(nn.Module):
    """A model of logits as one of probabilities."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, rows: Tensor) -> Tensor:
        """Return probabilities float32[b]."""
        return torch.sigmoid(self.head(rows))


class _Reader:
    """The rows as embeddings want them; the time that is left is the calling thread's."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.left = threading.local()

    def lookup(self, requests: Mapping[str, Any], /) -> Mapping[str, Float32Array]:
        return self._lookup(requests, getattr(self.left, "seconds", None))

    def apply_gradients(self, updates: Mapping[str, tuple[Any, Any]], /) -> None:
        raise InvalidRequestError("a served model does not learn")

    def assign_add(self, updates: Mapping[str, tuple[Any, Any]], /) -> None:
        raise InvalidRequestError("a served model does not learn")


@dataclass(frozen=True, slots=True)
class _ServedTable:
    name: str
    dim: int
    client: Any


class _Parsed(Protocol):
    def parse(self, records: Records, *, promote: bool = True) -> dict[str, Any]: ...


class ServedModel:
    """A model that scores records. Thread-safe.

    Args:
        config: What it is made of.
        program: The dense part.
        lookup: Where its rows are.
    """

    def __init__(self, config: ModelConfig, program: Program, lookup: Lookup) -> None:
        self.config = config
        self._program = program
        self._reader = _Reader(lookup)
        tables = {
            table.name: _ServedTable(table.name, config.dim_of(table.name), self._reader) for table in config.tables
        }
        self._used = [name for name in config.features if any(name in each.names for each in config.inputs)]
        self._embeddings = EmbeddingCollection(
            self._reader,
            {
                name: Feature(tables[config.features[name].table], _combiner(config.features[name]))
                for name in self._used
            },
        )
        self._embeddings.trainable = False
        # One stacked input of all features needs no tensor per feature.
        self._stacked = (
            len(config.inputs) == 1
            and config.inputs[0].kind == "stacked"
            and (list(config.inputs[0].names) == self._used)
        )
        self._parsers: dict[Kind, _Parsed] = {
            Kind.EXAMPLE: parsers.ExampleParser(self._specs(Kind.EXAMPLE)),
            Kind.INSTANCE: parsers.InstanceParser(self._specs(Kind.INSTANCE)),
        }

    def _specs(self, kind: Kind) -> dict[str, FeatureSpec]:
        specs: dict[str, FeatureSpec] = {}
        for name in self._used:
            feature = self.config.features[name]
            by_slot = kind is Kind.INSTANCE and feature.slot is not None
            specs[name] = Slot(feature.slot or 0) if by_slot else Sparse(feature.feature or name)
        for place, each in enumerate(self.config.inputs):
            if each.kind == "dense":
                specs[f"dense {place}"] = Dense(each.dim, feature=each.names[0])
        return specs

    def predict(self, records: Records, *, timeout_s: float | None = None) -> dict[str, Float32Array]:
        """Score Examples or Instances.

        Returns:
            By output float32[n, ...].

        Raises:
            DataError: A record is damaged.
            TrilithError: Rows could not be looked up within `timeout_s`.
        """
        parser = self._parsers.get(records.kind)
        if parser is None:
            raise InvalidRequestError(f"records of kind {records.kind} cannot be scored; Examples and Instances can")
        return self.score(parser.parse(records), timeout_s=timeout_s)

    def score(self, parsed: Mapping[str, Any], *, timeout_s: float | None = None) -> dict[str, Float32Array]:
        """The second half of `predict`."""
        batch = {name: Ragged(parsed[name].values.view(np.uint64), parsed[name].row_splits) for name in self._used}
        self._reader.left.seconds = timeout_s
        with torch.inference_mode():
            fetched = self._embeddings.fetch(batch)
            inputs = [self._embeddings.stacked(fetched)] if self._stacked else self._inputs(fetched, parsed)
            results = self._program(*inputs)
        return {name: value.numpy() for name, value in results.items()}

    def _inputs(self, fetched: Any, parsed: Mapping[str, Any]) -> list[Tensor]:
        vectors = self._embeddings(fetched) if self._used else {}
        inputs = []
        for place, each in enumerate(self.config.inputs):
            if each.kind == "stacked":
                inputs.append(torch.stack([vectors[name] for name in each.names], 1))
            elif each.kind == "feature":
                inputs.append(vectors[each.names[0]])
            else:
                inputs.append(torch.from_numpy(np.ascontiguousarray(parsed[f"dense {place}"])))
        return inputs


def _combiner(feature: ServedFeature) -> Combiner:
    return FirstN(feature.n) if feature.n else feature.combiner  # type: ignore[return-value]


def load_model(path: str, rows: Callable[[ModelConfig, ExportManifest], Lookup]) -> tuple[ServedModel, ExportManifest]:
    """Load a complete export.

    Args:
        path: Its folder.
        rows: Opens the place where its rows are.

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    folder = Folder(path)
    manifest = read_export(path)
    config = ModelConfig.from_json(read_file(folder, manifest, MODEL), folder.path(MODEL))
    weights = unpack_weights(read_file(folder, manifest, WEIGHTS), where=folder.path(WEIGHTS))
    graph = read_file(folder, manifest, GRAPH)
    program = load_program(graph, weights, config.outputs, where=folder.path(GRAPH))
    return ServedModel(config, program, rows(config, manifest)), manifest

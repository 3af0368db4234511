"""ServedModel: an export loaded to score records: parser, rows, program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.data.records import Kind, Records
from trilith.errors import DataError, InternalError, InvalidRequestError
from trilith.folder import Folder
from trilith.nn.pooling import make_pooling
from trilith.nn.program import Program, load_program, unpack_weights
from trilith.nn.requests import OnUnknown, RequestParser, dense_name, make_parser
from trilith.ops.pool import pool_rows
from trilith.ops.ragged import Ragged
from trilith.serving.exports import GRAPH, MODEL, WEIGHTS, ExportManifest, ModelConfig, read_export, read_file

__all__ = [
    "Lookup",
    "Scores",
    "ServedModel",
    "load_model",
]

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


class ServedModel:
    """A model that scores records. Thread-safe.

    Args:
        config: What it is made of.
        program: The dense part.
        lookup: Where its rows are.

    Attributes:
        config: As given.
        declared: What records may hold, by name.
    """

    def __init__(self, config: ModelConfig, program: Program, lookup: Lookup) -> None:
        self.config = config
        self.declared = config.record_features()
        self._program = program
        self._lookup = lookup
        self._shapes = config.shapes()
        self._used = [name for name in config.features if any(name in each.names for each in config.inputs)]
        self._by_table: dict[str, list[str]] = {}
        for name in self._used:
            self._by_table.setdefault(config.features[name].table, []).append(name)
        self._parsers: dict[Kind, RequestParser] = {
            Kind.EXAMPLE: make_parser(config, Kind.EXAMPLE),
            Kind.INSTANCE: make_parser(config, Kind.INSTANCE),
        }

    def predict(
        self, records: Records, *, timeout_s: float | None = None, on_unknown: OnUnknown | None = None
    ) -> dict[str, Float32Array]:
        """Score Examples or Instances.

        Args:
            records: What to score; a feature that one does not have is an empty bag, or zeros.
            timeout_s: Deadline of looking rows up.
            on_unknown: Told if records have features that the model does not know; None: nobody counts them.

        Returns:
            By output float32[n, ...].

        Raises:
            InvalidRequestError: A record is damaged, or holds what the model cannot take.
            TrilithError: Rows could not be looked up within `timeout_s`.
        """
        parser = self._parsers.get(records.kind)
        if parser is None:
            raise InvalidRequestError(f"records of kind {records.kind} cannot be scored; Examples and Instances can")
        try:
            parsed, weights = parser.score(records, on_unknown)
        except DataError as error:  # the records came with the request
            raise InvalidRequestError(str(error)) from None
        return self.score(parsed, weights, timeout_s=timeout_s)

    def score(
        self,
        parsed: Mapping[str, Any],
        weights: Mapping[str, Ragged[np.float32]] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Float32Array]:
        """The second half of `predict`."""
        bags = {name: self._bags(name, parsed[name]) for name in self._used}
        rows = self._rows(bags, timeout_s)
        inputs = [
            torch.from_numpy(self._input(place, parsed, weights or {}, bags, rows))
            for place in range(len(self._shapes))
        ]
        return {name: value.numpy() for name, value in self._program(*inputs).items()}

    def _bags(self, name: str, ids: Ragged[np.int64]) -> Ragged[np.int64]:
        """A feature's ids, without those that no input has a place for."""
        feature = self.config.features[name]
        if not feature.combiner.n:
            return ids
        return ids.last(feature.combiner.n) if feature.newest else ids.first(feature.combiner.n)

    def _rows(self, bags: Mapping[str, Ragged[np.int64]], timeout_s: float | None) -> dict[str, Float32Array]:
        """Per feature the float32[n, dim] rows of its ids, all looked up in one call."""
        ids = {
            table: np.concatenate([bags[name].values for name in names]).view(np.uint64)
            for table, names in self._by_table.items()
        }
        found = self._lookup(ids, timeout_s) if ids else {}
        rows: dict[str, Float32Array] = {}
        for table, names in self._by_table.items():
            shape = (ids[table].size, self.config.dim_of(table))
            if found[table].shape != shape:  # kernels read what the shape promises
                raise InternalError(
                    f"table {table!r}: rows of shape {found[table].shape} were found instead of {shape}"
                )
            start = 0
            for name in names:
                stop = start + bags[name].values.size
                rows[name] = found[table][start:stop]
                start = stop
        return rows

    def _input(
        self,
        place: int,
        parsed: Mapping[str, Any],
        weights: Mapping[str, Ragged[np.float32]],
        bags: Mapping[str, Ragged[np.int64]],
        rows: dict[str, Float32Array],
    ) -> npt.NDArray[Any]:
        """What the program takes in one place."""
        wanted = self.config.inputs[place]
        if wanted.kind == "dense":
            return np.ascontiguousarray(parsed[dense_name(wanted)])
        if wanted.kind == "mask":
            there = np.arange(*self._shapes[place]) < bags[wanted.names[0]].lengths[:, None]
            return there.astype(np.float32)
        out = np.empty((len(bags[wanted.names[0]]), *self._shapes[place]), np.float32)
        for column, name in enumerate(wanted.names):
            target = out[:, column] if wanted.kind == "stacked" else out
            combiner = self.config.features[name].combiner
            if name in weights:
                pooling = make_pooling([bags[name].lengths], [combiner], torch.from_numpy, [weights[name].values])
                target[:] = pooling.forward(torch.from_numpy(rows[name])).numpy()
            else:
                pool_rows(rows[name], bags[name].row_splits, combiner, target)
        return out


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

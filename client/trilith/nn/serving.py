"""ServedModel: an export loaded to score records: parser, rows, program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.data.records import Kind, Records
from trilith.errors import DataError, InternalError, InvalidRequestError
from trilith.folder import Folder
from trilith.nn.pooling import make_pooling
from trilith.nn.program import Program, load_program, unpack_weights, weights_of
from trilith.nn.requests import OnUnknown, RequestParser, dense_name, make_parser
from trilith.ops.pool import pool_rows
from trilith.ops.ragged import Ragged
from trilith.serving.exports import (
    MODEL,
    SERVING_DEFAULT,
    WEIGHTS,
    ExportManifest,
    ModelConfig,
    ProgramInput,
    graph_name,
    read_export,
    read_file,
)

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


@dataclass(frozen=True, slots=True)
class _Runs:
    """One signature, with what its program wants worked out.

    Attributes:
        program: The dense part.
        inputs: What it takes, in order.
        shapes: Of the inputs, without the batch.
        used: Features that are looked up.
        by_table: The same by table.
    """

    program: Program
    inputs: tuple[ProgramInput, ...]
    shapes: list[tuple[int, ...]]
    used: list[str]
    by_table: dict[str, list[str]]

    @classmethod
    def of(cls, config: ModelConfig, name: str, program: Program) -> _Runs:
        inputs = config.signature(name).inputs
        used = [each for each in config.features if any(w.kind != "dense" and each in w.names for w in inputs)]
        by_table: dict[str, list[str]] = {}
        for each in used:
            by_table.setdefault(config.features[each].table, []).append(each)
        return cls(program, inputs, config.shapes(name), used, by_table)


class ServedModel:
    """A model that scores records. Thread-safe.

    Args:
        config: What it is made of.
        program: The dense part.
        lookup: Where its rows are.
        others: Programs of further signatures, by name.

    Attributes:
        config: As given.
        declared: What records may hold, by name.
    """

    def __init__(
        self, config: ModelConfig, program: Program, lookup: Lookup, others: Mapping[str, Program] | None = None
    ) -> None:
        self.config = config
        self.declared = config.record_features()
        self._lookup = lookup
        programs = {SERVING_DEFAULT: program, **(others or {})}
        self._runs = {name: _Runs.of(config, name, each) for name, each in programs.items()}
        self._parsers: dict[Kind, RequestParser] = {
            Kind.EXAMPLE: make_parser(config, Kind.EXAMPLE),
            Kind.INSTANCE: make_parser(config, Kind.INSTANCE),
        }

    def predict(
        self,
        records: Records,
        *,
        signature: str = "",
        timeout_s: float | None = None,
        on_unknown: OnUnknown | None = None,
    ) -> dict[str, Float32Array]:
        """Score Examples or Instances.

        Args:
            records: What to score; a feature that one does not have is an empty bag, or zeros.
            signature: Which of the model's; empty: the first.
            timeout_s: Deadline of looking rows up.
            on_unknown: Told if records have features that the model does not know; None: nobody counts them.

        Returns:
            By output float32[n, ...].

        Raises:
            InvalidRequestError: A record is damaged or holds what the model cannot take, or there is no such signature.
            TrilithError: Rows could not be looked up within `timeout_s`.
        """
        self.config.signature(signature)
        runs = self._runs[signature or SERVING_DEFAULT]
        parser = self._parsers.get(records.kind)
        if parser is None:
            raise InvalidRequestError(f"records of kind {records.kind} cannot be scored; Examples and Instances can")
        try:
            parsed, weights = parser.score(records, on_unknown)
        except DataError as error:  # the records came with the request
            raise InvalidRequestError(str(error)) from None
        bags = {name: self._bags(name, parsed[name]) for name in runs.used}
        rows = self._rows(runs, bags, timeout_s)
        inputs = [
            torch.from_numpy(self._input(wanted, shape, parsed, weights, bags, rows))
            for wanted, shape in zip(runs.inputs, runs.shapes, strict=True)
        ]
        return {name: value.numpy() for name, value in runs.program(*inputs).items()}

    def _bags(self, name: str, ids: Ragged[np.int64]) -> Ragged[np.int64]:
        """A feature's ids, without those that no input has a place for."""
        feature = self.config.features[name]
        if not feature.combiner.n:
            return ids
        return ids.last(feature.combiner.n) if feature.newest else ids.first(feature.combiner.n)

    def _rows(
        self, runs: _Runs, bags: Mapping[str, Ragged[np.int64]], timeout_s: float | None
    ) -> dict[str, Float32Array]:
        """Per feature the float32[n, dim] rows of its ids, all looked up in one call."""
        ids = {
            table: np.concatenate([bags[name].values for name in names]).view(np.uint64)
            for table, names in runs.by_table.items()
        }
        found = self._lookup(ids, timeout_s) if ids else {}
        rows: dict[str, Float32Array] = {}
        for table, names in runs.by_table.items():
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
        wanted: ProgramInput,
        shape: tuple[int, ...],
        parsed: Mapping[str, Any],
        weights: Mapping[str, Ragged[np.float32]],
        bags: Mapping[str, Ragged[np.int64]],
        rows: dict[str, Float32Array],
    ) -> npt.NDArray[Any]:
        """What a program takes in one place."""
        if wanted.kind == "dense":
            return np.ascontiguousarray(parsed[dense_name(wanted)])
        if wanted.kind == "mask":
            there = np.arange(*shape) < bags[wanted.names[0]].lengths[:, None]
            return there.astype(np.float32)
        out = np.empty((len(bags[wanted.names[0]]), *shape), np.float32)
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
    programs = {}
    for signature in (SERVING_DEFAULT, *config.signatures):
        name = graph_name(signature)
        programs[signature] = load_program(
            read_file(folder, manifest, name),
            weights_of(signature, weights),
            config.signature(signature).outputs,
            where=folder.path(name),
        )
    first = programs.pop(SERVING_DEFAULT)
    return ServedModel(config, first, rows(config, manifest), programs), manifest

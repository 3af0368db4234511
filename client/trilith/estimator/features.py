"""Features of a task: what a model takes of every sample, described by class attributes, and the tensors it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops.combiners import CombinerLike, combiner_of
from trilith.tables import Adagrad, RandomUniform, Segment, TableSpec, table_config
from trilith.tables.compressors import CompressorLike
from trilith.tables.initializers import InitializerLike
from trilith.tables.optimizers import OptimizerLike
from trilith.tables.schedules import LearningRate
from trilith.tables.spec import FilterName

__all__ = ["Embedding", "Inputs", "Pooled", "Rows", "Sequence"]

MAX_LENGTH = 1 << 16
MAX_DIM = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """Ids of a feature, whose rows become one vector for each sample: `x.NAME.vector`, float32[b, dim].

    Attributes:
        dim: Floats of the vector.
        pooling: How the rows of several ids become one: "sum", "mean", "sqrtn" or "max". No ids give
            zeros.
        bias: Whether a row has one float more, pooled apart: `x.NAME.bias`, float32[b].
        optimizer: Steps the vectors; Adagrad with a rate of 0.05 if None.
        initializer: Of new rows; uniform over [-0.05, 0.05) if None.
        bias_optimizer: Steps the biases; None: as `optimizer`.
        bias_initializer: None: as `initializer`.
        compressor: How serving stores the vectors.
        learning_rate: A number or schedule in place of the optimizer's.
        ttl_days: Days without a step after which a row expires; None: never.
        evict_every_hours: Above 0, the PS deletes expired rows by themselves that often.
        occurrence_threshold: An id gets its row at the occurrence after that many.
        filter: What counts occurrences, see `trilith.tables.table_config`.
        filter_capacity: Ids that the sliding filter can count.
        initial_capacity: A hint: rows to make room for at the start.
        seed: Decides the values of new rows; None derives it from the table's name.
        table: Name of the table; the attribute's name if empty.
        feature: Name in the batches; the attribute's name if empty.
        weights: Name in the batches of one weight for every id; none if empty.
        base: Another feature whose table this is a second view of; see `view`.
    """

    dim: int
    pooling: CombinerLike = "mean"
    bias: bool = False
    optimizer: OptimizerLike | None = None
    initializer: InitializerLike | None = None
    bias_optimizer: OptimizerLike | None = None
    bias_initializer: InitializerLike | None = None
    compressor: CompressorLike | None = None
    learning_rate: LearningRate | None = None
    ttl_days: int | None = None
    evict_every_hours: int = 0
    occurrence_threshold: int | None = None
    filter: FilterName | None = None
    filter_capacity: int | None = None
    initial_capacity: int = 1
    seed: int | None = None
    table: str = ""
    feature: str = ""
    weights: str = ""
    base: Embedding | None = None

    def __post_init__(self) -> None:
        if not _whole(self.dim, 1, MAX_DIM):
            raise InvalidRequestError(f"Embedding(dim={self.dim!r}): dim is a whole number of floats in 1..{MAX_DIM}")
        if combiner_of(self.pooling).n:
            raise InvalidRequestError(
                f"Embedding(pooling={self.pooling}): unpooled rows are Sequence(embedding, length)"
            )

    def view(self, *, pooling: CombinerLike = "mean", feature: str = "", weights: str = "") -> Embedding:
        """Another feature over the same table: looked up in the same call, and stepped in the same step."""
        return replace(self, pooling=pooling, feature=feature, weights=weights, base=self)

    @property
    def row_dim(self) -> int:
        """Floats of a row: the vector and, where there is one, the bias before it."""
        return self.dim + self.bias

    def spec(self, name: str) -> TableSpec:
        """The table of a feature called `name`."""
        optimizer = self.optimizer or Adagrad(learning_rate=0.05)
        initializer = self.initializer or RandomUniform(-0.05, 0.05)
        segments = [Segment(self.dim, initializer, optimizer, self.compressor)]
        if self.bias:
            segments.insert(
                0, Segment(1, self.bias_initializer or initializer, self.bias_optimizer or optimizer, self.compressor)
            )
        return table_config(
            self.table or name,
            segments=segments,
            learning_rate=self.learning_rate,
            seed=self.seed,
            ttl_days=self.ttl_days,
            evict_every_hours=self.evict_every_hours,
            occurrence_threshold=self.occurrence_threshold,
            filter=self.filter,
            filter_capacity=self.filter_capacity,
            initial_capacity=self.initial_capacity,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """The newest ids of a feature in order, each with its row: `x.NAME.values`, float32[b, length, dim], and `.mask`.

    Attributes:
        base: Whose rows they have; looked up in the same call.
        length: Ids kept of a sample: its last ones, which are the newest. Shorter ones stand at the left.
        feature: Name in the batches; the attribute's name if empty.
    """

    base: Embedding
    length: int
    feature: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.base, Embedding):
            raise InvalidRequestError(f"Sequence({self.base!r}): a sequence has the rows of an Embedding")
        if not _whole(self.length, 1, MAX_LENGTH):
            raise InvalidRequestError(f"Sequence(length={self.length!r}): length is a whole number in 1..{MAX_LENGTH}")


class Pooled(NamedTuple):
    """What a model gets of an `Embedding`.

    Attributes:
        vector: float32[b, dim].
        bias: float32[b]; zeros where rows have none.
    """

    vector: Tensor
    bias: Tensor


class Rows(NamedTuple):
    """What a model gets of a `Sequence`.

    Attributes:
        values: float32[b, length, dim]; zeros behind a sample's last id.
        mask: bool[b, length]: whether there is an id, whatever its row.
    """

    values: Tensor
    mask: Tensor


class Inputs(Mapping[str, Any]):
    """All features of a batch by name, as attributes and as a mapping: `Pooled`, `Rows`, or tensors of dense ones."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"no feature {name!r}; this task has {sorted(self._values)}")
        return self._values[name]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

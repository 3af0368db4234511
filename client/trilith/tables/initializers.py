"""Initializers: the weights of a row before its first write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from trilith.errors import InvalidRequestError
from trilith.tables.parts import Part
from trilith_proto.hash_table_pb2 import InitializerConfig

__all__ = [
    "BatchSoftmaxInitializer",
    "Constants",
    "Initializer",
    "InitializerLike",
    "Ones",
    "RandomUniform",
    "Zeros",
]


class Initializer(Part[InitializerConfig]):
    """Base of the initializers."""

    __slots__ = ()
    config = InitializerConfig


InitializerLike: TypeAlias = Initializer | InitializerConfig


@dataclass(frozen=True, slots=True)
class Zeros(Initializer):
    """All zeros."""

    kind = "zeros"


@dataclass(frozen=True, slots=True)
class Ones(Initializer):
    """All ones."""

    kind = "ones"


@dataclass(frozen=True, slots=True)
class Constants(Initializer):
    """One value everywhere."""

    kind = "constants"
    constant: float


@dataclass(frozen=True, slots=True)
class RandomUniform(Initializer):
    """Independent draws from [minval, maxval), by default [-0.05, 0.05).

    A draw depends on the table's seed, the id and the column alone, so it is the same on any cluster.
    """

    kind = "random_uniform"
    minval: float | None = None
    maxval: float | None = None

    def __post_init__(self) -> None:
        # Named, since the zero-argument super() does not see through a slotted dataclass.
        Initializer.__post_init__(self)
        drawn = self.as_proto().random_uniform
        if drawn.minval > drawn.maxval:
            raise InvalidRequestError(f"RandomUniform: minval={drawn.minval:g} is above maxval={drawn.maxval:g}")


@dataclass(frozen=True, slots=True)
class BatchSoftmaxInitializer(Initializer):
    """Where `BatchSoftmax` starts: the steps assumed between two occurrences of an unseen id, at least 1."""

    kind = "constants"
    renamed: ClassVar[dict[str, str]] = {"init_step_interval": "constant"}
    init_step_interval: float

    def __post_init__(self) -> None:
        Initializer.__post_init__(self)
        if self.init_step_interval < 1:
            raise InvalidRequestError(
                f"BatchSoftmaxInitializer: init_step_interval={self.init_step_interval!r} is below 1"
            )

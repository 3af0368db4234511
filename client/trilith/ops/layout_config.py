"""What fused layouts are made of: which table and slices a feature has, and which slices make which tensor."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trilith.errors import InvalidRequestError
from trilith.ops.combiners import Combiner

__all__ = ["FeatureConfig", "FeatureConfigs", "OutConfig", "OutType", "SliceConfig"]


_SUM = Combiner("sum")


class OutType(enum.IntEnum):
    """How slices become a tensor; the numbers are those of the messages."""

    CONCAT = 0
    STACK = 1
    ADDN = 2
    NONE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureConfig:
    """One feature.

    Attributes:
        table: Whose vectors it has.
        slice_dims: Widths of the slices of a vector.
        combiner: How the vectors of a row become one.
    """

    table: str
    slice_dims: tuple[int, ...]
    combiner: Combiner = _SUM

    def __post_init__(self) -> None:
        object.__setattr__(self, "slice_dims", tuple(int(each) for each in self.slice_dims))
        if not self.slice_dims or min(self.slice_dims) < 1:
            raise InvalidRequestError(f"slice_dims {list(self.slice_dims)} are not all at least 1")
        if not (self.combiner.adds or self.combiner.n):
            raise InvalidRequestError(f"layouts combine rows by sum, mean, sqrtn or first n, not by {self.combiner}")

    @property
    def dim(self) -> int:
        """Floats of a vector."""
        return sum(self.slice_dims)


@dataclass(frozen=True, slots=True)
class SliceConfig:
    """Columns start..end of a feature's vectors."""

    feature_name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutConfig:
    """One layout.

    Attributes:
        slices: What it shows, in order.
        out_type: How.
        shape: Per tensor its dimensions, -1 first; only checked. None: whatever comes of the slices.
    """

    slices: tuple[SliceConfig, ...]
    out_type: OutType
    shape: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "slices", tuple(self.slices))
        object.__setattr__(self, "out_type", OutType(self.out_type))


@dataclass(frozen=True, slots=True)
class FeatureConfigs:
    """The features of a model and the layouts made of them.

    Tables and features are numbered by sorted name everywhere, layouts come by sorted name.

    Attributes:
        features: By name.
        layouts: By name; none where only ids are sharded.
    """

    features: Mapping[str, FeatureConfig]
    layouts: Mapping[str, OutConfig]

    def __post_init__(self) -> None:
        if not self.features:
            raise InvalidRequestError("the configs name no feature")
        for name, layout in self.layouts.items():
            self._check(name, layout)

    @property
    def feature_names(self) -> list[str]:
        """Sorted."""
        return sorted(self.features)

    @property
    def table_names(self) -> list[str]:
        """Sorted."""
        return sorted({feature.table for feature in self.features.values()})

    @property
    def features_by_table(self) -> dict[str, list[str]]:
        """Sorted features by sorted table."""
        tables: dict[str, list[str]] = {table: [] for table in self.table_names}
        for name in self.feature_names:
            tables[self.features[name].table].append(name)
        return tables

    def tensor_shapes(self, layout: str) -> list[tuple[int, ...]]:
        """The shapes of a layout's tensors without the batch."""
        out = self.layouts[layout]
        shapes = [self._slice_shape(each) for each in out.slices]
        if out.out_type is OutType.NONE:
            return shapes
        if out.out_type is OutType.CONCAT:
            return [(*shapes[0][:-1], sum(shape[-1] for shape in shapes))]
        return [shapes[0] if out.out_type is OutType.ADDN else (len(shapes), *shapes[0])]

    def _slice_shape(self, slice_: SliceConfig) -> tuple[int, ...]:
        return self.features[slice_.feature_name].combiner.shape(slice_.end - slice_.start)

    def _check(self, name: str, layout: OutConfig) -> None:
        if not layout.slices:
            raise InvalidRequestError(f"layout {name!r} has no slices")
        for each in layout.slices:
            if each.feature_name not in self.features:
                raise InvalidRequestError(f"layout {name!r}: no feature {each.feature_name!r} in {self.feature_names}")
            dim = self.features[each.feature_name].dim
            if not 0 <= each.start < each.end <= dim:
                raise InvalidRequestError(
                    f"layout {name!r}: slice {each.start}..{each.end} of {each.feature_name!r} is not within 0..{dim}"
                )
        shapes = [self._slice_shape(each) for each in layout.slices]
        if layout.out_type is OutType.ADDN and any(len(shape) > 1 for shape in shapes):
            raise InvalidRequestError(f"layout {name!r}: sequences cannot be added up")
        alike = {shape[:-1] for shape in shapes} if layout.out_type is OutType.CONCAT else set(shapes)
        if layout.out_type is not OutType.NONE and len(alike) > 1:
            raise InvalidRequestError(f"layout {name!r}: slices of shapes {shapes} do not fit {layout.out_type.name}")
        if layout.shape is not None:
            self._check_shape(name, layout.shape)

    def _check_shape(self, name: str, shapes: Sequence[Sequence[int]]) -> None:
        wanted = [(-1, *shape) for shape in self.tensor_shapes(name)]
        given = [tuple(shape) for shape in shapes]
        if given != wanted:
            raise InvalidRequestError(f"layout {name!r}: shapes {given} are given, the slices make {wanted}")

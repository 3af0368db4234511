"""Transforms: filters and labels as a config that travels as bytes, and what running one does to records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.line_ids import line_field
from trilith.data.records import Records
from trilith.data.samples import filters, labels
from trilith.data.samples.chunk import Needs, SampleOp, Samples, apply_ops
from trilith.data.samples.filters import line_domain
from trilith.data.samples.label_conf import fill_tasks, tasks_of
from trilith.data.samples.relations import SINGLE, Domain
from trilith.errors import DataError, InvalidRequestError
from trilith_proto import transform_config_pb2

__all__ = [
    "AddLabel",
    "Compose",
    "FilterByAction",
    "FilterByFid",
    "FilterByLabel",
    "FilterByValue",
    "LogicalOr",
    "Transform",
    "TransformConfig",
    "apply_transform",
    "ops_of",
]

TransformConfig = transform_config_pb2.TransformConfig
_Basic = transform_config_pb2.BasicTransformConfig


class Transform(ABC):
    """Something that drops or changes samples and can say what it is as a `TransformConfig`."""

    @abstractmethod
    def as_proto(self) -> TransformConfig:
        """The config; its bytes are those of the reference system."""

    def __call__(self, records: Records, ordinals: npt.NDArray[np.int64] | None = None) -> Records:
        """The records that pass, changed; see `samples.apply_ops`."""
        return apply_transform(self.as_proto(), records, ordinals)


class _Leaf(Transform):
    """A transform that is one `BasicTransformConfig`."""

    @abstractmethod
    def as_basic(self) -> _Basic:
        """The config of this leaf alone."""

    def as_proto(self) -> TransformConfig:
        config = TransformConfig()
        config.configs.add().basic_config.CopyFrom(self.as_basic())
        return config


@dataclass(frozen=True)
class FilterByFid(_Leaf):
    """Keep samples by the fids they have; see `samples.FilterByFids`."""

    has_fids: Sequence[int] | None = None
    filter_fids: Sequence[int] | None = None
    select_fids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _op_of(self.as_basic())

    def as_basic(self) -> _Basic:
        basic = _Basic()
        basic.filter_by_fid.SetInParent()
        for name in ("has_fids", "filter_fids", "select_fids"):
            _extend(basic.filter_by_fid, name, getattr(self, name) or ())
        return basic


@dataclass(frozen=True)
class FilterByAction(_Leaf):
    """Keep samples that have one of some actions."""

    has_actions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.as_basic()

    def as_basic(self) -> _Basic:
        basic = _Basic()
        basic.filter_by_action.SetInParent()
        _extend(basic.filter_by_action, "has_actions", self.has_actions or ())
        return basic


@dataclass(frozen=True)
class FilterByLabel(_Leaf):
    """Keep samples one of whose labels reaches its threshold; see `samples.FilterByLabel`."""

    thresholds: Sequence[float]

    def __post_init__(self) -> None:
        self.as_basic()

    def as_basic(self) -> _Basic:
        basic = _Basic()
        basic.filter_by_label.SetInParent()
        _extend(basic.filter_by_label, "thresholds", self.thresholds)
        return basic


@dataclass(frozen=True)
class FilterByValue(_Leaf):
    """Keep samples by a field of their LineId; see `samples.FilterByValue`."""

    field_name: str
    op: str
    operand: Any = None
    keep_empty: bool = False
    operand_filepath: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        filters.FilterByValue(self.field_name, self.op, self.operand, operand_filepath=self.operand_filepath)

    def as_basic(self) -> _Basic:
        basic = _Basic()
        config = basic.filter_by_value
        config.field_name, config.op, config.keep_empty = self.field_name, self.op, self.keep_empty
        if self.operand_filepath:
            config.operand_filepath = self.operand_filepath
            return basic
        domain = line_domain(line_field(self.field_name))
        operands = filters.FilterByValue(self.field_name, self.op, self.operand).relation.operands
        if domain is Domain.BYTES:
            try:
                config.string_operand.extend(each.decode() for each in operands)
            except UnicodeDecodeError:
                raise InvalidRequestError(f"operand is {self.operand!r}; in a config it must be UTF-8") from None
        elif domain in (Domain.FLOAT, Domain.DOUBLE):
            config.float_operand.extend(operands)
        else:
            # An unsigned operand travels as the int64 of the same bits.
            config.int_operand.extend((each + 2**63) % 2**64 - 2**63 for each in operands)
        return basic


@dataclass(frozen=True)
class AddLabel(_Leaf):
    """Append labels made of actions; see `samples.AddLabel`."""

    config: str
    negative_value: float = 0.0
    new_sample_rate: float = 1.0

    def __post_init__(self) -> None:
        labels.AddLabel(self.config, self.negative_value, self.new_sample_rate)

    def as_basic(self) -> _Basic:
        basic = _Basic()
        fill_tasks(basic.add_label.task_label_configs, labels.AddLabel(self.config).tasks)
        basic.add_label.negative_value = self.negative_value
        basic.add_label.new_sample_rate = self.new_sample_rate
        return basic


@dataclass(frozen=True)
class LogicalOr(Transform):
    """Keep samples that pass one of two leaves; both run, so labels of both are added."""

    x: Transform
    y: Transform

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            side = getattr(self, name)
            if not isinstance(side, _Leaf):
                raise InvalidRequestError(f"{name} is {side!r}; LogicalOr takes leaves, neither Compose nor LogicalOr")

    def as_proto(self) -> TransformConfig:
        config = TransformConfig()
        sides = config.configs.add().logical_or_config
        for name in ("x", "y"):
            getattr(sides, name).CopyFrom(getattr(self, name).as_basic())
        return config


@dataclass(frozen=True)
class Compose(Transform):
    """Run transforms one after the other; what one drops, the next does not see."""

    transforms: Sequence[Transform]

    def __post_init__(self) -> None:
        if not isinstance(self.transforms, Sequence):
            raise InvalidRequestError(f"transforms is {self.transforms!r}; give a list")
        for each in self.transforms:
            if not isinstance(each, Transform):
                raise InvalidRequestError(f"transforms has {each!r}, which is no Transform")

    def as_proto(self) -> TransformConfig:
        config = TransformConfig()
        for each in self.transforms:
            config.configs.extend(each.as_proto().configs)
        return config


def _extend(config: Any, name: str, values: Sequence[Any]) -> None:
    try:
        getattr(config, name).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} is {values!r}: {error}") from None


# ---- running ---------------------------------------------------------------------------------------------------------


def apply_transform(
    config: TransformConfig | bytes, records: Records, ordinals: npt.NDArray[np.int64] | None = None
) -> Records:
    """Run a config over records; an empty one changes nothing.

    Args:
        config: The message or its bytes.
        records: Instances or Examples.
        ordinals: int64[n], what the draws of each record depend on; see `samples.apply_ops`.
    """
    return apply_ops(ops_of(config), records, ordinals)


def ops_of(config: TransformConfig | bytes) -> list[SampleOp]:
    """The sample ops that a config stands for, in order."""
    if isinstance(config, bytes):
        try:
            config = TransformConfig.FromString(config)
        except DecodeError:
            raise DataError("the bytes given are no TransformConfig") from None
    return [_stage(each, 2 * place) for place, each in enumerate(config.configs)]


def _stage(config: Any, seed: int) -> SampleOp:
    kind = config.WhichOneof("type")
    if kind == "basic_config":
        return _op_of(config.basic_config, seed)
    if kind == "logical_or_config":
        return _Either(_op_of(config.logical_or_config.x, seed), _op_of(config.logical_or_config.y, seed + 1))
    raise InvalidRequestError("a config is neither a basic_config nor a logical_or_config")


def _op_of(basic: _Basic, seed: int = 0) -> SampleOp:
    match basic.WhichOneof("type"):
        case "filter_by_fid":
            fids = basic.filter_by_fid
            return filters.FilterByFids(
                has_fids=fids.has_fids, filter_fids=fids.filter_fids, select_fids=fids.select_fids
            )
        case "filter_by_action":
            return filters.FilterByFids(has_actions=basic.filter_by_action.has_actions)
        case "filter_by_label":
            return filters.FilterByLabel(basic.filter_by_label.thresholds)
        case "filter_by_value":
            return _filter_by_value(basic.filter_by_value)
        case "add_label":
            label = basic.add_label
            tasks = tasks_of(label.task_label_configs)
            return labels.AddLabel(tasks, label.negative_value, label.new_sample_rate, seed)
    raise InvalidRequestError("a basic_config names no transform that is known")


def _filter_by_value(config: Any) -> SampleOp:
    given = next((list(each) for each in (config.float_operand, config.int_operand, config.string_operand) if each), [])
    operand: Any = None if config.operand_filepath else given
    if given and (config.op in SINGLE or (config.op in ("in", "not-in") and config.float_operand)):
        operand = given[0]
    return filters.FilterByValue(
        config.field_name,
        config.op,
        operand,
        operand_filepath=config.operand_filepath,
        keep_empty=config.keep_empty,
    )


@dataclass(frozen=True)
class _Either(SampleOp):
    """Both of two ops on the same samples, keeping those that either keeps."""

    x: SampleOp
    y: SampleOp

    @property
    def needs(self) -> Needs:
        return self.x.needs | self.y.needs

    def apply(self, samples: Samples) -> npt.NDArray[np.bool_]:
        kept = [side.apply(samples) for side in (self.x, self.y)]
        return np.logical_or(*(np.ones(len(samples), np.bool_) if each is None else each > 0 for each in kept))

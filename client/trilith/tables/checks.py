"""Whether a table config makes a table: asked by the client before it sends one and by the PS before it builds one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trilith.errors import InvalidRequestError
from trilith.tables.ranges import MAX_DIM, check_fields
from trilith_proto import hash_table_pb2, ps_pb2

__all__ = ["MAX_COUNTED", "MAX_SLOT", "check_optimizer", "check_table_config"]

MAX_SLOT = 2**15 - 1
"""Slots are 15 bits of the id."""

MAX_COUNTED = 15
"""What the sliding filter's counters saturate at: a higher threshold lets no id through."""

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_:.-]|/(?!/)){0,199}")
_MAX_CAPACITY = 2**34
_MAX_FILTER_CAPACITY = 2**36
_MAX_FILTER_SPLITS = 1024


def check_table_config(config: ps_pb2.TableConfig) -> None:
    """Raise InvalidRequestError, with the value and what would be right, unless a table can be made of `config`."""
    if not _NAME.fullmatch(config.name) or ".." in config.name:
        raise InvalidRequestError(
            f"table name {config.name!r} is not 1 to 200 letters, digits and _ : . - /, "
            "the first a letter, digit or _, without .. and //"
        )
    owner = f"table {config.name!r}"
    table = config.hash_table
    if table.WhichOneof("type") is None:
        raise InvalidRequestError(f"{owner}: hash_table chooses no type; cuckoo is the one there is")
    if table.enable_feature_eviction and table.feature_evict_every_n_hours < 1:
        raise InvalidRequestError(
            f"{owner}: eviction is enabled, but feature_evict_every_n_hours={table.feature_evict_every_n_hours} "
            "is below 1"
        )
    if table.initial_capacity > _MAX_CAPACITY:
        raise InvalidRequestError(f"{owner}: initial_capacity={table.initial_capacity} rows is above {_MAX_CAPACITY}")
    _check_entry(owner, table.entry_config)
    _check_slots(f"{owner}: slot_expire_times", (each.slot for each in table.slot_expire_time_config.slot_expire_times))
    thresholds = config.occurrence_thresholds.slot_occurrence_thresholds
    _check_slots(f"{owner}: slot_occurrence_thresholds", (each.slot for each in thresholds))
    if config.filter not in ps_pb2.TableConfig.FilterKind.values():
        raise InvalidRequestError(f"{owner}: filter={config.filter} is none of {ps_pb2.TableConfig.FilterKind.keys()}")
    if config.filter_capacity > _MAX_FILTER_CAPACITY:
        raise InvalidRequestError(f"{owner}: filter_capacity={config.filter_capacity} is above {_MAX_FILTER_CAPACITY}")
    if config.filter_splits > _MAX_FILTER_SPLITS:
        raise InvalidRequestError(f"{owner}: filter_splits={config.filter_splits} is above {_MAX_FILTER_SPLITS}")


def check_optimizer(owner: str, config: hash_table_pb2.OptimizerConfig, dim: int) -> None:
    """Raise InvalidRequestError unless `config` is an optimizer that steps `dim` floats and whose formula is known."""
    kind = _kind(owner, "optimizer", config)
    check_fields(f"{owner}, {kind}", getattr(config, kind))
    if kind == "dc":
        raise InvalidRequestError(
            f"{owner}: dc compensates another optimizer's delay and cannot be a table's optimizer"
        )
    if kind == "batch_softmax" and dim != 1:
        raise InvalidRequestError(f"{owner}: batch_softmax keeps one float per row, but dim={dim}")
    if kind == "dynamic_wd_adagrad":
        decay = config.dynamic_wd_adagrad
        if decay.enable_dynamic_wd or decay.flip_direction or decay.dynamic_wd_temperature != 1.0:
            raise InvalidRequestError(
                f"{owner}: what dynamic_wd_adagrad does with enable_dynamic_wd={decay.enable_dynamic_wd}, "
                f"flip_direction={decay.flip_direction}, dynamic_wd_temperature={decay.dynamic_wd_temperature:g} was "
                "never specified; only False, False and 1 are"
            )


def _check_entry(owner: str, entry: hash_table_pb2.EntryConfig) -> None:
    if entry.entry_type == hash_table_pb2.EntryConfig.UNKNOWN:
        raise InvalidRequestError(f"{owner}: entry_type is UNKNOWN; TRAINING and SERVING make tables")
    if not entry.segments:
        raise InvalidRequestError(f"{owner}: no segments; a row has at least one")
    for number, segment in enumerate(entry.segments):
        _check_segment(f"{owner}, segment {number}", segment, entry.entry_type == hash_table_pb2.EntryConfig.TRAINING)
    dim = sum(segment.dim_size for segment in entry.segments)
    if dim > MAX_DIM:
        raise InvalidRequestError(f"{owner}: dim={dim} over all segments is outside 1..{MAX_DIM}")


def _check_segment(owner: str, segment: hash_table_pb2.EntryConfig.Segment, training: bool) -> None:
    if not 1 <= segment.dim_size <= MAX_DIM:
        raise InvalidRequestError(f"{owner}: dim={segment.dim_size} is outside 1..{MAX_DIM}")
    needed = ("init_config", "opt_config") if training else ("comp_config",)
    for part in needed:
        if not segment.HasField(part):  # type: ignore[arg-type]
            raise InvalidRequestError(f"{owner}: no {part}, which a {'training' if training else 'serving'} row needs")
    if segment.HasField("init_config"):
        kind = _kind(owner, "initializer", segment.init_config)
        check_fields(f"{owner}, {kind}", getattr(segment.init_config, kind))
        drawn = segment.init_config.random_uniform
        if kind == "random_uniform" and drawn.minval > drawn.maxval:
            raise InvalidRequestError(
                f"{owner}: random_uniform has minval={drawn.minval:g} above maxval={drawn.maxval:g}"
            )
    if segment.HasField("comp_config"):
        kind = _kind(owner, "compressor", segment.comp_config)
        check_fields(f"{owner}, {kind}", getattr(segment.comp_config, kind))
    if segment.HasField("opt_config"):
        check_optimizer(owner, segment.opt_config, segment.dim_size)


def _kind(
    owner: str,
    part: str,
    config: hash_table_pb2.InitializerConfig | hash_table_pb2.OptimizerConfig | hash_table_pb2.FloatCompressorConfig,
) -> str:
    kind = config.WhichOneof("type")
    if kind is None:
        known = [field.name for field in config.DESCRIPTOR.oneofs_by_name["type"].fields]
        raise InvalidRequestError(
            f"{owner}: the {part} chooses no kind that is known here; there are {', '.join(known)}"
        )
    return kind


def _check_slots(owner: str, slots: Iterable[int]) -> None:
    seen: set[int] = set()
    for slot in slots:
        if slot > MAX_SLOT:
            raise InvalidRequestError(f"{owner}: slot={slot} is outside 0..{MAX_SLOT}")
        if slot in seen:
            raise InvalidRequestError(f"{owner}: slot={slot} is given twice")
        seen.add(slot)

"""Builds the engine's configs from the JSON of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trilith.tables import CuckooHashTable, HashTableConfig, LearningRate, PolynomialDecay
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.filters import (
    OccurrenceFilter,
    ProbabilisticFilter,
    SlidingFilter,
    Thresholds,
)
from trilith_services.ps.reference.hash_filters import CountingFilter, DummyFilter

__all__ = ["filter_of", "floats", "hash_table_config", "optimizer_of", "rate_of", "table_of"]

Json = Mapping[str, Any]
_SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def floats(values: Any) -> Any:
    """Numbers in which special floats are strings."""
    if isinstance(values, list):
        return [floats(each) for each in values]
    return _SPECIAL[values] if isinstance(values, str) else values


def _set(message: Any, choice: Json) -> None:
    """Choose `type` in a message's oneof and set its fields; without a type, nothing is chosen."""
    message.SetInParent()
    if not choice.get("type"):
        return
    if choice["type"] not in message.DESCRIPTOR.fields_by_name:
        raise ValueError(f"{message.DESCRIPTOR.name} has no type {choice['type']!r}")
    chosen = getattr(message, choice["type"])
    chosen.SetInParent()
    for name, value in choice.items():
        if name == "stochastic_rounding_float16":
            message.stochastic_rounding_float16 = value
        elif name != "type":
            setattr(chosen, name, value)


def optimizer_of(choice: Json) -> hash_table_pb2.OptimizerConfig:
    """An optimizer's message."""
    config = hash_table_pb2.OptimizerConfig()
    _set(config, choice)
    return config


def _segment(config: Json, *, serving: bool) -> hash_table_pb2.EntryConfig.Segment:
    segment = hash_table_pb2.EntryConfig.Segment(dim_size=config["dim"])
    initializer = config.get("init", config.get("initializer"))
    optimizer = config.get("opt", config.get("optimizer"))
    compressor = config.get("comp", config.get("compressor"))
    if initializer is not None or not serving:
        _set(segment.init_config, {"type": "zeros"} if initializer is None else initializer)
    if optimizer is not None or not serving:
        _set(segment.opt_config, {"type": "sgd"} if optimizer is None else optimizer)
    if compressor is not None:
        _set(segment.comp_config, compressor)
    return segment


def table_of(config: Json) -> hash_table_pb2.EmbeddingHashTableConfig:
    """A table's message; parts that a vector leaves out are zeros and SGD."""
    table = hash_table_pb2.EmbeddingHashTableConfig()
    CuckooHashTable(initial_capacity=config.get("initial_capacity", 1)).mutate_table(table)
    kind = config.get("entry_type", "TRAINING")
    table.entry_config.entry_type = hash_table_pb2.EntryConfig.EntryType.Value(kind)
    serving = kind == "SERVING"
    table.entry_config.segments.extend(_segment(each, serving=serving) for each in config.get("segments", ()))
    if config.get("skip_zero"):
        table.skip_zero_embedding = True
    expire = config.get("slot_expire")
    if expire is not None:
        table.slot_expire_time_config.SetInParent()
        if "default" in expire:
            table.slot_expire_time_config.default_expire_time = expire["default"]
        for slot, days in expire.get("slots", {}).items():
            table.slot_expire_time_config.slot_expire_times.add(slot=int(slot), expire_time=days)
    return table


def rate_of(rate: float | Json) -> LearningRate:
    """A number or a schedule."""
    if isinstance(rate, (int, float)):
        return rate
    decay = rate["polynomial_decay"]
    return PolynomialDecay(**decay) if isinstance(decay, dict) else PolynomialDecay(*decay)


def hash_table_config(config: Json) -> HashTableConfig:
    """A table's message with its rates; where a vector gives none, zeros."""
    table = table_of(config)
    rates = config.get("learning_rates", [0.0] * len(table.entry_config.segments))
    return HashTableConfig(table, [rate_of(each) for each in rates], config.get("extra_restore_names"))


def filter_of(config: Json) -> OccurrenceFilter:
    """An occurrence filter."""
    limits = hash_table_pb2.SlotOccurrenceThresholdConfig(
        default_occurrence_threshold=config.get("default_threshold", 0)
    )
    for slot, threshold in (config.get("slot_thresholds") or config.get("slots") or {}).items():
        limits.slot_occurrence_thresholds.add(slot=int(slot), occurrence_threshold=threshold)
    thresholds = Thresholds.of(limits)
    kind = config["type"]
    if kind == "sliding":
        return SlidingFilter(config["capacity"], config["split_num"], thresholds=thresholds)
    if kind == "count":
        return CountingFilter(
            config["capacity"], fill=config.get("fill_rate", 1.5), bits=config.get("bits", 16), thresholds=thresholds
        )
    if kind in {"none", "dummy"}:
        return DummyFilter()
    if kind == "probabilistic":
        return ProbabilisticFilter(thresholds, equal=config.get("equal", False))
    raise ValueError(f"no filter of type {kind!r}")

"""What stands in the golden files: small, made of exact numbers, with every optimizer and the extremes of ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from trilith.rpc import wire
from trilith.shard import DensePart, IdPart, UpdatePart, Write
from trilith.tables import (
    Adadelta,
    Adagrad,
    Adam,
    Amsgrad,
    BatchSoftmax,
    DynamicWdAdagrad,
    FixedR8,
    Ftrl,
    GroupAdagrad,
    GroupFtrl,
    Momentum,
    MovingAverage,
    OneBit,
    RandomUniform,
    Rmsprop,
    RmspropV2,
    Segment,
    Sgd,
    StochasticRoundingFloat16,
    TableSpec,
    Zeros,
    table_config,
)
from trilith_proto import ps_pb2
from trilith_services.ps.engine.filters import SlidingFilter, Thresholds
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

IDS = np.array([0, 1, 2, 7, 2**31, 2**32 + 1, 1 << 48, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)

# As they came when the files were written.
_ADAGRAD = Adagrad(learning_rate=None)
_ADAM = Adam(learning_rate=None, beta2=0.99, epsilon=0.01)
OPTIMIZERS = {
    "adadelta": Adadelta(learning_rate=None, epsilon=0.01),
    "adagrad": _ADAGRAD,
    "adam": _ADAM,
    "amsgrad": Amsgrad(learning_rate=None, beta2=0.99, epsilon=0.01),
    "batch_softmax": BatchSoftmax(),
    "dynamic_wd_adagrad": DynamicWdAdagrad(learning_rate=None),
    "ftrl": Ftrl(),
    "group_adagrad": GroupAdagrad(),
    "group_ftrl": GroupFtrl(),
    "momentum": Momentum(learning_rate=None),
    "moving_average": MovingAverage(),
    "rmsprop": Rmsprop(momentum=0.9),
    "rmspropv2": RmspropV2(),
    "sgd": Sgd(learning_rate=None),
}


def specs() -> dict[str, TableSpec]:
    """A table for every optimizer, and one with several segments."""
    found = {
        name: table_config(
            name, dim=1 if name == "batch_softmax" else 3, optimizer=each, initializer=Zeros(), learning_rate=0.5
        )
        for name, each in OPTIMIZERS.items()
    }
    parts = [
        Segment(2, Zeros(), _ADAM, FixedR8()),
        Segment(1, Zeros(), MovingAverage(), OneBit()),
        Segment(1, Zeros(), BatchSoftmax()),
        Segment(3, RandomUniform(-1, 1), StochasticRoundingFloat16(_ADAGRAD)),
    ]
    return {**found, "segments": table_config("segments", segments=parts, learning_rate=0.5)}


def rows_of(table: Table) -> Rows:
    """A row per id, of floats that are exact."""
    layout, n = table.layout, IDS.size
    row = np.arange(n, dtype=np.float32)[:, None]
    weights = row / 4 - np.arange(layout.dim, dtype=np.float32) / 8
    state = row / 2 + np.arange(layout.state_floats, dtype=np.float32) / 16
    for segment in layout.segments:
        if segment.kind == "batch_softmax":
            steps = np.arange(n, dtype=np.int64) * 2**33 - 5
            state[:, segment.state_offset : segment.state_offset + 2] = steps[:, None].view(np.float32)
    times = (np.arange(n) * 300_000_000).astype(np.uint32)
    return Rows(IDS, weights, state, times)


def sliding_filter() -> SlidingFilter:
    """A filter whose window has moved."""
    made = SlidingFilter(300, 7, thresholds=Thresholds.constant(3))
    made.add(np.arange(200, dtype=np.uint64) << np.uint64(17), np.full(200, 2, np.uint32))
    made.add(np.arange(150, 200, dtype=np.uint64) << np.uint64(17))
    return made


# ---- the checkpoint ------------------------------------------------------------------------------------------------

CHECKPOINT_STEP = 41
CHECKPOINT_SHARDS = 2
VARIABLES = {"bias": np.array([0.5, -2.0, 8.0], np.float32), "w": np.arange(6, dtype=np.float32)}


def checkpoint_configs() -> list[ps_pb2.TableConfig]:
    """Tables of the checkpoint: one with random new rows, one of segments, one with a filter."""
    return [
        table_config("user", dim=2, optimizer=_ADAM, initializer=RandomUniform(-1, 1), ttl_days=36500).proto,
        specs()["segments"].proto,
        table_config(
            "rare", dim=1, optimizer=OPTIMIZERS["sgd"], filter="sliding", filter_capacity=300, occurrence_threshold=3
        ).proto,
    ]


def variable_spec(name: str) -> ps_pb2.VariableSpec:
    """A dense variable's spec."""
    spec = ps_pb2.VariableSpec(name=name, size=VARIABLES[name].size)
    spec.optimizer.adagrad.initial_accumulator_value = 0.25
    return spec


# ---- messages ------------------------------------------------------------------------------------------------------

WRITE = Write(
    client_id=2**64 - 3,
    sequence=300,
    incarnation=77,
    global_step=2**40,
    request_time=1_700_000_000,
    allow_non_finite=True,
    dedup=True,
)
INCARNATION = 2**63 + 5


def id_parts() -> list[IdPart]:
    """Ids of two tables, one of them empty."""
    return [IdPart("user", IDS), IdPart("empty", IDS[:0])]


def update_parts(dtype: Any) -> list[UpdatePart]:
    """Values of two tables, with and without counts and rates."""
    values = (np.arange(2 * IDS.size).reshape(IDS.size, 2) / 4).astype(dtype)
    counts = np.arange(1, IDS.size + 1, dtype=np.uint32)
    rates = np.array([0.5, 0.25], np.float32)
    return [UpdatePart("user", IDS, values, counts, rates), UpdatePart("item/x:1", IDS[:1], values[:1, :1].copy())]


def dense_parts() -> list[DensePart]:
    """Two partitions."""
    return [DensePart("bias", 0, VARIABLES["bias"]), DensePart("w", 3, VARIABLES["w"])]


def lookup_response(*, float16: bool) -> bytes:
    """Rows for `id_parts`."""
    data, outs = wire.new_lookup_response(INCARNATION, id_parts(), [2, 5], float16=float16)
    outs[0][:] = update_parts(np.float16 if float16 else np.float32)[0].values
    return data


def messages() -> dict[str, bytes]:
    """Every message that is written and read without the library."""
    specs_of = [variable_spec(name) for name in VARIABLES]
    return {
        "lookup_request": wire.pack_lookup_request(id_parts()),
        "lookup_request_half": wire.pack_lookup_request(id_parts(), float16=True),
        "lookup_response": lookup_response(float16=False),
        "lookup_response_half": lookup_response(float16=True),
        "update_request": wire.pack_update_request(update_parts(np.float32), WRITE),
        "update_request_half": wire.pack_update_request(update_parts(np.float16), WRITE),
        "ids_request": wire.pack_ids(id_parts()[0], WRITE),
        "statuses_response": wire.pack_statuses(INCARNATION, np.array([-1, 0, 1], np.int8)),
        "create_variables": wire.pack_create_variables(specs_of, list(VARIABLES.values()), Write(incarnation=77)),
        "dense_update": wire.pack_dense_update(dense_parts(), WRITE, learning_rate=0.125),
        "pulled_variables": wire.pack_pulled(INCARNATION, [("bias", 0), ("w", 3)], list(VARIABLES.values()), 2**40),
    }

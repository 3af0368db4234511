"""What the JSON API answers; the OpenAPI description comes out of these classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from trilith_services.http.failures import Failure

__all__ = [
    "Config",
    "Counted",
    "Distribution",
    "EntryServer",
    "Histogram",
    "Latency",
    "Look",
    "Number",
    "Optimizer",
    "Overview",
    "Point",
    "Replica",
    "ReplicaRow",
    "Row",
    "Shard",
    "TableConfig",
    "TableState",
    "Totals",
    "Variable",
    "VariableState",
    "Weights",
    "number",
    "numbers",
]

Number = float | Literal["NaN", "Infinity", "-Infinity"]
"""A float32 in its shortest form. JSON has no words for what is not finite, so those are strings."""


_LARGEST = float(np.finfo(np.float32).max)


def number(value: float) -> Number:
    """A float32 as JSON can carry it."""
    if math.isfinite(value):
        return float(str(np.float32(value))) if abs(value) <= _LARGEST else value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def numbers(values: Iterable[float]) -> list[Number]:
    """Float32s as JSON can carry them, each the shortest text that gives it back."""
    floats = np.asarray(values, np.float32)
    return [float(str(value)) if np.isfinite(value) else number(float(value)) for value in floats]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Latency(_Answer):
    """One method's calls since the look before; times without queueing."""

    method: str
    calls_per_s: float
    failures_per_s: float
    mean_ms: float | None
    p50_ms: float | None
    p99_ms: float | None


class Replica(_Answer):
    """One serving replica of a shard."""

    shard: int
    name: str
    address: str
    state: str = Field(
        description='What the directory says of it; empty if it is not listed there; "missing" where a shard has none.'
    )
    alive: bool
    error: str = ""
    rows: int = 0
    memory_bytes: int = 0
    lookups_per_s: float = 0.0
    lag_s: float | None = Field(default=None, description="Age of the oldest change that it lacks, by its training PS.")
    lag_rows: int | None = Field(default=None, description="Rows that it lacks.")
    copying: bool = Field(default=False, description="Whether a full copy is under way.")
    synced_per_s: float = Field(default=0.0, description="Rows it acknowledges a second.")
    failures: int = Field(default=0, description="Pushes that failed and were sent again.")
    as_of_unix_s: float | None = Field(
        default=None, description="It holds what training had acknowledged at this time."
    )


class EntryServer(_Answer):
    """One serving process that scores requests."""

    name: str
    address: str
    state: str = Field(description='What the directory says of it; "degraded" if it has a model and cannot answer.')
    alive: bool
    error: str = ""
    uptime_s: float = 0.0
    model: str = Field(default="", description="Empty while it has none.")
    mode: str = Field(default="", description="distributed: rows come from replicas; standalone: from its export.")
    model_version: int = 0
    model_step: int = Field(default=0, description="Training step of the dense weights.")
    checkpoint_unix_s: float | None = Field(default=None, description="When the model's checkpoint was written.")
    loaded_unix_s: float | None = Field(default=None, description="When this version took over.")
    rows_as_of_unix_s: float | None = Field(
        default=None, description="Its rows hold what training had acknowledged at this time."
    )
    load_error: str = Field(default="", description="Why the newest version is not the one that is served.")
    versions: list[int] = Field(default=[], description="All that are loaded, newest first.")
    pinned: int = Field(default=0, description="The version that its directory is pinned to; 0: none.")
    requests_per_s: float = 0.0
    failures_per_s: float = 0.0
    records_per_s: float = 0.0
    p50_ms: float | None = Field(default=None, description="Of requests since the look before, without queueing.")
    p99_ms: float | None = None
    replicas: int = Field(default=0, description="Serving replicas that it looks rows up at.")
    healthy_replicas: int = 0
    problem: str = Field(default="", description="Why it cannot answer requests; empty if it can.")


class Shard(_Answer):
    """One PS."""

    index: int
    address: str = Field(description="Empty while the directory does not know it.")
    alive: bool
    error: str = ""
    version: str = ""
    incarnation: str = ""
    uptime_s: float = 0.0
    durability: str = ""
    restored_from: str = ""
    global_step: int = 0
    rows: int = 0
    memory_bytes: int = 0
    memory_limit_bytes: int = Field(default=0, description="0: none.")
    resident_bytes: int = 0
    queued: int = Field(default=0, description="Calls that wait for a thread.")
    calls_per_s: float = 0.0
    lookups_per_s: float = Field(default=0.0, description="Ids looked up a second.")
    updates_per_s: float = Field(default=0.0, description="Ids written a second.")
    last_checkpoint: str = ""
    last_checkpoint_unix_s: float | None = None
    latencies: list[Latency] = []


class TableState(_Answer):
    """One table, all shards that answer together."""

    name: str
    rows: int
    bytes: int
    hit_ratio: float | None = Field(description="Looked-up ids that had a row, of all since the PS started.")
    lookups_per_s: float
    updates_per_s: float
    filtered_ids: int = Field(description="Ids that the occurrence filter kept out.")
    evicted_rows: int
    newest_update_unix_s: int | None
    rows_by_shard: list[int | None] = Field(description="null where a shard does not answer.")


class Totals(_Answer):
    """The whole cluster."""

    shards: int = 0
    alive: int = 0
    global_step: int = 0
    rows: int = 0
    memory_bytes: int = 0
    lookups_per_s: float = 0.0
    updates_per_s: float = 0.0
    lookup_p99_ms: float | None = Field(default=None, description="The slowest shard's.")
    lag_s: float | None = Field(default=None, description="The replica furthest behind.")


class Point(Totals):
    """The whole cluster at some moment."""

    unix_s: float


class Look(_Answer):
    """The cluster as it was found."""

    unix_s: float
    problem: Failure | None = Field(default=None, description="Why the cluster itself could not be found.")
    totals: Totals = Totals()
    shards: list[Shard] = []
    replicas: list[Replica] = []
    entries: list[EntryServer] = []
    tables: list[TableState] = []


class Overview(_Answer):
    """The console, and what it last saw."""

    cluster: str = Field(description="Address, without credentials.")
    writable: bool = Field(description="Whether this console was started with --allow-writes.")
    interval_s: float
    look: Look
    history: list[Point] = Field(description="Earlier looks, oldest first.")


class Config(_Answer):
    """One segment of a table's rows."""

    dim: int
    optimizer: str
    initializer: str
    compressor: str


class TableConfig(_Answer):
    """How a table is made."""

    name: str
    dim: int
    segments: list[Config]
    features: list[str] = Field(description="Features that the cluster's record has of this table.")
    config: dict[str, Any] = Field(description="TableConfig of ps.proto, as protobuf writes JSON.")


class Optimizer(_Answer):
    """Optimizer state of one segment."""

    optimizer: str
    slots: dict[str, Number | list[Number]]


class ReplicaRow(_Answer):
    """What a serving replica has for an id."""

    name: str
    address: str
    found: bool
    weights: list[Number] = []
    largest_difference: float | None = Field(default=None, description="To the training row, over all weights.")
    error: str = ""


class Row(_Answer):
    """One id."""

    table: str
    id: str = Field(description="Unsigned decimal; a string, because JSON readers round large numbers.")
    signed_id: str
    owner: int
    address: str
    found: bool
    weights: list[Number] = []
    norm: Number | None = None
    optimizers: list[Optimizer] = []
    last_update_unix_s: int | None = None
    age_s: float | None = None
    replicas: list[ReplicaRow] = []


class Histogram(_Answer):
    """How values are spread."""

    edges: list[float] = Field(description="One more than counts; empty if there is nothing.")
    counts: list[int]
    least: float | None
    median: float | None
    greatest: float | None


class Distribution(_Answer):
    """A sample of a table's rows."""

    table: str
    rows: int = Field(description="In the table, on the shards asked.")
    sampled: int
    norms: Histogram = Field(description="Euclidean norm of the weights; equal bins.")
    ages: Histogram = Field(description="Seconds since the last update; bins grow geometrically.")
    not_finite: int = Field(description="Sampled rows with NaN or infinity in them.")
    without_time: int = Field(description="Sampled rows that carry no time.")
    silent_shards: list[int] = Field(description="Shards that did not answer.")


class Variable(_Answer):
    """A dense variable."""

    name: str
    floats: int
    partitions: int
    owners: list[int]
    optimizer: str


class VariableState(Variable):
    """A dense variable's values."""

    values: list[Number] = Field(description="The first of them.")
    norm: Number
    mean: Number | None
    least: Number | None
    greatest: Number | None


class Weights(BaseModel):
    """Weights to set."""

    model_config = ConfigDict(extra="forbid")

    weights: list[Annotated[float, Field(allow_inf_nan=False, ge=-3.4028234e38, le=3.4028234e38)]] = Field(
        min_length=1, max_length=65536
    )


class Counted(_Answer):
    """How many rows a write concerned."""

    rows: int

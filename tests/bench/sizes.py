"""Sizes: how much each benchmark does, in full and as a smoke test."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Every number that a benchmark depends on; each is an option of the command line.

    Attributes:
        data_records: Records of about a kilobyte in the file that is read.
        data_rounds: Timed rounds per side of that figure.
        columnar_rows: Rows of the Parquet and CSV files that are read.
        columnar_rounds: Timed rounds per side of those figures.
        pipeline_records: Records of 2 to 4 KB of a pipeline that is timed.
        pipeline_rounds: Timed rounds per side of that figure.
        pipeline_megabytes: Size of the file that streams through while memory is watched.
        rows: Rows of the engine's tables and of the array that `take` reads.
        batch: Ids per call.
        batches: Timed batches per side of an engine figure.
        thread_rounds: Rounds of the thread benchmarks.
        thread_batches: Batches per thread and round there.
        grow_runs: Tables grown from capacity 1; the best run counts.
        stall_rows: Rows of the table that is exported and swept while it is looked up.
        stall_rounds: Times that both sides of that figure are measured for each kind of work.
        stall_lookups: Timed lookups of a side and round there.
        rpc_rows: Rows of the table behind gRPC.
        rpc_calls: Timed calls per side of an RPC figure.
        flights: Rounds of the benchmark with four calls in flight.
        flight_calls: Calls per thread and round there.
        small_ids: Ids of a small lookup.
        small_calls: Timed small calls per side.
        zipf_exponent: Of the skewed batches.
        op_ids: Ids of the worker's map and reorder.
        op_features: Vectors of its gather.
        op_batch: Rows of its layouts.
        op_vocabulary: Distinct ids of a layout's feature.
        op_rounds: Timed rounds per side of its figures.
        demo_samples: Samples of the demo.
        demo_rounds: Times that it runs.
        discovery_kills: Times that a PS is killed.
        step_batch: Samples of a step through tables.
        many_tables: Tables that one PS is given.
        serving_samples: Samples whose ids have rows.
        serving_batch: Records of a request.
        serving_calls: Timed requests per side.
        sync_rows: Rows of the table that is synced.
        sync_seconds: Seconds of training during which lag is measured.
        sync_rounds: Timed rounds in which every row is synced once.
        train_rows: Distinct ids of the click model.
        train_features: Features of a sample, one id each.
        train_batch: Samples per step.
        train_dim: Length of a latent vector.
        train_batches: Batches of made-up data, gone through again and again.
        train_seconds: Steady seconds measured, each side.
        train_warm_seconds: Seconds before that.
        parse_records: Records that the parsers read.
        parse_rounds: Times they do.
    """

    data_records: int = 262_144
    data_rounds: int = 30
    columnar_rows: int = 262_144
    columnar_rounds: int = 7
    pipeline_records: int = 32_768
    pipeline_rounds: int = 15
    pipeline_megabytes: int = 2048
    rows: int = 10_000_000
    batch: int = 65_536
    batches: int = 60
    thread_rounds: int = 50
    thread_batches: int = 8
    grow_runs: int = 3
    stall_rows: int = 1_500_000
    stall_rounds: int = 5
    stall_lookups: int = 2000
    rpc_rows: int = 1_000_000
    rpc_calls: int = 150
    flights: int = 50
    flight_calls: int = 4
    small_ids: int = 256
    small_calls: int = 2000
    zipf_exponent: float = 1.05
    op_ids: int = 1_000_000
    op_features: int = 100_000
    op_batch: int = 4096
    op_vocabulary: int = 100_000
    op_rounds: int = 15
    demo_samples: int = 200_000
    demo_rounds: int = 3
    discovery_kills: int = 3
    step_batch: int = 4096
    many_tables: int = 1000
    serving_samples: int = 100_000
    serving_batch: int = 256
    serving_calls: int = 500
    sync_rows: int = 1_000_000
    sync_seconds: float = 20.0
    sync_rounds: int = 7
    train_rows: int = 1_000_000
    train_features: int = 26
    train_batch: int = 512
    train_dim: int = 16
    train_batches: int = 400
    train_seconds: float = 24.0
    train_warm_seconds: float = 6.0
    parse_records: int = 4096
    parse_rounds: int = 15


FULL = Sizes()

QUICK = Sizes(
    data_records=4096,
    data_rounds=3,
    columnar_rows=4096,
    columnar_rounds=2,
    pipeline_records=2048,
    pipeline_rounds=3,
    pipeline_megabytes=32,
    rows=200_000,
    batch=8192,
    batches=6,
    thread_rounds=4,
    thread_batches=2,
    grow_runs=1,
    stall_rows=50_000,
    stall_rounds=1,
    stall_lookups=100,
    rpc_rows=50_000,
    rpc_calls=8,
    flights=4,
    flight_calls=2,
    small_calls=60,
    op_ids=20_000,
    op_features=2000,
    op_batch=256,
    op_vocabulary=2000,
    op_rounds=3,
    demo_samples=4000,
    demo_rounds=1,
    discovery_kills=1,
    step_batch=256,
    many_tables=20,
    serving_samples=5000,
    serving_calls=20,
    sync_rows=40_000,
    sync_seconds=2.0,
    sync_rounds=1,
    train_rows=20_000,
    train_batches=40,
    train_seconds=2.0,
    train_warm_seconds=1.0,
    parse_records=128,
    parse_rounds=3,
)

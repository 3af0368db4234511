"""Fuzz every reader of saved files: checkpoints, occurrence filters, rows and queues, damaged and forged.

    python -m tests.fuzz.files [--seconds 60] [--seed 0] [--case N]

Each case takes what was saved, flips bits, cuts, repeats or forges numbers, mostly with checksums that are right
again, and reads it. Readers may take it or raise an error of this tree; anything else is a finding: another exception,
a crash of the process, a case of more than ten seconds, or memory that grows by half a gigabyte. What was taken is then
used, so that kernels follow its numbers. Cases run in child processes; a finding's number repeats it with --case.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from trilith import checkpoint
from trilith.checkpoint import signed
from trilith.data.formats.tfrecord import RecordWriter
from trilith.errors import TrilithError
from trilith.folder import Folder
from trilith.shard import DensePart, IdPart, UpdatePart, Write
from trilith.tables import Adagrad, Adam, table_config
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.commands import checkpoint as checkpoint_command
from trilith_services.ps.checkpoint import parquet, serving_rows, snapshot
from trilith_services.ps.engine.filters import SlidingFilter
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.reference import entry_files
from trilith_services.ps.reference.filter_shards import read_filter_meta, restore_filter, save_filter

__all__ = ["main", "run_case", "save_corpus"]

IDS = np.array([0, 1, 2, 3, 5, 2**63, 2**64 - 1, *range(100, 160)], np.uint64)
CONFIGS = [
    table_config("user", dim=3, optimizer=Adam(learning_rate=0.1)).proto,
    table_config(
        "rare", dim=2, optimizer=Adagrad(), filter="sliding", filter_capacity=2000, occurrence_threshold=2
    ).proto,
]
NUMBERS = [
    10**6,
    10**9,
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
]
CASE_S = 10
GROWTH_BYTES = 512 << 20
CHILD_CASES = 400


# ---- what is saved -------------------------------------------------------------------------------------------------


def save_corpus(where: Path) -> None:
    """Write one of everything that can be read."""
    parts = []
    for index in range(2):
        store = LocalShard(index=index, count=2, threads=1)
        store.create_tables(CONFIGS)
        mine = IDS[IDS % np.uint64(2) == index]
        for config, dim in zip(CONFIGS, (3, 2), strict=True):
            for _ in range(3):
                store.apply_gradients([UpdatePart(config.name, mine, np.ones((mine.size, dim), np.float32))], Write())
        spec = ps_pb2.VariableSpec(name=f"bias{index}", size=4)
        spec.optimizer.adam.learning_rate = 0.1
        store.create_variables([spec], [np.arange(4, dtype=np.float32)])
        store.apply_dense_gradients([DensePart(spec.name, 0, np.ones(4, np.float32))], Write())
        if index == 0:
            store.create_queue("files", ["a", "b", "c"])
            store.dequeue(["files"], "worker", Write(), lease_s=60.0)
        answer = store.save(str(where / "checkpoint"))
        parts.append(checkpoint.part_of(index, 2, answer, life=store.life))
        if index == 0:
            entry_files.save_table(store.table("user"), str(where / "table"), parallel=2)
            entry_files.save_tables(store.tables, str(where / "tables"), parallel=1)
            occurrences = store.table("rare").filter
            assert isinstance(occurrences, SlidingFilter)
            save_filter(occurrences, str(where / "filter"))
        store.close()
    checkpoint.write_manifest(str(where / "checkpoint"), parts)


# ---- mutations -----------------------------------------------------------------------------------------------------


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """The same with a few bits, bytes or pieces that are others."""
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        if not data:
            break
        at = draw.randrange(len(data))
        if draw.random() < 0.3:  # headers and footers are where numbers stand
            at = (
                min(draw.randrange(256), len(data) - 1)
                if draw.random() < 0.3
                else max(len(data) - draw.randrange(1, 2048), 0)
            )
        how = draw.randrange(7)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at] = draw.randrange(256)
        elif how == 2:
            number = struct.pack("<Q", draw.choice(NUMBERS) % 2**64)[: draw.choice([1, 2, 4, 8])]
            data[at : at + len(number)] = number
        elif how == 3:
            del data[at:]
        elif how == 4:
            del data[at : at + draw.randrange(1, 64)]
        elif how == 5:
            data[at:at] = data[at : at + draw.randrange(1, 64)]
        else:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 16)))
    return bytes(data)


def forged(value: Any, draw: random.Random) -> Any:
    """A tree of JSON with one thing in it that is another."""
    odd = [
        *(*NUMBERS, 0.5, -0.5, 1e308, float("nan"), float("inf"), None, True, "", "x", "\ud800", "../../etc/passwd"),
        *([], {}, [[]], [1, 2], {"a": 1}, "9" * 5000),
    ]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {other: kept for other, kept in value.items() if other != key}
        return {**value, key: forged(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        changed = [*value[:at], forged(value[at], draw), *value[at + 1 :]]
        return draw.choice([changed, changed, changed, value + value, value[:at]])
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 2, -2, 100])
    return draw.choice(odd)


def forged_arrow(raw: bytes, draw: random.Random) -> bytes:
    """An Arrow file whose metadata or columns say something else, or that is compressed."""
    with pa.ipc.open_file(raw) as reader:
        schema, batches = reader.schema, [reader.get_batch(k) for k in range(reader.num_record_batches)]
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    how = draw.choice([0, 0, 0, 1, 1, 2, 3, 4])
    if how == 0 and metadata:
        key = draw.choice([*sorted(metadata), *(key for key in metadata if key == "trilith.state")])
        text = metadata[key]
        if text[:1] in "[{":
            metadata[key] = json.dumps(forged(json.loads(text), draw))
        elif text.isdecimal():
            metadata[key] = str(draw.choice(NUMBERS))
        else:
            metadata[key] = damaged(text.encode(), draw).decode(errors="replace")
    elif how == 1 and batches:
        at = draw.randrange(len(batches))
        column = draw.randrange(len(schema.names))
        arrays = list(batches[at].columns)
        if pa.types.is_integer(arrays[column].type):
            values = arrays[column].to_numpy().copy()
            if values.size:
                values[draw.randrange(values.size)] = np.array(draw.choice(NUMBERS) % 2**64, np.uint64).astype(
                    values.dtype
                )
            arrays[column] = pa.array(values)
            if draw.random() < 0.3:
                arrays[column] = pa.array([None, *values[1:].tolist()], arrays[column].type)
        batches[at] = pa.record_batch(arrays, schema=schema)
    elif how == 2:
        batches = batches * draw.choice([0, 2, 3])
    elif how == 3 and schema.names:
        order = draw.sample(range(len(schema.names)), len(schema.names))
        batches = [batch.select(order) for batch in batches]
        schema = pa.schema([schema.field(k) for k in order])
    schema = schema.with_metadata(metadata)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if how == 4 else None)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(metadata))
    return sink.getvalue()


def forged_message(payload: bytes, draw: random.Random) -> bytes:
    """A serialized message with numbers that are others."""
    for kind in (
        hash_table_pb2.EntryDump,
        hash_table_pb2.HashFilterSplitMetaDump,
        hash_table_pb2.MultiHashTableMetadata,
    ):
        if draw.random() < 0.4:
            continue
        try:
            message: Any = kind.FromString(payload)
            place, field = message, None
            while place.ListFields():
                field, value = draw.choice(place.ListFields())
                if field.message_type is None:
                    break
                place = value if not hasattr(value, "add") else draw.choice(list(value))
            if field is not None and field.message_type is None:
                number = draw.choice(NUMBERS)
                chosen = getattr(place, field.name)
                if isinstance(chosen, int | float | bool):
                    setattr(place, field.name, number)
                elif hasattr(chosen, "append"):
                    chosen.append(number)
            return bytes(message.SerializeToString())
        except Exception:  # noqa: BLE001 (another kind, or a number that its field cannot hold)
            continue
    return damaged(payload, draw)


def forged_records(raw: bytes, draw: random.Random, *, snappy: bool) -> bytes:
    """A file of records, one of which is another, with the right checksums."""
    from trilith.data.formats.tfrecord import read_records

    records = [p for batch in read_records(io.BytesIO(raw), name="corpus", snappy=snappy) for p in batch.payloads()]
    at = draw.randrange(len(records))
    how = draw.randrange(4)
    if how == 0:
        del records[at]
    elif how == 1:
        records.insert(at, records[draw.randrange(len(records))])
    else:
        records[at] = draw.choice([forged_message, damaged])(records[at], draw)
    sink = io.BytesIO()
    writer = RecordWriter(sink, snappy=snappy)
    writer.write_all(records)
    writer.close()
    return sink.getvalue()


# ---- reading -------------------------------------------------------------------------------------------------------


def change_checkpoint(where: Path, draw: random.Random) -> None:
    """Change one file of a checkpoint; mostly so that sizes and checksums are right."""
    names = sorted(name.name for name in where.iterdir())
    kind_of_file = draw.choice(sorted({name.split("-")[0].split(".")[0] for name in names}))
    name = draw.choice([name for name in names if name.startswith(kind_of_file)])
    file = where / name
    raw = file.read_bytes()
    if draw.random() < 0.15:
        file.write_bytes(damaged(raw, draw))
        return
    if name.startswith(("manifest", "part")):
        body = json.loads(raw)
        kind = body.pop("format")
        del body["crc32c"], body["version"]
        changed = forged(body, draw)
        packed = signed.pack(kind, changed) if isinstance(changed, dict) else json.dumps(changed).encode()
        file.write_bytes(packed)
        return
    if name.endswith(".json"):
        changed = json.dumps(forged(json.loads(raw), draw)).encode() if draw.random() < 0.8 else damaged(raw, draw)
    else:
        changed = draw.choice([forged_arrow, damaged])(raw, draw)
    file.write_bytes(changed)
    manifest = where / checkpoint.MANIFEST
    body = json.loads(manifest.read_bytes())
    for part in body["parts"]:
        for each in part["files"]:
            if each["name"] == name:
                each |= {"bytes": len(changed), "crc32c": int(google_crc32c.value(changed))}
    kind = body.pop("format")
    del body["crc32c"], body["version"]
    manifest.write_bytes(signed.pack(kind, body))


def use(store: LocalShard) -> None:
    """Do what follows the numbers that a store has taken over."""
    for name, table in sorted(store.tables.items()):
        mine = IDS[IDS % np.uint64(store.count) == store.index]
        for _ in range(3):
            store.apply_gradients([UpdatePart(name, mine, np.ones((mine.size, table.dim), np.float32))], Write())
        store.lookup([IdPart(name, mine)])
        store.lookup_entries(IdPart(name, mine))
        store.evict([name], Write())
    store.describe().SerializeToString()
    store.stats().SerializeToString()
    if store.index == 0:
        for state in store.queues.export():
            store.dequeue([state.name], "other", Write(), lease_s=1.0)


def read_checkpoint(where: Path, draw: random.Random) -> None:
    """Restore and verify it."""
    count = draw.choice([1, 2, 2, 2, 3])
    store = LocalShard(index=draw.randrange(count), count=count, threads=1)
    try:
        store.restore(str(where))
        use(store)
    except TrilithError:
        pass
    finally:
        store.close()
    for _ in snapshot.verify(str(where)):
        pass
    manifest = checkpoint.read_manifest(str(where))
    readers: list[Callable[[], object]] = [
        lambda: list(parquet.export(str(where), manifest, str(where / "out"), sorted(manifest.rows()))),
        lambda: serving_rows.dense_values(str(where)),
        lambda: serving_rows.write_serving_rows(
            str(where), str(where / "rows"), serving_rows.serving_tables(str(where))
        ),
        lambda: inspect_checkpoint(Folder(str(where)), manifest),
    ]
    for read in readers:
        try:
            read()
        except TrilithError:
            pass


def inspect_checkpoint(folder: Folder, manifest: checkpoint.Manifest) -> None:
    """What `trilith checkpoint inspect` reads."""
    checkpoint_command._tables(folder, manifest)
    checkpoint_command._variables(folder, manifest)


def read_entries(where: Path, draw: random.Random) -> None:
    """Read files of rows, of one table and of several, and of a filter."""
    store = LocalShard(threads=1)
    try:
        store.create_tables(CONFIGS)
        occurrences = store.table("rare").filter
        assert isinstance(occurrences, SlidingFilter)
        readers: list[Callable[[], object]] = [
            lambda: entry_files.restore_table(store.table("user"), str(where / "table")),
            lambda: entry_files.restore_tables(store.tables, str(where / "tables")),
            lambda: entry_files.feature_stat(str(where / "tables")),
            lambda: restore_filter(occurrences, str(where / "filter")),
            lambda: read_filter_meta(str(sorted(where.glob("filter-*"))[0])),
        ]
        for read in readers:
            try:
                read()
            except TrilithError:
                pass
        use(store)
    finally:
        store.close()


def run_case(corpus: Path, number: int) -> None:
    """Change and read; what is no error of this tree is raised."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory(prefix="trilith-fuzz-") as made:
        where = Path(made)
        shutil.copytree(corpus, where, dirs_exist_ok=True)
        if draw.random() < 0.6:
            change_checkpoint(where / "checkpoint", draw)
            try:
                read_checkpoint(where / "checkpoint", draw)
            except TrilithError:
                pass
            return
        file = draw.choice(sorted(file for file in where.iterdir() if file.is_file()))
        raw = file.read_bytes()
        if draw.random() < 0.3:
            file.write_bytes(damaged(raw, draw))
        else:
            snappy = file.name.startswith("tables-")
            file.write_bytes(forged_records(raw, draw, snappy=snappy))
        read_entries(where, draw)


# ---- the process around it -----------------------------------------------------------------------------------------


def _child(corpus: Path, first: int, count: int, until: float) -> int:
    logging.disable(logging.CRITICAL)
    for number in range(first, first + count):
        if time.time() > until:
            break
        print(number, flush=True)
        signal.alarm(CASE_S)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            run_case(corpus, number)
        except BaseException:  # noqa: BLE001 (that is what is looked for)
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            return 1
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if number > first and grown > GROWTH_BYTES:
            print(f"memory grew by {grown >> 20} MiB", file=sys.stderr, flush=True)
            return 1
        signal.alarm(0)
    return 0


def main() -> int:
    """Fuzz for a while; returns 1 if something was found."""
    options = argparse.ArgumentParser(description="Fuzz the readers of saved files.")
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0, help="number of the first case")
    options.add_argument("--case", type=int, help="only this case, in this process")
    options.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.corpus is not None:
        return _child(given.corpus, given.seed, CHILD_CASES, given.until)
    with tempfile.TemporaryDirectory(prefix="trilith-fuzz-corpus-") as made:
        corpus = Path(made)
        save_corpus(corpus)
        if given.case is not None:
            run_case(corpus, given.case)
            return 0
        until, number, cases, findings = time.time() + given.seconds, given.seed, 0, 0
        while time.time() < until:
            argv = ["-m", "tests.fuzz.files", "--corpus", made, "--seed", str(number), "--until", str(until)]
            child = subprocess.run(
                [sys.executable, "-X", "faulthandler", *argv],
                capture_output=True,
                text=True,
                check=False,
            )
            done = child.stdout.split()
            cases += len(done)
            if child.returncode:
                findings += 1
                print(
                    f"case {done[-1] if done else number}: status {child.returncode}\n{child.stderr[-3000:]}",
                    flush=True,
                )
            number = int(done[-1]) + 1 if done else number + 1
        print(f"{cases} cases from {given.seed} on, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

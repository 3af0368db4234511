"""Vectors of datasets: which files are read by whom, queues, and the names of the reference system.

Where vectors came without the files they name, the check writes files of that form and reads those.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import mismatch
from trilith.data import reference
from trilith.data.convert import message_of
from trilith.data.dataset import Dataset
from trilith.data.files import expand_glob, gen_patterns, match_input_patterns
from trilith.data.framing import Framing
from trilith.data.operators import cache_one, merged_window
from trilith.data.queue import LocalFiles, StrQueue
from trilith.data.records import Kind, Records
from trilith.data.writers import open_writer
from trilith.errors import TrilithError
from trilith_proto.proto_parser_pb2 import Instance

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]


def differ(what: str, got: Any, wanted: Any) -> list[str]:
    wrong = mismatch(got, {"value": wanted, "exact": True})
    return [f"{what}: {wrong}"] if wrong else []


def item_ids(dataset: Dataset) -> list[int]:
    return [message_of(payload, Kind.INSTANCE).line_id.item_id for payload in dataset]  # type: ignore[union-attr]


def write_instances(path: Path, ids: Iterable[int], *, snappy: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    payloads = []
    for item_id in ids:
        instance = Instance()
        instance.line_id.item_id = item_id
        payloads.append(instance.SerializeToString())
    compression = "SNAPPY" if snappy else None
    with open_writer(str(path), framing=Framing(has_sort_id=True), compression=compression) as out:
        out.write(Records.of(payloads, Kind.INSTANCE))


@contextmanager
def completed(folder: Path, part: str, wanted: Mapping[str, Callable[[Path], None]]) -> Iterator[Path]:
    """`folder`, or a copy of its folder `part` in which the missing ones of `wanted` are written."""
    if all((folder / name).exists() for name in wanted):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        if (folder / part).is_dir():
            shutil.copytree(folder / part, Path(scratch) / part)
        for name, write in wanted.items():
            path = Path(scratch) / name
            if not path.exists():
                write(path)
        yield Path(scratch)


def parts_of(name: str, ids: list[list[int]], *, snappy: bool = False) -> dict[str, Callable[[Path], None]]:
    """Writers of files, by their names, that hold these ids."""
    return {
        name.replace("*", str(number)): lambda path, held=held: write_instances(path, held, snappy=snappy)  # type: ignore[misc]
        for number, held in enumerate(ids)
    }


def dealt(shares: Mapping[str, list[int]], size: int) -> list[list[int]]:
    """The files of which every n-th is a share, `size` ids in each."""
    files = [[ids[at : at + size] for at in range(0, len(ids), size)] for _, ids in sorted(shares.items())]
    return [each for row in itertools.zip_longest(*files) for each in row if each is not None]


def at(folder: Path, names: Iterable[str]) -> list[str]:
    return [str(folder / name) for name in names]


# ---- files -----------------------------------------------------------------------------------------------------------


def check_file_sharding(content: dict[str, Any], folder: Path) -> Found:
    found: dict[str, list[str]] = {key: [] for key in content}
    shares = content["item_ids_per_shard"]
    with completed(folder, "data/parts", parts_of(content["pattern"], dealt(shares, 3))) as root:
        for index, wanted in shares.items():
            dataset = reference.DistributedFilePBDataset(
                str(root / content["pattern"]),
                has_sort_id=content["has_sort_id"],
                shard_num=content["shard_num"],
                shard_index=int(index),
            )
            found["item_ids_per_shard"] += differ(f"shard {index}", sorted(item_ids(dataset)), sorted(wanted))
    yield from found.items()


def check_create_instance_dataset(content: dict[str, Any], folder: Path) -> Found:
    found: dict[str, list[str]] = {key: [] for key in content}
    shares = content["item_ids_per_shard"]
    snappy = parts_of(content["files_list"][0], dealt(shares, 2), snappy=True)
    with completed(folder, "data/parts_snappy", snappy) as root:
        for index, wanted in shares.items():
            dataset = reference.create_instance_dataset(
                at(root, content["files_list"]),
                enable_sharding=content["enable_sharding"],
                shard_num=content["shard_num"],
                shard_index=int(index),
                has_sort_id=content["has_sort_id"],
            )
            found["item_ids_per_shard"] += differ(f"shard {index}", sorted(item_ids(dataset)), sorted(wanted))
    for arguments in content["errors"]:
        try:
            reference.create_instance_dataset(**arguments)
            found["errors"].append(f"{arguments}: nothing was raised")
        except TrilithError:
            pass
    listed = content["explicit_list"]
    dataset = reference.create_instance_dataset(at(folder, listed["files_list"]))
    found["explicit_list"] += differ("ids", sorted(item_ids(dataset)), sorted(listed["item_ids_as_set"]))
    globbed = content["glob"]
    size = len(listed["item_ids_as_set"]) // len(listed["files_list"])
    ids = [[10 * part + row for row in range(size)] for part in range(globbed["n"] // size)]
    with completed(folder, "data/parts", parts_of(globbed["files_list"][0], ids)) as root:
        dataset = reference.create_instance_dataset(
            at(root, globbed["files_list"]), expand_glob_path=globbed["expand_glob_path"]
        )
        found["glob"] += differ("n", len(item_ids(dataset)), globbed["n"])
    yield from found.items()


def check_dynamic_sharding(content: dict[str, Any], folder: Path) -> Found:
    def names_of(dealer: LocalFiles) -> Iterator[str]:
        while (name := dealer.take()) is not None:
            yield Path(name).name

    def all_of(patterns: list[str]) -> list[str]:
        return list(names_of(LocalFiles(at(folder, patterns))))

    found: dict[str, list[str]] = {key: [] for key in content}
    found["basenames"] += differ("names", all_of(content["patterns"]), content["basenames"])
    missed = content["unmatched"]
    found["unmatched"] += differ("names", all_of(missed["patterns"]), missed["basenames"])
    found["empty_patterns"] += differ("names", all_of([]), content["empty_patterns"])
    shared = LocalFiles(at(folder, content["patterns"]))
    taken: list[list[str]] = [[], []]
    for worker, name in zip(itertools.cycle((0, 1, 1)), names_of(shared), strict=False):
        taken[worker].append(name)
    found["two_workers"] += differ("union", sorted(taken[0] + taken[1]), sorted(content["basenames"]))
    yield from found.items()


def check_input_patterns(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        ids = case["item_ids"]
        wanted: dict[str, Callable[[Path], None]] = {
            pattern.replace("*", "part-0"): lambda path, held=held: write_instances(path, [held])  # type: ignore[misc]
            for pattern, held in zip(case["expanded"], ids, strict=False)
        }
        present = all(expand_glob(str(folder / pattern)) for pattern in case["expanded"])
        with completed(folder, "data/dates", {} if present else wanted) as root:
            patterns = match_input_patterns(str(root / case["flag"]))
            relative = [pattern.removeprefix(f"{root}/") for pattern in patterns]
            flags = reference.DatasetFlags(dataset_input_patterns=str(root / case["flag"]))
            got = item_ids(reference.PBDataset(flags=flags))
        yield str(number), differ("patterns", relative, case["expanded"]) + differ("ids", sorted(got), sorted(ids))


def check_gen_patterns(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield str(number), differ("patterns", gen_patterns(**case["args"]), case["patterns"])


# ---- queues and operators --------------------------------------------------------------------------------------------


def check_str_queue(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield str(number), script_failures(case["script"])


def script_failures(script: list[Any]) -> list[str]:
    queue = StrQueue()
    found = []
    for place, (step, argument) in enumerate(script):
        match step:
            case "new":
                queue = new_queue(**argument)
            case "enqueue":
                queue.enqueue_many(argument)
            case "enqueue_error":
                try:
                    queue.enqueue_many(argument)
                    found.append(f"step {place}: nothing was raised")
                except TrilithError:
                    pass
            case "dequeue":
                found += differ(f"step {place}", list(queue.dequeue()), argument)
            case "save_restore":
                state = queue.state_dict()
                queue = StrQueue()
                queue.load_state_dict(state)
            case _:
                found.append(f"step {place}: no step {step!r}")
    return found


def new_queue(
    initial_elements: list[str] | None = None, capacity: int = 100_000, auto_enqueue: list[list[str]] | None = None
) -> StrQueue:
    if auto_enqueue is None:
        return StrQueue(initial_elements, capacity=capacity)
    batches = iter(auto_enqueue)

    def supply() -> tuple[list[str], bool]:
        batch = next(batches, None)
        return ([], True) if batch is None else (batch, False)

    return StrQueue(initial_elements, auto_enqueue_fn=supply, capacity=capacity)


def check_cache_one(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        got = [[element, last] for element, last in cache_one(case["input"])]
        yield str(number), differ("output", got, case["output"])


def check_merged_window(content: dict[str, Any], folder: Path) -> Found:
    batches = [{"x": np.array(batch)} for batch in content["batches"]]
    windows = merged_window(batches, content["size"], drop_remainder=content["drop_remainder"])
    failures = differ("windows", [window["x"].tolist() for window in windows], content["expected"])
    yield from ((key, failures if key == "expected" else []) for key in content)


# ---- names of the reference ------------------------------------------------------------------------------------------

CLASSES = {
    "file": reference.FilePBDataset,
    "distributed_files": reference.DistributedFilePBDataset,
    "kafka": reference.KafkaDataset,
    "tfrecord": reference.TFRecordDataset,
    "parquet": reference.ParquetDataset,
}


def check_dispatch(content: dict[str, Any], folder: Path) -> Found:
    failures = []
    for case in content["cases"]:
        dataset = reference.PBDataset(*case["args"], **case["kwargs"])
        if type(dataset) is not CLASSES[case["cls"]]:
            failures.append(f"{case}: made a {type(dataset).__name__}")
        if "file_name" in case:
            failures += differ(str(case), getattr(dataset, "file_name", None), case["file_name"])
    yield from ((key, failures if key == "cases" else []) for key in content)


GROUPS: dict[str, Check] = {
    "cache_one": check_cache_one,
    "dataset_input_patterns": check_input_patterns,
    "dynamic_sharding": check_dynamic_sharding,
    "file_sharding": check_file_sharding,
    "file_sharding_create_instance_dataset": check_create_instance_dataset,
    "gen_patterns": check_gen_patterns,
    "merged_window": check_merged_window,
    "pbdataset_dispatch": check_dispatch,
    "str_queue": check_str_queue,
}

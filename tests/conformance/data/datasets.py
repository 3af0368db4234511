"""Vectors of datasets: which files are read by whom, queues, and the names of the reference system.

Where vectors came without the files they name, the check writes files of that form and reads those.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import differ, in_order
from tests.conformance.data.members import raises, spread, unknown
from trilith.compat.monolith import datasets as reference
from trilith.compat.monolith.operators import cache_one, merged_window
from trilith.data.formats.files import expand_glob, expand_input_patterns, gen_patterns, match_input_patterns
from trilith.data.formats.framing import Framing
from trilith.data.formats.writers import open_writer
from trilith.data.messages import message_of
from trilith.data.pipeline.dataset import Dataset
from trilith.data.pipeline.queue import LocalFiles, StrQueue
from trilith.data.records import Kind, Records
from trilith_proto.proto_parser_pb2 import Instance

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]


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
def completed(folder: Path, part: str, missing: Mapping[str, Callable[[Path], None]]) -> Iterator[Path]:
    """`folder`, or, if something is missing, a copy of its folder `part` in which that is written."""
    if not missing:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        if (folder / part).is_dir():
            shutil.copytree(folder / part, Path(scratch) / part)
        for name, write in missing.items():
            write(Path(scratch) / name)
        yield Path(scratch)


def missing_parts(
    folder: Path, pattern: str, ids: list[list[int]], *, snappy: bool = False
) -> dict[str, Callable[[Path], None]]:
    """Writers of the files of a pattern that are not there: one per list of ids; none if those there hold all ids."""
    there = expand_glob(str(folder / pattern))
    dataset = reference.create_instance_dataset(there, use_snappy=snappy) if there else None
    if dataset is not None and sorted(item_ids(dataset)) == sorted(itertools.chain(*ids)):
        return {}
    names = [pattern.replace("*", str(number)) for number in range(len(ids))]
    return {
        name: lambda path, held=held: write_instances(path, held, snappy=snappy)  # type: ignore[misc]
        for name, held in zip(names, ids, strict=True)
        if not (folder / name).exists()
    }


def dealt(shares: Mapping[str, list[int]], size: int) -> list[list[int]]:
    """The files of which every n-th is a share, `size` ids in each."""
    files = [[ids[at : at + size] for at in range(0, len(ids), size)] for _, ids in sorted(shares.items())]
    return [each for row in itertools.zip_longest(*files) for each in row if each is not None]


def at(folder: Path, names: Iterable[str]) -> list[str]:
    return [str(folder / name) for name in names]


# ---- files -----------------------------------------------------------------------------------------------------------


def check_file_sharding(content: dict[str, Any], folder: Path) -> Found:
    def shares(wanted: dict[str, list[int]]) -> list[str]:
        found = []
        pattern = content["pattern"]
        missing = missing_parts(folder, pattern, dealt(wanted, 3))
        with completed(folder, str(Path(pattern).parent), missing) as root:
            for index, ids in wanted.items():
                dataset = reference.DistributedFilePBDataset(
                    str(root / pattern),
                    has_sort_id=content["has_sort_id"],
                    shard_num=content["shard_num"],
                    shard_index=int(index),
                )
                found += differ(f"shard {index}", sorted(item_ids(dataset)), sorted(ids))
        return found

    return spread(content, {"item_ids_per_shard": shares}, "pattern", "has_sort_id", "shard_num")


def check_create_instance_dataset(content: dict[str, Any], folder: Path) -> Found:
    def shares(wanted: dict[str, list[int]]) -> list[str]:
        found = []
        (pattern,) = content["files_list"]
        missing = missing_parts(folder, pattern, dealt(wanted, 2), snappy=True)
        with completed(folder, str(Path(pattern).parent), missing) as root:
            for index, ids in wanted.items():
                dataset = reference.create_instance_dataset(
                    at(root, [pattern]),
                    enable_sharding=content["enable_sharding"],
                    shard_num=content["shard_num"],
                    shard_index=int(index),
                    has_sort_id=content["has_sort_id"],
                )
                found += differ(f"shard {index}", sorted(item_ids(dataset)), sorted(ids))
        return found

    def errors(cases: list[dict[str, Any]]) -> list[str]:
        def made(arguments: dict[str, Any]) -> object:
            files = at(folder, arguments["files_list"])
            return reference.create_instance_dataset(**{**arguments, "files_list": files})

        return [wrong for case in cases for wrong in raises(str(case), lambda case=case: list(made(case)))]

    def explicit(case: dict[str, Any]) -> list[str]:
        dataset = reference.create_instance_dataset(at(folder, case["files_list"]))
        return differ("ids", sorted(item_ids(dataset)), in_order(case["item_ids_as_set"]))

    def globbed(case: dict[str, Any]) -> list[str]:
        (pattern,) = case["files_list"]
        listed = content.get("explicit_list", {})
        size = len(listed.get("item_ids_as_set", ())) // len(listed.get("files_list", "1"))
        if not size or "n" not in case:
            return []  # how many files there are, and of how many rows, is not said
        ids = [[10 * part + row for row in range(size)] for part in range(case["n"] // size)]
        with completed(folder, str(Path(pattern).parent), missing_parts(folder, pattern, ids)) as root:
            files, glob = at(root, [pattern]), case["expand_glob_path"]
            return differ(
                "n", len(item_ids(reference.create_instance_dataset(files, expand_glob_path=glob))), case["n"]
            )

    checks = {"item_ids_per_shard": shares, "errors": errors, "explicit_list": explicit, "glob": globbed}
    return spread(content, checks, "files_list", "enable_sharding", "shard_num", "has_sort_id")


def check_dynamic_sharding(content: dict[str, Any], folder: Path) -> Found:
    def names_of(dealer: LocalFiles) -> Iterator[str]:
        while (name := dealer.take()) is not None:
            yield Path(name).name

    def all_of(patterns: list[str]) -> list[str]:
        return list(names_of(LocalFiles(at(folder, patterns))))

    def two_workers(wanted: str) -> list[str]:
        shared = LocalFiles(at(folder, content["patterns"]))
        taken: list[list[str]] = [[], []]
        for worker, name in zip(itertools.cycle((0, 1, 1)), names_of(shared), strict=False):
            taken[worker].append(name)
        return differ("union", sorted(taken[0] + taken[1]), in_order(content["basenames"]))

    checks: dict[str, Callable[[Any], list[str]]] = {
        "basenames": lambda wanted: differ("names", all_of(content["patterns"]), wanted),
        "unmatched": lambda case: differ("names", all_of(case["patterns"]), case["basenames"]),
        "empty_patterns": lambda wanted: differ("names", all_of([]), wanted),
        "two_workers": two_workers,
    }
    return spread(content, checks, "patterns")


def check_input_patterns(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        if case.get("error"):
            yield str(number), raises(str(case), lambda case=case: match_input_patterns(str(folder / case["flag"])))  # type: ignore[misc]
            continue
        ids = case["item_ids"]
        missing: dict[str, Callable[[Path], None]] = {}
        if not all(expand_glob(str(folder / pattern)) for pattern in case["expanded"]):
            written = ids or range(len(case["expanded"]))  # any ids do, if none are expected
            missing = {
                pattern.replace("*", "part-0"): lambda path, held=held: write_instances(path, [held])  # type: ignore[misc]
                for pattern, held in zip(case["expanded"], written, strict=True)
            }
        with completed(folder, case["flag"].split("{")[0].rpartition("/")[0], missing) as root:
            yield str(number), pattern_failures(root, case)


def pattern_failures(root: Path, case: dict[str, Any]) -> list[str]:
    """What is wrong with the patterns, and with the ids in their files; nothing if the files are unknown."""
    flag = str(root / case["flag"])
    if "expanded" not in case and not any(map(expand_glob, expand_input_patterns(flag))):
        return []
    relative = [pattern.removeprefix(f"{root}/") for pattern in match_input_patterns(flag)]
    found = differ("patterns", relative, case["expanded"])
    got = item_ids(reference.PBDataset(flags=reference.DatasetFlags(dataset_input_patterns=flag)))
    return found + differ("ids", sorted(got), in_order(case["item_ids"]))


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
                found += raises(f"step {place}", partial(queue.enqueue_many, argument))
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
    def expected(wanted: list[Any]) -> list[str]:
        options = {name: content[name] for name in ("size", "drop_remainder") if name in content}
        windows = merged_window([{"x": np.array(batch)} for batch in content["batches"]], **options)
        return differ("windows", [window["x"] for window in windows], wanted)

    return spread(content, {"expected": expected}, "batches", "size", "drop_remainder")


# ---- names of the reference ------------------------------------------------------------------------------------------

DISPATCH = ("args", "kwargs", "cls", "file_name", "error")
CLASSES = {
    "file": reference.FilePBDataset,
    "distributed_files": reference.DistributedFilePBDataset,
    "kafka": reference.KafkaDataset,
    "tfrecord": reference.TFRecordDataset,
    "parquet": reference.ParquetDataset,
}


def check_dispatch(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[dict[str, Any]]) -> list[str]:
        found = []
        for case in cases:
            found += [f"nothing knows {name}" for name in unknown(case, DISPATCH)]
            if case.get("error"):
                found += raises(str(case), lambda case=case: reference.PBDataset(*case["args"], **case["kwargs"]))
                continue
            dataset = reference.PBDataset(*case["args"], **case["kwargs"])
            if type(dataset) is not CLASSES[case["cls"]]:
                found.append(f"{case}: made a {type(dataset).__name__}")
            if "file_name" in case:
                found += differ(str(case), getattr(dataset, "file_name", None), case["file_name"])
        return found

    return spread(content, {"cases": cases})


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

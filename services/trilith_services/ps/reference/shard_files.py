"""Names of the shard files of one saved object, `<base>-00000-of-00002`, and which sets of them are whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from trilith.data.formats.tfrecord import read_records
from trilith.errors import CheckpointError
from trilith.folder import Folder

__all__ = [
    "create_file",
    "find_shard_files",
    "open_file",
    "read_payloads",
    "remove_other_sets",
    "shard_file_name",
    "shard_file_names",
    "validate_shard_files",
]

_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})")


def shard_file_name(base: str, index: int, total: int) -> str:
    """Name of shard `index` of `total`."""
    return f"{base}-{index:05d}-of-{total:05d}"


def shard_file_names(base: str, total: int) -> list[str]:
    """Names of all shards."""
    return [shard_file_name(base, index, total) for index in range(total)]


def validate_shard_files(base: str, files: Iterable[str]) -> int:
    """Check that `files` hold one whole set of shards of `base` and return how many shards it has.

    Files with other suffixes, such as temporary ones, do not count.

    Raises:
        CheckpointError: No shard, a missing one, one too many, shards of two sets, or a name that is not `base`'s.
    """
    totals: dict[int, set[int]] = {}
    for file in files:
        if not file.startswith(base):
            raise CheckpointError(f"{file} is not a file of {base}")
        shard = _SHARD.fullmatch(file, len(base))
        if shard:
            totals.setdefault(int(shard[2]), set()).add(int(shard[1]))
    if not totals:
        raise CheckpointError(f"no file {base}-NNNNN-of-NNNNN")
    if len(totals) > 1:
        raise CheckpointError(f"{base}: files of several sets, of {' and '.join(map(str, sorted(totals)))} shards")
    ((total, found),) = totals.items()
    excess = sorted(index for index in found if index >= total)
    if excess:
        raise CheckpointError(f"{shard_file_name(base, excess[0], total)}: there are only {total} shards")
    missing = sorted(set(range(total)) - found)
    if missing:
        raise CheckpointError(f"{shard_file_name(base, missing[0], total)} is missing ({len(missing)} of {total} are)")
    return total


def find_shard_files(base: str) -> list[str]:
    """Names of the one whole set of shards that is on disk under `base`, in order.

    Raises:
        CheckpointError: There is none.
    """
    folder, stem = _split(base)
    names = [name for name in folder.names() if name.startswith(f"{stem}-")]
    try:
        total = validate_shard_files(stem, names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.url}: {error}") from None
    return shard_file_names(base, total)


def remove_other_sets(base: str, total: int) -> None:
    """Delete the shards of `base` that are not of the set of `total`: what an earlier, differently cut save left.

    With them in place neither set could be told to be the valid one.
    """
    folder, stem = _split(base)
    for name in folder.names():
        shard = _SHARD.fullmatch(name, len(stem)) if name.startswith(stem) else None
        if shard and int(shard[2]) != total:
            folder.remove(name)


@contextmanager
def create_file(name: str) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name and rename it; it is not there if the body raises."""
    folder, stem = _split(name)
    with folder.create(stem) as file:
        yield file


@contextmanager
def open_file(name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; CheckpointError if it is not there."""
    folder, stem = _split(name)
    try:
        file = folder.open(stem)
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing") from None
    with file:
        yield file


def read_payloads(name: str) -> Iterator[bytes]:
    """The records of a TFRecord file; CheckpointError if it is not there or damaged."""
    with open_file(name) as file:
        for batch in read_records(file, name=name, error=CheckpointError):
            yield from batch.payloads()


def _split(path: str) -> tuple[Folder, str]:
    head, slash, tail = path.rpartition("/")
    return Folder(head or ("/" if slash else ".")), tail

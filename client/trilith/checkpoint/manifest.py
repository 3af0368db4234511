"""Manifests: what each PS wrote of a checkpoint, and that all of it is there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from trilith.checkpoint.names import FILE_NAME, NUMBERED, PART, part_name
from trilith.checkpoint.signed import pack, unpack
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.routing import OWNER_RULE
from trilith.runtime.checked_json import read_json
from trilith_proto import ps_pb2

__all__ = [
    "MANIFEST",
    "FileRecord",
    "Manifest",
    "Part",
    "check_nothing_lost",
    "collect_parts",
    "part_of",
    "parts_there",
    "read_manifest",
    "write_manifest",
    "write_part",
]

MANIFEST = "manifest.json"

PART_FORMAT = "trilith-checkpoint-part"
MANIFEST_FORMAT = "trilith-checkpoint"

_MOST_BYTES = 1 << 28  # of a manifest: some millions of files
_KINDS = frozenset({"rows", "filter", "variables", "queues"})


def _check_counts(*values: int) -> None:
    for value in values:
        if not 0 <= value < 2**64:
            raise ValueError(f"{value} where a number from 0 to 2**64 - 1 is due")


def _check_seconds(*values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{value} where seconds are due")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One data file of a checkpoint.

    Attributes:
        name: File name inside the directory.
        kind: "rows", "filter", "variables" or "queues".
        bytes: Size.
        crc32c: CRC-32C of the whole file.
        table: Table name; empty for variables and queues.
        rows: Rows, or partitions of dense variables, or queues.
    """

    name: str
    kind: str
    bytes: int
    crc32c: int
    table: str = ""
    rows: int = 0

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a file in the checkpoint's directory")
        if self.kind not in _KINDS:
            raise ValueError(f"{self.name}: kind {self.kind!r} is none of {sorted(_KINDS)}")
        _check_counts(self.bytes, self.crc32c, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one PS wrote.

    Attributes:
        shard_index: The PS.
        shard_count: How many PS the cluster had.
        global_step: The model's step when this PS began to write.
        incarnation: Which process it was.
        finished_unix_s: When the last file was there.
        files: Its data files.
        began_unix_s: When it began: every change acknowledged before is inside. 0: unknown.
        life: Which process wrote it, eight hex digits; empty: written by an earlier version, which did not say.
    """

    shard_index: int
    shard_count: int
    global_step: int
    incarnation: int
    finished_unix_s: float
    files: tuple[FileRecord, ...]
    began_unix_s: float = 0.0
    life: str = ""

    def __post_init__(self) -> None:
        _check_counts(self.shard_index, self.shard_count, self.global_step, self.incarnation)
        _check_seconds(self.finished_unix_s, self.began_unix_s)
        if self.shard_index >= self.shard_count:
            raise ValueError(f"PS {self.shard_index} of {self.shard_count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        parts: One per PS, by index.
        created_unix_s: When the manifest was written.
    """

    parts: tuple[Part, ...]
    created_unix_s: float

    def __post_init__(self) -> None:
        _check_seconds(self.created_unix_s)

    @property
    def shard_count(self) -> int:
        """How many PS wrote it."""
        return len(self.parts)

    @property
    def global_step(self) -> int:
        """The model's step: PS 0 counts it."""
        return self.parts[0].global_step

    @property
    def as_of_unix_s(self) -> float:
        """Every change that was acknowledged before is inside; of earlier versions' files, the best that is known."""
        return min(part.began_unix_s or part.finished_unix_s for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all data files."""
        return sum(file.bytes for part in self.parts for file in part.files)

    def rows(self) -> dict[str, int]:
        """Rows by table, over all PS."""
        found: dict[str, int] = {}
        for part in self.parts:
            for file in part.files:
                if file.kind == "rows":
                    found[file.table] = found.get(file.table, 0) + file.rows
        return dict(sorted(found.items()))


def part_of(
    index: int,
    count: int,
    response: ps_pb2.SaveResponse,
    *,
    finished_unix_s: float | None = None,
    began_unix_s: float = 0.0,
    life: str = "",
) -> Part:
    """The part that a PS's answer to Save describes."""
    return Part(
        shard_index=index,
        shard_count=count,
        global_step=response.global_step,
        incarnation=response.incarnation,
        finished_unix_s=time.time() if finished_unix_s is None else finished_unix_s,
        began_unix_s=began_unix_s,
        life=life,
        files=tuple(
            FileRecord(
                name=file.name,
                kind=_kind_of(file.name),
                bytes=file.bytes,
                crc32c=file.crc32c,
                table=file.table,
                rows=file.rows,
            )
            for file in response.files
        ),
    )


def _kind_of(name: str) -> str:
    stem = re.split(r"[-.]", name, maxsplit=1)[0]
    return "rows" if stem == "table" else stem


def write_part(folder: Folder, part: Part) -> None:
    """Say what one PS wrote; its data files are there already."""
    folder.write(part_name(part.shard_index, part.shard_count, part.life), pack(PART_FORMAT, asdict(part)))


def parts_there(names: Collection[str], count: int) -> dict[int, list[str]]:
    """Lives of the processes that have written parts, by PS, from the names in a checkpoint's directory."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        match = PART.fullmatch(name)
        if match is not None and int(match[2]) == count and int(match[1]) < count:
            found.setdefault(int(match[1]), []).append(match[3] or "")
    return found


def collect_parts(folder: Folder, count: int, *, lives: Mapping[int, str] | None = None) -> list[Part] | None:
    """The parts of all `count` PS, None while one is missing.

    Args:
        folder: The checkpoint's directory.
        count: How many PS the cluster has.
        lives: Which process each PS is: parts that others have written in its place do not count. Of a PS that is not
            in it, the part that was finished last counts.
    """
    there = parts_there(folder.names(), count)
    if lives:
        there = {index: [life for life in have if life == lives.get(index, life)] for index, have in there.items()}
    if any(not there.get(index) for index in range(count)):
        return None
    parts: list[Part] = []
    for index in range(count):
        found = [_read_part(folder, part_name(index, count, life)) for life in there[index]]
        whole = [part for part in found if part is not None]
        if not whole:
            return None
        # Of an unknown process only if there is no other: an earlier version wrote it, before this one.
        parts.append(max(whole, key=lambda part: (bool(part.life), part.finished_unix_s)))
    return parts


def _read_part(folder: Folder, name: str) -> Part | None:
    where = folder.path(name)
    try:
        raw = folder.read(name, most=_MOST_BYTES)
    except FileNotFoundError:
        return None
    unpack(where, PART_FORMAT, raw)
    try:
        return read_json(Part, raw)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a part manifest: {error}") from None


def write_manifest(path: str, parts: Sequence[Part], *, clock: Callable[[], float] = time.time) -> Manifest:
    """Declare the checkpoint complete; replaces an older manifest in one step, and repeating it is fine.

    Args:
        path: The checkpoint's directory.
        parts: One per PS, in any order.
        clock: Source of Unix seconds.

    Raises:
        CheckpointError: The parts are not those of one whole cluster, or a file they name cannot be seen from here.
    """
    folder = Folder(path)
    ordered = tuple(sorted(parts, key=lambda part: part.shard_index))
    if not _is_whole(ordered):
        have = [f"{part.shard_index} of {part.shard_count}" for part in ordered]
        raise CheckpointError(f"{folder.url}: parts {have} are not one whole cluster")
    for part in ordered:
        for file in part.files:
            size = folder.size(file.name)
            if size != file.bytes:
                seen = "cannot be seen from this process" if size is None else f"has {size} bytes here"
                raise CheckpointError(
                    f"{folder.path(file.name)}: PS {part.shard_index} wrote {file.bytes} bytes, but the file {seen}; "
                    "save to a path that all processes share"
                )
    manifest = Manifest(parts=ordered, created_unix_s=clock())
    folder.write(MANIFEST, pack(MANIFEST_FORMAT, {"owner_rule": OWNER_RULE, **asdict(manifest)}))
    return manifest


def read_manifest(path: str) -> Manifest:
    """What a complete checkpoint consists of.

    Raises:
        CheckpointError: There is no complete checkpoint at `path`, or its manifest is damaged.
    """
    folder = Folder(path)
    where = folder.path(MANIFEST)
    try:
        raw = folder.read(MANIFEST, most=_MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        names = folder.names()
        inside = [name for name in names if NUMBERED.fullmatch(name)]
        if inside:
            hint = f"it is a directory of checkpoints; name one, such as {folder.path(inside[-1])}"
        elif names:
            hint = "it is a checkpoint that was never finished, or none at all"
        else:
            hint = "nothing is there"
        raise CheckpointError(f"{folder.url}: no {MANIFEST}: {hint}") from None
    body = unpack(where, MANIFEST_FORMAT, raw)
    if body.get("owner_rule") != OWNER_RULE:
        raise CheckpointError(
            f"{where}: owner rule {body.get('owner_rule')!r} is unknown; this version has {OWNER_RULE!r}"
        )
    try:
        manifest = read_json(Manifest, raw)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a manifest: {error}") from None
    if not _is_whole(manifest.parts):
        raise CheckpointError(f"{where}: lists PS {[part.shard_index for part in manifest.parts]}, not 0 to n-1")
    return manifest


def _is_whole(parts: Sequence[Part]) -> bool:
    """Whether the parts, in order, are those of one whole cluster."""
    return bool(parts) and all(
        (part.shard_index, part.shard_count) == (index, len(parts)) for index, part in enumerate(parts)
    )


def check_nothing_lost(where: str, rows: Mapping[str, int], known: Collection[str]) -> None:
    """Refuse to restore a checkpoint that would take rows away of which it knows nothing.

    Args:
        where: The checkpoint.
        rows: Rows by table that are there now.
        known: The checkpoint's tables.

    Raises:
        InvalidRequestError: There are some; it says what to do about them.
    """
    lost = {name: count for name, count in sorted(rows.items()) if count and name not in known}
    if lost:
        counts = ", ".join(f"{name!r} ({count} rows)" for name, count in lost.items())
        raise InvalidRequestError(
            f"{where} does not hold the tables {counts} that are here, and their rows would be lost; nothing was "
            f"changed. Clear them first (Client.clear({sorted(lost)})) if they may go, or restore into a cluster "
            "without them"
        )

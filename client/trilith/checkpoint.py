"""Checkpoint directories: file names, manifests and completeness.

What stands inside the row files is the PS's business (`trilith_services.ps.snapshot`). A checkpoint is one directory:

    table-user.00000-of-00002.3f9c0a1b.arrow     rows of table "user" on PS 0 of 2 (and so on per table and PS)
    variables.00000-of-00002.3f9c0a1b.arrow      dense partitions of PS 0
    queues.00000-of-00002.3f9c0a1b.json          string queues, where there are any (on PS 0)
    part.00000-of-00002.json                     what PS 0 wrote: names, sizes, CRC-32C; written after its files
    manifest.json                                all parts; written last, so a checkpoint is complete or absent

The eight hex digits are fresh for every save, so saving again into a directory never touches a file that a manifest
names. Paths are local or any URL that fsspec knows.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith.routing import OWNER_RULE
from trilith_proto import ps_pb2

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "FileRecord",
    "Manifest",
    "Part",
    "checkpoint_name",
    "collect_parts",
    "file_name",
    "list_checkpoints",
    "newest_complete",
    "part_name",
    "part_of",
    "prune",
    "read_manifest",
    "read_part",
    "write_manifest",
    "write_part",
]

MANIFEST = "manifest.json"

VERSION = 1
PART_FORMAT = "trilith-checkpoint-part"
MANIFEST_FORMAT = "trilith-checkpoint"

_NUMBERED = re.compile(r"ckpt-(\d{20})")


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
    """

    shard_index: int
    shard_count: int
    global_step: int
    incarnation: int
    finished_unix_s: float
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        parts: One per PS, by index.
        created_unix_s: When the manifest was written.
    """

    parts: tuple[Part, ...]
    created_unix_s: float

    @property
    def shard_count(self) -> int:
        """How many PS wrote it."""
        return len(self.parts)

    @property
    def global_step(self) -> int:
        """The model's step: PS 0 counts it."""
        return self.parts[0].global_step

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One numbered checkpoint of a directory.

    Attributes:
        path: Its own directory.
        number: Its tick, in Unix milliseconds; larger is newer.
        complete: Whether its manifest is there.
    """

    path: str
    number: int
    complete: bool


def checkpoint_name(number: int) -> str:
    """Directory of the numbered checkpoint; names sort as numbers do."""
    return f"ckpt-{number:020d}"


def file_name(kind: str, table: str, index: int, count: int, token: str, suffix: str = "arrow") -> str:
    """Name of a data file; a table name that is no file name is percent-encoded."""
    stem = {"rows": "table", "filter": "filter"}.get(kind, kind)
    stem = f"{stem}-{quote(table, safe='')}" if table else stem
    return f"{stem}.{index:05d}-of-{count:05d}.{token}.{suffix}"


def part_name(index: int, count: int) -> str:
    """Name of a PS's part manifest."""
    return f"part.{index:05d}-of-{count:05d}.json"


def part_of(index: int, count: int, response: ps_pb2.SaveResponse, *, finished_unix_s: float | None = None) -> Part:
    """The part that a PS's answer to Save describes."""
    return Part(
        shard_index=index,
        shard_count=count,
        global_step=response.global_step,
        incarnation=response.incarnation,
        finished_unix_s=time.time() if finished_unix_s is None else finished_unix_s,
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
    folder.write(part_name(part.shard_index, part.shard_count), _pack(PART_FORMAT, asdict(part)))


def read_part(folder: Folder, index: int, count: int) -> Part | None:
    """A PS's part manifest, None if it is not there yet."""
    name = part_name(index, count)
    try:
        body = _unpack(folder.path(name), PART_FORMAT, folder.read(name))
    except FileNotFoundError:
        return None
    return _part(folder.path(name), body)


def collect_parts(folder: Folder, count: int) -> list[Part] | None:
    """The parts of all `count` PS, None while one is missing."""
    parts: list[Part] = []
    for index in range(count):
        part = read_part(folder, index, count)
        if part is None:
            return None
        parts.append(part)
    return parts


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
    count = ordered[0].shard_count if ordered else 0
    if [(part.shard_index, part.shard_count) for part in ordered] != [(index, count) for index in range(count)] or (
        not count
    ):
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
    folder.write(MANIFEST, _pack(MANIFEST_FORMAT, {"owner_rule": OWNER_RULE, **asdict(manifest)}))
    return manifest


def read_manifest(path: str) -> Manifest:
    """What a complete checkpoint consists of.

    Raises:
        CheckpointError: There is no complete checkpoint at `path`, or its manifest is damaged.
    """
    folder = Folder(path)
    where = folder.path(MANIFEST)
    try:
        body = _unpack(where, MANIFEST_FORMAT, folder.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        names = folder.names()
        inside = [name for name in names if _NUMBERED.fullmatch(name)]
        if inside:
            hint = f"it is a directory of checkpoints; name one, such as {folder.path(inside[-1])}"
        elif names:
            hint = "it is a checkpoint that was never finished, or none at all"
        else:
            hint = "nothing is there"
        raise CheckpointError(f"{folder.url}: no {MANIFEST}: {hint}") from None
    if body.get("owner_rule") != OWNER_RULE:
        raise CheckpointError(
            f"{where}: owner rule {body.get('owner_rule')!r} is unknown; this version has {OWNER_RULE!r}"
        )
    try:
        parts = tuple(_part(where, part) for part in body["parts"])
        manifest = Manifest(parts=parts, created_unix_s=float(body["created_unix_s"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a manifest: {error!r}") from None
    if not parts or [part.shard_index for part in parts] != list(range(len(parts))):
        raise CheckpointError(f"{where}: lists PS {[part.shard_index for part in parts]}, not 0 to n-1")
    return manifest


def list_checkpoints(directory: str) -> list[CheckpointInfo]:
    """The numbered checkpoints below `directory`, oldest first, incomplete ones included."""
    folder = Folder(directory)
    found: list[CheckpointInfo] = []
    for name in folder.names():
        if match := _NUMBERED.fullmatch(name):
            child = folder.child(name)
            found.append(
                CheckpointInfo(path=child.url, number=int(match.group(1)), complete=child.exists(MANIFEST)),
            )
    return found


def newest_complete(directory: str) -> CheckpointInfo | None:
    """The newest complete checkpoint below `directory`, None if there is none."""
    complete = [info for info in list_checkpoints(directory) if info.complete]
    return complete[-1] if complete else None


def prune(directory: str, keep: int) -> list[str]:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than the newest complete one.

    Returns:
        Paths of what was deleted.
    """
    found = list_checkpoints(directory)
    complete = [info.number for info in found if info.complete]
    if not complete:
        return []
    kept = set(complete[-max(keep, 1) :])
    gone = [info.path for info in found if info.number < complete[-1] and info.number not in kept]
    for path in gone:
        folder = Folder(path)
        folder.remove(MANIFEST)  # first, so that what is left halfway is no checkpoint
        folder.remove_all()
    return gone


def _pack(kind: str, body: Mapping[str, Any]) -> bytes:
    """JSON with its own checksum: a flipped digit in a manifest is damage like any other."""
    content = {"format": kind, "version": VERSION, **body}
    content["crc32c"] = _checksum(content)
    return json.dumps(content, indent=1).encode() + b"\n"


def _unpack(where: str, kind: str, raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None
    if not isinstance(body, dict) or body.get("format") != kind:
        raise CheckpointError(f"{where}: not a file of format {kind!r}")
    if body.get("version") != VERSION:
        raise CheckpointError(f"{where}: version {body.get('version')!r}; this program reads version {VERSION}")
    stated = body.pop("crc32c", None)
    if stated != _checksum(body):
        raise CheckpointError(f"{where}: damaged: its content does not match its checksum")
    return body


def _checksum(body: Mapping[str, Any]) -> int:
    import google_crc32c

    return int(google_crc32c.value(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()))


def _part(where: str, body: Mapping[str, Any]) -> Part:
    try:
        return Part(
            shard_index=int(body["shard_index"]),
            shard_count=int(body["shard_count"]),
            global_step=int(body["global_step"]),
            incarnation=int(body["incarnation"]),
            finished_unix_s=float(body["finished_unix_s"]),
            files=tuple(FileRecord(**file) for file in body["files"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a part manifest: {error!r}") from None

"""Checkpoint directories: file names, manifests and completeness.

What stands inside the row files is the PS's business (`trilith_services.ps.checkpoint.snapshot`). A checkpoint is one
directory:

    table-user.00000-of-00002.3f9c0a1b.arrow     rows of table "user" on PS 0 of 2 (and so on per table and PS)
    variables.00000-of-00002.3f9c0a1b.arrow      dense partitions of PS 0
    queues.00000-of-00002.3f9c0a1b.json          string queues, where there are any (on PS 0)
    part.00000-of-00002.81c2d4e6.json            what PS 0 wrote: names, sizes, CRC-32C; written after its files
    manifest.json                                all parts; written last, so a checkpoint is complete or absent

The eight hex digits of data files are fresh for every save, so saving again into a directory never touches a file that
a manifest names; those of a part are the life of the process that wrote it (earlier versions left them out). Empty
files say what goes on:

    round.00000001700000000000                   all PS take part by themselves; the number is its place in the order
    order.00000001700000000000                   the same of one that a client asks for, where the clock ran backwards
    saving.00000-of-00002.81c2d4e6               this process is writing its files
    held.01700003600.5b7e01c3                    somebody reads or writes here until then (Unix s): not to be pruned

Beside the checkpoints, `ps.00000-of-00002.json` says which process is PS 0 of 2: only its parts count. The empty file
`leaving.00000-of-00002.00000001700000000000` says that it ends, or has ended, with that checkpoint.

Checkpoints are named by the clock and ordered by when they were begun: a clock that was set back makes the names of
later ones smaller, not them older. Paths are local or any URL that fsspec knows.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.routing import OWNER_RULE
from trilith_proto import ps_pb2

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "FileRecord",
    "Manifest",
    "Part",
    "check_nothing_lost",
    "checkpoint_name",
    "collect_parts",
    "file_name",
    "hold",
    "leaving",
    "list_checkpoints",
    "mark_leaving",
    "mark_order",
    "newest_complete",
    "next_number",
    "next_order",
    "part_name",
    "part_of",
    "parts_there",
    "prune",
    "read_holder",
    "read_manifest",
    "round_name",
    "saving_name",
    "write_holder",
    "write_manifest",
    "write_part",
]

MANIFEST = "manifest.json"

VERSION = 1
PART_FORMAT = "trilith-checkpoint-part"
MANIFEST_FORMAT = "trilith-checkpoint"
HOLDER_FORMAT = "trilith-checkpoint-holder"

HELD_S = 6 * 3600
"""How long a checkpoint is kept for a reader that never says that it is done: it may have died."""

_SAVING_S = 24 * 3600
_MOST_BYTES = 1 << 28  # of a manifest: some millions of files

_NUMBERED = re.compile(r"ckpt-(\d{20})")
_ORDER = re.compile(r"(order|round)\.(\d{20})")
_PART = re.compile(r"part\.(\d{5,})-of-(\d{5,})(?:\.([0-9a-f]{8}))?\.json")
_SAVING = re.compile(r"saving\.(\d{5,})-of-(\d{5,})\.([0-9a-f]{8})")
_LEAVING = re.compile(r"leaving\.(\d{5,})-of-(\d{5,})\.(\d{20})")
_HELD = re.compile(r"held\.(\d{11,})\.[0-9a-f]{8}")
_FILE_NAME = re.compile(r"[\w%~-][\w.%~-]*", re.ASCII)
_KINDS = frozenset({"rows", "filter", "variables", "queues"})
_SPARE_INCOMPLETE = 2


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One numbered checkpoint of a directory.

    Attributes:
        path: Its own directory.
        number: Its tick, in Unix milliseconds, by which it is named.
        complete: Whether its manifest is there.
        order: Larger is newer: its number, unless the clock ran backwards.
        round: Whether all PS write it by themselves, not because a client asked them to.
        names: What its directory holds.
    """

    path: str
    number: int
    complete: bool
    order: int = 0
    round: bool = False
    names: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def is_held(self, now: float) -> bool:
        """Whether somebody reads or writes here."""
        held = (_HELD.fullmatch(name) for name in self.names)
        return any(match is not None and int(match[1]) > now for match in held)

    def is_written(self, holders: Mapping[tuple[int, int], str], now: float) -> bool:
        """Whether a process is writing its part.

        `holders` are the lives of PS (index, count) that are known; of one that is not, a day is believed.
        """
        for match in filter(None, map(_SAVING.fullmatch, self.names)):
            life = holders.get((int(match[1]), int(match[2])))
            if life == match[3] or (life is None and now < self.number / 1000 + _SAVING_S):
                return True
        return False


def checkpoint_name(number: int) -> str:
    """Directory of the numbered checkpoint; names sort as numbers do."""
    return f"ckpt-{number:020d}"


def file_name(kind: str, table: str, index: int, count: int, token: str, suffix: str = "arrow") -> str:
    """Name of a data file; a table name that is no file name is percent-encoded."""
    stem = {"rows": "table", "filter": "filter"}.get(kind, kind)
    stem = f"{stem}-{quote(table, safe='')}" if table else stem
    return f"{stem}.{index:05d}-of-{count:05d}.{token}.{suffix}"


def part_name(index: int, count: int, life: str = "") -> str:
    """Name of a PS's part manifest."""
    return f"part.{index:05d}-of-{count:05d}.{life}.json" if life else f"part.{index:05d}-of-{count:05d}.json"


def saving_name(index: int, count: int, life: str) -> str:
    """Name of the file that is there while a PS writes its part."""
    return f"saving.{index:05d}-of-{count:05d}.{life}"


def round_name(order: int) -> str:
    """Name of the file that makes a checkpoint one in which all PS take part by themselves."""
    return f"round.{order:020d}"


def _holder_name(index: int, count: int) -> str:
    """Name of the file that says which process a PS is."""
    return f"ps.{index:05d}-of-{count:05d}.json"


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
    folder.write(part_name(part.shard_index, part.shard_count, part.life), _pack(PART_FORMAT, asdict(part)))


def parts_there(names: Collection[str], count: int) -> dict[int, list[str]]:
    """Lives of the processes that have written parts, by PS, from the names in a checkpoint's directory."""
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name)
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
    try:
        body = _unpack(folder.path(name), PART_FORMAT, folder.read(name, most=_MOST_BYTES))
    except FileNotFoundError:
        return None
    return _part(folder.path(name), body)


def write_holder(directory: str, index: int, count: int, life: str) -> None:
    """Say beside the checkpoints which process PS `index` of `count` is: parts of any other no longer count."""
    folder = Folder(directory)
    folder.write(_holder_name(index, count), _pack(HOLDER_FORMAT, {"life": life}))
    _unmark_leaving(folder, index, count)


def read_holder(directory: str, index: int, count: int) -> str | None:
    """The life of the process that PS `index` of `count` is; None if nobody has said, or not so that it can be read."""
    folder, name = Folder(directory), _holder_name(index, count)
    try:
        return str(_unpack(folder.path(name), HOLDER_FORMAT, folder.read(name, most=_MOST_BYTES))["life"])
    except (FileNotFoundError, CheckpointError, KeyError):
        return None  # a damaged word about who counts must not end checkpoints


def mark_leaving(directory: str, index: int, count: int, number: int) -> None:
    """Say beside the checkpoints that PS `index` of `count` ends with checkpoint `number`."""
    folder = Folder(directory)
    name = f"leaving.{index:05d}-of-{count:05d}.{number:020d}"
    folder.write(name, b"")
    _unmark_leaving(folder, index, count, but=name)


def _unmark_leaving(folder: Folder, index: int, count: int, *, but: str = "") -> None:
    for name in folder.names():
        match = _LEAVING.fullmatch(name)
        if match is not None and (int(match[1]), int(match[2])) == (index, count) and name != but:
            folder.remove(name)


def leaving(directory: str, count: int) -> dict[int, int]:
    """Number of the checkpoint with which each of the PS that have left, or are about to, ends."""
    marks = filter(None, map(_LEAVING.fullmatch, Folder(directory).names()))
    return {int(match[1]): int(match[3]) for match in marks if int(match[2]) == count}


@contextmanager
def hold(path: str, *, seconds: float = HELD_S, clock: Callable[[], float] = time.time) -> Iterator[None]:
    """Keep the checkpoint at `path` from being pruned while it is read or written, for `seconds` at most.

    Only numbered ones are ever pruned, others need nothing. Where nothing can be written, it is read all the same, and
    may be pruned meanwhile.
    """
    folder = Folder(path)
    if not _NUMBERED.fullmatch(folder.url.rstrip("/").rpartition("/")[2]):
        yield
        return
    name = f"held.{int(clock() + seconds):011d}.{secrets.token_hex(4)}"
    try:
        folder.write(name, b"")
    except Exception:  # noqa: BLE001 (whatever the file system says: a read-only copy is as good to read)
        name = ""
    try:
        yield
    finally:
        if name:
            with suppress(Exception):
                folder.remove(name)


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
        body = _unpack(where, MANIFEST_FORMAT, folder.read(MANIFEST, most=_MOST_BYTES))
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
        manifest = Manifest(parts=parts, created_unix_s=_seconds(body["created_unix_s"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a manifest: {error!r}") from None
    if not parts or [(part.shard_index, part.shard_count) for part in parts] != [
        (index, len(parts)) for index in range(len(parts))
    ]:
        raise CheckpointError(f"{where}: lists PS {[part.shard_index for part in parts]}, not 0 to n-1")
    return manifest


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


def list_checkpoints(directory: str) -> list[CheckpointInfo]:
    """The numbered checkpoints below `directory`, oldest first, incomplete ones included."""
    folder = Folder(directory)
    found: list[CheckpointInfo] = []
    for name in folder.names():
        if match := _NUMBERED.fullmatch(name):
            child = folder.child(name)
            found.append(_info(child.url, int(match.group(1)), frozenset(child.names())))
    return sorted(found, key=lambda info: (info.order, info.number))


def _info(path: str, number: int, names: frozenset[str]) -> CheckpointInfo:
    marks = [match for match in map(_ORDER.fullmatch, names) if match is not None]
    return CheckpointInfo(
        path=path,
        number=number,
        complete=MANIFEST in names,
        order=max((int(match[2]) for match in marks), default=number),
        round=any(match[1] == "round" for match in marks),
        names=names,
    )


def newest_complete(directory: str) -> CheckpointInfo | None:
    """The complete checkpoint below `directory` that was begun last, None if there is none."""
    complete = [info for info in list_checkpoints(directory) if info.complete]
    return complete[-1] if complete else None


def next_number(found: Collection[CheckpointInfo], now_ms: int) -> int:
    """Number of a checkpoint begun at `now_ms`, Unix milliseconds: the first one from there that is not taken."""
    taken = {info.number for info in found}
    while now_ms in taken:
        now_ms += 1
    return now_ms


def next_order(found: Collection[CheckpointInfo], number: int) -> int:
    """Place in the order of a new checkpoint of that number: behind all there are."""
    return max([number, *(info.order + 1 for info in found)])


def mark_order(path: str, found: Collection[CheckpointInfo], number: int) -> None:
    """Give the new checkpoint `number` at `path` its place behind those there are, if its name does not say so."""
    order = next_order(found, number)
    if order != number:
        Folder(path).write(f"order.{order:020d}", b"")


def prune(
    directory: str, keep: int, *, used: Collection[str] = (), clock: Callable[[], float] = time.time
) -> list[str]:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than the newest complete one.

    What is held, being written or in `used` stays, and so does the complete checkpoint of the highest step: what is
    newest may come of a cluster that lost everything. Of incomplete ones newer than all complete ones the last two
    stay.

    Args:
        directory: Where the checkpoints are.
        keep: How many, at least 1.
        used: Paths of checkpoints that must stay.
        clock: Unix seconds.

    Returns:
        Paths of what was deleted.
    """
    found = list_checkpoints(directory)
    complete = [info for info in found if info.complete]
    kept = {info.path for info in complete[-max(keep, 1) :]} | set(used)
    newer = found[found.index(complete[-1]) + 1 :] if complete else found
    kept |= {info.path for info in newer[-_SPARE_INCOMPLETE:]}
    gone = [info for info in found if info.path not in kept and not info.is_held(clock())]
    if any(info.complete for info in gone):
        best = _of_highest_step(complete)
        gone = [info for info in gone if info.path != best]
    holders = _holders(directory, gone)
    deleted: list[str] = []
    for info in gone:
        folder = Folder(info.path)
        # What says that somebody reads or writes may have come since.
        now = _info(info.path, info.number, frozenset(folder.names()))
        if now.is_held(clock()) or now.is_written(holders, clock()) or now.complete != info.complete:
            continue
        folder.remove(MANIFEST)  # first, so that what is left halfway is no checkpoint
        folder.remove_all()
        deleted.append(info.path)
    return deleted


def _of_highest_step(complete: Sequence[CheckpointInfo]) -> str:
    """Path of the newest of those with the highest step; of those that cannot be read, none."""
    best, highest = "", -1
    for info in complete:
        with suppress(CheckpointError):
            step = read_manifest(info.path).global_step
            if step >= highest:
                best, highest = info.path, step
    return best


def _holders(directory: str, found: Collection[CheckpointInfo]) -> dict[tuple[int, int], str]:
    """Lives of the PS that these checkpoints say are writing."""
    writers = {
        (int(match[1]), int(match[2])) for info in found for match in map(_SAVING.fullmatch, info.names) if match
    }
    lives: dict[tuple[int, int], str] = {}
    for index, count in writers:
        life = read_holder(directory, index, count)
        if life is not None:
            lives[index, count] = life
    return lives


def _pack(kind: str, body: Mapping[str, Any]) -> bytes:
    """JSON with its own checksum: a flipped digit in a manifest is damage like any other."""
    content = {"format": kind, "version": VERSION, **body}
    content["crc32c"] = _checksum(content)
    return json.dumps(content, indent=1).encode() + b"\n"


def _unpack(where: str, kind: str, raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
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
        part = Part(
            shard_index=_count(body["shard_index"]),
            shard_count=_count(body["shard_count"]),
            global_step=_count(body["global_step"]),
            incarnation=_count(body["incarnation"]),
            finished_unix_s=_seconds(body["finished_unix_s"]),
            began_unix_s=_seconds(body.get("began_unix_s", 0.0)),
            life=str(body.get("life", "")),
            files=tuple(_file(file) for file in body["files"]),
        )
        if part.shard_index >= part.shard_count:
            raise ValueError(f"PS {part.shard_index} of {part.shard_count}")
        return part
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a part manifest: {error!r}") from None


def _file(body: Mapping[str, Any]) -> FileRecord:
    name, kind, table = body["name"], body["kind"], body.get("table", "")
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file in the checkpoint's directory")
    if kind not in _KINDS or not isinstance(table, str):
        raise ValueError(f"{name}: kind {kind!r} of table {table!r}")
    crc32c = _count(body["crc32c"])
    return FileRecord(
        name=name, kind=kind, bytes=_count(body["bytes"]), crc32c=crc32c, table=table, rows=_count(body.get("rows", 0))
    )


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"{value!r} where a number from 0 to 2**64 - 1 is due")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} where seconds are due")
    return float(value)

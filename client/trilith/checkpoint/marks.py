"""Marks beside and in checkpoints: which process a PS is, that it leaves, and that somebody reads or writes here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trilith.checkpoint.names import LEAVING, NUMBERED, holder_name
from trilith.checkpoint.signed import pack, unpack
from trilith.errors import CheckpointError
from trilith.folder import Folder

__all__ = ["hold", "leaving", "mark_leaving", "read_holder", "write_holder"]

HOLDER_FORMAT = "trilith-checkpoint-holder"

HELD_S = 6 * 3600
"""How long a checkpoint is kept for a reader that never says that it is done: it may have died."""

_MOST_BYTES = 1 << 16  # of a file that names one process


def write_holder(directory: str, index: int, count: int, life: str) -> None:
    """Say beside the checkpoints which process PS `index` of `count` is: parts of any other no longer count."""
    folder = Folder(directory)
    folder.write(holder_name(index, count), pack(HOLDER_FORMAT, {"life": life}))
    _unmark_leaving(folder, index, count)


def read_holder(directory: str, index: int, count: int) -> str | None:
    """The life of the process that PS `index` of `count` is; None if nobody has said, or not so that it can be read."""
    folder, name = Folder(directory), holder_name(index, count)
    try:
        return str(unpack(folder.path(name), HOLDER_FORMAT, folder.read(name, most=_MOST_BYTES))["life"])
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
        match = LEAVING.fullmatch(name)
        if match is not None and (int(match[1]), int(match[2])) == (index, count) and name != but:
            folder.remove(name)


def leaving(directory: str, count: int) -> dict[int, int]:
    """Number of the checkpoint with which each of the PS that have left, or are about to, ends."""
    marks = filter(None, map(LEAVING.fullmatch, Folder(directory).names()))
    return {int(match[1]): int(match[3]) for match in marks if int(match[2]) == count}


@contextmanager
def hold(path: str, *, seconds: float = HELD_S, clock: Callable[[], float] = time.time) -> Iterator[None]:
    """Keep the checkpoint at `path` from being pruned while it is read or written, for `seconds` at most.

    Only numbered ones are ever pruned, others need nothing. Where nothing can be written, it is read all the same, and
    may be pruned meanwhile.
    """
    folder = Folder(path)
    if not NUMBERED.fullmatch(folder.url.rstrip("/").rpartition("/")[2]):
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

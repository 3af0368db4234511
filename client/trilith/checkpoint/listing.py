"""The checkpoints of a directory: in the order they were begun, and which of them may go."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from trilith.checkpoint.manifest import MANIFEST, read_manifest
from trilith.checkpoint.marks import read_holder
from trilith.checkpoint.names import HELD, NUMBERED, ORDER, SAVING
from trilith.errors import CheckpointError
from trilith.folder import Folder

__all__ = ["CheckpointInfo", "list_checkpoints", "mark_order", "newest_complete", "next_number", "next_order", "prune"]

_SAVING_S = 24 * 3600
_SPARE_INCOMPLETE = 2


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
        held = (HELD.fullmatch(name) for name in self.names)
        return any(match is not None and int(match[1]) > now for match in held)

    def is_written(self, holders: Mapping[tuple[int, int], str], now: float) -> bool:
        """Whether a process is writing its part.

        `holders` are the lives of PS (index, count) that are known; of one that is not, a day is believed.
        """
        for match in filter(None, map(SAVING.fullmatch, self.names)):
            life = holders.get((int(match[1]), int(match[2])))
            if life == match[3] or (life is None and now < self.number / 1000 + _SAVING_S):
                return True
        return False


def list_checkpoints(directory: str) -> list[CheckpointInfo]:
    """The numbered checkpoints below `directory`, oldest first, incomplete ones included."""
    folder = Folder(directory)
    found: list[CheckpointInfo] = []
    for name in folder.names():
        if match := NUMBERED.fullmatch(name):
            child = folder.child(name)
            found.append(_info(child.url, int(match.group(1)), frozenset(child.names())))
    return sorted(found, key=lambda info: (info.order, info.number))


def _info(path: str, number: int, names: frozenset[str]) -> CheckpointInfo:
    marks = [match for match in map(ORDER.fullmatch, names) if match is not None]
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
    writers = {(int(match[1]), int(match[2])) for info in found for match in map(SAVING.fullmatch, info.names) if match}
    lives: dict[tuple[int, int], str] = {}
    for index, count in writers:
        life = read_holder(directory, index, count)
        if life is not None:
            lives[index, count] = life
    return lives

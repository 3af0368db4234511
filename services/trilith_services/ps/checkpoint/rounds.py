"""Rounds: how the PS of a cluster agree, through the checkpoint directory alone, which checkpoint they write next.

A round is a checkpoint in which all PS take part by themselves. Nobody begins one while another waits for parts: who
comes late finds it and joins, so a round takes as long as its slowest PS, and every round becomes complete. Only a PS
that has started since begins another one. Should several have been begun at once, all join the last one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trilith import checkpoint
from trilith.checkpoint import CheckpointInfo
from trilith.errors import CheckpointError
from trilith.folder import Folder

__all__ = ["Rounds"]

log = logging.getLogger(__name__)


class Rounds:
    """One PS's view of the rounds below a directory; not thread-safe."""

    def __init__(
        self,
        directory: str,
        index: int,
        count: int,
        life: str,
        *,
        keep: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Look at nothing yet.

        Args:
            directory: Where checkpoints go, the same for all PS; any fsspec URL.
            index: Which PS this is.
            count: Of how many.
            life: Names this process.
            keep: Complete checkpoints to keep.
            clock: Source of Unix seconds.
        """
        self._folder = Folder(directory)
        self._index = index
        self._count = count
        self._life = life
        self._keep = keep
        self._clock = clock
        self._before: frozenset[int] = frozenset()  # rounds that were open when this process became the PS

    def register(self) -> None:
        """Be this PS: what an earlier process of it has written or still writes no longer counts.

        Rounds that wait for parts now are not joined by this process. After a stop of the whole cluster they may hold
        parts from before the last changes of PS that have not started again yet: with a part of this one they would be
        complete, and newer than what this one restores.
        """
        checkpoint.write_holder(self._folder.url, self._index, self._count, self._life)
        found = checkpoint.list_checkpoints(self._folder.url)
        self._before = frozenset(info.number for info in found if info.round and not info.complete)

    @property
    def held(self) -> bool:
        """Whether this process still is the PS, rather than one that was started after it."""
        return checkpoint.read_holder(self._folder.url, self._index, self._count) in (self._life, None)

    def path(self, number: int) -> str:
        """Directory of a checkpoint."""
        return self._folder.path(checkpoint.checkpoint_name(number))

    def newest(self) -> CheckpointInfo | None:
        """The round that was begun last, None if there was none."""
        rounds = [info for info in checkpoint.list_checkpoints(self._folder.url) if info.round]
        return rounds[-1] if rounds else None

    def open(self, info: CheckpointInfo) -> bool:
        """Whether the round waits for parts, and this process may take part in it."""
        return not info.complete and info.number not in self._before

    def has_part(self, info: CheckpointInfo) -> bool:
        """Whether this process has written its part."""
        return checkpoint.part_name(self._index, self._count, self._life) in info.names

    def begin(self, tick: int) -> int:
        """Begin a round named after `tick`, Unix milliseconds; returns its number, or that of one begun meanwhile."""
        found = checkpoint.list_checkpoints(self._folder.url)
        rounds = [info for info in found if info.round]
        if rounds and self.open(rounds[-1]):
            return rounds[-1].number
        # A directory of this tick that does not say yet what it is: another PS is about to begin the same round.
        found = [info for info in found if info.number != tick or not self.open(info)]
        number = checkpoint.next_number(found, tick)
        order = checkpoint.next_order(found, number)
        Folder(self.path(number)).write(checkpoint.round_name(order), b"")
        newest = self.newest()
        return number if newest is None else newest.number

    def join(self, number: int) -> None:
        """Make the checkpoint a round if it is none."""
        found = checkpoint.list_checkpoints(self._folder.url)
        if not any(info.number == number and info.round for info in found):
            Folder(self.path(number)).write(checkpoint.round_name(checkpoint.next_order(found, number)), b"")

    def late(self, number: int) -> list[str]:
        """Who has not written a part yet, and whether they have begun, in words."""
        names = Folder(self.path(number)).names()
        there = checkpoint.parts_there(names, self._count)
        words = []
        for index in range(self._count):
            life = checkpoint.read_holder(self._folder.url, index, self._count)
            if not [writer for writer in there.get(index, ()) if writer == life or life is None]:
                prefix = checkpoint.saving_name(index, self._count, life or "")
                writing = any(name.startswith(prefix) for name in names)
                words.append(f"PS {index} ({'still writing' if writing else 'has not begun'})")
        return words

    def complete(self, number: int, *, used: str = "") -> bool:
        """Whether the checkpoint is complete, having written its manifest and pruned if it could be completed now.

        Args:
            number: Which one.
            used: Path of a checkpoint that must not be pruned.
        """
        folder = Folder(self.path(number))
        declared = False
        while (parts := self._parts(folder)) is not None:
            # Again after writing it: another PS may have replaced its part meanwhile and declared it before this one.
            if self._is_declared(folder, parts):
                break
            checkpoint.write_manifest(folder.url, parts, clock=self._clock)
            declared = True
            log.info("checkpoint complete", extra={"path": folder.url, "step": parts[0].global_step})
        if parts is None:
            return False
        if declared:
            for path in checkpoint.prune(self._folder.url, self._keep, used=[used], clock=self._clock):
                log.info("old checkpoint deleted", extra={"path": path})
        return True

    @staticmethod
    def _is_declared(folder: Folder, parts: list[checkpoint.Part]) -> bool:
        """Whether the manifest says just this already."""
        try:
            return checkpoint.read_manifest(folder.url).parts == tuple(parts)
        except CheckpointError:
            return False

    def _parts(self, folder: Folder) -> list[checkpoint.Part] | None:
        there = checkpoint.parts_there(folder.names(), self._count)
        if len(there) < self._count:
            return None
        lives = {
            index: life
            for index in range(self._count)
            if (life := checkpoint.read_holder(self._folder.url, index, self._count)) is not None
        }
        return checkpoint.collect_parts(folder, self._count, lives=lives)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def last(self, tick: int, *, mine: int = 0) -> int:
        """The checkpoint with which this PS ends; others are told.

        Those that end together have to end with the same one, for which each writes its part after its last change:
        the last of those in which any has ended. A PS that has already left is not there for another.

        Args:
            tick: Names a new one, Unix milliseconds, if it needs one.
            mine: What this has returned before; 0: nothing.
        """
        order = {info.number: info.order for info in checkpoint.list_checkpoints(self._folder.url)}
        ends = [end for end in checkpoint.leaving(self._folder.url, self._count).values() if end in order]
        if ends:
            number = max(ends, key=lambda end: order[end])
        elif mine:
            number = mine
        else:
            newest = self.newest()
            pending = newest is not None and self.open(newest) and not self.has_part(newest)
            number = newest.number if newest is not None and pending else self.begin(tick)
        if number != mine:
            checkpoint.mark_leaving(self._folder.url, self._index, self._count, number)
        return number

    def all_leave(self, number: int) -> bool:
        """Whether all PS end with this checkpoint."""
        ends = checkpoint.leaving(self._folder.url, self._count)
        return len(ends) == self._count and set(ends.values()) == {number}

"""Periodic checkpoints of one PS, taken at the same ticks of the wall clock on every PS of a cluster.

Nobody coordinates: a checkpoint is numbered by its tick (Unix milliseconds), so all PS write into the same directory;
each writes its own files and part manifest, and whoever then finds the parts of all PS writes the manifest. Two may do
so at once; they write the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from trilith import checkpoint
from trilith.checkpoint import CheckpointInfo
from trilith.errors import InvalidRequestError
from trilith.folder import Folder
from trilith_services.ps import snapshot

if TYPE_CHECKING:
    from trilith_services.ps.store import Store

__all__ = ["Checkpointer", "restore_newest"]

log = logging.getLogger(__name__)

DEFAULT_KEEP = 3
_JOIN_LOOKS = 10
_JOIN_PAUSE_S = 0.1


def restore_newest(store: Store, directory: str) -> CheckpointInfo | None:
    """Restore the shard from the newest complete checkpoint below `directory`; None if there is none.

    Raises:
        CheckpointError: The checkpoint is damaged. An older one is not taken silently: move the damaged directory away
            to start from the one before.
    """
    newest = checkpoint.newest_complete(directory)
    if newest is None:
        log.info("no complete checkpoint: starting empty", extra={"directory": directory})
        return None
    response = snapshot.restore_shard(store, newest.path)
    store.restored_from = newest.path
    store.restored_step = response.global_step
    return newest


class Checkpointer:
    """Writes this PS's part at every tick, completes checkpoints and deletes old ones, on a thread of its own.

    A failed save is logged and counted, and tried again at the next tick: training goes on. `stop` ends the thread when
    a save in progress is done, and can write a last checkpoint for what came after.
    """

    def __init__(
        self,
        store: Store,
        directory: str,
        *,
        every_s: float,
        keep: int = DEFAULT_KEEP,
        clock: Callable[[], float] = time.time,
        observe: Callable[[float, int, bool], None] | None = None,
    ) -> None:
        """Make one; `start` starts it.

        Args:
            store: The shard.
            directory: Where checkpoints go, the same for all PS; any fsspec URL.
            every_s: Seconds between ticks, the same for all PS. 0: only the last checkpoint, at `stop`.
            keep: Complete checkpoints to keep.
            clock: Source of Unix seconds.
            observe: Called after each save with its seconds, its bytes and whether it succeeded.
        """
        if every_s < 0:
            raise InvalidRequestError(f"checkpoints every {every_s} s; 0 or more is needed")
        if keep < 1:
            raise InvalidRequestError(f"keep={keep} checkpoints; at least 1 is needed")
        self._store = store
        self._folder = Folder(directory)
        self._every_ms = round(every_s * 1000)
        self._keep = keep
        self._clock = clock
        self._observe = observe
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._incomplete: int | None = None
        self._since = clock()
        self._due = 0  # the tick to write next, once there are ticks

    def start(self) -> None:
        """Begin to write at every tick from now on."""
        self._since = self._clock()
        if self._every_ms:
            self._due = self._number_after(self._since)
            self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)
            self._thread.start()

    def stop(self, *, final: bool = True) -> bool:
        """End the thread; with `final`, write the next tick's checkpoint now. Returns False if that failed.

        The PS of a cluster that stops as a whole complete a last checkpoint together: with ticks, each writes the tick
        it has not written yet; without, it joins a checkpoint that another PS has begun. A PS that stops alone leaves
        its part for the others to complete at that tick.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return not final or self._write_last()

    def _write_last(self) -> bool:
        now = self._clock()
        if self._every_ms:
            return self.write(self._due or self._number_after(now))
        number = self._begun_by_others(after=int(self._since * 1000)) or self._number_after(now)
        written = self.write(number)
        # Another PS may have looked for this one's before it was there, on the other side of a tick.
        for _ in range(_JOIN_LOOKS):
            if self._incomplete is None or not written:
                break
            later = self._begun_by_others(after=number)
            if later is not None:
                return self.write(later)
            time.sleep(_JOIN_PAUSE_S)
            self._complete_late()
        return written

    def _begun_by_others(self, *, after: int) -> int | None:
        """The newest checkpoint above `after` that is neither complete nor has this PS's part."""
        own = checkpoint.part_name(self._store.index, self._store.count)
        for info in reversed(checkpoint.list_checkpoints(self._folder.url)):
            if info.number > after and not info.complete and not Folder(info.path).exists(own):
                return info.number
        return None

    def halt(self) -> None:
        """Begin no more saves; one in progress is not waited for."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause(self._due)):
            self._complete_late()
            if self._clock() * 1000 >= self._due:
                self.write(self._due)
                self._due = self._number_after(self._clock())

    def _number_after(self, now: float) -> int:
        """The first tick later than `now`; without ticks, `now` in whole seconds, so that stopping PS may agree."""
        every = self._every_ms or 10_000
        return (int(now * 1000) // every + 1) * every

    def _pause(self, due: int) -> float:
        left = max(due / 1000 - self._clock(), 0.0)
        # While the other PS may still be writing, look whether they are done.
        return min(left, 0.5) if self._incomplete is not None else left

    def write(self, number: int) -> bool:
        """Write this PS's part of checkpoint `number`, and the manifest if it was the last part."""
        path = self._folder.path(checkpoint.checkpoint_name(number))
        started = time.perf_counter()
        try:
            response = snapshot.save_shard(self._store, path, clock=self._clock)
        except Exception:
            # Anything: a full disk, a bucket that refuses. A PS outlives its backups.
            last = self._stopping.is_set()
            then = "what was written since the one before is lost" if last else "the next tick tries again"
            log.exception("checkpoint failed; %s", then, extra={"path": path})
            self._report(time.perf_counter() - started, 0, succeeded=False)
            return False
        self._store.last_checkpoint = path
        self._store.last_checkpoint_time = self._clock()
        self._report(time.perf_counter() - started, sum(file.bytes for file in response.files), succeeded=True)
        if self._incomplete is not None and self._incomplete != number:
            log.warning(
                "a checkpoint stays incomplete: a PS was away then, or has another --checkpoint-dir or "
                "--checkpoint-every",
                extra={"path": self._folder.path(checkpoint.checkpoint_name(self._incomplete))},
            )
        self._incomplete = number
        self._complete_late()
        return True

    def _report(self, seconds: float, size: int, *, succeeded: bool) -> None:
        if self._observe is not None:
            self._observe(seconds, size, succeeded)

    def _complete_late(self) -> None:
        """Write the manifest of the latest checkpoint if all parts are there, and delete what is too old."""
        if self._incomplete is None:
            return
        number = self._incomplete
        folder = self._folder.child(checkpoint.checkpoint_name(number))
        try:
            parts = checkpoint.collect_parts(folder, self._store.count)
            if parts is None:
                return
            if not self._is_declared(folder, parts):
                checkpoint.write_manifest(folder.url, parts, clock=self._clock)
                log.info("checkpoint complete", extra={"path": folder.url, "step": parts[0].global_step})
            self._incomplete = None
            for path in checkpoint.prune(self._folder.url, self._keep):
                log.info("old checkpoint deleted", extra={"path": path})
        except Exception:
            log.exception("checkpoint could not be completed; trying again", extra={"path": folder.url})

    @staticmethod
    def _is_declared(folder: Folder, parts: list[checkpoint.Part]) -> bool:
        """Whether the manifest says just this already."""
        if not folder.exists(checkpoint.MANIFEST):
            return False
        return checkpoint.read_manifest(folder.url).parts == tuple(parts)

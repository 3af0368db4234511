"""Periodic checkpoints of one PS, together with those of the other PS of its cluster.

Nobody coordinates: a checkpoint is named after its tick of the wall clock (Unix milliseconds), so all PS write into the
same directory; each writes its own files and part manifest, and whoever writes the last part writes the manifest. The
next one is begun at the first tick after that: the slowest PS sets the pace, and every checkpoint becomes complete.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from trilith import checkpoint
from trilith.checkpoint import CheckpointInfo
from trilith.errors import CheckpointError, InvalidRequestError, TrilithError
from trilith_services.ps.checkpoint import snapshot
from trilith_services.ps.checkpoint.rounds import Rounds

if TYPE_CHECKING:
    from trilith_services.ps.engine.store import Store

__all__ = ["Checkpointer", "restore_newest"]

log = logging.getLogger(__name__)

DEFAULT_KEEP = 3
# While the other PS may still be writing, look whether they are done: seldom, if there are many.
_FIRST_LOOK_S = 0.1
_LAST_LOOK_S = 5.0
_LEAVING_S = 2.0
_LATE_S = 10.0


def restore_newest(store: Store, directory: str) -> CheckpointInfo | None:
    """Restore the shard from the newest complete checkpoint below `directory`; None if there is none.

    The PS of a cluster that starts choose the same one: to be complete, a newer one would need a part of each of them
    (`Checkpointer.register` comes first, so that parts of earlier processes do not count).

    Raises:
        CheckpointError: The checkpoint is damaged. An older one is not taken silently: move the damaged directory away
            to start from the one before.
    """
    newest = checkpoint.newest_complete(directory)
    if newest is None:
        log.info("no complete checkpoint: starting empty", extra={"directory": directory})
        return None
    snapshot.restore_shard(store, newest.path)
    return newest


class Checkpointer:
    """Writes this PS's parts, completes checkpoints and deletes old ones, on a thread of its own.

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
        completed: Callable[[float], None] | None = None,
    ) -> None:
        """Make one; `start` starts it.

        Args:
            store: The shard.
            directory: Where checkpoints go, the same for all PS; any fsspec URL.
            every_s: Seconds between ticks, the same for all PS. 0: only the last checkpoint, at `stop`.
            keep: Complete checkpoints to keep.
            clock: Source of Unix seconds.
            observe: Called after each save with its seconds, its bytes and whether it succeeded.
            completed: Called with the time, Unix seconds, at which the newest complete checkpoint became so.
        """
        if every_s < 0:
            raise InvalidRequestError(f"checkpoints every {every_s} s; 0 or more is needed")
        if keep < 1:
            raise InvalidRequestError(f"keep={keep} checkpoints; at least 1 is needed")
        self._store = store
        self._rounds = Rounds(directory, store.index, store.count, store.life, keep=keep, clock=clock)
        self._every_ms = round(every_s * 1000)
        self._clock = clock
        self._observe = observe
        self._completed = completed
        self.last = "", 0.0
        """The newest checkpoint of which this PS has written its part: its path, and when, Unix seconds."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._registered = False
        self._replaced = False
        self._unsure = True  # whether there may be a round that waits for parts
        self._known = -1  # number of the last round that is complete
        self._due = 0  # when to begin the next one, Unix milliseconds
        self._looks = 0  # at the round that is waited for
        self._waiting_since = 0.0
        self._told_late = 0

    def register(self) -> None:
        """Be this PS from now on, for all that write here; before the shard is restored."""
        self._rounds.register()
        self._registered = True

    def start(self) -> None:
        """Begin to write at every tick from now on."""
        if not self._registered:
            self.register()
        self._due = self._tick_after(self._clock())
        if self._every_ms:
            self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)
            self._thread.start()

    def stop(self, *, final: bool = True) -> bool:
        """End the thread; with `final`, write a last checkpoint now. Returns False if that failed.

        The PS of a cluster that stops as a whole complete a last checkpoint together, in which each has its part as of
        its end. A PS that stops alone leaves its part for the others to complete at their next tick.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not final or self._replaced:
            return True
        try:
            if not self._rounds.held:
                self._leave_to_other()
                return True
            return self._write_last()
        except Exception:
            log.exception("the last checkpoint failed; what was written since the one before is lost")
            return False

    def _write_last(self) -> bool:
        number, pause = 0, _FIRST_LOOK_S
        left = _LEAVING_S
        while True:
            last = self._rounds.last(self._tick_after(self._clock()), mine=number)
            if last != number:
                if not self.write(last):
                    return False
                number, left = last, _LEAVING_S
            complete = self._complete(number)
            # Another PS may have looked for this one's before it was there, and have begun another.
            if complete and (self._store.count == 1 or self._rounds.all_leave(number)):
                return True
            if left <= 0:
                if not complete:
                    late = ", ".join(self._rounds.late(number))
                    log.warning("the last checkpoint is left to others: it waits for %s", late)
                return True
            time.sleep(pause)
            left -= pause
            pause = min(2 * pause, 1.0)

    def halt(self) -> None:
        """Begin no more saves; one in progress is not waited for, and does not count."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause()):
            pass

    def _pause(self) -> float:
        try:
            return self.turn()
        except TrilithError as error:
            log.error("checkpoints cannot be looked after; trying again: %s", error)
        except Exception:
            log.exception("checkpoints cannot be looked after; trying again")
        return min(_LAST_LOOK_S, self._every_ms / 1000)

    def turn(self) -> float:
        """Do what is due, one save at most; returns the seconds until there may be more to do."""
        now = self._clock()
        every_s = self._every_ms / 1000
        if self._due / 1000 - now > every_s:  # the clock was set back
            self._due = self._tick_after(now)
        if not self._unsure and now * 1000 < self._due:
            return self._due / 1000 - now
        if not self._rounds.held:
            self._leave_to_other()
            return every_s
        newest = self._rounds.newest()
        # Others wait in a round that this process may not join: they need another one now.
        awaited = newest is not None and not newest.complete and not self._rounds.open(newest)
        if newest is not None and not newest.complete and not awaited:
            self._unsure = True
            if not self._rounds.has_part(newest):
                return 0.0 if self.write(newest.number) else every_s
            if not self._finish(newest, now):
                return self._wait(newest.number, now)
        if newest is not None and newest.number != self._known and not awaited:
            self._note(newest)
        self._unsure = False
        if now * 1000 < self._due and not awaited:
            return self._due / 1000 - now
        number = self._rounds.begin(int(now * 1000) // self._every_ms * self._every_ms)
        self._due = self._tick_after(now)
        self._unsure = True
        return 0.0 if self.write(number) else every_s

    def _finish(self, newest: CheckpointInfo, now: float) -> bool:
        """Complete the round if all parts are there: whoever wrote the last has done so, unless it died."""
        self._looks += 1
        if self._looks == 1:
            self._waiting_since = now
        due = self._looks >= (1 if self._store.index == 0 else 3)
        return due and self._rounds.complete(newest.number, used=self._store.restored_from)

    def _wait(self, number: int, now: float) -> float:
        late_s = max(_LATE_S, self._every_ms / 1000)
        if now - self._waiting_since > late_s and self._told_late != number:
            self._told_late = number
            log.warning(
                "a checkpoint waits for %s; its other parts are there since %.0f s. A PS that never begins is away, or "
                "has another --checkpoint-dir, or no --checkpoint-every",
                ", ".join(self._rounds.late(number)),
                now - self._waiting_since,
                extra={"path": self._rounds.path(number)},
            )
        return float(min(_FIRST_LOOK_S * 2 ** min(self._looks, 10), _LAST_LOOK_S, max(self._every_ms / 2000, 0.05)))

    def _note(self, newest: CheckpointInfo) -> None:
        """A round has become complete: the next one is due at the first tick after that."""
        self._known = newest.number
        self._looks = 0
        try:
            created = checkpoint.read_manifest(newest.path).created_unix_s
        except CheckpointError:  # pruned meanwhile, or damaged: no reason not to write the next one
            created = self._clock()
        if self._completed is not None:
            self._completed(created)
        self._due = max(self._due, self._tick_after(min(created, self._clock())))

    def _leave_to_other(self) -> None:
        log.error(
            "another process has been started as PS %d of %d with this --checkpoint-dir: its checkpoints count, and "
            "this one writes no more",
            self._store.index,
            self._store.count,
        )
        self._replaced = True
        self._stopping.set()

    def _tick_after(self, now: float) -> int:
        """The first tick later than `now`, Unix milliseconds; without ticks, one of every ten seconds."""
        every = self._every_ms or 10_000
        return (int(now * 1000) // every + 1) * every

    def write(self, number: int) -> bool:
        """Write this PS's part of checkpoint `number`, and the manifest if it was the last part."""
        path = self._rounds.path(number)
        started = time.perf_counter()
        try:
            self._rounds.join(number)
            response = snapshot.save_shard(self._store, path, clock=self._clock)
        except Exception as error:
            # Anything: a full disk, a bucket that refuses. A PS outlives its backups.
            last = self._stopping.is_set()
            then = "what was written since the one before is lost" if last else "the next tick tries again"
            log.error(
                "checkpoint failed; %s: %s",
                then,
                error,
                extra={"path": path},
                exc_info=None if isinstance(error, TrilithError | OSError) else error,
            )
            self._report(time.perf_counter() - started, 0, succeeded=False)
            return False
        self.last = path, self._clock()
        self._report(time.perf_counter() - started, sum(file.bytes for file in response.files), succeeded=True)
        self._looks = 0
        self._complete(number)
        return True

    def _report(self, seconds: float, size: int, *, succeeded: bool) -> None:
        if self._observe is not None:
            self._observe(seconds, size, succeeded)

    def _complete(self, number: int) -> bool:
        try:
            return self._rounds.complete(number, used=self._store.restored_from)
        except TrilithError as error:
            log.error("checkpoint could not be completed: %s", error, extra={"path": self._rounds.path(number)})
        except Exception:
            log.exception("checkpoint could not be completed", extra={"path": self._rounds.path(number)})
        return False

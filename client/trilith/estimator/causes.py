"""Why a rank ended, told to the others of a job before it leaves.

The cause goes into the store where the processes met. That is rank 0's own, unless torchrun holds it, and gone with
rank 0: so every rank looks there now and then while it trains, and rank 0 leaves when all have heard why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

__all__ = ["Causes"]

log = logging.getLogger(__name__)

_CAUSE, _HEARD = "trilith/cause", "trilith/heard"
_LOOK_S = 0.5
_LINGER_S = 10.0
"""How long rank 0 waits for others to hear, of whom some may be gone themselves."""


class Causes:
    """What ended a rank of a job, as one of its ranks tells and hears it; the process group must be there.

    Args:
        rank: Of this process.
        world_size: How many there are.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._size = rank, world_size
        self._found = ""
        self._said = False
        self._lock = threading.Lock()
        self._watching = False
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hear of causes inside."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="causes", daemon=True)
            self._watcher.start()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                if self._watching and self._look():
                    return
            except Exception:  # noqa: BLE001 - the store is with rank 0, which may be gone
                return

    def _look(self) -> bool:
        """Whether a cause is known, now that it was looked for."""
        with self._lock:
            if not self._found and _store().check([_CAUSE]):
                self._found = str(_store().get(_CAUSE).decode())
                self._acknowledge()
            return bool(self._found)

    def _acknowledge(self) -> None:
        """Let rank 0 know that this rank does not need its store any more."""
        if not self._said:
            self._said = True
            _store().add(_HEARD, 1)

    def tell(self, error: BaseException) -> None:
        """Say why this rank ends."""
        try:
            with self._lock:
                _store().set(_CAUSE, f"rank {self._rank} ended with {type(error).__name__}: {error}")
                self._acknowledge()
            deadline = time.monotonic() + _LINGER_S
            while self._rank == 0 and time.monotonic() < deadline and _store().add(_HEARD, 0) < self._size:
                time.sleep(_LOOK_S / 10)
        except Exception:  # as above
            log.debug("the other ranks could not be told", exc_info=True)

    def cause(self) -> str:
        """Why another rank is gone, as far as anybody knows."""
        try:
            self._look()
        except Exception:  # noqa: BLE001 - as above
            return self._found or "another rank is gone, and so is rank 0, whose log says more"
        return self._found or "another rank is gone without a word, as a process does that is killed"


def _store() -> Any:
    """Where the processes met."""
    return distributed.distributed_c10d._get_default_store()

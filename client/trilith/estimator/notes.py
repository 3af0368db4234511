"""Notes of workers that do not wait for each other: where each is, that it is there, and who stops all of them.

They are files in the folder `workers` of a run's model_dir:

    rank-00001-of-00002.json    position of a worker that saves no checkpoint, and the cluster's step that it belongs to
    chief.json                  which start of the chief's the run is at, and that the chief is there
    stop.json                   why the workers of a run were told to stop, and at which start of the chief's
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trilith.estimator.state import RankState, pack_rank, unpack_rank
from trilith.folder import Folder
from trilith.runtime.waiting import Wait

__all__ = ["Notes"]

log = logging.getLogger(__name__)

_CHIEF, _STOP = "chief.json", "stop.json"
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Note:
    """What a worker says of itself.

    Attributes:
        step: Steps of the cluster when it was written: on rows that have been put back before them it says too much.
        ended: Whether the worker has done all it was to.
        beat: Changes with every writing.
        state: Where the worker is.
    """

    step: int
    ended: bool
    beat: str
    state: RankState


class Notes:
    """The notes of one run, as one of its workers reads and writes them.

    Args:
        model_dir: Of the run.
        rank: Of this worker.
        world_size: How many there are.
    """

    def __init__(self, model_dir: str, rank: int, world_size: int) -> None:
        self._folder = Folder(model_dir).child("workers")
        self._rank, self._size = rank, world_size
        self._life = ""
        """Of this worker, where it is the chief and has begun."""
        self._mine: _Note | None = None

    # ---- the beginning -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Say that the chief begins: what stopped the run before does not concern it any more."""
        self._life = uuid.uuid4().hex
        self.beat()

    def join(self, patience_s: float) -> None:
        """Wait, where a worker finds its run stopped, for the chief to go on with it: `stopped` says whether it has.

        It may have been stopped a moment ago, by workers that began sooner than this one, or yesterday, and the chief
        is about to begin. One that gives no sign within `patience_s` is done.
        """
        if not self.stopped():
            return
        found = self._raw(_CHIEF)
        deadline = time.monotonic() + patience_s
        with Wait("rank 0 to go on with a run that was stopped", most=patience_s) as wait:
            wait.why = self.stopped()
            while self._raw(_CHIEF) == found and time.monotonic() < deadline:
                time.sleep(_LOOK_S)

    # ---- positions ---------------------------------------------------------------------------------------------------

    def write(self, state: RankState, *, step: int, ended: bool = False) -> None:
        """Say where this worker is, with the cluster at `step` and nothing on its way."""
        self._mine = _Note(step=step, ended=ended, beat="", state=state)
        self.beat()

    def beat(self) -> None:
        """Say again what was said last, so that others see this worker at work."""
        beat = uuid.uuid4().hex
        if self._life:
            self._write(_CHIEF, {"life": self._life, "beat": beat})
        if self._mine is not None:
            own = self._mine
            note = {"step": own.step, "ended": own.ended, "beat": beat, "state": pack_rank(own.state)}
            self._write(self._name(self._rank), note)

    def mine(self, step: int) -> RankState | None:
        """Where this worker was, if rows of a cluster at `step` have what it had learned until then."""
        return self._state(self._rank, step)

    def others(self, step: int) -> Iterator[tuple[int, RankState]]:
        """Where each of the others is, those left out that have said nothing which rows at `step` have learned."""
        for rank in range(self._size):
            if rank != self._rank and (state := self._state(rank, step)) is not None:
                yield rank, state

    def forget(self) -> None:
        """Remove what workers of earlier runs have left; those that are at work say it again."""
        for name in self._folder.names():
            if name.startswith("rank-"):
                self._folder.remove(name)

    def _state(self, rank: int, step: int) -> RankState | None:
        note = self._read(rank)
        return note.state if note is not None and note.step <= step else None

    def _read(self, rank: int) -> _Note | None:
        try:
            body = json.loads(self._folder.read(self._name(rank)))
            return _Note(**body | {"state": unpack_rank(body["state"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            # The worker goes on at its place in the checkpoint, then.
            log.warning("%s is damaged, and left out: %r", self._folder.path(self._name(rank)), error)
            return None

    def _name(self, rank: int) -> str:
        return f"rank-{rank:05d}-of-{self._size:05d}.json"

    # ---- the end -----------------------------------------------------------------------------------------------------

    def wait_for_others(self, patience_s: float, until: Callable[[], bool]) -> list[int]:
        """Wait until all others have ended, or `until`; returns ranks that gave no sign of life for `patience_s`."""
        seen: dict[int, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in range(self._size)}
        del seen[self._rank]
        lost: list[int] = []
        with Wait("the other workers to end", most=f"{patience_s:g} s without a sign of them") as wait:
            while seen and not until():
                self.beat()
                for rank, (beat, since) in list(seen.items()):
                    note = self._read(rank)
                    if note is not None and note.ended:
                        del seen[rank]
                    elif note is not None and note.beat != beat:
                        seen[rank] = note.beat, time.monotonic()
                    elif time.monotonic() - since > patience_s:
                        lost.append(rank)
                        del seen[rank]
                wait.why = f"at work: ranks {sorted(seen)}"
                if seen:
                    time.sleep(_LOOK_S)
        return lost

    def stop(self, reason: str) -> None:
        """Tell all workers to stop that have begun, or do before the chief begins again."""
        self._write(_STOP, {"life": self._said(_CHIEF).get("life", ""), "reason": reason})

    def stopped(self) -> str:
        """Why all were told to stop since the chief began; empty: they were not."""
        said = self._said(_STOP)
        if not said or said.get("life", "") != (self._life or self._said(_CHIEF).get("life", "")):
            return ""
        return str(said["reason"])

    # ---- files -------------------------------------------------------------------------------------------------------

    def _write(self, name: str, body: dict[str, Any]) -> None:
        self._folder.write(name, json.dumps(body).encode() + b"\n")

    def _raw(self, name: str) -> bytes:
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            return b""

    def _said(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self._raw(name) or b"{}"))

"""Control: what an operator asks of a run while it trains, by files in the folder `control` of its model_dir.

run.json            there is a run, whose chief looks into this folder
request-ID.json     what is asked; whoever asks writes and removes it
answer-ID.json      what came of it; the chief writes it, and whoever asked removes it
paused.json         workers are to wait after their step
waits-00001.json    a worker that does, of those that do not meet
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, get_args

from trilith.errors import CheckpointError, DeadlineExceededError, InvalidRequestError
from trilith.folder import Folder
from trilith.runtime.waiting import Wait

__all__ = ["Action", "Answer", "Control", "ask"]

log = logging.getLogger(__name__)

Action = Literal["status", "pause", "resume", "save", "stop"]

_FOLDER, _RUN, _PAUSED = "control", "run.json", "paused.json"
_REQUEST, _ANSWER, _WAITS = "request-", "answer-", "waits-"
_LOOK_S, _LOOK_FAR_S = 0.25, 2.0
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        done: Whether what was asked is done, or will be after the step.
        said: In words.
        status: Figures of the run by name.
    """

    done: bool
    said: str
    status: Mapping[str, Any] = field(default_factory=dict)


class Control:
    """A worker's side: a thread that looks into the folder while the worker trains.

    Args:
        model_dir: Of the run.
        rank: Of this worker.
        chief: Whether it answers; others look whether they are to wait.
        status: Figures of the run, by name; called by the thread.
    """

    def __init__(self, model_dir: str, rank: int, *, chief: bool, status: Callable[[], Mapping[str, Any]]) -> None:
        self._folder = Folder(model_dir).child(_FOLDER)
        self._rank, self._chief, self._status = rank, chief, status
        self._every_s = _LOOK_S if self._folder.local else _LOOK_FAR_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._saves: list[str] = []
        self._waits = False
        self.paused = False
        """Whether workers are to wait after their step."""
        self.stop_reason = ""
        """Why the run is to end, if it is."""

    def __enter__(self) -> Self:
        """Begin to look; what was asked of an earlier run is forgotten."""
        if self._chief:
            self._clear()
            self._write(_RUN, {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; whoever still waits for a save is told."""
        self._over.set()
        self._thread.join()
        if self._chief:
            self.saved("", "the run has ended")
            with suppress(OSError, CheckpointError):  # the run is over, whatever becomes of the folder
                self._clear(but=_ANSWER)

    @property
    def save_wanted(self) -> bool:
        """Whether somebody waits for a checkpoint."""
        return bool(self._saves)

    def saved(self, path: str, error: str = "") -> None:
        """Tell whoever waits for a checkpoint that there is one, or why not."""
        waiting, self._saves = self._saves, []
        for each in waiting:
            self._answer(each, Answer(done=not error, said=f"saved {path}" if not error else f"not saved: {error}"))

    @contextmanager
    def waits(self) -> Iterator[None]:
        """This worker waits, as it was told to."""
        name = f"{_WAITS}{self._rank:05d}.json"
        self._waits = True
        if not self._chief:
            self._write(name, {})
        try:
            yield
        finally:
            self._waits = False
            if not self._chief:
                self._folder.remove(name)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = False
        while not self._over.wait(self._every_s):
            try:
                self._look()
                failed = False
            except (OSError, CheckpointError) as error:
                if not failed:
                    log.warning("control: cannot look into %s, and goes on trying: %s", self._folder.url, error)
                failed = True

    def _look(self) -> None:
        names = self._folder.names()
        if not self._chief:
            self.paused = _PAUSED in names
            return
        for name in names:
            if name.startswith(_REQUEST) and name.endswith(".json"):
                self._take(name)

    def _take(self, name: str) -> None:
        asked = name.removeprefix(_REQUEST).removesuffix(".json")
        try:
            action = json.loads(self._folder.read(name, most=_MOST_BYTES))["action"]
        except FileNotFoundError:  # whoever asked does not wait any more
            return
        except (ValueError, TypeError, KeyError):
            action = None
        self._folder.remove(name)
        if action == "save":
            self._saves.append(asked)
        elif action in get_args(Action):
            done, said = getattr(self, f"_on_{action}")()
            self._answer(asked, Answer(done=done, said=said))
        else:
            said = f"action {action!r} is none of {', '.join(get_args(Action))}"
            self._answer(asked, Answer(done=False, said=said))

    def _on_status(self) -> tuple[bool, str]:
        return True, "paused" if self.paused else "trains"

    def _on_pause(self) -> tuple[bool, str]:
        if self.paused:
            return False, "it is paused already"
        self._write(_PAUSED, {})
        self.paused = True
        return True, "workers wait after their step"

    def _on_resume(self) -> tuple[bool, str]:
        was = self.paused
        self._folder.remove(_PAUSED)
        self.paused = False
        return True, "training goes on" if was else "it was not paused"

    def _on_stop(self) -> tuple[bool, str]:
        self.stop_reason = "trilith control stop"
        self._on_resume()
        return True, "the run ends after its step, as with SIGTERM"

    def _answer(self, asked: str, answer: Answer) -> None:
        waiting = {self._rank} if self._waits else set()
        waiting |= {int(name[len(_WAITS) :][:5]) for name in self._folder.names() if name.startswith(_WAITS)}
        status = {**self._status(), "paused": self.paused, "waiting": sorted(waiting)}
        self._write(f"{_ANSWER}{asked}.json", {"done": answer.done, "said": answer.said, "status": status})

    def _write(self, name: str, body: Mapping[str, Any]) -> None:
        self._folder.write(name, json.dumps(body).encode() + b"\n")

    def _clear(self, but: str = "\0") -> None:
        for name in self._folder.names():
            if not name.startswith(but):
                self._folder.remove(name)


def ask(model_dir: str, action: Action, *, timeout_s: float = 60.0) -> Answer:
    """Ask something of the run that trains in `model_dir`.

    Args:
        model_dir: Of the run: a directory or URL.
        action: "status"; "pause" has workers wait after their step, until "resume"; "save" a checkpoint; "stop" ends
            the run after its step, as SIGTERM does.
        timeout_s: How long the answer may take; a save takes as long as it does, and waits for the step before it.

    Raises:
        InvalidRequestError: No run trains there.
        DeadlineExceededError: There is no answer in time, and the request is taken back.
    """
    if action not in get_args(Action):
        raise InvalidRequestError(f"action {action!r} is none of {', '.join(get_args(Action))}")
    folder = Folder(model_dir).child(_FOLDER)
    if not folder.exists(_RUN):
        raise InvalidRequestError(f"no run trains in {model_dir}: there is no {folder.path(_RUN)}")
    name = uuid.uuid4().hex
    request, answer = f"{_REQUEST}{name}.json", f"{_ANSWER}{name}.json"
    folder.write(request, json.dumps({"action": action}).encode() + b"\n")
    deadline = time.monotonic() + timeout_s
    try:
        with Wait(f"the run in {model_dir} to answer", most=timeout_s):
            while not folder.exists(answer):
                if time.monotonic() > deadline:
                    raise DeadlineExceededError(
                        f"the run in {model_dir} did not answer within {timeout_s:g} s: {_who(folder)} does not run "
                        "any more, or a save waits for a long step, evaluation or export; the request is taken back"
                    )
                time.sleep(_LOOK_S)
        return Answer(**json.loads(folder.read(answer)))
    finally:
        folder.remove(request)
        folder.remove(answer)


def _who(folder: Folder) -> str:
    """Whoever was to answer."""
    try:
        run = json.loads(folder.read(_RUN))
        return f"process {run['pid']} of {run['host']}"
    except (OSError, ValueError, KeyError):
        return "its chief"

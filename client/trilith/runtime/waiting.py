"""Wait: says what somebody waits for, after three seconds and then ever less often; whoever may wait long, has one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from trilith.runtime.forks import renew_in_children

__all__ = ["Wait"]

log = logging.getLogger(__name__)

FIRST_S = 3.0
_FACTOR = 3.0
_MOST_APART_S = 60.0
_MOST_KNOWN = 10_000


class _Spoken:
    """What was spoken of in this process."""

    def __init__(self) -> None:
        self.last: dict[str, tuple[float, float]] = {}
        """By what is waited for, when it was last spoken of, by the monotonic clock, and for how many seconds not to be
        again: many may wait for the same, and who gives up may soon try again."""
        self.after_fork()
        renew_in_children(self)

    def after_fork(self) -> None:
        """Another thread may have held the lock."""
        self.lock = threading.Lock()


_SPOKEN = _Spoken()


class Wait:
    """One waiting, from `begin` (or entering) to `end`; costs a thread for as long as it lasts.

    Of what several wait for, or somebody waits for again and again, is spoken as of one waiting, until it has come.
    """

    def __init__(
        self,
        what: str,
        *,
        most: float | str | None,
        so_far_s: float = 0.0,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """Nothing begins yet.

        Args:
            what: Is waited for, and at which address.
            most: Seconds that it may take before somebody gives up, or words for that; None: there is no limit.
            so_far_s: Seconds that were waited before.
            say: Is given every line.
        """
        self.why: str | Callable[[], str] = ""
        """What is known of the cause; may change meanwhile."""
        self._what = what
        self._most = most
        self._so_far_s = so_far_s
        self._say = say
        self._began = 0.0
        self._told = False
        self._over = threading.Event()

    def begin(self) -> Self:
        """Begin to wait."""
        self._began = time.monotonic()
        threading.Thread(target=self._run, name="wait", daemon=True).start()
        return self

    def end(self, *, came: bool) -> None:
        """End; what was waited for has come, or it is given up. Only the first call counts."""
        if self._over.is_set():
            return
        self._over.set()
        if came:
            with _SPOKEN.lock:
                _SPOKEN.last.pop(self._what, None)
            if self._told:
                log.info("%s: there, after %.1f s", self._what, self._elapsed_s())

    def __enter__(self) -> Self:
        """Begin."""
        return self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        self.end(came=kind is None)

    def _elapsed_s(self) -> float:
        return self._so_far_s + time.monotonic() - self._began

    def _run(self) -> None:
        next_s = FIRST_S
        while next_s < self._so_far_s:
            next_s += _apart_s(next_s)
        while not self._over.wait(max(next_s - self._elapsed_s(), 0.0)):
            if self._is_due(_apart_s(next_s)):
                self._told = True
                self._say(self._line())
            next_s += _apart_s(next_s)

    def _is_due(self, apart_s: float) -> bool:
        now = time.monotonic()
        with _SPOKEN.lock:
            last, silent_s = _SPOKEN.last.get(self._what, (-_MOST_APART_S, 0.0))
            if now - last < 0.9 * silent_s:  # a little less: clocks are not that exact
                return False
            if len(_SPOKEN.last) >= _MOST_KNOWN:
                _SPOKEN.last.clear()
            _SPOKEN.last[self._what] = now, max(apart_s, min(_FACTOR * silent_s, _MOST_APART_S))
            return True

    def _line(self) -> str:
        why = self.why if isinstance(self.why, str) else self.why()
        why = f" ({why})" if why else ""
        if self._most is None:
            most = "for as long as it takes"
        else:
            most = self._most if isinstance(self._most, str) else f"{self._most:g} s at most"
        return f"waiting for {self._what}{why}: {self._elapsed_s():.0f} s so far, {most}"


def _apart_s(elapsed_s: float) -> float:
    return min((_FACTOR - 1.0) * elapsed_s, _MOST_APART_S)

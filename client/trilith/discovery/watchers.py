"""Watchers: who wants to hear of a state, and the state they last heard of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

__all__ = ["Watchers"]

log = logging.getLogger(__name__)

_K = TypeVar("_K")
_V = TypeVar("_V")


class Watchers(Generic[_K, _V]):
    """Delivers states, mappings, to callbacks: each new one once, in order, the current one first.

    Calls come one at a time; a callback that raises is logged and hears of the next state again.
    """

    def __init__(self, state: Mapping[_K, _V]) -> None:
        """Begin with `state`."""
        # Taken while callbacks run, so that no state overtakes another, and again by callbacks that add or stop.
        self._delivering = threading.RLock()
        self._callbacks: dict[object, Callable[[Mapping[_K, _V]], None]] = {}
        self._state = dict(state)

    @property
    def state(self) -> dict[_K, _V]:
        """A copy of the current state; never waits for callbacks."""
        return dict(self._state)

    def add(self, changed: Callable[[Mapping[_K, _V]], None]) -> Callable[[], None]:
        """Call `changed` now and with every new state, until the returned function is called."""
        key = object()
        with self._delivering:
            self._callbacks[key] = changed
            self._call(changed)

        def stop() -> None:
            with self._delivering:
                self._callbacks.pop(key, None)

        return stop

    def publish(self, state: Mapping[_K, _V]) -> None:
        """Take `state` as the current one, and tell everybody if it is another."""
        with self._delivering:
            if state == self._state:
                return
            self._state = dict(state)
            for key, changed in list(self._callbacks.items()):
                if key in self._callbacks:
                    self._call(changed)

    def _call(self, changed: Callable[[Mapping[_K, _V]], None]) -> None:
        try:
            changed(dict(self._state))
        except Exception:
            log.exception("a watcher of the directory failed")

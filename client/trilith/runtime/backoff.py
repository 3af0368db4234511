"""Backoff: how long to pause before the next attempt."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Pauses that double from one attempt to the next, each shortened by up to half at random.

    So whoever lost the same server does not come back in step with the others.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        """Begin with a pause of about `first_s` seconds; none is longer than `most_s`, but for the first."""
        self._first_s, self._most_s = first_s, most_s
        self._pause_s = first_s

    def next_s(self) -> float:
        """Seconds to pause now."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._most_s)
        return pause_s * (0.5 + 0.5 * random.random())

    def reset(self) -> None:
        """Begin anew after an attempt that succeeded."""
        self._pause_s = self._first_s

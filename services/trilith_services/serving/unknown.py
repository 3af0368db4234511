"""What becomes of features in requests that the model does not know: refused, or left out and counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from trilith.data.records import Records
from trilith.nn.requests import names_of
from trilith_services.serving.json_records import unknown_feature

__all__ = ["UnknownFeatures", "UnknownPolicy"]

log = logging.getLogger(__name__)

_TOLD_EVERY_S = 10.0


class UnknownPolicy(StrEnum):
    """Whose unknown features are refused."""

    json = "json"
    """Those of JSON, which people write; serialized records often are logs, which hold more than a model takes."""
    refuse = "refuse"
    ignore = "ignore"


class UnknownFeatures:
    """Does as a policy says; thread-safe."""

    def __init__(self, policy: UnknownPolicy, count: Callable[[str, int], None]) -> None:
        """Count with `count`, told "json" or "records" and how many features there were."""
        self._policy = policy
        self._count = count
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._looked = -_TOLD_EVERY_S

    def in_json(self, declared: Collection[str]) -> Callable[[int, str], None]:
        """What to tell of every unknown feature of JSON records, `declared` being those that are known.

        The function raises InvalidRequestError where that is the policy.
        """

        def on_unknown(number: int, name: str) -> None:
            if self._policy is not UnknownPolicy.ignore:
                raise unknown_feature(f"record {number}", name, declared)
            self._count("json", 1)
            self._say([name])

        return on_unknown

    def in_records(self, declared: Collection[str]) -> Callable[[Records, npt.NDArray[np.int64]], None]:
        """The same for serialized records."""

        def on_unknown(records: Records, counts: npt.NDArray[np.int64]) -> None:
            if self._policy is UnknownPolicy.refuse:
                for row in np.flatnonzero(counts > 0).tolist():
                    for name in names_of(records, row):
                        if name not in declared:
                            raise unknown_feature(records.where(row), name, declared)
                return
            self._count("records", int(counts.clip(min=0).sum()))
            now = time.monotonic()
            with self._lock:
                due = now - self._looked >= _TOLD_EVERY_S
                if due:
                    self._looked = now
            if due:
                self._say([name for name in names_of(records, int(counts.argmax())) if name not in declared])

        return on_unknown

    def _say(self, names: list[str]) -> None:
        """Name in the log what was not named before, up to a thousand."""
        with self._lock:
            fresh = sorted(set(names) - self._told)[: 1000 - len(self._told)]
            self._told |= set(fresh)
        if fresh:
            log.info("requests have features that the model does not know", extra={"features": fresh[:20]})

"""Which checkpoints of a run there are, the name of the next one, and which old ones are removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from trilith.checkpoint import (
    CheckpointInfo,
    checkpoint_name,
    list_checkpoints,
    mark_order,
    next_number,
    prune,
)
from trilith.errors import InvalidRequestError
from trilith.estimator.callbacks import BestByMetric
from trilith.estimator.config import RunConfig
from trilith.estimator.state import is_job
from trilith.folder import Folder

__all__ = ["Keeper", "newest_job"]

_DENSE_ONLY = "dense_only"
"""The folder of a model_dir that has the saves of the dense part alone."""

_MS_PER_HOUR = 3_600_000


class Keeper:
    """The checkpoints of a run, by its keep rules.

    Args:
        run: Has the rules.
        clock: Unix seconds.
    """

    def __init__(self, run: RunConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._run = run
        self._clock = clock
        self._known = {newest_job(run.model_dir) if run.model_dir else None}
        self.best: BestByMetric | None = None
        """Knows the best ones; to be told of evaluations and saves."""
        if run.keep_best:
            self.best = BestByMetric(run.keep_best, mode=run.keep_best_mode or None, count=run.keep_best_count)

    def next_path(self) -> str:
        """Where the next checkpoint goes.

        Raises:
            InvalidRequestError: Another run saves in the same directory: the newest checkpoint is none of this one.
        """
        there = list_checkpoints(self._run.model_dir)
        newest = _newest_job(there)
        if newest is not None and newest not in self._known:
            raise InvalidRequestError(
                f"model_dir={self._run.model_dir}: another run saves there, too: {newest} is none of this one's; "
                "let one run go on, or give each a model_dir of its own"
            )
        number = next_number(there, int(self._clock() * 1000))
        path = Folder(self._run.model_dir).child(checkpoint_name(number)).url  # as checkpoints are listed
        mark_order(path, there, number)
        self._known.add(path)
        return path

    def next_dense_path(self) -> str:
        """Where the next save of the dense part alone goes."""
        folder = self._dense_folder
        return folder.child(checkpoint_name(next_number(list_checkpoints(folder.url), int(self._clock() * 1000)))).url

    def prune_dense(self) -> None:
        """Remove old saves of the dense part alone; as many stay as `keep_newest` says."""
        for info in list_checkpoints(self._dense_folder.url)[: -self._run.keep_newest]:
            Folder(info.path).remove_all()

    @property
    def _dense_folder(self) -> Folder:
        return Folder(self._run.model_dir).child(_DENSE_ONLY)

    def prune(self, newest: str) -> list[str]:
        """Remove what no rule keeps; returns which. `newest`, and the checkpoint of the highest step, stay."""
        run = self._run
        complete = [info for info in list_checkpoints(run.model_dir) if info.complete]
        kept = {newest} | {info.path for info in complete if info.path.rpartition("/")[2] in run.keep_exempt}
        if self.best is not None:
            kept |= self.best.paths
        if run.keep_every_hours:
            first: dict[int, str] = {}
            for info in complete:
                first.setdefault(int(info.number // (run.keep_every_hours * _MS_PER_HOUR)), info.path)
            kept |= set(first.values())
        others = [info.path for info in complete if info.path not in kept - {newest}]
        return prune(run.model_dir, 1, used=kept | set(others[-run.keep_newest :]))


def newest_job(directory: str) -> str | None:
    """The newest complete checkpoint that holds a job."""
    return _newest_job(list_checkpoints(directory))


def _newest_job(there: Sequence[CheckpointInfo]) -> str | None:
    for info in reversed(there):
        if info.complete and is_job(info.path):
            return info.path
    return None

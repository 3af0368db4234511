"""A dataset as torch's DataLoader takes it: any number of workers, forked or spawned; each pass an epoch."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from trilith.data.workers import torch_worker

if TYPE_CHECKING:
    from trilith.data.dataset import Dataset, DatasetIterator

__all__ = ["TorchDataset"]


class _Passes:
    """Numbers the passes over a dataset, also where each is made by several processes that know nothing of each other.

    A pass has a name that its processes agree upon. Who begins it first takes the next free number by making a symbolic
    link of that number to the name, which succeeds for one process only; the others find the name there.
    """

    def __init__(self, first: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="trilith-passes-")
        weakref.finalize(self, _remove, self._folder, os.getpid())
        self._begin = 0
        self.set(first)

    def set(self, first: int) -> None:
        """Let the next pass be number `first`, also in processes that run already."""
        self._begin += 1
        fresh = os.path.join(self._folder, "new")
        os.symlink(f"{self._begin}.{first}", fresh)
        os.replace(fresh, os.path.join(self._folder, "first"))

    def number(self, name: str) -> int:
        """The number of the pass called `name`."""
        begin, first = os.readlink(os.path.join(self._folder, "first")).split(".")
        number = int(first)
        while True:
            place = os.path.join(self._folder, f"{begin}.{number}")
            try:
                os.symlink(name, place)
            except FileExistsError:
                if os.readlink(place) != name:
                    number += 1
                    continue
            return number

    @property
    def next(self) -> int:
        """The number that the next pass will have."""
        begin, first = os.readlink(os.path.join(self._folder, "first")).split(".")
        number = int(first)
        while os.path.lexists(os.path.join(self._folder, f"{begin}.{number}")):
            number += 1
        return number


def _remove(folder: str, process: int) -> None:
    """Remove a folder in the process that made it, not in those that were forked from that."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class TorchDataset(IterableDataset):  # type: ignore[type-arg]
    """What `Dataset.torch` gives; use it as `DataLoader(samples.torch(), batch_size=None, num_workers=...)`.

    Every pass is the next epoch, with any number of workers, persistent ones included.
    """

    def __init__(self, dataset: Dataset, epoch: int = 0) -> None:
        """Use `Dataset.torch`."""
        self.dataset = dataset
        self._passes = _Passes(epoch)
        self._begun = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch, and those behind it the ones that follow; call it in the main process."""
        self._passes.set(epoch)

    def __iter__(self) -> DatasetIterator:
        """The next epoch; in a DataLoader's worker its share of it."""
        self._begun += 1
        info = get_worker_info()
        # A DataLoader draws a seed for each pass, or once for persistent workers; each worker's is its number further.
        name = f"process {os.getpid()}" if info is None else f"seed {info.seed - torch_worker()[0]}"
        return self.dataset.iterate(epoch=self._passes.number(f"{name}, {self._begun}"))

    def __len__(self) -> int:
        """Elements of a pass, where that is known; several workers make up to one short batch each."""
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Workers that are spawned number their passes together with this process; any other copy by itself."""
        shared = get_spawning_popen() is not None
        passes = (self._passes._folder, self._passes._begin) if shared else self._passes.next
        return {"dataset": self.dataset, "passes": passes, "begun": self._begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.dataset, self._begun, passes = state["dataset"], state["begun"], state["passes"]
        if isinstance(passes, int):
            self._passes = _Passes(passes)
        else:
            self._passes = _Passes.__new__(_Passes)
            self._passes._folder, self._passes._begin = passes

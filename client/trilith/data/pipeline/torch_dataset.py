"""A dataset as torch's DataLoader takes it: any number of workers, forked or spawned; each pass an epoch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from multiprocessing.context import get_spawning_popen
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from trilith.errors import InvalidRequestError

__all__ = ["TorchDataset"]


class _Passes:
    """Numbers the passes over a dataset, also where each is made by several processes that know nothing of each other.

    A pass has a name that its processes agree upon. Who begins it first takes the next free number by making a symbolic
    link of that number to the name, which succeeds for one process only; the others find the name there. Processes
    that have loaders of their own, such as ranks that were forked or spawned, number their passes apart.
    """

    def __init__(self, first: int, folder: str = "") -> None:
        self.first = first
        self.folder = folder or tempfile.mkdtemp(prefix="trilith-passes-")
        if not folder:
            weakref.finalize(self, _remove, self.folder, os.getpid())

    def set(self, first: int) -> None:
        """Let the next pass of this process be number `first`, also in those of its workers that run already."""
        owner = os.getpid()
        begin, _ = self._start(owner)
        fresh = os.path.join(self.folder, f"{owner}.new")
        os.symlink(f"{begin + 1}.{first}", fresh)
        os.replace(fresh, os.path.join(self.folder, str(owner)))

    def number(self, owner: int, name: str) -> int:
        """The number of the pass called `name` of the process `owner`."""
        os.makedirs(self.folder, exist_ok=True)  # whose maker may be gone
        begin, number = self._start(owner)
        while True:
            place = self._place(owner, begin, number)
            try:
                os.symlink(name, place)
            except FileExistsError:
                if os.readlink(place) != name:
                    number += 1
                    continue
            return number

    def next(self) -> int:
        """The number that the next pass of this process will have."""
        owner = os.getpid()
        begin, number = self._start(owner)
        while os.path.lexists(self._place(owner, begin, number)):
            number += 1
        return number

    def _start(self, owner: int) -> tuple[int, int]:
        """How often numbers were set, and to which."""
        try:
            begin, first = os.readlink(os.path.join(self.folder, str(owner))).split(".")
        except FileNotFoundError:
            return 0, self.first
        return int(begin), int(first)

    def _place(self, owner: int, begin: int, number: int) -> str:
        return os.path.join(self.folder, f"{owner}.{begin}.{number}")


def _remove(folder: str, process: int) -> None:
    """Remove a folder in the process that made it, not in those that were forked from that."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class _Epochs(Protocol):
    """What gives its elements epoch by epoch: a `trilith.data.Dataset`."""

    def iterate(self, *, epoch: int) -> Iterator[Any]:
        """The elements of an epoch."""

    def __len__(self) -> int: ...


class TorchDataset(IterableDataset):  # type: ignore[type-arg]
    """What `Dataset.torch` gives; use it as `DataLoader(samples.torch(), batch_size=None, num_workers=...)`.

    Every pass is the next epoch, with any number of workers, persistent ones included.
    """

    def __init__(self, dataset: _Epochs, epoch: int = 0) -> None:
        """Use `Dataset.torch`."""
        self.dataset = dataset
        self._passes = _Passes(epoch)
        self._begun = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch, and those behind it the ones that follow; call it where the loader is."""
        if epoch < 0:
            raise InvalidRequestError(f"epoch={epoch} is below 0")
        self._passes.set(epoch)

    def __iter__(self) -> Iterator[Any]:
        """The next epoch; in a DataLoader's worker its share of it."""
        self._begun += 1
        info, parent = get_worker_info(), multiprocessing.parent_process()
        if info is None or parent is None:
            owner, name = os.getpid(), f"{self._begun}"
        else:
            # A loader draws a seed for each pass, or once for persistent workers; each worker's is its number further.
            owner, name = parent.pid or 0, f"{info.seed - info.id}, {self._begun}"
        return self.dataset.iterate(epoch=self._passes.number(owner, name))

    def __len__(self) -> int:
        """Elements of a pass, where that is known; several workers make up to one short batch each."""
        return len(self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        """Workers that are spawned number their passes together with this process; any other copy by itself."""
        spawning = get_spawning_popen() is not None
        folder, first = (self._passes.folder, self._passes.first) if spawning else ("", self._passes.next())
        return {"dataset": self.dataset, "folder": folder, "first": first, "begun": self._begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.dataset, self._begun = state["dataset"], state["begun"]
        self._passes = _Passes(state["first"], state["folder"])

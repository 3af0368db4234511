"""The processes of a job as torch sees them: the device of each, their process group, and what they agree upon."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from trilith import errors
from trilith.errors import DeadlineExceededError, InvalidRequestError, TrilithError, UnavailableError
from trilith.estimator.causes import Causes
from trilith.estimator.identity import WorkerIdentity
from trilith.nn.reduction import sum_over_ranks
from trilith.runtime.waiting import Wait

__all__ = ["Ranks", "backends", "local_device", "process_group"]

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)
"""How long a rank waits for another to agree with, which may be saving or evaluating; one that is gone is noticed at
once, for its connections close."""


def local_device(
    identity: WorkerIdentity, device: str = "auto", *, use_gpu: bool = True, processes_per_gpu: int = 1
) -> torch.device:
    """The device on which a process computes: one GPU per local rank.

    Args:
        identity: Which process this is.
        device: "cpu"; "cuda", the GPU of the local rank; "cuda:N", that one, whoever asks; or "auto", "cuda" where
            there is a GPU, else "cpu".
        use_gpu: False: the CPU, whatever `device` says.
        processes_per_gpu: How many neighbouring local ranks share a GPU.

    Raises:
        InvalidRequestError: There is no such device, or there are fewer GPUs than local ranks need.
    """
    if processes_per_gpu < 1:
        raise InvalidRequestError(f"processes_per_gpu={processes_per_gpu} is below 1")
    there = torch.cuda.device_count() if use_gpu and device != "cpu" else 0
    if not use_gpu or (device == "auto" and not there):
        return torch.device("cpu")
    try:
        wanted = torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise InvalidRequestError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    if wanted.type != "cuda":
        return wanted
    if not there:
        raise InvalidRequestError(f"device={device!r}: this machine has no CUDA device; use 'cpu' or 'auto'")
    if wanted.index is not None:
        if wanted.index >= there:
            raise InvalidRequestError(f"device={device!r}: {_gpus(there)}")
        return wanted
    index = identity.local_rank // processes_per_gpu
    if index >= there:
        raise InvalidRequestError(
            f"device={device!r}: local rank {identity.local_rank} would have GPU {index}, and {_gpus(there)}; start "
            "fewer processes, let several share one with processes_per_gpu, or say device='cpu'"
        )
    return torch.device("cuda", index)


def _gpus(there: int) -> str:
    """How many GPUs this process may use, and why no more."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    said = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return f"this process sees {there} GPU{'s' * (there != 1)}{said}, from 0"


def backends(device: torch.device) -> str:
    """What a process group needs for tensors of the CPU and of a device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(identity: WorkerIdentity, device: torch.device, *, timeout_s: float = 120.0) -> Iterator[None]:
    """Within it torch.distributed works among all processes; a group that is there already is used and left as it is.

    Under torchrun the processes meet at its agent, elsewhere at `identity.master`, where rank 0 listens. A process that
    is alone meets nobody and needs no master.

    Args:
        identity: Which process this is.
        device: Where it computes.
        timeout_s: How long the others may take to come, and then any of their collective operations.

    Raises:
        InvalidRequestError: There are several and nobody said where they meet, or there is a group already that has
            other ranks.
        DeadlineExceededError: The others did not come in time.
        UnavailableError: They could not be reached, or the master's port is taken.
    """
    if distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        if (rank, size) != (identity.rank, identity.world_size):
            raise InvalidRequestError(
                f"torch.distributed was begun as rank {rank} of {size}, and this process is rank {identity.rank} of "
                f"{identity.world_size} ({identity.source})"
            )
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _meet(identity, device, timeout_s)
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _meet(identity: WorkerIdentity, device: torch.device, timeout_s: float) -> None:
    rank, size = identity.rank, identity.world_size
    timeout = timedelta(seconds=timeout_s)
    if size == 1:
        store = distributed.HashStore()  # type: ignore[attr-defined] # torch exports it without saying so
        distributed.init_process_group(backends(device), store=store, rank=0, world_size=1, timeout=timeout)
        return
    if not identity.master:
        raise InvalidRequestError(
            f"rank {rank} of {size} does not know where rank 0 is: give master, or set MASTER_ADDR and MASTER_PORT"
        )
    # torchrun's agent listens at its own address, so nobody else may; torch finds that out by itself.
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own &= identity.master == f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    where = "env://" if own else f"tcp://{identity.master}"
    with Wait(f"all {size} workers to meet at {identity.master}", most=timeout_s):
        try:
            distributed.init_process_group(
                backends(device), init_method=where, rank=rank, world_size=size, timeout=timeout
            )
        except distributed.DistStoreError as error:
            raise DeadlineExceededError(
                f"rank {rank}: not all of {size} workers met at {identity.master} within {timeout_s:g} s "
                f"({str(error).splitlines()[0]})"
            ) from None
        except distributed.DistNetworkError as error:
            raise UnavailableError(f"rank {rank}: {identity.master}: {str(error).splitlines()[0]}") from None


class Ranks:
    """What the workers of a synchronous run agree upon; every one makes the same calls in the same order.

    A worker that is alone, or does not wait for others, agrees with itself.

    Args:
        identity: Which worker this is.
        together: Whether the workers take every step together; the process group must be there then.
    """

    def __init__(self, identity: WorkerIdentity, *, together: bool) -> None:
        self.several = together and identity.world_size > 1
        """Whether there is anybody to agree with."""
        self._me = identity
        self._group: distributed.ProcessGroup | None = None
        if self.several:
            self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._causes = Causes(identity.rank, identity.world_size)
        self._explained = False

    def beside(self) -> Ranks:
        """The same ranks for another thread, whose agreements do not meet those of this one."""
        return Ranks(self._me, together=self.several)

    def close(self) -> None:
        """Meet no more."""
        self._causes.close()
        if self._group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self._group)
        self._group = None

    # ---- agreement ---------------------------------------------------------------------------------------------------

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all ranks of as many numbers from each."""
        return sum_over_ranks(numbers, self._group) if self.several else [float(each) for each in numbers]

    def any(self, flag: bool) -> bool:
        """Whether it is so on a rank."""
        return self.sums([flag])[0] > 0

    def gather(self, text: str) -> list[str]:
        """What each rank says, in their order."""
        if not self.several:
            return [text]
        own = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        sizes = self._gathered(torch.tensor([len(text.encode())]))
        padded = torch.zeros(max(1, *(int(size) for size in sizes)), dtype=torch.uint8)
        padded[: own.numel()] = own
        said = self._gathered(padded)
        return [bytes(each[: int(size)].numpy()).decode() for size, each in zip(sizes, said, strict=True)]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        found = [torch.zeros_like(own) for _ in range(self._me.world_size)]
        distributed.all_gather(found, own, group=self._group)
        return found

    def first(self, text: str) -> str:
        """What rank 0 says."""
        return self.gather(text)[0]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What fails inside with an error of Trilith's, or of a file, on one rank fails on all, when all are through.

        The others raise an error of the same class that says which rank it was.
        """
        own: TrilithError | OSError | None = None
        try:
            yield
        except (TrilithError, OSError) as error:
            if not self.several:
                raise
            own = error
        if not self.several:
            return
        said = self.gather("" if own is None else f"{type(own).__name__}\n{own}")
        if own is not None:
            raise own
        for rank, text in enumerate(said):
            if text:
                name, _, message = text.partition("\n")
                kind = errors.BY_NAME.get(name, UnavailableError)
                raise kind(f"rank {rank}: {message}")

    # ---- the end of others -------------------------------------------------------------------------------------------

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What ends this rank inside is told to the others, which end with it in their next agreement.

        Raises:
            UnavailableError: Another rank is gone; it says why where that rank could tell.
        """
        if not self.several:
            yield
            return
        try:
            with self._causes.watched():
                yield
        except BaseException as error:
            if self._explained:
                raise
            self._explained = True
            if not _of_others(error):
                self._causes.tell(error)
                raise
            raise UnavailableError(
                f"rank {self._me.rank} of {self._me.world_size}: {self._causes.cause()}; started again, all of "
                "them go on at the newest checkpoint"
            ) from error


def _of_others(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank is gone."""
    if isinstance(error, TrilithError) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, distributed.DistError) or "gloo" in text or "Connection closed by peer" in text

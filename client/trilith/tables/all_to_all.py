"""AllToAllTables: every worker holds a shard of all tables, and ids, rows and gradients change hands in exchanges.

An exchange cuts each rank's array into one chunk per rank and gives each rank its chunks in the order of the senders.
Gradients of different ranks are neither averaged nor merged: each rank that asked for an id takes one step of it, in
the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from trilith.errors import InvalidRequestError, UnavailableError
from trilith.ops.fused_gather import fused_gather_embeddings_by_input, fused_gather_embeddings_by_input_gradient
from trilith.ops.reorder import FusedReorder, fused_reorder_by_indices

__all__ = ["AllToAllTables", "Collective", "Exchanged", "LocalTables", "TorchCollective"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Collective(Protocol):
    """What ranks need to exchange arrays; every rank makes the same calls in the same order.

    Attributes:
        rank: This one's number.
        size: Number of ranks.
    """

    rank: int
    size: int

    def all_to_all(self, values: npt.NDArray[Any], sent: Ints, received: Ints) -> npt.NDArray[Any]:
        """Send chunk b of `values`, of sent[b], to rank b; what came, of received[a] from rank a, rank by rank."""


class TorchCollective:
    """The exchange of `torch.distributed`, whose process group is up: gloo on CPUs, NCCL where the device is CUDA.

    Args:
        device: Where the backend wants tensors.
        float16: Whether float32 travels as float16.
        group: The process group; None is the default one. Threads that exchange at the same time need one each.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        float16: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if not torch.distributed.is_initialized():
            raise InvalidRequestError("torch.distributed is not initialized; call init_process_group first")
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        self._device = torch.device(device)
        self._float16 = float16
        self._group = group

    @classmethod
    def in_new_group(cls, device: torch.device | str = "cpu", *, float16: bool = False) -> TorchCollective:
        """An exchange in a process group of its own, of all ranks."""
        if not torch.distributed.is_initialized():
            raise InvalidRequestError("torch.distributed is not initialized; call init_process_group first")
        return cls(device, float16=float16, group=torch.distributed.new_group())

    def all_to_all(self, values: npt.NDArray[Any], sent: Ints, received: Ints) -> npt.NDArray[Any]:
        """See `Collective`."""
        narrow = self._float16 and values.dtype == np.float32
        given = torch.from_numpy(values.astype(np.float16) if narrow else np.ascontiguousarray(values))
        given = given.to(self._device)
        taken = given.new_empty(int(received.sum()))
        try:
            torch.distributed.all_to_all_single(taken, given, received.tolist(), sent.tolist(), group=self._group)
        except RuntimeError as error:
            raise UnavailableError(f"the other workers cannot be reached: {str(error).splitlines()[0]}") from error
        array: npt.NDArray[Any] = taken.cpu().numpy()
        return array.astype(np.float32) if narrow else array


class LocalTables(Protocol):
    """The shard of this rank: an embedded cluster's client will do."""

    def lookup(self, ids: Mapping[str, Any], /) -> Mapping[str, Floats]:
        """Per table float32[n, dim]."""

    def apply_gradients(self, updates: Mapping[str, tuple[Any, ...]], /, **options: Any) -> None:
        """One step per distinct id of a table: ids, gradients and, where repeats are counted, occurrences uint32[n]."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a lookup leaves for the step back.

    Attributes:
        reorder: This rank's ids by owner.
        sizes: int64[ranks, tables], ids that each rank asked of this one.
        ids: int64[...], those ids, rank by rank and table by table.
    """

    reorder: FusedReorder
    sizes: Ints
    ids: Ints


class AllToAllTables:
    """Tables sharded over the ranks of a collective."""

    def __init__(
        self, local: LocalTables, dims: Mapping[str, int], collective: Collective, *, count_repeats: bool = False
    ) -> None:
        """Use the tables that `local` has.

        Args:
            local: This rank's rows.
            dims: Floats per row, by table; the same on every rank.
            collective: How ranks exchange arrays.
            count_repeats: Whether it travels how often an id occurred, for tables that count occurrences.
        """
        if not dims:
            raise InvalidRequestError("at least one table is needed")
        self._local = local
        self._collective = collective
        self._count_repeats = count_repeats
        self.names = sorted(dims)
        self._dims = np.array([dims[name] for name in self.names], np.int64)

    def reorder(self, ids: Mapping[str, npt.ArrayLike]) -> FusedReorder:
        """Arrange a batch's ids by owner: a step for the input pipeline.

        Args:
            ids: By table int64[n], at least 0; a table without ids may be left out.
        """
        unknown = sorted(set(ids) - set(self.names))
        if unknown:
            raise InvalidRequestError(f"no table {unknown[0]!r}; there are {self.names}")
        lists = [np.asarray(ids.get(name, ()), np.int64) for name in self.names]
        return fused_reorder_by_indices(lists, self._collective.size, self._dims.tolist())

    def lookup(self, reorder: FusedReorder) -> tuple[dict[str, Floats], Exchanged]:
        """Bring every id's row to this rank.

        Args:
            reorder: From `reorder`.

        Returns:
            By table float32[n, dim] in the order of its ids, and what `apply_gradients` needs.
        """
        exchanged = self.send_ids(reorder)
        sent = self._sent(reorder) @ self._dims
        rows = self._collective.all_to_all(self._rows(exchanged), exchanged.sizes @ self._dims, sent)
        pieces = fused_gather_embeddings_by_input(rows, reorder.offsets(), self._dims.tolist())
        return dict(zip(self.names, pieces, strict=True)), exchanged

    def send_ids(self, reorder: FusedReorder) -> Exchanged:
        """Tell the owners which ids are meant: a lookup without rows, for gradients of ids looked up before."""
        ranks, tables = self._collective.size, len(self.names)
        counts = self._sent(reorder)
        each = np.full(ranks, tables, np.int64)
        sizes = self._collective.all_to_all(counts.reshape(-1), each, each).reshape(ranks, tables)
        ids = self._collective.all_to_all(reorder.output, counts.sum(axis=1), sizes.sum(axis=1))
        return Exchanged(reorder, sizes, ids)

    def _sent(self, reorder: FusedReorder) -> Ints:
        """int64[ranks, tables]: ids for each rank."""
        return reorder.sharded_slot_sizes.astype(np.int64).reshape(self._collective.size, len(self.names))

    def _repeats(self, reorder: FusedReorder) -> npt.NDArray[np.int32]:
        """int32[ids that travel]: how often each occurs."""
        cells = self._sent(reorder)
        widths = np.repeat(np.tile(self._dims, self._collective.size), cells.reshape(-1))
        places = np.searchsorted(np.cumsum(widths) - widths, reorder.fused_emb_offset)
        return np.bincount(places, minlength=widths.size).astype(np.int32)

    def apply_gradients(
        self,
        grads: Mapping[str, npt.ArrayLike],
        exchanged: Exchanged,
        *,
        scale: float = 1.0,
        global_step: int = 0,
        request_time: int | None = None,
    ) -> None:
        """Take this rank's gradients to the owners, and the steps that all ranks ask of this one.

        Args:
            grads: By table float32[n, dim] for the ids looked up; a table left out has zeros.
            exchanged: From `lookup`.
            scale: What all gradients are multiplied by.
            global_step: At which schedules are evaluated.
            request_time: Unix seconds; None is now.
        """
        reorder, sizes = exchanged.reorder, exchanged.sizes
        offsets, dims = reorder.offsets(), self._dims.tolist()
        counts = self._sent(reorder)
        given = [k for k, name in enumerate(self.names) if name in grads]
        flat = fused_gather_embeddings_by_input_gradient(
            int((counts @ self._dims).sum()),
            [grads[self.names[k]] for k in given],
            [offsets[k] for k in given],
            [dims[k] for k in given],
            scale=scale,
        )
        received = self._collective.all_to_all(flat, counts @ self._dims, sizes @ self._dims)
        cells = self._cells(exchanged)
        floats = np.split(received, np.cumsum((sizes * self._dims).reshape(-1))[:-1])
        repeats: list[tuple[Any, ...]] = [()] * len(cells)
        if self._count_repeats:
            came = self._collective.all_to_all(self._repeats(reorder), counts.sum(axis=1), sizes.sum(axis=1))
            repeats = [(each.view(np.uint32),) for each in np.split(came, np.cumsum(sizes.reshape(-1))[:-1])]
        for rank in range(self._collective.size):
            updates: dict[str, tuple[Any, ...]] = {}
            for k, name in enumerate(self.names):
                cell = rank * len(self.names) + k
                wanted = cells[cell]
                if wanted.size:
                    updates[name] = (wanted, floats[cell].reshape(wanted.size, dims[k]), *repeats[cell])
            if updates:
                self._local.apply_gradients(updates, global_step=global_step, request_time=request_time)

    def _cells(self, exchanged: Exchanged) -> list[Ints]:
        """The ids asked of this rank, by rank and table."""
        return np.split(exchanged.ids, np.cumsum(exchanged.sizes.reshape(-1))[:-1])

    def _rows(self, exchanged: Exchanged) -> Floats:
        """The rows asked of this rank, one after another in the order of the ids; one lookup for all ranks."""
        tables = len(self.names)
        cells = self._cells(exchanged)
        asked = {name: np.concatenate(cells[k::tables]) for k, name in enumerate(self.names)}
        found = self._local.lookup({name: ids for name, ids in asked.items() if ids.size})
        by_rank: list[list[Floats]] = []
        for k, name in enumerate(self.names):
            rows = found.get(name, np.empty((0, int(self._dims[k])), np.float32))
            by_rank.append(np.split(rows, np.cumsum(exchanged.sizes[:, k])[:-1]))
        pieces = [by_rank[k][rank].reshape(-1) for rank in range(self._collective.size) for k in range(tables)]
        return np.concatenate(pieces)

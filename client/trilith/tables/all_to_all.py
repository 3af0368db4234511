"""AllToAllTables: every worker holds a shard of all tables, and ids, rows and gradients change hands in exchanges.

An exchange cuts each rank's array into one chunk per rank and gives each rank its chunks in the order of the senders.
Gradients of different ranks are neither averaged nor merged: each rank that asked for an id takes one step of it, in
the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from trilith.arrays import as_ids
from trilith.errors import ClosedError, InvalidRequestError, UnavailableError
from trilith.ops.fused_gather import fused_gather_embeddings_by_input, fused_gather_embeddings_by_input_gradient
from trilith.ops.ragged import as_floats
from trilith.ops.reorder import EMPTY_FROM, FusedReorder, fused_reorder_by_indices

__all__ = ["AllToAllTables", "Asked", "Collective", "Exchanged", "LocalTables", "Returned", "TorchCollective"]

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

    def close(self) -> None:
        """Exchange no more, and wait for threads that did."""


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
        self._own = False
        self._closed = False

    @classmethod
    def in_new_group(cls, device: torch.device | str = "cpu", *, float16: bool = False) -> TorchCollective:
        """An exchange in a process group of its own, of all ranks."""
        if not torch.distributed.is_initialized():
            raise InvalidRequestError("torch.distributed is not initialized; call init_process_group first")
        made = cls(device, float16=float16, group=torch.distributed.new_group())
        made._own = True
        return made

    def all_to_all(self, values: npt.NDArray[Any], sent: Ints, received: Ints) -> npt.NDArray[Any]:
        """See `Collective`."""
        if self._closed:
            raise ClosedError("these workers exchange no more")
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

    def close(self) -> None:
        """See `Collective`. A group that was given stays."""
        # With the last reference to a group its threads end. One that lives on until the interpreter ends may let go of
        # a tensor then, for which it needs the interpreter, and the process is aborted.
        group, self._group, self._closed = self._group, None, True
        if self._own and group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(group)


class LocalTables(Protocol):
    """The shard of this rank: an embedded cluster's client will do."""

    def lookup(self, ids: Mapping[str, Any], /) -> Mapping[str, Floats]:
        """Per table float32[n, dim]."""

    def apply_gradients(self, updates: Mapping[str, tuple[Any, ...]], /, **options: Any) -> None:
        """One step per distinct id of a table: ids, gradients and, where repeats are counted, occurrences uint32[n]."""

    def assign(self, updates: Mapping[str, tuple[Any, Any]], /, **options: Any) -> None:
        """Set rows; of a repeated id the last row stays."""

    def assign_add(self, updates: Mapping[str, tuple[Any, Any]], /, **options: Any) -> None:
        """Add to rows, one after another."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Ids that have changed hands.

    Attributes:
        sent: int64[ranks, tables], ids that this rank asked of each.
        sizes: int64[ranks, tables], ids that each rank asked of this one.
        ids: int64[...], those ids, rank by rank and table by table.
        reorder: This rank's ids by owner, where each travelled once for all its places.
    """

    sent: Ints
    sizes: Ints
    ids: Ints
    reorder: FusedReorder | None = None

    def cells(self) -> list[Ints]:
        """The ids asked of this rank, by rank and table."""
        return np.split(self.ids, np.cumsum(self.sizes.reshape(-1))[:-1])


@dataclass(frozen=True, slots=True)
class Asked:
    """Ids with the rows that this rank has for the others, before they travel."""

    exchanged: Exchanged
    rows: Floats


@dataclass(frozen=True, slots=True)
class Returned:
    """What the ranks ask of this one, rank by rank: by table ids, values and, if repeats are counted, occurrences."""

    updates: list[dict[str, tuple[Any, ...]]]


class AllToAllTables:
    """Tables sharded over the ranks of a collective.

    A lookup is `ask`, then `collect`; an update is `add_up`, `send_back`, `take`. Queues fit between these; those that
    exchange in threads of their own need collectives of their own.
    """

    def __init__(
        self,
        local: LocalTables,
        dims: Mapping[str, int],
        collective: Collective,
        *,
        asking: Collective | None = None,
        count_repeats: bool = False,
    ) -> None:
        """Use the tables that `local` has.

        Args:
            local: This rank's rows.
            dims: Floats per row, by table; the same on every rank.
            collective: How ranks exchange arrays.
            asking: How they exchange the ids of lookups; None: in the same way.
            count_repeats: Whether it travels how often an id occurred, for tables that count occurrences.
        """
        if not dims:
            raise InvalidRequestError("at least one table is needed")
        self._local = local
        self._collective = collective
        self._asking = collective if asking is None else asking
        self._count_repeats = count_repeats
        self.names = sorted(dims)
        self._dims = np.array([dims[name] for name in self.names], np.int64)

    # ---- arranging ---------------------------------------------------------------------------------------------------

    def reorder(self, ids: Mapping[str, npt.ArrayLike]) -> FusedReorder:
        """Arrange a batch's ids by owner, each once: a step for the input pipeline.

        Args:
            ids: By table integers [n], negative ones by their 64-bit pattern; a table without ids may be left out.
        """
        self._check_names(ids)
        lists = [as_ids(name, ids.get(name, ())).view(np.int64) for name in self.names]
        return fused_reorder_by_indices(lists, self._collective.size, self._dims.tolist(), unsigned=True)

    def route(self, updates: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> list[dict[str, tuple[Ints, Floats]]]:
        """Arrange rows by owner, repeats and all, in their order: per rank and table ids and rows."""
        self._check_names(updates)
        ranks = self._collective.size
        routed: list[dict[str, tuple[Ints, Floats]]] = [{} for _ in range(ranks)]
        for name, (ids, rows) in updates.items():
            wanted = as_ids(name, ids).view(np.int64)
            values = as_floats(f"table {name!r}: rows", rows)
            if values.ndim == 0 or len(values) != wanted.size:
                raise InvalidRequestError(f"table {name!r}: rows have shape {values.shape} for {wanted.size} ids")
            owners = self._owners(wanted)
            order = np.argsort(owners.astype(np.uint16), kind="stable")  # by radix, which no other width is
            bounds = np.searchsorted(owners[order], np.arange(1, ranks))
            parts = zip(np.split(wanted[order], bounds), np.split(values[order], bounds), strict=True)
            for rank, (own, block) in enumerate(parts):
                routed[rank][name] = own, block
        return routed

    def _owners(self, ids: Ints) -> Ints:
        """The rank that has each id: by its value as an unsigned number, as on a cluster of PS."""
        spared = int(self._collective.size >= EMPTY_FROM)
        return (ids.view(np.uint64) % np.uint64(self._collective.size - spared)).astype(np.int64) + spared

    def _check_names(self, given: Iterable[str]) -> None:
        unknown = sorted(set(given) - set(self.names))
        if unknown:
            raise InvalidRequestError(f"no table {unknown[0]!r}; there are {self.names}")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def lookup(self, reorder: FusedReorder) -> tuple[dict[str, Floats], Exchanged]:
        """Bring every id's row to this rank.

        Args:
            reorder: From `reorder`.

        Returns:
            By table float32[n, dim] in the order of its ids, and what `apply_gradients` needs.
        """
        asked = self.ask(reorder)
        return self.collect(asked), asked.exchanged

    def ask(self, reorder: FusedReorder) -> Asked:
        """Tell the owners which ids are meant, and find the rows that this rank is asked for."""
        exchanged = self._send(self._asking, self._counts(reorder), reorder.output, reorder)
        return Asked(exchanged, self._rows(exchanged))

    def collect(self, asked: Asked) -> dict[str, Floats]:
        """Let the rows travel: by table float32[n, dim] in the order of its ids."""
        reorder = asked.exchanged.reorder
        assert reorder is not None  # `ask` had one
        pieces = fused_gather_embeddings_by_input(self._travel(asked), reorder.offsets(), self._dims.tolist())
        return dict(zip(self.names, pieces, strict=True))

    def lookup_owned(self, ids: Sequence[Mapping[str, npt.ArrayLike]]) -> list[dict[str, Floats]]:
        """Rows of ids that are arranged by owner already, repeats and all: per rank and table float32[n, dim]."""
        asked = self.ask_owned(ids)
        return self.collect_owned(asked)

    def ask_owned(self, ids: Sequence[Mapping[str, npt.ArrayLike]]) -> Asked:
        """`ask` for ids that are arranged by owner already: per rank and table int64[n]."""
        cells = [as_ids(name, of_rank.get(name, ())).view(np.int64) for of_rank in ids for name in self.names]
        exchanged = self._send_cells(self._asking, cells)
        return Asked(exchanged, self._rows(exchanged))

    def collect_owned(self, asked: Asked) -> list[dict[str, Floats]]:
        """`collect` for ids that were arranged by owner."""
        sizes = asked.exchanged.sent * self._dims
        pieces = np.split(self._travel(asked), np.cumsum(sizes.reshape(-1))[:-1])
        tables = len(self.names)
        return [
            {name: pieces[rank * tables + k].reshape(-1, int(self._dims[k])) for k, name in enumerate(self.names)}
            for rank in range(self._collective.size)
        ]

    def send_ids(self, reorder: FusedReorder) -> Exchanged:
        """Tell the owners which ids are meant: a lookup without rows, for gradients of ids looked up before."""
        return self._send(self._collective, self._counts(reorder), reorder.output, reorder)

    def _send_cells(self, collective: Collective, cells: Sequence[Ints]) -> Exchanged:
        counts = np.array([each.size for each in cells], np.int64)
        return self._send(collective, counts.reshape(collective.size, len(self.names)), np.concatenate(cells))

    def _send(self, collective: Collective, counts: Ints, ids: Ints, reorder: FusedReorder | None = None) -> Exchanged:
        ranks, tables = collective.size, len(self.names)
        each = np.full(ranks, tables, np.int64)
        sizes = collective.all_to_all(counts.reshape(-1), each, each).reshape(ranks, tables)
        came = collective.all_to_all(ids, counts.sum(axis=1), sizes.sum(axis=1))
        return Exchanged(counts, sizes, came, reorder)

    def _travel(self, asked: Asked) -> Floats:
        """float32[...]: the rows that this rank asked for, laid out as its ids were."""
        exchanged = asked.exchanged
        rows: Floats = self._collective.all_to_all(
            asked.rows, exchanged.sizes @ self._dims, exchanged.sent @ self._dims
        )
        return rows

    def _counts(self, reorder: FusedReorder) -> Ints:
        """int64[ranks, tables]: ids for each rank."""
        return reorder.sharded_slot_sizes.astype(np.int64).reshape(self._collective.size, len(self.names))

    def _rows(self, exchanged: Exchanged) -> Floats:
        """The rows asked of this rank, one after another in the order of the ids; one lookup for all ranks."""
        tables = len(self.names)
        cells = exchanged.cells()
        asked = {name: np.concatenate(cells[k::tables]) for k, name in enumerate(self.names)}
        found = self._local.lookup({name: ids for name, ids in asked.items() if ids.size})
        by_rank: list[list[Floats]] = []
        for k, name in enumerate(self.names):
            rows = found.get(name, np.empty((0, int(self._dims[k])), np.float32))
            by_rank.append(np.split(rows, np.cumsum(exchanged.sizes[:, k])[:-1]))
        pieces = [by_rank[k][rank].reshape(-1) for rank in range(self._collective.size) for k in range(tables)]
        return np.concatenate(pieces)

    # ---- writing -----------------------------------------------------------------------------------------------------

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
        if exchanged.reorder is None:
            raise InvalidRequestError("these ids were arranged by owner; send_owned takes their gradients")
        returned = self.send_back(self.add_up(grads, exchanged.reorder, scale=scale), exchanged)
        self.take(returned, global_step=global_step, request_time=request_time)

    def add_up(self, grads: Mapping[str, npt.ArrayLike], reorder: FusedReorder, *, scale: float = 1.0) -> Floats:
        """float32[...]: gradients by table added up by id, laid out as `reorder` has the ids."""
        counts, offsets, dims = self._counts(reorder), reorder.offsets(), self._dims.tolist()
        given = [k for k, name in enumerate(self.names) if name in grads]
        return fused_gather_embeddings_by_input_gradient(
            int((counts @ self._dims).sum()),
            [grads[self.names[k]] for k in given],
            [offsets[k] for k in given],
            [dims[k] for k in given],
            scale=scale,
        )

    def send_back(self, sums: Floats, exchanged: Exchanged) -> Returned:
        """Let gradients travel that `add_up` has added up."""
        reorder, counts = exchanged.reorder, exchanged.sent
        received = self._collective.all_to_all(sums, counts @ self._dims, exchanged.sizes @ self._dims)
        occurrences = None
        if self._count_repeats and reorder is not None:
            sizes = counts.sum(axis=1), exchanged.sizes.sum(axis=1)
            occurrences = self._collective.all_to_all(self._repeats(reorder, counts), *sizes)
        return self._returned(exchanged, received, occurrences)

    def send_owned(self, updates: Sequence[Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]]) -> Returned:
        """Let rows of ids travel that are arranged by owner: per rank and table ids and rows."""
        empty = np.empty(0, np.int64), np.empty(0, np.float32)
        given = [of_rank.get(name, empty) for of_rank in updates for name in self.names]
        cells = [as_ids("", ids).view(np.int64) for ids, _ in given]
        exchanged = self._send_cells(self._collective, cells)
        rows = [np.asarray(each, np.float32).reshape(-1) for _, each in given]
        sizes = exchanged.sent @ self._dims, exchanged.sizes @ self._dims
        return self._returned(exchanged, self._collective.all_to_all(np.concatenate(rows), *sizes), None)

    def take(
        self,
        returned: Returned,
        verb: Literal["apply_gradients", "assign", "assign_add"] = "apply_gradients",
        *,
        global_step: int = 0,
        request_time: int | None = None,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        """Do what the ranks ask of this one, in their order.

        Args:
            returned: What they sent.
            verb: What they want.
            global_step: At which schedules are evaluated.
            request_time: The rows' last update; None is now.
            rate_factors: By table what its rates are multiplied by.
        """
        options: dict[str, Any] = {"request_time": request_time}
        if verb == "apply_gradients":
            options["global_step"] = global_step
            if rate_factors:
                options["rate_factors"] = rate_factors
        for updates in returned.updates:
            if updates:
                getattr(self._local, verb)(updates, **options)

    def reinitialize(
        self, name: str, ids: npt.ArrayLike, reset: Callable[[str, Ints], npt.NDArray[np.int8]]
    ) -> npt.NDArray[np.int8]:
        """Have the owners reset rows, or do what `reset` does, in the order of the ranks.

        Args:
            name: Of the table.
            ids: Integers [n].
            reset: Does it with rows of this rank, by table and ids; says of each what became of it.

        Returns:
            What became of each id, in the order of `ids`; -1 for all where there is no such table.
        """
        wanted = as_ids(name, ids).view(np.int64)
        if name not in self.names:
            return np.full(wanted.size, -1, np.int8)
        parts = [of_rank[name][0] for of_rank in self.route({name: (wanted, np.empty((wanted.size, 0)))})]
        nothing = np.empty(0, np.int64)
        exchanged = self._send_cells(
            self._collective, [part if each == name else nothing for part in parts for each in self.names]
        )
        found = [
            reset(self.names[cell % len(self.names)], each) if each.size else np.empty(0, np.int8)
            for cell, each in enumerate(exchanged.cells())
        ]
        sizes = exchanged.sizes.sum(axis=1), exchanged.sent.sum(axis=1)
        statuses = self._collective.all_to_all(np.concatenate(found), *sizes)
        order = np.argsort(self._owners(wanted), kind="stable")
        out = np.empty(wanted.size, np.int8)
        out[order] = statuses
        return out

    def _returned(self, exchanged: Exchanged, values: Floats, occurrences: npt.NDArray[np.int32] | None) -> Returned:
        tables = len(self.names)
        sizes = exchanged.sizes.reshape(-1)
        rows = np.split(values, np.cumsum((exchanged.sizes * self._dims).reshape(-1))[:-1])
        repeats: list[tuple[Any, ...]] = [()] * sizes.size
        if occurrences is not None:
            repeats = [(each.view(np.uint32),) for each in np.split(occurrences, np.cumsum(sizes)[:-1])]
        updates: list[dict[str, tuple[Any, ...]]] = [{} for _ in range(self._collective.size)]
        for cell, ids in enumerate(exchanged.cells()):
            if ids.size:
                block = rows[cell].reshape(ids.size, int(self._dims[cell % tables]))
                updates[cell // tables][self.names[cell % tables]] = ids, block, *repeats[cell]
        return Returned(updates)

    def _repeats(self, reorder: FusedReorder, counts: Ints) -> npt.NDArray[np.int32]:
        """int32[ids that travel]: how often each occurs."""
        widths = np.repeat(np.tile(self._dims, self._collective.size), counts.reshape(-1))
        places = np.searchsorted(np.cumsum(widths) - widths, reorder.fused_emb_offset)
        return np.bincount(places, minlength=widths.size).astype(np.int32)

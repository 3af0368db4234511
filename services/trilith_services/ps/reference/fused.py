"""Fused lookup and apply: one call for K tables, whose ids come in blocks: shard after shard, table after table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from trilith.arrays import id_array
from trilith.errors import InvalidRequestError
from trilith_services.ps.engine.table import Table

__all__ = ["FusedLookup", "FusedTables", "fused_apply_gradient", "fused_lookup", "integer_ids"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class FusedLookup(NamedTuple):
    """What a fused lookup returns.

    Attributes:
        embeddings: float32[total], block after block the rows of its ids.
        splits: int64[shards], floats of each shard.
        id_offsets: int64[blocks + 1], where each block begins among the ids.
        emb_offsets: int64[blocks + 1], where it begins in `embeddings`.
        indices: uint64[n], the ids, to be passed back to `fused_apply_gradient`.
    """

    embeddings: Floats
    splits: Ints
    id_offsets: Ints
    emb_offsets: Ints
    indices: npt.NDArray[np.uint64]


class FusedTables(ABC):
    """Tables by name that answer fused calls in the order of the sorted names."""

    @property
    @abstractmethod
    def rows(self) -> Sequence[Table]:
        """The tables' rows, by sorted name."""

    @abstractmethod
    def learning_rates(self) -> Floats:
        """float32[segments of all tables]: the rates at the model's step, by sorted name."""

    @property
    def dims(self) -> list[int]:
        """Floats per row, by sorted name."""
        return [table.dim for table in self.rows]

    def fused_lookup(
        self, ids: npt.ArrayLike, fused_slot_size: npt.ArrayLike, num_of_shards: int, req_time: int = 0
    ) -> FusedLookup:
        """The function of this name over the tables."""
        return fused_lookup(self.rows, ids, fused_slot_size, num_of_shards, req_time)

    def fused_apply_gradient(
        self,
        ids: npt.ArrayLike,
        indices: npt.ArrayLike,
        fused_slot_size: npt.ArrayLike,
        id_grads: npt.ArrayLike,
        id_offsets: npt.ArrayLike,
        grad_offsets: npt.ArrayLike,
        *,
        global_step: int = 0,
        req_time: int = 0,
        num_of_shards: int = 1,
        enable_grad_accumulation: bool = False,
    ) -> Self:
        """The function of this name over the tables, at the rates of the configs."""
        fused_apply_gradient(
            self.rows,
            ids,
            indices,
            fused_slot_size,
            id_grads,
            id_offsets,
            grad_offsets,
            self.learning_rates(),
            req_time,
            global_step,
            num_of_shards,
            enable_grad_accumulation,
        )
        return self


def fused_lookup(
    tables: Sequence[Table],
    ids: npt.ArrayLike,
    fused_slot_size: npt.ArrayLike,
    num_of_shards: int,
    req_time: int = 0,
) -> FusedLookup:
    """Look up the ids of K tables and N shards; block b holds ids of table b mod K.

    Args:
        tables: The K tables.
        ids: int64 or uint64[n], block after block.
        fused_slot_size: int[K * N], ids in each block.
        num_of_shards: N.
        req_time: Reading touches no times, so this is unused.
    """
    flat = integer_ids(ids)
    sizes = _block_sizes(tables, fused_slot_size, num_of_shards, flat.size)
    id_offsets = _offsets(sizes)
    emb_offsets = _offsets(sizes * np.tile([table.dim for table in tables], num_of_shards))
    embeddings = np.empty(int(emb_offsets[-1]), np.float32)
    for block in range(sizes.size):
        table = tables[block % len(tables)]
        chosen = flat[id_offsets[block] : id_offsets[block + 1]]
        out = embeddings[emb_offsets[block] : emb_offsets[block + 1]].reshape(chosen.size, table.dim)
        table.lookup(chosen, out)
    splits = np.diff(emb_offsets[:: len(tables)])
    return FusedLookup(embeddings, splits, id_offsets, emb_offsets, flat)


def fused_apply_gradient(
    tables: Sequence[Table],
    ids: npt.ArrayLike,
    indices: npt.ArrayLike,
    fused_slot_size: npt.ArrayLike,
    id_grads: npt.ArrayLike,
    id_offsets: npt.ArrayLike,
    grad_offsets: npt.ArrayLike,
    learning_rate_tensors: npt.ArrayLike,
    req_time: int = 0,
    global_step: int = 0,
    num_of_shards: int = 1,
    enable_grad_accumulation: bool = False,
) -> None:
    """Take the steps of every block, shard after shard; an id in two shards is stepped twice.

    Args:
        tables: The K tables.
        ids: int64 or uint64[n], block after block.
        indices: What the lookup returned; unused.
        fused_slot_size: int[K * N], ids in each block.
        id_grads: float32[total], block after block the gradients of its ids.
        id_offsets: int[K * N + 1], where each block begins among the ids.
        grad_offsets: int[K * N + 1], where it begins in `id_grads`.
        learning_rate_tensors: float32[segments of all tables], table after table, the same for every shard.
        req_time: Becomes the rows' last update.
        global_step: For optimizers and readers that use it.
        num_of_shards: N.
        enable_grad_accumulation: Sum the gradients of equal ids within a block.
    """
    flat, grads = integer_ids(ids), np.ascontiguousarray(id_grads, np.float32).reshape(-1)
    rates = np.ascontiguousarray(learning_rate_tensors, np.float32).reshape(-1)
    sizes = _block_sizes(tables, fused_slot_size, num_of_shards, flat.size)
    starts = _checked_offsets("id_offsets", id_offsets, sizes, flat.size)
    dims = np.tile([table.dim for table in tables], num_of_shards)
    grad_starts = _checked_offsets("grad_offsets", grad_offsets, sizes * dims, grads.size)
    cursors = _offsets(np.array([table.segments for table in tables], np.int64))
    if rates.size != cursors[-1]:
        raise InvalidRequestError(f"{rates.size} learning rates for {cursors[-1]} segments of {len(tables)} tables")
    for block in range(sizes.size):
        k = block % len(tables)
        chosen = flat[starts[block] : starts[block + 1]]
        tables[k].apply_gradients(
            chosen,
            grads[grad_starts[block] : grad_starts[block + 1]].reshape(chosen.size, tables[k].dim),
            learning_rates=rates[cursors[k] : cursors[k + 1]],
            global_step=global_step,
            request_time=req_time,
            dedup=enable_grad_accumulation,
        )


def _block_sizes(tables: Sequence[Table], fused_slot_size: npt.ArrayLike, shards: int, ids: int) -> Ints:
    sizes = np.ascontiguousarray(fused_slot_size, np.int64).reshape(-1)
    if shards < 1 or not tables or sizes.size != len(tables) * shards:
        raise InvalidRequestError(f"{sizes.size} block sizes for {len(tables)} tables and {shards} shards")
    if (sizes < 0).any() or sizes.sum() != ids:
        raise InvalidRequestError(f"block sizes {sizes.tolist()} do not cut {ids} ids")
    return sizes


def _checked_offsets(name: str, given: npt.ArrayLike, sizes: Ints, total: int) -> Ints:
    offsets, wanted = np.ascontiguousarray(given, np.int64).reshape(-1), _offsets(sizes)
    if not np.array_equal(offsets, wanted) or wanted[-1] != total:
        raise InvalidRequestError(f"{name} {offsets.tolist()} over {total}: the block sizes make {wanted.tolist()}")
    return offsets


def _offsets(sizes: Ints) -> Ints:
    """int64[n + 1]: running sums from 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def integer_ids(ids: npt.ArrayLike | Sequence[int]) -> npt.NDArray[np.uint64]:
    """uint64[n] out of integers of any type; negative ones are taken as two's complement."""
    array = id_array("the table", ids)
    if array.size and array.ndim != 1:
        raise InvalidRequestError(f"ids of shape {array.shape}: ids are integers[n]")
    return np.ascontiguousarray(array).reshape(array.size)

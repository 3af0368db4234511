"""`trilith.ops.reorder` for tensors; ids only, so that no gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import reorder
from trilith.ops.torch_bridge import array_of, integers_on, refuse_outside, tensor_of, use_native
from trilith.ops.torch_ragged import distinct_in_rows

__all__ = ["FusedReorderTensors", "fused_reorder_by_indices", "reorder_by_indices"]


class FusedReorderTensors(NamedTuple):
    """Ids of K lists for S shards; see `trilith.ops.reorder.FusedReorder`.

    Attributes:
        output: int64[u].
        shard_sizes: int32[S].
        sharded_slot_sizes: int32[S * K].
        emb_offset_sz: int32[K].
        fused_emb_offset: int32[sum of lengths].
    """

    output: Tensor
    shard_sizes: Tensor
    sharded_slot_sizes: Tensor
    emb_offset_sz: Tensor
    fused_emb_offset: Tensor

    def offsets(self) -> list[Tensor]:
        """`fused_emb_offset`, list by list."""
        return list(torch.split(self.fused_emb_offset, self.emb_offset_sz.tolist()))


def reorder_by_indices(
    rows: Tensor, shard_ids: Tensor, num_of_shards: int, *, native: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Arrange rows by shard, one for each key; see `trilith.ops.reorder.reorder_by_indices`.

    Args:
        rows: int64[n] or [n, w].
        shard_ids: int32[n].
        num_of_shards: How many shards there are.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, rows):
        output, sizes = reorder.reorder_by_indices(array_of(rows), array_of(shard_ids), num_of_shards)
        return tensor_of(output), tensor_of(sizes)
    if num_of_shards < 1:
        raise InvalidRequestError(f"num_of_shards={num_of_shards} is below 1")
    owners = integers_on(rows.device, shard_ids)
    if rows.ndim not in (1, 2) or (rows.ndim == 2 and rows.shape[1] == 0) or owners.shape != rows.shape[:1]:
        raise InvalidRequestError(
            f"rows have shape {tuple(rows.shape)}, shard_ids {tuple(owners.shape)}; (n,) or (n, w) and (n,) are needed"
        )
    refuse_outside("shard id", owners, num_of_shards)
    keys = (rows if rows.ndim == 1 else rows[:, 0]).to(torch.int64)
    # Within a shard the last first occurrence comes first.
    firsts = distinct_in_rows(keys, torch.tensor([0, keys.numel()], device=keys.device)).firsts.flip(0)
    sizes_of = torch.bincount(owners[firsts], minlength=num_of_shards).to(torch.int32)
    return rows[firsts[torch.argsort(owners[firsts], stable=True)]], sizes_of


def fused_reorder_by_indices(
    inputs: Sequence[Tensor],
    num_of_shards: int,
    dim_sizes: Sequence[int],
    *,
    rank0_empty: bool = True,
    native: bool | None = None,
) -> FusedReorderTensors:
    """Arrange the ids of many lists by shard and list; see `trilith.ops.reorder.fused_reorder_by_indices`.

    Args:
        inputs: K times int64[n_k], ids of at least 0.
        num_of_shards: S.
        dim_sizes: K floats per vector.
        rank0_empty: From 5 shards on, shard 0 owns nothing.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, *inputs):
        lists = [array_of(each) for each in inputs]
        found = reorder.fused_reorder_by_indices(lists, num_of_shards, dim_sizes, rank0_empty=rank0_empty)
        return FusedReorderTensors(*(tensor_of(each) for each in found))
    count = len(inputs)
    if num_of_shards < 1 or len(dim_sizes) != count or min(dim_sizes, default=1) < 1:
        raise InvalidRequestError(
            f"num_of_shards={num_of_shards} must be at least 1, dim_sizes {list(dim_sizes)} {count} numbers above 0"
        )
    device = inputs[0].device if inputs else torch.device("cpu")
    dims = torch.tensor(list(dim_sizes), dtype=torch.int64, device=device)
    lengths = torch.tensor([each.numel() for each in inputs], dtype=torch.int64, device=device)
    splits = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.cat([lengths.new_empty(0), *(each.to(device, torch.int64) for each in inputs)])
    if bool((values < 0).any()):
        raise InvalidRequestError(
            f"id {int(values.min())} is negative; the remainder that gives its shard would be too"
        )
    distinct = distinct_in_rows(values, splits)
    spared = int(rank0_empty and num_of_shards >= reorder.EMPTY_FROM)
    shards = distinct.values % (num_of_shards - spared) + spared
    lists_of = torch.arange(count, device=device).repeat_interleave(distinct.row_splits.diff())
    cells = torch.bincount(shards * count + lists_of, minlength=num_of_shards * count)
    order = torch.argsort(shards, stable=True)
    widths = dims[lists_of[order]]
    if int(widths.sum()) >= 1 << 31:
        raise InvalidRequestError(f"the vectors take {int(widths.sum())} floats, more than int32 offsets can reach")
    begins = torch.empty_like(order)
    begins[order] = widths.cumsum(0) - widths
    return FusedReorderTensors(
        distinct.values[order],
        cells.view(num_of_shards, count).sum(1).to(torch.int32),
        cells.to(torch.int32),
        lengths.to(torch.int32),
        begins[distinct.numbers].to(torch.int32),
    )

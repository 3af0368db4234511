"""`trilith.ops.ragged` and `trilith.ops.unique` for tensors of any device, in torch's own operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError

__all__ = [
    "DistinctTensors",
    "RaggedTensor",
    "as_splits",
    "distinct_in_rows",
    "normalize_merged_split",
    "unique_first_occurrence",
    "value_rowids",
]


class RaggedTensor(NamedTuple):
    """Rows of different lengths.

    Attributes:
        values: [n], row after row.
        row_splits: int64[rows + 1] on the same device.
    """

    values: Tensor
    row_splits: Tensor


class DistinctTensors(NamedTuple):
    """The distinct values of every row; see `trilith.ops.unique.Distinct`.

    Attributes:
        values: int64[u], row after row, within a row by first occurrence.
        row_splits: int64[rows + 1] of `values`.
        numbers: int64[n], per input value its place in `values`.
        firsts: int64[u], where each value occurs first.
        counts: int64[u], occurrences of each.
    """

    values: Tensor
    row_splits: Tensor
    numbers: Tensor
    firsts: Tensor
    counts: Tensor


def as_splits(name: str, row_splits: Tensor, values: int, device: torch.device) -> Tensor:
    """Make int64[rows + 1] on `device` that runs from 0 to `values` without falling."""
    splits = row_splits.to(device, torch.int64)
    fits = splits.ndim == 1 and splits.numel() > 0
    if not fits or int(splits[0]) or int(splits[-1]) != values or bool((splits.diff() < 0).any()):
        shown = splits.reshape(-1)[:16].tolist()
        raise InvalidRequestError(f"{name} {shown} do not rise from 0 to {values}, the number of values")
    return splits


def value_rowids(row_splits: Tensor) -> Tensor:
    """int64[values]: the row of every value."""
    last = int(row_splits.reshape(-1)[-1]) if row_splits.numel() else 0
    lengths = as_splits("row_splits", row_splits, last, row_splits.device).diff()
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def normalize_merged_split(row_split: Tensor, row_split_size: Tensor) -> Tensor:
    """Make the row splits of several batches, glued together, those of one; see `trilith.ops.ragged`."""
    glued, sizes = row_split.to(torch.int64), row_split_size.to(row_split.device, torch.int64)
    if sizes.numel() == 0 or bool((sizes < 1).any()) or int(sizes.sum()) != glued.numel():
        raise InvalidRequestError(
            f"row_split_size {sizes.tolist()} does not cut {glued.numel()} splits into whole ones"
        )
    for piece in torch.split(glued, sizes.tolist()):
        as_splits("row_split", piece, int(piece[-1]), glued.device)
    ends = sizes.cumsum(0)
    totals = glued[ends - 1]
    shifted = glued + (totals.cumsum(0) - totals).repeat_interleave(sizes)
    keep = torch.ones_like(glued, dtype=torch.bool)
    keep[ends[:-1]] = False
    return shifted[keep]


def distinct_in_rows(values: Tensor, row_splits: Tensor) -> DistinctTensors:
    """Find the distinct values of every row, by sorting.

    Args:
        values: int64[n].
        row_splits: int64[rows + 1], checked.
    """
    rows = torch.arange(row_splits.numel() - 1, device=values.device).repeat_interleave(row_splits.diff())
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    begins = torch.ones(order.numel(), dtype=torch.bool, device=values.device)
    begins[1:] = (values[order].diff() != 0) | (rows[order].diff() != 0)
    # The sorts are stable, so that the first of a group is its first occurrence.
    firsts, rank = torch.sort(order[begins])
    number = torch.empty_like(rank)
    number[rank] = torch.arange(rank.numel(), device=values.device)
    numbers = torch.empty_like(order)
    numbers[order] = number[begins.cumsum(0) - 1]
    counts = torch.bincount(numbers, minlength=firsts.numel())
    return DistinctTensors(values[firsts], torch.searchsorted(firsts, row_splits), numbers, firsts, counts)


def unique_first_occurrence(fids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids in order of first occurrence, and per input id its number; see `trilith.ops.unique`."""
    if fids.ndim != 1 or fids.is_floating_point():
        raise InvalidRequestError(f"fids are {fids.dtype}{tuple(fids.shape)}, one-dimensional integers are needed")
    plain = fids.view(torch.int64) if fids.dtype == torch.uint64 else fids.to(torch.int64)
    found = distinct_in_rows(plain, torch.tensor([0, plain.numel()], device=fids.device))
    values = found.values.view(torch.uint64) if fids.dtype == torch.uint64 else found.values
    return values, found.numbers

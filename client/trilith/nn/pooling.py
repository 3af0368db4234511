"""Rows of bags to vectors and back: the arithmetic of the combiners for tensors, forward and backward.

`trilith.ops.pool` is the same for arrays from which nothing is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from trilith.ops.combiners import Combiner
from trilith.ops.ragged import Int64Array

__all__ = ["FirstRows", "LargestRows", "PooledRows", "Pooling", "make_pooling"]


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Sums of bags, each times a factor of its own; factor and weights None are 1, lengths None are all 1.

    Attributes:
        lengths: int64[b] on the device.
        scale: float32[b, 1] on the device.
        weights: float32[n] of the rows, on the device.
    """

    lengths: Tensor | None
    scale: Tensor | None
    weights: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """float32[n, dim] rows to float32[b, dim] vectors."""
        if self.lengths is None:
            return rows
        starts = torch.zeros_like(self.lengths)
        torch.cumsum(self.lengths[:-1], 0, out=starts[1:])
        every = torch.arange(rows.shape[0], device=rows.device)
        sums = functional.embedding_bag(every, rows, starts, mode="sum", per_sample_weights=self.weights)
        return sums if self.scale is None else sums * self.scale

    def backward(self, grads: Tensor) -> Tensor:
        """float32[b, dim] gradients of the vectors to float32[n, dim] gradients of the rows."""
        if self.scale is not None:
            grads = grads * self.scale
        if self.lengths is not None:
            grads = grads.repeat_interleave(self.lengths, 0)
        return grads if self.weights is None else grads * self.weights[:, None]


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of bags side by side.

    Attributes:
        places: int64[n] on the device: row r of a bag i stands at i * width + r.
        bags: Number of bags.
        width: Rows per bag.
    """

    places: Tensor
    bags: int
    width: int

    def forward(self, rows: Tensor) -> Tensor:
        """float32[n, dim] rows to float32[b, width, dim]."""
        out = rows.new_zeros(self.bags * self.width, rows.shape[1])
        out[self.places] = rows
        return out.view(self.bags, self.width, rows.shape[1])

    def backward(self, grads: Tensor) -> Tensor:
        """float32[b, width, dim] gradients to float32[n, dim] gradients of the rows."""
        return grads.flatten(0, 1)[self.places]


class LargestRows:
    """Of each float the largest of a bag. Its gradient goes to the row that has it; of several, to the bag's first.

    Args:
        lengths: int64[b] on the device.
        weights: float32[n] on the device, what each row is multiplied by before; None: 1.
    """

    def __init__(self, lengths: Tensor, weights: Tensor | None = None) -> None:
        self._lengths = lengths
        self._weights = weights
        self._winners: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """float32[n, dim] rows to float32[b, dim] vectors; an empty bag gives zeros."""
        count, dim = rows.shape
        scaled = rows if self._weights is None else rows * self._weights[:, None]
        bags = torch.arange(len(self._lengths), device=rows.device).repeat_interleave(self._lengths)
        place = bags[:, None].expand(count, dim)
        largest = rows.new_full((len(self._lengths), dim), -math.inf)
        largest = largest.scatter_reduce(0, place, scaled, "amax")
        # Behind the last row stands none: of empty bags, and of rows that are no numbers.
        own = torch.arange(count, device=rows.device)[:, None].expand(count, dim)
        own = torch.where(scaled == largest[bags], own, count)
        winners = torch.full(largest.shape, count, device=rows.device)
        self._winners = winners.scatter_reduce(0, place, own, "amin")
        return largest.masked_fill((self._lengths == 0)[:, None], 0.0)

    def backward(self, grads: Tensor) -> Tensor:
        """float32[b, dim] gradients of the vectors that `forward` made last to those of the rows, float32[n, dim]."""
        assert self._winners is not None
        count = int(self._lengths.sum())
        found = grads.new_zeros(count + 1, grads.shape[1]).scatter_(0, self._winners, grads)[:count]
        return found if self._weights is None else found * self._weights[:, None]


Pooling: TypeAlias = PooledRows | LargestRows | FirstRows


def make_pooling(
    lengths: Sequence[Int64Array],
    combiners: Sequence[Combiner],
    to_device: Callable[[npt.NDArray[Any]], Tensor],
    weights: Sequence[npt.NDArray[np.float32] | None] = (),
) -> Pooling:
    """Work out how the rows of several features, feature after feature, become vectors.

    Args:
        lengths: Per feature int64[b], the rows of its bags; of several for combiners that add, of one for "max", and
            of one, cut already, for the first n.
        combiners: Per feature.
        to_device: Takes an array where the rows are.
        weights: Per feature float32[n], what each row is multiplied by, or None; none at all if empty. A mean is then
            divided by the sum of the weights, and "sqrtn" by the root of the sum of their squares, as
            `tf.nn.embedding_lookup_sparse` does it; "max" is of rows times their weights.
    """
    if combiners[0].kind == "max":
        of_rows = weights[0] if weights else None
        return LargestRows(to_device(lengths[0]), None if of_rows is None else to_device(of_rows))
    if any(given is not None for given in weights):
        return _weighted(lengths, combiners, to_device, weights)
    if combiners[0].n:
        return _first_rows(lengths[0], combiners[0].n, to_device)
    sizes = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
    if (sizes == 1).all():
        return PooledRows(None, None)  # one row in, the same out, whatever the combiner
    scale = None
    if any(combiner.kind != "sum" for combiner in combiners):
        factors = np.concatenate([_factors(*each) for each in zip(lengths, combiners, strict=True)])
        scale = to_device(factors[:, None])
    return PooledRows(to_device(sizes), scale)


def _factors(lengths: Int64Array, combiner: Combiner) -> npt.NDArray[np.float32]:
    """float32[b]: what the sum of each bag is multiplied by."""
    safe = np.maximum(lengths, 1).astype(np.float32)
    if combiner.kind == "sum":
        return np.ones_like(safe)
    divisors = safe if combiner.kind == "mean" else np.sqrt(safe)
    return np.reciprocal(divisors, out=divisors)


def _weighted(
    lengths: Sequence[Int64Array],
    combiners: Sequence[Combiner],
    to_device: Callable[[npt.NDArray[Any]], Tensor],
    weights: Sequence[npt.NDArray[np.float32] | None],
) -> PooledRows:
    factors, every = [], []
    for sizes, combiner, given in zip(lengths, combiners, weights, strict=True):
        own = np.ones(int(sizes.sum()), np.float32) if given is None else given
        every.append(own)
        factor = np.ones(sizes.size, np.float32)
        if combiner.kind != "sum":
            mean = combiner.kind == "mean"
            sums = np.bincount(np.repeat(np.arange(sizes.size), sizes), own if mean else own * own, sizes.size)
            divisors = (sums if mean else np.sqrt(sums)).astype(np.float32)
            factor = np.divide(1, divisors, out=np.zeros_like(divisors), where=divisors != 0)
        factors.append(factor)
    return PooledRows(
        to_device(np.concatenate(lengths)),
        to_device(np.concatenate(factors)[:, None]),
        to_device(np.concatenate(every)),
    )


def _first_rows(lengths: Int64Array, width: int, to_device: Callable[[npt.NDArray[Any]], Tensor]) -> FirstRows:
    ends = np.cumsum(lengths)
    shift = np.arange(lengths.size) * width - (ends - lengths)
    places = np.arange(ends[-1] if ends.size else 0) + np.repeat(shift, lengths)
    return FirstRows(to_device(places), lengths.size, width)

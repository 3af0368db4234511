"""Rows of bags to vectors and back: the arithmetic of the combiners, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trilith.nn.bags import Bags, Combiner, FirstN, Int64Array
from trilith.nn.bridge import Bridge

__all__ = ["FirstRows", "Pooled", "make_pooling"]


@dataclass(frozen=True, slots=True)
class Pooled:
    """Sums of bags, each times a factor of its own; factor None is 1, lengths None are all 1.

    Attributes:
        lengths: int64[b] on the device.
        scale: float32[b, 1] on the device.
    """

    lengths: Tensor | None
    scale: Tensor | None

    def forward(self, rows: Tensor) -> Tensor:
        """float32[n, dim] rows to float32[b, dim] vectors."""
        if self.lengths is None:
            return rows
        starts = torch.zeros_like(self.lengths)
        torch.cumsum(self.lengths[:-1], 0, out=starts[1:])
        every = torch.arange(rows.shape[0], device=rows.device)
        sums = functional.embedding_bag(every, rows, starts, mode="sum")
        return sums if self.scale is None else sums * self.scale

    def backward(self, grads: Tensor) -> Tensor:
        """float32[b, dim] gradients of the vectors to float32[n, dim] gradients of the rows."""
        if self.scale is not None:
            grads = grads * self.scale
        return grads if self.lengths is None else grads.repeat_interleave(self.lengths, 0)


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


def make_pooling(bags: Sequence[Bags], combiners: Sequence[Combiner], bridge: Bridge) -> Pooled | FirstRows:
    """Work out how the rows of several features, feature after feature, become vectors.

    Args:
        bags: Per feature its bags; several for pooled combiners, one for FirstN, cut already.
        combiners: Per feature.
        bridge: Knows the device.
    """
    if isinstance(combiners[0], FirstN):
        return _first_rows(bags[0], combiners[0].max_seq_length, bridge)
    lengths = bags[0].lengths if len(bags) == 1 else np.concatenate([feature.lengths for feature in bags])
    if (lengths == 1).all():
        return Pooled(None, None)  # one row in, the same out, whatever the combiner
    scale = None
    if any(combiner != "sum" for combiner in combiners):
        safe = np.maximum(lengths, 1).astype(np.float32)
        factors = np.ones_like(safe)
        start = 0
        for feature, combiner in zip(bags, combiners, strict=True):
            part = slice(start, start + len(feature))
            start = part.stop
            if combiner == "mean":
                factors[part] = 1 / safe[part]
            elif combiner == "sqrtn":
                factors[part] = 1 / np.sqrt(safe[part])
        scale = bridge.to_device(factors[:, None])
    return Pooled(bridge.integers(lengths), scale)


def _first_rows(bags: Bags, width: int, bridge: Bridge) -> FirstRows:
    lengths: Int64Array = bags.lengths
    starts = np.cumsum(lengths) - lengths
    shift = np.arange(len(bags)) * width - starts
    return FirstRows(bridge.integers(np.arange(bags.ids.size) + np.repeat(shift, lengths)), len(bags), width)

"""Gradients averaged, and numbers added up, over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, distributed

from trilith.errors import InvalidRequestError

__all__ = ["FUSIONS", "Fusion", "average_gradients", "sum_over_ranks"]

Fusion: TypeAlias = Literal["one", "grouped", "none"]
"""one: a collective for all gradients, laid out one after another; grouped: one each, all on their way at once; none:
one after another."""

FUSIONS: tuple[Fusion, ...] = ("one", "grouped", "none")


def average_gradients(
    gradients: Sequence[Tensor | None],
    *,
    scale: float = 1.0,
    fusion: Fusion = "one",
    float16: bool = False,
    group: distributed.ProcessGroup | None = None,
) -> list[Tensor | None]:
    """The mean over all ranks of every gradient; every rank makes the same call.

    Args:
        gradients: float32 of the same shapes on every rank; None stays None and must be None everywhere.
        scale: What this rank's are multiplied by before; where clipping was put off, what it comes to.
        fusion: How they travel.
        float16: Whether they travel as float16; their means must fit it.
        group: The process group; None is the default one.
    """
    if fusion not in FUSIONS:
        raise InvalidRequestError(f"fusion={fusion!r} is none of {', '.join(FUSIONS)}")
    given = [each for each in gradients if each is not None]
    ranks = distributed.get_world_size(group)
    # float16 would not hold the sum of what it holds.
    share = scale / ranks if float16 else scale
    if fusion == "one":
        pieces = [torch.cat([each.reshape(-1) for each in given]) * share] if given else []
    else:
        pieces = [each * share for each in given]
    if float16:
        pieces = [each.to(torch.float16) for each in pieces]
    works = []
    for piece in pieces:
        work = distributed.all_reduce(piece, group=group, async_op=fusion == "grouped")
        works.append(work)
    for work in works:
        if work is not None:
            work.wait()
    if float16:
        pieces = [each.to(torch.float32) for each in pieces]
    else:
        for piece in pieces:
            piece /= ranks
    if fusion == "one":
        parts = torch.split(pieces[0], [each.numel() for each in given]) if given else ()
        pieces = [part.view(each.shape) for part, each in zip(parts, given, strict=True)]
    averaged = iter(pieces)
    return [None if each is None else next(averaged) for each in gradients]


def sum_over_ranks(numbers: Sequence[float], group: distributed.ProcessGroup | None = None) -> list[float]:
    """The sums over all ranks of as many numbers from each, exact up to 2**53; every rank makes the same call."""
    shared = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(shared, group=group)
    return [float(each) for each in shared]

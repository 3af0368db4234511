"""Gradients averaged over the ranks of torch.distributed: in one piece, as a group, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, distributed

from trilith.errors import InvalidRequestError
from trilith.ops.packing import MOST_INPUTS
from trilith.ops.torch_packing import aligned_flat_concat, aligned_flat_split

__all__ = ["FUSIONS", "Fusion", "average_gradients"]

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
        batches = [given[start : start + MOST_INPUTS] for start in range(0, len(given), MOST_INPUTS)]
        pieces = [aligned_flat_concat(batch, share) for batch in batches]
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
        pieces = [part for batch, flat in zip(batches, pieces, strict=True) for part in aligned_flat_split(batch, flat)]
    averaged = iter(pieces)
    return [None if each is None else next(averaged) for each in gradients]

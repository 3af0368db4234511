"""`trilith.ops.embedding_map` and `trilith.ops.fused_gather` for tensors: gradients flow to the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import embedding_map, fused_gather, row_sums
from trilith.ops.torch_bridge import apply, array_of, integers_on, refuse_outside, scale_gradient, tensor_of, use_native

__all__ = ["fused_gather_embeddings_by_input", "gather_embeddings_by_input", "map_id_to_embedding"]


class _Fetch(torch.autograd.Function):
    """Rows at places that an IdMap found."""

    @staticmethod
    def forward(ctx: Any, known: embedding_map.IdMap, places: Any, *embeddings: Tensor) -> Tensor:
        ctx.known, ctx.places = known, places
        return tensor_of(embedding_map.fetch([array_of(each) for each in embeddings], places))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.known.rows(ctx.places)
        summed = row_sums.sum_rows_at(rows, array_of(grad), len(ctx.known))
        return None, None, *map(tensor_of, ctx.known.split(summed))


def map_id_to_embedding(
    ids: Sequence[Tensor], embeddings: Sequence[Tensor], wanted: Tensor, *, native: bool | None = None
) -> Tensor:
    """float32[*wanted.shape, d]: the row of every id; see `trilith.ops.embedding_map.map_id_to_embedding`.

    Args:
        ids: P times int64[n_p].
        embeddings: P times float32[n_p, d].
        wanted: int64 of any shape.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    _check(ids, embeddings)
    if not use_native(native, *embeddings):
        known = embedding_map.IdMap([array_of(each) for each in ids])
        return apply(_Fetch, known, known.find(array_of(wanted)), *embeddings)  # type: ignore[no-any-return]
    return torch.cat(tuple(embeddings))[_rows(torch.cat(tuple(ids)), wanted, embeddings[0].device)]


def gather_embeddings_by_input(
    ids: Tensor, embeddings: Tensor, wanted: Tensor, *, native: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The row of every id, and which one it is; see `trilith.ops.embedding_map.gather_embeddings_by_input`.

    Args:
        ids: int64[m].
        embeddings: float32[m, d].
        wanted: int64 of any shape.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    _check([ids], [embeddings])
    if not use_native(native, embeddings):
        known = embedding_map.IdMap([array_of(ids)])
        mapping = known.find(array_of(wanted))
        return apply(_Fetch, known, mapping, embeddings), tensor_of(mapping)
    rows = _rows(ids, wanted, embeddings.device)
    return embeddings[rows], rows


def _check(ids: Sequence[Tensor], embeddings: Sequence[Tensor]) -> None:
    if len(ids) != len(embeddings) or not ids:
        raise InvalidRequestError(
            f"{len(ids)} lists of ids for {len(embeddings)} lists of embeddings; at least one pair"
        )
    for p, (some, rows) in enumerate(zip(ids, embeddings, strict=True)):
        if rows.ndim != 2 or some.shape != rows.shape[:1] or rows.shape[1] != embeddings[0].shape[1]:
            raise InvalidRequestError(f"embeddings[{p}] have shape {tuple(rows.shape)} for ids of {tuple(some.shape)}")


def _rows(ids: Tensor, wanted: Tensor, device: torch.device) -> Tensor:
    """int64 of the shape of `wanted`: the first place of every id."""
    known, asked = integers_on(device, ids), integers_on(device, wanted)
    ordered, order = torch.sort(known, stable=True)
    place = torch.searchsorted(ordered, asked).clamp(max=max(known.numel() - 1, 0))
    if known.numel() == 0:
        missing = torch.ones_like(asked, dtype=torch.bool)
    else:
        missing = ordered[place] != asked
    if bool(missing.any()):
        raise InvalidRequestError(f"there is id {int(asked[missing].reshape(-1)[0])}, which no list has")
    return order[place]


class _FusedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, offsets: Any, dims: Sequence[int], scale: float) -> tuple[Tensor, ...]:
        ctx.size, ctx.offsets, ctx.dims, ctx.scale = fused.numel(), offsets, dims, scale
        return tuple(map(tensor_of, fused_gather.fused_gather_embeddings_by_input(array_of(fused), offsets, dims)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = fused_gather.fused_gather_embeddings_by_input_gradient(
            ctx.size, [array_of(each) for each in grads], ctx.offsets, ctx.dims, scale=ctx.scale
        )
        return tensor_of(summed), None, None, None


def fused_gather_embeddings_by_input(
    fused: Tensor, offsets: Sequence[Tensor], dims: Sequence[int], *, scale: float = 1.0, native: bool | None = None
) -> tuple[Tensor, ...]:
    """K times float32[n_k, dims[k]]; see `trilith.ops.fused_gather.fused_gather_embeddings_by_input`.

    Args:
        fused: float32[E].
        offsets: K times int32[n_k].
        dims: K floats per vector.
        scale: What gradients are multiplied by on their way back.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, fused):
        starts = [array_of(each) for each in offsets]
        return apply(_FusedGather, fused, starts, tuple(dims), scale)  # type: ignore[no-any-return]
    if len(offsets) != len(dims):
        raise InvalidRequestError(f"{len(offsets)} lists of offsets for {len(dims)} dims")
    source = fused if scale == 1.0 else scale_gradient(fused, scale)
    pieces = []
    for each, dim in zip(offsets, dims, strict=True):
        places = integers_on(fused.device, each)
        refuse_outside("offset", places, fused.numel() - dim + 1)
        pieces.append(source[places[:, None] + torch.arange(dim, device=fused.device)])
    return tuple(pieces)

"""`trilith.ops.layout` for tensors: gradients flow to the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.ops import layout
from trilith.ops.layout import FidOffsets, Request
from trilith.ops.layout_config import FeatureConfig, FeatureConfigs, OutType, PoolingType
from trilith.ops.layout_kernels import SHARED
from trilith.ops.torch_bridge import apply, array_of, integers_on, scale_gradient, tensor_of, use_native

__all__ = ["fused_embedding_to_layout"]


class _Layout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, offsets: FidOffsets, configs: FeatureConfigs, scale: float, *embeddings: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.offsets, ctx.configs, ctx.scale = offsets, configs, scale
        arrays = [array_of(each) for each in embeddings]
        # The gradient needs the shapes only; views of one float keep no memory alive.
        ctx.shapes = [np.broadcast_to(np.float32(0), each.shape) for each in arrays]
        return tuple(map(tensor_of, layout.fused_embedding_to_layout(arrays, offsets, configs)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = layout.fused_embedding_to_layout_grad(
            [array_of(each) for each in grads], ctx.shapes, ctx.offsets, ctx.configs, scale=ctx.scale
        )
        return None, None, None, *map(tensor_of, found)


def fused_embedding_to_layout(
    embeddings: Sequence[Tensor],
    offsets: FidOffsets,
    configs: FeatureConfigs,
    *,
    scale: float = 1.0,
    native: bool | None = None,
) -> list[Tensor]:
    """Pool a batch's vectors into the layouts' tensors; see `trilith.ops.layout.fused_embedding_to_layout`.

    Args:
        embeddings: Version 4: one float32[floats]. Others: K * P buffers.
        offsets: Where the vectors are.
        configs: What becomes of them.
        scale: What gradients are multiplied by on their way back.
        native: Use torch's own operations rather than the kernels; None: exactly on a GPU.
    """
    if not use_native(native, *embeddings):
        return list(apply(_Layout, offsets, configs, scale, *embeddings))
    device = embeddings[0].device
    flat = torch.cat([each.reshape(-1) for each in embeddings])
    if scale != 1.0:
        flat = scale_gradient(flat, scale)
    sizes = np.array([each.numel() for each in embeddings])
    bases = np.cumsum(sizes) - sizes
    lists = layout.embedding_lists(
        [np.broadcast_to(np.float32(0), each.shape) for each in embeddings], offsets, configs
    )
    batches = []
    for request, (which, begins, lengths) in zip(layout.split_requests(offsets, configs), lists, strict=True):
        starts = integers_on(device, bases[which] + begins)
        batches.append(_request(request, starts, integers_on(device, lengths), flat, offsets.version <= 2, configs))
    return [torch.cat(tensors) if len(batches) > 1 else tensors[0] for tensors in zip(*batches, strict=True)]


def _request(
    request: Request, starts: Tensor, lengths: Tensor, flat: Tensor, by_row: bool, configs: FeatureConfigs
) -> list[Tensor]:
    """The layouts of one request."""
    device = flat.device
    codes = torch.from_numpy(request.fids.view(np.int64)).to(device)
    place, position = codes >> 32, codes & 0xFFFFFFFF
    firsts = request.firsts.astype(np.int64)
    firsts[-1] -= 1
    pooled = {}
    for f, name in enumerate(configs.feature_names):
        feature = configs.features[name]
        row, shared = int(firsts[f] & (SHARED - 1)), bool(firsts[f] & SHARED)
        count = int((firsts[f + 1] & (SHARED - 1)) - row)
        rows = (
            request.rows[row : row + (1 if shared else request.batch) + 1].astype(np.int64)
            if count
            else np.zeros(2, np.int64)
        )
        part = slice(int(rows[0]), int(rows[-1]))
        offset = position[part] * (feature.dim if by_row else 1)
        outside = (place[part] >= starts.numel()) | (place[part] < 0)
        outside |= offset + feature.dim > lengths[place[part].clamp(0, starts.numel() - 1)]
        if bool(outside.any()):
            raise InvalidRequestError(f"an id of feature {name!r} points outside its list")
        begin = starts[place[part]] + offset
        sizes = integers_on(device, np.diff(rows))
        vectors = flat[begin[:, None] + torch.arange(feature.dim, device=device)]
        values = _pool(vectors, sizes, feature)
        pooled[name] = values.expand(request.batch, *values.shape[1:]) if values.shape[0] == 1 else values
    return [tensor for name in sorted(configs.layouts) for tensor in _arrange(pooled, configs, name)]


def _pool(vectors: Tensor, sizes: Tensor, feature: FeatureConfig) -> Tensor:
    """float32[rows, d], or [rows, places, d] for FIRSTN."""
    rows = torch.arange(sizes.numel(), device=vectors.device).repeat_interleave(sizes)
    if feature.pooling_type is PoolingType.FIRSTN:
        places = feature.max_sequence_length
        within = torch.arange(rows.numel(), device=vectors.device) - (sizes.cumsum(0) - sizes)[rows]
        kept = within < places
        out = vectors.new_zeros(sizes.numel() * places, feature.dim)
        return out.index_put((rows[kept] * places + within[kept],), vectors[kept]).view(-1, places, feature.dim)
    sums = vectors.new_zeros(sizes.numel(), feature.dim).index_add(0, rows, vectors)
    if feature.pooling_type is PoolingType.MEAN:
        return sums / sizes.clamp(min=1).to(sums.dtype)[:, None]
    return sums


def _arrange(pooled: dict[str, Tensor], configs: FeatureConfigs, name: str) -> list[Tensor]:
    """A layout's tensors."""
    out = configs.layouts[name]
    pieces = [pooled[each.feature_name][..., each.start : each.end] for each in out.slices]
    if out.out_type is OutType.NONE:
        return [piece.contiguous() for piece in pieces]
    if out.out_type is OutType.CONCAT:
        return [torch.cat(pieces, dim=-1)]
    return [torch.stack(pieces, dim=1)] if out.out_type is OutType.STACK else [torch.stack(pieces).sum(0)]

"""FusedLayouts: partitioned tables as a torch module, whose layouts are the model's tensors.

On the CPU the kernels of `trilith.ops.layout` lay them out, elsewhere torch's own operations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trilith.errors import InvalidRequestError
from trilith.nn.anchored import Anchored, outside_graphs
from trilith.nn.bridge import Bridge, pick_device
from trilith.nn.pooling import make_pooling
from trilith.ops import layout
from trilith.ops.layout import FidOffsets, Request
from trilith.ops.layout_config import FeatureConfigs, OutType
from trilith.ops.layout_kernels import SHARED
from trilith.ops.ragged import Ragged
from trilith.pipelining import Prefetcher

if TYPE_CHECKING:
    from trilith.tables.partitioned import Fetched, PartitionedTables

__all__ = ["FusedLayouts", "layouts_by_kernel", "layouts_by_torch"]

_T = TypeVar("_T")


class _Rows(torch.autograd.Function):
    """One graph node for the rows of a batch, so that autograd calls back once, with every gradient at hand."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, tables: PartitionedTables, fetched: Fetched, bridge: Bridge, learn: bool
    ) -> tuple[Tensor, ...]:
        ctx.tables, ctx.fetched, ctx.bridge, ctx.learn = tables, fetched, bridge, learn
        ctx.set_materialize_grads(False)
        return tuple(bridge.to_device(rows.reshape(-1)) for rows in fetched.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None, None]:
        if not ctx.learn:
            return None, None, None, None, None
        rows = ctx.fetched.rows
        ctx.tables.push(
            ctx.fetched,
            [
                np.zeros(each.size, np.float32) if grad is None else ctx.bridge.to_host(grad)
                for each, grad in zip(rows, grads, strict=True)
            ],
        )
        return None, None, None, None, None


class FusedLayouts(Anchored):
    """Layouts of a batch as tensors; backward steps the batch's rows, in one request per PS, except in `eval()`.

    Args:
        tables: The features' tables and the layouts; its `async_push` says how many updates may be on their way.
        device: Where the layouts are made; "auto" takes CUDA where there is one.
    """

    def __init__(self, tables: PartitionedTables, *, device: str | torch.device | None = "cpu") -> None:
        super().__init__(Bridge(pick_device(device)))
        self.tables = tables

    def prefetch(self, batches: Iterable[_T], depth: int, *, sharded: Callable[[_T], Any]) -> Prefetcher[_T, Fetched]:
        """Go over batches with their rows looked up, `depth` of them ahead.

        Args:
            batches: Anything.
            depth: 0 looks every batch up when it is taken.
            sharded: Gives what `PartitionedTables.shard` makes of a batch.
        """
        return Prefetcher(batches, lambda batch: self.tables.fetch(sharded(batch)), depth)

    @outside_graphs
    def forward(self, fetched: Fetched) -> dict[str, Any]:
        """Return by layout its tensor, or its tensors for type NONE.

        Args:
            fetched: What `PartitionedTables.fetch` gives.
        """
        rows = _Rows.apply(  # type: ignore[no-untyped-call]
            self.anchor, self.tables, fetched, self.bridge, self.training
        )
        lay_out = layouts_by_kernel if rows[0].device.type == "cpu" else layouts_by_torch
        tensors: Any = lay_out(rows, fetched.offsets, self.tables.configs)
        return dict(layout.nest_layout(tensors, self.tables.configs))

    def drain(self) -> None:
        """Wait until all gradients have been applied; raises what a push in the background ended with."""
        self.tables.drain()


class _Layouts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offsets: FidOffsets, configs: FeatureConfigs, *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.offsets, ctx.configs = offsets, configs
        # The gradient needs the shapes only; views of one float keep no memory alive.
        ctx.shapes = [np.broadcast_to(np.float32(0), each.shape) for each in embeddings]
        arrays = [each.detach().numpy() for each in embeddings]
        return tuple(map(torch.from_numpy, layout.fused_embedding_to_layout(arrays, offsets, configs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrays = [each.numpy() for each in grads]
        found = layout.fused_embedding_to_layout_grad(arrays, ctx.shapes, ctx.offsets, ctx.configs)
        return None, None, *map(torch.from_numpy, found)


def layouts_by_kernel(embeddings: Sequence[Tensor], offsets: FidOffsets, configs: FeatureConfigs) -> list[Tensor]:
    """Pool a batch's vectors into the layouts' tensors; see `trilith.ops.layout.fused_embedding_to_layout`.

    Args:
        embeddings: On the CPU. Version 4: one float32[floats]. Others: K * P buffers.
        offsets: Where the vectors are.
        configs: What becomes of them.
    """
    return list(_Layouts.apply(offsets, configs, *embeddings))  # type: ignore[no-untyped-call]


def layouts_by_torch(embeddings: Sequence[Tensor], offsets: FidOffsets, configs: FeatureConfigs) -> list[Tensor]:
    """The same on any device; arguments as for `layouts_by_kernel`."""
    flat = torch.cat([each.reshape(-1) for each in embeddings])
    sizes = np.array([each.numel() for each in embeddings])
    bases = np.cumsum(sizes) - sizes
    shapes = [np.broadcast_to(np.float32(0), each.shape) for each in embeddings]
    lists = layout.embedding_lists(shapes, offsets, configs)
    batches = []
    for request, (which, begins, lengths) in zip(layout.split_requests(offsets, configs), lists, strict=True):
        batches.append(_request(request, bases[which] + begins, lengths, flat, offsets.version <= 2, configs))
    return [torch.cat(tensors) if len(batches) > 1 else tensors[0] for tensors in zip(*batches, strict=True)]


def _request(
    request: Request,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    flat: Tensor,
    by_row: bool,
    configs: FeatureConfigs,
) -> list[Tensor]:
    """The layouts of one request."""

    def to_device(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(flat.device)

    place, position = (request.fids >> np.uint64(32)).astype(np.int64), request.fids.astype(np.uint32).astype(np.int64)
    firsts = request.firsts.astype(np.int64)
    firsts[-1] -= 1
    pooled = {}
    for f, name in enumerate(configs.feature_names):
        feature = configs.features[name]
        row, shared = int(firsts[f] & (SHARED - 1)), bool(firsts[f] & SHARED)
        rows = np.zeros(2, np.int64)  # of a feature without any
        if (firsts[f + 1] & (SHARED - 1)) > row:
            rows = request.rows[row : row + (1 if shared else request.batch) + 1].astype(np.int64)
        part = slice(int(rows[0]), int(rows[-1]))
        bags = Ragged(np.arange(part.start, part.stop), rows - rows[0])
        if feature.combiner.n:
            bags = bags.first(feature.combiner.n)
        offset = position[part] * (feature.dim if by_row else 1)
        outside = place[part] >= starts.size
        outside |= offset + feature.dim > lengths[place[part].clip(max=starts.size - 1)]
        if outside.any():
            raise InvalidRequestError(f"an id of feature {name!r} points outside its list")
        begin = to_device((starts[place[part]] + offset)[bags.values - part.start])
        vectors = flat[begin[:, None] + torch.arange(feature.dim, device=flat.device)]
        values = make_pooling([bags.lengths], [feature.combiner], to_device).forward(vectors)
        pooled[name] = values.expand(request.batch, *values.shape[1:]) if values.shape[0] == 1 else values
    return [tensor for name in sorted(configs.layouts) for tensor in _arrange(pooled, configs, name)]


def _arrange(pooled: dict[str, Tensor], configs: FeatureConfigs, name: str) -> list[Tensor]:
    """A layout's tensors."""
    out = configs.layouts[name]
    pieces = [pooled[each.feature_name][..., each.start : each.end] for each in out.slices]
    if out.out_type is OutType.NONE:
        return [piece.contiguous() for piece in pieces]
    if out.out_type is OutType.CONCAT:
        return [torch.cat(pieces, dim=-1)]
    return [torch.stack(pieces, dim=1)] if out.out_type is OutType.STACK else [torch.stack(pieces).sum(0)]

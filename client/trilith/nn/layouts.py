"""FusedLayouts: partitioned tables as a torch module, whose layouts are the model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trilith.nn.anchored import Anchored
from trilith.nn.bridge import Bridge, pick_device
from trilith.nn.eager import outside_graphs
from trilith.ops.layout import nest_layout
from trilith.ops.torch_layout import fused_embedding_to_layout
from trilith.pipelining import Prefetcher

if TYPE_CHECKING:
    from trilith.tables.partitioned import Fetched, PartitionedTables

__all__ = ["FusedLayouts"]

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
        tensors: Any = fused_embedding_to_layout(rows, fetched.offsets, self.tables.configs)
        return dict(nest_layout(tensors, self.tables.configs))

    def drain(self) -> None:
        """Wait until all gradients have been applied; raises what a push in the background ended with."""
        self.tables.drain()

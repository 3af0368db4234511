"""One step's lookup of all tables as one node of torch's graph: rows in, one push of gradients out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trilith.nn.bridge import Bridge
from trilith.nn.exchange import Exchange
from trilith.nn.pooling import Pooling

__all__ = ["FetchedRows", "Lookup", "Output", "Step"]


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of a step: a run of a table's ids and how their rows become vectors."""

    table: str
    start: int
    stop: int
    pooling: Pooling


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: what was looked up and what its gradients will be pushed for.

    Attributes:
        exchange: With the cluster.
        bridge: To the device.
        ids: By table.
        outputs: What becomes of the rows.
        create: Whether ids without a row may be given one; evaluation never does.
    """

    exchange: Exchange
    bridge: Bridge
    ids: dict[str, npt.NDArray[np.uint64]]
    outputs: list[Output]
    create: bool

    def fetch(self) -> dict[str, npt.NDArray[np.float32]]:
        """Look all tables up in one call: per table the float32[n, dim] rows of its ids."""
        return self.exchange.lookup(self.ids, create=self.create)


@dataclass(frozen=True, slots=True)
class FetchedRows:
    """A batch whose rows have been looked up: what `EmbeddingCollection.fetch` gives and its `forward` takes.

    Attributes:
        step: What was looked up.
        rows: What was found, per table float32[n, dim].
        groups: Per output its features.
        samples: Number of samples.
        once: Whether they go through a model once: vectors then lie where the rows do, and need not be copied.
    """

    step: Step
    rows: dict[str, npt.NDArray[np.float32]]
    groups: list[list[str]]
    samples: int
    once: bool = False


class Lookup(torch.autograd.Function):
    """One graph node for all tables of a step, so that autograd calls back once, with every gradient at hand."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, step: Step, found: Mapping[str, npt.NDArray[np.float32]], learn: bool, own: bool
    ) -> tuple[Tensor, ...]:
        """Combine the rows of all tables.

        Args:
            ctx: Of autograd.
            anchor: Wants a gradient, so that backward is called.
            step: What was looked up.
            found: By table its rows.
            learn: Whether backward applies gradients.
            own: Whether outputs may be the memory of `found`; not where the caller can use it again.
        """
        rows = {table: step.bridge.to_device(found[table]) for table in step.ids}
        ctx.step, ctx.learn = step, learn
        ctx.set_materialize_grads(False)
        outputs = []
        for out in step.outputs:
            part = rows[out.table][out.start : out.stop]
            vectors = out.pooling.forward(part)
            outputs.append(vectors.clone() if vectors is part and not own else vectors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None, None]:
        """Apply the gradients of all tables in one call."""
        step: Step = ctx.step
        if not ctx.learn:
            step.exchange.say_once("a backward pass of embeddings in eval mode steps no rows")
            return None, None, None, None, None
        parts: dict[str, list[tuple[Output, Tensor]]] = {}
        for out, grad in zip(step.outputs, grads, strict=True):
            if grad is not None:
                parts.setdefault(out.table, []).append((out, out.pooling.backward(grad)))
        updates = {}
        for table, pieces in parts.items():
            ids = [step.ids[table][out.start : out.stop] for out, _ in pieces]
            values = torch.cat([grad for _, grad in pieces]) if len(pieces) > 1 else pieces[0][1]
            updates[table] = (np.concatenate(ids) if len(ids) > 1 else ids[0], step.bridge.to_host(values))
        step.exchange.push(updates)
        return None, None, None, None, None

"""Sampled negatives as a step of a pipeline, whose position holds what is drawn next and the pool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from trilith.data.pipeline.nodes import Context, Node
from trilith.data.pipeline.stages import Replayed, Stage, State
from trilith.data.records import Records
from trilith.data.samples.item_pool import ItemPool, PoolSnapshot
from trilith.data.samples.negatives import NegativeConfig, NegativeSampler

__all__ = ["NegativesNode"]

_SNAPSHOT_EVERY = 16_384
_WORKER_SEEDS = 0xBF58476D1CE4E5B9  # far apart, so that workers of a DataLoader draw differently

log = logging.getLogger(__name__)


class _Sampling:
    """A stage that runs a sampler."""

    def __init__(self, upstream: Stage, sampler: NegativeSampler) -> None:
        self._upstream = upstream
        self._sampler = sampler

    def __next__(self) -> Records:
        return self._sampler(next(self._upstream))

    def state(self) -> State:
        return {
            "drawn": self._sampler.drawn,
            "pool": self._sampler.pool.snapshot(),
            "upstream": self._upstream.state(),
        }

    def restore(self, state: State) -> None:
        pool = state["pool"]
        self._sampler.drawn = state["drawn"]
        self._sampler.pool.replace(pool.export() if isinstance(pool, PoolSnapshot) else pool)
        self._upstream.restore(state["upstream"])

    def close(self) -> None:
        self._upstream.close()


@dataclass(frozen=True, slots=True)
class NegativesNode(Node):
    """Negatives in front of positives."""

    config: NegativeConfig
    seed: int
    pool: ItemPool | None

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        lost = context.lost if context.on_error == "skip" else None
        index, count = context.worker
        if self.pool is not None and count > 1:
            log.warning("a pool of negatives that is passed is copied to each DataLoader worker; nothing comes back")
        seed = self.seed + context.epoch + _WORKER_SEEDS * index
        sampler = NegativeSampler(self.config, self.pool, seed=seed, lost=lost)
        return Replayed(_Sampling(upstream(context), sampler), every=_SNAPSHOT_EVERY)

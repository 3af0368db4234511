"""Dense variables on the PS: cut into partitions, spread over shards, put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trilith.arrays import as_values, refuse_non_finite
from trilith.cluster import Cluster
from trilith.errors import InvalidRequestError, UnknownVariableError
from trilith.routing import partition_owner, partition_sizes
from trilith.shard import DensePart, Float32Array, Shard
from trilith.steps import as_step
from trilith_proto import hash_table_pb2, ps_pb2

__all__ = ["Variables"]


class Variables:
    """The dense variables of one cluster. The PS keep them flat, and their shapes for clients to ask."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._shapes: dict[str, tuple[int, ...]] = {}

    def owners(self) -> dict[str, list[int]]:
        """Per variable this client knows, the owner of each partition."""
        count = self._cluster.count
        return {name: [partition_owner(name, p, count) for p in range(len(self._sizes(name)))] for name in self._shapes}

    def create(self, initial: Mapping[str, Any], optimizer: Any, timeout_s: float | None = None) -> dict[str, bool]:
        """See `Client.create_variables`."""
        config = optimizer if isinstance(optimizer, hash_table_pb2.OptimizerConfig) else optimizer.as_proto()
        cluster = self._cluster
        values = {name: as_values(name, "values", value) for name, value in initial.items()}
        for name, value in values.items():
            if not np.isfinite(value).all():
                refuse_non_finite(f"variable {name!r}", "values", value, float16=False)
        by_shard: dict[int, list[tuple[ps_pb2.VariableSpec, Float32Array]]] = {}
        for name, value in values.items():
            flat = value.reshape(-1)
            for partition, piece in enumerate(_cut(flat, partition_sizes(flat.size, cluster.count))):
                spec = ps_pb2.VariableSpec(
                    name=name,
                    partition=partition,
                    size=piece.size,
                    optimizer=config,
                    shape=ps_pb2.VariableShape(dims=value.shape),
                )
                by_shard.setdefault(partition_owner(name, partition, cluster.count), []).append((spec, piece))
        writes = cluster.writes()
        replies = cluster.fan_out(
            sorted(by_shard),
            lambda i, shard: shard.create_variables(
                [spec for spec, _ in by_shard[i]], [piece for _, piece in by_shard[i]], writes.of(i)
            ),
            timeout_s=timeout_s,
            writes=True,
        )
        created = dict.fromkeys(values, False)
        for shard, flags in replies.items():
            for (spec, _), flag in zip(by_shard[shard], flags, strict=True):
                created[spec.name] |= flag
        self._shapes.update({name: value.shape for name, value in values.items()})
        return created

    def shapes(self, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """See `Client.variables`."""
        self._discover(timeout_s)
        return dict(self._shapes)

    def pull(self, names: Sequence[str] | None, timeout_s: float | None = None) -> tuple[dict[str, Float32Array], int]:
        """See `Client.pull_variables`."""
        cluster = self._cluster
        if names is None or any(name not in self._shapes for name in names):
            self._discover()
        wanted = sorted(self._shapes) if names is None else list(names)
        refs: dict[int, list[tuple[str, int]]] = {0: []}  # PS 0 knows the step
        for name in wanted:
            for partition in range(len(self._sizes(name))):
                refs.setdefault(partition_owner(name, partition, cluster.count), []).append((name, partition))

        replies = cluster.fan_out(
            sorted(refs), lambda index, shard: shard.pull_variables(refs[index]), timeout_s=timeout_s
        )
        found = {ref: value for s, asked in refs.items() for ref, value in zip(asked, replies[s][0], strict=True)}
        values = {}
        for name in wanted:
            pieces = [found[name, partition] for partition in range(len(self._sizes(name)))]
            # Always a copy: what came over the wire is a read-only view of the whole reply.
            values[name] = np.concatenate(pieces).reshape(self._shapes[name])
        cluster.step = replies[0][1]
        return values, cluster.step

    def apply_gradients(
        self,
        gradients: Mapping[str, Any],
        learning_rate: float | None,
        global_step: int | None,
        allow_non_finite: bool,
        timeout_s: float | None = None,
        *,
        advance: int = 0,
    ) -> None:
        """See `Client.apply_dense_gradients`."""
        number = isinstance(learning_rate, (int, float, np.integer, np.floating)) and learning_rate is not True
        if learning_rate is not None and not (number and 0 < learning_rate <= np.finfo(np.float32).max):
            raise InvalidRequestError(f"learning_rate={learning_rate!r} is not a finite number above 0")
        rate = learning_rate or 0.0
        cluster = self._cluster
        step = cluster.step if global_step is None else as_step(global_step)
        parts = self._parts("gradients", gradients, allow_non_finite)
        if advance:
            parts.setdefault(0, [])  # it counts, whether or not it has a part of any variable
        writes = cluster.writes(global_step=step, advance=advance, allow_non_finite=allow_non_finite)

        def call(index: int, shard: Shard) -> None:
            write = writes.of(index)
            reached = shard.apply_dense_gradients(parts[index], write, learning_rate=rate)
            if write.advance:
                cluster.hear_step(reached)

        cluster.fan_out(sorted(parts), call, timeout_s=timeout_s, writes=True)

    def assign(self, values: Mapping[str, Any], allow_non_finite: bool, timeout_s: float | None = None) -> None:
        """See `Client.assign_variables`."""
        cluster = self._cluster
        parts = self._parts("values", values, allow_non_finite)
        writes = cluster.writes(global_step=cluster.step, allow_non_finite=allow_non_finite)
        cluster.fan_out(
            sorted(parts),
            lambda i, shard: shard.assign_variables(parts[i], writes.of(i)),
            timeout_s=timeout_s,
            writes=True,
        )

    def _parts(self, what: str, arrays: Mapping[str, Any], allow_non_finite: bool) -> dict[int, list[DensePart]]:
        """Check the arrays, then cut them up by shard."""
        cluster = self._cluster
        if any(name not in self._shapes for name in arrays):
            self._discover()
        by_shard: dict[int, list[DensePart]] = {}
        for name, array in arrays.items():
            value = as_values(name, what, array)
            sizes = self._sizes(name)
            if value.shape != self._shapes[name] and value.shape != (sum(sizes),):
                raise InvalidRequestError(
                    f"variable {name!r}: {what} have shape {value.shape}, the variable has {self._shapes[name]}"
                )
            if not allow_non_finite and not np.isfinite(value).all():
                refuse_non_finite(f"variable {name!r}", what, value, float16=False)
            for partition, piece in enumerate(_cut(value.reshape(-1), sizes)):
                owner = partition_owner(name, partition, cluster.count)
                by_shard.setdefault(owner, []).append(DensePart(name, partition, piece))
        return by_shard

    def _sizes(self, name: str) -> list[int]:
        if name not in self._shapes:
            raise UnknownVariableError(f"no variable {name!r}; this cluster has {sorted(self._shapes)}")
        return partition_sizes(math.prod(self._shapes[name]), self._cluster.count)

    def _discover(self, timeout_s: float | None = None) -> None:
        """Learn of variables that other clients created; one whose shape nobody gave is flat."""
        answers = self._cluster.describe(timeout_s=timeout_s)
        self._cluster.check_incarnations(answers, reading=True)
        sizes: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for answer in answers:
            for spec in answer.variables:
                sizes[spec.name] = sizes.get(spec.name, 0) + spec.size
                if spec.HasField("shape"):
                    shapes[spec.name] = tuple(spec.shape.dims)
        for name, size in sizes.items():
            shape = shapes.get(name, (size,))
            self._shapes.setdefault(name, shape if math.prod(shape) == size else (size,))


def _cut(flat: Float32Array, sizes: Sequence[int]) -> list[Float32Array]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(flat[start : start + size])
        start += size
    return pieces

"""Variables: partitions of dense model variables, each stepped by its own optimizer as one row."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from trilith.errors import InvalidRequestError, TableExistsError, UnknownVariableError
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith.shard import DensePart, Float32Array
from trilith.tables.checks import check_optimizer
from trilith.tables.differences import field_differences, tell
from trilith_proto import ps_pb2
from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.kernels.apply import make_dense_step
from trilith_services.ps.engine.row_layout import OptimizerLayout

__all__ = ["Partition", "Partitions", "VariableState"]


@dataclass(frozen=True, slots=True)
class VariableState:
    """A partition copied out: its spec, float32[size] values, float32 optimizer state and how that is divided."""

    spec: ps_pb2.VariableSpec
    values: Float32Array
    state: Float32Array
    slots: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Partition:
    """One partition: float32[size] values, float32 optimizer state, how often they changed, and the lock over all."""

    spec: ps_pb2.VariableSpec
    layout: OptimizerLayout
    values: Float32Array
    state: Float32Array
    version: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Partitions:
    """The dense partitions of one shard, by (name, partition)."""

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        """Make an empty set; `budget` is what values and states are charged to."""
        self._budget = budget if budget is not None else MemoryBudget(0)
        self._partitions: dict[tuple[str, int], Partition] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._partitions)

    def __iter__(self) -> Iterator[Partition]:
        return iter(list(self._partitions.values()))

    def create(self, specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array]) -> list[bool]:
        """Create partitions; one that exists keeps its values if size and optimizer agree.

        Returns:
            Per partition, whether it was created now.
        """
        return self.add(self.make(specs, initial))

    def make(self, specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array]) -> list[Partition]:
        """Partitions that are not here yet, their kernels compiled."""
        if len(specs) != len(initial):
            raise InvalidRequestError(f"{len(specs)} variables but {len(initial)} initial values")
        return [_new_partition(spec, values) for spec, values in zip(specs, initial, strict=True)]

    def add(self, made: Sequence[Partition]) -> list[bool]:
        """Put partitions here, all or, with TableExistsError or MemoryLimitError, none; see `create`."""
        with self._lock:
            for partition in made:
                known = self._partitions.get(_key(partition.spec))
                if known is not None and not _alike(known.spec, partition.spec):
                    raise TableExistsError(
                        f"variable {partition.spec.name!r} partition {partition.spec.partition} exists "
                        "with another config: "
                        + tell(field_differences(_shapeless(known.spec), _shapeless(partition.spec)), "here", "asked")
                    )
            new = [partition for partition in reversed(made) if _key(partition.spec) not in self._partitions]
            fresh = {_key(partition.spec): partition for partition in new}
            if fresh:
                names = sorted({name for name, _ in fresh})
                self._budget.take(_bytes(fresh.values()), f"variables {', '.join(map(repr, names))}")
            return [self._partitions.setdefault(_key(partition.spec), partition) is partition for partition in made]

    def pull(self, refs: Sequence[tuple[str, int]]) -> list[Float32Array]:
        """Copies of the current values, float32[size] each; all partitions if `refs` is empty."""
        pulled = []
        for partition in [self._get(*ref) for ref in refs] if refs else list(self):
            with partition.lock:
                pulled.append(partition.values.copy())
        return pulled

    def apply_gradients(self, parts: Sequence[DensePart], *, learning_rate: float, global_step: int) -> None:
        """One optimizer step per partition; `learning_rate` 0 takes the optimizer's own."""
        self.check_gradients(parts, learning_rate)
        for partition, grads in self._checked(parts, "gradients"):
            rate = np.float32(learning_rate if learning_rate else partition.layout.learning_rate)
            with partition.lock:
                make_dense_step(partition.layout.kind)(
                    address_of(partition.values),
                    address_of(partition.state),
                    address_of(grads),
                    len(grads),
                    address_of(partition.layout.parameters),
                    rate,
                    global_step,
                )
                partition.version += 1

    def check_gradients(self, parts: Sequence[DensePart], learning_rate: float) -> None:
        """Raise what `apply_gradients` would raise."""
        if not 0 <= learning_rate <= np.finfo(np.float32).max:
            raise InvalidRequestError(f"learning_rate={learning_rate} is no finite number from 0")
        self._checked(parts, "gradients")

    def check_values(self, parts: Sequence[DensePart]) -> None:
        """Raise what `assign` would raise."""
        self._checked(parts, "values")

    def assign(self, parts: Sequence[DensePart]) -> None:
        """Set values; optimizer state stays."""
        for partition, values in self._checked(parts, "values"):
            with partition.lock:
                partition.values[:] = values
                partition.version += 1

    def keep(self, keys: Collection[tuple[str, int]]) -> None:
        """Drop every partition whose (name, partition) is not among `keys`."""
        with self._lock:
            self._put({key: partition for key, partition in self._partitions.items() if key in keys})

    def export(self) -> list[VariableState]:
        """Copies of all partitions, each as it is at one moment."""
        states = []
        for partition in self:
            with partition.lock:
                states.append(
                    VariableState(
                        partition.spec, partition.values.copy(), partition.state.copy(), partition.layout.slots
                    )
                )
        return states

    @staticmethod
    def remake(states: Sequence[VariableState]) -> dict[tuple[str, int], Partition]:
        """Partitions as a checkpoint holds them, for `replace`."""
        made = {}
        for saved in states:
            partition = _new_partition(saved.spec, saved.values)
            if saved.state.shape != partition.state.shape:
                raise InvalidRequestError(
                    f"variable {saved.spec.name!r}: {saved.state.size} words of optimizer state, "
                    f"expected {partition.state.size}"
                )
            partition.state[:] = saved.state
            made[_key(saved.spec)] = partition
        return made

    def replace(self, made: dict[tuple[str, int], Partition]) -> None:
        """Put partitions that `remake` made in the place of all that are there."""
        with self._lock:
            self._put(made)

    def _put(self, partitions: dict[tuple[str, int], Partition]) -> None:
        before, self._partitions = self._partitions, partitions
        self._budget.add(_bytes(partitions.values()) - _bytes(before.values()))

    def _get(self, name: str, partition: int) -> Partition:
        try:
            return self._partitions[name, partition]
        except KeyError:
            known = sorted({known for known, _ in self._partitions})
            raise UnknownVariableError(f"no variable {name!r} partition {partition}; this PS has {known}") from None

    def _checked(self, parts: Sequence[DensePart], what: str) -> list[tuple[Partition, Float32Array]]:
        """Partitions with arrays that fit them, all looked at before the first is changed."""
        checked = []
        for part in parts:
            partition = self._get(part.name, part.partition)
            if part.values.shape != partition.values.shape or part.values.dtype != np.float32:
                raise InvalidRequestError(
                    f"variable {part.name!r} partition {part.partition}: {what} are {part.values.dtype}"
                    f"{list(part.values.shape)}, expected float32[{partition.values.size}]"
                )
            checked.append((partition, np.ascontiguousarray(part.values)))
        return checked


def _new_partition(spec: ps_pb2.VariableSpec, values: Float32Array) -> Partition:
    if values.dtype != np.float32 or values.shape != (spec.size,):
        raise InvalidRequestError(
            f"variable {spec.name!r} partition {spec.partition}: initial values are "
            f"{values.dtype}{list(values.shape)}, expected float32[{spec.size}]"
        )
    check_optimizer(f"variable {spec.name!r}", spec.optimizer, spec.size)
    layout = OptimizerLayout.of(spec.optimizer, spec.size)
    if layout.stochastic:
        raise InvalidRequestError(f"variable {spec.name!r}: stochastic rounding is for embedding rows")
    warm(make_dense_step(layout.kind))
    return Partition(spec, layout, np.array(values, np.float32), layout.initial_state.copy())


def _bytes(partitions: Iterable[Partition]) -> int:
    return sum(partition.values.nbytes + partition.state.nbytes for partition in partitions)


def _key(spec: ps_pb2.VariableSpec) -> tuple[str, int]:
    return spec.name, spec.partition


def _shapeless(spec: ps_pb2.VariableSpec) -> ps_pb2.VariableSpec:
    """The spec without its shape: values are kept flat, whatever shape a client gives them."""
    bare = ps_pb2.VariableSpec()
    bare.CopyFrom(spec)
    bare.ClearField("shape")
    return bare


def _alike(one: ps_pb2.VariableSpec, other: ps_pb2.VariableSpec) -> bool:
    return one == other or _shapeless(one) == _shapeless(other)

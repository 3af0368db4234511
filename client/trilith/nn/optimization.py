"""Optimization: one torch optimizer over all that a model learns, rows in a cluster and dense parameters alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.nn.anchored import Anchored, dense_parameters
from trilith.nn.dense import AllReduced, DenseOnPs
from trilith.nn.exchange import Exchange
from trilith.nn.groups import RateGroup, rate_of_table
from trilith.nn.reduction import sum_over_ranks

__all__ = ["Optimization"]

_RATES = "rates"  # where a state has those that no torch optimizer keeps

UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Held:
    """Gradients of one table's rows, held back since a backward pass.

    Attributes:
        ids: uint64[n]; an id may occur several times, and counts as often for occurrence thresholds.
        leaf: float32[n, dim], of which only `.grad` means anything: whoever unscales or clips changes that in place.
    """

    ids: UInt64Array
    leaf: Tensor


class Optimization(torch.optim.Optimizer):
    """Holds the gradients of rows from the backward pass to `step`, and steps rows and dense parameters together.

    To torch it is an optimizer whose `param_groups` hold the rows of the batches since the last step as leaves with
    gradients, beside the dense parameters. So what is done to optimizers is done to rows: a `torch.amp.GradScaler`
    unscales their gradients, and a step that it skips sends nothing; several backward passes before a step are one
    step of their sum; `torch.nn.utils.clip_grad_norm_(optimization.parameters_and_rows(), …)` bounds both together.

    A table's group has its rate as "lr" or, if it has a schedule, or segments with rates of their own, a factor that is
    1 at first and multiplies them. `torch.optim.lr_scheduler` changes it as it does those of dense parameters.

    The cluster counts a step for each that is taken, in the call that brings its last gradients: schedules and warm-up
    of tables follow. Workers who step together count it once, and each of those who do not counts its own.

    Ranks that step together agree about every step: it is taken by all or, where a gradient of one is not finite, by
    none. They call `average`, which finds that out, before a scaler's `unscale_`, and `clip` in place of torch's.

    Args:
        module: The model; all embeddings of `trilith.nn` in it are held back.
        dense: What steps the rest: any torch optimizer, `DenseOnPs`, `AllReduced`, or None where nothing else learns.
        row_scale: What gradients of rows are multiplied by when they are sent: 1 / world size where each of several
            ranks has the mean loss of its own batch and dense gradients are averaged, as DistributedDataParallel does.
        skip_non_finite: Take no step, rather than raise, where a gradient is NaN or infinite; `skipped` counts them.
        together: Whether the ranks of torch.distributed agree about every step, also where some have no gradients; with
            `AllReduced` alone, all of them have some.

    Attributes:
        skipped: Steps that were not taken for a gradient that was not finite.
        request_time: Unix seconds: when the rows of the next step are last updated, from which they expire; None: the
            time at which they are. Of ranks that step `together` it is the latest, once they have averaged. Forgotten
            with the gradients.
        counts: Whether steps are counted: in a cluster, which a model without embeddings need not have.
        applied: Steps that were taken with a gradient, of this rank or of one that steps together with it.
    """

    def __init__(
        self,
        module: nn.Module,
        dense: torch.optim.Optimizer | DenseOnPs | AllReduced | None = None,
        *,
        row_scale: float = 1.0,
        skip_non_finite: bool = False,
        together: bool = False,
    ) -> None:
        if not (math.isfinite(row_scale) and row_scale > 0):
            raise InvalidRequestError(f"row_scale={row_scale} is not a positive number; 1 / world size, or 1")
        self._module = module
        self._dense = dense
        self._row_scale = row_scale
        self._skip_non_finite = skip_non_finite
        self._together = together
        self.skipped = self.applied = 0
        self.request_time: int | None = None
        self._averaged = self._refused = False
        self._anything = False
        self._held: dict[Exchange, dict[str, list[_Held]]] = {}
        tables = _tables(module)
        exchanges = list(dict.fromkeys(exchange for exchange, _ in tables))
        self._row_groups = {
            (exchange, table): RateGroup(table, rate_of_table(exchange.client.table_info(table)))
            for exchange, table in tables
        }
        self._dense_group = RateGroup("dense", dense.learning_rate) if isinstance(dense, DenseOnPs) else None
        if not exchanges and dense is None:
            raise InvalidRequestError(
                f"{type(module).__name__} has neither embeddings nor an optimizer: nothing learns"
            )
        self.counts = bool(exchanges) or isinstance(dense, DenseOnPs)
        self._made = False
        super().__init__([torch.zeros(1)], {})  # torch wants something; what is stepped follows from what is looked up
        self._made = True
        for exchange in exchanges:
            self._held[exchange] = {}
            exchange.hold_for(self, partial(self._take, exchange))

    # ---- what torch asks of an optimizer -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the dense optimizer, and one of each table, with its rows that wait for a step."""
        for (exchange, table), each in self._row_groups.items():
            each.group["params"] = [held.leaf for held in self._held.get(exchange, {}).get(table, ())]
        return [*self._dense_groups(), *(each.group for each in self._row_groups.values())]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        del groups  # torch sets what it was given; here the groups follow from what was looked up

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the dense optimizer."""
        if self._made and isinstance(self._dense, torch.optim.Optimizer):
            self._dense.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of rows that were not sent too."""
        for tables in self._held.values():
            tables.clear()
        self._averaged = self._refused = self._anything = False
        self.request_time = None
        if isinstance(self._dense, torch.optim.Optimizer):
            self._dense.zero_grad(set_to_none)
        elif self._dense is not None:
            self._dense.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the rows' gradients and step the dense parameters; all gradients are forgotten then.

        Args:
            closure: Evaluates the model again, as for any torch optimizer; rarely wanted.

        Raises:
            NonFiniteError: A gradient is not finite, and such steps are not skipped; nothing was stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.average()
        if not self.finite():
            self.zero_grad()
            if not self._skip_non_finite:
                raise NonFiniteError("a gradient is NaN or infinite; no step was taken")
            self.skipped += 1
            return loss
        try:
            self._push()
        except BaseException:
            if isinstance(self._dense, AllReduced):  # the other ranks take this step, and dense values are one
                self._take_step()
            raise
        else:
            self._take_step()
        finally:
            self.zero_grad()
        return loss

    def _take_step(self) -> None:
        self._step_dense()
        self.applied += self._anything

    def state_dict(self) -> dict[str, Any]:
        """That of a torch optimizer of dense parameters, and rates of all else, whose other state is in the cluster."""
        optimizer = self._torch_optimizer()
        state = {} if optimizer is None else optimizer.state_dict()
        return {**state, _RATES: [each.state_dict() for each in self._rate_groups()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; tables that it does not know keep their rates."""
        rest = dict(state_dict)
        known = {str(state["name"]): state for state in rest.pop(_RATES, [])}
        for each in self._rate_groups():
            each.load_state_dict(known.get(each.group["name"], {}))
        if (optimizer := self._torch_optimizer()) is not None:
            optimizer.load_state_dict(rest)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def parameters_and_rows(self) -> list[Tensor]:
        """Dense parameters, and the rows of each table as one leaf whose `.grad` has a sum for each distinct id.

        What is looked at, or changed in place, is what the next `step` takes: for `clip_grad_norm_`. With `AllReduced`
        the dense gradients are averaged first, and every rank must call this alike.
        """
        self.average()
        for tables in self._held.values():
            for table, held in tables.items():
                tables[table] = [_summed(held)]
        return [*self._dense_parameters(), *(held.leaf for held in self._leaves())]

    @torch.no_grad()
    def average(self) -> None:
        """Average dense gradients over all ranks where `AllReduced` does; once a step, which does it if nobody has.

        A rank that has rows' gradients which are not finite makes all averages so: all ranks skip that step, or none.
        With `together` one of a rank's gradients is made infinite where those of others are, so that a scaler leaves
        the step out here as it does there.
        """
        if self._averaged:
            return
        if isinstance(self._dense, AllReduced):
            self._dense.average(1.0 if _finite(held.leaf.grad for held in self._leaves()) else math.nan)
        grads = self._grads()
        self._anything = bool(grads)
        if self._together:
            finite = _finite(grads)
            refused, having, *times = sum_over_ranks([not finite, self._anything, *_in_turn(self.request_time or 0)])
            self._refused, self._anything = refused > 0, having > 0
            self.request_time = int(max(times)) or None
            if self._refused and finite and grads:
                grads[0].fill_(math.inf)
        self._averaged = True

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Bound the norm of the step's gradients, dense ones and the rows of all ranks, by one coefficient for all.

        A row that several ranks step counts with each of its gradients, as it is stepped with each.

        Returns:
            The norm before.
        """
        self.parameters_and_rows()
        square = sum(_square(held.leaf.grad) for held in self._leaves()) * self._row_scale**2
        if self._together or isinstance(self._dense, AllReduced):
            square = sum_over_ranks([square])[0]
        norm = math.sqrt(square + sum(_square(each.grad) for each in self._dense_parameters()))
        if norm > max_norm:
            for grad in self._grads():
                grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def finite(self) -> bool:
        """Whether all gradients are finite: of all ranks, where they step together and have averaged."""
        return not self._refused and _finite(self._grads())

    def has_gradients(self) -> bool:
        """Whether there is anything to step with, on this rank."""
        return bool(self._grads())

    def _grads(self) -> list[Tensor]:
        grads = [held.leaf.grad for held in self._leaves()]
        grads += [parameter.grad for parameter in self._dense_parameters()]
        return [grad for grad in grads if grad is not None]

    def rates(self) -> dict[str, float]:
        """Learning rates of all groups: of a torch optimizer by their number, of rows by the name of their table."""
        groups = enumerate([*self._dense_groups(), *(each.group for each in self._row_groups.values())])
        return {str(group.get("name", number)): float(group["lr"]) for number, group in groups if "lr" in group}

    def pull(self) -> None:
        """Take over the values that dense parameters have on the PS, where they are there."""
        if isinstance(self._dense, DenseOnPs):
            self._dense.pull()

    def drain(self) -> None:
        """Wait until all that was sent has been applied."""
        for exchange in self._held:
            exchange.drain()
        if isinstance(self._dense, DenseOnPs):
            self._dense.drain()

    def close(self) -> None:
        """Hold nothing back any longer; backward passes step rows by themselves again."""
        self.zero_grad()
        for exchange in self._held:
            exchange.release(self)

    def _take(self, exchange: Exchange, updates: Mapping[str, tuple[UInt64Array, Float32Array]]) -> None:
        for table, (ids, grads) in updates.items():
            self._held[exchange].setdefault(table, []).append(_Held(ids, _leaf(grads)))

    def _leaves(self) -> Iterable[_Held]:
        return (held for tables in self._held.values() for parts in tables.values() for held in parts)

    def _push(self) -> None:
        for number, (exchange, tables) in enumerate(self._held.items(), 1):
            updates = {}
            for table, parts in tables.items():
                grads = [_grad(held) for held in parts]
                values = np.concatenate(grads) if len(grads) > 1 else grads[0]
                if self._row_scale != 1.0:
                    values = values * np.float32(self._row_scale)
                ids = np.concatenate([held.ids for held in parts]) if len(parts) > 1 else parts[0].ids
                updates[table] = (ids, values)
            last = number == len(self._held) and not isinstance(self._dense, DenseOnPs)
            counted = last and self._anything
            mine = int(counted and self._counts_here(exchange))
            factors = {table: self._row_groups[exchange, table].factor for table in updates}
            exchange.send(
                updates,
                advance=mine,
                heard=int(counted) - mine,
                rate_factors=_changed(factors),
                request_time=self.request_time,
            )

    def _counts_here(self, exchange: Exchange) -> bool:
        """Whether this process counts its steps: of workers that step together one does, or each for itself."""
        together = (self._together or isinstance(self._dense, AllReduced)) and not exchange.client.together
        return not together or distributed.get_rank() == 0

    def _step_dense(self) -> None:
        if isinstance(self._dense, DenseOnPs):
            assert self._dense_group is not None
            # The last that is sent of a step.
            self._dense.step(learning_rate=self._dense_group.rate(), advance=int(self._anything))
        elif self._dense is not None:
            self._dense.step()

    def _dense_groups(self) -> list[dict[str, Any]]:
        optimizer = self._torch_optimizer()
        if optimizer is not None:
            return optimizer.param_groups
        if self._dense_group is None:
            return []
        self._dense_group.group["params"] = self._dense_parameters()
        return [self._dense_group.group]

    def _rate_groups(self) -> list[RateGroup]:
        """Those whose rates no torch optimizer knows."""
        return [*([] if self._dense_group is None else [self._dense_group]), *self._row_groups.values()]

    def _dense_parameters(self) -> list[nn.Parameter]:
        optimizer = self._torch_optimizer()
        if optimizer is not None:
            return [each for group in optimizer.param_groups for each in group["params"]]
        if self._dense is None:
            return []
        return [parameter for _, parameter in dense_parameters(self._module)]

    def _torch_optimizer(self) -> torch.optim.Optimizer | None:
        if isinstance(self._dense, AllReduced):
            return self._dense.optimizer
        return self._dense if isinstance(self._dense, torch.optim.Optimizer) else None


def _tables(module: nn.Module) -> list[tuple[Exchange, str]]:
    """All tables that embeddings in a module are looked up in, by who looks up."""
    found = []
    for each in module.modules():
        if isinstance(each, Anchored) and isinstance(exchange := getattr(each, "exchange", None), Exchange):
            names: tuple[str, ...] = getattr(each, "table_names", ())
            found += [(exchange, table) for table in names]
    return list(dict.fromkeys(found))


def _changed(factors: Mapping[str, float]) -> dict[str, float]:
    """Those that are not 1, so that nothing is said where no rate has been changed."""
    return {table: factor for table, factor in factors.items() if factor != 1.0}


def _in_turn(number: float) -> list[float]:
    """This rank's number in its place of a list, whose sum over the ranks has those of all."""
    numbers = [0.0] * distributed.get_world_size()
    numbers[distributed.get_rank()] = number
    return numbers


def _finite(grads: Iterable[Tensor | None]) -> bool:
    """Whether all are finite; a sum says so in a tenth of the time, unless it is too large for its type."""
    here: list[Tensor] = []
    on_device: list[Tensor] = []
    for grad in grads:
        if grad is not None:
            (here if grad.device.type == "cpu" else on_device).append(grad)
    if on_device:  # which is waited for once
        sums = torch.stack([grad.sum(dtype=torch.float32) for grad in on_device])
        if not torch.isfinite(sums).all() and not all(bool(torch.isfinite(grad).all()) for grad in on_device):
            return False
    return all(math.isfinite(grad.sum().item()) or bool(torch.isfinite(grad).all()) for grad in here)


def _square(grad: Tensor | None) -> float:
    """The square of a gradient's norm."""
    return 0.0 if grad is None else float(grad.double().square().sum())


def _leaf(grads: Float32Array) -> Tensor:
    """A tensor whose `.grad` is a copy of `grads`, which may be shared: scalers and clipping write into it."""
    given = torch.from_numpy(grads.copy())
    leaf = torch.zeros(()).expand(given.shape)
    leaf.grad = given
    return leaf


def _grad(held: _Held) -> Float32Array:
    assert held.leaf.grad is not None
    array: Float32Array = held.leaf.grad.numpy()
    return array


def _summed(parts: list[_Held]) -> _Held:
    """The gradients of a table's distinct ids: sums at the places where ids occur first, nothing at the others.

    All places are kept, so that the PS still learn how often each id occurred.
    """
    ids = np.concatenate([held.ids for held in parts]) if len(parts) > 1 else parts[0].ids
    grads = np.concatenate([_grad(held) for held in parts]) if len(parts) > 1 else _grad(parts[0])
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    sums = np.zeros((first.size, grads.shape[1]), np.float32)
    np.add.at(sums, inverse, grads)
    out = np.zeros_like(grads)
    out[first] = sums
    return _Held(ids, _leaf(out))

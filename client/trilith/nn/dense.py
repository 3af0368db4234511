"""The dense part of a model in distributed training: on the PS, asynchronously, or all-reduced, synchronously."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from trilith.errors import InvalidRequestError
from trilith.nn.anchored import dense_parameters
from trilith.nn.bridge import Bridge
from trilith.nn.reduction import Fusion, average_gradients
from trilith.pipelining import Ahead, Lane, Pusher
from trilith.tables.config import own_rate
from trilith_proto.hash_table_pb2 import OptimizerConfig

__all__ = ["VARIABLE_PREFIX", "AllReduced", "DenseOnPs", "VariableClient"]

VARIABLE_PREFIX = "dense/"
"""Goes before the names of parameters in a cluster, where nobody says another one."""

Float32Array = npt.NDArray[np.float32]


class VariableClient(Protocol):
    """The verbs of `trilith.Client` that dense parameters need."""

    def create_variables(self, initial: Mapping[str, Any], *, optimizer: Any) -> Mapping[str, bool]:
        """Create variables; existing ones keep their values."""

    def pull_variables(self, names: Any = None) -> tuple[Mapping[str, Float32Array], int]:
        """Current values and the global step."""

    def apply_dense_gradients(
        self, gradients: Mapping[str, Any], *, learning_rate: float | None = None, advance: int = 0
    ) -> None:
        """One step of each variable's optimizer; the model goes on by `advance` steps with it."""

    def assign_variables(self, values: Mapping[str, Any]) -> None:
        """Set variables."""


class DenseOnPs:
    """Keeps a module's parameters on the PS, whose optimizer steps them; workers never wait for each other.

    Call `pull` before a forward pass and `step` after the backward pass. A gradient may be as many steps old as other
    workers have taken in between. Buffers, such as running means, stay with the module.

    With `prefetch` a pull gives the values that were read during the step before, with `async_push` a step does not
    wait for its gradients to be applied: a pull then lacks at most this worker's last `1 + async_push` steps.

    Args:
        client: The cluster.
        module: Its trainable parameters become variables, or take the values that the cluster has.
        optimizer: One of `trilith.tables`; runs on the PS.
        prefix: Goes before the parameters' names in the cluster. None is "dense/", which one module of a client may
            have at a time: others need a prefix of their own, or, to train the same values, to say "dense/" themselves.
        prefetch: Whether values are read one step ahead.
        async_push: How many steps may be on their way; 0 waits for each. `drain` waits for all.
        lane: Makes reads ahead and steps, in the order of the loop: runs are then reproducible. None: a thread each.
    """

    def __init__(
        self,
        client: VariableClient,
        module: nn.Module,
        optimizer: Any,
        *,
        prefix: str | None = None,
        prefetch: bool = False,
        async_push: int = 0,
        lane: Lane | None = None,
    ) -> None:
        self._client = client
        self._ahead = Ahead(self._read, lane=lane) if prefetch else None
        self._pusher = Pusher(async_push, lane=lane)
        self._parameters = _claimed(client, module, prefix)
        self._optimizer = optimizer
        self.create()
        self.pull()

    @property
    def learning_rate(self) -> float:
        """The optimizer's own."""
        optimizer = self._optimizer
        return own_rate(optimizer if isinstance(optimizer, OptimizerConfig) else optimizer.as_proto())

    def create(self) -> None:
        """Create the variables that the cluster lacks, with the module's present values; others keep theirs."""
        self._client.create_variables(self._values(), optimizer=self._optimizer)

    def pull(self) -> int:
        """Take the current values over into the module; returns the global step."""
        values, step = self._read() if self._ahead is None else self._ahead.take()
        _copy_into(self._parameters, values)
        return step

    def publish(self) -> None:
        """Set the variables to the module's present values; optimizer state stays."""
        self._client.assign_variables(self._values())
        if self._ahead is not None:
            self._ahead.forget()

    def step(self, *, learning_rate: float | None = None, advance: int = 0) -> None:
        """Send the gradients of the last backward pass; parameters without one stay as they are.

        They are forgotten then, also where sending them fails: the next step shall not have them in it. After a
        backward pass that failed, call `zero_grad`.

        Args:
            learning_rate: Of this step; None takes the optimizer's own.
            advance: Steps of the model that the gradients complete, which are counted with them.
        """
        bridge = _bridge(self._parameters)
        gradients = {
            name: bridge.to_host(parameter.grad)
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        self.zero_grad()
        options = {"advance": advance} if advance else {}
        if gradients or advance:
            self._pusher.push(
                lambda: self._client.apply_dense_gradients(gradients, learning_rate=learning_rate, **options)
            )

    def drain(self) -> None:
        """Wait until all gradients have been applied; the next pull reads the present values."""
        self._pusher.drain()
        if self._ahead is not None:
            self._ahead.forget()

    def close(self) -> None:
        """End the thread that pushes, drain first to lose nothing; other modules may take the names over."""
        self._pusher.close()
        _give_up(self._parameters)

    def _read(self) -> tuple[Mapping[str, Float32Array], int]:
        return self._client.pull_variables(list(self._parameters))

    def zero_grad(self) -> None:
        """Forget gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def _values(self) -> dict[str, Float32Array]:
        return _values_of(self._parameters)


class AllReduced:
    """Keeps a module's parameters equal in all workers: gradients are averaged with torch.distributed every step.

    All workers must take the same number of steps. The process group is the caller's; rank 0's initial values count.
    The cluster only stores the values that `publish` sends, so that checkpoints and readers have them.

    Args:
        client: The cluster.
        module: The dense part, the same in all workers.
        optimizer: A torch optimizer over the module's parameters.
        stored_as: One of `trilith.tables`; an optimizer the variables carry and that never runs.
        prefix: As for `DenseOnPs`.
        all_publish: Whether every rank publishes, each to its own shard, rather than rank 0 to all; see `PeerClient`.
        fusion: How gradients travel: "one" collective for all, "grouped" or "none"; see `trilith.nn.reduction`.
        float16: Whether gradients travel as float16.
    """

    def __init__(
        self,
        client: VariableClient,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stored_as: Any,
        prefix: str | None = None,
        all_publish: bool = False,
        fusion: Fusion = "one",
        float16: bool = False,
    ) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise InvalidRequestError("all-reduced parameters need torch.distributed.init_process_group first")
        self._client = client
        self.optimizer = optimizer
        self._averaged = False
        self._all_publish = all_publish
        self._fusion, self._float16 = fusion, float16
        self._parameters = _claimed(client, module, prefix)
        self._stored_as = stored_as
        self.create()
        # A cluster that was restored knows better than a fresh module; rank 0 decides for all what it knows.
        values, _ = client.pull_variables(list(self._parameters))
        _copy_into(self._parameters, values)
        with torch.no_grad():
            for parameter in self._parameters.values():
                distributed.broadcast(parameter, src=0)

    def create(self) -> None:
        """Create the variables that the cluster lacks, with the module's present values; others keep theirs."""
        self._client.create_variables(self._values(), optimizer=self._stored_as)

    def pull(self) -> None:
        """Nothing to do: the values are here."""

    def drain(self) -> None:
        """Nothing to do: every step is taken at once."""

    def close(self) -> None:
        """Other modules may take the names over; the process group is the caller's."""
        _give_up(self._parameters)

    def step(self, *, learning_rate: float | None = None, scale: float = 1.0) -> None:
        """Average the gradients over all workers and take one step; parameters that no worker has one for stay.

        Args:
            learning_rate: Of this step and later ones; None: as before.
            scale: What this worker's gradients are multiplied by before.
        """
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        try:
            if not self._averaged:
                self.average(scale)
            self.optimizer.step()
        finally:
            self.zero_grad()

    def average(self, scale: float = 1.0) -> None:
        """The first half of `step`, for who looks at the averages before; every rank does so or none."""
        parameters = list(self._parameters.values())
        present = torch.tensor([float(each.grad is not None) for each in parameters], device=parameters[0].device)
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        *averaged, counts = average_gradients(
            [*grads, present], scale=scale, fusion=self._fusion, float16=self._float16
        )
        assert counts is not None  # it was given
        for parameter, grad, count in zip(parameters, averaged, counts.tolist(), strict=True):
            parameter.grad = grad if count else None
        self._averaged = True

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._averaged = False
        self.optimizer.zero_grad(set_to_none=True)

    def publish(self) -> None:
        """Store the present values in the cluster; rank 0 does it before a checkpoint and at the end."""
        if self._all_publish or distributed.get_rank() == 0:
            self._client.assign_variables(self._values())

    def _values(self) -> dict[str, Float32Array]:
        return _values_of(self._parameters)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A parameter that has its values in a variable of a client's cluster."""

    client: weakref.ref[Any]
    name: str
    parameter: weakref.ref[nn.Parameter]


_CLAIMS: list[_Claim] = []
_CLAIMING = threading.Lock()


def _claimed(client: VariableClient, module: nn.Module, prefix: str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters of a module by variable; without a prefix, refused where another module has them."""
    found = {(prefix or VARIABLE_PREFIX) + name: parameter for name, parameter in dense_parameters(module)}
    if not found:
        raise InvalidRequestError(f"{type(module).__name__} has no trainable parameters")
    if prefix is not None:
        return found
    with _CLAIMING:
        _CLAIMS[:] = [each for each in _CLAIMS if each.client() is not None and each.parameter() is not None]
        for claim in _CLAIMS:
            if claim.client() is client and claim.parameter() is not found.get(claim.name, claim.parameter()):
                raise InvalidRequestError(
                    f"the variable {claim.name!r} is a parameter of another module already, and both would train the "
                    "same values; give each a prefix of its own, such as prefix='second/', or, where that is meant, "
                    f"prefix={VARIABLE_PREFIX!r}"
                )
        _CLAIMS.extend(_Claim(weakref.ref(client), name, weakref.ref(parameter)) for name, parameter in found.items())
    return found


def _give_up(parameters: Mapping[str, nn.Parameter]) -> None:
    """Other modules may have the names now."""
    gone = set(map(id, parameters.values()))
    with _CLAIMING:
        _CLAIMS[:] = [each for each in _CLAIMS if id(each.parameter()) not in gone]


def _bridge(parameters: Mapping[str, nn.Parameter]) -> Bridge:
    """To where the parameters are now."""
    return Bridge(next(iter(parameters.values())).device)


def _values_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Float32Array]:
    bridge = _bridge(parameters)
    return {name: bridge.to_host(parameter) for name, parameter in parameters.items()}


def _copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Float32Array]) -> None:
    bridge = _bridge(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            loaded: Tensor = bridge.to_device(np.ascontiguousarray(values[name], np.float32))
            parameter.copy_(loaded.view_as(parameter))

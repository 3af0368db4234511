"""Reloading: a checkpoint's dense values and optimizer state, as a model takes them that need not be the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.estimator.matching import Matched, Piece
from trilith.estimator.state import Job
from trilith.nn.anchored import dense_parameters
from trilith.nn.dense import VARIABLE_PREFIX, AllReduced, DenseOnPs
from trilith.shard import VariablePiece

__all__ = ["load_optimizer", "stepped_names", "tell", "values_of", "variables_of"]

log = logging.getLogger(__name__)

Dense = torch.optim.Optimizer | DenseOnPs | AllReduced | None


def values_of(matched: Matched, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that a model takes, by its own names."""
    return {name: _put_together(pieces, dense) for name, pieces in matched.sources.items()}


def _put_together(pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    cut = [tensors[each.name] if each.stop is None else tensors[each.name][each.start : each.stop] for each in pieces]
    return cut[0] if len(cut) == 1 else torch.cat(cut)


def stepped_names(task: nn.Module, dense: Dense) -> tuple[str, ...]:
    """Names of the parameters that an optimizer steps, in the order in which its state numbers them."""
    optimizer = _torch_optimizer(dense)
    if optimizer is None:
        return tuple(name for name, _ in dense_parameters(task))
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return tuple(names.get(id(each), "") for group in optimizer.param_groups for each in group["params"])


def variables_of(matched: Matched, job: Job, task: nn.Module) -> dict[str, list[VariablePiece]]:
    """What the PS take from a checkpoint into a task's variables, optimizer state included.

    None of those that were not on PS when it was written: there is no state of them there.
    """
    stepped = set() if "state" in job.optimizer else set(job.stepped)
    found = {}
    for name, _ in dense_parameters(task):
        pieces = matched.sources.get(name, ())
        if pieces and all(piece.name in stepped for piece in pieces):
            found[VARIABLE_PREFIX + name] = [_flat(piece, job.dense[piece.name]) for piece in pieces]
    return found


def _flat(piece: Piece, tensor: Tensor) -> VariablePiece:
    """Rows as the floats that they are."""
    name = VARIABLE_PREFIX + piece.name
    if piece.stop is None:
        return VariablePiece(name)
    row = math.prod(tensor.shape[1:])
    return VariablePiece(name, piece.start * row, (piece.stop - piece.start) * row)


def load_optimizer(dense: Dense, task: nn.Module, matched: Matched, job: Job) -> None:
    """Take over what a checkpoint's torch optimizer knew of the parameters that are taken from it.

    Rates and other options stay those of this optimizer. It begins anew where it is of another kind, and for parameters
    without such state.
    """
    optimizer = _torch_optimizer(dense)
    if optimizer is None:
        return
    mine: dict[str, Any] = optimizer.state_dict()
    if _options(mine) != _options(job.optimizer):
        if job.optimizer.get("state"):
            log.warning("the optimizer of dense parameters is of another kind than the checkpoint's: it begins anew")
        return
    numbers = {name: number for number, name in enumerate(job.stepped)}
    states: Mapping[int, Mapping[str, Any]] = job.optimizer["state"]
    for number, name in enumerate(stepped_names(task, dense)):
        pieces = matched.sources.get(name, ())
        known = [states.get(numbers.get(piece.name, -1)) for piece in pieces]
        found = _state(pieces, [each for each in known if each is not None], job.dense)
        if found is not None:
            mine["state"][number] = found
    optimizer.load_state_dict(mine)


def _state(
    pieces: Sequence[Piece], states: Sequence[Mapping[str, Any]], dense: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """An optimizer's state of a parameter of these pieces; None where it cannot be cut or joined as they are."""
    if not pieces or len(states) != len(pieces) or any(state.keys() != states[0].keys() for state in states):
        return None
    if len(pieces) == 1 and pieces[0].stop is None:
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in states[0].items()}
    found = {}
    for key, first in states[0].items():
        if not isinstance(first, Tensor) or first.dim() == 0:
            found[key] = first.clone() if isinstance(first, Tensor) else first  # such as the number of steps
            continue
        tensors = {piece.name: state[key] for piece, state in zip(pieces, states, strict=True)}
        if any(tensor.shape != dense[name].shape for name, tensor in tensors.items()):
            return None
        found[key] = _put_together(pieces, tensors).clone()
    return found


def _options(state: Mapping[str, Any]) -> set[str]:
    """Names of an optimizer's options, which tell its kind."""
    names = {str(name) for group in state.get("param_groups", ()) for name in group}
    return names - {"params", "initial_lr"}  # which schedulers add


def _torch_optimizer(dense: Dense) -> torch.optim.Optimizer | None:
    if isinstance(dense, AllReduced):
        return dense.optimizer
    return dense if isinstance(dense, torch.optim.Optimizer) else None


def tell(path: str, matched: Matched) -> None:
    """Say in a line each what has another name, what begins as it was made, and what is not taken."""
    if matched.renamed:
        pairs = ", ".join(f"{name} from {old}" for name, old in matched.renamed.items())
        log.info("%s: taken under other names: %s", path, pairs)
    if matched.missing:
        log.warning("%s has none of these, which begin as they were made: %s", path, ", ".join(matched.missing))
    if matched.left:
        log.warning("%s has these, which are not taken: %s", path, ", ".join(matched.left))

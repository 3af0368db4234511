"""Optimizer steps on one row segment, in place; formulas of Monolith's engine, one function per kind.

Every step has the form step(w, s, g, dim, p, lr, step): addresses of float32 weights[dim], state, gradient[dim] and
parameters, the learning rate, and the global step. Parameters are read into locals before the loop, so that no store
can be suspected of changing them and the loop vectorises. `_kind` says which they are, and what the state is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from trilith.ops.hashing import mix64, uniform01
from trilith.ops.jit import inlined
from trilith.ops.memory import load_f32, load_u32, load_u64, store_f32, store_u64

_ZERO = np.float32(0)
_ONE = np.float32(1)


class Slot(NamedTuple):
    """A part of a kind's state.

    Attributes:
        name: As the dump message calls it.
        initial: The config field that float32 words begin at; "" begins them at 0.
        words: How many; 0: one for each weight.
    """

    name: str
    initial: str = ""
    words: int = 0


class Kind(NamedTuple):
    """What the engine knows of an optimizer.

    Attributes:
        step: Its step.
        parameters: The config fields that the step reads, in the order of its parameter block.
        state: In storage order, which is the order of its dump.
    """

    step: Callable[..., Any]
    parameters: tuple[str, ...]
    state: tuple[Slot, ...]


KINDS: dict[str, Kind] = {}
"""By the name of its config's oneof field, every optimizer."""

_Step = TypeVar("_Step", bound=Callable[..., Any])


def _kind(name: str, parameters: tuple[str, ...] = (), state: tuple[Slot, ...] = ()) -> Callable[[_Step], _Step]:
    def register(function: _Step) -> _Step:
        step = inlined(function)
        KINDS[name] = Kind(step, parameters, state)
        return step

    return register


@_kind("sgd")
def _sgd(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    for d in range(dim):
        store_f32(w, d, load_f32(w, d) - lr * load_f32(g, d))


@_kind("adagrad", ("weight_decay_factor",), (Slot("norm", initial="initial_accumulator_value"),))
def _adagrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay = load_f32(p, 0)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        norm = load_f32(s, d) + grad * grad
        store_f32(s, d, norm)
        store_f32(w, d, weight - lr * grad / np.sqrt(norm))


@_kind(
    "dynamic_wd_adagrad",
    ("weight_decay_factor", "decouple_weight_decay"),
    (Slot("norm", initial="initial_accumulator_value"),),
)
def _dynamic_wd_adagrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay = load_f32(p, 0)
    if load_f32(p, 1) == _ZERO:
        _adagrad(w, s, g, dim, p, lr, step)
        return
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d)
        norm = load_f32(s, d) + grad * grad
        store_f32(s, d, norm)
        store_f32(w, d, weight - lr * grad / np.sqrt(norm) - lr * decay * weight)


@_kind(
    "ftrl",
    ("beta", "l1_regularization_strength", "l2_regularization_strength"),
    (Slot("zero"), Slot("norm", initial="initial_accumulator_value")),
)
def _ftrl(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    if lr == _ZERO:  # which is divided by: the start of a warm-up moves nothing
        return
    beta, l1, l2 = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2)
    for d in range(dim):
        grad = load_f32(g, d)
        old = load_f32(s, dim + d)
        norm = old + grad * grad
        sigma = (np.sqrt(norm) - np.sqrt(old)) / lr
        zero = load_f32(s, d) + grad - sigma * load_f32(w, d)
        store_f32(s, d, zero)
        store_f32(s, dim + d, norm)
        if abs(zero) <= l1:
            store_f32(w, d, _ZERO)
        else:
            # One-sided on purpose, as upstream: l1 counts where z has its sign bit set, and pushes away from zero.
            negative = _ONE if (load_u32(s, d) >> np.uint32(31)) != np.uint32(0) else _ZERO
            store_f32(w, d, lr * (negative * l1 - zero) / (np.sqrt(norm) + beta + l2 * lr))


@_kind(
    "group_ftrl",
    ("beta", "l1_regularization_strength", "l2_regularization_strength"),
    (Slot("zero"), Slot("norm", initial="initial_accumulator_value")),
)
def _group_ftrl(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    if lr == _ZERO:  # which is divided by: the start of a warm-up moves nothing
        return
    beta, l1, l2 = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2)
    square = np.float64(0)
    for d in range(dim):
        grad = load_f32(g, d)
        old = load_f32(s, dim + d)
        norm = old + grad * grad
        sigma = (np.sqrt(norm) - np.sqrt(old)) / lr
        zero = load_f32(s, d) + grad - sigma * load_f32(w, d)
        store_f32(s, d, zero)
        store_f32(s, dim + d, norm)
        square += np.float64(zero) * np.float64(zero)
    length = np.float32(np.sqrt(square))
    if length < l1 or length == _ZERO:
        for d in range(dim):
            store_f32(w, d, _ZERO)
        return
    shrink = (l1 - length) / length
    for d in range(dim):
        store_f32(w, d, lr * load_f32(s, d) * shrink / (beta + np.sqrt(load_f32(s, dim + d)) + l2 * lr))


@_kind("adadelta", ("weight_decay_factor", "averaging_ratio", "epsilon"), (Slot("accum"), Slot("accum_update")))
def _adadelta(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, rho, epsilon = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        accum = rho * load_f32(s, d) + (_ONE - rho) * grad * grad
        update = load_f32(s, dim + d)
        delta = np.sqrt(update + epsilon) / np.sqrt(accum + epsilon) * grad
        store_f32(s, d, accum)
        store_f32(s, dim + d, rho * update + (_ONE - rho) * delta * delta)
        store_f32(w, d, weight - lr * delta)


@_kind(
    "adam",
    ("weight_decay_factor", "beta1", "beta2", "epsilon", "use_nesterov"),
    (
        Slot("m"),
        Slot("v"),
        Slot("beta1_power", initial="beta1", words=1),
        Slot("beta2_power", initial="beta2", words=1),
    ),
)
def _adam(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, beta1, beta2, epsilon = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2), load_f32(p, 3)
    nesterov = load_f32(p, 4) != _ZERO
    power1, power2 = load_f32(s, 2 * dim), load_f32(s, 2 * dim + 1)
    alpha = lr * np.sqrt(_ONE - power2) / (_ONE - power1)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        m = load_f32(s, d)
        v = load_f32(s, dim + d)
        m = m + (_ONE - beta1) * (grad - m)
        v = v + (_ONE - beta2) * (grad * grad - v)
        move = (_ONE - beta1) * grad + beta1 * m if nesterov else m
        store_f32(s, d, m)
        store_f32(s, dim + d, v)
        store_f32(w, d, weight - alpha * move / (np.sqrt(v) + epsilon))
    store_f32(s, 2 * dim, power1 * beta1)
    store_f32(s, 2 * dim + 1, power2 * beta2)


@_kind(
    "amsgrad",
    ("weight_decay_factor", "beta1", "beta2", "epsilon", "use_nesterov"),
    (
        Slot("m"),
        Slot("v"),
        Slot("vhat"),
        Slot("beta1_power", initial="beta1", words=1),
        Slot("beta2_power", initial="beta2", words=1),
    ),
)
def _amsgrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, beta1, beta2, epsilon = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2), load_f32(p, 3)
    nesterov = load_f32(p, 4) != _ZERO
    power1, power2 = load_f32(s, 3 * dim), load_f32(s, 3 * dim + 1)
    alpha = lr * np.sqrt(_ONE - power2) / (_ONE - power1)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        m = load_f32(s, d)
        v = load_f32(s, dim + d)
        m = m + (_ONE - beta1) * (grad - m)
        v = v + (_ONE - beta2) * (grad * grad - v)
        vhat = max(load_f32(s, 2 * dim + d), v)
        move = (_ONE - beta1) * grad + beta1 * m if nesterov else m
        store_f32(s, d, m)
        store_f32(s, dim + d, v)
        store_f32(s, 2 * dim + d, vhat)
        store_f32(w, d, weight - alpha * move / (np.sqrt(vhat) + epsilon))
    store_f32(s, 3 * dim, power1 * beta1)
    store_f32(s, 3 * dim + 1, power2 * beta2)


@_kind("momentum", ("weight_decay_factor", "momentum", "use_nesterov"), (Slot("n"),))
def _momentum(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, mu = load_f32(p, 0), load_f32(p, 1)
    nesterov = load_f32(p, 2) != _ZERO
    for d in range(dim):
        weight = load_f32(w, d)
        old = load_f32(s, d)
        new = mu * old - lr * (load_f32(g, d) + decay * weight)
        store_f32(s, d, new)
        store_f32(w, d, weight - mu * old + (_ONE + mu) * new if nesterov else weight + new)


@_kind("moving_average", ("momentum",))
def _moving_average(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    mu = load_f32(p, 0)
    for d in range(dim):
        store_f32(w, d, mu * load_f32(w, d) + (_ONE - mu) * load_f32(g, d))


@_kind("rmsprop", ("weight_decay_factor", "momentum", "learning_rate"), (Slot("n"),))
def _rmsprop(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    # In float64, and with the config's rate instead of the passed one, as upstream.
    decay, mu, rate = np.float64(load_f32(p, 0)), np.float64(load_f32(p, 1)), np.float64(load_f32(p, 2))
    for d in range(dim):
        weight = np.float64(load_f32(w, d))
        grad = np.float64(load_f32(g, d)) + decay * weight
        norm = mu * np.float64(load_f32(s, d)) + (1.0 - mu) * grad * grad
        store_f32(s, d, np.float32(norm))
        store_f32(w, d, np.float32(weight - rate * grad / (np.sqrt(norm) + 1.0)))


@_kind("rmspropv2", ("weight_decay_factor", "momentum"), (Slot("n"),))
def _rmspropv2(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, mu = load_f32(p, 0), load_f32(p, 1)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        norm = mu * load_f32(s, d) + grad * grad
        store_f32(s, d, norm)
        store_f32(w, d, weight - lr * grad / (np.sqrt(norm) + _ONE))


@_kind("batch_softmax", state=(Slot("global_step", words=2),))
def _batch_softmax(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    last = np.int64(load_u64(s, 0))
    store_f32(w, 0, (_ONE - lr) * load_f32(w, 0) + lr * np.float32(step - last))
    store_u64(s, 0, np.uint64(step))


@_kind(
    "group_adagrad",
    ("weight_decay_factor", "beta", "l2_regularization_strength"),
    (Slot("grad_square_sum", initial="initial_accumulator_value", words=1),),
)
def _group_adagrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    if lr == _ZERO:  # which is divided by: the start of a warm-up moves nothing
        return
    decay, beta, l2 = load_f32(p, 0), load_f32(p, 1), load_f32(p, 2)
    largest = _ZERO
    for d in range(dim):
        grad = load_f32(g, d) + decay * load_f32(w, d)
        largest = max(largest, grad * grad)
    total = load_f32(s, 0) + largest
    store_f32(s, 0, total)
    alpha = lr / (beta + np.sqrt(total))
    square = np.float64(0)
    for d in range(dim):
        weight = load_f32(w, d)
        z = load_f32(g, d) + decay * weight - weight / alpha
        square += np.float64(z) * np.float64(z)
    length = np.float32(np.sqrt(square))
    if length < l2 or length == _ZERO:
        for d in range(dim):
            store_f32(w, d, _ZERO)
        return
    scale = -alpha * (length - l2) / length
    for d in range(dim):
        weight = load_f32(w, d)
        store_f32(w, d, scale * (load_f32(g, d) + decay * weight - weight / alpha))


_LARGEST_HALF = np.float32(65504)


@inlined
def round_to_half(w: Any, dim: Any, stream: Any, step: Any) -> Any:
    """Replace weights[dim] by float16 neighbours, up with the probability that keeps the mean; exact values stay.

    The draw depends on the row's stream, the column, the step and the value, so replay gives the same weights, and a
    value that comes back at another step is drawn anew.
    """
    for d in range(dim):
        x = load_f32(w, d)
        size = abs(x)
        if size < _LARGEST_HALF:
            # Spacing of float16 at x: 2^-24 for subnormals, 2^(exponent - 10) above.
            spacing = np.float32(2.0**-24)
            top = np.float32(2.0**-13)
            while size >= top:
                top = top + top
                spacing = spacing + spacing
            low = np.floor(x / spacing) * spacing
            part = (x - low) / spacing
            draw = uniform01(mix64(stream + np.uint64(step)) ^ np.uint64(load_u32(w, d)), np.uint64(d))
            if part > _ZERO:
                store_f32(w, d, low + spacing if draw <= part else low)
        elif size < np.float32(np.inf):
            store_f32(w, d, _LARGEST_HALF if x > _ZERO else -_LARGEST_HALF)

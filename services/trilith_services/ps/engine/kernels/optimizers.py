"""Optimizer steps on one row segment, in place; formulas of Monolith's engine, one function per kind.

Every step has the form step(w, s, g, dim, p, lr, step): addresses of float32 weights[dim], state, gradient[dim] and
parameters, the learning rate, and the global step. Parameters are read into locals before the loop, so that no store
can be suspected of changing them and the loop vectorises. `PARAMETERS` fixes their order, `kinds` in row_layout.py the
state's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trilith.ops.hashing import mix64, uniform01
from trilith.ops.jit import inlined
from trilith.ops.memory import load_f32, load_u32, load_u64, store_f32, store_u64

_ZERO = np.float32(0)
_ONE = np.float32(1)

PARAMETERS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("weight_decay_factor",),
    "dynamic_wd_adagrad": ("weight_decay_factor", "decouple_weight_decay"),
    "ftrl": ("beta", "l1_regularization_strength", "l2_regularization_strength"),
    "group_ftrl": ("beta", "l1_regularization_strength", "l2_regularization_strength"),
    "adadelta": ("weight_decay_factor", "averaging_ratio", "epsilon"),
    "adam": ("weight_decay_factor", "beta1", "beta2", "epsilon", "use_nesterov"),
    "amsgrad": ("weight_decay_factor", "beta1", "beta2", "epsilon", "use_nesterov"),
    "momentum": ("weight_decay_factor", "momentum", "use_nesterov"),
    "moving_average": ("momentum",),
    "rmsprop": ("weight_decay_factor", "momentum", "learning_rate"),
    "rmspropv2": ("weight_decay_factor", "momentum"),
    "batch_softmax": (),
    "group_adagrad": ("weight_decay_factor", "beta", "l2_regularization_strength"),
}
"""Per kind, the config fields that its step reads, in the order of its parameter block."""


@inlined
def _sgd(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    for d in range(dim):
        store_f32(w, d, load_f32(w, d) - lr * load_f32(g, d))


@inlined
def _adagrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay = load_f32(p, 0)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        norm = load_f32(s, d) + grad * grad
        store_f32(s, d, norm)
        store_f32(w, d, weight - lr * grad / np.sqrt(norm))


@inlined
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


@inlined
def _ftrl(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
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


@inlined
def _group_ftrl(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
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


@inlined
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


@inlined
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


@inlined
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


@inlined
def _momentum(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, mu = load_f32(p, 0), load_f32(p, 1)
    nesterov = load_f32(p, 2) != _ZERO
    for d in range(dim):
        weight = load_f32(w, d)
        old = load_f32(s, d)
        new = mu * old - lr * (load_f32(g, d) + decay * weight)
        store_f32(s, d, new)
        store_f32(w, d, weight - mu * old + (_ONE + mu) * new if nesterov else weight + new)


@inlined
def _moving_average(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    mu = load_f32(p, 0)
    for d in range(dim):
        store_f32(w, d, mu * load_f32(w, d) + (_ONE - mu) * load_f32(g, d))


@inlined
def _rmsprop(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    # In float64, and with the config's rate instead of the passed one, as upstream.
    decay, mu, rate = np.float64(load_f32(p, 0)), np.float64(load_f32(p, 1)), np.float64(load_f32(p, 2))
    for d in range(dim):
        weight = np.float64(load_f32(w, d))
        grad = np.float64(load_f32(g, d)) + decay * weight
        norm = mu * np.float64(load_f32(s, d)) + (1.0 - mu) * grad * grad
        store_f32(s, d, np.float32(norm))
        store_f32(w, d, np.float32(weight - rate * grad / (np.sqrt(norm) + 1.0)))


@inlined
def _rmspropv2(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    decay, mu = load_f32(p, 0), load_f32(p, 1)
    for d in range(dim):
        weight = load_f32(w, d)
        grad = load_f32(g, d) + decay * weight
        norm = mu * load_f32(s, d) + grad * grad
        store_f32(s, d, norm)
        store_f32(w, d, weight - lr * grad / (np.sqrt(norm) + _ONE))


@inlined
def _batch_softmax(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
    last = np.int64(load_u64(s, 0))
    store_f32(w, 0, (_ONE - lr) * load_f32(w, 0) + lr * np.float32(step - last))
    store_u64(s, 0, np.uint64(step))


@inlined
def _group_adagrad(w: Any, s: Any, g: Any, dim: Any, p: Any, lr: Any, step: Any) -> Any:
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


STEPS: dict[str, Callable[..., Any]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "dynamic_wd_adagrad": _dynamic_wd_adagrad,
    "ftrl": _ftrl,
    "group_ftrl": _group_ftrl,
    "adadelta": _adadelta,
    "adam": _adam,
    "amsgrad": _amsgrad,
    "momentum": _momentum,
    "moving_average": _moving_average,
    "rmsprop": _rmsprop,
    "rmspropv2": _rmspropv2,
    "batch_softmax": _batch_softmax,
    "group_adagrad": _group_adagrad,
}
"""The step of every optimizer kind."""

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

"""Slow twins of the engine's kernels: obvious code in float64, with no relation to the fast code's structure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

State = dict[str, Any]


def initial_state(kind: str, p: dict[str, float], dim: int) -> State:
    """Fresh optimizer state by slot name."""
    zeros = np.zeros(dim)
    match kind:
        case "adagrad" | "dynamic_wd_adagrad":
            return {"norm": np.full(dim, p["initial_accumulator_value"])}
        case "ftrl" | "group_ftrl":
            return {"zero": zeros.copy(), "norm": np.full(dim, p["initial_accumulator_value"])}
        case "adadelta":
            return {"accum": zeros.copy(), "accum_update": zeros.copy()}
        case "adam":
            return {"m": zeros.copy(), "v": zeros.copy(), "beta1_power": p["beta1"], "beta2_power": p["beta2"]}
        case "amsgrad":
            return {**initial_state("adam", p, dim), "vhat": zeros.copy()}
        case "momentum" | "rmsprop" | "rmspropv2":
            return {"n": zeros.copy()}
        case "group_adagrad":
            return {"grad_square_sum": p["initial_accumulator_value"]}
        case "batch_softmax":
            return {"global_step": 0}
    return {}


def step(kind: str, p: dict[str, float], w: np.ndarray, s: State, g: np.ndarray, lr: float, at: int) -> np.ndarray:
    """New weights after one step; `s` is updated. Formulas of spec/engine.md section 4, in float64."""
    decayed = g + p.get("weight_decay_factor", 0.0) * w
    if lr == 0 and kind in ("ftrl", "group_ftrl", "group_adagrad"):
        return w
    match kind:
        case "sgd":
            return w - lr * g
        case "adagrad":
            s["norm"] = s["norm"] + decayed**2
            return w - lr * decayed / np.sqrt(s["norm"])
        case "dynamic_wd_adagrad":
            if not p["decouple_weight_decay"]:
                return step("adagrad", p, w, s, g, lr, at)
            s["norm"] = s["norm"] + g**2
            return w - lr * g / np.sqrt(s["norm"]) - lr * p["weight_decay_factor"] * w
        case "ftrl" | "group_ftrl":
            new = s["norm"] + g**2
            z = s["zero"] + g - (np.sqrt(new) - np.sqrt(s["norm"])) / lr * w
            s["norm"], s["zero"] = new, z
            l1, l2 = p["l1_regularization_strength"], p["l2_regularization_strength"]
            scale = np.sqrt(new) + p["beta"] + l2 * lr
            if kind == "ftrl":
                return np.where(np.abs(z) <= l1, 0.0, lr * (np.signbit(z) * l1 - z) / scale)
            r = np.linalg.norm(z)
            return np.zeros_like(w) if r < l1 or r == 0 else lr * z * (l1 - r) / r / scale
        case "adadelta":
            rho, eps = p["averaging_ratio"], p["epsilon"]
            a = rho * s["accum"] + (1 - rho) * decayed**2
            delta = np.sqrt(s["accum_update"] + eps) / np.sqrt(a + eps) * decayed
            s["accum"], s["accum_update"] = a, rho * s["accum_update"] + (1 - rho) * delta**2
            return w - lr * delta
        case "adam" | "amsgrad":
            b1, b2 = p["beta1"], p["beta2"]
            alpha = lr * math.sqrt(1 - s["beta2_power"]) / (1 - s["beta1_power"])
            s["m"] = s["m"] + (1 - b1) * (decayed - s["m"])
            s["v"] = s["v"] + (1 - b2) * (decayed**2 - s["v"])
            q = (1 - b1) * decayed + b1 * s["m"] if p["use_nesterov"] else s["m"]
            second = s["v"]
            if kind == "amsgrad":
                second = s["vhat"] = np.maximum(s["vhat"], s["v"])
            s["beta1_power"] *= b1
            s["beta2_power"] *= b2
            return w - alpha * q / (np.sqrt(second) + p["epsilon"])
        case "momentum":
            mu, old = p["momentum"], s["n"]
            s["n"] = mu * old - lr * decayed
            return w - mu * old + (1 + mu) * s["n"] if p["use_nesterov"] else w + s["n"]
        case "moving_average":
            return p["momentum"] * w + (1 - p["momentum"]) * g
        case "rmsprop":
            s["n"] = p["momentum"] * s["n"] + (1 - p["momentum"]) * decayed**2
            return w - p["learning_rate"] * decayed / (np.sqrt(s["n"]) + 1)
        case "rmspropv2":
            s["n"] = p["momentum"] * s["n"] + decayed**2
            return w - lr * decayed / (np.sqrt(s["n"]) + 1)
        case "group_adagrad":
            s["grad_square_sum"] += float(np.max(decayed**2))
            alpha = lr / (p["beta"] + math.sqrt(s["grad_square_sum"]))
            z = decayed - w / alpha
            r, l2 = np.linalg.norm(z), p["l2_regularization_strength"]
            return np.zeros_like(w) if r < l2 or r == 0 else -alpha * (r - l2) / r * z
        case "batch_softmax":
            new = (1 - lr) * w + lr * (at - s["global_step"])
            s["global_step"] = at
            return new
    raise AssertionError(kind)


def mix64(value: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def uniform_row(seed: int, key: int, dim: int, low: float, high: float) -> list[float]:
    """Initial weights of a row under random_uniform: a pure function of seed, id and column."""
    stream = mix64(seed ^ mix64(key))
    draws = [mix64((stream + (d + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 40 for d in range(dim)]
    return [low + (high - low) * draw / 2**24 for draw in draws]


class DictTable:
    """A table of plain rows with sgd: id -> [weights, time]."""

    def __init__(self, dim: int, rate: float) -> None:
        self.dim, self.rate = dim, rate
        self.rows: dict[int, tuple[np.ndarray, int]] = {}

    def lookup(self, ids: list[int]) -> np.ndarray:
        """Weights, zeros where missing."""
        return np.array([self.rows[i][0] if i in self.rows else np.zeros(self.dim) for i in ids]).reshape(-1, self.dim)

    def write(self, ids: list[int], values: np.ndarray, time: int, verb: str) -> None:
        """Apply assign, assign_add or sgd one id after another."""
        for i, value in zip(ids, values, strict=True):
            old = self.rows.get(i, (np.zeros(self.dim), 0))[0]
            new = {"assign": value, "assign_add": old + value, "apply": old - self.rate * value}[verb]
            self.rows[i] = (np.array(new, np.float32), time)

    def erase(self, ids: list[int]) -> int:
        """Delete; how many there were."""
        return sum(self.rows.pop(i, None) is not None for i in ids)

    def evict(self, now: int, lifetime: int) -> int:
        """Delete rows of age >= lifetime."""
        return self.erase([i for i, (_, time) in self.rows.items() if now - time >= lifetime])

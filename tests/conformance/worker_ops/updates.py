"""Vectors of updates: clipping, one step's gradients, deferred calls, cached variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.conformance.compare import Partial
from tests.conformance.configs import floats
from trilith.features import ClipType, GradientUpdate, clip_by_global_norm, global_norm
from trilith.pipelining import Ahead, Pusher

__all__ = ["OPS"]

Json = Mapping[str, Any]

_CLIPS = {
    "ClipByGlobalNorm": ClipType.GLOBAL_NORM,
    "ClipByDenseAndSparse": ClipType.DENSE_AND_SPARSE,
    "ClipByValue": ClipType.VALUE,
    "ClipByNorm": ClipType.NORM,
    "NoClip": ClipType.NONE,
}


def numbers(values: Any) -> np.ndarray:
    return np.asarray(floats(values), np.float32)


def apply_gradients(inputs: Json) -> Any:
    """A dense scalar and rows of an embedding, both under SGD with a rate of 1 unless the vector says otherwise."""
    values = {"var": numbers(inputs["var"]), "emb": numbers(inputs["emb"])}
    rate = np.float32(inputs.get("learning_rate", 1.0))

    def subtract(grads: Mapping[str, np.ndarray], step: int = 0) -> None:
        for name, grad in grads.items():
            values[name] = values[name] - rate * grad

    options = {
        name: inputs[name]
        for name in (
            "clip_norm",
            "sparse_clip_norm",
            "sparse_norm_warmup_steps",
            "dense_weight_decay",
            "dense_reduce_mean",
        )
        if name in inputs
    }
    update = GradientUpdate(
        apply_dense=subtract,
        apply_sparse=subtract,
        read_dense=values.__getitem__,
        clip_type=_CLIPS[inputs.get("clip_type", "ClipByGlobalNorm")],
        pusher=Pusher(int(inputs.get("async", False)), background=False),
        **options,
    )
    dense, sparse = inputs.get("dense_grad"), inputs.get("emb_grad")
    for _ in range(inputs.get("runs", 1)):
        update.step(
            {"var": None if dense is None else numbers(dense)},
            {"emb": None if sparse is None else numbers(sparse)},
            batch_size=inputs.get("batch_size"),
        )
    return Partial(var=values["var"], emb=values["emb"], global_step=update.global_step)


def async_push(inputs: Json) -> Any:
    value = [float(inputs["initial"])]

    def add(delta: float) -> None:
        value[0] += delta

    pusher = Pusher(int(inputs["is_async"]), background=False)
    for _ in range(inputs["runs"]):
        pusher.push(lambda: add(float(inputs["delta"])))
    visible = value[0]
    pusher.drain()
    return Partial(visible=visible, after_drain=value[0])


def cached_variable(inputs: Json) -> Any:
    """With the hook every step begins with what the step before has read."""
    value = [float(inputs["initial"])]
    ahead = Ahead(lambda: value[0], background=False)
    cached = fetched = value[0]
    read = []
    for name, *arguments in inputs["steps"]:
        if inputs.get("hook"):
            cached = ahead.take()
        if name == "read_cached":
            read.append(cached)
        elif name in ("read", "read_direct"):
            read.append(value[0])
        elif name in ("add", "assign_add"):
            value[0] += arguments[0]
        elif name in ("fetch", "fetch_and_assign", "assign"):
            fetched = fetched if name == "assign" else value[0]
            cached = cached if name == "fetch" else fetched
        else:
            raise NotImplementedError(f"no step {name!r}")
    return read


OPS = {
    "apply_gradients_with_var_optimizer": apply_gradients,
    "async_push": async_push,
    "cached_variable": cached_variable,
    "clip_by_global_norm": lambda inputs: clip_by_global_norm(
        [numbers(each) for each in inputs["tensors"]], inputs["clip_norm"]
    ),
    "global_norm": lambda inputs: global_norm([numbers(each) for each in inputs["tensors"]]),
}

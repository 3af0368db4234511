"""Metrics: figures about predictions and labels that add up over batches, and over the ranks of a job.

Samples without a label (NaN, or what parsers fill labels up with) do not count, nor do those that a mask leaves out.
What is not defined, such as an AUC without positives, is NaN.
"""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.data.parse.specs import INVALID_LABEL
from trilith.errors import InvalidRequestError

__all__ = [
    "Auc",
    "Calibration",
    "LogLoss",
    "Mean",
    "Metric",
    "Mse",
    "State",
    "direction",
    "merge_over_ranks",
    "pack",
    "per_head",
    "results",
    "unpack",
]

State: TypeAlias = dict[str, npt.NDArray[Any]]
"""What a metric has summed up, as arrays by name."""

Floats: TypeAlias = npt.NDArray[np.float64]

_BIN_BITS = 18
_BINS = 1 << _BIN_BITS


class Metric(ABC):
    """A figure that is summed up; `result` may be asked at any time, and adding goes on afterwards."""

    better: Literal["max", "min", ""] = ""
    """Whether more or less of it is better; empty: neither, as for a calibration, which is best at 1."""

    def add(self, prediction: Any, label: Any = None, weight: Any = None, mask: Any = None) -> None:
        """Count a batch.

        Args:
            prediction: Floats [n] or [n, 1], an array or a tensor.
            label: Numbers of that size; NaN: there is none.
            weight: Of each sample, at least 0; None: 1 each.
            mask: bool of that size: which samples count; None: all.

        Raises:
            InvalidRequestError: Sizes differ, a weight is negative or not finite, or a value is none that the metric is
                defined for.
        """
        given = _floats("prediction", prediction)
        values, labels, weights = given.astype(np.float64), None, np.ones(given.size)
        keep = np.ones(given.size, np.bool_)
        if label is not None:
            labels = _floats("label", label, given.size).astype(np.float64)
            keep &= ~(np.isnan(labels) | (labels == INVALID_LABEL))
        elif self._needs_labels:
            raise InvalidRequestError(f"{type(self).__name__} compares predictions with labels; there are none")
        if weight is not None:
            weights = _floats("weight", weight, given.size).astype(np.float64)
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise InvalidRequestError("a weight is negative or not finite")
            keep &= weights > 0
        if mask is not None:
            keep &= _flat("mask", mask, given.size).astype(np.bool_)
        if not keep.all():
            values, weights = values[keep], weights[keep]
            labels = None if labels is None else labels[keep]
        if values.size:
            self._add(values, np.zeros(values.size) if labels is None else labels, weights, given.dtype)

    _needs_labels = True

    @abstractmethod
    def _add(self, values: Floats, labels: Floats, weights: Floats, dtype: np.dtype[Any]) -> None:
        """Count samples; `dtype` is what predictions came as."""

    @abstractmethod
    def state(self) -> State:
        """What is summed up so far, for `merge` of another one of the same settings."""

    @abstractmethod
    def merge(self, state: State) -> None:
        """Add what another one, such as that of another rank, has summed up.

        Raises:
            InvalidRequestError: It is no state of such a metric.
        """

    @abstractmethod
    def result(self) -> float:
        """The figure; NaN where it is not defined."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    def fresh(self) -> Self:
        """Another one of the same settings that has counted nothing."""
        another = copy.copy(self)
        another.reset()
        return another


class _Ratio(Metric):
    """The quotient of two sums over the samples."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = np.zeros(2)

    def _add(self, values: Floats, labels: Floats, weights: Floats, dtype: np.dtype[Any]) -> None:
        above, below = self._terms(values, labels, dtype)
        self._sums = self._sums + np.array([np.dot(weights, above), np.dot(weights, below)])

    @abstractmethod
    def _terms(self, values: Floats, labels: Floats, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
        """Per sample, what it adds above and below the line."""

    def state(self) -> State:
        """float64[2]: the two sums."""
        return {"sums": self._sums.copy()}

    def merge(self, state: State) -> None:
        """Add the sums of another one."""
        sums = _part(self, state, "sums")
        if sums.shape != (2,):
            raise InvalidRequestError(f"{type(self).__name__}: sums have shape {sums.shape}, not (2,)")
        self._sums = self._sums + sums

    def result(self) -> float:
        """The quotient; NaN before the first sample."""
        above, below = self._sums.tolist()
        return float(above / below) if below else math.nan


class Mean(_Ratio):
    """The weighted mean of what is given as predictions; needs no labels."""

    _needs_labels = False

    def _terms(self, values: Floats, labels: Floats, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
        return values, np.ones(values.size)


class Mse(_Ratio):
    """The weighted mean of the squared difference of prediction and label."""

    better = "min"

    def _terms(self, values: Floats, labels: Floats, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
        return (values - labels) ** 2, np.ones(values.size)


class Calibration(_Ratio):
    """Mean prediction over mean label: 1 where as much is predicted as happens; NaN where all labels are 0."""

    def _terms(self, values: Floats, labels: Floats, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
        return values, labels


class LogLoss(_Ratio):
    """The weighted mean of -(y log p + (1 - y) log(1 - p)).

    p is the predicted probability, y the label in 0..1. As in scikit-learn, p is kept one machine epsilon of its dtype
    away from 0 and 1, so that a wrong certainty costs much and not infinitely much.
    """

    better = "min"

    def _terms(self, values: Floats, labels: Floats, dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
        for name, of, what in (
            ("prediction", values, "probabilities; apply the sigmoid"),
            ("label", labels, "in 0..1"),
        ):
            if ((of < 0) | (of > 1)).any():
                wrong = of[(of < 0) | (of > 1)][0]
                raise InvalidRequestError(f"LogLoss: {name} {wrong:g} is outside 0..1; {name}s must be {what}")
        epsilon = float(np.finfo(dtype if dtype.kind == "f" else np.float64).eps)
        p = np.clip(values, epsilon, 1 - epsilon)
        return -(labels * np.log(p) + (1 - labels) * np.log1p(-p)), np.ones(p.size)


class Auc(Metric):
    """The chance that a random positive is predicted above a random negative, ties counting one half.

    Positive is a label above 0.5; weights weigh positives and negatives, as in scikit-learn. It is exact for up to
    `limit` samples. Beyond, memory is bounded: predictions are counted in 2^18 bins, one for each value of the first 18
    bits of a float32 (sign, exponent and 9 bits: nearly three digits), and those of one bin count as ties. `exact` says
    which it is, and `error_bound` how far off the result can be.

    Attributes:
        limit: Samples that are kept one by one; 0: bins from the start.
    """

    better = "max"

    def __init__(self, *, limit: int = 1 << 20) -> None:
        if limit < 0:
            raise InvalidRequestError(f"Auc(limit={limit}): the number of samples kept is at least 0")
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._kept: list[tuple[npt.NDArray[Any], npt.NDArray[np.bool_], Floats]] = []
        self._count = 0
        self._bins: Floats | None = None if self.limit else np.zeros((2, _BINS))
        self._undefined = False

    @property
    def exact(self) -> bool:
        """Whether every sample so far is kept."""
        return self._bins is None

    @property
    def error_bound(self) -> float:
        """How much the result may differ from the exact one: 0 while it is exact."""
        if self._bins is None:
            return 0.0
        negative, positive = self._bins
        pairs = float(positive.sum() * negative.sum())
        return float(np.dot(positive, negative)) / 2 / pairs if pairs else 0.0

    def _add(self, values: Floats, labels: Floats, weights: Floats, dtype: np.dtype[Any]) -> None:
        # Float64 predictions that differ only there are not ties.
        self._take(values.astype(dtype if dtype.kind == "f" else np.float64), labels > 0.5, weights)

    def _take(self, values: npt.NDArray[Any], positive: npt.NDArray[np.bool_], weights: Floats) -> None:
        self._undefined = self._undefined or bool(np.isnan(values).any())
        if self._undefined:
            return
        self._count += values.size
        if self._bins is None:
            self._kept.append((values, positive, weights))
            if self._count > self.limit:
                self._give_up_samples()
        else:
            self._put_in_bins(values, positive, weights)

    def _give_up_samples(self) -> None:
        kept, self._kept = self._kept, []
        self._bins = np.zeros((2, _BINS))
        for each in kept:
            self._put_in_bins(*each)

    def _put_in_bins(self, values: npt.NDArray[Any], positive: npt.NDArray[np.bool_], weights: Floats) -> None:
        assert self._bins is not None
        places = positive.astype(np.int64) * _BINS + _bin_of(values)
        self._bins += np.bincount(places, weights, 2 * _BINS).reshape(2, _BINS)

    def state(self) -> State:
        """The samples kept, or the bins that are not empty."""
        state: State = {"undefined": np.array([self._undefined], np.uint8)}
        if self._bins is not None:
            used = np.flatnonzero(self._bins.any(axis=0)).astype(np.int32)
            return state | {"bins": used, "negative": self._bins[0, used], "positive": self._bins[1, used]}
        values, positive, weights = self._samples()
        return state | {"values": values, "labels": positive.astype(np.uint8), "weights": weights}

    def merge(self, state: State) -> None:
        """Add what another one has; bins stay bins."""
        self._undefined = self._undefined or bool(_part(self, state, "undefined").any())
        if "bins" not in state:
            values, labels = _part(self, state, "values"), _part(self, state, "labels")
            if values.size:
                self._take(values, labels.astype(np.bool_), _part(self, state, "weights"))
            return
        if self._bins is None:
            self._give_up_samples()
        assert self._bins is not None
        used = _part(self, state, "bins")
        if used.size and not 0 <= int(used.min()) <= int(used.max()) < _BINS:
            raise InvalidRequestError(f"Auc: a bin is outside 0..{_BINS - 1}")
        self._bins[0, used] += _part(self, state, "negative")
        self._bins[1, used] += _part(self, state, "positive")

    def result(self) -> float:
        """A number in 0..1; NaN without a positive or without a negative, and where a prediction was NaN."""
        if self._undefined:
            return math.nan
        if self._bins is not None:
            negative, positive = self._bins
        else:
            values, labels, weights = self._samples()
            distinct, place = np.unique(values, return_inverse=True)
            positive = np.bincount(place, np.where(labels, weights, 0.0), distinct.size)
            negative = np.bincount(place, np.where(labels, 0.0, weights), distinct.size)
        pairs = float(positive.sum() * negative.sum())
        if not pairs:
            return math.nan
        return float(np.dot(positive, np.cumsum(negative) - negative / 2)) / pairs

    def _samples(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], Floats]:
        if len(self._kept) != 1:
            none = (np.empty(0, np.float32), np.empty(0, np.bool_), np.empty(0))
            values, labels, weights = zip(*(self._kept or [none]), strict=True)
            self._kept = [(np.concatenate(values), np.concatenate(labels), np.concatenate(weights))]
        return self._kept[0]


def _bin_of(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The bin of each prediction; bins are ordered as the predictions are."""
    with np.errstate(over="ignore"):
        bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - _BIN_BITS)).astype(np.int64)


# ---- several -------------------------------------------------------------------------------------------------------


def per_head(metrics: Mapping[str, Metric], heads: Iterable[str]) -> dict[str, Metric]:
    """Fresh metrics for every head, by "head/metric"."""
    return {f"{head}/{name}": metric.fresh() for head in heads for name, metric in metrics.items()}


def results(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Figures by name."""
    return {name: metric.result() for name, metric in metrics.items()}


def direction(name: str) -> Literal["max", "min"]:
    """Whether more or less of a metric is better, by the last part of its name, such as valid/click/auc.

    Raises:
        InvalidRequestError: The name does not say.
    """
    last = name.rpartition("/")[2].lower()
    if last.endswith("auc") or last in ("accuracy", "precision", "recall", "ndcg", "hit_rate"):
        return "max"
    if last.endswith(("loss", "mse", "mae", "error")):
        return "min"
    raise InvalidRequestError(f"metric {name!r} does not say whether more of it is better: give mode 'max' or 'min'")


# ---- over ranks ----------------------------------------------------------------------------------------------------


def pack(metrics: Mapping[str, Metric]) -> npt.NDArray[np.uint8]:
    """The states of metrics as bytes: the length of a header as uint64, the header as JSON, the arrays."""
    listed, bodies = [], []
    for name, metric in metrics.items():
        for part, array in metric.state().items():
            flat = np.ascontiguousarray(array)
            listed.append([name, part, flat.dtype.newbyteorder("<").str, list(flat.shape)])
            bodies.append(flat.astype(flat.dtype.newbyteorder("<")).tobytes())
    header = json.dumps(listed).encode()
    return np.frombuffer(b"".join([len(header).to_bytes(8, "little"), header, *bodies]), np.uint8)


def unpack(packed: npt.NDArray[np.uint8]) -> dict[str, State]:
    """What `pack` packed: states by name.

    Raises:
        InvalidRequestError: It is nothing that `pack` made.
    """
    body = packed.tobytes()
    states: dict[str, State] = {}
    try:
        at = 8 + int.from_bytes(body[:8], "little")
        for name, part, dtype, shape in json.loads(body[8:at]):
            kind = np.dtype(dtype)
            if kind.kind not in "fiub":
                raise ValueError(f"arrays of {kind}")
            size = math.prod(shape)
            array = np.frombuffer(body, kind, size, at)
            at += array.nbytes
            states.setdefault(name, {})[part] = array.reshape(shape)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"these are no packed metrics: {error}") from None
    return states


def merge_over_ranks(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Fresh metrics that have counted what those of all ranks have; every rank calls this with the same names.

    They are merged in the order of ranks everywhere, so every rank has the same result to the last bit. Without a
    process group, or in one of one process, they are the metrics themselves.

    Raises:
        InvalidRequestError: Another rank has other metrics.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return dict(metrics)
    own = torch.from_numpy(pack(metrics).copy())
    ranks = distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    distributed.all_gather(sizes, torch.tensor([own.numel()]))
    most = max(int(size) for size in sizes)
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: own.numel()] = own
    found = [torch.zeros(most, dtype=torch.uint8) for _ in range(ranks)]
    distributed.all_gather(found, padded)
    merged = {name: metric.fresh() for name, metric in metrics.items()}
    for rank, (size, each) in enumerate(zip(sizes, found, strict=True)):
        states = unpack(each[: int(size)].numpy())
        if states.keys() != merged.keys():
            raise InvalidRequestError(f"rank {rank} has metrics {sorted(states)}, this one {sorted(merged)}")
        for name, state in states.items():
            merged[name].merge(state)
    return merged


# ---- arrays --------------------------------------------------------------------------------------------------------


def _flat(name: str, values: Any, size: int | None = None) -> npt.NDArray[Any]:
    """[n] of an array, a tensor or a sequence."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.dtype.itemsize == 2 and values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 1):
        raise InvalidRequestError(f"{name} has shape {array.shape}; [n] or [n, 1] is needed, one metric for each head")
    array = array.reshape(-1)
    if size is not None and array.size != size:
        raise InvalidRequestError(f"there are {size} predictions, and of {name} {array.size}")
    return array


def _floats(name: str, values: Any, size: int | None = None) -> npt.NDArray[Any]:
    array = _flat(name, values, size)
    if array.dtype.kind not in "fiub":
        raise InvalidRequestError(f"{name} is of {array.dtype}, numbers are needed")
    return array


def _part(metric: Metric, state: State, name: str) -> npt.NDArray[Any]:
    if name not in state:
        raise InvalidRequestError(f"{type(metric).__name__}: a state without {name!r} is that of another metric")
    return state[name]

"""Task: a user's model, an nn.Module that knows no cluster, with its features, labels, loss and metrics."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trilith.data.parse.specs import Dense, Label
from trilith.errors import InvalidRequestError
from trilith.estimator.features import Embedding, Inputs, Pooled, Rows, Sequence

__all__ = ["DenseOptimizer", "Feature", "Task", "masked_mean"]

Feature = Embedding | Sequence | Dense
DenseOptimizer = Any
"""A function from parameters to a torch optimizer, or an optimizer of `trilith.tables` that the PS run."""

_MADE_UP = 2  # samples that lazy modules see first


class Task(nn.Module):
    """What is learned: features and labels as class attributes, layers in `build`, the model in `forward`.

        class Ctr(Task):
            user = Embedding(dim=16)
            age = Dense(1)
            labels = {"click": Label()}
            metrics = {"auc": metrics.Auc()}

            def build(self):
                self.layer = nn.Linear(17, 1)

            def forward(self, x):
                return self.layer(torch.cat([x.user.vector, x.age], 1))[:, 0]

    `forward` takes `Inputs` and returns a tensor [b], or one for each label by name; what it returns beside those, by
    other names and [b, ...], is for the loss. It is the same in training, evaluation, prediction and serving, where it
    is traced: tensors in, tensors out.

    Args:
        dense_optimizer: A function from parameters to a torch optimizer, or an optimizer of `trilith.tables`; None is
            `torch.optim.Adam` with a rate of 0.001.
        **settings: Take the place of class attributes.

    Attributes:
        labels: By name; a label that a sample lacks is NaN and counts in no loss.
        metrics: By name, computed for every label.
        sample_weight: Name in the batches of what a sample's loss is multiplied by; none if empty.
        signatures: What else an export can be asked, by name: names of `predictions` that are wanted, such as
            ("click",); or the name of a method that takes `Inputs` as `forward` does and gives a tensor [b, ...], or
            several by name, such as one that gives a user's vector. What it makes no use of is not looked up.
        request_time: Name in the batches of each sample's time, Unix seconds; a step's latest is when its rows were
            last updated, from which they expire. Empty: the time at which they are.
        features: By name, in the order of their definition.
        texts: Features whose ids came as text, as far as batches were seen; serving hashes what it gets for them, too.
    """

    labels: ClassVar[Mapping[str, Label]] = {}
    metrics: ClassVar[Mapping[str, Any]] = {}
    sample_weight: ClassVar[str] = ""
    signatures: ClassVar[Mapping[str, Any]] = {}
    request_time: ClassVar[str] = ""

    def __init__(self, *, dense_optimizer: DenseOptimizer = None, **settings: Any) -> None:
        super().__init__()
        self.dense_optimizer = dense_optimizer
        self.texts: set[str] = set()
        self._built = False
        self.override(settings)

    def override(self, settings: Mapping[str, Any]) -> None:
        """Set attributes of the class for this task alone, before it is built.

        Raises:
            InvalidRequestError: There is no such attribute, or it is too late.
        """
        if self._built and settings:
            raise InvalidRequestError(f"{type(self).__name__} is built already; set {sorted(settings)} before")
        known = [name for name in dir(type(self)) if not name.startswith("_") and not hasattr(nn.Module, name)]
        for given, value in settings.items():
            name, _, field = given.partition(".")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(known)}"
                raise InvalidRequestError(f"{type(self).__name__} has no setting {name!r}{hint}")
            before, now = getattr(self, name), _changed(self, name, field, value) if field else value
            for other, feature in _features_of(self).items():
                if isinstance(feature, Sequence) and feature.base is before:
                    setattr(self, other, dataclasses.replace(feature, base=now))
                elif isinstance(feature, Embedding) and feature.base is before:
                    view = {"pooling": feature.pooling, "feature": feature.feature, "weights": feature.weights}
                    setattr(self, other, dataclasses.replace(now, **view, base=now))
            setattr(self, name, now)
        self.features = _features_of(self)

    @property
    def built(self) -> bool:
        """Whether the layers are made; settings stay as they are from then on."""
        return self._built

    def build(self) -> None:
        """Make the layers; called once, when all settings are known."""

    def forward(self, x: Inputs) -> Any:
        """From features to a tensor [b] of the only label, or a mapping with one for each label."""
        raise NotImplementedError(f"{type(self).__name__} needs a forward(self, x)")

    def loss(self, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], weight: Tensor | None) -> Any:
        """The loss of a batch: a tensor, or one for each label, which are added by the labels' weights.

        Args:
            outputs: By label float32[b]: here, logits. And what else `forward` gives.
            labels: By name float32[b]; NaN where a sample has none.
            weight: float32[b], of the samples; None: all 1.

        Returns:
            By label the mean cross-entropy over the samples that have it; 0 where none has. A task's own may have
            parts by other names, which are added as they are.
        """
        if not labels:
            raise InvalidRequestError(
                f"{type(self).__name__} has no labels to learn from: set labels = {{NAME: Label()}}, or give it a loss"
            )
        return {name: masked_mean(_cross_entropy, outputs[name], label, weight) for name, label in labels.items()}

    @property
    def label_range(self) -> tuple[float, float]:
        """Smallest and largest value that a label may have: of cross-entropy 0 and 1, of another `loss` any."""
        return (0.0, 1.0) if type(self).loss is Task.loss else (-math.inf, math.inf)

    def predictions(self, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """From what `forward` gives to what metrics, `predict` and serving show: here, probabilities of logits."""
        return {name: torch.sigmoid(outputs[name]) for name in self.labels or outputs}

    # ---- what the Estimator does with a task -------------------------------------------------------------------------

    def prepare(self, seed: int = 0) -> None:
        """Build the layers and give lazy ones their shapes, by one pass over made-up samples; once.

        Args:
            seed: Decides the initial values of all layers.
        """
        if self._built:
            return
        if type(self).forward is Task.forward:
            raise InvalidRequestError(f"{type(self).__name__} needs a forward(self, x)")
        self._built = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build()
            was = self.training
            self.eval()
            with torch.no_grad():
                outputs = self.outputs(self.made_up())
            self.train(was)
        if self.labels and not outputs.keys() >= self.labels.keys():
            raise InvalidRequestError(
                f"{type(self).__name__}.forward gives {sorted(outputs)}; its labels are {sorted(self.labels)}"
            )
        for name, output in outputs.items():
            if name in self.labels or not self.labels:
                self._check_is_one_each(name, output)
            elif output.shape[:1] != (_MADE_UP,):
                raise InvalidRequestError(
                    f"{type(self).__name__}.forward: {name!r} has shape {list(output.shape)} for {_MADE_UP} samples; "
                    f"[{_MADE_UP}, ...] is needed"
                )

    def _check_is_one_each(self, name: str, output: Tensor) -> None:
        if output.shape != (_MADE_UP,):
            raise InvalidRequestError(
                f"{type(self).__name__}.forward: {name!r} has shape {list(output.shape)} for {_MADE_UP} samples; "
                f"[{_MADE_UP}], a number for each, is needed: [:, 0] takes the only column"
            )

    def made_up(self, samples: int = _MADE_UP) -> Inputs:
        """Inputs of the right shapes, such as a model is traced with."""
        values: dict[str, Any] = {}
        for name, feature in self.features.items():
            if isinstance(feature, Embedding):
                values[name] = Pooled(torch.zeros(samples, feature.dim), torch.zeros(samples))
            elif isinstance(feature, Sequence):
                mask = torch.zeros(samples, feature.length, dtype=torch.bool)
                mask[: samples // 2, 0] = True
                values[name] = Rows(torch.zeros(samples, feature.length, feature.base.dim), mask)
            else:
                values[name] = torch.zeros(samples, feature.dim)
        return Inputs(values)

    def outputs(self, x: Inputs, forward: Callable[[Inputs], Any] | None = None) -> dict[str, Tensor]:
        """`forward`, or another that gives the same, always by label."""
        found = self(x) if forward is None else forward(x)
        if isinstance(found, Mapping):
            return dict(found)
        names = list(self.labels) or ["score"]
        if len(names) != 1:
            raise InvalidRequestError(
                f"{type(self).__name__}.forward gives one tensor for the labels {names}; give a mapping with one each"
            )
        return {names[0]: found}

    def total(self, losses: Any) -> Tensor:
        """What `loss` gave as one number: by the labels' weights, and what is no label's as it is."""
        if isinstance(losses, Tensor):
            return losses
        parts: list[Tensor] = [
            loss * self.labels[name].weight if name in self.labels else loss for name, loss in losses.items()
        ]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def masked_mean(
    loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, label: Tensor, weight: Tensor | None
) -> Tensor:
    """The mean of a loss over the samples whose label is there; 0, with a gradient of 0, where none has one.

    Args:
        loss: From outputs and labels float32[b] to the loss of each sample float32[b].
        output: float32[b].
        label: float32[b], NaN where there is none.
        weight: float32[b], of the samples; None: all 1.
    """
    there = ~torch.isnan(label)
    each = loss(output.float(), torch.where(there, label, 0.0))
    counted = there.float() if weight is None else there * weight
    return (each * counted).sum() / counted.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _changed(task: Task, name: str, field: str, value: Any) -> Any:
    """A feature, or another dataclass, with one field changed."""
    before = getattr(task, name)
    if not dataclasses.is_dataclass(before) or isinstance(before, type):
        raise InvalidRequestError(f"{type(task).__name__}.{name} has no fields to set; {name}.{field} cannot be")
    names = [each.name for each in dataclasses.fields(before)]
    if field not in names:
        raise InvalidRequestError(f"{type(task).__name__}.{name} has no field {field!r}; it has {names}")
    return dataclasses.replace(before, **{field: value})


def _cross_entropy(output: Tensor, label: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output, label, reduction="none")


def _features_of(task: Task) -> dict[str, Feature]:
    """Attributes that are features, those of base classes first."""
    names: Iterable[str] = dict.fromkeys(name for each in reversed(type(task).__mro__) for name in vars(each))
    found = {name: value for name in names if isinstance(value := getattr(task, name, None), Feature)}
    for name in found:
        if hasattr(nn.Module, name) or hasattr(Inputs, name):
            raise InvalidRequestError(f"feature {name!r}: modules and their inputs have something called so; rename it")
    bases = {id(each) for each in found.values()}
    for name, feature in found.items():
        base = feature.base if isinstance(feature, (Embedding, Sequence)) else None
        if base is not None and id(base) not in bases:
            raise InvalidRequestError(
                f"feature {name!r} is a view of a feature that {type(task).__name__} does not have"
            )
    return found

"""Optimizers as they come are those of the field: with the defaults of torch.optim, their rows step as torch's do."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import trilith
from trilith import tables
from trilith.tables import Adadelta, Adagrad, Adam, Amsgrad, Momentum, Rmsprop, Sgd, Zeros
from trilith.tables.optimizers import Optimizer

TORCH = {
    Sgd: torch.optim.SGD,
    Momentum: lambda weights: torch.optim.SGD(weights, momentum=0.9),
    Adagrad: lambda weights: torch.optim.Adagrad(weights, initial_accumulator_value=0.1),
    Adadelta: torch.optim.Adadelta,
    Adam: torch.optim.Adam,
    Amsgrad: lambda weights: torch.optim.Adam(weights, amsgrad=True),
}


def default_of(kind, name):
    """The default of an attribute, or what the message has where it is None, to float32's digits."""
    value = getattr(kind(), name)
    if value is None:
        value = float(str(np.float32(getattr(getattr(kind().as_proto(), kind.kind), kind.renamed.get(name, name)))))
    return value


@pytest.mark.parametrize("kind", TORCH, ids=lambda kind: kind.__name__)
def test_rows_step_as_those_of_torch_with_its_defaults(kind):
    rng = np.random.default_rng(5)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    weights = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = TORCH[kind]([weights])
    with trilith.connect("local://", threads=1) as client:
        table = client.table("rows", dim=4, optimizer=kind(), initializer=Zeros())
        table.assign([1, 2, 3], start)
        for scale in (1.0, 1e-3, 1e-5, 10.0, 1e-2, 1.0):
            gradient = (scale * rng.normal(size=(3, 4))).astype(np.float32)
            table.apply_gradients([1, 2, 3], gradient)
            weights.grad = torch.from_numpy(gradient)
            optimizer.step()
        moved = table.lookup([1, 2, 3]) - start
    # Amsgrad's maximum is taken before the bias is corrected, and epsilon added to another root: 1e-8 of 1e-5.
    np.testing.assert_allclose(
        moved, weights.detach().numpy() - start, rtol=5e-3 if kind is Amsgrad else 1e-3, atol=1e-7
    )


@pytest.mark.parametrize(
    ("ours", "torchs", "names"),
    [
        (Sgd, torch.optim.SGD, {"learning_rate": "lr"}),
        (Momentum, torch.optim.SGD, {"learning_rate": "lr"}),
        (Adagrad, torch.optim.Adagrad, {"learning_rate": "lr", "weight_decay_factor": "weight_decay"}),
        (Adadelta, torch.optim.Adadelta, {"learning_rate": "lr", "averaging_ratio": "rho", "epsilon": "eps"}),
        (Adam, torch.optim.Adam, {"learning_rate": "lr", "epsilon": "eps"}),
        (Amsgrad, torch.optim.Adam, {"learning_rate": "lr", "epsilon": "eps"}),
        (Rmsprop, torch.optim.RMSprop, {"learning_rate": "lr", "momentum": "alpha"}),
    ],
)
def test_defaults_are_those_of_torch(ours, torchs, names):
    given = inspect.signature(torchs).parameters
    for name, theirs in names.items():
        assert default_of(ours, name) == given[theirs].default, name
    if ours in (Adam, Amsgrad):
        assert (ours().beta1, ours().beta2) == given["betas"].default


def test_every_optimizer_makes_a_table_as_it_comes():
    kinds = [each for each in vars(tables).values() if isinstance(each, type) and issubclass(each, Optimizer)]
    with trilith.connect("local://", threads=1) as client:
        for kind in kinds:
            if kind in (Optimizer, tables.StochasticRoundingFloat16):
                continue
            table = client.table(kind.__name__, dim=1, optimizer=kind(), initializer=Zeros())
            table.apply_gradients([1], np.ones((1, 1), np.float32))
            assert np.isfinite(table.lookup([1])).all(), kind


def test_the_page_of_optimizers_has_all_of_them_with_their_defaults():
    text = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
    for kind in vars(tables).values():
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or kind is Optimizer:
            continue
        section = re.search(rf"^## `{kind.__name__}`$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"no section of {kind.__name__}"
        for each in fields(kind) if kind is not tables.StochasticRoundingFloat16 else ():
            value = default_of(kind, each.name)
            assert f"`{each.name}={value}`" in section[1], f"{kind.__name__}: {each.name}={value}"

"""compile=true: the same numbers, nothing compiled after the first batches, and a task that exports as ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from trilith.errors import InvalidRequestError
from trilith.estimator import Callback, Dense, Embedding, Estimator, Label, RunConfig, Sequence, Task, metrics
from trilith.estimator.events import Step
from trilith.estimator.features import Inputs
from trilith.ops.jit import JIT_DISABLED
from trilith.tables import Adagrad

BATCH, BATCHES, LAST = 512, 8, 7


def no_compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(
    JIT_DISABLED or bool(no_compiler()), reason="torch.compile needs a C++ compiler: apt-get install g++"
)


class Ctr(Task):
    user = Embedding(dim=4, optimizer=Adagrad(learning_rate=0.1))
    item = Embedding(dim=4, bias=True)
    seen = Sequence(item, length=5)
    context = Dense(2)
    labels: ClassVar = {"click": Label(), "buy": Label(weight=2.0)}
    metrics: ClassVar = {"auc": metrics.Auc()}

    def build(self) -> None:
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.trunk = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in self.labels})

    def forward(self, x: Inputs) -> dict[str, torch.Tensor]:
        history, _ = self.attention(
            x.item.vector[:, None],
            x.seen.values,
            x.seen.values,
            key_padding_mask=~x.seen.mask,
            need_weights=False,
        )
        deep = self.trunk(torch.cat([x.user.vector, x.item.vector, history[:, 0], x.context], 1))
        return {name: head(deep)[:, 0] + x.item.bias for name, head in self.heads.items()}


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for size in [BATCH] * BATCHES + [LAST]:
        user = rng.integers(0, 50, size)
        click = (user % 3 == 0).astype(np.float32)
        yield {
            "user": user,
            "item": rng.integers(0, 20, size),
            "seen": rng.integers(0, 20, (size, 4)),
            "context": rng.normal(size=(size, 2)).astype(np.float32),
            "click": click,
            "buy": click,
        }


class Graphs(Callback):
    """How many graphs torch has compiled after each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step(self, event: Step) -> None:
        from torch._dynamo.utils import counters

        self.counts.append(counters["stats"]["unique_graphs"])


def job(compiled: bool, folder: str = "", callbacks: tuple[Callback, ...] = ()) -> Estimator:
    return Estimator(
        Ctr(dense_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)),
        RunConfig(compile=compiled, epochs=2, device="cpu", progress="none", model_dir=folder),
        train=batches,
        evaluate=batches,
        callbacks=callbacks,
    )


@needs_compiler
def test_a_compiled_model_learns_the_same_and_is_compiled_for_the_first_batches_alone(tmp_path):
    torch._dynamo.reset()
    graphs = Graphs()
    with job(False) as plain, job(True, str(tmp_path / "model"), (graphs,)) as compiled:
        expected, found = plain.train(), compiled.train()
        assert found == pytest.approx(expected, abs=1e-4)
        before, after = plain.task.state_dict(), compiled.task.state_dict()
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
        ids = np.arange(50)
        np.testing.assert_allclose(
            compiled.client.table("user").lookup(ids), plain.client.table("user").lookup(ids), rtol=1e-4, atol=1e-5
        )
        counts = graphs.counts[: BATCHES + 1]  # of the first pass, before evaluations
        assert len(counts) == BATCHES + 1
        assert counts[2] > 0
        assert counts[3:] == [counts[2]] * (BATCHES - 2)
        # Evaluation has a graph of its own; the second pass none.
        assert len(set(graphs.counts[BATCHES + 1 :])) == 1
        assert compiled.export(str(tmp_path / "exports"), mode="standalone")
        np.testing.assert_allclose(
            next(compiled.predict(batches()))["click"], next(plain.predict(batches()))["click"], rtol=1e-3, atol=1e-4
        )


def test_without_a_compiler_it_says_so(monkeypatch):
    import torch._inductor.cpp_builder as builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(InvalidRequestError, match=r"compile=true: .*install g\+\+, or say compile=false"):
        job(True).open()

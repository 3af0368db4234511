"""On a CUDA device: transfers, pooling, training and exchange give what they give on the CPU; `make test-gpu`."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional

import trilith
from trilith.errors import InvalidRequestError
from trilith.estimator import Dense, Embedding, Estimator, Label, RunConfig, Sequence, Task, WorkerIdentity
from trilith.estimator.features import Inputs
from trilith.estimator.group import backends, local_device, process_group
from trilith.nn import EmbeddingCollection, Feature
from trilith.nn.bridge import Bridge
from trilith.nn.optimization import Optimization
from trilith.nn.reduction import FUSIONS, average_gradients
from trilith.tables import Adagrad, RandomUniform
from trilith.tables.all_to_all import TorchCollective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: `make test-gpu` where there is one"),
]

VOCABULARY, BATCH = 50, 64
TABLE = {"dim": 8, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1, 1)}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_rows_travel_both_ways_through_pinned_memory_from_several_threads():
    bridge = Bridge(device())
    found: list[bool] = []

    def there_and_back(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.normal(size=(rng.integers(0, 5000), 16)).astype(np.float32)
            moved = bridge.to_device(rows)
            found.append(moved.device == device() and np.array_equal(bridge.to_host(moved * 2), rows * 2))

    threads = [threading.Thread(target=there_and_back, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def trained(where: torch.device, precision: str, combiner: str) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Rows and dense parameters after some steps with scaling, accumulation and clipping."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with trilith.connect("local://") as client:
        table = client.table("t", **TABLE)
        rows = EmbeddingCollection(client, {"f": Feature(table, combiner)}, device=where)
        head = nn.Linear(3 * 8 if combiner == "first(3)" else 8, 1).to(where)
        optimization = Optimization(nn.ModuleList([rows, head]), torch.optim.SGD(head.parameters(), lr=0.1))
        scaler = torch.amp.GradScaler(where.type, enabled=precision == "fp16", init_scale=256.0)
        for _ in range(10):
            for _ in range(2):
                ids = torch.from_numpy(rng.integers(0, VOCABULARY, (BATCH, 3)))
                labels = torch.from_numpy(rng.integers(0, 2, BATCH).astype(np.float32)).to(where)
                vectors = rows({"f": ids})["f"]
                assert vectors.device == where
                with torch.autocast(where.type, dtype=torch.float16, enabled=precision == "fp16"):
                    logits = head(vectors.reshape(BATCH, -1))[:, 0]
                scaler.scale(functional.binary_cross_entropy_with_logits(logits.float(), labels)).backward()
            scaler.unscale_(optimization)
            nn.utils.clip_grad_norm_(optimization.parameters_and_rows(), 0.5)
            scaler.step(optimization)
            scaler.update()
        optimization.drain()
        return table.lookup(np.arange(VOCABULARY)), [each.detach().cpu() for each in head.parameters()]


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", "first(3)"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loop_learns_what_it_learns_on_the_cpu(combiner, precision):
    near = {"fp32": {"rtol": 1e-4, "atol": 1e-5}, "fp16": {"rtol": 2e-2, "atol": 2e-3}}[precision]
    expected, found = trained(torch.device("cpu"), "fp32", combiner), trained(device(), precision, combiner)
    np.testing.assert_allclose(found[0], expected[0], **near)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, **near)


class Ctr(Task):
    user = Embedding(dim=4)
    item = Embedding(dim=4, bias=True)
    seen = Sequence(item, length=5)
    context = Dense(2)
    labels = {"click": Label()}  # noqa: RUF012

    def build(self) -> None:
        self.trunk = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Inputs) -> torch.Tensor:
        count = x.seen.mask.sum(1, keepdim=True).clamp(min=1)
        deep = [x.user.vector, x.item.vector, x.seen.values.sum(1) / count, x.context]
        return self.trunk(torch.cat(deep, 1))[:, 0] + x.item.bias + x.user.bias


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(20):
        user = rng.integers(0, VOCABULARY, BATCH)
        yield {
            "user": user,
            "item": rng.integers(0, 20, BATCH),
            "seen": rng.integers(0, 20, (BATCH, 4)),
            "context": rng.normal(size=(BATCH, 2)).astype(np.float32),
            "click": (user % 3 == 0).astype(np.float32),
        }


def job(**settings) -> Estimator:
    run = RunConfig(**{"epochs": 2, "progress": "none", **settings})
    sgd = Ctr(dense_optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    return Estimator(sgd, run, train=batches, evaluate=batches)


@pytest.mark.parametrize("pipelined", [0, 2])
def test_an_estimator_learns_saves_goes_on_and_exports_as_on_the_cpu(tmp_path, pipelined):
    overlap = {"prefetch": pipelined, "async_push": pipelined}
    with job(device="cpu", **overlap) as here:
        expected = here.train()
    folder = str(tmp_path / "model")
    with job(device="cuda", epochs=1, model_dir=folder, **overlap) as first:
        first.train()
    with job(device="cuda", model_dir=folder, **overlap) as there:
        found = there.train()  # the second pass
        assert {each.device for each in there.task.parameters()} == {local_device(there.identity, "cuda")}
        assert found["loss"] == pytest.approx(expected["loss"], abs=5e-3)
        scores = next(there.predict(batches()))["click"]
        assert scores.shape == (BATCH,)
        assert np.isfinite(scores).all()
        assert there.export(str(tmp_path / "exports"), mode="standalone")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_estimator_learns_in_half_precision_with_clipping_and_compiled(precision):
    with job(device="cuda", precision=precision, clip_norm=1.0) as there, job(device="cuda", compile=True) as compiled:
        assert np.isfinite(there.train()["loss"])
        assert np.isfinite(compiled.train()["loss"])


def test_ranks_exchange_rows_and_average_gradients_over_nccl():
    me = WorkerIdentity(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert backends(device()) == "cpu:gloo,cuda:nccl"
    with process_group(me, device()):
        exchange = TorchCollective.in_new_group(device())
        values, each = np.arange(12, dtype=np.float32), np.array([12])
        np.testing.assert_array_equal(exchange.all_to_all(values, each, each), values)
        given = [torch.full((3,), 2.0, device=device()), None, torch.ones(2, 2, device=device())]
        for fusion in FUSIONS:
            means = average_gradients(given, fusion=fusion)
            assert [None if mean is None else mean.tolist() for mean in means] == [[2.0] * 3, None, [[1.0] * 2] * 2]
    assert not distributed.is_initialized()


def test_each_local_rank_has_a_gpu_of_its_own_or_is_refused():
    count = torch.cuda.device_count()
    ranks = [
        WorkerIdentity(rank=n, world_size=count + 1, local_rank=n, local_world_size=count + 1) for n in range(count + 1)
    ]
    assert [local_device(rank, "cuda").index for rank in ranks[:count]] == list(range(count))
    with pytest.raises(InvalidRequestError, match=f"local rank {count} would have GPU {count}"):
        local_device(ranks[count], "cuda")

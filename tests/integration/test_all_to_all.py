"""All-to-all tables over torch.distributed, a process per rank: equal to the ranks' steps in order on one PS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import trilith
from trilith.errors import InvalidRequestError
from trilith.ops.jit import JIT_DISABLED
from trilith.tables import Adagrad, RandomUniform, Sgd
from trilith.tables.all_to_all import TorchCollective

TABLES = {
    "a": {"dim": 3, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-0.1, 0.1)},
    "b": {"dim": 16, "optimizer": Sgd(learning_rate=0.5), "initializer": RandomUniform(-0.1, 0.1)},
}
STEPS = 3


def batch(rank, step):
    """A rank's ids and gradients in a step; ranks share many ids, and a table may have none."""
    rng = np.random.default_rng([rank, step])
    ids = {"a": rng.integers(0, 12, 9), "b": rng.integers(0, 40, 0 if (rank + step) % 3 == 0 else 7)}
    grads = {name: rng.normal(size=(each.size, TABLES[name]["dim"])).astype(np.float32) for name, each in ids.items()}
    return ids, grads


def worker(rank, size, folder):
    """What each process does: steps with a wait between them, then all rows as it sees them."""
    import torch.distributed

    from trilith.tables.all_to_all import AllToAllTables

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    with trilith.connect("local://") as client:
        for name, config in TABLES.items():
            client.table(name, **config)
        dims = {name: config["dim"] for name, config in TABLES.items()}
        tables = AllToAllTables(client, dims, TorchCollective())
        for step in range(STEPS):
            ids, grads = batch(rank, step)
            rows, exchanged = tables.lookup(tables.reorder(ids))
            assert all(rows[name].shape == grad.shape for name, grad in grads.items())
            tables.apply_gradients(grads, exchanged, global_step=step, request_time=1)
        everything, _ = tables.lookup(tables.reorder({"a": np.arange(12), "b": np.arange(40)}))
        np.savez(f"{folder}/{rank}.npz", **everything)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(JIT_DISABLED, reason="processes of plain Python kernels take a minute")
@pytest.mark.parametrize("size", [1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_ranks_step_as_one_ps_would_in_the_order_of_the_ranks(tmp_path, size):
    root = Path(__file__).parents[2]
    program = (
        "import sys; from tests.integration.test_all_to_all import worker;"
        " worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), str(size), str(tmp_path)], cwd=root)
        for rank in range(size)
    ]
    try:
        assert [each.wait(240) for each in ranks] == [0] * size
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    with trilith.connect("local://") as client:
        for name, config in TABLES.items():
            client.table(name, **config)
        for step in range(STEPS):
            for rank in range(size):
                ids, grads = batch(rank, step)
                client.apply_gradients(
                    {name: (ids[name], grads[name]) for name in TABLES}, global_step=step, request_time=1
                )
        want = client.lookup({"a": np.arange(12), "b": np.arange(40)})
    for rank in range(size):
        got = np.load(tmp_path / f"{rank}.npz")
        for name in TABLES:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-7)


def test_an_exchange_needs_a_process_group():
    with pytest.raises(InvalidRequestError, match="init_process_group"):
        TorchCollective()

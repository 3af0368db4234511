"""Workers that step together over PS, a process each: a step is one of the cluster, and of the schedules on all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.congruence.clusters import LocalCluster
from trilith.ops.jit import JIT_DISABLED

STEPS, SKIPPED, RANKS = 12, 5, 2


def worker(rank: int, address: str, folder: str) -> None:
    """A loop of one's own: rank 1 has a row's gradient that is not finite in one step, which nobody takes then."""
    import torch
    import torch.distributed
    from torch import nn

    import trilith
    from trilith.nn import AllReduced, EmbeddingCollection, Feature
    from trilith.nn.optimization import Optimization
    from trilith.tables import PolynomialDecay, Sgd, Zeros

    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    with trilith.connect(address) as client:
        rate = PolynomialDecay(0.0, 100, end_learning_rate=1.0)
        table = client.table("t", dim=2, optimizer=Sgd(), initializer=Zeros(), learning_rate=rate)
        rows = EmbeddingCollection(client, {"f": Feature(table, "sum")}, async_push=rank)
        head = nn.Linear(2, 1)
        sgd = torch.optim.SGD(head.parameters(), lr=0.01)
        dense = AllReduced(client, head, sgd, stored_as=Sgd(learning_rate=0.0))
        optimization = Optimization(nn.ModuleList([rows, head]), dense, row_scale=1 / RANKS, skip_non_finite=True)
        for step in range(STEPS):
            torch.distributed.barrier()
            vector = rows({"f": torch.tensor([[7, 1 + 2 * rank]])})["f"]
            # The head's gradients stay finite.
            factor = float("inf") if (step, rank) == (SKIPPED, 1) else 1.0
            (head(vector.detach()).sum() + factor * vector.sum()).backward()
            optimization.step()
            optimization.drain()
            torch.distributed.barrier()
        np.savez(
            f"{folder}/{rank}.npz",
            rows=table.lookup([7, 1, 3]),
            step=client.known_step,
            skipped=optimization.skipped,
            head=head.weight.detach().numpy(),
        )
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(JIT_DISABLED, reason="processes of plain Python kernels take a minute")
def test_ranks_count_a_step_once_know_it_alike_and_skip_it_together(tmp_path):
    root = Path(__file__).parents[2]
    program = (
        "import sys; from tests.integration.test_steps import worker;"
        " worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    with LocalCluster("3-ps") as cluster:
        ranks = [
            subprocess.Popen([sys.executable, "-c", program, str(rank), cluster.address, str(tmp_path)], cwd=root)
            for rank in range(RANKS)
        ]
        try:
            assert [each.wait(240) for each in ranks] == [0] * RANKS
        finally:
            for each in ranks:
                each.kill()
                each.wait()
        with cluster.connect() as client:
            assert client.global_step() == STEPS - 1
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(RANKS)]
    assert [int(each["step"]) for each in found] == [STEPS - 1] * RANKS
    assert [int(each["skipped"]) for each in found] == [1] * RANKS
    np.testing.assert_array_equal(found[0]["head"], found[1]["head"])
    # At step s the rate is s / 100, on both ranks; each brings half of its gradient of 1.
    total = sum(range(STEPS - 1)) / 100
    np.testing.assert_allclose(found[0]["rows"], [[-total] * 2, [-total / 2] * 2, [-total / 2] * 2], rtol=1e-5)

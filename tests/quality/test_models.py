"""How good the trained model is on real data: three fixed seeds, a cluster of processes against plain torch."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from tests.absent import absent
from trilith_services.commands.demo import DemoOptions, run_demo
from trilith_services.demo import movielens
from trilith_services.demo.movielens import MovieLensUnavailableError

pytestmark = pytest.mark.timeout(1800)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def data():
    require_movielens()


def require_movielens():
    """Fetch the data; without it there is nothing to be said of quality, so in CI that is a failure."""
    try:
        movielens.fetch(report=lambda line: None)
    except MovieLensUnavailableError as error:
        absent(str(error))


def figures_of(model, seed, folder, capsys, **changes):
    """The last line of a demo, by name."""
    options = DemoOptions(
        num_ps=2,
        workers=2,
        model=model,
        data="movielens",
        model_dir=folder,
        epochs=0,
        steps=0,
        batch_size=512,
        save_every=500,
        seed=seed,
        **changes,
    )
    assert run_demo(options, Console(file=io.StringIO(), width=160)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    return {name: float(value) for name, value in (word.split("=") for word in line.removeprefix("demo: ").split())}


@pytest.mark.parametrize("model", ["deepfm", "ffm"])
def test_the_cluster_is_as_good_as_plain_torch_also_pipelined(model, tmp_path, capsys):
    cluster, baseline, pipelined = [], [], []
    for seed in SEEDS:
        figures = figures_of(model, seed, tmp_path / f"{seed}", capsys, baseline=True)
        cluster.append(figures["auc"])
        baseline.append(figures["baseline_auc"])
        if model == "deepfm":
            figures = figures_of(
                model, seed, tmp_path / f"{seed}-pipelined", capsys, baseline=False, prefetch=2, async_push=2
            )
            pipelined.append(figures["auc"])
    print(
        f"{model}: cluster {cluster} mean {np.mean(cluster):.4f}, plain torch {baseline} mean {np.mean(baseline):.4f}"
    )
    assert np.mean(baseline) >= 0.775
    assert np.mean(cluster) >= np.mean(baseline) - 0.003
    if pipelined:
        print(f"{model}, pipelined: {pipelined} mean {np.mean(pipelined):.4f}")
        assert abs(np.mean(pipelined) - np.mean(cluster)) <= 0.003

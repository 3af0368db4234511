"""The demo: two PS and two workers of this machine, against the same model with plain torch in one process.

Both count samples from the first step to the last, validation in between. One side follows the other, so that the
rounds, of which the medians count, need a machine that keeps its pace.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.bench.harness import Benchmark, Context, Entry, higher
from trilith_services.commands.demo import DemoOptions, run_demo

__all__ = ["BENCHMARKS"]


def speed(context: Context) -> list[Entry]:
    """DeepFM on made-up clicks, as `trilith demo` runs it where nothing is said."""
    sizes = context.sizes
    figures: list[dict[str, float]] = []
    for turn in range(sizes.demo_rounds):
        context.progress("demo", turn, sizes.demo_rounds)
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()) as out:
            options = DemoOptions(data=f"synthetic:{sizes.demo_samples}", epochs=3, model_dir=Path(scratch))
            if status := run_demo(options, Console(file=io.StringIO())):
                raise RuntimeError(f"the demo ended with status {status}")
        words = out.getvalue().splitlines()[-1].removeprefix("demo: ").split()
        figures.append({name: float(value) for name, value in (word.split("=") for word in words)})
    context.progress("done", sizes.demo_rounds, sizes.demo_rounds)
    cluster, plain = (
        float(np.median([each[name] for each in figures])) for name in ("samples_per_s", "baseline_samples_per_s")
    )
    return [higher("demo.speed", cluster, plain, "samples/s", 0.8)]


BENCHMARKS = (Benchmark(("demo.speed",), speed),)

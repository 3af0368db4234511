"""Training: two PS and two workers as processes, against the same model in one process.

All processes live through the whole benchmark; they train in turns of a few seconds, the cluster step by step, then
with two batches looked up ahead and updates sent behind, then the single process with one torch thread and with two,
so that a machine that changes its pace does so for all of them. The Estimator is held against a loop by hand, and with
its model compiled against itself.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench.harness import Benchmark, Context, Entry, higher, lower
from tests.bench.processes import Child, parameter_servers, python_module

__all__ = ["BENCHMARKS"]

_SERVERS = 2
_WORKERS = 2
_TURNS = 6
_STEPWISE, _PIPELINED = "cluster", "cluster, pipelined"


@dataclass(slots=True)
class _Total:
    """What one side has done.

    Attributes:
        rates: Samples per second, turn by turn.
        cpu_s: Processor seconds of all its processes.
        samples: Trained in them.
    """

    rates: list[float]
    cpu_s: float = 0.0
    samples: int = 0

    @property
    def rate(self) -> float:
        return sum(self.rates) / len(self.rates)

    @property
    def cpu_us(self) -> float:
        """Processor microseconds per sample."""
        return 1e6 * self.cpu_s / self.samples


def _turn(trainees: list[Child], others: list[Child], seconds: float, threads: int) -> _Total:
    """Let `trainees` train; `others` work for them."""
    processes = [*trainees, *others]
    before = sum(process.cpu_s() for process in processes)
    for trainee in trainees:
        trainee.tell(f"{seconds} {threads}")
    reports = [trainee.wait_for(event="trained") for trainee in trainees]
    spent = sum(process.cpu_s() for process in processes) - before
    samples = sum(report["samples"] for report in reports)
    return _Total([sum(report["samples"] / report["seconds"] for report in reports)], spent, samples)


def deepfm(context: Context) -> list[Entry]:
    """DeepFM on Zipf ids; the workers keep one torch thread each, the single process gets its better number."""
    sizes = context.sizes
    model = [
        *("--features", str(sizes.train_features), "--rows", str(sizes.train_rows)),
        *("--batch", str(sizes.train_batch), "--dim", str(sizes.train_dim)),
        *("--batches", str(sizes.train_batches)),
    ]
    with ExitStack() as stack:

        def start(*options: str) -> Child:
            child = Child(python_module("tests.bench.trainee", *model, *options))
            stack.callback(child.stop)
            return child

        context.progress("starting", 0, 1)
        address, servers = stack.enter_context(parameter_servers(_SERVERS))
        workers: dict[str, list[Child]] = {}
        for name, overlap in ((_STEPWISE, 0), (_PIPELINED, 2)):
            for rank in range(_WORKERS):
                # One after another: the first makes the tables.
                ranked = ("--cluster", address, "--rank", str(rank), "--world-size", str(_WORKERS))
                depths = ("--prefetch", str(overlap), "--async-push", str(overlap))
                workers.setdefault(name, []).append(start(*ranked, *depths))
                workers[name][-1].wait_for(event="ready")
        local = start()
        local.wait_for(event="ready")
        sides: dict[str, tuple[list[Child], list[Child], int]] = {
            **{name: (trainees, servers, 1) for name, trainees in workers.items()},
            "one process, 1 thread": ([local], [], 1),
            "one process, 2 threads": ([local], [], 2),
        }
        totals = {name: _Total([]) for name in sides}
        for turn in range(-1, _TURNS):
            for name, (trainees, others, threads) in sides.items():
                context.progress(f"{name} trains", max(turn, 0), _TURNS)
                seconds = sizes.train_warm_seconds if turn < 0 else sizes.train_seconds / _TURNS
                done = _turn(trainees, others, seconds, threads)
                if turn >= 0:
                    total = totals[name]
                    total.rates += done.rates
                    total.cpu_s += done.cpu_s
                    total.samples += done.samples
        context.progress("done", _TURNS, _TURNS)
    cluster, pipelined = totals.pop(_STEPWISE), totals.pop(_PIPELINED)
    best_name, best = max(totals.items(), key=lambda item: item[1].rate)
    context.note(
        f"train.deepfm: the single process is fastest as {best_name} ({best.rate:.0f} samples/s; "
        + ", ".join(f"{name}: {total.rate:.0f}" for name, total in totals.items())
        + f"); processor time per sample {cluster.cpu_us:.0f} us in the cluster, {pipelined.cpu_us:.0f} us pipelined, "
        f"{best.cpu_us:.0f} us in one process"
    )
    return [
        higher("train.deepfm", cluster.rate, best.rate, "samples/s", 0.3),
        lower("train.deepfm.cpu", cluster.cpu_us, best.cpu_us, "cpu us a sample", None),
        higher("train.deepfm.pipelined", pipelined.rate, best.rate, "samples/s", 0.6),
        lower("train.deepfm.pipelined.cpu", pipelined.cpu_us, best.cpu_us, "cpu us a sample", None),
    ]


def estimator(context: Context) -> list[Entry]:
    """A task by the Estimator, and by a loop written by hand over the same modules, in turns of one process."""
    rates = _estimator_rates(context)
    return [higher("train.estimator", rates["estimator"], rates["hand"], "samples/s", 0.95)]


def compiled(context: Context) -> list[Entry]:
    """The same task with `compile=true`, and without, in turns of one process; compiling itself is off the clock."""
    rates = _estimator_rates(context, "--compile")
    if not rates:
        return []
    size = context.sizes.train_batch
    return [higher("train.compile", rates["compiled"] / size, rates["estimator"] / size, "steps/s", 0.9)]


def _estimator_rates(context: Context, *options: str) -> dict[str, float]:
    """Samples per second by side; nothing where the program has no compiler for them, of which a note is made."""
    sizes = context.sizes
    context.progress("training in turns", 0, 1)
    command = [
        *python_module("tests.bench.estimator_trainee"),
        *("--features", str(sizes.train_features), "--rows", str(sizes.train_rows)),
        *("--batch", str(sizes.train_batch), "--dim", str(sizes.train_dim)),
        *("--batches", str(sizes.train_batches), "--turns", str(2 * _TURNS)),
        *("--seconds", str(sizes.train_seconds), "--warm-seconds", str(sizes.train_warm_seconds)),
        *options,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    context.progress("done", 1, 1)
    if "skipped" in found:
        context.note(f"train.compile is left out: {found['skipped']}")
        return {}
    return {name: statistics.median(each) for name, each in found.items()}


_NAMES = ("train.deepfm", "train.deepfm.cpu", "train.deepfm.pipelined", "train.deepfm.pipelined.cpu")

BENCHMARKS = (
    Benchmark(_NAMES, deepfm),
    Benchmark(("train.estimator",), estimator),
    Benchmark(("train.compile",), compiled),
)

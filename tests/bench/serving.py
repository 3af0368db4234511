"""Serving: a client, an entry and a replica as processes, against the same model with its embeddings in one process.

Both sides get serialized Examples and give probabilities: the single process parses them with the same parser, looks up
where each id's row is, and computes with as many threads.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from tests.bench.harness import Benchmark, Context, Entry, interleave, lower
from tests.bench.processes import Child
from trilith.data.parse.parsers import ExampleParser
from trilith.data.parse.specs import Sparse
from trilith.estimator import Estimator, RunConfig
from trilith.ops.memory import tune_allocator
from trilith.ops.ragged import Ragged
from trilith.serving.exports import ps_base
from trilith.serving.prediction import Predictor
from trilith_services.demo.click_files import click_records
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.job import DENSE, TABLE, deepfm_task, torch_adagrad
from trilith_services.demo.local import LocalEmbeddings, LocalModel, initial_rows
from trilith_services.demo.synthetic import make_clicks

__all__ = ["BENCHMARKS"]

_SERVE = "from trilith_services.cli import main; main()"
_REQUESTS = 32


def _process(stack: ExitStack, *arguments: str) -> str:
    command = [sys.executable, "-c", _SERVE, "serving", *arguments, "--listen", "127.0.0.1:0", "--log-format", "json"]
    child = Child(command, reports="stderr")
    stack.callback(child.stop)
    return f"127.0.0.1:{child.wait_for(message='serving')['port']}"


def predict(context: Context) -> list[Entry]:
    """DeepFM as the demo trains it, batches of Examples."""
    sizes = context.sizes
    torch.set_num_threads(1)
    tune_allocator()
    data = make_clicks(sizes.serving_samples)
    vocabulary = data.vocabulary()
    task = deepfm_task(dense_optimizer=torch_adagrad(DENSE))
    context.progress("exporting", 0, 1)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = str(scratch / "exports")
        with Estimator(task, RunConfig(model_dir=str(scratch / "model"), threads=1)) as job:
            rows = initial_rows(task, vocabulary)
            job.client.assign({TABLE: (np.concatenate(list(vocabulary.values())), rows)})
            version = job.export(base).rpartition("/")[2]
        local = LocalModel(task, LocalEmbeddings(vocabulary, rows)).eval()
        replica = _process(stack, "ps", "--rows", f"{ps_base(base, 0)}/{version}/rows")
        entry = _process(stack, "entry", "--export", base, "--replicas", f"0={replica}", "--http", "")
        predictor = stack.enter_context(Predictor(entry))

        random = np.random.default_rng(0)
        batches = [data.take(random.integers(0, len(data), sizes.serving_batch)) for _ in range(_REQUESTS)]
        records = [click_records(batch) for batch in batches]
        payloads = [each.payloads() for each in records]
        parser = ExampleParser({name: Sparse() for name in data.features})
        labels = batches[0].labels

        def alone(turn: int) -> np.ndarray:
            parsed = parser.parse(records[turn])
            found = ClickData(
                labels, {name: Ragged(each.values.view(np.uint64), each.row_splits) for name, each in parsed.items()}
            )
            with torch.inference_mode():
                return torch.sigmoid(local(local.embeddings.encode(found).features)).numpy()

        np.testing.assert_allclose(predictor.predict(payloads[0]).scores, alone(0), atol=1e-3)
        turns = iter(range(sys.maxsize))

        def served() -> object:
            turn = next(turns) % _REQUESTS
            return lambda: predictor.predict(payloads[turn])

        def reference() -> object:
            turn = next(turns) % _REQUESTS
            return lambda: alone(turn)

        ours, theirs = interleave(context, "predict", sizes.serving_calls, served, reference)  # type: ignore[arg-type]
        encoded = [local.embeddings.encode(batch).features for batch in batches]

        def bare() -> object:
            turn = next(turns) % _REQUESTS

            def run() -> object:
                with torch.inference_mode():
                    return local(encoded[turn])

            return run

        (model_only,) = interleave(context, "model only", sizes.serving_calls, bare)  # type: ignore[arg-type]
    context.note(
        f"serving.predict: of the single process's {1e3 * np.median(theirs):.2f} ms the model itself, with ids that "
        f"are row numbers already, takes {1e3 * np.median(model_only):.2f} ms"
    )
    return [
        lower(name, 1e3 * float(np.percentile(ours, at)), 1e3 * float(np.percentile(theirs, at)), "ms", target)
        for name, at, target in (("serving.predict", 50, 2.0), ("serving.predict.p99", 99, 4.0))
    ]


BENCHMARKS = (Benchmark(("serving.predict", "serving.predict.p99"), predict),)

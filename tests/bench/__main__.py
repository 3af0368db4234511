"""`python -m tests.bench [names or prefixes]`: measure, print a table, write build/bench.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from tests.bench import (
    data_columnar,
    data_parse,
    data_pipeline,
    data_read,
    demo,
    discovery,
    engine,
    ops,
    rpc,
    serving,
    sync,
    tables,
    train,
)
from tests.bench.harness import Benchmark, run_all, show, write_json
from tests.bench.sizes import FULL, QUICK, Sizes

BENCHMARKS: tuple[Benchmark, ...] = (
    *data_read.BENCHMARKS,
    *data_parse.BENCHMARKS,
    *data_columnar.BENCHMARKS,
    *data_pipeline.BENCHMARKS,
    *demo.BENCHMARKS,
    *discovery.BENCHMARKS,
    *engine.BENCHMARKS,
    *ops.BENCHMARKS,
    *rpc.BENCHMARKS,
    *serving.BENCHMARKS,
    *sync.BENCHMARKS,
    *tables.BENCHMARKS,
    *train.BENCHMARKS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 if a benchmark failed to give its figures. A missed target is no failure."""
    arguments = _parser().parse_args(argv)
    console = Console(width=110 if not sys.stdout.isatty() else None)
    names = [name for benchmark in BENCHMARKS for name in benchmark.names]
    if arguments.list:
        console.print("\n".join(names), highlight=False)
        return 0
    unknown = [p for p in arguments.names if not any(n == p or n.startswith(f"{p.rstrip('.')}.") for n in names)]
    if unknown:
        console.print(f"error: {', '.join(unknown)}: no such benchmark; --list shows all", style="red")
        return 2
    entries, notes, failed = run_all(BENCHMARKS, _sizes(arguments), arguments.names, console)
    write_json(entries, arguments.output)
    show(entries, notes, failed, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="figures or prefixes of them, such as `engine` or `rpc.lookup`")
    parser.add_argument("--list", action="store_true", help="list the figures")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    for field in fields(Sizes):
        kind = float if "float" in str(field.type) else int
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, metavar="N", help=f"default {field.default:g}")
    return parser


def _sizes(arguments: argparse.Namespace) -> Sizes:
    given = {field.name: getattr(arguments, field.name) for field in fields(Sizes)}
    return replace(QUICK if arguments.quick else FULL, **{k: v for k, v in given.items() if v is not None})


if __name__ == "__main__":
    sys.exit(main())

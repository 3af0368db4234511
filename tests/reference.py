"""docs/commands.md: every flag of every command and every environment variable, written from the program itself.

`python -m tests.reference` writes the page, and docs/metrics.md; `--check` fails if one is stale. Flags come from the
commands as they are declared, compose variables from docker-compose.yml. What environment variables mean is written
down here, and `undescribed` finds those that somebody has begun to read since.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import typer

from tests.metrics_page import METRICS_PAGE, metrics_page
from trilith_services.cli import app

__all__ = ["PAGE", "page", "undescribed"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/commands.md"


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable; a name that ends in * stands for all that begin so."""

    name: str
    value: str
    default: str
    meaning: str


EVERYWHERE = (
    Variable(
        "TRILITH_CACHE",
        "DIR",
        "`~/.cache/trilith`",
        "Compiled kernels (those of other users are not loaded), downloaded data, models of the demo.",
    ),
    Variable("XDG_CACHE_HOME", "DIR", "`~/.cache`", "Where kernels go, in `trilith`, without `$TRILITH_CACHE`."),
    Variable("TRILITH_KERNELS", "DIR", "", "Kernels compiled beforehand, as in the container image; only read."),
    Variable("NUMBA_DISABLE_JIT", "0 or 1", "`0`", "1: kernels run as plain Python, for breakpoints; very slow."),
    Variable(
        "GRPC_EXPERIMENTS",
        "NAME,…",
        "the faster I/O loop",
        "gRPC's own switches. Unless set, Trilith chooses the loop that it has measured to be faster.",
    ),
    Variable(
        "TRILITH_GRPC_PROXY",
        "0 or 1",
        "`0`",
        "1: connections to PS, replicas and entries go through `$grpc_proxy`, `$https_proxy` or `$http_proxy`, but for "
        "what `$no_proxy` lists.",
    ),
    Variable("GRPC_VERBOSITY", "LEVEL", "`ERROR`", "What gRPC itself prints: `DEBUG`, `INFO`, `ERROR` or `NONE`."),
    Variable(
        "GRPC_ENABLE_FORK_SUPPORT",
        "0 or 1",
        "`0`",
        "1: gRPC's own handling of forks, which may lock up a child while other threads are in calls; clients here "
        "do without it.",
    ),
)
CREDENTIALS = Variable(
    "ZK_AUTH", "USER:PASSWORD", "", "ZooKeeper's credentials, where a `zk://` URL has neither these nor `auth_file`."
)
SCHEDULERS = (
    Variable("TF_CONFIG", "JSON", "", "`tf-config://`: addresses by role, and which of them this process is."),
    Variable(
        "MLP_*",
        "",
        "",
        "`mlp://`: `MLP_ROLE`, `MLP_ROLE_INDEX` and `MLP_PORT` say who this process is, `MLP_<role>_NUM`, "
        "`MLP_<role>_<i>_HOST` (or `_PRIMARY_HOST`) and `MLP_<role>_<i>_PORT` (2222) who there is.",
    ),
    Variable(
        "OMPI_COMM_WORLD_*",
        "",
        "",
        "`mlp://` under mpirun: `_RANK`, `_SIZE` and `_LOCAL_SIZE` number the workers instead.",
    ),
)
JOB = (
    Variable(
        "TRILITH_RUN_*",
        "",
        "",
        "Fields of RunConfig: `TRILITH_RUN_EPOCHS=3`. They win over `--config` and the code, `--set` over them.",
    ),
    Variable("RANK", "N", "", "Which worker this is, as torchrun sets it."),
    Variable("WORLD_SIZE", "N", "", "How many workers there are, as torchrun sets it."),
    Variable("LOCAL_RANK", "N", "`0`", "Which of this machine's workers; decides the GPU."),
    Variable("LOCAL_WORLD_SIZE", "N", "", "How many workers are on this machine."),
    Variable("MASTER_ADDR", "HOST", "", "Where rank 0 meets the others, as torchrun sets it; also with what follows."),
    Variable("MASTER_PORT", "PORT", "", "The port there."),
    Variable("TORCHELASTIC_USE_AGENT_STORE", "", "", "torchrun's: its agent listens there itself."),
    Variable(
        "OMPI_COMM_WORLD_*",
        "",
        "",
        "mpirun's `_RANK`, `_SIZE`, `_LOCAL_RANK` and `_LOCAL_SIZE`, where RANK is not set.",
    ),
    Variable("MLP_*", "", "", "The next that is asked: `MLP_ROLE`, `MLP_ROLE_INDEX`, `MLP_WORKER_NUM`, …"),
    Variable("TF_CONFIG", "JSON", "", "The next that is asked; a chief is worker 0."),
    Variable(
        "JOB_COMPLETION_INDEX",
        "N",
        "",
        "The last that is asked: which worker this is, set by an indexed Kubernetes Job.",
    ),
    Variable(
        "JOB_COMPLETIONS",
        "N",
        "",
        "How many: set it in the pod's template to the Job's `completions`; `WORLD_SIZE` is taken too.",
    ),
    Variable("PMI_SIZE", "N", "", "Of a launcher that is not read; above 1, rank and world_size must be given."),
    Variable("SLURM_STEP_NUM_TASKS", "N", "", "The same."),
    Variable("CUDA_VISIBLE_DEVICES", "N,…", "", "CUDA's own; named where a local rank has no GPU."),
)
OWN_ADDRESS = (
    Variable("CLOUDNATIVE_INET_ADDR", "HOST,…", "", "This machine's address, the first of them, without --advertise."),
    Variable("YARN_INET_ADDR", "HOST,…", "", "The same, where the one above is not set; and so on."),
    Variable(
        "MY_HOST_IP",
        "HOST",
        "",
        "The same. If this and the next two are IPv6 or not set, IPv6 is preferred.",
    ),
    Variable("MY_POD_IP", "HOST", "", "The same."),
    Variable("MY_HOST_IPV6", "HOST", "", "The same."),
)
COMPOSE = {
    "BASE_IMAGE": "Image that Trilith's is built on.",
    "CONSOLE_PORT": "Port of this machine for the console.",
    "ENTRY_HTTP_PORT": "Port of this machine for predictions as JSON.",
    "ENTRY_PORT": "Port of this machine for predictions over gRPC.",
    "GRAFANA_IMAGE": "Image of Grafana.",
    "GRAFANA_PORT": "Port of this machine for Grafana.",
    "PIP_ARGS": "More arguments for pip when the image is built.",
    "PROMETHEUS_IMAGE": "Image of Prometheus.",
    "PROMETHEUS_PORT": "Port of this machine for Prometheus.",
    "TORCH_INDEX": "Where pip looks for torch as well; empty: the default build, which brings CUDA.",
    "TRILITH_IMAGE": "Name of the image that is built, or used as it is.",
    "TRILITH_RUN_EPOCHS": "Passes over MovieLens; not set: the job's own number.",
    "TRILITH_ZK": "ZooKeeper servers, with commas between.",
    "ZK_CONFIG": "`one` or `three`: which file of `deploy/zookeeper` the ZooKeeper servers read.",
    "ZK_IMAGE": "Image of ZooKeeper.",
}

NOT_ENVIRONMENT = frozenset({"PATH_INFO", "MPI_", "PRIMARY_HOST", "LOCAL_SIZE"})
"""A name of WSGI's own environment, a prefix beside MLP_ of which nothing is read, the ends of names."""

HEAD = """# Commands, flags and environment variables

<!-- Written by `make docs` from the program itself; `make lint` and the tests fail when it is stale. -->

A flag marked with … may be repeated. Sizes are such as `512M` or `16G`, in powers of 1024. What an empty default stands
for is in the meaning. A wrong value is named with its flag on standard error, and the exit status is 2.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for words, command in _commands("trilith", typer.main.get_command(app)):
        parts.append(f"## `{words}`\n\n{_prose(command.help or '')}\n")
        rows = [*_flags(command), *_variables(words, command)]
        if rows:
            parts.append(_table("flag or $variable", rows))
    parts.append("## `trilith.estimator`\n\nWhat a job reads of the environment.\n")
    parts.append(_table("$variable", [(f"`${each.name}`", each.value, each.default, each.meaning) for each in JOB]))
    parts.append("## `docker-compose`\n\nVariables of `docker-compose.yml`, from the environment or an `--env-file`.\n")
    parts.append(_table("$variable", list(_compose())))
    return "\n".join(parts)


def undescribed() -> list[str]:
    """Variables that are read and not described, or described and not read."""
    known = {variable.name for variable in (*EVERYWHERE, CREDENTIALS, *SCHEDULERS, *JOB, *OWN_ADDRESS)}
    prefixes = tuple(name[:-1] for name in known if name.endswith("*"))
    composed = set(_compose_defaults())
    found = [f"docker-compose.yml: {name}" for name in sorted(composed ^ set(COMPOSE))]
    sources = {
        path: path.read_text() for root in ("client", "services") for path in sorted((ROOT / root).rglob("*.py"))
    }
    for path, text in sources.items():
        if re.search(r"\b(environ|getenv)\b", text):
            quoted = set(re.findall(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]*)"', text))
            own = set(re.findall(r"^([A-Z0-9_]+)\b", text, re.M))
            unknown = quoted - own - known - NOT_ENVIRONMENT
            found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(unknown) if not name.startswith(prefixes)]
    program = "".join(sources.values())
    return found + [f"nothing reads {name}" for name in sorted(known) if name.rstrip("*") not in program]


def _commands(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(f"{words} {name}", child)


def _prose(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))


def _flags(command: click.Command) -> Iterator[tuple[str, str, str, str]]:
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True) if command.callback else {}
    for parameter in command.params:
        if parameter.name == "help":
            continue
        declared: Any = parameter
        kind, info = hints[declared.name].__args__[0], hints[declared.name].__metadata__[0]
        many = declared.multiple or declared.nargs == -1
        positional = declared.param_type_name == "argument"
        if positional:
            name = f"`{declared.metavar}`"
        else:
            name = ", ".join(f"`{option}`" for option in (*declared.opts, *declared.secondary_opts))
        value = "" if positional or declared.is_flag else _value(kind, info)
        yield name + " …" * many, value, _default(declared, info), _prose(declared.help)


def _value(kind: Any, info: Any) -> str:
    inner = [part for part in typing.get_args(kind) if part is not types.NoneType]
    kind = inner[0] if inner else kind
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    low, high = info.min, info.max
    if low is None:
        return str(info.metavar).replace("|", " or ")
    return f"{info.metavar} ≥ {low:g}" if high is None else f"{info.metavar}, {low:g} to {high:g}"


def _default(parameter: Any, info: Any) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    if parameter.required:
        return "must be given"
    default = parameter.default
    if parameter.param_type_name == "option" and parameter.is_flag:
        return "on" if default else "off"
    if default is None or default == "" or callable(default):
        return ""
    return f"`{default.value if isinstance(default, enum.Enum) else default}`"


def _variables(words: str, command: click.Command) -> Iterator[tuple[str, str, str, str]]:
    """What a command reads of the environment, by what its flags take."""
    read: list[Variable] = list(EVERYWHERE) if words == "trilith" else []
    taken: list[Any] = list(command.params)
    urls = {
        parameter.name for parameter in taken if "URL" in (parameter.metavar or "") or parameter.metavar == "CLUSTER"
    }
    read += [CREDENTIALS] * bool(urls)
    read += SCHEDULERS if urls & {"address", "cluster"} or words == "trilith ps" else ()
    read += OWN_ADDRESS if {"advertise", "serving"} & {parameter.name for parameter in taken} else ()
    for variable in read:
        yield f"`${variable.name}`", variable.value, variable.default, variable.meaning


def _compose_defaults() -> dict[str, str]:
    text = (ROOT / "docker-compose.yml").read_text()
    found = re.findall(r"(?<!\$)\$\{(\w+)(?::?-([^}]*))?\}", text)
    handed_on = re.findall(r"^ +([A-Z_]+):(?: *#.*)?$()", text, re.M)  # to a service, as they are
    return dict(sorted(found + handed_on))


def _compose() -> Iterator[tuple[str, str, str, str]]:
    for name, default in _compose_defaults().items():
        yield f"`${name}`", "", f"`{default}`" if default else "", COMPOSE.get(name, "")


def _table(first: str, rows: list[tuple[str, str, str, str]]) -> str:
    heads = (first, "value", "default", "meaning")
    columns = [index for index in range(4) if index in (0, 3) or any(row[index] for row in rows)]
    lines = [[heads[index] for index in columns], ["---"] * len(columns)]
    lines += [[row[index].replace("|", "\\|") for index in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    missing = undescribed()
    for name in missing:
        print(f"tests/reference.py: not described, or described in vain: {name}", file=sys.stderr)
    stale = False
    for path, text in ((PAGE, page()), (METRICS_PAGE, metrics_page())):
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"stale: {path.relative_to(ROOT)} (run make docs)", file=sys.stderr)
            stale = True
    return int(stale or bool(missing))


if __name__ == "__main__":
    sys.exit(main())

"""The flags that several commands have, so that they are named, checked and explained alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trilith.config import LARGEST_MESSAGE
from trilith.errors import InvalidRequestError
from trilith_services.options import flags_of
from trilith_services.sizes import parse_bytes

if TYPE_CHECKING:
    from trilith_services.grpc.serve import Limits

__all__ = [
    "Advertise",
    "Data",
    "Drain",
    "Json",
    "Listen",
    "LogFormat",
    "LogFormatFlag",
    "LogLevel",
    "LogLevelFlag",
    "MaxMessage",
    "MaxQueue",
    "MemoryLimit",
    "MetricsHost",
    "MetricsPort",
    "Model",
    "ModelFlag",
    "Reflection",
    "RowThreads",
    "RpcThreads",
    "ServingName",
    "address",
    "checked",
    "expanded",
    "limits",
    "size",
]


class LogFormat(StrEnum):
    """How log lines look."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """Least level that is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class Model(StrEnum):
    """The reference models."""

    ffm = "ffm"
    deepfm = "deepfm"


def checked(check: Callable[[str], object]) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """A callback that leaves a value alone, and names its flag where `check` refuses it with InvalidRequestError."""

    def callback(flag: typer.CallbackParam, value: str | None) -> str | None:
        try:
            if value is not None:
                check(value)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{flag.opts[0]}: {error}") from None
        return value

    return callback


def _listening(text: str) -> None:
    """Refuse what nobody can listen on; empty stands for not listening, where a command allows that."""
    host, colon, port = text.rpartition(":")
    if text and not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidRequestError(f"{text!r} is not host:port (0.0.0.0 for every interface, port 0 for a free one)")


def _message(text: str) -> None:
    """Refuse what gRPC cannot send at once."""
    if not 0 < parse_bytes(text) <= LARGEST_MESSAGE:
        raise InvalidRequestError(f"{text!r} is outside 1..2047M, what a message may hold")


size = checked(parse_bytes)
"""Callback of flags that take an amount of memory."""

address = checked(_listening)
"""Callback of flags that take an address to serve on."""


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `config`, a dataclass, is given by a flag for each of its options."""
    hints = get_type_hints(command, include_extras=True)
    kind = hints.pop("config")
    types, kinds = get_type_hints(kind), inspect.Parameter.KEYWORD_ONLY
    flags = {}
    for flag, each in flags_of(kind):
        names = [f"{flag}/--no-{flag[2:]}"] if isinstance(each.default, bool) else [flag]
        about = typer.Option(*names, **each.metadata["how"])
        flags[each.name] = inspect.Parameter(
            each.name, kinds, default=each.default, annotation=Annotated[types[each.name], about]
        )
    own = {
        name: each.replace(kind=kinds, annotation=hints[name])
        for name, each in inspect.signature(command).parameters.items()
        if name != "config"
    }

    def run(**given: Any) -> None:
        command(kind(**{name: given.pop(name) for name in flags}), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: each.annotation for name, each in (flags | own).items()}
    run.__signature__ = inspect.Signature([*flags.values(), *own.values()])  # type: ignore[attr-defined]
    return run


def limits(*, rpc_threads: int, max_queue: int, max_message: str, drain: float, reflection: bool) -> Limits:
    """What a server takes on, by the flags of these names."""
    from trilith_services.grpc.serve import Limits

    return Limits(
        threads=rpc_threads,
        max_queue=max_queue,
        max_message_bytes=parse_bytes(max_message),
        drain_s=drain,
        reflection=reflection,
    )


Listen = Annotated[
    str,
    typer.Option(
        "--listen",
        metavar="HOST:PORT",
        callback=address,
        help="Address to serve on, 0.0.0.0 for every interface (nothing asks who calls); port 0: a free one.",
    ),
]
Advertise = Annotated[
    str,
    typer.Option(
        "--advertise",
        metavar="HOST:PORT",
        help="Address to announce, port 0 for the one served on; left out: the one listened on, or this machine's "
        "if that is every interface.",
    ),
]
ServingName = Annotated[
    str,
    typer.Option("--name", metavar="NAME", help="Serving model under which the directory lists processes."),
]
MemoryLimit = Annotated[
    str,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        callback=size,
        help="Memory for tables, filters, variables and queues, such as 512M or 16G; 0: no limit but the cgroup's.",
    ),
]
RowThreads = Annotated[
    int, typer.Option("--threads", metavar="N", help="Threads that work on rows; 0: one per core.", min=0)
]
RpcThreads = Annotated[int, typer.Option("--rpc-threads", metavar="N", help="Calls worked on at once.", min=1)]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", metavar="N", help="Calls that may wait; more are refused.", min=1)
]
MaxMessage = Annotated[
    str,
    typer.Option(
        "--max-message",
        metavar="SIZE",
        callback=checked(_message),
        help="Largest message, such as 64M; larger are refused.",
    ),
]
Drain = Annotated[
    float, typer.Option("--drain", metavar="SECONDS", help="How long calls get to finish after SIGTERM.", min=0.0)
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        help="Serve /metrics, for Prometheus, and /healthz there; 0: a free port; left out: nowhere.",
        min=0,
        max=65535,
    ),
]
MetricsHost = Annotated[
    str,
    typer.Option(
        "--metrics-host",
        metavar="HOST",
        help="Interface of --metrics-port; 0.0.0.0 where Prometheus is on another machine.",
    ),
]
Reflection = Annotated[
    bool, typer.Option("--reflection", help="Describe services and messages to whoever asks, such as grpcurl.")
]
LogFormatFlag = Annotated[
    LogFormat, typer.Option("--log-format", help="text: key=value, for people; json: an object per line.")
]
LogLevelFlag = Annotated[
    LogLevel, typer.Option("--log-level", case_sensitive=False, help="Least level that is logged.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

ModelFlag = Annotated[Model, typer.Option("--model", help="Reference model.")]
Data = Annotated[
    str, typer.Option("--data", metavar="DATA", help="movielens, or synthetic:SAMPLES for samples that are made up.")
]

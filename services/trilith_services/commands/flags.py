"""The flags that several commands have, so that they are named, checked and explained alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trilith.config import LARGEST_MESSAGE
from trilith.discovery.urls import CLUSTER_FORMS
from trilith.errors import InvalidRequestError
from trilith_services.options import flags_of, option
from trilith_services.sizes import parse_bytes

if TYPE_CHECKING:
    from trilith_services.grpc.serve import Limits

__all__ = [
    "Address",
    "Advertise",
    "CheckpointRoot",
    "Json",
    "Listen",
    "LogFlags",
    "LogFormat",
    "LogLevel",
    "MemoryLimit",
    "MetricsHost",
    "MetricsPort",
    "Model",
    "RowThreads",
    "ServerFlags",
    "ServingName",
    "address",
    "checked",
    "expanded",
    "size",
]


Address = Annotated[str, typer.Argument(metavar="CLUSTER", help=f"{CLUSTER_FORMS}; what `trilith up` prints.")]


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
    """A command whose parameters that are dataclasses are given by a flag for each of their options."""
    hints = get_type_hints(command, include_extras=True)
    flags: dict[str, inspect.Parameter] = {}
    groups: dict[str, list[str]] = {}
    for name, each in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            group = _parameters(hints[name])
            groups[name] = list(group)
            flags |= group
        else:
            flags[name] = each.replace(kind=each.KEYWORD_ONLY, annotation=hints[name])

    def run(**given: Any) -> None:
        made = {name: hints[name](**{each: given.pop(each) for each in of}) for name, of in groups.items()}
        command(**made, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: each.annotation for name, each in flags.items()}
    run.__signature__ = inspect.Signature(list(flags.values()))  # type: ignore[attr-defined]
    return run


def _parameters(config: type[Any]) -> dict[str, inspect.Parameter]:
    types = get_type_hints(config)
    made = {}
    for flag, each in flags_of(config):
        names = [f"{flag}/--no-{flag[2:]}"] if each.default is True else [flag]
        about = typer.Option(*names, **each.metadata["how"])
        made[each.name] = inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[types[each.name], about],
        )
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """What a server takes on."""

    rpc_threads: int = option(8, "Calls worked on at once.", least=1, metavar="N")
    max_queue: int = option(128, "Calls that may wait; more are refused.", least=1, metavar="N")
    max_message: str = option(
        "256M", "Largest message, such as 64M; larger are refused.", metavar="SIZE", callback=checked(_message)
    )
    drain: float = option(10.0, "How long calls get to finish after SIGTERM.", least=0.0, metavar="SECONDS")
    reflection: bool = option(False, "Describe services and messages to whoever asks, such as grpcurl.")

    @property
    def limits(self) -> Limits:
        """The same for a server process."""
        from trilith_services.grpc.serve import Limits

        return Limits(
            threads=self.rpc_threads,
            max_queue=self.max_queue,
            max_message_bytes=parse_bytes(self.max_message),
            drain_s=self.drain,
            reflection=self.reflection,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFlags:
    """What is logged, and how."""

    log_format: LogFormat = option(LogFormat.text, "text: key=value, for people; json: an object per line.")
    log_level: LogLevel = option(LogLevel.info, "Least level that is logged.", case_sensitive=False)

    def setup(self, **role: Any) -> None:
        """Log so from now on; `role` says in every line which process it is of."""
        from trilith_services.logs import setup_logging

        setup_logging(self.log_format.value, level=self.log_level.value, role=role)


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
CheckpointRoot = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-root",
        metavar="DIR",
        help="Directory or URL below which clients may save and restore checkpoints; left out: --checkpoint-dir, "
        "or --restore-from.",
    ),
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
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

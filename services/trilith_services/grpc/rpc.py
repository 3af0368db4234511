"""One decorator around every servicer method: deadline, timing, and the one place where errors become gRPC statuses."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc

from trilith.errors import DeadlineExceededError, InternalError, TrilithError
from trilith.rpc.remote import ERROR_KEY, INCARNATION_KEY

__all__ = ["Observer", "Servicer", "guarded", "rpc"]

_F = TypeVar("_F", bound=Callable[..., Any])

log = logging.getLogger(__name__)

# gRPC refuses metadata beyond 8 KiB, and encodes each line break in three bytes.
_MAX_DETAILS = 4000


class Observer(Protocol):
    """Who is told about every call."""

    def called(self, method: str, status: str, seconds: float) -> None:
        """A call of `method` ended with `status` ("OK" or the name of a gRPC status) after `seconds`."""


class Servicer(Protocol):
    """What `rpc` needs of the object whose methods it guards."""

    @property
    def observer(self) -> Observer:
        """Who is told about every call."""

    @property
    def incarnation(self) -> int:
        """Sent with every error, so that a client notices a restart behind it."""

    def admit(self, method: str) -> None:
        """Raise if calls of `method` cannot be answered now."""


def rpc(method: _F) -> _F:
    """Guard a servicer method, which is named as in the .proto file; see `guarded`."""
    return functools.wraps(method)(guarded(method.__name__, method))  # type: ignore[return-value]


def guarded(name: str, method: Callable[[Any, Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
    """Guard what a servicer does for a method: it takes the servicer, the request and the context.

    Work whose deadline has passed while it waited is not done. The time spent is reported, queueing excluded. A
    TrilithError becomes its status, with the name of its class in trailing metadata, where `trilith.rpc.remote`
    finds it; anything else is logged with its traceback and becomes InternalError.
    """

    def call(self: Servicer, request: Any, context: grpc.ServicerContext) -> Any:
        started = time.perf_counter()
        status = "OK"
        try:
            if not context.is_active() or context.time_remaining() == 0.0:
                raise DeadlineExceededError(f"{name}: the deadline passed while the call waited; nothing was done")
            self.admit(name)
            return method(self, request, context)
        except TrilithError as error:
            status = error.status
            _abort(self, context, error)
        except Exception as error:
            log.exception("%s failed", name)
            status = InternalError.status
            _abort(self, context, InternalError(f"{name}: {type(error).__name__}: {error}"))
        finally:
            self.observer.called(name, status, time.perf_counter() - started)

    return call


def _abort(servicer: Servicer, context: grpc.ServicerContext, error: TrilithError) -> None:
    metadata = ((ERROR_KEY, type(error).__name__), (INCARNATION_KEY, str(servicer.incarnation)))
    context.set_trailing_metadata(metadata)
    details = str(error)
    if len(details) > _MAX_DETAILS:
        details = f"{details[: _MAX_DETAILS // 2]} … {details[-_MAX_DETAILS // 2 :]}"
    context.abort(grpc.StatusCode[error.status], details)

"""Entry: the connection to one process that scores requests, its errors, and how it is asked whether it is well."""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc

from trilith.errors import (
    BY_NAME,
    ClosedError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    TrilithError,
    UnavailableError,
)
from trilith.rpc.balancer import PROBE_S, Balancer, Member
from trilith.rpc.channels import open_channel
from trilith.rpc.remote import ERROR_KEY
from trilith.rpc.streams import StreamedMethod
from trilith_proto import serving_pb2

__all__ = ["Entry", "balance_entries"]

_SERVICE = "/trilith.Prediction"


class Entry:
    """One entry.

    Attributes:
        address: host:port.
        channel: To it.
        predict: Calls Predict with serialized messages.
        status: Calls ModelStatus with serialized messages.
    """

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        """Connect with the first call."""
        self.address = address
        self.channel = open_channel(address, max_message_bytes=max_message_bytes)
        self.predict = StreamedMethod(self.channel, f"{_SERVICE}/Predict", f"{_SERVICE}/PredictStream")
        self.status: Any = self.channel.unary_unary(f"{_SERVICE}/ModelStatus")

    def ask(self, name: str, method: Any, request: bytes, timeout_s: float) -> bytes:
        """Call a method of this entry, which is called `name` in messages.

        Raises:
            ClosedError: The connection was closed.
            TrilithError: What the entry raised, or what happened on the way.
        """
        try:
            reply: bytes = method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _error(f"entry {self.address}: {name}", error, timeout_s) from None
        except ValueError:  # what gRPC raises on a closed channel
            raise ClosedError("the connection to the entries was closed") from None
        return reply


def balance_entries(max_message_bytes: int) -> Balancer[Entry]:
    """A balancer of entries; one that failed is asked how it is, as long as there are requests.

    It is well again when it says that it has a model, and a replica of every shard of its rows.
    """

    def probe(member: Member[Entry]) -> None:
        try:
            answer = member.connection.status.future(b"", timeout=PROBE_S)
        except ValueError:
            return  # it was closed meanwhile
        answer.add_done_callback(partial(probed, member))

    def probed(member: Member[Entry], answer: Any) -> None:
        balancer.probed(member, _what_is_wrong(answer))

    balancer = Balancer(
        "entry",
        partial(Entry, max_message_bytes=max_message_bytes),
        lambda entry: entry.channel.close(),
        probe=probe,
    )
    return balancer


def _what_is_wrong(answer: Any) -> TrilithError | None:
    if answer.code() is not grpc.StatusCode.OK:
        return UnavailableError(f"{answer.code().name}: {answer.details()}")
    status = serving_pb2.ModelStatusResponse.FromString(answer.result())
    answered = {replica.shard for replica in status.replicas if replica.healthy}
    if status.model and answered == {replica.shard for replica in status.replicas}:
        return None
    return UnavailableError("it has no model, or no rows for it")


def _error(where: str, error: Any, timeout_s: float) -> TrilithError:
    """What the entry raised, or what happened on the way."""
    code, details = error.code(), error.details() or ""
    raised = BY_NAME.get(str(dict(error.trailing_metadata() or ()).get(ERROR_KEY, "")))
    if raised is not None:
        return raised(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"{where}: no answer within {timeout_s:.3g} s")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError(f"{where}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadedError(f"{where}: {details}")
    return InternalError(f"{where}: {code.name}: {details}")

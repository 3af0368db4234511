"""Predictor: asks serving entries for scores; `remote_predict` for those who ask once in a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from trilith.config import MAX_MESSAGE_BYTES, prefer_fast_grpc
from trilith.discovery.addresses import check_address
from trilith.errors import (
    BY_NAME,
    ClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TrilithError,
    UnavailableError,
)

if TYPE_CHECKING:
    from trilith.data.records import Records
    from trilith.shard import Float32Array
    from trilith_proto import serving_pb2

__all__ = ["Prediction", "Predictor", "remote_predict"]

SERVICE = "trilith.Prediction"

_PAUSE_S = 0.02
_KEPT: dict[str, Predictor] = {}
_KEPT_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an entry answered.

    Attributes:
        outputs: By name float32[n], or float32[n, width].
        model_version: Which export gave it.
        model_step: Training step of its dense weights.
        rows_as_of: The rows hold everything acknowledged at this time, in Unix seconds; 0: not known.
    """

    outputs: Mapping[str, Float32Array]
    model_version: int
    model_step: int
    rows_as_of: float

    @property
    def scores(self) -> Float32Array:
        """The first output."""
        return next(iter(self.outputs.values()))


class Predictor:
    """Connections to one or more entries of the same model. Thread-safe.

    A request goes to the entry that answered last; one that is away or overloaded is passed over.
    """

    def __init__(
        self, addresses: str | Sequence[str], *, timeout_s: float = 5.0, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """Connect on first use.

        Args:
            addresses: "host:port,host:port", or a list of them.
            timeout_s: Deadline of a request, those to further entries included.
            max_message_bytes: Largest message sent or accepted.
        """
        prefer_fast_grpc()
        import grpc

        from trilith.streams import StreamedMethod

        given = addresses.split(",") if isinstance(addresses, str) else addresses
        self._addresses = [check_address(each.strip()) for each in given]
        if not self._addresses:
            raise InvalidRequestError("no address of an entry")
        self._timeout_s = timeout_s
        options = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channels = [grpc.insecure_channel(each, options=options) for each in self._addresses]
        self._predicts = [
            StreamedMethod(
                channel.unary_unary(f"/{SERVICE}/Predict"), channel.stream_stream(f"/{SERVICE}/PredictStream")
            )
            for channel in self._channels
        ]
        self._statuses: list[Any] = [channel.unary_unary(f"/{SERVICE}/ModelStatus") for channel in self._channels]
        self._first = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def predict(
        self,
        records: Sequence[bytes] | Records,
        *,
        kind: Literal["example", "instance"] = "example",
        timeout_s: float | None = None,
    ) -> Prediction:
        """Score serialized records.

        Args:
            records: Serialized Examples or Instances, or `trilith.data` records, which know their kind.
            kind: What they are.
            timeout_s: Seconds until DeadlineExceededError.

        Raises:
            DataError: A record is damaged.
            UnavailableError: No entry can be reached, or none can look rows up.
        """
        from trilith_proto import serving_pb2

        if not isinstance(records, Sequence):
            kind, records = records.kind.value, records.payloads()  # type: ignore[assignment]
        if kind not in ("example", "instance"):
            raise InvalidRequestError(f"records of kind {kind!r} cannot be scored; 'example' and 'instance' can")
        request = serving_pb2.PredictRequest(
            kind=serving_pb2.EXAMPLE if kind == "example" else serving_pb2.INSTANCE, records=records
        )
        reply = serving_pb2.PredictResponse.FromString(
            self._call(self._predicts, "Predict", request.SerializeToString(), timeout_s)
        )
        outputs = {}
        for each in reply.outputs:
            values = np.frombuffer(each.values, "<f4")
            outputs[each.name] = values if each.width == 1 else values.reshape(-1, each.width)
        return Prediction(outputs, reply.model_version, reply.model_step, reply.rows_as_of)

    def status(self, *, timeout_s: float | None = None) -> serving_pb2.ModelStatusResponse:
        """Which model is served, and how fresh it is."""
        from trilith_proto import serving_pb2

        request = serving_pb2.ModelStatusRequest().SerializeToString()
        return serving_pb2.ModelStatusResponse.FromString(self._call(self._statuses, "ModelStatus", request, timeout_s))

    def _call(self, methods: Sequence[Any], name: str, request: bytes, timeout_s: float | None) -> bytes:
        import grpc

        timeout = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        raised: TrilithError | None = None
        while True:
            for turn in range(len(methods)):
                at = (self._first + turn) % len(methods)
                try:
                    reply: bytes = methods[at](request, timeout=max(deadline - time.monotonic(), 0.001))
                except grpc.RpcError as error:
                    before, raised = raised, _error(f"entry {self._addresses[at]}: {name}", error, timeout)
                    if isinstance(raised, DeadlineExceededError) and before is not None:
                        raise before from None  # what the time was spent on says more
                except ValueError:
                    raise ClosedError("the connection to the entries was closed") from None
                else:
                    self._first = at
                    return reply
                if self._closed:
                    raise ClosedError("the connection to the entries was closed")
                if not isinstance(raised, UnavailableError | OverloadedError):
                    raise raised
            assert raised is not None
            if deadline - time.monotonic() <= _PAUSE_S:
                raise raised
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        for channel in self._channels:
            channel.close()


def remote_predict(
    address: str,
    records: Sequence[bytes] | Records,
    *,
    kind: Literal["example", "instance"] = "example",
    timeout_s: float = 5.0,
) -> Prediction:
    """Score serialized records at an entry; the connection is kept for the next call.

    Args:
        address: host:port of an entry, or several with commas between.
        records: Serialized Examples or Instances, or `trilith.data` records, which know their kind.
        kind: What they are.
        timeout_s: Seconds until DeadlineExceededError.
    """
    with _KEPT_LOCK:
        predictor = _KEPT.get(address)
        if predictor is None:
            predictor = _KEPT[address] = Predictor(address)
    return predictor.predict(records, kind=kind, timeout_s=timeout_s)


def _error(where: str, error: Any, timeout_s: float) -> TrilithError:
    """What the entry raised, or what happened on the way."""
    import grpc

    from trilith.remote import ERROR_KEY

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

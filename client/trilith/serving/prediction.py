"""Predictor: asks serving entries for scores; `remote_predict` for those who ask once in a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from trilith.config import MAX_MESSAGE_BYTES, prepare_grpc
from trilith.discovery.addresses import check_address
from trilith.errors import DeadlineExceededError, InvalidRequestError, TrilithError, UnavailableError
from trilith.rpc.kept import Kept
from trilith.runtime.forks import keep_for_ever, renew_in_children

if TYPE_CHECKING:
    from trilith.data.records import Records
    from trilith.discovery.serving import ServingDirectory
    from trilith.rpc.balancer import Balancer, Member
    from trilith.serving.entry import Entry
    from trilith.shard import Float32Array
    from trilith_proto import serving_pb2

__all__ = ["Prediction", "Predictor", "remote_predict"]


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
        """The first output: float32[n], or float32[n, width]."""
        return next(iter(self.outputs.values()))


class Predictor:
    """Connections to one or more entries of the same model. Thread-safe.

    A request goes to the entry with the fewest on their way. One that is away or overloaded is passed over; one that
    just does not answer gets a share of the time only, while there are others.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        name: str = "model",
        timeout_s: float = 5.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Connect.

        Args:
            addresses: The URL of a directory where entries are listed and followed, such as "zk://host:2181/serving";
                or "host:port,host:port", or a list of such.
            name: Serving model under which a directory lists them.
            timeout_s: Deadline of a request, those to further entries included.
            max_message_bytes: Largest message sent or accepted.

        Raises:
            UnavailableError: The directory cannot be reached.
        """
        prepare_grpc()
        self._timeout_s = timeout_s
        self._max_message_bytes = max_message_bytes
        self._url = ""
        self._name = name
        self._addresses: list[str] = []
        if isinstance(addresses, str) and "://" in addresses:
            from trilith.discovery.zk_url import redact

            self._url = addresses
            self._where = f"{redact(addresses)} lists no entry of serving model {name!r}; they are listed when ready"
        else:
            listed = addresses.split(",") if isinstance(addresses, str) else addresses
            given = [address.strip() for address in listed]
            if not any(given):
                raise InvalidRequestError("no address of an entry")
            self._where = "no entry is known"
            self._addresses = [check_address(address) for address in given]
        self._lock = threading.Lock()
        self._directory: ServingDirectory | None = None
        self._balancer: Balancer[Entry] | None = None
        self._connect()
        renew_in_children(self)

    def _connect(self) -> Balancer[Entry]:
        from trilith.serving.entry import balance_entries

        with self._lock:
            if self._balancer is not None:
                return self._balancer
            balancer = balance_entries(self._max_message_bytes)
            if self._url:
                from trilith.discovery.serving import ServingDirectory

                directory = ServingDirectory(self._url, self._name, timeout_s=self._timeout_s)
                try:
                    directory.entries().watch(lambda members: balancer.set_addresses(members.values()))
                except BaseException:
                    directory.close()
                    balancer.close()
                    raise
                self._directory = directory
            else:
                balancer.set_addresses(self._addresses)
            self._balancer = balancer
            return balancer

    def after_fork(self) -> None:
        """A child connects anew when it first asks."""
        keep_for_ever(self._directory, self._balancer)
        self._lock = threading.Lock()
        self._directory = self._balancer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def predict(
        self,
        records: Sequence[bytes] | Records,
        *,
        kind: Literal["example", "instance"] = "example",
        version: int = 0,
        signature: str = "",
        timeout_s: float | None = None,
    ) -> Prediction:
        """Score serialized records.

        Args:
            records: Serialized Examples or Instances, or `trilith.data` records, which know their kind.
            kind: What they are.
            version: Which export, of those that an entry has loaded (`trilith serving entry --version keep:N`); 0: the
                one in use.
            signature: Which of the model's, such as one with some of its outputs; empty: "serving_default".
            timeout_s: Seconds until DeadlineExceededError.

        Raises:
            InvalidRequestError: A record is damaged or holds what the model cannot take, the version is not loaded, or
                has no such signature.
            UnavailableError: No entry can be reached, or none can look rows up.
        """
        from trilith_proto import serving_pb2

        if not isinstance(records, Sequence):
            kind, records = records.kind.value, records.payloads()  # type: ignore[assignment]
        if kind not in ("example", "instance"):
            raise InvalidRequestError(f"records of kind {kind!r} cannot be scored; 'example' and 'instance' can")
        given: Sequence[object] = records
        odd = [type(record).__name__ for record in given if not isinstance(record, bytes)]
        if odd:
            raise InvalidRequestError(f"a record is a {odd[0]}; serialized messages are bytes")
        request = serving_pb2.PredictRequest(
            kind=serving_pb2.EXAMPLE if kind == "example" else serving_pb2.INSTANCE,
            records=records,
            model_version=version,
            signature=signature,
        )
        reply = serving_pb2.PredictResponse.FromString(
            self._call("Predict", lambda entry: entry.predict, request.SerializeToString(), timeout_s)
        )
        outputs = {}
        for output in reply.outputs:
            values = np.frombuffer(output.values, "<f4")
            outputs[output.name] = values if output.width == 1 else values.reshape(-1, output.width)
        return Prediction(outputs, reply.model_version, reply.model_step, reply.rows_as_of)

    def status(self, *, timeout_s: float | None = None) -> serving_pb2.ModelStatusResponse:
        """Which model is served, and how fresh it is."""
        from trilith_proto import serving_pb2

        answer = self._call("ModelStatus", lambda entry: entry.status, b"", timeout_s)
        return serving_pb2.ModelStatusResponse.FromString(answer)

    def _call(self, name: str, method: Callable[[Entry], Any], request: bytes, timeout_s: float | None) -> bytes:
        def nobody(failures: Mapping[Member[Entry], TrilithError]) -> TrilithError:
            if not failures:
                return UnavailableError(self._where)
            return max(failures.values(), key=lambda error: not isinstance(error, DeadlineExceededError))

        def ask(member: Member[Entry], attempt_s: float) -> bytes:
            return member.connection.ask(name, method(member.connection), request, attempt_s)

        balancer = self._balancer or self._connect()
        return balancer.call(ask, self._timeout_s if timeout_s is None else timeout_s, nobody)

    def close(self) -> None:
        """Close the connections."""
        if self._directory is not None:
            self._directory.close()
        if self._balancer is not None:
            self._balancer.close()


def remote_predict(
    address: str,
    records: Sequence[bytes] | Records,
    *,
    name: str = "model",
    kind: Literal["example", "instance"] = "example",
    version: int = 0,
    signature: str = "",
    timeout_s: float = 5.0,
) -> Prediction:
    """Score serialized records at an entry; the connection is kept for the next call, for a minute, with 15 others.

    Args:
        address: The URL of a directory that lists entries, such as "zk://host:2181/serving"; or host:port of an entry,
            or several with commas between.
        records: Serialized Examples or Instances, or `trilith.data` records, which know their kind.
        name: Serving model under which a directory lists its entries.
        kind: What the records are.
        version: See `Predictor.predict`.
        signature: The same.
        timeout_s: Seconds until DeadlineExceededError.
    """
    started = time.monotonic()
    with _KEPT.use((address, name), timeout_s) as predictor:
        left = max(timeout_s - (time.monotonic() - started), 0.001)
        return predictor.predict(records, kind=kind, version=version, signature=signature, timeout_s=left)


def _connected(key: tuple[str, str], timeout_s: float) -> Predictor:
    address, name = key
    return Predictor(address, name=name, timeout_s=timeout_s)


_KEPT: Kept[tuple[str, str], Predictor] = Kept(_connected, Predictor.close)

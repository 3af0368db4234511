"""What an entry answers over gRPC; the HTTP form stands on the same object."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from trilith.data.records import Kind, Records
from trilith.errors import InvalidRequestError
from trilith.nn.serving import ServedModel
from trilith.serving.exports import SERVING_DEFAULT
from trilith_proto import serving_pb2
from trilith_services.grpc.rpc import rpc
from trilith_services.grpc.serve import Method
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.models import Models
from trilith_services.serving.requests import PredictBody, records_of
from trilith_services.serving.unknown import UnknownFeatures, UnknownPolicy

__all__ = ["SERVICE", "PredictionServicer"]

SERVICE = serving_pb2.DESCRIPTOR.services_by_name["Prediction"].full_name

_KINDS = {serving_pb2.EXAMPLE: Kind.EXAMPLE, serving_pb2.INSTANCE: Kind.INSTANCE}
_LOOKUP_SHARE = 0.9  # of a request's time; the rest is for the model and the answer


class PredictionServicer:
    """The Prediction service."""

    def __init__(
        self,
        models: Models,
        metrics: EntryMetrics,
        *,
        timeout_s: float,
        max_records: int,
        unknown: UnknownPolicy = UnknownPolicy.json,
        missing_refused: bool = True,
    ) -> None:
        """Answer with `models`.

        Args:
            models: What is served.
            metrics: Is told of everything.
            timeout_s: Time for looking rows up, where the caller gives more or none.
            max_records: Most that a request may hold.
            unknown: Whose features that the model does not know are refused.
            missing_refused: Whether records of JSON must have all features that are looked at.
        """
        self._models = models
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._max_records = max_records
        self._unknown = UnknownFeatures(unknown, metrics.unknown)
        self._missing_refused = missing_refused
        self._incarnation = secrets.randbits(63) | 1

    @property
    def observer(self) -> EntryMetrics:
        """See `rpc.Servicer`."""
        return self._metrics

    @property
    def incarnation(self) -> int:
        """See `rpc.Servicer`."""
        return self._incarnation

    def admit(self, method: str) -> None:
        """Everything is answered at any time; what has no model yet says so itself."""

    def methods(self) -> dict[str, Method]:
        """For `Server`."""
        serialize = serving_pb2.PredictResponse.SerializeToString
        return {
            # Parsed here, so that what is no PredictRequest is told so.
            "Predict": Method(call=self.Predict, serialize=serialize),
            "PredictStream": Method(call=self.Predict, serialize=serialize, stream=True),
            "ModelStatus": Method(
                call=self.ModelStatus,
                parse=serving_pb2.ModelStatusRequest.FromString,
                serialize=serving_pb2.ModelStatusResponse.SerializeToString,
                control=True,
            ),
        }

    @rpc
    def Predict(self, request: bytes, context: grpc.ServicerContext) -> serving_pb2.PredictResponse:
        """Score records."""
        try:
            parsed = serving_pb2.PredictRequest.FromString(request)
        except DecodeError:
            raise InvalidRequestError(f"{len(request)} bytes are no PredictRequest") from None
        left: float | None = context.time_remaining()  # None: no deadline, whatever its type says
        return self.score(parsed, timeout_s=_LOOKUP_SHARE * left if left is not None else None)

    @rpc
    def ModelStatus(
        self, request: serving_pb2.ModelStatusRequest, context: grpc.ServicerContext
    ) -> serving_pb2.ModelStatusResponse:
        """Say what is served."""
        return self.status()

    def score(
        self, request: serving_pb2.PredictRequest, *, timeout_s: float | None = None
    ) -> serving_pb2.PredictResponse:
        """Score a request's records."""
        kind = _KINDS.get(request.kind)
        if kind is None:
            raise InvalidRequestError(f"records of kind {request.kind} are neither Examples nor Instances")
        payloads = list(request.records)
        if request.model_version < 0:
            raise InvalidRequestError(f"model_version={request.model_version} is none; 0 is the one in use")
        return self._score(
            len(payloads),
            lambda model: Records.of(payloads, kind, source="request"),
            version=request.model_version,
            signature=request.signature,
            timeout_s=timeout_s,
        )

    def answer(self, body: PredictBody, *, timeout_s: float | None = None) -> serving_pb2.PredictResponse:
        """Score a request that came as JSON."""
        return self._score(
            body.count,
            lambda model: records_of(body, model, self._unknown, missing_refused=self._missing_refused),
            version=body.version,
            signature=body.signature,
            timeout_s=timeout_s,
        )

    def _score(
        self,
        count: int,
        make: Callable[[ServedModel], Records],
        *,
        version: int,
        signature: str,
        timeout_s: float | None,
    ) -> serving_pb2.PredictResponse:
        if not 1 <= count <= self._max_records:
            raise InvalidRequestError(f"{count} records in a request; 1 to {self._max_records} are taken")
        timeout = self._timeout_s if timeout_s is None else max(min(self._timeout_s, timeout_s), 0.001)
        with self._models.use(version) as loaded:
            # Read before the rows are: these are at least as fresh.
            response = serving_pb2.PredictResponse(
                model_version=loaded.version,
                model_step=loaded.manifest.step,
                rows_as_of=self._models.as_of(loaded),
            )
            model = loaded.model
            outputs = model.predict(
                make(model),
                signature=signature,
                timeout_s=timeout,
                on_unknown=self._unknown.in_records(model.declared),
            )
        for name, values in outputs.items():
            flat = np.ascontiguousarray(values.reshape(count, -1), "<f4")
            response.outputs.add(name=name, width=flat.shape[1], values=flat.tobytes())
        self._metrics.scored(count)
        loaded.records += count  # two threads that meet here may lose a few
        return response

    def status(self) -> serving_pb2.ModelStatusResponse:
        """Say what is served."""
        models = self._models
        current = models.current
        status = serving_pb2.ModelStatusResponse(
            load_error=models.load_error,
            rows_as_of=models.as_of(current),
            incarnation=self._incarnation,
            policy=str(models.policy),
            pinned=models.published.pinned,
        )
        self._metrics.add_requests(status)
        status.versions.extend(
            serving_pb2.VersionStatus(
                version=each.version,
                in_use=each is current,
                step=each.manifest.step,
                checkpoint_time=each.manifest.checkpoint_unix_s,
                export_time=each.manifest.created_unix_s,
                loaded_time=each.loaded_unix_s,
                records=each.records,
            )
            for each in models.loaded
        )
        failed = models.failed.items()
        status.versions.extend(serving_pb2.VersionStatus(version=version, error=why) for version, why in failed)
        status.versions.sort(key=lambda each: each.version, reverse=True)
        if current is not None:
            manifest, config = current.manifest, current.model.config
            status.model, status.mode = config.name, manifest.mode
            status.model_version, status.model_step = manifest.version, manifest.step
            status.checkpoint_time, status.export_time = manifest.checkpoint_unix_s, manifest.created_unix_s
            status.loaded_time = current.loaded_unix_s
            status.features.extend(config.features)
            status.outputs.extend(config.outputs)
            for name in (SERVING_DEFAULT, *config.signatures):
                outputs = config.signature(name).outputs
                status.signatures.add(name=name, features=config.looked_at(name), outputs=outputs)
        if models.replicas is not None:
            status.replicas.extend(models.replicas.status())
        return status

    @property
    def unready(self) -> str:
        """Why requests cannot be answered; empty if they can."""
        return self._models.unready

    def observe(self, method: str, status: str, started: float) -> None:
        """Count a call that came another way than gRPC."""
        self._metrics.called(method, status, time.perf_counter() - started)

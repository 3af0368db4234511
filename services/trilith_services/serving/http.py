"""The entry over HTTP, for people: JSON in, JSON out, and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, Response
from google.protobuf.json_format import MessageToDict
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from trilith.errors import TrilithError
from trilith_proto import serving_pb2
from trilith_services.http.failures import FAILURES, answer_failures
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.servicer import PredictionServicer

__all__ = ["make_app"]


def make_app(servicer: PredictionServicer, metrics: EntryMetrics) -> FastAPI:
    """The routes."""
    # No pages that load scripts from elsewhere: the description is at /openapi.json.
    app = FastAPI(title="Trilith entry", docs_url=None, redoc_url=None, responses=FAILURES)
    answer_failures(app, "/openapi.json")

    @app.post("/v1/predict")
    async def predict(body: PredictBody) -> dict[str, Any]:
        """Score records."""
        return await run_in_threadpool(_predict, servicer, body)

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """Which model is served, and how fresh it is."""
        status = servicer.status()
        found = MessageToDict(status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for name in ("incarnation", "latency_bounds", "latency_buckets"):
            del found[name]  # /metrics has what requests took
        for name in ("model_version", "model_step", "requests", "failures", "records", "pinned"):
            found[name] = int(found[name])  # protobuf's JSON has 64-bit numbers as text
        for each in found["versions"]:
            each.update({name: int(each[name]) for name in ("version", "step", "records")})
        now = time.time()
        found["seconds_behind"] = {
            "rows": now - status.rows_as_of if status.rows_as_of else None,
            "model": now - status.checkpoint_time if status.checkpoint_time else None,
        }
        return dict(found)

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        """Readiness: 200 if requests can be answered, else 503 and why not."""
        why = servicer.unready
        return PlainTextResponse(f"{why or 'ok'}\n", status_code=503 if why else 200)

    @app.get("/livez")
    async def livez() -> PlainTextResponse:
        """Liveness: 200 as long as the process answers at all; to start it again helps only if this does not."""
        return PlainTextResponse("ok\n")

    @app.get("/metrics")
    async def scrape() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _predict(servicer: PredictionServicer, body: PredictBody) -> dict[str, Any]:
    started = time.perf_counter()
    status = "OK"
    try:
        response = servicer.answer(body)
    except TrilithError as error:
        status = error.status
        raise
    finally:
        servicer.observe("PredictHttp", status, started)
    return {
        "outputs": {output.name: _rows(output) for output in response.outputs},
        "model_version": response.model_version,
        "model_step": response.model_step,
        "rows_as_of": response.rows_as_of,
    }


def _rows(output: serving_pb2.PredictOutput) -> list[Any]:
    import numpy as np

    values = np.frombuffer(output.values, "<f4")
    values = np.where(np.isfinite(values), values, np.nan)
    found: list[Any] = (values if output.width == 1 else values.reshape(-1, output.width)).tolist()
    return [None if value != value else value for value in found] if output.width == 1 else found

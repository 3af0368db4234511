"""Errors over HTTP: the class of `trilith.errors` and its message as JSON, under the HTTP status that fits."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from trilith.errors import DataError, InternalError, InvalidRequestError, ReadOnlyError, TrilithError

__all__ = ["FAILURES", "Failure", "answer_failures", "describe_validation", "failure"]

log = logging.getLogger(__name__)

_BY_STATUS = {
    "INVALID_ARGUMENT": HTTPStatus.BAD_REQUEST,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "ALREADY_EXISTS": HTTPStatus.CONFLICT,
    "FAILED_PRECONDITION": HTTPStatus.CONFLICT,
    "ABORTED": HTTPStatus.CONFLICT,
    "RESOURCE_EXHAUSTED": HTTPStatus.TOO_MANY_REQUESTS,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}


class Failure(BaseModel):
    """Why a request was not answered."""

    model_config = ConfigDict(frozen=True)

    error: str = Field(description="Class of the error, as in `trilith.errors`.", examples=["UnknownTableError"])
    message: str


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request is wrong, or concerns what is not there."},
    "5XX": {"model": Failure, "description": "The cluster, or a PS of it, does not answer."},
}
"""What every route may answer besides its own."""


def _status(error: TrilithError) -> int:
    if isinstance(error, ReadOnlyError):
        return HTTPStatus.FORBIDDEN
    if isinstance(error, DataError):
        return HTTPStatus.BAD_REQUEST  # the records came with the request
    return _BY_STATUS.get(error.status, HTTPStatus.INTERNAL_SERVER_ERROR)


def answer_failures(app: FastAPI, described: str) -> None:
    """Make every failure of `app` JSON; the path `described` lists what the app has."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}; GET {described} lists what there is"
        return failure(error.status_code, InvalidRequestError.__name__, message, error.headers)

    app.add_exception_handler(TrilithError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, _on_other)


def failure(status: int, name: str, message: str, headers: Any = None) -> JSONResponse:
    """The answer that says why there is no other, under the name of an error's class."""
    return JSONResponse(Failure(error=name, message=message).model_dump(), int(status), headers)


def describe_validation(errors: Iterable[Any]) -> str:
    """What pydantic found wrong, in one line."""
    return "; ".join(": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"]))) for found in errors)


async def _on_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TrilithError)
    return failure(_status(error), type(error).__name__, str(error))


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = describe_validation(error.errors())
    given = request.headers.get("content-type", "")
    if error.body and "json" not in given:
        wrong += f"; the request's content type is {given!r}, expected 'application/json'"
    return failure(HTTPStatus.BAD_REQUEST, InvalidRequestError.__name__, wrong)


async def _on_other(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return failure(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        InternalError.__name__,
        f"{type(error).__name__}: {error}; the server's log has the traceback",
    )

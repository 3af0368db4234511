"""The debugging routes of the reference system: always HTTP 200; `msg` is a JSON string, or one line on what failed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from google.protobuf.text_format import MessageToString
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from trilith.entries import signed_id
from trilith.errors import InternalError, InvalidRequestError, TrilithError
from trilith_proto import hash_table_pb2
from trilith_services.console.reader import Reader
from trilith_services.http.failures import FAILURES

__all__ = ["DebuggingAnswer", "features", "routes", "variables"]

log = logging.getLogger(__name__)

_MOST_VALUES = 100_000
"""Of all variables that are asked for at once, which are numbers of some ten characters."""
_ENDS = 100
_MOST_IDS = 10_000


class DebuggingAnswer(BaseModel):
    """What both routes answer, under HTTP status 200."""

    status: str = Field(description='"success" or "fail".', examples=["success"])
    msg: str = Field(description="On success JSON, as a string; else the class of the error and its message.")


class _VariablesRequest(BaseModel):
    variable_names: list[str] = []


class _FeaturesRequest(BaseModel):
    feature_names: list[str] = []
    feature_ids: list[int | str] = Field(default=[], description="As many as names; numbers, or strings of them.")


def variables(reader: Reader, body: dict[str, Any]) -> dict[str, str]:
    """Text of the value by name; names that the cluster does not have are left out.

    Of a variable that is longer than its share of what an answer may hold, both ends are shown.
    """
    found = reader.values(list(dict.fromkeys(_texts(body, "variable_names"))))
    most = _MOST_VALUES // max(len(found), 1)
    return {
        name: np.array2string(value, threshold=max(most, 2 * _ENDS), edgeitems=_ENDS) for name, value in found.items()
    }


def features(reader: Reader, body: dict[str, Any]) -> dict[str, dict[str, str]]:
    """EntryDump as text by feature and decimal id; unknown features and ids without a row are left out."""
    names = _texts(body, "feature_names")
    ids = [_integer(each) for each in _list(body, "feature_ids")]
    if len(names) != len(ids):
        raise InvalidRequestError(
            f"{len(names)} feature_names but {len(ids)} feature_ids: it takes one name for each id"
        )
    if len(ids) > _MOST_IDS:
        raise InvalidRequestError(f"{len(ids)} feature_ids; {_MOST_IDS} are the most that one request may ask for")
    found: dict[str, dict[str, str]] = {}
    tables = reader.feature_tables() if names else {}
    for feature in dict.fromkeys(name for name in names if name in tables):
        asked = list(dict.fromkeys(each for name, each in zip(names, ids, strict=True) if name == feature))
        for each, entry in zip(asked, reader.entries(tables[feature], [each % 2**64 for each in asked]), strict=True):
            if entry:
                dump = hash_table_pb2.EntryDump.FromString(entry)
                dump.id = signed_id(each % 2**64)
                found.setdefault(feature, {})[str(each)] = MessageToString(dump)
    return found


def routes(reader: Callable[[], Reader]) -> APIRouter:
    """Both routes; `reader` raises while there is no cluster."""
    router = APIRouter(prefix="/debugging", tags=["debugging"], responses=FAILURES)

    def documented(body: type[BaseModel]) -> dict[str, Any]:
        """The body as OpenAPI has it; it is read as it comes, whatever its content type says."""
        schema = body.model_json_schema()
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @router.post("/variables", openapi_extra=documented(_VariablesRequest))
    async def debugging_variables(request: Request) -> DebuggingAnswer:
        """Values of dense variables, as text by name."""
        return await run_in_threadpool(_answer, variables, reader, await request.body())

    @router.post("/features", openapi_extra=documented(_FeaturesRequest))
    async def debugging_features(request: Request) -> DebuggingAnswer:
        """Rows of features' ids, as EntryDump text by feature and id."""
        return await run_in_threadpool(_answer, features, reader, await request.body())

    return router


def _answer(
    read: Callable[[Reader, dict[str, Any]], dict[str, Any]], reader: Callable[[], Reader], body: bytes
) -> DebuggingAnswer:
    try:
        return DebuggingAnswer(status="success", msg=json.dumps(read(reader(), _object(body))))
    except TrilithError as error:
        return _failed(error)
    except Exception as error:
        log.exception("%s failed", read.__name__)
        return _failed(InternalError(f"{type(error).__name__}: {error}; the console's log has the traceback"))


def _failed(error: TrilithError) -> DebuggingAnswer:
    return DebuggingAnswer(status="fail", msg=" ".join(f"{type(error).__name__}: {error}".split()))


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequestError(f"the body is a JSON {type(content).__name__}; it must be an object")
    return content


def _list(body: dict[str, Any], name: str) -> list[Any]:
    found = body.get(name, [])
    if not isinstance(found, list):
        raise InvalidRequestError(f"{name}={found!r} is no list")
    return found


def _texts(body: dict[str, Any], name: str) -> list[str]:
    found = _list(body, name)
    for each in found:
        if not isinstance(each, str):
            raise InvalidRequestError(f"{name} has {each!r}; it must be strings")
    return found


def _integer(text: Any) -> int:
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise InvalidRequestError(f"feature_ids has {text!r}; ids are integers, or strings of them")
    try:
        value = int(text)
    except ValueError:
        raise InvalidRequestError(f"feature_ids has {str(text)[:100]!r}, which is no integer") from None
    if not -(2**63) <= value < 2**64:
        raise InvalidRequestError(f"feature_ids has {text}, which does not fit in 64 bits")
    return value

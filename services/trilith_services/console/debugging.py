"""The debugging routes of the reference system: always HTTP 200; `msg` is a JSON string, or one line on what failed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from google.protobuf.text_format import MessageToString
from pydantic import BaseModel, BeforeValidator, Field, StrictStr, ValidationError, WithJsonSchema
from starlette.concurrency import run_in_threadpool

from trilith.entry_dumps import signed_id
from trilith.errors import InternalError, InvalidRequestError, TrilithError
from trilith_proto import hash_table_pb2
from trilith_services.console.reader import Reader
from trilith_services.http.failures import FAILURES, describe_validation

__all__ = ["DebuggingAnswer", "FeaturesRequest", "VariablesRequest", "features", "routes", "variables"]

log = logging.getLogger(__name__)

_MOST_VALUES = 100_000
"""Of all variables that are asked for at once, which are numbers of some ten characters."""
_ENDS = 100
_MOST_IDS = 10_000


class DebuggingAnswer(BaseModel):
    """What both routes answer, under HTTP status 200."""

    status: str = Field(description='"success" or "fail".', examples=["success"])
    msg: str = Field(description="On success JSON, as a string; else the class of the error and its message.")


def _integer(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError(f"{given} is no id; ids are integers, or strings of them")
    value = int(given)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{given} does not fit in 64 bits")
    return value


_Id = Annotated[int, BeforeValidator(_integer), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})]


class VariablesRequest(BaseModel):
    """Which variables to show."""

    variable_names: list[StrictStr] = []


class FeaturesRequest(BaseModel):
    """Which ids of which features to show."""

    feature_names: list[StrictStr] = []
    feature_ids: list[_Id] = Field(default=[], description="As many as names; numbers, or strings of them.")


_Request = TypeVar("_Request", bound=BaseModel)


def variables(reader: Reader, asked: VariablesRequest) -> dict[str, str]:
    """Text of the value by name; names that the cluster does not have are left out.

    Of a variable that is longer than its share of what an answer may hold, both ends are shown.
    """
    found = reader.values(list(dict.fromkeys(asked.variable_names)))
    most = _MOST_VALUES // max(len(found), 1)
    return {
        name: np.array2string(value, threshold=max(most, 2 * _ENDS), edgeitems=_ENDS) for name, value in found.items()
    }


def features(reader: Reader, asked: FeaturesRequest) -> dict[str, dict[str, str]]:
    """EntryDump as text by feature and decimal id; unknown features and ids without a row are left out."""
    names, ids = asked.feature_names, asked.feature_ids
    if len(names) != len(ids):
        raise InvalidRequestError(
            f"{len(names)} feature_names but {len(ids)} feature_ids: it takes one name for each id"
        )
    if len(ids) > _MOST_IDS:
        raise InvalidRequestError(f"{len(ids)} feature_ids; {_MOST_IDS} are the most that one request may ask for")
    found: dict[str, dict[str, str]] = {}
    tables = reader.feature_tables() if names else {}
    for feature in dict.fromkeys(name for name in names if name in tables):
        own = list(dict.fromkeys(value for name, value in zip(names, ids, strict=True) if name == feature))
        dumps = reader.row_dumps(tables[feature], [value % 2**64 for value in own])
        for value, serialized in zip(own, dumps, strict=True):
            if serialized:
                dump = hash_table_pb2.EntryDump.FromString(serialized)
                dump.id = signed_id(value % 2**64)
                found.setdefault(feature, {})[str(value)] = MessageToString(dump)
    return found


def routes(reader: Callable[[], Reader]) -> APIRouter:
    """Both routes; `reader` raises while there is no cluster."""
    router = APIRouter(prefix="/debugging", tags=["debugging"], responses=FAILURES)

    def documented(body: type[BaseModel]) -> dict[str, Any]:
        """The body as OpenAPI has it; it is read as it comes, whatever its content type says."""
        schema = body.model_json_schema()
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @router.post("/variables", openapi_extra=documented(VariablesRequest))
    async def debugging_variables(request: Request) -> DebuggingAnswer:
        """Values of dense variables, as text by name."""
        return await run_in_threadpool(_answer, VariablesRequest, variables, reader, await request.body())

    @router.post("/features", openapi_extra=documented(FeaturesRequest))
    async def debugging_features(request: Request) -> DebuggingAnswer:
        """Rows of features' ids, as EntryDump text by feature and id."""
        return await run_in_threadpool(_answer, FeaturesRequest, features, reader, await request.body())

    return router


def _answer(
    kind: type[_Request],
    read: Callable[[Reader, _Request], dict[str, Any]],
    reader: Callable[[], Reader],
    body: bytes,
) -> DebuggingAnswer:
    try:
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise InvalidRequestError(describe_validation(error.errors())) from None
        return DebuggingAnswer(status="success", msg=json.dumps(read(reader(), asked)))
    except TrilithError as error:
        return _failed(error)
    except Exception as error:
        log.exception("%s failed", read.__name__)
        return _failed(InternalError(f"{type(error).__name__}: {error}; the console's log has the traceback"))


def _failed(error: TrilithError) -> DebuggingAnswer:
    return DebuggingAnswer(status="fail", msg=" ".join(f"{type(error).__name__}: {error}".split()))

"""Requests in JSON: what a body of `POST /v1/predict`, and a line of a warm-up file, may hold; made into records."""

from __future__ import annotations

import base64
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trilith.data.records import Kind, Records
from trilith.errors import InvalidRequestError
from trilith.nn.serving import ServedModel
from trilith_services.serving.json_records import encode_records
from trilith_services.serving.unknown import UnknownFeatures

__all__ = ["PredictBody", "records_of"]


class PredictBody(BaseModel):
    """A request: records as objects, or serialized ones; one of the two."""

    model_config = ConfigDict(extra="forbid")

    records: list[dict[str, Any]] = Field(
        default=[],
        description="Per record its features, each a number or a list of them: ids are whole numbers from 0 to "
        "2^64 - 1, or their digits as text; a dense feature has as many numbers as the model takes. One that is left "
        "out is empty, or zeros.",
        examples=[[{"user": [281474976710657], "age": 31}]],
    )
    examples: list[str] = Field(default=[], description="Serialized Examples, base64.")
    instances: list[str] = Field(default=[], description="Serialized Instances, base64.")
    version: int = Field(default=0, ge=0, le=2**63 - 1, description="Which loaded version; 0: the one in use.")

    signature: str = Field(default="", description="Which of the model's; empty: serving_default, with all outputs.")

    @property
    def count(self) -> int:
        """How many records there are.

        Raises:
            InvalidRequestError: Not in exactly one of the forms.
        """
        given = [each for each in (self.records, self.examples, self.instances) if each]
        if len(given) != 1:
            raise InvalidRequestError("give one of records, examples and instances, and not an empty one")
        return len(given[0])


def records_of(body: PredictBody, model: ServedModel, unknown: UnknownFeatures) -> Records:
    """The records of a request.

    Args:
        body: The request.
        model: Whose features decide what a value is.
        unknown: What becomes of features that the model does not have.

    Raises:
        InvalidRequestError: A value is none that its feature can have.
    """
    if body.records:
        payloads = encode_records(body.records, model.declared, unknown.in_json(model.declared))
        return Records.of(payloads, Kind.EXAMPLE, source="request")
    name, texts = ("examples", body.examples) if body.examples else ("instances", body.instances)
    payloads = [_decoded(text, f"{name}[{number}]") for number, text in enumerate(texts)]
    return Records.of(payloads, Kind.EXAMPLE if body.examples else Kind.INSTANCE, source="request")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii's, or of letters that are not even ASCII
        raise InvalidRequestError(f"{where} is not base64: {error}") from None

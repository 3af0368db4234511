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
    """A request: records by their features' names, as rows or as columns, or serialized ones; in one of the forms."""

    model_config = ConfigDict(extra="forbid")

    records: list[dict[str, Any]] = Field(
        default=[],
        description="Per record its features, each a value or a list of them: ids are whole numbers from 0 to "
        "2^64 - 1, or their digits as text, or text where the model was trained on text; a dense feature has as many "
        "numbers as the model takes. No ids are an empty list or null; a feature that is left out is missing, unless "
        "the entry has --missing-features ignore.",
        examples=[[{"user": [281474976710657], "age": 31}]],
    )
    columns: dict[str, list[Any]] = Field(
        default={},
        description="The same, per feature what each record has.",
        examples=[{"user": [7, 8], "seen": [[1, 2, 3], []], "city": ["Berlin", "Rome"]}],
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
        forms = (self.records, self.columns, self.examples, self.instances)
        if sum(map(bool, forms)) != 1:
            raise InvalidRequestError("give one of records, columns, examples and instances, and not an empty one")
        if not self.columns:
            return max(map(len, forms))
        sizes = {name: len(values) for name, values in self.columns.items()}
        first, size = next(iter(sizes.items()))
        other = next((name for name in sizes if sizes[name] != size), None)
        if other is not None:
            raise InvalidRequestError(
                f"columns are of one length: {first!r} has {size} records, {other!r} {sizes[other]}"
            )
        return size


def records_of(body: PredictBody, model: ServedModel, unknown: UnknownFeatures, *, missing_refused: bool) -> Records:
    """The records of a request.

    Args:
        body: The request.
        model: Whose features decide what a value is.
        unknown: What becomes of features that the model does not have.
        missing_refused: Whether a record by names must have all features that the signature looks at.

    Raises:
        InvalidRequestError: A value is none that its feature can have, or a feature is missing.
    """
    if body.records or body.columns:
        rows = body.records or [{name: each[row] for name, each in body.columns.items()} for row in range(body.count)]
        needed = model.config.looked_at(body.signature) if missing_refused else ()
        payloads = encode_records(rows, model.declared, unknown.in_json(model.declared), needed)
        return Records.of(payloads, Kind.EXAMPLE, source="request")
    name, texts = ("examples", body.examples) if body.examples else ("instances", body.instances)
    payloads = [_decoded(text, f"{name}[{number}]") for number, text in enumerate(texts)]
    return Records.of(payloads, Kind.EXAMPLE if body.examples else Kind.INSTANCE, source="request")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii's, or of letters that are not even ASCII
        raise InvalidRequestError(f"{where} is not base64: {error}") from None

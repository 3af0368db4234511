"""Warm-up: sample requests that a version scores before it is announced, so that one that cannot is not."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from trilith.errors import CheckpointError, InvalidRequestError, TrilithError
from trilith.nn.serving import ServedModel
from trilith_services.serving.requests import PredictBody, records_of
from trilith_services.serving.unknown import UnknownFeatures, UnknownPolicy

__all__ = ["WarmUp", "read_warm_up"]

log = logging.getLogger(__name__)


def read_warm_up(content: bytes, where: str) -> list[PredictBody]:
    """The requests of a warm-up file: a line each, as POST /v1/predict takes it; empty lines are none.

    Raises:
        InvalidRequestError: A line is no request; the message has its number.
    """
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            body = PredictBody.model_validate_json(line)
            if not body.count or body.version:
                raise InvalidRequestError("it names a version, and is for whichever is loaded")
        except ValidationError as error:
            about = error.errors(include_url=False)[0]
            place = ".".join(map(str, about["loc"]))
            raise InvalidRequestError(f"{where}: line {number}: {place}{': ' * bool(place)}{about['msg']}") from None
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{where}: line {number}: {error}") from None
        found.append(body)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """What every version of an entry scores first.

    Attributes:
        requests: Beside those that an export carries.
        policy: What becomes of features that the model does not have, as in requests of clients.
        missing_refused: Whether a record must have all features, likewise.
    """

    requests: tuple[PredictBody, ...] = ()
    policy: UnknownPolicy = UnknownPolicy.json
    missing_refused: bool = False

    def run(self, model: ServedModel, own: Iterable[PredictBody], *, timeout_s: float) -> int:
        """Score the requests of an export and those of the entry; returns how many there were.

        Raises:
            CheckpointError: One of them fails, or a score is no finite number.
            TrilithError: Rows could not be looked up.
        """
        unknown = UnknownFeatures(self.policy, lambda form, count: None)
        asked = [(f"warm-up request {number}", body) for number, body in enumerate(own, 1)]
        asked += [(f"--warm-up request {number}", body) for number, body in enumerate(self.requests, 1)]
        for where, body in asked:
            try:
                records = records_of(body, model, unknown, missing_refused=self.missing_refused)
                told = unknown.in_records(model.declared)
                scores = model.predict(records, signature=body.signature, timeout_s=timeout_s, on_unknown=told)
            except InvalidRequestError as error:
                raise CheckpointError(f"{where}: {error}") from None
            except TrilithError as error:
                raise type(error)(f"{where}: {error}") from None
            for name, values in scores.items():
                wrong = ~np.isfinite(values.reshape(len(records), -1)).all(1)
                if wrong.any():
                    row = int(wrong.argmax())
                    raise CheckpointError(f"{where}: output {name!r} of record {row} is {values[row].tolist()}")
        return len(asked)

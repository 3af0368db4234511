"""What the entry answers over HTTP to requests that never reach a model."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from trilith_services.http.server import HttpServer
from trilith_services.serving.http import make_app


@pytest.fixture
def url():
    server = HttpServer(make_app(None, None), "127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{server.port}"
    server.stop()


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "why"),
    [
        ("/v1/predict", "{", "application/json", 400, "JSON decode error"),
        ("/v1/predict", '{"records": [], "what": 1}', "application/json", 400, "body.what: Extra inputs"),
        ("/v1/predict", '{"records": [{}]}', "text/plain", 400, "is 'text/plain', expected 'application/json'"),
        ("/v1/predict", None, "application/json", 405, "GET /openapi.json lists what there is"),
        ("/nothing", None, "application/json", 404, "GET /nothing: Not Found"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_one_form(url, path, body, kind, status, why):
    data = None if body is None else body.encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url + path, data, {"content-type": kind}), timeout=30)
    with caught.value as answer:
        assert answer.code == status
        told = json.loads(answer.read())
    assert told["error"] == "InvalidRequestError"
    assert why in told["message"]

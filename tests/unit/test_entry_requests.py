"""What requests of an entry may hold: values go by what the model declares; what does not fit is refused by name."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trilith.data.parse.quantized import quantize
from trilith.data.records import Kind, Records
from trilith.errors import InvalidRequestError
from trilith.nn.program import export_program, load_program
from trilith.nn.serving import ServedModel
from trilith.serving.exports import ModelConfig, ProgramInput, ServedFeature
from trilith.tables import Sgd, table_config
from trilith_proto import serving_pb2
from trilith_proto.example_pb2 import Example
from trilith_proto.proto_parser_pb2 import Instance
from trilith_services.http.server import HttpServer
from trilith_services.serving.http import make_app
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.servicer import PredictionServicer
from trilith_services.serving.unknown import UnknownPolicy

HALF = 2**53 + 1  # the first whole number that no double is


class Sum(nn.Module):
    """A record's sums of ids and numbers, each of which can be told from the score."""

    def forward(
        self, user: torch.Tensor, age: torch.Tensor, pair: torch.Tensor, loose: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([user, age, pair, loose], 1), user[:, 0]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    """Ids of "u", dense "age" of 1, "pair" of 2 and "loose" of 2 or what there is; an id's row is the id modulo 100."""
    config = ModelConfig(
        name="sum",
        features={"user": ServedFeature(table="t", combiner="sum", feature="u"), "idle": ServedFeature(table="t")},
        inputs=(
            ProgramInput(kind="feature", names=("user",)),
            ProgramInput(kind="dense", names=("age",), dim=1),
            ProgramInput(kind="dense", names=("pair",), dim=2),
            ProgramInput(kind="dense", names=("loose",), dim=2, pad=True),
        ),
        outputs=("all", "score"),
        tables=(table_config("t", dim=1, optimizer=Sgd(learning_rate=1.0)).proto,),
        num_ps=1,
    )
    assert ModelConfig.from_json(config.to_json(), "m") == config

    def lookup(ids: Any, timeout_s: float | None) -> dict[str, np.ndarray]:
        return {name: (each % np.uint64(100)).astype(np.float32)[:, None] for name, each in ids.items()}

    graph, weights = export_program(Sum(), config.shapes())
    return ServedModel(config, load_program(graph, weights, config.outputs, where="g"), lookup)


def servicer(
    model: ServedModel, unknown: UnknownPolicy = UnknownPolicy.json, *, missing_refused: bool = False
) -> tuple[PredictionServicer, EntryMetrics]:
    loaded = SimpleNamespace(model=model, manifest=SimpleNamespace(step=5), version=3, records=0)

    @contextmanager
    def use(version: int) -> Iterator[Any]:
        assert version == 0
        yield loaded

    metrics = EntryMetrics()
    models: Any = SimpleNamespace(use=use, as_of=lambda loaded: 0.0)
    return PredictionServicer(
        models, metrics, timeout_s=1.0, max_records=8, unknown=unknown, missing_refused=missing_refused
    ), metrics


@pytest.fixture
def predict(model: ServedModel) -> Iterator[Callable[[str], tuple[int, dict[str, Any]]]]:
    """Posts a body to an entry."""
    made, metrics = servicer(model)
    server = HttpServer(make_app(made, metrics), "127.0.0.1:0")
    server.start()

    def post(body: str) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/predict", body.encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    yield post
    server.stop()


@pytest.mark.parametrize(
    ("record", "score"),
    [
        ('{"u": [1, 2], "age": [1], "pair": [1, 2.5]}', [3, 1, 1, 2.5, 0, 0]),
        ('{"u": 49.0, "age": 1, "pair": [1.0, 2]}', [49, 1, 1, 2, 0, 0]),
        ('{"u": "17", "age": -0.5}', [17, -0.5, 0, 0, 0, 0]),
        (f'{{"u": [{HALF}, "{HALF}"]}}', [2 * (HALF % 100), 0, 0, 0, 0, 0]),
        ('{"u": [18446744073709551615]}', [15, 0, 0, 0, 0, 0]),
        ('{"u": [], "loose": [7]}', [0, 0, 0, 0, 7, 0]),
        ('{"loose": [7, 8, 9], "idle": [1]}', [0, 0, 0, 0, 7, 8]),
        ('{"age": 16777217}', [0, 16777216, 0, 0, 0, 0]),
        ('{"u": null, "loose": null}', [0, 0, 0, 0, 0, 0]),
        ("{}", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_value_in_json_is_what_the_model_declares(predict, record, score):
    status, answer = predict(f'{{"records": [{record}]}}')
    assert status == 200, answer
    assert answer["outputs"]["all"] == [score]


IDS = "ids are whole numbers from 0 to"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ('{"u": [1.5]}', f"feature 'u' has 1.5; {IDS}"),
        ('{"u": [NaN]}', f"feature 'u' has nan; {IDS}"),
        ('{"u": [-1]}', f"feature 'u' has -1; {IDS}"),
        ('{"u": [-1.0]}', f"feature 'u' has -1.0; {IDS}"),
        ('{"u": 18446744073709551616}', f"feature 'u' has 18446744073709551616; {IDS}"),
        ('{"u": "18446744073709551616"}', f"feature 'u' has '18446744073709551616'; {IDS}"),
        ('{"u": 9007199254740992.0}', "numbers from 2^53 on without a decimal point"),
        ('{"u": 1e18}', "numbers from 2^53 on without a decimal point"),
        ('{"u": [true]}', "feature 'u' has true"),
        ('{"u": [null]}', "feature 'u' has null"),
        ('{"u": [[1]]}', "feature 'u' has a list inside its list"),
        ('{"u": {"id": 1}}', "feature 'u' has an object"),
        ('{"u": ""}', "feature 'u' has ''"),
        ('{"u": "x7"}', "feature 'u' has 'x7'"),
        ('{"u": "-1"}', "feature 'u' has '-1'"),
        ('{"u": "٣"}', "feature 'u' has '٣'"),
        ('{"age": [1.0, 2.0]}', "feature 'age' has 2 numbers; the model takes 1"),
        ('{"age": []}', "feature 'age' has 0 numbers; the model takes 1"),
        ('{"pair": 1}', "feature 'pair' has 1 numbers; the model takes 2"),
        ('{"age": "1"}', "feature 'age' has '1'; the model takes numbers"),
        ('{"age": true}', "feature 'age' has true; the model takes numbers"),
        ('{"age": null}', "feature 'age' has null; the model takes numbers"),
        ('{"age": [[1]]}', "feature 'age' has a list inside its list; the model takes numbers"),
        ('{"age": NaN}', "feature 'age' has nan; the model takes finite numbers"),
        ('{"age": -Infinity}', "feature 'age' has -inf; the model takes finite numbers"),
        ('{"age": 1e39}', "feature 'age' has 1e+39, which is beyond float32"),
        ('{"age": -1e400}', "feature 'age' has -inf"),
        (f'{{"age": 1{"0" * 400}}}', "which is beyond float32"),
        (f'{{"u": 1{"0" * 400}}}', IDS),
        ('{"loose": [1, "2"]}', "feature 'loose' has '2'; the model takes numbers"),
        ('{"agee": [1]}', "the model has no feature 'agee' (is 'age' meant?); it has age, idle, loose, pair, u"),
        ('{"user": [1]}', "the model has no feature 'user'"),
        ('{"\\ud800": [1]}', "the model has no feature '\\ud800'"),
    ],
)
def test_a_value_in_json_that_does_not_fit_is_refused_by_name(predict, record, why):
    status, answer = predict(f'{{"records": [{{}}, {record}]}}')
    assert (status, answer["error"]) == (400, "InvalidRequestError")
    assert why in answer["message"]
    assert "record 1: " in answer["message"]


def answers(model: ServedModel, body: dict[str, Any]) -> list[Any]:
    """The output "all" for a request whose features must all be there."""
    response = servicer(model, missing_refused=True)[0].answer(PredictBody(**body))
    output = next(each for each in response.outputs if each.name == "all")
    return np.frombuffer(output.values, "<f4").reshape(-1, output.width).tolist()


ROWS = [
    {"u": [1, 2], "age": 3, "pair": [4, 5], "loose": [6]},
    {"u": [], "age": 0, "pair": [0, 0], "loose": None},
    {"u": 7, "age": [1], "pair": [2, 3], "loose": [4, 5, 6]},
]


def test_rows_and_columns_by_name_are_the_same_records(model):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    want = [[3, 3, 4, 5, 6, 0], [0, 0, 0, 0, 0, 0], [7, 1, 2, 3, 4, 5]]
    assert answers(model, {"records": ROWS}) == answers(model, {"columns": columns}) == want


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"columns": {"u": [1, 2], "age": [3]}}, "columns are of one length: 'u' has 2 records, 'age' 1"),
        ({"columns": {"u": [1]}, "records": [{}]}, "give one of records, columns, examples and instances"),
        ({"columns": {"u": []}}, "0 records in a request"),
        ({"records": [ROWS[0], {"u": 1, "age": 2}]}, "record 1: features 'pair', 'loose' are missing"),
        ({"columns": {name: [ROWS[0][name]] for name in ("u", "age", "pair")}}, "record 0: feature 'loose' is missing"),
        ({"records": [{**ROWS[0], "age": None}]}, "record 0: feature 'age' has null; the model takes numbers"),
        (
            {"records": [{**ROWS[0], "u": "x", "pair": [1]}, ROWS[1], {"agee": 1, **ROWS[2]}]},
            (
                "record 0: feature 'u' has 'x'; ids are whole numbers from 0 to 2^64 - 1, or their digits as text; "
                "record 0: feature 'pair' has 1 numbers; the model takes 2; "
                "record 2: the model has no feature 'agee' (is 'age' meant?); it has age, idle, loose, pair, u"
            ),
        ),
    ],
)
def test_what_is_missing_unknown_or_of_a_wrong_type_is_told_by_feature_and_record(model, body, why):
    with pytest.raises(InvalidRequestError) as caught:
        answers(model, body)
    assert str(caught.value).startswith(why)


def test_of_many_problems_the_first_ones_are_told(model):
    with pytest.raises(InvalidRequestError) as caught:
        servicer(model)[0].answer(PredictBody(records=[{"u": -1, "age": "x", "pair": 1, "what": 1}] * 8))
    assert str(caught.value).count("record ") == 10
    assert str(caught.value).endswith("; and more")


@pytest.mark.parametrize(
    "body",
    [
        '{"records": [{"u": 1' + "0" * 5000 + "}]}",
        '{"examples": ["//8="]}',
        '{"examples": ["x"]}',
        '{"instances": ["é"]}',
    ],
)
def test_what_is_no_record_is_the_callers_mistake(predict, body):
    status, answer = predict(body)
    assert (status, answer["error"]) == (400, "InvalidRequestError")


# ---- serialized records ----------------------------------------------------------------------------------------------


def example(**features: tuple[str, list[Any]]) -> bytes:
    made = Example()
    for name, (kind, values) in features.items():
        getattr(made.named_feature.add(name=name).feature, kind).value.extend(values)
    return made.SerializeToString()


def instance(**features: tuple[str, list[Any]]) -> bytes:
    made = Instance()
    for name, (kind, values) in features.items():
        getattr(made.feature.add(name=name), kind).extend(values)
    return made.SerializeToString()


def scores(model: ServedModel, payload: bytes, kind: Kind) -> list[list[float]]:
    return model.predict(Records.of([b"", payload], kind, source="request"))["all"].tolist()


@pytest.mark.parametrize(
    ("features", "score"),
    [
        ({"u": ("fid_v2_list", [1, 2]), "pair": ("float_list", [1, 2])}, [3, 0, 1, 2, 0, 0]),
        ({"age": ("double_list", [2.5]), "loose": ("float_list", [7])}, [0, 2.5, 0, 0, 7, 0]),
        ({"loose": ("float_list", [7, 8, 9])}, [0, 0, 0, 0, 7, 8]),
        ({"u": ("int64_list", [1, 2]), "age": ("int64_list", [3])}, [3, 3, 0, 0, 0, 0]),
    ],
)
def test_examples_that_fit_are_scored(model, features, score):
    assert scores(model, example(**features), Kind.EXAMPLE) == [[0] * 6, score]


def test_a_feature_of_an_example_that_holds_nothing_is_missing(model):
    made = Example()
    for name in ("u", "age", "pair"):
        made.named_feature.add(name=name).feature.SetInParent()
    assert scores(model, made.SerializeToString(), Kind.EXAMPLE) == [[0] * 6] * 2


@pytest.mark.parametrize(
    ("features", "why"),
    [
        ({"u": ("float_list", [49.0])}, "feature 'u' holds a float_list, which are no ids"),
        ({"u": ("float_list", [])}, "feature 'u' holds a float_list, which are no ids"),
        ({"u": ("bytes_list", [b"49"])}, "feature 'u' holds a bytes_list, which are no ids"),
        ({"idle": ("double_list", [1.0])}, "feature 'idle' holds a double_list, which are no ids"),
        ({"age": ("fid_v2_list", [1])}, "feature 'age' holds a fid_v2_list, which is no list of float values"),
        ({"loose": ("fid_v2_list", [1])}, "feature 'loose' holds a fid_v2_list, which is no list of float values"),
        ({"age": ("float_list", [1, 2])}, r"feature 'age' has 2 values where Dense\(1\) takes 1"),
        ({"pair": ("float_list", [1])}, r"feature 'pair' has 1 values where Dense\(2\) takes 2"),
        ({"age": ("float_list", [float("nan")])}, "feature 'age' has nan; the model takes finite numbers"),
        ({"pair": ("double_list", [1, 1e39])}, "feature 'pair': .* is beyond float32"),
        ({"loose": ("float_list", [float("-inf")])}, "feature 'loose' has -inf"),
    ],
)
def test_a_feature_of_an_example_that_does_not_fit_is_refused_by_name(model, features, why):
    with pytest.raises(InvalidRequestError, match=f"request: record 1, byte 0: {why}"):
        scores(model, example(**features), Kind.EXAMPLE)


@pytest.mark.parametrize(
    ("features", "score"),
    [
        ({"u": ("fid", [1, 2]), "pair": ("float_value", [1, 2])}, [3, 0, 1, 2, 0, 0]),
        ({"pair": ("bytes_value", [quantize(np.array([1, 2], np.float32))]), "u": ("fid", [])}, [0, 0, 1, 2, 0, 0]),
        ({"loose": ("float_value", [7])}, [0, 0, 0, 0, 7, 0]),
    ],
)
def test_instances_that_fit_are_scored(model, features, score):
    found = scores(model, instance(**features), Kind.INSTANCE)
    assert found == [[0] * 6, pytest.approx(score, rel=0.01)]  # quantized vectors are halves


@pytest.mark.parametrize(
    ("features", "why"),
    [
        ({"u": ("float_value", [49.0])}, "feature 'u' holds a float_value, which are no ids"),
        ({"u": ("int64_value", [49])}, "feature 'u' holds a int64_value, which are no ids"),
        ({"u": ("bytes_value", [b"49"])}, "feature 'u' holds a bytes_value, which are no ids"),
        ({"age": ("fid", [1])}, "feature 'age' holds a fid, which is no list of float values"),
        ({"age": ("int64_value", [1])}, "feature 'age' holds a int64_value"),
        ({"age": ("bytes_value", [b"1"])}, "feature 'age' holds a bytes_value"),
        ({"age": ("float_value", [1, 2])}, r"feature 'age' has 2 values where Dense\(1\) takes 1"),
        ({"pair": ("float_value", [1])}, r"feature 'pair' has 1 values where Dense\(2\) takes 2"),
        ({"age": ("float_value", [float("inf")])}, "feature 'age' has inf"),
    ],
)
def test_a_feature_of_an_instance_that_does_not_fit_is_refused_by_name(model, features, why):
    with pytest.raises(InvalidRequestError, match=f"request: record 1, byte 0: {why}"):
        scores(model, instance(**features), Kind.INSTANCE)


@pytest.mark.parametrize("kind", [Kind.EXAMPLE, Kind.INSTANCE])
def test_a_damaged_record_is_the_callers_mistake(model, kind):
    with pytest.raises(InvalidRequestError, match="record 1"):
        scores(model, b"\xff\xff", kind)


# ---- features that the model does not know ---------------------------------------------------------------------------


def counted(metrics: EntryMetrics, form: str) -> float:
    return metrics.registry.get_sample_value("trilith_serving_unknown_features_total", {"form": form}) or 0.0


@pytest.mark.parametrize(
    ("kind", "payload", "plain"),
    [
        (
            serving_pb2.EXAMPLE,
            example(u=("fid_v2_list", [1]), uu=("fid_v2_list", [1]), x=("float_list", [1])),
            example(u=("fid_v2_list", [1])),
        ),
        (
            serving_pb2.INSTANCE,
            instance(u=("fid", [1]), uu=("fid", [1]), x=("float_value", [1])),
            instance(u=("fid", [1])),
        ),
    ],
)
def test_unknown_features_of_serialized_records_are_counted_or_refused(model, kind, payload, plain):
    request = serving_pb2.PredictRequest(kind=kind, records=[plain, payload])
    for policy in (UnknownPolicy.json, UnknownPolicy.ignore):
        made, metrics = servicer(model, policy)
        assert np.frombuffer(made.score(request).outputs[1].values, "<f4").tolist() == [1, 1]
        assert counted(metrics, "records") == 2
    made, metrics = servicer(model, UnknownPolicy.refuse)
    with pytest.raises(InvalidRequestError, match=r"record 1, .*no feature 'uu' \(is 'u' meant\?\)"):
        made.score(request)
    twice = serving_pb2.PredictRequest(kind=kind, records=[plain + plain])  # one name twice is no unknown one
    made.score(twice)
    assert counted(metrics, "records") == 0


def test_unknown_features_of_json_are_refused_unless_they_are_to_be_ignored(model):
    records = [{"u": [1], "agee": [1], "x": "what"}]
    for policy in (UnknownPolicy.json, UnknownPolicy.refuse):
        with pytest.raises(InvalidRequestError, match="no feature 'agee'"):
            servicer(model, policy)[0].answer(PredictBody(records=records))
    made, metrics = servicer(model, UnknownPolicy.ignore)
    assert np.frombuffer(made.answer(PredictBody(records=records)).outputs[1].values, "<f4").tolist() == [1]
    assert counted(metrics, "json") == 2


def test_what_is_no_request_at_all_is_the_callers_mistake(model):
    made, metrics = servicer(model)

    class Context:
        def __init__(self) -> None:
            self.code: Any = None

        def is_active(self) -> bool:
            return True

        def time_remaining(self) -> None:
            return None

        def set_trailing_metadata(self, metadata: Any) -> None:
            pass

        def abort(self, code: Any, details: str) -> None:
            self.code = code

    for request in (b"\xff\xff", serving_pb2.PredictRequest(records=[b"\xff\xff"]).SerializeToString()):
        context: Any = Context()
        made.Predict(request, context)
        assert context.code.name == "INVALID_ARGUMENT"
    calls = {"method": "Predict", "status": "INVALID_ARGUMENT"}
    assert metrics.registry.get_sample_value("trilith_serving_calls_total", calls) == 2


def test_an_encoded_example_over_http_is_scored(predict):
    encoded = base64.b64encode(example(u=("fid_v2_list", [4]))).decode()
    status, answer = predict(json.dumps({"examples": [encoded]}))
    assert (status, answer["outputs"]["score"]) == (200, [4])

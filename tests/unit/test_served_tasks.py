"""What an export of a task takes: text, weights of ids, features that are ids and numbers; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from tests.tasks import Everything, batch, everything, examples, instances, rows
from trilith.data.records import Kind, Records
from trilith.errors import InvalidRequestError
from trilith.estimator import Dense, Estimator, Label, RunConfig, Task
from trilith.nn.program import export_program, load_program, only_inputs, unpack_weights, used_inputs, weights_of
from trilith.nn.serving import ServedModel
from trilith.ops.strings import hash_strings
from trilith.serving.exports import MODEL, ModelConfig, ProgramInput, ServedFeature
from trilith.tables import Sgd, table_config
from trilith_proto.example_pb2 import Example
from trilith_proto.proto_parser_pb2 import Instance
from trilith_services.serving.metrics import EntryMetrics
from trilith_services.serving.models import Models
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.servicer import PredictionServicer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A trained task's exports, and what it predicts for `batch(99)`."""
    place = tmp_path_factory.mktemp("everything")
    run = RunConfig(model_dir=str(place / "model"), progress="none", export_mode="standalone")
    with everything(run, batches=2) as job:
        job.train()
        (want,) = job.predict([batch(99)])
        job.export(str(place / "exports"))
    return place, want


@pytest.fixture(scope="module")
def models(exported) -> Iterator[Models]:
    found = Models(str(exported[0] / "exports"))
    assert found.refresh()
    yield found
    found.close()


def scores(models: Models, payloads: list[bytes], kind: Kind = Kind.EXAMPLE) -> dict[str, np.ndarray]:
    with models.use() as loaded:
        return loaded.model.predict(Records.of(payloads, kind, source="request"))


@pytest.mark.parametrize(("made", "kind"), [(examples, Kind.EXAMPLE), (instances, Kind.INSTANCE)])
def test_records_are_scored_as_the_trainer_does(exported, models, made, kind):
    found = scores(models, made(batch(99)), kind)
    assert found.keys() == exported[1].keys()
    for name, values in exported[1].items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6)


def example(**features: tuple[str, list[Any]]) -> bytes:
    made = Example()
    for name, (kind, values) in features.items():
        getattr(made.named_feature.add(name=name).feature, kind).value.extend(values)
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (
            example(tags=("fid_v2_list", [1, 2]), tag_weights=("float_list", [1.0])),
            "feature 'tags' has 2 ids, and 1 weights in 'tag_weights'",
        ),
        (example(tags=("fid_v2_list", [1])), "feature 'tags' has 1 ids, and 0 weights in 'tag_weights'"),
        (example(tag_weights=("float_list", [1.0])), "feature 'tags' has 0 ids, and 1 weights"),
        (
            example(tags=("fid_v2_list", [1]), tag_weights=("float_list", [float("nan")])),
            "feature 'tag_weights' has nan; weights are finite numbers",
        ),
        (example(user=("bytes_list", [b"7"])), "feature 'user' holds a bytes_list, which are no ids"),
        (example(city=("float_list", [7.0])), "feature 'city' holds a float_list, which are no ids"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(models, record, why):
    with pytest.raises(InvalidRequestError, match=f"request: record 1, byte 0: {why}"):
        scores(models, [example(), record])


def test_weights_may_be_integers_and_text_and_ids_may_not_meet_in_one_feature(models):
    whole = example(tags=("fid_v2_list", [1, 2]), tag_weights=("int64_list", [1, 3]))
    plain = example(tags=("fid_v2_list", [1, 2]), tag_weights=("float_list", [1.0, 3.0]))
    found = scores(models, [whole, plain])
    assert found["click"][0] == found["click"][1]
    mixed = Instance()
    mixed.feature.add(name="city", fid=[1], bytes_value=[b"Berlin"])
    with pytest.raises(InvalidRequestError, match="record 0.*: feature 'city' holds ids and text at once"):
        scores(models, [mixed.SerializeToString()], Kind.INSTANCE)


@pytest.fixture
def servicer(models) -> PredictionServicer:
    return PredictionServicer(models, EntryMetrics(), timeout_s=30.0, max_records=100, missing_refused=False)


def test_json_takes_text_and_numbers_of_one_feature_as_training_did(exported, servicer):
    given = rows(batch(99))
    click = servicer.answer(PredictBody(records=given)).outputs[0]
    np.testing.assert_allclose(np.frombuffer(click.values, "<f4"), exported[1]["click"], rtol=1e-6, atol=1e-6)
    hashed = [
        row | {"places": [int(hash_strings([text])[0]) if at == 0 else text for at, text in enumerate(row["places"])]}
        for row in given
    ]
    assert servicer.answer(PredictBody(records=hashed)).outputs[0].values == click.values


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"city": [True]}, "feature 'city' has true; ids are whole numbers from 0 to 2^64 - 1, or text"),
        ({"city": "\ud800"}, "feature 'city' has '\\ud800', which is no Unicode text"),
        ({"user": "Berlin"}, "feature 'user' has 'Berlin'; ids are whole numbers from 0 to 2^64 - 1, or their digits"),
        ({"born": 1980.5}, "feature 'born' has 1980.5; it is ids and numbers in this model: whole numbers from 0"),
        ({"born": [1980, 1990]}, "feature 'born' has 2 numbers; the model takes 1"),
        ({"tags": [1], "tag_weights": "x"}, "feature 'tag_weights' has 'x'; the model takes numbers"),
        ({"tags": [1], "tag_weights": [1, 2]}, "feature 'tags' has 1 ids, and 2 weights in 'tag_weights'"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_name(servicer, record, why):
    with pytest.raises(InvalidRequestError) as caught:
        servicer.answer(PredictBody(records=[{}, record]))
    assert "record 1" in str(caught.value)
    assert why in str(caught.value)


def test_which_features_are_text_is_remembered_by_a_checkpoint(exported, tmp_path):
    place, _ = exported
    run = RunConfig(model_dir=str(place / "model"), progress="none", export_mode="standalone")
    with Estimator(Everything(), run) as job:  # it sees no data
        newest = max((place / "model").glob("*/job.json")).parent
        path = Path(job.export(str(tmp_path), checkpoint=str(newest)))
    found = json.loads((path / MODEL).read_text())["features"]
    assert {name for name, each in found.items() if each.get("strings")} == {"city", "places"}


def test_a_task_without_ids_is_served(tmp_path):
    class Plain(Task):
        x = Dense(2)
        labels: ClassVar = {"y": Label()}

        def build(self) -> None:
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x.x)[:, 0] + torch.zeros(len(x.x))  # len() needs another way of tracing

    given = {"x": np.ones((4, 2), np.float32), "y": np.ones(4, np.float32)}
    run = RunConfig(model_dir=str(tmp_path / "model"), progress="none", export_mode="standalone")
    with Estimator(Plain(), run, train=lambda: [given]) as job:
        job.train()
        (want,) = job.predict([given])
        job.export(str(tmp_path / "exports"))
    models = Models(str(tmp_path / "exports"))
    assert models.refresh()
    found = scores(models, [example(x=("float_list", [1.0, 1.0]))] * 4)
    models.close()
    np.testing.assert_allclose(found["y"], want["y"], rtol=1e-6)


# ---- signatures ------------------------------------------------------------------------------------------------------


def test_a_signature_takes_what_it_looks_at_and_gives_what_it_names(exported, models):
    payloads = examples(batch(99))
    asked: list[dict[str, int]] = []
    with models.use() as loaded:
        model = loaded.model
        whole = model._lookup

        def lookup(ids, timeout_s):
            asked.append({table: each.size for table, each in ids.items()})
            return whole(ids, timeout_s)

        records = Records.of(payloads, Kind.EXAMPLE)
        seen = ServedModel(model.config, model._runs["serving_default"].program, lookup, others(model))
        clicks = seen.predict(records, signature="clicks")
        user = seen.predict(records, signature="user")
        parts = seen.predict(records, signature="parts")
        seen.predict(records, signature="serving_default")
    np.testing.assert_allclose(clicks["click"], exported[1]["click"], rtol=1e-6, atol=1e-6)
    assert list(clicks) == ["click"]
    assert user["user_tower"].shape == (len(payloads), 5)
    assert parts["seen"].tolist() == [min(len(each), 4) for each in batch(99)["seen"]]
    assert parts.keys() == {"bias", "seen"}
    assert [set(each) for each in asked[:3]] == [
        *({"user", "city", "item", "tags", "decade"}, {"user", "city"}, {"item"})
    ]
    assert "idle" in asked[3], "the first takes all features of the task"
    assert model.config.looked_at("parts") == ["item", "seen"]


def others(model: ServedModel) -> dict[str, Any]:
    return {name: each.program for name, each in model._runs.items() if name != "serving_default"}


def test_a_signature_that_there_is_none_of_is_told_with_those_that_there_are(models):
    with models.use() as loaded, pytest.raises(InvalidRequestError) as caught:
        loaded.model.predict(Records.of([b""], Kind.EXAMPLE), signature="items")
    assert str(caught.value) == (
        "model 'everything' has no signature 'items'; it has serving_default, clicks, parts, user"
    )


def test_weights_are_stored_once_and_a_model_config_reads_back(exported):
    (path,) = (exported[0] / "exports").iterdir()
    config = ModelConfig.from_json((path / MODEL).read_bytes(), "m")
    assert config.to_json() == (path / MODEL).read_bytes()
    assert {each.name for each in path.glob("program*")} == {
        *("program.json", "program.clicks.json", "program.user.json", "program.parts.json")
    }
    weights = unpack_weights((path / "weights.safetensors").read_bytes(), where="w")
    assert sum(name.endswith("tower.weight") for name in weights) == 1
    assert not any(
        "/" in name for name in weights_of("user", weights) if not name.startswith(("weights/", "constants/"))
    )


@pytest.mark.parametrize(
    ("signatures", "why"),
    [
        (
            {"user": "no_method"},
            "signature 'user': Everything has no method 'no_method'; names of predictions are a tuple",
        ),
        ({"some": ("click", "sale")}, r"signature 'some': outputs \['click', 'sale'\] are wanted; Everything predicts"),
        ({"none": ()}, r"signature 'none': outputs \[\] are wanted"),
        ({"a/b": ("click",)}, "signature 'a/b': a name is letters, digits"),
        ({"serving_default": ("click",)}, "signature 'serving_default': a name is"),
    ],
)
def test_signatures_that_make_no_sense_are_refused_when_a_task_is_exported(exported, tmp_path, signatures, why):
    class Odd(Everything):
        pass

    Odd.__name__, Odd.signatures = "Everything", signatures
    run = RunConfig(model_dir=str(exported[0] / "model"), progress="none", export_mode="standalone")
    with Estimator(Odd(), run) as job, pytest.raises(InvalidRequestError, match=why):
        job.export(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


class Changes(nn.Module):
    """Makes use of its inputs in ways that are not seen at once."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = a.clone()
        found[:, 0] = b[:, 0]
        _ = c.sum(1) * 2
        return found, found.new_zeros(d.shape[0])


def test_inputs_that_a_program_has_no_use_for_are_found():
    shapes = [(2,), (2,), (2,), (2,)]
    module = Changes().eval()
    graph, _ = export_program(module, shapes)
    kept = used_inputs(graph)
    assert kept == [0, 1]
    with only_inputs(module, shapes, kept):
        graph, weights = export_program(module, [(2,), (2,)])
    a, b, other = torch.rand(5, 2), torch.rand(5, 2), torch.rand(5, 2)
    found = load_program(graph, weights, ["changed", "zeros"], where="g")(a, b)
    changed, zeros = module(a, b, other, other)
    torch.testing.assert_close(found["changed"], changed)
    torch.testing.assert_close(found["zeros"], zeros)


TABLE = table_config("t", dim=1, optimizer=Sgd(learning_rate=1.0)).proto


def test_weights_that_make_no_sense_are_refused():
    with pytest.raises(InvalidRequestError, match=r"weights='w' of ids that are first\(2\)"):
        ServedFeature(table="t", combiner="first(2)", weights="w")
    with pytest.raises(InvalidRequestError, match="weights='w' of ids that are of slot 3"):
        ServedFeature(table="t", slot=3, weights="w")
    features = {"f": ServedFeature(table="t", weights="w"), "w": ServedFeature(table="t")}
    given = (ProgramInput(kind="feature", names=("f",)),)
    with pytest.raises(
        InvalidRequestError, match="weights of feature 'f' are 'w' in records, which the model takes as"
    ):
        ModelConfig(name="m", features=features, inputs=given, outputs=("s",), tables=(TABLE,), num_ps=1)


def test_a_module_that_asks_for_the_length_of_a_batch_is_traced_for_every_length():
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1) / len(x)

    graph, weights = export_program(Counts(), [(2,)])
    program = load_program(graph, weights, ["score"], where="g")
    for size in (1, 5):
        assert program(torch.ones(size, 2))["score"].tolist() == [pytest.approx(2 / size)] * size

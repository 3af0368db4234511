"""Exports: what they hold, that what they hold is checked, and that a loaded one scores as the model did."""

from __future__ import annotations

import json
import math
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trilith
from tests.served import Trained, train
from trilith.checkpoint import checkpoint_name, prune
from trilith.data.records import Kind, Records
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.nn import DenseOnPs
from trilith.nn.program import current_weights, export_program, load_program, pack_weights, unpack_weights
from trilith.nn.serving import ServedModel
from trilith.ops import jit
from trilith.serving import exports
from trilith.serving.exports import ModelConfig, ProgramInput, ServedFeature
from trilith.tables import Sgd, table_config
from trilith_proto.example_pb2 import Example
from trilith_services.exporting import Exporter
from trilith_services.serving.models import Models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with train("local://", tmp_path_factory.mktemp("model")) as trained:
        yield trained


@pytest.fixture(scope="module")
def exporter(trained: Trained):
    return trained.exporter()


@pytest.fixture(scope="module")
def standalone(trained: Trained, exporter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("standalone")
    exporter.export(trained.save(), str(base), mode="standalone")
    return base


def test_a_loaded_standalone_export_scores_as_the_model_did(trained, standalone):
    models = Models(str(standalone))
    assert models.refresh()
    with models.use() as loaded:
        scores = loaded.model.predict(trained.records)["click"]
    np.testing.assert_allclose(scores, trained.scores(), atol=1e-3)  # rows are compressed to float16
    models.close()


class Calls(nn.Module):
    """Has another thread call a function while it is traced."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self.thread = threading.Thread(target=function, daemon=True)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.5)
        return values * 2


def test_a_kernel_can_be_compiled_while_a_program_is_exported(monkeypatch, tmp_path):
    monkeypatch.setenv("TRILITH_CACHE", str(tmp_path))  # where no earlier run has left it

    @jit.kernel("float64(float64, float64)")
    def power_or_more(x: float, y: float) -> float:
        return max(math.pow(x, y), x, y)

    jit.KERNELS.pop()  # the conventions are for those of the packages
    found = []
    module = Calls(lambda: found.append(power_or_more(2.0, 3.0)))
    export_program(module, [(2,)])
    module.thread.join()
    assert found == [8.0]


def test_no_file_of_an_export_is_a_pickle_or_holds_one(standalone):
    files = [path for path in standalone.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"manifest.json", "program.json", "weights.safetensors", "model.json"}
    for path in files:
        assert not zipfile.is_zipfile(path)
        assert path.suffix in (".json", ".safetensors", ".arrow")
        if path.suffix == ".json":
            json.loads(path.read_text())
        assert "/" not in path.read_text() if path.name == "program.json" else True, "no path of this machine"


def test_a_distributed_export_has_an_entry_and_the_rows_of_each_shard(trained, exporter, tmp_path):
    done = exporter.export(trained.save(), str(tmp_path))
    assert exports.entry_base(str(tmp_path)) == str(tmp_path / "entry")
    manifest = exports.read_export(done.path)
    assert (manifest.mode, manifest.shard, manifest.version) == ("distributed", -1, done.version)
    shard = exports.read_export(f"{exports.ps_base(str(tmp_path), 0)}/{done.version}")
    assert (shard.shard, shard.version) == (0, done.version)
    with trilith.connect("local://") as client:
        client.restore(f"{exports.ps_base(str(tmp_path), 0)}/{done.version}/rows")
        assert sum(table.rows for each in client.stats() for table in each.tables) == done.rows > 0


def test_versions_grow_and_old_ones_go(trained, exporter, tmp_path):
    path = trained.save()
    made = [
        exporter.export(path, str(tmp_path), mode="standalone", keep=2, clock=lambda: 1000.0).version for _ in range(3)
    ]
    assert made == [1000, 1001, 1002]
    assert exports.list_versions(str(tmp_path)) == made[1:]


def test_an_export_without_a_manifest_does_not_count(standalone, tmp_path):
    (tmp_path / "7").mkdir()
    assert exports.list_versions(str(tmp_path)) == []
    with pytest.raises(CheckpointError, match="never finished"):
        exports.read_export(str(tmp_path / "7"))


def test_a_changed_file_is_refused_and_the_version_in_use_goes_on(trained, exporter, tmp_path):
    path = trained.save()
    first = exporter.export(path, str(tmp_path), mode="standalone")
    models = Models(str(tmp_path))
    models.refresh()
    second = exporter.export(path, str(tmp_path), mode="standalone")
    weights = Path(second.path) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert not models.refresh()
    assert "does not match its checksum" in models.load_error
    assert models.current is not None
    assert models.current.manifest.version == first.version
    third = exporter.export(path, str(tmp_path), mode="standalone")
    assert models.refresh()
    assert models.current.manifest.version == third.version
    assert models.load_error == ""
    models.close()


@pytest.fixture
def versions(trained, exporter, tmp_path) -> tuple[Path, list[int], Models, list[float]]:
    """Two versions of an export, the newer of which is loaded, and the time by which failures are judged."""
    path = trained.save()
    made = [exporter.export(path, str(tmp_path / "exports"), mode="standalone").version for _ in range(2)]
    now = [0.0]
    models = Models(str(tmp_path / "exports"), clock=lambda: now[0])
    assert models.refresh()
    return tmp_path / "exports", made, models, now


def served(models: Models) -> int:
    assert models.current is not None
    return models.current.manifest.version


def test_an_export_that_arrives_file_by_file_is_loaded_when_it_is_whole(versions, tmp_path):
    base, (_, second), models, _ = versions
    third = base / str(second + 1)
    files = sorted(path.relative_to(base / str(second)) for path in (base / str(second)).rglob("*") if path.is_file())
    assert files[0].name == "manifest.json"
    for name in files:
        (third / name).parent.mkdir(parents=True, exist_ok=True)
        (third / name).write_bytes((base / str(second) / name).read_bytes())
        models.refresh()
        if name != files[-1]:
            assert f"version {second + 1}: " in models.load_error
    models.refresh()  # nothing has changed since the last look
    assert (served(models), models.load_error) == (second + 1, "")
    models.close()


def test_an_error_that_passes_is_not_held_against_a_version(versions, monkeypatch):
    base, (_, second), models, now = versions
    shutil.copytree(base / str(second), base / str(second + 1))
    tried = []

    def fail(*args: object) -> None:
        tried.append(now[0])
        raise OSError("input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("trilith_services.serving.loading.load_model", fail)
        for now[0] in np.arange(0.0, 40.0, 0.5).tolist():
            assert not models.refresh()
    assert models.load_error == f"version {second + 1}: input/output error"
    assert tried == [0.0, 2.0, 6.0, 14.0, 30.0]
    now[0] = 62.0
    assert models.refresh()
    assert (served(models), models.load_error) == (second + 1, "")
    models.close()


def test_a_directory_that_cannot_be_listed_for_a_while_changes_nothing(versions, monkeypatch):
    _, (_, second), models, _ = versions
    with monkeypatch.context() as broken:
        broken.setattr(Folder, "names", lambda self: (_ for _ in ()).throw(OSError("stale file handle")))
        assert not models.refresh()
        assert "cannot be listed: OSError: stale file handle" in models.load_error
    assert not models.refresh()
    assert (served(models), models.load_error) == (second, "")
    models.close()


def test_the_version_before_takes_the_place_of_one_that_is_taken_away(versions, tmp_path):
    base, (first, second), models, _ = versions
    (base / str(second)).rename(tmp_path / "away")
    assert models.refresh()
    assert served(models) == first
    assert models.load_error == f"version {second} is gone from {base}; version {first} is served instead"
    assert not models.refresh()
    assert models.load_error
    (tmp_path / "away").rename(base / str(second))
    assert models.refresh()
    assert (served(models), models.load_error) == (second, "")
    shutil.rmtree(base)
    assert not models.refresh()
    assert served(models) == second
    assert models.load_error == f"version {second} is gone from {base}; it goes on as long as there is no other"
    models.close()


def test_an_old_version_copied_to_a_newer_number_is_served_once_under_that_number(versions):
    base, (first, second), models, _ = versions
    shutil.copytree(base / str(first), base / str(second + 7))
    assert models.refresh()
    assert served(models) == second + 7
    assert not models.refresh()
    models.close()


def test_a_version_that_failed_is_forgotten_when_it_is_gone_and_holds_up_no_other(versions):
    base, (_, second), models, _ = versions
    for number in (second + 1, second + 2):
        shutil.copytree(base / str(second), base / str(number))
    (base / str(second + 2) / "weights.safetensors").unlink()
    fresh = Models(str(base))  # such as that of an entry that starts now
    for each in (models, fresh):
        assert each.refresh()
        assert served(each) == second + 1
        assert f"version {second + 2}: " in each.load_error
    shutil.rmtree(base / str(second + 2))
    for each in (models, fresh):
        assert not each.refresh()
        assert each.load_error == ""
        each.close()


# ---- programs --------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Two inputs, two outputs, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.register_buffer("scale", torch.full((1,), 3.0))

    def forward(self, wide: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.layer(torch.cat([wide, dense], 1)) * self.scale + torch.tensor([1.0, 2.0])
        return found, torch.sigmoid(found[:, 0])


@pytest.fixture(scope="module")
def tower() -> tuple[Tower, bytes, dict[str, torch.Tensor]]:
    module = Tower()
    return (module, *export_program(module, [(2,), (3,)]))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_program_takes_any_batch_and_gives_what_the_module_gave(tower, size):
    module, graph, weights = tower
    program = load_program(graph, unpack_weights(pack_weights(weights), where="w"), ["pair", "score"], where="g")
    inputs = torch.randn(size, 2), torch.randn(size, 3)
    found = program(*inputs)
    for name, want in zip(("pair", "score"), module(*inputs), strict=True):
        torch.testing.assert_close(found[name], want)


def test_the_weights_of_a_later_step_go_with_the_first_graph(tower):
    _, graph, weights = tower
    later = Tower()
    program = load_program(graph, current_weights(later, weights), ["pair", "score"], where="g")
    inputs = torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(program(*inputs)["pair"], later(*inputs)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system"),
            "operator 'torch.os",
        ),
        (lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target="#x:y"), "operator '#x:y'"),
        (
            lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.from_file.default"),
            "from_file",
        ),
        (lambda graph: graph.update(guards_code=["__import__('os')"]), "code to be run"),
        (lambda graph: graph["graph_module"]["graph"].update(x={"expr_str": "__import__('os').getcwd()"}), "expr_str"),
        (lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(name="a;import os"), "name 'a;import os'"),
        (lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(metadata={"torch_fn": "x"}), "metadata"),
        (lambda graph: graph.pop("graph_module"), "no graph"),
    ],
)
def test_a_graph_that_could_do_more_than_arithmetic_is_refused(tower, change, message):
    _, graph, weights = tower
    content = json.loads(graph)
    change(content)
    with pytest.raises(CheckpointError, match=message):
        load_program(json.dumps(content).encode(), weights, ["a", "b"], where="g")


def test_damage_is_told(tower):
    _, graph, weights = tower
    with pytest.raises(CheckpointError, match="g: damaged"):
        load_program(graph[:-9], weights, ["a", "b"], where="g")
    with pytest.raises(CheckpointError, match="cannot load it"):
        load_program(graph, {}, ["a", "b"], where="g")
    with pytest.raises(CheckpointError, match="w: damaged"):
        unpack_weights(b"no safetensors", where="w")


# ---- models of other shapes ------------------------------------------------------------------------------------------


def test_features_of_several_tables_combiners_and_dense_inputs_reach_the_program():
    class Sum(nn.Module):
        def forward(self, user: torch.Tensor, items: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            return user.sum(1) + 10 * items.sum((1, 2)) + 100 * dense.sum(1)

    tables = tuple(
        table_config(name, dim=dim, optimizer=Sgd(learning_rate=1.0)).proto for name, dim in (("u", 1), ("i", 2))
    )
    config = ModelConfig(
        name="sum",
        features={
            "user": ServedFeature(table="u", combiner="sum", slot=3),
            "item": ServedFeature(table="i", combiner="first", n=2),
        },
        inputs=(
            ProgramInput(kind="feature", names=("user",)),
            ProgramInput(kind="feature", names=("item",)),
            ProgramInput(kind="dense", names=("price",), dim=2),
        ),
        outputs=("score",),
        tables=tables,
        num_ps=1,
    )
    assert ModelConfig.from_json(config.to_json(), "m") == config
    graph, weights = export_program(Sum(), config.shapes())
    seen: list[float | None] = []

    def lookup(ids, timeout_s):
        seen.append(timeout_s)
        return {name: np.repeat(each.astype(np.float32)[:, None], config.dim_of(name), 1) for name, each in ids.items()}

    model = ServedModel(config, load_program(graph, weights, ["score"], where="g"), lookup)
    example = Example()
    example.named_feature.add(name="user").feature.fid_v2_list.value.extend([1, 2])
    example.named_feature.add(name="item").feature.fid_v2_list.value.extend([3, 4, 5])
    example.named_feature.add(name="price").feature.float_list.value.extend([0.5, 0.25])
    records = Records.of([example.SerializeToString(), Example().SerializeToString()], Kind.EXAMPLE)
    scores = model.predict(records, timeout_s=0.5)["score"]
    assert scores.tolist() == [3 + 10 * (2 * 3 + 2 * 4) + 75, 0]
    assert seen == [0.5]
    with pytest.raises(InvalidRequestError, match="cannot be scored"):
        model.predict(Records.of([b"x"], Kind.PLAINTEXT))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ServedFeature(table="t", combiner="median"), "combiner 'median'"),
        (lambda: ServedFeature(table="t", combiner="first"), "n=0"),
        (lambda: ProgramInput(kind="dense", names=("x",)), "dim=0"),
        (lambda: ProgramInput(kind="stacked", names=()), "stacked"),
        (
            lambda: ModelConfig(
                name="m", features={"f": ServedFeature(table="t")}, inputs=(), outputs=("s",), tables=(), num_ps=1
            ),
            "of table 't'",
        ),
        (
            lambda: ModelConfig(
                name="m",
                features={"f": ServedFeature(table="t"), "g": ServedFeature(table="t", combiner="first", n=2)},
                inputs=(ProgramInput(kind="stacked", names=("f", "g")),),
                outputs=("s",),
                tables=(table_config("t", dim=2, optimizer=Sgd(learning_rate=1.0)).proto,),
                num_ps=1,
            ),
            "cannot be stacked",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


# ---- modules that cannot be exported, or not as they were trained ----------------------------------------------------


class Joined(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat(inputs, 1))[:, 0]


class FirstAndOthers(nn.Module):
    def forward(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return first.sum(1) + 10 * others[0].sum(1)


@pytest.mark.parametrize("module", [Joined(), FirstAndOthers()])
def test_a_module_may_take_its_inputs_as_a_tuple(module):
    graph, weights = export_program(module, [(2,), (3,)])
    program = load_program(graph, weights, ["score"], where="g")
    for size in (1, 7):
        inputs = torch.randn(size, 2), torch.randn(size, 3)
        torch.testing.assert_close(program(*inputs)["score"], module(*inputs).detach())


def module_of(forward: Callable[..., object]) -> nn.Module:
    return type("Odd", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (module_of(lambda self: torch.ones(3)), "does not take 1 tensors, one for each input in order"),
        (module_of(lambda self, x, y: x + y), "does not take 1 tensors, one for each input in order: missing"),
        (module_of(lambda self, *, x: x), "does not take 1 tensors"),
        (module_of(lambda self, x: x @ torch.ones(9, 1)), r"does not take its inputs, float32\[b, 2\]: RuntimeError: "),
        (module_of(lambda self, x: {"score": x}), "for 3 records it gives a dict; it must give one tensor, or a tuple"),
        (module_of(lambda self, x: (x, None)), "gives a NoneType"),
        (module_of(lambda self, x: x.sum()), r"gives a tensor \[\]; it must"),
        (module_of(lambda self, x: x if x.sum() > 0 else -x), "torch.export cannot follow its forward"),
    ],
)
def test_why_a_module_cannot_be_exported_is_one_line(module, why):
    with pytest.raises(InvalidRequestError, match=f"^Odd cannot be exported: .*{why}") as caught:
        export_program(module, [(2,)])
    assert "\n" not in str(caught.value)


ONE_INPUT = {
    "features": {"user": ServedFeature(table="t")},
    "inputs": [ProgramInput(kind="feature", names=("user",))],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    """Of a linear layer whose bias was frozen, and the module."""
    path = str(tmp_path_factory.mktemp("frozen") / "checkpoint")
    module = nn.Linear(4, 1)
    module.bias.requires_grad_(False)
    with trilith.connect("local://") as client:
        client.table("t", dim=4, optimizer=Sgd(learning_rate=0.1))
        DenseOnPs(client, module, Sgd(learning_rate=0.1))
        client.save(path)
    return path, module


def test_a_checkpoint_without_a_table_of_the_model_is_refused(checkpoint, tmp_path):
    features = {"user": ServedFeature(table="u")}
    exporter = Exporter("m", checkpoint[1], **ONE_INPUT | {"features": features})
    with pytest.raises(CheckpointError, match=r"has tables \['t'\]; the model needs \['u'\]"):
        exporter.export(checkpoint[0], str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_parameter_is_not_demanded_of_the_checkpoint(checkpoint, tmp_path, caplog):
    path, module = checkpoint
    fresh = nn.Linear(4, 1)
    with torch.no_grad():
        fresh.bias.fill_(7.0)
    with pytest.raises(CheckpointError, match="'dense/bias' is missing"):
        Exporter("m", fresh, **ONE_INPUT).export(path, str(tmp_path), mode="standalone")
    fresh.bias.requires_grad_(False)
    Exporter("m", fresh, **ONE_INPUT).export(path, str(tmp_path), mode="standalone")
    (told,) = [each for each in caplog.records if "frozen parameters are in no checkpoint" in each.message]
    assert told.parameters == ["bias"]
    models = Models(str(tmp_path))
    assert models.refresh()
    with models.use() as loaded:
        assert loaded.model.predict(Records.of([b""], Kind.EXAMPLE))["score"].tolist() == [[7.0]]
    models.close()
    torch.testing.assert_close(fresh.weight, module.weight)


def test_what_training_changes_and_no_checkpoint_has_is_refused():
    with pytest.raises(InvalidRequestError, match=r"buffers \['1.running_mean', '1.running_var'\]: checkpoints do not"):
        Exporter("m", nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), **ONE_INPUT)
    constant = nn.Linear(4, 1)
    constant.register_buffer("scale", torch.ones(1), persistent=False)
    Exporter("m", constant, **ONE_INPUT)
    outer = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    with pytest.raises(InvalidRequestError, match=r"parameters \['0.weight', '0.bias'\] beside those of dense, Linear"):
        Exporter("m", outer, dense=outer[1], **ONE_INPUT)
    outer[0].requires_grad_(False)
    Exporter("m", outer, dense=outer[1], **ONE_INPUT)


def test_outputs_are_counted_when_a_model_is_exported(checkpoint, tmp_path):
    module = nn.Linear(4, 1)
    module.bias.requires_grad_(False)
    exporter = Exporter("m", module, outputs=("click", "buy"), **ONE_INPUT)
    with pytest.raises(InvalidRequestError, match=r"gives 1 tensors; its outputs are \['click', 'buy'\]"):
        exporter.export(checkpoint[0], str(tmp_path), mode="standalone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: ProgramInput(kind="feature", names=("u",), dim=16),
            "takes no dim .*: its size is that of its table's",
        ),
        (lambda: ProgramInput(kind="stacked", names=("u", "v"), dim=16), "takes no dim"),
        (lambda: ProgramInput(kind="feature", names=("u", "v")), "takes one name, not"),
        (lambda: ProgramInput(kind="feature", names="user"), "takes a tuple of feature names"),
        (lambda: ProgramInput(kind="feature", names=("u",), pad=True), "takes no pad"),
        (lambda: ProgramInput(kind="dense", names=("x",), dim=-1), "at least 1"),
    ],
)
def test_why_an_input_makes_no_sense_is_said(make, why):
    with pytest.raises(InvalidRequestError, match=why):
        make()


def test_a_checkpoint_is_not_pruned_while_it_is_exported(checkpoint, tmp_path, monkeypatch) -> None:
    from trilith_services import exporting

    path, module = checkpoint
    directory = tmp_path / "model"
    places = [directory / checkpoint_name(number) for number in (1, 2)]
    for place in places:
        shutil.copytree(path, place)
    read, pruned = exporting.dense_values, []

    def slow(path: str):
        pruned.extend(prune(str(directory), keep=1))
        return read(path)

    monkeypatch.setattr(exporting, "dense_values", slow)
    Exporter("m", module, **ONE_INPUT).export(str(places[0]), str(tmp_path / "out"))
    assert pruned == []
    assert prune(str(directory), keep=1) == [str(places[0])]

"""Dense variables, the step counter and checkpoints through the public client, on every shape of cluster."""

from __future__ import annotations

import numpy as np
import pytest

import trilith.routing
from tests.congruence.clusters import LocalCluster
from trilith.errors import CheckpointError, InvalidRequestError, NonFiniteError, TableExistsError
from trilith.shard import VariablePiece
from trilith.tables import Adagrad, Adam, RandomUniform, Sgd
from trilith_proto import hash_table_pb2


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_variables_come_back_in_their_shapes(client, name):
    values = {f"{name}_w": floats(3, 5), f"{name}_b": floats(5), f"{name}_s": np.float32(2.5)}
    assert client.create_variables(values, optimizer=Sgd(learning_rate=0.1)) == dict.fromkeys(values, True)
    pulled, _ = client.pull_variables(list(values))
    assert list(pulled) == list(values)
    for key, value in values.items():
        np.testing.assert_array_equal(pulled[key], value)
        assert pulled[key].shape == np.shape(value)
        assert pulled[key].flags.writeable


def test_other_clients_know_the_shapes_also_after_a_restore(tmp_path):
    shapes = {"w": (3, 5), "s": (), "large": (3, 400_000)}
    values = {name: np.full(shape, 2.5, np.float32) for name, shape in shapes.items()}
    with LocalCluster("3-ps") as cluster:
        with cluster.connect() as client:
            client.create_variables(values, optimizer=Sgd(learning_rate=0.1))
            client.save(str(tmp_path / "ckpt"))
        with cluster.connect() as other:
            assert other.variables() == shapes
            for name, value in other.pull_variables()[0].items():
                np.testing.assert_array_equal(value, values[name])
            flat = {name: np.zeros(np.size(value), np.float32) for name, value in values.items()}
            assert not any(other.create_variables(flat, optimizer=Sgd(learning_rate=0.1)).values())
    with LocalCluster("1-ps") as cluster, cluster.connect() as client:
        client.restore(str(tmp_path / "ckpt"))
        with cluster.connect() as other:
            assert other.variables() == shapes


def test_creating_again_keeps_the_values(client, name):
    client.create_variables({name: floats(4)}, optimizer=Sgd())
    assert client.create_variables({name: floats(4, seed=1)}, optimizer=Sgd()) == {name: False}
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], floats(4))


def test_another_size_or_optimizer_is_refused(client, name):
    client.create_variables({name: floats(4)}, optimizer=Sgd())
    with pytest.raises(TableExistsError, match=name):
        client.create_variables({name: floats(5)}, optimizer=Sgd())
    with pytest.raises(TableExistsError, match=name):
        client.create_variables({name: floats(4)}, optimizer=Adagrad())


@pytest.mark.parametrize("optimizer", [Sgd(learning_rate=0.5), Adagrad(learning_rate=0.5), Adam(learning_rate=0.5)])
def test_a_variable_steps_as_a_row_of_its_width_would(client, name, optimizer):
    client.create_variables({name: np.zeros((2, 3), np.float32)}, optimizer=optimizer)
    table = client.table(f"{name}_t", dim=6, optimizer=optimizer, initializer=RandomUniform(0, 0))
    for step in range(3):
        grad = floats(2, 3, seed=step)
        client.apply_dense_gradients({name: grad})
        table.apply_gradients([1], grad.reshape(1, 6))
    np.testing.assert_allclose(client.pull_variables([name])[0][name].reshape(-1), table.lookup([1])[0], rtol=1e-6)


def test_one_rate_may_be_given_for_all(client, name):
    client.create_variables({name: np.zeros(3, np.float32)}, optimizer=Sgd(learning_rate=0.5))
    client.apply_dense_gradients({name: np.ones(3, np.float32)}, learning_rate=2.0)
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], [-2, -2, -2])


def test_an_optimizer_may_be_a_message(client, name):
    config = hash_table_pb2.OptimizerConfig(sgd=hash_table_pb2.SgdOptimizerConfig(learning_rate=1.0))
    client.create_variables({name: np.zeros(3, np.float32)}, optimizer=config)
    client.apply_dense_gradients({name: np.ones(3)})
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], [-1, -1, -1])


def test_variables_may_be_set(client, name):
    client.create_variables({name: floats(2, 2)}, optimizer=Sgd())
    client.assign_variables({name: floats(2, 2, seed=1)})
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], floats(2, 2, seed=1))


def test_a_large_variable_is_spread_over_the_ps(client, name, monkeypatch):
    monkeypatch.setattr(trilith.routing, "MAX_PARTITION_FLOATS", 8)
    values = {f"{name}_a": floats(5, 7), f"{name}_b": floats(3, 3)}
    client.create_variables(values, optimizer=Sgd(learning_rate=1.0))
    held = [{spec.name for spec in answer.variables} for answer in client.describe()]
    assert all(f"{name}_a" in names for names in held)
    grads = {key: floats(*value.shape, seed=2) for key, value in values.items()}
    client.apply_dense_gradients(grads)
    pulled, _ = client.pull_variables(list(values))
    for key, value in values.items():
        np.testing.assert_array_equal(pulled[key], value - grads[key])


def test_wrong_values_are_refused_and_nothing_changes(client, name):
    client.create_variables({name: floats(2, 3)}, optimizer=Sgd())
    with pytest.raises(InvalidRequestError, match=r"shape \(3, 2\), the variable has \(2, 3\)"):
        client.apply_dense_gradients({name: floats(3, 2)})
    with pytest.raises(InvalidRequestError, match="floating-point"):
        client.assign_variables({name: np.ones((2, 3), np.int32)})
    bad = floats(2, 3)
    bad[1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"\[1, 1\] is nan"):
        client.apply_dense_gradients({name: bad})
    with pytest.raises(NonFiniteError):
        client.create_variables({f"{name}_x": np.array([np.inf])}, optimizer=Sgd())
    with pytest.raises(InvalidRequestError, match="learning_rate"):
        client.apply_dense_gradients({name: floats(2, 3)}, learning_rate=-1.0)
    np.testing.assert_array_equal(client.pull_variables([name])[0][name], floats(2, 3))


def test_no_variables_are_no_variables(client):
    assert client.create_variables({}, optimizer=Sgd()) == {}
    assert client.pull_variables([])[0] == {}
    client.apply_dense_gradients({})
    client.assign_variables({})


def test_another_client_finds_variables_and_their_values(local, shape, name):
    cluster = local(shape)
    with cluster.connect() as one, cluster.connect() as other:
        one.create_variables({"w": floats(2, 3), "b": floats(3)}, optimizer=Sgd(learning_rate=1.0))
        one.global_step(set_to=12)
        values, step = other.pull_variables()
        assert step == 12
        np.testing.assert_array_equal(values["w"], floats(2, 3))
        other.apply_dense_gradients({"b": floats(3)})
        np.testing.assert_array_equal(one.pull_variables(["b"])[0]["b"], np.zeros(3))


def test_the_step_is_read_set_and_advanced(local, shape):
    with local(shape).connect() as client:
        assert client.global_step() == 0
        assert client.global_step(advance=3) == 3
        assert client.global_step(advance=0) == 3
        assert client.global_step(set_to=100) == 100
        assert client.global_step(advance=1) == 101
        assert client.global_step() == 101
        for wrong in ({"advance": -1}, {"set_to": -5}, {"advance": 1, "set_to": 2}):
            with pytest.raises(InvalidRequestError):
                client.global_step(**wrong)


@pytest.mark.parametrize("target", ["embedded", "1-ps", "3-ps"])
def test_a_checkpoint_is_restored_into_any_shape_of_cluster(local, shape, target, tmp_path):
    options = {"dim": 4, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1, 1)}
    ids = np.arange(200, dtype=np.uint64) * np.uint64(2**57 + 3)
    with local(shape).connect() as client:
        table = client.table("user", **options)
        table.apply_gradients(ids, floats(200, 4), request_time=99)
        client.create_variables({"w": floats(3, 4)}, optimizer=Adagrad(learning_rate=0.1))
        client.apply_dense_gradients({"w": floats(3, 4, seed=1)})
        client.global_step(set_to=77)
        assert client.save(str(tmp_path / "one")) == 77
        table.apply_gradients(ids, floats(200, 4, seed=2))
        client.apply_dense_gradients({"w": floats(3, 4, seed=2)})
        want = table.lookup(ids), client.pull_variables(["w"])[0]["w"]
    with local(target).connect() as client:
        assert client.restore(str(tmp_path / "one")) == 77
        assert client.global_step() == 77
        table = client.table("user", **options)
        table.apply_gradients(ids, floats(200, 4, seed=2))
        client.create_variables({"w": floats(3, 4)}, optimizer=Adagrad(learning_rate=0.1))
        client.apply_dense_gradients({"w": floats(3, 4, seed=2)})
        np.testing.assert_array_equal(table.lookup(ids), want[0])
        np.testing.assert_array_equal(client.pull_variables(["w"])[0]["w"], want[1])


OLD = {"same": (3, 4), "w": (6, 4), "a": (2, 5), "b": (3, 5), "large": (4, 400_000), "gone": (7,)}
NEW = {"same": (3, 4), "head": (2, 4), "tail": (4, 4), "ab": (5, 5), "large2": (4, 400_000), "fresh": (3,)}
PIECES = {
    "same": [VariablePiece("same")],
    "head": [VariablePiece("w", 0, 8)],
    "tail": [VariablePiece("w", 8)],
    "ab": [VariablePiece("a"), VariablePiece("b")],
    "large2": [VariablePiece("large")],
}


def in_new_terms(old):
    """Arrays of OLD's variables, as NEW's are made of them."""
    split = {"head": old["w"][:2], "tail": old["w"][2:], "ab": np.concatenate([old["a"], old["b"]])}
    return {"same": old["same"], "large2": old["large"], **split}


@pytest.mark.parametrize("target", ["embedded", "1-ps", "3-ps"])
@pytest.mark.parametrize("optimizer", [Adam(learning_rate=0.1), Adagrad(learning_rate=0.1)], ids=["adam", "adagrad"])
def test_variables_are_renamed_split_and_joined_by_a_restore_with_their_optimizers_state(
    local, target, optimizer, tmp_path
):
    grads = [{name: floats(*dims, seed=seed) for name, dims in OLD.items()} for seed in (1, 2)]
    with local("3-ps").connect() as client:
        client.create_variables({name: floats(*dims) for name, dims in OLD.items()}, optimizer=optimizer)
        client.apply_dense_gradients(grads[0])
        client.global_step(set_to=5)
        client.save(str(tmp_path / "old"))
        saved = client.pull_variables(list(OLD))[0]
        client.apply_dense_gradients(grads[1])
        want = client.pull_variables(list(OLD))[0]
    with local(target).connect() as client:
        fresh = floats(3, seed=9)
        client.create_variables(
            {name: np.zeros(dims) for name, dims in NEW.items()} | {"fresh": fresh}, optimizer=optimizer
        )
        assert client.restore(str(tmp_path / "old"), variables=PIECES) == 5
        assert client.variables() == NEW
        found = client.pull_variables(list(NEW))[0]
        np.testing.assert_array_equal(found.pop("fresh"), fresh)
        for name, value in in_new_terms(saved).items():
            np.testing.assert_array_equal(found[name], value)
        client.apply_dense_gradients(in_new_terms(grads[1]))
        found = client.pull_variables(list(PIECES))[0]
        for name, value in in_new_terms(want).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_restore_of_no_variables_leaves_those_that_are_here(local, shape, tmp_path):
    with local("1-ps").connect() as client:
        client.table("user", dim=2).assign([3], [[1.0, 2.0]])
        client.create_variables({"w": floats(4), "old": floats(3)}, optimizer=Sgd())
        client.save(str(tmp_path / "old"))
    with local(shape).connect() as client:
        client.create_variables({"w": floats(6, seed=1)}, optimizer=Adam())
        assert client.restore(str(tmp_path / "old"), variables={}, step=3) == 3
        assert client.global_step() == 3
        np.testing.assert_array_equal(client.pull_variables(["w"])[0]["w"], floats(6, seed=1))
        assert client.variables() == {"w": (6,)}
        assert client.table("user", dim=2).lookup([3]).tolist() == [[1.0, 2.0]]


def test_an_optimizer_of_another_kind_begins_anew_with_the_values_of_a_restore(local, shape, tmp_path):
    with local(shape).connect() as client:
        client.create_variables({"w": floats(4)}, optimizer=Adagrad(learning_rate=0.1))
        client.apply_dense_gradients({"w": floats(4)})
        client.save(str(tmp_path / "old"))
        values = client.pull_variables(["w"])[0]["w"]
    with local(shape).connect() as client, local("embedded").connect() as fresh:
        client.create_variables({"v": np.zeros(4)}, optimizer=Adam(learning_rate=0.1))
        client.restore(str(tmp_path / "old"), variables={"v": [VariablePiece("w")]})
        fresh.create_variables({"v": values}, optimizer=Adam(learning_rate=0.1))
        for each in (client, fresh):
            each.apply_dense_gradients({"v": floats(4, seed=1)})
        np.testing.assert_array_equal(client.pull_variables(["v"])[0]["v"], fresh.pull_variables(["v"])[0]["v"])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([VariablePiece("nothing")], "no dense variable 'nothing'; it has .'w'."),
        ([VariablePiece("w", 2, 4)], "'w' has 4 floats; 2 to 6"),
        ([VariablePiece("w", 1)], "'v': .* has another number of floats"),
        ([], "'v': it is to be restored from nothing"),
    ],
)
def test_a_restore_of_floats_that_are_not_there_is_refused_and_changes_nothing(local, pieces, message, tmp_path):
    with local("1-ps").connect() as client:
        client.create_variables({"w": floats(4)}, optimizer=Sgd())
        client.save(str(tmp_path / "old"))
    with local("1-ps").connect() as client:
        client.create_variables({"v": floats(4, seed=1)}, optimizer=Sgd())
        with pytest.raises(CheckpointError, match=message):
            client.restore(str(tmp_path / "old"), variables={"v": pieces})
        np.testing.assert_array_equal(client.pull_variables(["v"])[0]["v"], floats(4, seed=1))


def test_a_checkpoint_that_cannot_be_written_is_refused_with_its_path(client, name, tmp_path):
    client.create_variables({name: np.ones(4, np.float32)}, optimizer=Sgd())
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with pytest.raises(CheckpointError, match="file.*cannot be written"):
        client.save(str(blocked / "ckpt"))

"""RunConfig: its layers, what it refuses and how it says so, and that it gives no password away."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.estimator.config import OF_ONE_WORKER, RunConfig
from trilith.estimator.identity import WorkerIdentity

SECRET = "zk://ann:pass%2Fword@zk1:2181/shop"


# ---- layers --------------------------------------------------------------------------------------------------------


def test_flags_win_over_environment_over_file_over_code_over_defaults(tmp_path):
    code = RunConfig(epochs=2, steps=2, seed=2, prefetch=2)
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\nsteps = 3\nseed = 3\n")
    environ = {"TRILITH_RUN_EPOCHS": "4", "TRILITH_RUN_STEPS": "4", "OTHER": "1"}
    run = code.overridden(file=file, environ=environ, sets=["epochs=5"])
    assert (run.epochs, run.steps, run.seed, run.prefetch, run.accumulate) == (5, 4, 3, 2, 1)
    assert code.epochs == 2


def test_of_two_flags_the_later_one_wins():
    assert RunConfig().overridden(environ={}, sets=["epochs=2", "epochs=3"]).epochs == 3


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("epochs=3", "epochs", 3),
        ("clip_norm=1.5", "clip_norm", 1.5),
        ("use_gpu=false", "use_gpu", False),
        ("dense=ps", "dense", "ps"),
        ("metrics_port=0", "metrics_port", 0),
        ("metrics_port=none", "metrics_port", None),
        ("progress=none", "progress", "none"),
        ("keep_exempt=step-1, step-2", "keep_exempt", ("step-1", "step-2")),
        ('params_override={"user": {"dim": 3}}', "params_override", {"user": {"dim": 3}}),
        ("params_override.user.dim=3", "params_override", {"user.dim": 3}),
        ("params_override.name=ctr", "params_override", {"name": "ctr"}),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_text_becomes_what_the_field_needs(text, field, value):
    assert getattr(RunConfig().overridden(environ={}, sets=[text]), field) == value
    name, _, of = text.partition("=")
    if "." not in name:
        assert getattr(RunConfig().overridden(environ={f"TRILITH_RUN_{name.upper()}": of}), field) == value


def test_overrides_of_the_task_add_up_over_the_layers(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"params_override": {"user.dim": 2, "item.dim": 2}}))
    run = RunConfig().overridden(file=file, environ={}, sets=["params_override.user.dim=3"])
    assert run.params_override == {"user.dim": 3, "item.dim": 2}


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["epoch=3"], "--set epoch=3: a run has no 'epoch'; do you mean 'epochs'?"),
        (["save-every=3"], "do you mean 'save_every'?"),
        (["xyzzy=3"], "a run has no 'xyzzy'; there are name, cluster"),
        (["epochs.x=3"], "a run has no 'epochs.x'"),
        (["epochs"], "--set epochs: write name=value"),
        (["epochs=0"], "--set epochs=0: epochs='0': it should be greater than or equal to 1"),
        (["epochs=many"], "epochs='many'"),
        (["dense=gpu"], "--set dense=gpu: dense='gpu': it should be 'auto', 'local', 'ps' or 'allreduce'"),
        (["clip_norm=nan"], "clip_norm='nan'"),
        (["params_override=3"], "params_override is an object"),
        (["save_every=3"], "save_every=3 needs model_dir, where checkpoints go (--set save_every=3)"),
        (["shut_down_ps=true"], "shut_down_ps needs model_dir: what was learned would end with the PS"),
        (["shut_down_ps=true", "model_dir=a"], "shut_down_ps needs owns_cluster"),
        (["resume="], "resume is empty"),
        (["master=here"], "--set master=here: master='here'"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_field(sets, said):
    with pytest.raises(InvalidRequestError) as error:
        RunConfig().overridden(environ={}, sets=sets)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_where_a_wrong_value_stands_is_said(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"\$TRILITH_RUN_EPOCH: a run has no 'epoch'; do you mean 'epochs'"):
        RunConfig().overridden(environ={"TRILITH_RUN_EPOCH": "3"})
    file = tmp_path / "run.toml"
    file.write_text("epochs = -1")
    with pytest.raises(InvalidRequestError, match=r"--config .*run.toml: epochs=-1"):
        RunConfig().overridden(file=file, environ={})
    with pytest.raises(InvalidRequestError, match="do you mean 'epochs'"):
        RunConfig(epoch=3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "epochs = ", "a.toml: "),
        ("a.json", "[1]", "no values by name"),
        ("a.json", "{", "a.json: "),
        ("a.yaml", "epochs: 3", "must be a .toml or .json file"),
        ("a.toml", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequestError, match=said):
        RunConfig().overridden(file=tmp_path / name, environ={})


def test_aliases_of_a_warm_start_are_set_one_by_one_or_together():
    run = RunConfig(warm_start="a", warm_start_aliases={"q": "k"})
    one = run.overridden(environ={}, sets=["warm_start_aliases.head.weight=last.weight"])
    assert one.warm_start_aliases == {"q": "k", "head.weight": "last.weight"}
    both = run.overridden(environ={"TRILITH_RUN_WARM_START_ALIASES": '{"q": ["a", "b"]}'})
    assert both.warm_start_aliases == {"q": ("a", "b")}
    assert RunConfig.from_json(both.to_json()) == both
    with pytest.raises(InvalidRequestError, match="warm_start_aliases is an object of values by name, not '3'"):
        run.overridden(environ={}, sets=["warm_start_aliases=3"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"save_every": 3}, "save_every=3 needs model_dir"),
        ({"save_every_s": 3}, "save_every_s=3.0 needs model_dir"),
        ({"keep_newest": 5}, "keep_newest=5 needs model_dir"),
        ({"export_every_save": True}, "export_every_save exports checkpoints"),
        ({"model_dir": "d", "keep_best": "auc", "evaluate_every_epoch": False}, "keep_best='auc' needs evaluations"),
        ({"keep_best_mode": "max"}, "keep_best_mode='max' needs keep_best"),
        ({"warm_start": "a", "resume": "b"}, "warm_start and resume='b'"),
        ({"warm_start_parts": "rows"}, "needs warm_start"),
        ({"warm_start_keep_step": False}, "warm_start_keep_step=False needs warm_start"),
        ({"reset_dense": "x"}, "reset_dense='x' is for a run that goes on"),
        ({"model_dir": "d", "resume": "never", "reset_dense": "x"}, "reset_dense='x' is for a run that goes on"),
        (
            {"warm_start": "a", "warm_start_parts": "rows", "warm_start_match": "auto"},
            "warm_start_match='auto' with warm_start_parts='rows'",
        ),
        (
            {"warm_start": "a", "warm_start_parts": "rows", "warm_start_aliases": {"a": "b"}},
            "warm_start_aliases={'a': 'b'} with warm_start_parts='rows'",
        ),
        (
            {"warm_start": "a", "warm_start_parts": "dense", "warm_start_keep_step": False},
            "warm_start_keep_step=False with warm_start_parts='dense'",
        ),
        ({"cluster": "peers://", "dense": "ps"}, "dense='ps' with cluster='peers://'"),
        ({"cluster": "peers://", "owns_cluster": True}, "no PS to own"),
        ({"lookup_queue": 1}, "lookup_queue=1 is for cluster='peers://'"),
        ({"float16_transfer": True}, "float16_transfer=True with cluster='local://'"),
        ({"world_size": 2}, "every worker would have rows of its own"),
        ({"cluster": "mlp://", "world_size": 2, "dense": "local"}, "every worker would have a model of its own"),
        ({"dense": "ps", "row_gradients": "sum"}, "do not step together"),
        ({"cluster": "mlp://", "rank": 2, "world_size": 2}, "rank=2 is outside"),
        ({"cluster": "http://a"}, "begins with none of"),
        ({"cluster": ""}, "begins with none of"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(values, said):
    with pytest.raises(InvalidRequestError) as error:
        RunConfig(**values)
    assert said in str(error.value)


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_password_is_shown_or_stored():
    run = RunConfig(cluster=SECRET, model_dir="sftp://ann@host/a", params_override={"log": ["http://me:hidden@host"]})
    for shown in (repr(run), str(run), str(run.non_defaults()), run.to_json(), f"{run}"):
        assert "pass" not in shown
        assert "hidden" not in shown
        assert "ann" not in shown
    assert run.cluster == SECRET
    assert RunConfig.from_json(run.to_json()).cluster == "zk://zk1:2181/shop"


def test_an_at_sign_in_a_path_stays():
    run = RunConfig(model_dir="s3://bucket/team@home/ctr")
    assert RunConfig.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    "values",
    [
        {"cluster": f"x{SECRET}"},
        {"cluster": SECRET, "dense": "local", "world_size": 2},
        *({name: "s3://key:pass%2Fword@bucket/a"} for name in ("model_dir", "export_dir", "warm_start", "resume")),
    ],
)
def test_no_password_is_in_a_refusal(values):
    with pytest.raises(InvalidRequestError) as error:
        RunConfig(**values)
    assert not re.search(r"pass(%2F|/)word", str(error.value))
    with pytest.raises(InvalidRequestError) as error:
        RunConfig().overridden(environ={}, sets=[f"{name}={value}" for name, value in values.items()])
    assert not re.search(r"pass(%2F|/)word", str(error.value))


# ---- values --------------------------------------------------------------------------------------------------------

RUNS = st.builds(
    RunConfig,
    epochs=st.integers(1, 9),
    model_dir=st.sampled_from(["d", "s3://b/c"]),
    clip_norm=st.floats(0, 10),
    keep_exempt=st.lists(st.text("abc-1", min_size=1), max_size=3).map(tuple),
    params_override=st.dictionaries(st.text("ab.", min_size=1), st.integers() | st.text() | st.lists(st.integers())),
    save_on_stop=st.booleans(),
)


@given(RUNS)
def test_a_run_comes_back_from_json(run):
    again = RunConfig.from_json(run.to_json())
    assert again == run
    assert again.non_defaults() == run.non_defaults()


def test_which_worker_it_is_is_not_stored():
    run = RunConfig(rank=1, world_size=2, master="a:1", cluster="mlp://", metrics_port=3, events="e", epochs=2)
    assert RunConfig.from_json(run.to_json()) == RunConfig(cluster="mlp://", epochs=2)
    assert set(RunConfig.model_fields) >= OF_ONE_WORKER


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 3}', '{"epochs": 0}'])
def test_a_damaged_stored_run_is_refused(text):
    with pytest.raises(InvalidRequestError):
        RunConfig.from_json(text)


def test_it_is_frozen_and_says_what_differs_only():
    run = RunConfig(epochs=3, seed=0)
    assert run.non_defaults() == {"epochs": 3}
    assert repr(run) == "RunConfig(epochs=3)"
    with pytest.raises(Exception, match="frozen"):
        run.epochs = 4


def test_every_field_says_what_it_is():
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []


def test_its_worker_is_the_one_that_the_environment_or_its_fields_say():
    assert RunConfig(cluster="mlp://", rank=1, world_size=2).identity({}).rank == 1
    torchrun = {"RANK": "1", "WORLD_SIZE": "4"}
    assert RunConfig(master="a:1").identity(torchrun) == WorkerIdentity(
        rank=1, world_size=4, master="a:1", source="torchrun"
    )

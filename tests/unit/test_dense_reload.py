"""The reference's rules of dense reload: its published examples, and what holds of any names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.compat.monolith.dense_reload import (
    GUESSES,
    Guesses,
    Reorder,
    alias_map,
    extended_names,
    fill,
    full_prefix,
    infer_variable_names,
    merge_partitions,
    new_name,
    node_name,
    reorder_info,
    split_name,
)
from trilith.errors import CheckpointError, InvalidRequestError

NAMES = st.lists(
    st.sampled_from(["t", "u", "deep", "dense", "dense_2", "fc_07", "part_0", "part_12", "kernel", "bias", "Adam"]),
    min_size=1,
    max_size=6,
).map("/".join)


def layers(*names: str, prefix: str = "t") -> set[str]:
    return {f"{prefix}/{name}/{kind}" for name in names for kind in ("bias", "kernel")}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "want"),
    [("deep/kernel:0", "deep/kernel"), ("  ^deep/kernel// ", "deep/kernel"), ("^^a", "^a"), ("a:b", "a:b"), ("", "")],
)
def test_a_node_is_a_name_without_what_tensorflow_puts_around_it(name, want):
    assert node_name(name) == want


@pytest.mark.parametrize(
    ("name", "want"), [("deep/deep/fc/kernel:0", "deep/fc/kernel"), ("u/v/u/w", "u/v/w"), ("w", "w")]
)
def test_components_that_occur_again_are_left_out(name, want):
    assert new_name(name) == want


def test_partitions_belong_to_one_variable():
    assert infer_variable_names(["w/part_0/Adam", "w/part_1/Adam"]) == {"w/Adam"}
    assert infer_variable_names(["w/part_0:0", "w/part_1:0", "v", "department_1/x", "w/part_x"]) == {
        "w:0",
        "v",
        "department_1/x",
        "w/part_x",
    }


@pytest.mark.parametrize(
    ("name", "want"),
    [("fc_07", ("fc_", 7)), ("fc", ("fc", 0)), ("123", ("1", 23)), ("a10b2", ("a10b", 2)), ("", ("", 0))],
)
def test_a_name_is_text_and_the_number_at_its_end(name, want):
    assert split_name(name) == want


@pytest.mark.parametrize(
    ("names", "sort", "want"),
    [
        (["fc_3"], False, (True, "fc_")),
        (["fc_1"], False, (False, "fc_")),
        (["dense"], False, (False, "dense_")),
        (["dense", "dense_1"], False, (True, "dense_")),
        (["fc_2", "other_1"], False, (True, "other_")),
        (["fc_2", "other_1"], True, (True, "fc_")),
    ],
)
def test_layers_are_numbered_anew_but_for_one_alone_of_number_0_or_1(names, sort, want):
    assert reorder_info(names, sort=sort) == Reorder(*want)
    with pytest.raises(InvalidRequestError, match="at least one"):
        reorder_info([])


def test_a_full_prefix_is_the_longest_known_one_that_ends_so():
    assert full_prefix("fc", {"deep/fc", "a/deep/fc", "fc/b"}) == "a/deep/fc"
    assert full_prefix("fc", {"other"}) == "fc"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("c_dot/mlp_1/bias", "c_dot/compress_tower_1/bias"),
        ("dcn/kernel_7/Adagrad", "kernel_7/Adagrad"),
        ("dcn/kernel_7/trainable_norm/x", "kernel_7_trainable_norm/x"),
        ("dcn/bias_4/trainable_norm", "bias_4_trainable_norm"),
        ("x/dcn/bias_4", "x/dcn/bias_4"),
    ],
)
def test_guesses_match_from_the_start_of_a_name_and_keep_its_rest(name, want):
    assert GUESSES(name) == want


def test_rules_of_ones_own_are_tried_first():
    guesses = Guesses({r"tower_(\d+)": "tower{0}"})
    assert guesses("tower_3/kernel") == "tower3/kernel"
    guesses.add({r"tower_(\d+)/(\w+)": "{1}/of_{0}"})
    assert guesses("tower_3/kernel/Adam") == "kernel/of_3/Adam"
    with pytest.raises(InvalidRequestError, match="no regular expression"):
        guesses.add({"(": ""})


@given(NAMES)
def test_what_was_made_plain_stays_as_it_is(name):
    for plain in (node_name, new_name):
        assert plain(plain(name)) == plain(name)
    whole = infer_variable_names([name])
    assert infer_variable_names(whole) == whole
    text, number = split_name(name)
    assert re.fullmatch(re.escape(text) + "0*" + (str(number) if number else ""), name)


# ---- the automatic alias map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "added"),
    [
        (["dense_2"], {"dense_0": "dense_2"}),
        (["dense", "dense_2"], {"dense_0": "dense", "dense_1": "dense_2"}),
        (["dense_1", "dense_2"], {"dense_0": "dense_1", "dense_1": "dense_2"}),  # a layer goes as a whole
        (["dense_2", "dense_10"], {"dense_0": "dense_2", "dense_1": "dense_10"}),
        (["fc_4", "dense_2", "dense_7"], {"fc_0": "fc_4", "dense_0": "dense_2", "dense_1": "dense_7"}),
        (["fc_1"], {}),
    ],
)
def test_a_checkpoints_layers_are_also_known_by_numbers_from_0(checkpoint, added):
    old = layers(*checkpoint)
    want = {name: name for name in old} | {
        f"t/{new}/{kind}": f"t/{each}/{kind}" for new, each in added.items() for kind in ("bias", "kernel")
    }
    assert extended_names(old) == want


def test_a_kernel_is_also_known_by_the_full_prefix_of_its_layers_bias():
    known = extended_names({"a/deep/fc_1/bias", "deep/fc_1/kernel", "deep/fc_1/kernel/Adam"})
    assert known["a/deep/fc_1/kernel"] == "deep/fc_1/kernel"
    assert known["a/deep/fc_1/kernel/Adam"] == "deep/fc_1/kernel/Adam"


def test_layers_of_other_numbers_are_found():
    found = alias_map(layers("dense_4", prefix="s"), layers("dense_9", prefix="s"))
    assert found.needed
    assert found.aliases == {"s/dense_4/kernel": "s/dense_9/kernel", "s/dense_4/bias": "s/dense_9/bias"}


def test_nothing_is_renamed_where_all_names_are_there():
    assert not alias_map(layers("dense_4"), layers("dense_4") | {"more"}).aliases
    assert not alias_map({"w/part_0:0", "w/part_1:0"}, {"w"}).aliases


@pytest.mark.parametrize(
    ("current", "checkpoint", "want"),
    [
        # Bias and kernel of one layer stay together, where the reference takes them of two.
        (["dense", "dense_1"], ["dense_1", "dense_2"], {"dense": "dense_1", "dense_1": "dense_2"}),
        (["dense"], ["dense_9"], {"dense": "dense_9"}),
        (["dense_3", "dense_12"], ["dense_1", "dense_10"], {"dense_3": "dense_1", "dense_12": None}),
        (["dense_3", "dense_4"], ["dense", "dense_7"], {"dense_3": "dense", "dense_4": "dense_7"}),
        # Those that are all there are left alone, whatever else moves.
        (
            ["dense_1", "dense_2", "fc_4"],
            ["dense_1", "dense_2", "fc_6"],
            {"dense_1": "dense_1", "dense_2": "dense_2", "fc_4": "fc_6"},
        ),
    ],
)
def test_layers_are_found_in_order_and_whole_or_nothing_is_renamed(current, checkpoint, want):
    found = alias_map(layers(*current), layers(*checkpoint))
    pairs = {f"t/{new}/{kind}": f"t/{old}/{kind}" for new, old in want.items() if old for kind in ("bias", "kernel")}
    lost = {f"t/{new}/{kind}" for new, old in want.items() if not old for kind in ("bias", "kernel")}
    assert (found.aliases, set(found.missing)) == (({}, lost) if lost else (pairs, set()))


def test_partitions_of_a_layer_that_moved_are_found():
    current = {"t/dense_4/kernel/part_0:0", "t/dense_4/kernel/part_1:0", "t/dense_4/bias"}
    found = alias_map(current, layers("dense_9"))
    assert found.aliases == {
        "t/dense_4/kernel/part_0:0": "t/dense_9/kernel",
        "t/dense_4/kernel/part_1:0": "t/dense_9/kernel",
        "t/dense_4/bias": "t/dense_9/bias",
    }


def test_guesses_are_found_also_of_names_that_look_like_layers():
    found = alias_map({"dcn/kernel_7", "dcn/bias_4/trainable_norm"}, {"kernel_7", "bias_4_trainable_norm"})
    assert found.aliases == {"dcn/kernel_7": "kernel_7", "dcn/bias_4/trainable_norm": "bias_4_trainable_norm"}
    own = Guesses({"tower": "old_tower"})
    assert alias_map({"tower/w"}, {"old_tower/w"}, guess=own).aliases == {"tower/w": "old_tower/w"}


@given(st.sets(NAMES, min_size=1, max_size=8), st.sets(NAMES, max_size=8))
def test_every_name_is_found_in_the_checkpoint_or_reported(current, checkpoint):
    found = alias_map(current, checkpoint)
    assert set(found.aliases.values()) <= {node_name(name) for name in checkpoint}
    if found.aliases:
        assert found.aliases.keys() == current
        assert not found.missing
    elif not infer_variable_names(current) <= checkpoint:
        assert set(found.missing) <= current


# ---- values ----------------------------------------------------------------------------------------------------------


def test_the_reference_test_model_is_filled():
    rng = np.random.default_rng(0)
    checkpoint = {
        "partition": rng.normal(size=(1280, 512)).astype(np.float32),
        "small_var": np.ones((10, 5), np.float32),
        "global_step": np.array(10),
    }
    parts = {f"partition2/part_{k}": (64, 512) for k in range(20)}
    targets = parts | {"small_var2": (10, 5), "global_step": ()}
    aliases = dict.fromkeys(parts, "partition") | {"small_var2": "small_var", "global_step": "global_step"}
    found = fill(checkpoint, aliases, targets)
    assert found is not None
    assert found.keys() == aliases.keys()
    assert {name: value.shape for name, value in found.items()} == targets
    np.testing.assert_array_equal(np.concatenate([found[name] for name in parts]), checkpoint["partition"])
    assert fill(checkpoint, {}, {f"partition/part_{k}:0": (64, 512) for k in range(20)}) is None


def test_partitions_of_several_layers_get_the_old_one_each():
    old = np.arange(12.0).reshape(6, 2)
    targets = {"a/fc_1/kernel/part_1": (2, 2), "a/fc_1/kernel/part_0": (4, 2), "a/fc_2/kernel": (6, 2)}
    found = fill({"old": old}, dict.fromkeys(targets, "old"), targets)
    assert found is not None
    np.testing.assert_array_equal(found["a/fc_1/kernel/part_0"], old[:4])
    np.testing.assert_array_equal(found["a/fc_1/kernel/part_1"], old[4:])
    np.testing.assert_array_equal(found["a/fc_2/kernel"], old)


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ({}, r"no variables for \['b', 'w/part_0', 'w/part_1'\]; it has \['old'\]"),
        ({"w/part_0": "old", "w/part_1": "old", "b": "gone"}, r"no variables for \['b'\]"),
        ({"w/part_0": "old", "w/part_1": "old", "b": "old"}, r"'b' has the shape \(3,\), and 'old' gives it \(6, 2\)"),
    ],
)
def test_a_variable_without_a_value_of_its_shape_is_refused_by_name(aliases, message):
    targets = {"w/part_0": (3, 2), "w/part_1": (3, 2), "b": (3,)}
    with pytest.raises(CheckpointError, match=message):
        fill({"old": np.zeros((6, 2))}, aliases, targets)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_partitions_are_merged_into_what_they_were_cut_from(rows):
    whole = np.arange(sum(rows) * 2.0).reshape(-1, 2)
    targets = {f"w/part_{k}": (count, 2) for k, count in enumerate(rows)}
    found = fill({"v": whole}, dict.fromkeys(targets, "v"), targets)
    assert found is not None
    merged = merge_partitions(dict(reversed(found.items())))
    np.testing.assert_array_equal(merged["w"], whole)
    assert fill(merged, {}, targets) is None

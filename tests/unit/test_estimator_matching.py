"""Which dense parameters of a checkpoint a model begins with: by name, by alias, by likeness."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.estimator.matching import Matched, Piece, match

W, B = (4, 3), (4,)


def layers(*names: str, shape: tuple[int, ...] = W) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": each for name in names for kind, each in (("weight", shape), ("bias", shape[:1]))}


def matched(mine, theirs, how="exact", **aliases) -> Matched:
    return match("ckpt", mine, theirs, aliases=aliases.get("aliases", {}), how=how)


def renamed(*pairs: tuple[str, str]) -> dict[str, str]:
    return {f"{new}.{kind}": f"{old}.{kind}" for new, old in pairs for kind in ("weight", "bias")}


# ---- names and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exact", "auto", "present"])
def test_the_same_names_and_shapes_are_taken_as_they_are(how):
    found = matched(layers("a", "b"), layers("b", "a"), how)
    assert found == Matched({name: (Piece(name),) for name in layers("a", "b")})
    assert not found.renamed


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (layers("a", "b"), layers("a"), r"it lacks \['b.weight', 'b.bias'\], has \[\] beside"),
        (layers("a"), layers("a", "b"), r"it lacks \[\], has \['b.bias', 'b.weight'\] beside"),
        (
            layers("a"),
            layers("a", shape=(4, 5)),
            r"lacks \[\], has \[\] beside, and other shapes of \{'a.weight': '\[4, 5\], here \[4, 3\]'\}",
        ),
    ],
)
def test_exactly_all_names_and_shapes_are_needed_or_told(mine, theirs, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        matched(mine, theirs)
    for way in ("warm_start_aliases", "warm_start_match=auto", "warm_start_match=present", "warm_start_parts=rows"):
        assert way in str(raised.value)


def test_what_is_present_by_name_and_shape_is_taken_and_the_rest_reported():
    mine = layers("a", "new") | {"wide.weight": (4, 6), "wide.bias": B}
    found = matched(mine, layers("a", "gone", "wide"), "present")
    assert list(found.sources) == ["a.weight", "a.bias", "wide.bias"]
    assert found.missing == ("new.weight", "new.bias", "wide.weight")
    assert found.left == ("gone.bias", "gone.weight", "wide.weight")


# ---- aliases ---------------------------------------------------------------------------------------------------------


def test_an_alias_wins_over_a_name_that_is_there():
    found = matched(layers("a", "b"), layers("a", "b"), aliases={**renamed(("a", "b")), **renamed(("b", "a"))})
    assert found.renamed == renamed(("a", "b"), ("b", "a"))
    with pytest.raises(CheckpointError, match=r"has \['a.weight'\] beside"):
        matched(layers("a", "b"), layers("a", "b"), aliases={"a.weight": "b.weight"})


def test_tensors_are_cut_and_joined_along_axis_0_in_the_models_order():
    theirs = {"qkv": (6, 2), "x": (1, 5), "y": (3, 5), "tied": (2, 2)}
    mine = {"k": (4, 2), "q": (2, 2), "xy": (4, 5), "one": (2, 2), "two": (2, 2)}
    found = matched(mine, theirs, aliases={"q": "qkv", "k": "qkv", "xy": ("x", "y"), "one": "tied", "two": "tied"})
    assert dict(found.sources) == {
        "k": (Piece("qkv", 0, 4),),
        "q": (Piece("qkv", 4, 6),),
        "xy": (Piece("x"), Piece("y")),
        "one": (Piece("tied"),),
        "two": (Piece("tied"),),
    }
    assert found.renamed == {"k": "qkv[0:4]", "q": "qkv[4:6]", "xy": "x + y", "one": "tied", "two": "tied"}


@pytest.mark.parametrize("how", ["exact", "auto", "present"])
@pytest.mark.parametrize(
    ("aliases", "error", "message"),
    [
        ({"a.wieght": "a.weight"}, InvalidRequestError, "model has no 'a.wieght'; do you mean 'a.weight'"),
        ({"a.weight": "b.wieght"}, CheckpointError, "ckpt has no 'b.wieght'; do you mean 'b.weight'"),
        ({"a.weight": "b.bias"}, CheckpointError, r"'a.weight' \[4, 3\] cannot be made of 'b.bias' \[4\] of ckpt"),
        ({"a.weight": "wide"}, CheckpointError, r"'a.weight' \[4, 3\] cannot be made of 'wide' \[8, 3\]"),
        (
            {"a.weight": ("b.weight", "wide")},
            CheckpointError,
            r"'a.weight' \[4, 3\] cannot be made of 'b.weight' \[4, 3\], 'wide' \[8, 3\]",
        ),
        (
            {"a.weight": "wide", "a.bias": "wide"},
            CheckpointError,
            r"'a.weight' \[4, 3\], 'a.bias' \[4\] cannot be made of 'wide'",
        ),
    ],
)
def test_an_alias_that_does_not_fit_is_refused_with_names_and_shapes(how, aliases, error, message):
    with pytest.raises(error, match=message) as raised:
        matched(layers("a"), layers("b") | {"wide": (8, 3)}, how, aliases=aliases)
    assert "\n" not in str(raised.value)


# ---- layers that were renamed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "want"),
    [
        # Renumbered, in order; a layer goes as a whole.
        (["s.dense_4"], ["s.dense_9"], [("s.dense_4", "s.dense_9")]),
        (["t.dense_0", "t.dense_1"], ["t.dense", "t.dense_2"], [("t.dense_0", "t.dense"), ("t.dense_1", "t.dense_2")]),
        (["t.d_0", "t.d_1"], ["t.d_1", "t.d_2"], [("t.d_0", "t.d_1"), ("t.d_1", "t.d_2")]),
        (["mlp.0", "mlp.10"], ["mlp.0", "mlp.9"], [("mlp.10", "mlp.9")]),
        (["mlp.0", "mlp.2", "x.1"], ["mlp.0", "mlp.2", "x.3"], [("x.1", "x.3")]),
        # Under another prefix, or none.
        (["deep.mlp.0", "deep.mlp.2"], ["mlp.0", "mlp.2"], [("deep.mlp.0", "mlp.0"), ("deep.mlp.2", "mlp.2")]),
        (["0", "2"], ["mlp.0", "mlp.2"], [("0", "mlp.0"), ("2", "mlp.2")]),
        (
            ["towers.buy", "towers.click"],
            ["heads.click", "heads.buy"],
            [("towers.buy", "heads.buy"), ("towers.click", "heads.click")],
        ),
        # Wrapped by torch.compile or DistributedDataParallel, or nested once more.
        (["a.b"], ["_orig_mod.a.module.b"], [("a.b", "_orig_mod.a.module.b")]),
        (["a.a.b"], ["a.b"], [("a.a.b", "a.b")]),
    ],
)
def test_layers_that_were_renamed_are_found(new, old, want):
    found = matched(layers(*new), layers(*old), "auto")
    assert found.renamed == renamed(*want)
    assert not found.missing
    assert not found.left


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (["mlp.0", "mlp.2", "mlp.4"], ["mlp.1", "mlp.3"]),  # another number of layers
        (["deep.1"], ["cross.1"]),  # nothing in common but a number
        (["a.fc"], ["b.fc", "c.fc"]),  # either may be meant
        (["a.fc", "b.fc"], ["c.fc"]),
    ],
)
def test_what_may_be_one_or_another_is_refused_with_what_is_there(new, old):
    with pytest.raises(CheckpointError, match="it lacks .* beside") as raised:
        matched(layers(*new), layers(*old), "auto")
    assert f"{old[0]}.weight" in str(raised.value)
    assert "warm_start_match=auto" not in str(raised.value)


def test_shapes_decide_whether_layers_are_alike():
    mine = layers("mlp.0") | layers("mlp.3", shape=(2, 4))
    theirs = layers("mlp.0") | layers("mlp.2", shape=(2, 4))
    assert matched(mine, theirs, "auto").renamed == renamed(("mlp.3", "mlp.2"))
    with pytest.raises(CheckpointError, match=r"lacks \['mlp.3.weight', 'mlp.3.bias'\]"):
        matched(mine, layers("mlp.0", "mlp.2"), "auto")


def test_a_layer_without_its_bias_is_alike_and_the_bias_reported():
    found = matched({"a.fc_2.weight": W}, layers("a.fc_7") | {"scale": ()}, "auto")
    assert found.renamed == {"a.fc_2.weight": "a.fc_7.weight"}
    assert found.left == ("a.fc_7.bias", "scale")


NAMES = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "fc", "fc_1", "fc_2", "0", "1", "2"]), min_size=1, max_size=3).map(".".join),
    st.sampled_from([W, B, (8, 3)]),
    min_size=1,
    max_size=8,
)


@given(NAMES, NAMES, st.sampled_from(["exact", "auto", "present"]))
def test_every_name_gets_a_tensor_of_its_shape_or_is_reported(mine, theirs, how):
    try:
        found = matched(mine, theirs, how)
    except CheckpointError:
        assert how != "present"
        return
    assert list(found.sources) == [name for name in mine if name not in found.missing]
    assert all(theirs[piece.name] == mine[name] for name, (piece,) in found.sources.items())
    taken = [piece.name for (piece,) in found.sources.values()]
    assert len(set(taken)) == len(taken)
    assert {*taken, *found.left} == theirs.keys()


@given(NAMES, st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_of_an_alias_cover_its_tensor_once(theirs, rows):
    mine = {f"part_{k}": (count, 3) for k, count in enumerate(rows)}
    found = matched(mine, {"whole": (sum(rows), 3)} | theirs, "present", aliases=dict.fromkeys(mine, "whole"))
    if len(rows) > 1:
        pieces = [piece for (piece,) in found.sources.values()]
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == sum(rows)
    joined = (
        match("ckpt", {"whole": (sum(rows), 3)}, mine, aliases={"whole": tuple(mine)}, how="exact")
        if len(rows) > 1
        else None
    )
    assert joined is None or [piece.name for piece in joined.sources["whole"]] == list(mine)

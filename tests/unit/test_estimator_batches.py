"""Batches in every form become the same ids, weights, dense values and labels; strings become ids that never change."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilith.data import Ragged
from trilith.errors import InvalidRequestError
from trilith.estimator.batches import DenseColumn, IdColumn, LabelColumn, Wanted, arrange, columns_of
from trilith.ops.strings import hash_strings

IDS = Wanted(ids={"item": IdColumn()})


# ---- strings -------------------------------------------------------------------------------------------------------

MASK = (1 << 64) - 1
P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P4, P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def naive_xxh64(data: bytes, seed: int = 0) -> int:
    """The published algorithm, step by step."""

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (64 - by)) & MASK

    def one(lane: int, word: int) -> int:
        return rotated((lane + word * P2) & MASK, 31) * P1 & MASK

    def word(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    at = 0
    if len(data) >= 32:
        lanes = [(seed + P1 + P2) & MASK, (seed + P2) & MASK, seed, (seed - P1) & MASK]
        while len(data) - at >= 32:
            lanes = [one(lane, word(at + 8 * i, 8)) for i, lane in enumerate(lanes)]
            at += 32
        value = sum(rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            value = ((value ^ one(0, lane)) * P1 + P4) & MASK
    else:
        value = (seed + P5) & MASK
    value = (value + len(data)) & MASK
    while len(data) - at >= 8:
        value = (rotated(value ^ one(0, word(at, 8)), 27) * P1 + P4) & MASK
        at += 8
    if len(data) - at >= 4:
        value = (rotated(value ^ word(at, 4) * P1 & MASK, 23) * P2 + P3) & MASK
        at += 4
    for byte in data[at:]:
        value = rotated(value ^ byte * P5 & MASK, 11) * P1 & MASK
    value = (value ^ value >> 33) * P2 & MASK
    value = (value ^ value >> 29) * P3 & MASK
    return value ^ value >> 32


GOLDEN = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"123456789": 0x8CB841DB40E6AE83,
    b"Nobody inspects the spammish repetition": 0xFBCEA83C8A378BF1,
}


def test_ids_of_strings_never_change():
    # From the hash's own specification and its package: models are trained on these ids.
    assert hash_strings(list(GOLDEN)).tolist() == list(GOLDEN.values())
    assert hash_strings(["Brüssel", "東京", "item-0"]).tolist() == [
        naive_xxh64("Brüssel".encode()),
        naive_xxh64("東京".encode()),
        0xBF389BAFE673B250,
    ]


@given(strings=st.lists(st.binary(max_size=100), max_size=12), seed=st.sampled_from([0, 1, MASK]))
def test_the_hash_is_the_published_one(strings, seed):
    assert hash_strings(strings, seed=seed).tolist() == [naive_xxh64(each, seed) for each in strings]


TEXTS = ["a", "", "bcd", "a", "x" * 40]


@pytest.mark.parametrize(
    "values",
    [
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, object),
        [each.encode() for each in TEXTS],
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS, pa.binary()),
        pa.array(["z", *TEXTS, "y"]).slice(1, 5),
        pa.array(TEXTS).dictionary_encode(),
        pa.chunked_array([TEXTS[:2], TEXTS[2:]]),
        pa.chunked_array([pa.array(TEXTS[:2]).dictionary_encode(), pa.array(TEXTS[2:]).dictionary_encode()]),
    ],
    ids=lambda values: type(values).__name__,
)
def test_strings_hash_alike_in_every_form(values):
    assert hash_strings(values).tolist() == [naive_xxh64(each.encode()) for each in TEXTS]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a", None], "1 of 2 strings are null"),
        ([1, 2], "int64"),
        (["a", 1], "no strings"),
        (pa.array([1.5]), "double"),
    ],
)
def test_what_is_no_string_is_refused(values, said):
    with pytest.raises(InvalidRequestError, match=said):
        hash_strings(values)
    with pytest.raises(InvalidRequestError, match="seed=-1"):
        hash_strings(["a"], seed=-1)


# ---- ids in every form ---------------------------------------------------------------------------------------------


class Jagged:
    """What torchrec's JaggedTensor has, as far as batches ask."""

    def __init__(self, values, lengths, weights=None):
        self._parts = values, lengths, weights

    def values(self):
        return self._parts[0]

    def lengths(self):
        return self._parts[1]

    def weights_or_none(self):
        return self._parts[2]


class Keyed:
    """What torchrec's KeyedJaggedTensor has: values and lengths feature after feature."""

    def __init__(self, parts):
        self._parts = parts

    def keys(self):
        return list(self._parts)

    def values(self):
        return torch.cat([each.values() for each in self._parts.values()])

    def lengths(self):
        return torch.cat([each.lengths() for each in self._parts.values()])

    def to_dict(self):
        return self._parts

    def __getitem__(self, key):
        return self._parts[key]


LISTS = [[3, 1], [], [5, 5, 2**63]]
FLAT, LENGTHS, SPLITS = [3, 1, 5, 5, 2**63], [2, 0, 3], [0, 2, 2, 5]
SIGNED = np.array(FLAT, np.uint64).view(np.int64)


def tensor() -> torch.Tensor:
    return torch.from_numpy(SIGNED.copy())


def strided() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that jagged ones are better
        return torch.nested.nested_tensor([tensor()[:2], tensor()[:0], tensor()[2:]])


FORMS: dict[str, Any] = {
    "ragged": Ragged.of(LISTS, np.uint64),
    "ragged of signed": Ragged(SIGNED, np.array(SPLITS)),
    "lists": LISTS,
    "tuples": [tuple(each) for each in LISTS],
    "arrays": [np.array(each, np.uint64) for each in LISTS],
    "tensors": [tensor()[:2], tensor()[:0], tensor()[2:]],
    "an array of lists": np.array([*LISTS, None], object)[:3],
    "lists and none": [LISTS[0], None, LISTS[2]],
    "lists with none": [[3, None, 1], [None], LISTS[2]],
    "values and offsets": (np.array(FLAT, np.uint64), np.array([0, 2, 2])),
    "tensors of values and offsets": (tensor(), torch.tensor([0, 2, 2])),
    "a nested tensor": torch.nested.nested_tensor_from_jagged(tensor(), torch.tensor(SPLITS)),
    "a strided nested tensor": strided(),
    "torchrec": Jagged(tensor(), torch.tensor(LENGTHS)),
    "parts by row_splits": {"values": np.array(FLAT, np.uint64), "row_splits": np.array(SPLITS)},
    "parts by lengths": {"values": tensor(), "lengths": torch.tensor(LENGTHS)},
    "parts by offsets": {"values": FLAT, "offsets": [0, 2, 2]},
    "arrow": pa.array(LISTS, pa.list_(pa.uint64())),
    "large arrow": pa.array(LISTS, pa.large_list(pa.uint64())),
    "viewed arrow": pa.array(LISTS, pa.list_view(pa.uint64())),
    "sliced arrow": pa.array([[9], *LISTS, [9]], pa.list_(pa.uint64())).slice(1, 3),
    "chunked arrow": pa.chunked_array([LISTS[:1], LISTS[1:]], pa.list_(pa.uint64())),
    "arrow with a null": pa.array([LISTS[0], None, LISTS[2]], pa.list_(pa.uint64())),
    "arrow with nulls inside": pa.array([[3, None, 1], [None], LISTS[2]], pa.list_(pa.uint64())),
    "an arrow map": pa.array([[(k, 1.0) for k in each] for each in LISTS], pa.map_(pa.uint64(), pa.float32())),
    "dictionary arrow": pa.ListArray.from_arrays(
        pa.array(SPLITS, pa.int32()), pa.array(FLAT, pa.uint64()).dictionary_encode()
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_ids_are_the_same_in_every_form(form):
    found = arrange({"item": form}, IDS)
    assert found.rows == 3
    assert found.ids["item"].values.dtype == np.uint64
    assert found.ids["item"].tolist() == LISTS


PADDED = [[3, 1, 0], [0, 0, 0], [5, 5, 2**63]]


@pytest.mark.parametrize(
    ("batch", "want"),
    [
        ({"item": np.array(PADDED, np.uint64)}, IdColumn(padding=0)),
        ({"item": torch.from_numpy(np.array(PADDED, np.uint64).view(np.int64))}, IdColumn(padding=0)),
        ({"item": PADDED}, IdColumn(padding=0)),
        ({"item": np.array(PADDED, np.uint64), "n": np.array(LENGTHS)}, IdColumn(lengths="n")),
        ({"item": np.array(FLAT, np.uint64), "n": torch.tensor(LENGTHS)}, IdColumn(lengths="n")),
        ({"item": FLAT, "n": LENGTHS}, IdColumn(lengths="n")),
        ({"goods": LISTS}, IdColumn(column="goods")),
        ({"item": [[3, 1, -1], [-1], LISTS[2]]}, IdColumn(padding=-1)),
    ],
)
def test_padded_flat_and_renamed_ids(batch, want):
    found = arrange(batch, Wanted(ids={"item": want}))
    assert found.ids["item"].tolist() == LISTS
    assert found.rest == {}


@pytest.mark.parametrize(
    "form",
    [
        [3, 5, 7],
        np.array([3, 5, 7], np.int32),
        torch.tensor([3, 5, 7]),
        [torch.tensor(3), torch.tensor(5), torch.tensor(7)],
        pa.array([3, 5, 7]),
        np.array([3, 5, 7], object),
        np.array([[3], [5], [7]]),
        pa.array([[3], [5], [7]], pa.list_(pa.int64(), 1)),
    ],
)
def test_one_id_of_each_sample(form):
    assert arrange({"item": form}, IDS).ids["item"].tolist() == [[3], [5], [7]]


def test_a_missing_single_id_is_none():
    assert arrange({"item": pa.array([3, None, 7])}, IDS).ids["item"].tolist() == [[3], [], [7]]
    assert arrange({"item": [3, None, 7]}, IDS).ids["item"].tolist() == [[3], [], [7]]


@pytest.mark.parametrize(
    "form",
    [
        [["a", "b"], [], ["c"]],
        pa.array([["a", "b"], [], ["c"]]),
        pa.array([["a", None, "b"], None, ["c"]]),
        Ragged(np.array(["a", "b", "c"], object), np.array([0, 2, 2, 3])),
        {"values": ["a", "b", "c"], "lengths": [2, 0, 1]},
        pa.ListArray.from_arrays(pa.array([0, 2, 2, 3], pa.int32()), pa.array(["a", "b", "c"]).dictionary_encode()),
    ],
)
def test_strings_become_their_hashes(form):
    a, b, c = hash_strings(["a", "b", "c"]).tolist()
    assert arrange({"item": form}, IDS).ids["item"].tolist() == [[a, b], [], [c]]
    seeded = arrange({"item": form}, Wanted(ids={"item": IdColumn(seed=7)})).ids["item"]
    assert seeded.values.tolist() == hash_strings(["a", "b", "c"], seed=7).tolist()


@pytest.mark.parametrize("form", [["a", "b"], pa.array(["a", "b"]), np.array(["a", "b"]), np.array(["a", "b"], object)])
def test_one_string_of_each_sample(form):
    assert arrange({"item": form}, IDS).ids["item"].values.tolist() == hash_strings(["a", "b"]).tolist()


@given(lists=st.lists(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4), min_size=1, max_size=6))
def test_all_integers_of_64_bits_are_ids(lists):
    wanted = [[each & MASK for each in row] for row in lists]
    assert arrange({"item": lists}, IDS).ids["item"].tolist() == wanted


def test_offsets_with_their_end_are_known_by_the_other_columns():
    pair = (np.array([1, 2, 3]), np.array([0, 1, 3]))
    assert arrange({"item": pair}, IDS).rows == 3  # as torch.nn.EmbeddingBag has them: the last one is empty
    wanted = Wanted(ids={"item": IdColumn()}, dense={"age": DenseColumn()})
    assert arrange({"item": pair, "age": [1.0, 2.0]}, wanted).ids["item"].tolist() == [[1], [2, 3]]
    assert arrange({"item": pair, "age": [1.0, 2.0, 3.0]}, wanted).ids["item"].tolist() == [[1], [2, 3], []]


# ---- weights -------------------------------------------------------------------------------------------------------

WEIGHTED = {
    "a column of lists": ({"item": LISTS, "w": [[1.0, 2.0], [], [3.0, 4.0, 5.0]]}, IdColumn(weights="w")),
    "a padded column": (
        {"item": np.array(PADDED, np.uint64), "w": np.array([[1, 2, 9], [9, 9, 9], [3, 4, 5.0]])},
        IdColumn(weights="w", padding=0),
    ),
    "flat with lengths": (
        {"item": FLAT, "w": np.array([1, 2, 3, 4, 5.0]), "n": LENGTHS},
        IdColumn(weights="w", lengths="n"),
    ),
    "arrow with nulls": (
        {"item": pa.array([[3, None, 1], None, [5, 5, 2**63]], pa.list_(pa.uint64())), "w": [[1, 9, 2], [], [3, 4, 5]]},
        IdColumn(weights="w"),
    ),
    "torchrec": (
        {"item": Jagged(tensor(), torch.tensor(LENGTHS), torch.tensor([1.0, 2, 3, 4, 5], requires_grad=True))},
        IdColumn(),
    ),
    "an arrow map": (
        {
            "item": pa.array(
                [None, [(3, 1.0), (1, 2.0)], [], [(5, 3.0), (5, 4.0), (2**63, 5.0)]], pa.map_(pa.uint64(), pa.float64())
            ).slice(1)
        },
        IdColumn(),
    ),
    "parts": ({"item": {"values": FLAT, "lengths": LENGTHS, "weights": [1, 2, 3, 4, 5]}}, IdColumn()),
}


@pytest.mark.parametrize(("batch", "want"), WEIGHTED.values(), ids=WEIGHTED)
def test_weights_of_ids_in_every_form(batch, want):
    found = arrange(batch, Wanted(ids={"item": want}))
    assert found.ids["item"].tolist() == LISTS
    assert found.weights["item"].dtype == np.float32
    assert found.weights["item"].tolist() == [1, 2, 3, 4, 5]


# ---- dense values and labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], np.int16),
        torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64),
        [np.array([1, 2]), np.array([3, 4])],
        [torch.tensor([1, 2]), torch.tensor([3, 4])],
        pa.array([[1, 2], [3, 4]]),
        pa.array([[1.0, 2], [3, 4]], pa.list_(pa.float32(), 2)),
        Ragged.of([[1, 2], [3, 4]], np.float32),
    ],
)
def test_dense_values_are_float32_in_every_form(form):
    found = arrange({"x": form}, Wanted(dense={"x": DenseColumn(dim=2)})).dense["x"]
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, 2], [3, 4]]


def test_columns_side_by_side_are_one_feature():
    want = Wanted(dense={"context": DenseColumn(dim=4, columns=("age", "hour", "more"))})
    found = arrange({"age": [1, 2], "hour": pa.array([3, 4]), "more": [[5, 6], [7, 8]]}, want)
    assert found.dense["context"].tolist() == [[1, 3, 5, 6], [2, 4, 7, 8]]


def test_missing_dense_values_are_filled_where_told():
    want = Wanted(dense={"x": DenseColumn(dim=2, fill=-1.0)})
    assert arrange({"x": pa.array([[1.0], None])}, want).dense["x"].tolist() == [[1, -1], [-1, -1]]
    assert arrange({"x": [[1.0, float("nan")]]}, want).dense["x"].tolist() == [[1, -1]]


@pytest.mark.parametrize("lists", [[[1, 2, 3], [4]], [[1, 2, 3], [4, 5, 6]], [[1], [4]], [[1, 2], [4, 5]], [[], [4]]])
@pytest.mark.parametrize("form", [lambda lists: lists, pa.array, lambda lists: Ragged.of(lists, np.float32)])
def test_lists_of_any_length_are_cut_and_filled_where_told(lists, form):
    want = Wanted(dense={"x": DenseColumn(dim=2, fill=0.0, cut=True)})
    fitted = [[*each, 0, 0][:2] for each in lists]
    assert arrange({"x": form(lists)}, want).dense["x"].tolist() == fitted


@pytest.mark.parametrize("width", [1, 2, 3])
def test_arrays_of_any_width_are_cut_and_filled_where_told(width):
    want = Wanted(dense={"x": DenseColumn(dim=2, fill=0.0, cut=True)})
    for form in (np.asarray, torch.tensor):
        found = arrange({"x": form([[1.0] * width])}, want).dense["x"].tolist()
        assert found == [([1] * width + [0])[:2]]


def test_labels_may_be_missing():
    want = Wanted(labels={"click": LabelColumn(low=0, high=1), "buy": LabelColumn(optional=True)})
    found = arrange({"click": pa.array([1.0, None, float("nan"), np.finfo(np.float32).min, 0.0])}, want)
    assert found.labels["click"].tolist() == [1, 0, 0, 0, 0]
    assert found.masks["click"].tolist() == [True, False, False, False, True]
    assert found.masks["buy"].tolist() == [False] * 5
    assert found.labels["buy"].tolist() == [0] * 5


def test_labels_may_stand_in_one_column():
    want = Wanted(labels={"click": LabelColumn(column="label", index=0), "buy": LabelColumn(column="label", index=1)})
    found = arrange({"label": np.array([[1, 0], [0, 1]], np.float32)}, want)
    assert (found.labels["click"].tolist(), found.labels["buy"].tolist()) == ([1, 0], [0, 1])


def test_prediction_asks_for_no_labels():
    found = arrange(
        {"item": [1], "label": [3.0]}, Wanted(ids={"item": IdColumn()}, labels={"y": LabelColumn()}), labels=False
    )
    assert found.labels == {}
    assert found.rest == {"label": [3.0]}


# ---- whole batches -------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    item: Any
    age: Any
    line: Any = None


Pair = namedtuple("Pair", ["item", "age", "line"])
WHOLE = Wanted(ids={"item": IdColumn()}, dense={"age": DenseColumn()})


@pytest.mark.parametrize(
    "batch",
    [
        {"item": LISTS, "age": [1, 2, 3], "line": "x"},
        Sample(LISTS, [1, 2, 3], "x"),
        Pair(LISTS, [1, 2, 3], "x"),
        {
            "sparse": Keyed({"item": Jagged(tensor(), torch.tensor(LENGTHS))}),
            "age": torch.tensor([1, 2, 3]),
            "line": "x",
        },
        {"inner": Sample(LISTS, [1, 2, 3], "x")},
    ],
)
def test_a_batch_in_any_container(batch):
    found = arrange(batch, WHOLE)
    assert found.ids["item"].tolist() == LISTS
    assert found.dense["age"].tolist() == [[1], [2], [3]]
    assert found.rest == {"line": "x"}


@pytest.mark.parametrize("make", [pa.table, pa.record_batch])
def test_arrow_batches(make):
    columns = {
        "item": pa.array(LISTS, pa.list_(pa.uint64())),
        "age": pa.array([1, 2, 3]),
        "more": pa.array(["a", "b", "c"]),
    }
    found = arrange(make(columns), WHOLE)
    assert found.ids["item"].tolist() == LISTS
    assert found.dense["age"].tolist() == [[1], [2], [3]]
    assert list(found.rest) == ["more"]


def test_a_keyed_jagged_tensor_alone_is_a_batch():
    assert list(columns_of(Keyed({"a": Jagged(tensor(), torch.tensor(LENGTHS))}))) == ["a"]


@pytest.mark.parametrize(
    ("batch", "wanted", "said"),
    [
        ([1, 2], IDS, "a batch is a list of 2, whose columns have no names"),
        (7, IDS, "a batch is a int, not a mapping"),
        ({"itme": [1]}, IDS, "feature 'item': a batch has no 'item', but 'itme'; do you mean 'itme'?"),
        ({"item": [1.5]}, IDS, "feature 'item': ids are float64"),
        ({"item": pa.array([1.5])}, IDS, "feature 'item': ids are integers or strings; values are double"),
        ({"item": np.zeros((2, 2, 2), int)}, IDS, "has shape"),
        ({"item": {"values": [1, 2]}}, IDS, "neither row_splits nor offsets nor lengths"),
        ({"item": {"values": [1, 2], "lengths": [1]}}, IDS, "lengths add up to 1, there are 2 values"),
        ({"item": {"values": [1, 2], "row_splits": [0, 1]}}, IDS, "row_splits [0, 1] do not rise from 0 to 2"),
        ({"item": (np.array([1, 2]), np.array([1]))}, IDS, "offsets [1, 2] do not rise from 0 to 2"),
        ({"item": (np.array([1, 2]), np.array([0.5]))}, IDS, "offsets must be integers"),
        ({"item": LISTS, "age": [1, 2]}, WHOLE, "feature 'item' has 3 samples, feature 'age' has 2"),
        ({"item": LISTS, "w": [[1.0], [], []]}, Wanted(ids={"item": IdColumn(weights="w")}), "not as many as its ids"),
        ({"x": [[1, 2]]}, Wanted(dense={"x": DenseColumn(dim=3)}), "2 values of each sample, dim=3"),
        ({"x": pa.array([[1, 2]])}, Wanted(dense={"x": DenseColumn(dim=1)}), "sample 0 of the batch has 2 values"),
        (
            {"x": [1.0, float("nan")]},
            Wanted(dense={"x": DenseColumn()}),
            "sample 1 of the batch has [nan]; give a fill",
        ),
        ({"x": ["a"]}, Wanted(dense={"x": DenseColumn()}), "feature 'x'"),
        ({"x": {"values": [1.0, 2.0], "lengths": [2, 0]}}, Wanted(dense={"x": DenseColumn(dim=2)}), "give a fill"),
        (
            {"y": [0, 2]},
            Wanted(labels={"y": LabelColumn(low=0, high=1)}),
            "label 'y': sample 1 of the batch has 2, outside 0..1",
        ),
        ({"y": [[0, 1]]}, Wanted(labels={"y": LabelColumn()}), "2 numbers of each sample; say which with index"),
        ({"y": [[0, 1]]}, Wanted(labels={"y": LabelColumn(index=2)}), "index=2 is outside 0..1"),
        ({"a": 1}, Wanted(labels={"y": LabelColumn()}), "label 'y': a batch has no 'y', but 'a'"),
        ({"p": Sample(1, 2), "q": Sample(1, 2)}, IDS, "two columns of a batch are called 'item'"),
    ],
)
def test_a_bad_batch_is_one_line_that_names_the_column(batch, wanted, said):
    with pytest.raises(InvalidRequestError) as error:
        arrange(batch, wanted)
    assert said in str(error.value)
    assert "\n" not in str(error.value)

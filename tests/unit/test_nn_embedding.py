"""Embedding modules against torch's own, on a cluster in a dict."""

from __future__ import annotations

import sys
import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import trilith
from tests.unit.nn_fakes import FakeClient
from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.nn import (
    Bridge,
    EmbeddingBag,
    EmbeddingCollection,
    EmbeddingRows,
    Feature,
    FirstN,
    as_bags,
    pick_device,
    to_kjt,
)
from trilith.ops.ragged import Ragged
from trilith.ops.strings import hash_strings

VOCABULARY, DIM = 11, 3


def filled(**dims: int) -> FakeClient:
    client = FakeClient(dims or {"t": DIM})
    rng = np.random.default_rng(5)
    for table, dim in client.dims.items():
        for one in range(VOCABULARY):
            client.rows[table, one] = rng.standard_normal(dim).astype(np.float32)
    return client


def weights(client: FakeClient, table: str = "t") -> torch.Tensor:
    return torch.from_numpy(np.array([client.rows[table, one] for one in range(VOCABULARY)]))


def ragged(lengths: list[int], seed: int) -> Ragged:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths)).astype(np.uint64)
    return Ragged(ids, np.cumsum([0, *lengths], dtype=np.int64))


lengths_lists = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(lengths=lengths_lists, seed=st.integers(0, 99), mode=st.sampled_from(["sum", "mean"]))
def test_sum_and_mean_are_those_of_torch_in_values_and_gradients(lengths, seed, mode):
    client, bags = filled(), ragged(lengths, seed)
    want = nn.EmbeddingBag(VOCABULARY, DIM, mode=mode, _weight=weights(client).clone())
    factor = torch.randn(len(lengths), DIM, generator=torch.Generator().manual_seed(seed))

    out = EmbeddingBag(client.table("t"), combiner=mode)(bags)
    expected = want(torch.from_numpy(bags.values.view(np.int64)), torch.from_numpy(bags.row_splits[:-1]))
    torch.testing.assert_close(out, expected)

    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(weights(client), want.weight.detach() - want.weight.grad)


@given(lengths=lengths_lists, seed=st.integers(0, 99))
def test_sqrtn_is_the_sum_over_the_root_of_the_count(lengths, seed):
    client, bags = filled(), ragged(lengths, seed)
    before = weights(client).clone().requires_grad_()
    out = EmbeddingBag(client.table("t"), combiner="sqrtn")(bags)
    expected = torch.stack(
        [
            before[bags.values[start:stop].astype(np.int64)].sum(0) / max(stop - start, 1) ** 0.5
            for start, stop in zip(bags.row_splits[:-1], bags.row_splits[1:], strict=True)
        ]
    )
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(weights(client), before.detach() - before.grad, rtol=1e-4, atol=1e-5)


@given(lengths=lengths_lists, seed=st.integers(0, 99), n=st.integers(1, 3))
def test_first_n_keeps_rows_side_by_side_and_steps_only_those(lengths, seed, n):
    client, bags = filled(), ragged(lengths, seed)
    before = weights(client).clone()
    out = EmbeddingBag(client.table("t"), combiner=FirstN(n))(bags)
    assert out.shape == (len(lengths), n, DIM)
    change = torch.zeros_like(before)
    for i, start in enumerate(bags.row_splits[:-1]):
        for place in range(n):
            if place < lengths[i]:
                one = int(bags.values[start + place])
                torch.testing.assert_close(out[i, place], before[one])
                change[one] += 1
            else:
                assert not out[i, place].any()
    out.sum().backward()
    torch.testing.assert_close(weights(client), before - change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", FirstN(2)])
def test_empty_bags_and_empty_batches_give_zeros(combiner):
    client = filled()
    bag = EmbeddingBag(client.table("t"), combiner=combiner)
    out = bag(ragged([0, 0], 1))
    assert out.shape[0] == 2
    assert not out.any()
    out.sum().backward()
    assert bag(np.empty((0, 3), np.int64)).shape[0] == 0


def test_every_form_of_ids_means_the_same():
    ids = np.array([3, 1, 4, 1, 5, 9], np.int64)
    want = as_bags(Ragged(ids.view(np.uint64), np.array([0, 2, 2, 6])))
    padded = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [4, 1, 5, 9]])
    for got in (
        as_bags(torch.from_numpy(ids), torch.tensor([0, 2, 2])),
        as_bags((torch.from_numpy(ids), torch.tensor([0, 2, 2]))),
        as_bags((ids, np.array([0, 2, 2]))),
        as_bags(ids, row_splits=np.array([0, 2, 2, 6])),
        as_bags(ids.astype(np.int32), lengths=np.array([2, 0, 4])),
        as_bags(padded, lengths=torch.tensor([2, 0, 4])),
        as_bags(want.torch_nested()),
        as_bags(Ragged(ids.astype(np.int32), np.array([0, 2, 2, 6]))),
    ):
        np.testing.assert_array_equal(got.values, want.values)
        np.testing.assert_array_equal(got.lengths, want.lengths)
    assert as_bags(np.array([-1])).values[0] == 2**64 - 1


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (np.array([1.5]), {}),
        (np.zeros((2, 2, 2), np.int64), {}),
        (np.array([1, 2]), {"offsets": np.array([1])}),
        (np.array([1, 2]), {"offsets": np.array([0, 3])}),
        (np.array([1, 2]), {"row_splits": np.array([0, 1])}),
        (np.array([1, 2]), {"lengths": np.array([3])}),
        (np.array([1, 2]), {"lengths": np.array([2]), "offsets": np.array([0])}),
        (np.array([[1, 2]]), {"lengths": np.array([3])}),
        (np.array([[1, 2]]), {"offsets": np.array([0])}),
        (Ragged.of_singles([1]), {"offsets": np.array([0])}),
        (Ragged(np.arange(3), np.array([0, 2, 1, 3])), {}),
        ([[1], [2.5, 3]], {}),
        ((np.array([1, 2, 3]), np.array([1, 2])), {}),
        ((np.array([1, 2, 3]), np.array([0, 1])), {"offsets": np.array([0, 1])}),
    ],
)
def test_ids_that_are_no_bags_are_refused(ids, options):
    with pytest.raises(InvalidRequestError):
        as_bags(ids, **options)


@pytest.mark.parametrize("ids", [[5, 2**63 + 9], (5, 2**63 + 9), np.array([5, 2**63 + 9], object)], ids=repr)
def test_pythons_ids_keep_all_bits(ids):
    assert as_bags(ids).values.tolist() == [5, 2**63 + 9]
    assert as_bags([ids, ids]).values.tolist() == [5, 2**63 + 9] * 2


def test_an_unknown_combiner_is_refused():
    with pytest.raises(InvalidRequestError, match="median"):
        EmbeddingBag(filled().table("t"), combiner="median")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError):
        FirstN(0)


def test_embedding_keeps_the_shape_of_the_ids_and_sums_gradients_of_repeats():
    client = filled()
    before = weights(client).clone()
    out = EmbeddingRows(client.table("t"))(torch.tensor([[1, 2], [1, 1]]))
    assert out.shape == (2, 2, DIM)
    out.sum().backward()
    torch.testing.assert_close(weights(client)[1], before[1] - 3)
    torch.testing.assert_close(weights(client)[2], before[2] - 1)


def collection(client: FakeClient) -> EmbeddingCollection:
    one, two = client.table("one"), client.table("two")
    features = {"a": Feature(one), "b": Feature(two, FirstN(2)), "c": Feature(one, "sum"), "d": Feature(two, "sqrtn")}
    return EmbeddingCollection(client, features)


def test_a_collection_looks_all_tables_up_at_once_and_pushes_all_gradients_at_once():
    client = filled(one=2, two=4)
    batch = {name: ragged([1, 2, 0], seed) for seed, name in enumerate("abcd")}
    alone = filled(one=2, two=4)
    singles = {
        "a": EmbeddingBag(alone.table("one")),
        "b": EmbeddingBag(alone.table("two"), combiner=FirstN(2)),
        "c": EmbeddingBag(alone.table("one"), combiner="sum"),
        "d": EmbeddingBag(alone.table("two"), combiner="sqrtn"),
    }
    got = collection(client)(batch)
    want = {name: module(batch[name]) for name, module in singles.items()}
    assert list(got) == list("abcd")
    for name in got:
        torch.testing.assert_close(got[name], want[name])
    sum(out.square().sum() for out in got.values()).backward()
    sum(out.square().sum() for out in want.values()).backward()
    assert client.calls == ["lookup", "apply_gradients"]
    for table in ("one", "two"):
        torch.testing.assert_close(weights(client, table), weights(alone, table))


def test_a_feature_that_took_no_part_in_the_loss_is_not_pushed():
    client = filled(one=2, two=4)
    before = weights(client, "two").clone()
    out = collection(client)({name: ragged([2, 1], 3) for name in "abcd"})
    out["a"].sum().backward()
    torch.testing.assert_close(weights(client, "two"), before)


def test_stacked_features_stand_in_order():
    client = filled()
    features = {name: Feature(client.table("t")) for name in ("x", "y")}
    modules = EmbeddingCollection(client, features)
    batch = {"x": Ragged.of_singles([1, 2, 3]), "y": ragged([0, 2, 1], 7)}
    stacked, apart = modules.stacked(batch), modules(batch)
    assert stacked.shape == (3, 2, DIM)
    torch.testing.assert_close(stacked[:, 1], apart["y"])
    mixed = collection(filled(one=2, two=4))
    with pytest.raises(InvalidRequestError, match="stacked"):
        mixed.stacked({name: ragged([1], 0) for name in "abcd"})


def test_a_batch_with_other_features_or_sizes_is_refused():
    modules = collection(filled(one=2, two=4))
    with pytest.raises(InvalidRequestError, match="features"):
        modules({"a": ragged([1], 0)})
    sizes = {"a": [1], "b": [1], "c": [1, 1], "d": [1]}
    with pytest.raises(InvalidRequestError, match="number of samples"):
        modules({name: ragged(lengths, 0) for name, lengths in sizes.items()})


def test_accumulated_gradients_travel_as_one_step():
    client = filled()
    before = weights(client).clone()
    bag = EmbeddingBag(client.table("t"), combiner="sum")
    with bag.accumulate():
        for _ in range(2):
            bag(Ragged.of_singles([4])).sum().backward()
        torch.testing.assert_close(weights(client), before)
    assert client.calls.count("apply_gradients") == 1
    torch.testing.assert_close(weights(client)[4], before[4] - 2)


def test_nothing_is_sent_when_accumulation_ends_in_an_error():
    client = filled()
    bag = EmbeddingBag(client.table("t"))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the error must come after the push
        with bag.accumulate():
            bag(Ragged.of_singles([4])).sum().backward()
            raise ZeroDivisionError
    assert "apply_gradients" not in client.calls


def test_an_error_of_the_cluster_surfaces_from_backward_with_its_class():
    client = filled()
    out = EmbeddingBag(client.table("t"))(Ragged.of_singles([1]))

    def refuse(updates):
        raise NonFiniteError("row 0 is nan")

    client.apply_gradients = refuse  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="row 0"):
        (out * float("nan")).sum().backward()


def test_without_gradients_nothing_is_pushed():
    client = filled()
    bag = EmbeddingBag(client.table("t"))
    with torch.no_grad():
        assert not bag(Ragged.of_singles([1])).requires_grad
    bag.trainable = False
    assert not bag(Ragged.of_singles([1])).requires_grad


def test_missing_rows_are_created_before_the_first_lookup_answers():
    client = FakeClient({"t": DIM}, initial=0.5)
    bag = EmbeddingBag(client.table("t"), init_missing=True)
    out = bag(Ragged.of_singles([7, 7, 8]))
    assert (out == 0.5).all()
    bag(Ragged.of_singles([7, 8]))
    assert client.calls == ["lookup", "assign_add", "lookup", "lookup"]


def test_the_pinned_path_of_a_cuda_device_gives_the_same_numbers():
    """What a CUDA device runs, on the CPU: staging buffers from `allocate`, and a wait before the host reads."""
    made, waited = [], []

    def allocate(shape):
        made.append(shape)
        return torch.empty(shape)

    bridge = Bridge(torch.device("cpu"), pinned=True, allocate=allocate, synchronize=waited.append)
    plain, pinned = filled(), filled()
    for client, options in ((plain, {}), (pinned, {"bridge": bridge})):
        out = EmbeddingBag(client.table("t"), combiner="mean", **options)(ragged([2, 0, 3], 1))
        out.square().sum().backward()
    torch.testing.assert_close(weights(plain), weights(pinned))
    assert (5, DIM) in made
    assert waited == [torch.device("cpu")]


def test_a_read_only_lookup_is_copied_before_torch_sees_it():
    rows = np.ones((2, 2), np.float32)
    rows.setflags(write=False)
    assert Bridge(torch.device("cpu")).to_device(rows).tolist() == [[1, 1], [1, 1]]


def test_devices_are_picked_or_refused():
    assert pick_device("cpu").type == "cpu"
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InvalidRequestError):
        pick_device("no-such-device")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequestError, match="no CUDA"):
            EmbeddingBag(filled().table("t"), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_numbers_of_the_cpu():
    cpu, cuda = filled(), filled()
    for client, device in ((cpu, "cpu"), (cuda, "cuda")):
        out = EmbeddingBag(client.table("t"), combiner="sqrtn", device=device)(ragged([2, 0, 3], 1))
        assert out.device.type == device
        out.square().sum().backward()
    torch.testing.assert_close(weights(cpu), weights(cuda))


def test_a_table_where_a_feature_is_due_is_refused():
    with trilith.connect("local://") as client:
        table = client.table("t", dim=2)
        with pytest.raises(InvalidRequestError, match=r"feature 'x' is a Table; write Feature\(table"):
            EmbeddingCollection(client, {"x": table})


def test_a_table_of_another_cluster_is_refused():
    with trilith.connect("local://") as one, trilith.connect("local://") as other:
        table = other.table("t", dim=DIM)
        one.table("t", dim=DIM)
        with pytest.raises(InvalidRequestError, match="feature 'a': table 't' is of another client"):
            EmbeddingCollection(one, {"a": Feature(table)})
        one.opened_by = other.opened_by = (trilith.connect, ("static://127.0.0.1:1",))
        EmbeddingCollection(one, {"a": Feature(table)})


class Keyed:
    """torchrec's KeyedJaggedTensor, as its documentation has it: values and lengths of key after key."""

    def __init__(self, keys, values, weights=None, lengths=None):
        self._keys, self._values, self._weights, self._lengths = keys, values, weights, lengths

    @staticmethod
    def from_lengths_sync(keys, values, lengths, weights=None):
        return Keyed(keys, values, weights, lengths)

    def keys(self):
        return self._keys

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def weights_or_none(self):
        return self._weights

    def to_dict(self):
        lengths = self._lengths.view(len(self._keys), -1)
        sizes = lengths.sum(1).tolist()
        weights = [None] * len(sizes) if self._weights is None else self._weights.split(sizes)
        parts = zip(self._keys, self._values.split(sizes), lengths, weights, strict=True)
        return {key: Jagged(values, each, own) for key, values, each, own in parts}


class Jagged:
    """torchrec's JaggedTensor."""

    def __init__(self, values, lengths, weights):
        self._parts = values, lengths, weights

    def values(self):
        return self._parts[0]

    def lengths(self):
        return self._parts[1]

    def weights_or_none(self):
        return self._parts[2]


@pytest.fixture
def torchrec(monkeypatch):
    for name in ("torchrec", "torchrec.sparse", "torchrec.sparse.jagged_tensor"):
        module = types.ModuleType(name)
        module.KeyedJaggedTensor = Keyed
        monkeypatch.setitem(sys.modules, name, module)


def test_a_keyed_jagged_tensor_goes_in_and_out(torchrec):
    client = filled(one=DIM, two=DIM)
    features = {"a": Feature(client.table("one"), "sum"), "b": Feature(client.table("two"), "sum")}
    ids = {"a": [[1, 2], [], [3]], "b": np.array([4, 2**63 + 1, 6], np.uint64)}
    plain = to_kjt(ids)
    assert plain.keys() == ["a", "b"]
    assert plain.values().tolist() == [1, 2, 3, 4, -(2**63) + 1, 6]
    assert plain.lengths().tolist() == [2, 0, 1, 1, 1, 1]
    assert plain.weights_or_none() is None
    want = EmbeddingCollection(client, features)({"a": ids["a"], "b": ids["b"]})
    for name, vectors in EmbeddingCollection(client, features)(plain).items():
        torch.testing.assert_close(vectors, want[name], rtol=0, atol=0)
    weighted = to_kjt(ids, weights={"a": [0.5, 2.0, 3.0]})
    assert weighted.weights_or_none().tolist() == [0.5, 2.0, 3.0, 1.0, 1.0, 1.0]
    found = EmbeddingCollection(client, features)(weighted)["a"]
    rows = weights(client, "one")
    torch.testing.assert_close(found, torch.stack([rows[1] / 2 + rows[2] * 2, torch.zeros(DIM), rows[3] * 3]))


def test_a_keyed_jagged_tensor_that_cannot_be_made_is_refused(torchrec, monkeypatch):
    with pytest.raises(InvalidRequestError, match=r"differ in their number of samples: \{'a': 2, 'b': 1\}"):
        to_kjt({"a": [1, 2], "b": [1]})
    with pytest.raises(InvalidRequestError, match="weights of \\['c'\\], which are no keys"):
        to_kjt({"a": [1, 2]}, weights={"c": [1.0]})
    with pytest.raises(InvalidRequestError, match=r"key 'a': 2 ids have weights \[1\]"):
        to_kjt({"a": [1, 2]}, weights={"a": [1.0]})
    monkeypatch.setitem(sys.modules, "torchrec.sparse.jagged_tensor", None)
    with pytest.raises(InvalidRequestError, match="which is not here"):
        to_kjt({"a": [1]})


def test_what_a_batch_of_a_task_may_be_a_module_takes():
    a, b = hash_strings(["a", "b"]).tolist()
    for words in (["a", "b"], pa.array(["a", "b"]), np.array(["a", "b"])):
        assert as_bags(words).tolist() == [[a], [b]]
    assert as_bags([[1, 2], None, [3]]).tolist() == [[1, 2], [], [3]]
    assert as_bags(pa.array([[1], None, [2, 3]])).tolist() == [[1], [], [2, 3]]
    assert as_bags({"values": [1, 2, 3], "lengths": [1, 2]}).tolist() == [[1], [2, 3]]


def test_the_largest_is_learned_beside_other_views_of_a_table():
    client = filled()
    before = weights(client).clone()
    table = client.table("t")
    features = {"sum": Feature(table, "sum"), "max": Feature(table, "max"), "mean": Feature(table, "mean")}
    found = EmbeddingCollection(client, features)({"sum": [[1], [2]], "max": [[3, 4], []], "mean": [[5, 6], [7]]})
    torch.testing.assert_close(found["max"], torch.stack([torch.maximum(before[3], before[4]), torch.zeros(DIM)]))
    torch.testing.assert_close(found["mean"], torch.stack([(before[5] + before[6]) / 2, before[7]]))
    found["max"].sum().backward()
    moved = before - weights(client)
    torch.testing.assert_close(moved[3], (before[3] >= before[4]).float())
    torch.testing.assert_close(moved[4], (before[3] < before[4]).float())
    assert not moved[[1, 2, 5, 6, 7]].any()

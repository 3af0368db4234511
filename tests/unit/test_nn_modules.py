"""Modules of embeddings in the hands of torch: moved, frozen, copied, compiled, evaluated, given to optimizers."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import trilith
from tests.unit.nn_fakes import FakeClient
from trilith.errors import InvalidRequestError, ShardRestartedError
from trilith.features import FeatureRegistry, FeatureSlotConfig
from trilith.nn import DenseOnPs, EmbeddingBag, EmbeddingCollection, EmbeddingRows, Feature
from trilith.tables import Adagrad, RandomUniform, Sgd, Zeros

DIM = 3


class Model(nn.Module):
    """Two features of one table and a dense part."""

    def __init__(self, client, **options):
        super().__init__()
        table = client.table("t")
        self.embeddings = EmbeddingCollection(client, {"a": Feature(table), "b": Feature(table, "sum")}, **options)
        self.head = nn.Linear(2 * DIM, 1)

    def forward(self, batch):
        vectors = self.embeddings(batch)
        return self.head(torch.cat([vectors["a"], vectors["b"]], 1))[:, 0]


BATCH = {"a": np.array([[1, 2], [3, 1]]), "b": np.array([5, 6])}
IDS = (1, 2, 3, 5, 6)


@pytest.fixture
def client():
    fake = FakeClient({"t": DIM}, initial=0.25)
    for one in IDS:
        fake.rows["t", one] = np.full(DIM, one, np.float32)
    return fake


def values(client):
    return {one: client.rows["t", one].copy() for one in IDS}


def unchanged(client, before):
    return all((client.rows["t", one] == row).all() for one, row in before.items())


# ---- freezing and evaluating -----------------------------------------------------------------------------------------


def by_module(model):
    model.requires_grad_(False)


def by_embeddings(model):
    model.embeddings.requires_grad_(False)


def by_parameters(model):
    for parameter in model.embeddings.parameters():
        parameter.requires_grad = False


def by_eval(model):
    model.eval()


@pytest.mark.parametrize("freeze", [by_module, by_embeddings, by_parameters, by_eval])
def test_frozen_rows_are_not_stepped_and_thawed_ones_are(client, freeze):
    model = Model(client)
    before = values(client)
    freeze(model)
    model.head.requires_grad_()
    model(BATCH).sum().backward()
    assert unchanged(client, before)
    assert model.head.weight.grad is not None
    model.train().requires_grad_()
    model(BATCH).sum().backward()
    assert not unchanged(client, before)


def test_gradients_with_respect_to_vectors_can_be_asked_for_while_evaluating(client, caplog):
    """As saliency maps do."""
    bag = EmbeddingBag(client.table("t")).eval()
    before = values(client)
    vectors = bag(np.array([[1, 2]]))
    vectors.retain_grad()
    for _ in range(2):
        vectors.square().sum().backward(retain_graph=True)
    assert vectors.grad.abs().sum() > 0
    assert unchanged(client, before)
    assert [record.message for record in caplog.records if "eval mode" in record.message] == [
        "a backward pass of embeddings in eval mode steps no rows"
    ]


def evaluated(model, batch):
    model.eval()
    return model(batch)


def without_grad(model, batch):
    with torch.no_grad():
        return model(batch)


def inference(model, batch):
    with torch.inference_mode():
        return model(batch)


def frozen(model, batch):
    model.requires_grad_(False)
    return model(batch)


def prefetched_without_grad(model, batch):
    with torch.no_grad(), model.embeddings.prefetch([batch], 1, ids=lambda each: each) as batches:
        ((_, fetched),) = batches
        return model(fetched.result())


def prefetched_while_evaluating(model, batch):
    model.eval()
    with model.embeddings.prefetch([batch], 1, ids=lambda each: each) as batches:
        ((_, fetched),) = batches
        return model(fetched.result())


@pytest.mark.parametrize(
    "use", [evaluated, without_grad, inference, frozen, prefetched_without_grad, prefetched_while_evaluating]
)
def test_only_training_creates_missing_rows(client, use):
    model = Model(client, init_missing=True)
    unseen = {"a": np.array([[100, 101], [102, 103]]), "b": np.array([104, 105])}
    known = set(client.rows)
    use(model, unseen)
    assert set(client.rows) == known
    model.train().requires_grad_()(unseen)
    assert set(client.rows) == known | {("t", one) for one in range(100, 106)}


# ---- moving ----------------------------------------------------------------------------------------------------------


def test_to_moves_the_vectors(client):
    model = Model(client)
    assert model.embeddings(BATCH)["a"].device.type == "cpu"
    model.to("meta")
    assert {each.device.type for each in model.embeddings(BATCH).values()} == {"meta"}
    assert EmbeddingRows(client.table("t")).to("meta")(np.array([1])).device.type == "meta"


def test_a_model_in_bfloat16_computes_in_it_and_steps_its_rows(client):
    model = Model(client).to(torch.bfloat16)
    before = values(client)
    logits = model(BATCH)
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert not unchanged(client, before)


# ---- copying and saving ----------------------------------------------------------------------------------------------


def test_a_copy_of_a_model_looks_at_the_same_rows(client):
    model = Model(client, async_push=1)
    model(BATCH).sum().backward()
    model.embeddings.drain()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(BATCH), model(BATCH))
    assert twin.embeddings.exchange.client is client
    assert twin.embeddings.exchange.pusher is not model.embeddings.exchange.pusher
    assert twin.head.weight is not model.head.weight
    before = values(client)
    twin(BATCH).sum().backward()
    twin.embeddings.drain()
    assert not unchanged(client, before)
    twin.embeddings.close()
    model.embeddings.close()


def test_an_average_of_models_averages_the_dense_part(client):
    model = Model(client)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.head.weight += 2
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.head.weight, model.head.weight - 1)
    assert averaged(BATCH).shape == (2,)


def test_an_embedded_cluster_is_shared_by_copies_too():
    with trilith.connect("local://") as client:
        table = client.table("t", dim=DIM, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        bag = EmbeddingBag(table)
        twin = copy.deepcopy(nn.Sequential(bag))
        bag(np.array([1])).sum().backward()
        torch.testing.assert_close(twin(np.array([1])), torch.full((1, DIM), -1.0))


def test_an_embedded_cluster_is_not_pickled():
    with trilith.connect("local://") as client:
        bag = EmbeddingBag(client.table("t", dim=DIM))
        with pytest.raises(InvalidRequestError, match="in this process.*state_dict"):
            ForkingPickler.dumps(bag)


def test_credentials_are_not_pickled():
    with trilith.connect("local://") as client:
        client.opened_by = (trilith.connect, ("zk://me:secret@zk1/path",))
        with pytest.raises(InvalidRequestError, match=r"zk://\*\*\*@zk1/path.*auth_file") as caught:
            ForkingPickler.dumps(client)
        assert "secret" not in str(caught.value)


def test_a_state_dict_holds_the_dense_part_alone(client):
    model = Model(client)
    state = model.state_dict()
    assert set(state) == {"head.weight", "head.bias"}
    Model(client).load_state_dict(state)
    with pytest.raises(RuntimeError, match="head.bias"):
        Model(client).load_state_dict({"head.weight": state["head.weight"]})


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_over_all_parameters_leave_rows_to_the_cluster(client, optimizer):
    model = Model(client)
    steps = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    before = values(client)
    model(BATCH).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))
    stepped = values(client)
    steps.step()
    assert not unchanged(client, before)
    assert unchanged(client, stepped)
    assert model.embeddings.anchor.item() == 0


def test_data_parallel_training_takes_a_model_with_embeddings(client, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model(client))
        for _ in range(3):
            model(BATCH).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    weight = model.module.head.weight.detach().numpy()[0]
    mean, summed = weight[:DIM], weight[DIM:]
    np.testing.assert_allclose(client.rows["t", 1], 1 - 3 * (mean / 2 + mean / 2), rtol=1e-5)
    np.testing.assert_allclose(client.rows["t", 5], 5 - 3 * summed, rtol=1e-5)


def test_the_anchor_is_no_variable_of_the_cluster(client):
    DenseOnPs(client, Model(client), None)
    assert set(client.variables) == {"dense/head.weight", "dense/head.bias"}


# ---- compiling -------------------------------------------------------------------------------------------------------


# torch itself looks at `.grad` of what it compiles, and hides the warning in a way that errors do not pass.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_keep_lookups_outside_of_their_graphs(client):
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    model = Model(client)
    wanted = model(BATCH).detach()
    compiled = torch.compile(model, backend=backend)
    try:
        for size in (2, 2, 2, 2):
            batch = {name: ids[:size] for name, ids in BATCH.items()}
            found = compiled(batch)
        torch.testing.assert_close(found, wanted)
        assert len(graphs) == 1  # the head's: once, for all batches
        before = values(client)
        found.sum().backward()
        assert not unchanged(client, before)
    finally:
        torch._dynamo.reset()


# ---- rows that were fetched, and gradients that were not sent --------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
def test_fetched_rows_that_are_used_twice_are_the_same_twice(client, width):
    table = client.table("t")
    collection = EmbeddingCollection(client, {"a": Feature(table)})
    fetched = collection.fetch({"a": np.array([[1, 2], [3, 5]])[:, :width]})
    first = collection(fetched)["a"]
    wanted = first.detach().clone()
    with torch.no_grad():
        first += 100
    torch.testing.assert_close(collection(fetched)["a"], wanted)


def test_gradients_whose_push_failed_are_not_in_the_next_one():
    client = FakeClient({})
    module = nn.Linear(2, 1)
    dense = DenseOnPs(client, module, None)
    sent = []

    def apply(gradients, *, learning_rate=None):
        sent.append({name: each.copy() for name, each in gradients.items()})
        if len(sent) == 1:
            raise ShardRestartedError("shard 0 restarted")

    client.apply_dense_gradients = apply
    for failing in (True, False):
        module(torch.ones(1, 2)).sum().backward()
        if failing:
            with pytest.raises(ShardRestartedError):
                dense.step()
            assert module.weight.grad is None
        else:
            dense.step()
    assert sent[1]["dense/bias"].tolist() == [1.0]


# ---- two models on one cluster ---------------------------------------------------------------------------------------


def test_two_modules_do_not_share_variables_by_accident():
    client = FakeClient({})
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    DenseOnPs(client, first, None)
    with pytest.raises(InvalidRequestError, match=r"'dense/weight' is a parameter of another module.*prefix='second/'"):
        DenseOnPs(client, second, None)
    DenseOnPs(client, second, None, prefix="second/")
    assert {"dense/weight", "second/weight"} <= client.variables.keys()
    DenseOnPs(client, nn.Linear(2, 1), None, prefix="dense/")  # in so many words
    DenseOnPs(client, first, None)  # the same module again
    DenseOnPs(FakeClient({}), second, None)  # another cluster


def test_a_name_is_free_when_its_module_is_done():
    client = FakeClient({})
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    DenseOnPs(client, first, None).close()
    DenseOnPs(client, second, None)


# ---- models written against features ---------------------------------------------------------------------------------


def slot(registry, number, **options):
    made = registry.create_feature_slot(
        FeatureSlotConfig(
            slot_id=number,
            default_vec_initializer=RandomUniform(-1, 1),
            default_vec_optimizer=Adagrad(learning_rate=0.1),
            **options,
        )
    )
    made.add_feature_slice(2)
    return registry.create_feature_column(made, f"f{number}")


def test_slots_that_share_tables_keep_their_seeds():
    registry = FeatureRegistry()
    for number, seed in ((1, 99), (2, 99), (3, 7), (4, None), (5, None)):
        slot(registry, number, seed=seed)
    specs, table_of = registry.merged_table_specs()
    seeds = {spec.name: spec.proto.seed for spec in specs}
    assert [seeds[table_of[str(number)]] for number in (1, 2, 3)] == [99, 99, 7]
    assert table_of["1"] == table_of["2"] != table_of["3"]
    assert table_of["4"] == table_of["5"]
    alone = FeatureRegistry()
    slot(alone, 4)
    (spec,), _ = alone.merged_table_specs()
    assert spec.proto.seed == seeds[table_of["4"]]  # whoever else is there

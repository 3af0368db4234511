"""Clients, tables and modules that go to other processes: by pickle, `torch.save` and spawn."""

from __future__ import annotations

import io
import multiprocessing
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn

from tests.congruence.clusters import LocalCluster
from trilith.nn import EmbeddingBag, EmbeddingCollection, Feature
from trilith.tables import Sgd, Zeros

IDS = np.arange(6, dtype=np.uint64)


@pytest.fixture(params=["1-ps", "3-ps"])
def client(request):
    with LocalCluster(request.param) as cluster, cluster.connect() as client:
        yield client


@pytest.fixture
def table(client):
    table = client.table("t", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
    table.assign(IDS, np.arange(12, dtype=np.float32).reshape(6, 2))
    return table


def test_a_pickled_table_is_the_same_table_by_a_client_of_its_own(table):
    again = ForkingPickler.loads(ForkingPickler.dumps(table))
    with again.client:
        assert again.client is not table.client
        for handle in (table, again, table, again):
            handle.apply_gradients(IDS, np.ones((6, 2), np.float32))
    np.testing.assert_array_equal(table.lookup(IDS), np.arange(12).reshape(6, 2) - 4)


def test_a_model_is_saved_and_loaded_whole(client, table):
    model = nn.ModuleDict(
        {"embed": EmbeddingCollection(client, {"a": Feature(table)}, async_push=2), "head": nn.Linear(2, 1)}
    )
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with again["embed"].exchange.client:
        batch = {"a": np.array([[1, 2], [3, 4]])}
        torch.testing.assert_close(again["embed"](batch), model["embed"](batch))
        torch.testing.assert_close(again["head"].weight, model["head"].weight)


def _step(bag, count):
    with bag.exchange.client:
        for _ in range(count):
            bag(np.array([1])).sum().backward()


def test_a_model_goes_to_spawned_processes(table):
    bag = EmbeddingBag(table)
    before = table.lookup([1])
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_step, args=(bag, 10)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    np.testing.assert_array_equal(table.lookup([1]), before - 20)

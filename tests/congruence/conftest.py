"""The same tests on every shape of cluster: embedded, one PS, three PS, or `--cluster host:port,...`."""

from __future__ import annotations

import secrets

import pytest

import trilith
from tests.congruence.clusters import SHAPES, LocalCluster
from trilith.tables import Adagrad, RandomUniform


def pytest_addoption(parser):
    parser.addoption(
        "--cluster", default="", help="run congruence tests against this cluster (host:port,...) instead of local ones"
    )


def pytest_generate_tests(metafunc):
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "shape" in metafunc.fixturenames and "shape" not in chosen:
        given = metafunc.config.getoption("--cluster", default="")
        metafunc.parametrize("shape", [given] if given else list(SHAPES), scope="session")


@pytest.fixture(scope="session")
def shared_cluster(shape):
    """One cluster of each shape for all tests that do not break it."""
    if shape not in SHAPES:
        yield None
        return
    with LocalCluster(shape) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_client(shape, shared_cluster):
    with trilith.connect(f"static://{shape}") if shared_cluster is None else shared_cluster.connect() as client:
        yield client


@pytest.fixture
def client(shared_client):
    """A client of a cluster that other tests use too: take fresh names."""
    return shared_client


@pytest.fixture
def name():
    """A name that no other test uses."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def table(client, name):
    """A table of random rows, dim 4."""
    return client.table(
        name, dim=4, optimizer=Adagrad(learning_rate=0.05), initializer=RandomUniform(-0.5, 0.5), seed=7
    )


@pytest.fixture
def local():
    """Make local clusters of a shape; they end with the test."""
    clusters = []

    def make(shape, **options):
        if shape not in SHAPES:
            pytest.skip("needs a cluster of its own")
        clusters.append(LocalCluster(shape, **options))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()

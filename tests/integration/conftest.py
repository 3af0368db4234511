"""A ZooKeeper server and `trilith` processes for the tests that need them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import zookeeper
from tests.programs import Processes


@pytest.fixture(scope="session")
def zk_server(tmp_path_factory) -> Iterator[zookeeper.Server]:
    """One server for all tests of this process; each takes a path of its own, by `zk_url`."""
    with zookeeper.server(tmp_path_factory.mktemp("zookeeper") / "data") as server:
        yield server


_NUMBERS = itertools.count()


@pytest.fixture
def zk_url(zk_server) -> str:
    """A URL whose path no other test uses, with the shortest session timeout that the server grants."""
    return f"zk://{zk_server.host}/trilith/test-{next(_NUMBERS)}?session_timeout={zookeeper.SESSION_S:g}"


@pytest.fixture
def cleanup() -> Iterator[Callable[..., None]]:
    """Call what it was given, last first, when the test ends."""
    calls: list[Callable[[], object]] = []
    yield calls.append
    for call in reversed(calls):
        call()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Servers of `trilith`, ended with the test."""
    made = Processes(tmp_path)
    yield made
    made.close()

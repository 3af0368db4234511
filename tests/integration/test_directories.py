"""What every backend of discovery does alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.waiting import eventually
from trilith.discovery import PS, WORKER, Directory
from trilith.discovery.host_files import HostFilesDirectory
from trilith.discovery.mlp import MlpDirectory, MlpEnvironment
from trilith.discovery.static import StaticDirectory
from trilith.discovery.tf_config import TfConfigDirectory
from trilith.errors import InvalidRequestError

A, B, C = "10.0.0.1:7000", "10.0.0.2:7000", "[fd00::3]:7000"


@dataclass(frozen=True)
class Backend:
    """How to open one; those that share their members see what others register."""

    open: Callable[[], Directory]


def mlp() -> MlpDirectory:
    variables = {"MLP_PS_NUM": "2"}
    for index, host in enumerate(("10.0.0.1", "10.0.0.2")):
        variables |= {f"MLP_PS_{index}_PRIMARY_HOST": host, f"MLP_PS_{index}_PORT": "7000"}
    return MlpDirectory(MlpEnvironment(variables), wait_s=0.0)


SHARED = ["zookeeper", "hosts"]  # what one object registers, another sees
CHANGING = [*SHARED, "mlp"]
ALL = [*CHANGING, "tf-config", "static"]  # the last two have A and B as their PS from the start

changing = pytest.mark.parametrize("backend", CHANGING, indirect=True)
shared = pytest.mark.parametrize("backend", SHARED, indirect=True)


@pytest.fixture(params=ALL)
def backend(request, tmp_path, cleanup) -> Backend:
    def opened(make: Callable[[], Directory]) -> Callable[[], Directory]:
        def open_one() -> Directory:
            directory = make()
            cleanup(directory.close)
            return directory

        return open_one

    if request.param == "zookeeper":
        url = request.getfixturevalue("zk_url")
        from trilith.discovery.zk_directory import ZooKeeperDirectory

        return Backend(opened(lambda: ZooKeeperDirectory(url, timeout_s=20.0)))
    if request.param == "hosts":
        return Backend(opened(lambda: HostFilesDirectory(tmp_path / "hosts", poll_s=0.02)))
    if request.param == "mlp":
        return Backend(opened(mlp))
    if request.param == "tf-config":
        text = json.dumps({"cluster": {"ps": [A, B]}, "task": {"type": "ps", "index": 1}})
        return Backend(opened(lambda: TfConfigDirectory(text)))
    return Backend(opened(lambda: StaticDirectory([A, B])))


@pytest.fixture
def directory(backend) -> Directory:
    """With A and B as its PS."""
    directory = backend.open()
    directory.register(PS, 0, A)
    directory.register(PS, 1, B)
    eventually(lambda: directory.query(PS) == {0: A, 1: B})
    return directory


def test_members_are_found_by_index(directory):
    assert list(directory.query(PS).items()) == [(0, A), (1, B)]


def test_a_role_without_members_is_empty(directory):
    assert directory.query(WORKER) == {}


def test_what_query_returns_is_the_callers_own(directory):
    found = directory.query(PS)
    found.clear()
    assert directory.query(PS) == {0: A, 1: B}


def test_a_watcher_first_hears_of_the_present_state(directory):
    heard = []
    stop = directory.watch(PS, heard.append)
    assert heard == [{0: A, 1: B}]
    stop()
    stop()


def test_closing_twice_is_fine(directory):
    directory.close()
    directory.close()


@changing
def test_a_member_that_leaves_is_no_longer_found_and_may_leave_twice(directory):
    directory.deregister(PS, 0, A)
    eventually(lambda: directory.query(PS) == {1: B})
    directory.deregister(PS, 0, A)
    assert directory.query(PS) == {1: B}


@changing
def test_a_watcher_hears_every_state_until_it_stops(directory):
    heard = []
    stop = directory.watch(PS, heard.append)
    directory.deregister(PS, 0, A)
    eventually(lambda: heard[-1] == {1: B})
    directory.register(PS, 0, A)
    eventually(lambda: heard[-1] == {0: A, 1: B})
    stop()
    seen, later = len(heard), []
    directory.watch(PS, later.append)
    directory.deregister(PS, 1, B)
    eventually(lambda: later[-1] == {0: A})
    assert len(heard) == seen


@changing
def test_a_watcher_that_fails_is_logged_and_does_not_silence_others(directory, caplog):
    def fail(members):
        raise RuntimeError("watcher")

    heard = []
    directory.watch(PS, fail)
    directory.watch(PS, heard.append)
    directory.deregister(PS, 0, A)
    eventually(lambda: heard[-1] == {1: B})
    assert "a watcher of the directory failed" in caplog.text


@changing
@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:", ":7000", "10.0.0.1:70000", "fd00::3:7000", "a b:1", ""])
def test_what_is_no_address_is_refused(directory, address):
    with pytest.raises(InvalidRequestError):
        directory.register(PS, 0, address)
    assert directory.query(PS) == {0: A, 1: B}


@shared
def test_others_see_who_registers_and_what_replaces_it(backend, directory):
    other = backend.open()
    eventually(lambda: other.query(PS) == {0: A, 1: B})
    directory.register(PS, 0, C)
    eventually(lambda: other.query(PS) == {0: C, 1: B})
    other.register(PS, 1, A)  # another process takes the place
    eventually(lambda: directory.query(PS) == {0: C, 1: A})


@shared
def test_who_was_replaced_does_not_take_the_new_one_away(backend, directory):
    other = backend.open()
    other.register(PS, 0, C)
    eventually(lambda: directory.query(PS) == {0: C, 1: B})
    directory.deregister(PS, 0, A)
    directory.close()
    eventually(lambda: other.query(PS) == {0: C})


@shared
def test_closing_withdraws_what_was_registered(backend, directory):
    other = backend.open()
    heard = []
    other.watch(PS, heard.append)
    directory.close()
    eventually(lambda: heard[-1] == {})


@shared
def test_roles_do_not_mix(backend, directory):
    directory.register(WORKER, 0, C)
    eventually(lambda: directory.query(WORKER) == {0: C})
    assert directory.query(PS) == {0: A, 1: B}


@shared
def test_members_come_and_go_from_many_threads(backend, directory):
    def churn(index: int) -> None:
        for round_ in range(5):
            directory.register(WORKER, index, f"10.0.1.{index}:{7000 + round_}")
            if round_ < 4:
                directory.deregister(WORKER, index, f"10.0.1.{index}:{7000 + round_}")

    threads = [threading.Thread(target=churn, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: directory.query(WORKER) == {index: f"10.0.1.{index}:7004" for index in range(6)})

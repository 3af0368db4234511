"""Addresses, URLs and environments of discovery; the cluster view; what happens when a PS moves or dies."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import eventually
from trilith.compat.monolith.cluster_view import ClusterView, Failover, ViewBuilder, dead_nodes
from trilith.discovery import PS, WORKER
from trilith.discovery.addresses import advertised, ipv6_only, is_listening, join_address, own_host, split_address
from trilith.discovery.host_files import HostFilesDirectory
from trilith.discovery.members import count_ps, resolve_ps
from trilith.discovery.mlp import MlpDirectory, MlpEnvironment
from trilith.discovery.record import ClusterRecord
from trilith.discovery.serving import ServingDirectory
from trilith.discovery.serving_nodes import ModelState, ServingMeta, ServingPath
from trilith.discovery.static import StaticDirectory
from trilith.discovery.tf_config import TfConfigDirectory
from trilith.discovery.urls import open_directory
from trilith.discovery.zk_client import NoNodeError
from trilith.discovery.zk_url import ZkUrl, redact
from trilith.errors import (
    ClusterMismatchError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from trilith.tables import Adagrad, RandomUniform, table_config
from trilith_services.serving.replica_lists import ListedReplicas

A, B, C = "10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"


# ---- addresses -----------------------------------------------------------------------------------------------------


@given(host=st.sampled_from(["a", "10.0.0.1", "zk-1.example", "::1", "fd00::2"]), port=st.integers(1, 65535))
def test_an_address_is_joined_and_split_alike(host, port):
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("listen", "port", "wanted", "announced"),
    [
        ("10.0.0.1:7000", 7000, "", "10.0.0.1:7000"),
        ("[::1]:0", 7001, "", "[::1]:7001"),
        ("0.0.0.0:7000", 7000, "ps-0.svc:9000", "ps-0.svc:9000"),
        ("0.0.0.0:0", 7003, "ps-0.svc:0", "ps-0.svc:7003"),
        ("0.0.0.0:0", 7003, "ps-0.svc", "ps-0.svc:7003"),
        ("0.0.0.0:0", 7003, "[fd00::1]", "[fd00::1]:7003"),
    ],
)
def test_a_server_announces_where_others_reach_it(listen, port, wanted, announced):
    assert advertised(listen, port, wanted) == announced


def test_a_server_on_every_interface_announces_the_machines_own_address(monkeypatch):
    monkeypatch.setenv("CLOUDNATIVE_INET_ADDR", "10.1.2.3,fd00::9")
    for listen in ("0.0.0.0:7000", "[::]:7000", ":7000"):
        assert advertised(listen, 7000) == "10.1.2.3:7000"


def test_the_own_host_is_what_the_scheduler_says_or_an_address_of_this_machine():
    assert own_host({"CLOUDNATIVE_INET_ADDR": "10.0.0.7, 10.0.0.8", "YARN_INET_ADDR": "10.0.0.9"}) == "10.0.0.7"
    assert own_host({"YARN_INET_ADDR": "10.0.0.9"}) == "10.0.0.9"
    assert own_host({"MY_HOST_IPV6": "[fd00::1]", "MY_POD_IP": "10.0.0.5"}) == "10.0.0.5"
    assert own_host({"MY_HOST_IPV6": "[fd00::1]"}) == "fd00::1"
    assert own_host({})


@pytest.mark.parametrize(
    ("environ", "only"),
    [
        ({"MY_HOST_IP": "10.0.0.5", "MY_HOST_IPV6": "fd00::1"}, False),
        ({"MY_POD_IP": "10.0.0.5"}, False),
        ({"MY_HOST_IPV6": "fd00::1"}, True),
        ({"MY_POD_IP": "fd00::2"}, True),  # as pods of a cluster without IPv4 have it
    ],
)
def test_a_machine_without_ipv4_is_known_by_its_environment(environ, only):
    assert ipv6_only(environ) is only


# ---- zk:// ---------------------------------------------------------------------------------------------------------


def test_a_zk_url_says_everything():
    url = ZkUrl.parse(
        "zk://u:p%40ss@zk1,zk2:2182,[::1]/trilith/demo/?session_timeout=4&tls=1&ca=/c&check_hostname=0", {}
    )
    assert url.hosts == ("zk1:2181", "zk2:2182", "[::1]:2181")
    assert (url.root, url.credentials, url.session_timeout_s) == ("/trilith/demo", "u:p@ss", 4.0)
    assert (url.tls, url.ca, url.check_hostname) == (True, "/c", False)
    assert url.public.credentials is None
    assert ZkUrl.parse(str(url), {}) == url.public


def test_credentials_of_the_url_go_before_those_of_file_and_environment(tmp_path):
    secret = tmp_path / "auth"
    secret.write_text("file:f\n")
    environ = {"ZK_AUTH": "env:e"}
    assert ZkUrl.parse("zk://h/x", {}).credentials is None
    assert ZkUrl.parse("zk://h/x", environ).credentials == "env:e"
    assert ZkUrl.parse(f"zk://h/x?auth_file={secret}", environ).credentials == "file:f"
    assert ZkUrl.parse(f"zk://url:u@h/x?auth_file={secret}", environ).credentials == "url:u"


@pytest.mark.parametrize(
    "url",
    [
        "zk://",
        "zk:///x",
        "zk://h",
        "zk://h/",
        "zk://h//x",
        "zk://h/../x",
        "zk://h:0/x",
        "zk://h/x?nonsense=1",
        "zk://h/x?session_timeout=soon",
        "zk://h/x?session_timeout=0",
        "zk://h/x?tls=maybe",
        "zk://h/x?ca=/c",
        "zk://h/x?tls=1&cert=/c",
        "zk://h/x?auth_file=/nowhere",
        "zk://user@h/x",
        "zk://s3cret:with/slash@h/x",
        "http://h/x",
    ],
)
def test_what_is_no_zk_url_is_refused_without_showing_credentials(url):
    with pytest.raises(InvalidRequestError) as caught:
        ZkUrl.parse(url, {})
    assert "s3cret" not in str(caught.value)


@given(st.text("abc:/@%", max_size=12))
def test_a_redacted_address_shows_nothing_of_what_stands_before_the_last_at(secret):
    shown = redact(f"zk://S{secret}S@host:2181/x")
    assert shown == "zk://***@host:2181/x"
    assert redact("static://a:1,b:2") == "static://a:1,b:2"


@pytest.mark.parametrize("url", ["nonsense", "etcd://a", "mlp://x", "tf-config://x", "hosts://relative", "static://"])
def test_a_url_of_no_directory_is_refused(url):
    with pytest.raises(InvalidRequestError):
        open_directory(url)


def test_a_url_opens_its_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"ps": [A]}}))
    monkeypatch.setenv("MLP_PS_NUM", "1")
    monkeypatch.setenv("MLP_PS_0_HOST", "10.0.0.1")
    monkeypatch.setenv("MLP_PS_0_PORT", "7000")
    for url in ("tf-config://", "mlp://", f"static://{A}"):
        assert open_directory(url).query(PS) == {0: A}
    assert open_directory(f"hosts://{tmp_path}").query(PS) == {}


# ---- TF_CONFIG -----------------------------------------------------------------------------------------------------


def tf_config(task: str, index: int, **cluster: list[str]) -> TfConfigDirectory:
    return TfConfigDirectory(json.dumps({"cluster": cluster, "task": {"type": task, "index": index}}))


def test_a_chief_is_worker_0_and_workers_count_from_1():
    with_chief = tf_config("worker", 0, chief=[A], worker=[B, C], ps=[A])
    assert with_chief.query(WORKER) == {0: A, 1: B, 2: C}
    assert (with_chief.server_type, with_chief.index, with_chief.address) == ("worker", 1, B)
    chief = tf_config("chief", 0, chief=[A], worker=[B], ps=[C])
    assert (chief.server_type, chief.index, chief.address) == ("worker", 0, A)
    without = tf_config("worker", 1, worker=[A, B], ps=[C])
    assert without.query(WORKER) == {0: A, 1: B}
    assert (without.server_type, without.index, without.address) == ("worker", 1, B)
    ps = tf_config("ps", 0, chief=[A], ps=[C])
    assert (ps.server_type, ps.index, ps.address) == ("ps", 0, C)


def test_tf_config_knows_two_roles():
    with pytest.raises(ValueError, match="evaluator"):
        tf_config("ps", 0, ps=[A]).query("evaluator")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cluster": {"ps": "a:1"}}', '{"cluster": {"ps": ["a"]}}'])
def test_what_is_no_tf_config_is_refused(text):
    with pytest.raises(InvalidRequestError, match="TF_CONFIG|host:port"):
        TfConfigDirectory.from_environment({"TF_CONFIG": text})


def test_a_task_outside_its_cluster_has_no_address():
    with pytest.raises(InvalidRequestError, match="not in the cluster"):
        _ = tf_config("ps", 1, ps=[A]).address


# ---- MLP and OMPI --------------------------------------------------------------------------------------------------

MLP = {
    "MLP_ROLE": " 'worker' ",
    "MLP_ROLE_INDEX": "1",
    "MLP_PORT": '"2224"',
    "MLP_PS_NUM": "2",
    "MLP_PS_0_PRIMARY_HOST": "ps0",
    "MLP_PS_0_HOST": "ps0-second",
    "MLP_PS_0_PORT": "7000",
    "MLP_PS_1_HOST": "ps1",
    "MLP_WORKER_NUM": "2",
    "MLP_WORKER_0_PRIMARY_HOST": "w0",
    "MLP_WORKER_0_PORT": "3000",
    "MLP_WORKER_1_PRIMARY_HOST": "w1",
    "MLP_WORKER_1_PORT": "3000",
    "MLP_LOG_PATH": "/somewhere",
    "PATH": "/bin",
}


def test_the_environment_says_who_is_who():
    environment = MlpEnvironment(MLP)
    assert environment.available
    assert environment.roles == ("PS", "WORKER")
    assert (environment.role, environment.index, environment.port) == ("WORKER", 1, 2224)
    assert environment.address("ps", 0) == "ps0:7000"
    assert environment.host("ps", 0, primary=False) == "ps0-second"
    assert environment.address("ps", 1) == "ps1:2222"
    assert not MlpEnvironment({"PATH": "/bin"}).available


def test_under_mpirun_the_ranks_are_the_workers():
    ompi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    directory = MlpDirectory(MlpEnvironment({**MLP, **ompi}), wait_s=0.0)
    environment = directory.environment
    assert (environment.index, environment.count("worker"), environment.port) == (3, 4, 2227)
    assert directory.query(WORKER) == {0: "w0:3000", 1: "w0:3001", 2: "w1:3002", 3: "w1:3003"}
    of_a_ps = MlpEnvironment({**MLP, **ompi, "MLP_ROLE": "ps"})
    assert (of_a_ps.index, of_a_ps.count("worker")) == (1, 2)


@pytest.mark.parametrize(
    ("role", "index", "address", "why"),
    [
        ("ps", 2, "ps0:7000", "MLP_PS_NUM is 2"),
        ("judge", 0, "ps0:7000", "MLP_JUDGE_NUM is 0"),
        ("ps", 0, "ps0:7001", "declared port is 7000"),
        ("ps", 0, "elsewhere:7000", "declared hosts are"),
    ],
)
def test_only_declared_members_register(role, index, address, why):
    with pytest.raises(InvalidRequestError, match=why):
        MlpDirectory(MlpEnvironment(MLP), wait_s=0.0).register(role, index, address)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "ps0", "ps0-second", "10.9.9.9"])
def test_a_declared_member_registers_by_any_of_its_names(host):
    environment = MlpEnvironment({**MLP, "CLOUDNATIVE_INET_ADDR": "10.9.9.9"})
    directory = MlpDirectory(environment, wait_s=0.0)
    directory.deregister(PS, 0, f"{host}:7000")
    assert list(directory.query(PS)) == [1]
    directory.register(PS, 0, f"{host}:7000")
    assert list(directory.query(PS)) == [0, 1]


def test_ps_are_waited_for_until_they_listen():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        environ = {"MLP_PS_NUM": "1", "MLP_PS_0_HOST": "127.0.0.1", "MLP_PS_0_PORT": str(port)}
        assert MlpDirectory(MlpEnvironment(environ), wait_s=10.0).query(PS) == {0: f"127.0.0.1:{port}"}
    directory = MlpDirectory(MlpEnvironment(environ), wait_s=0.01)
    with pytest.raises(UnavailableError, match="PS 0"):
        directory.query(PS)


def test_an_environment_without_roles_is_refused():
    with pytest.raises(InvalidRequestError, match="MLP_<ROLE>_NUM"):
        MlpDirectory(MlpEnvironment({}))


# ---- liveness ------------------------------------------------------------------------------------------------------


def test_dead_nodes_are_those_that_accept_no_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # taken, and nobody listens
        alive, dead = (f"127.0.0.1:{each.getsockname()[1]}" for each in (listener, silent))
        assert is_listening(alive)
        assert dead_nodes([alive, dead, "nonsense"], timeout_s=0.05) == [dead, "nonsense"]
    assert dead_nodes([]) == []


# ---- members -------------------------------------------------------------------------------------------------------


def test_a_list_must_be_complete_and_of_the_number_expected(tmp_path):
    assert count_ps(StaticDirectory([A, B])) == 2
    with pytest.raises(ClusterMismatchError, match=r"lists PS \[0, 1\]; this client expects 1"):
        count_ps(StaticDirectory([A, B]), num_ps=1)
    hosts = HostFilesDirectory(tmp_path)
    hosts.register(PS, 1, B)
    with pytest.raises(ClusterMismatchError, match=r"lists PS \[1\]"):
        count_ps(hosts)
    assert count_ps(hosts, num_ps=2) == 2  # the others may come yet
    with pytest.raises(UnavailableError, match="no PS 0"):
        resolve_ps(hosts, 0)


# ---- the record ----------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written():
    spec = table_config("user", dim=3, optimizer=Adagrad(learning_rate=0.07), initializer=RandomUniform(-0.1, 0.1))
    record = ClusterRecord(num_ps=3, tables={"user": spec.proto}, features={"city": "user"})
    assert ClusterRecord.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["num_ps"] == 3


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff", b'{"version": 1, "num_ps": "x"}'])
def test_a_record_that_cannot_be_read_says_so(body):
    with pytest.raises(InternalError, match="record cannot be read"):
        ClusterRecord.from_json(body)


def test_a_record_of_another_version_is_refused():
    with pytest.raises(ClusterMismatchError, match="version 2"):
        ClusterRecord.from_json(b'{"version": 2}')


def test_another_owner_rule_is_refused():
    with pytest.raises(ClusterMismatchError, match="owner rule 'mod'; PS 0 has 2 PS with owner rule 'hash'"):
        ClusterRecord(num_ps=2).check(ClusterRecord(num_ps=2, owner_rule="hash"), "PS 0")


# ---- serving replicas ----------------------------------------------------------------------------------------------


def test_a_replica_is_written_with_every_field_in_order():
    body = ServingMeta(address="1.2.3.4:5", stat=ModelState.AVAILABLE, task=0).to_json()
    assert body.decode() == (
        '{"address": "1.2.3.4:5", "address_ipv6": null, "stat": 30, "model_name": null, "server_type": null,'
        ' "task": 0, "replica": -1, "archon_address": null, "archon_address_ipv6": null}'
    )
    assert ServingMeta.from_json(body) == ServingMeta(address="1.2.3.4:5", stat=30, task=0)
    assert ServingMeta.from_json(b'{"stat": 10, "new": 1}').stat == ModelState.START
    with pytest.raises(InvalidRequestError):
        ServingMeta.from_json(b"[]")


@pytest.mark.parametrize(
    ("v4", "v6", "wants_v6", "chosen"),
    [
        ("1.2.3.4:5", "[fd::1]:5", False, "1.2.3.4:5"),
        ("1.2.3.4:5", "[fd::1]:5", True, "[fd::1]:5"),
        ("0.0.0.0:5", "[fd::1]:5", False, "[fd::1]:5"),
        ("1.2.3.4:5", "[::]:5", True, "1.2.3.4:5"),
        (None, None, False, None),
    ],
)
def test_a_replica_is_reached_by_the_family_asked_for_or_else_the_other(v4, v6, wants_v6, chosen):
    assert ServingMeta(address=v4, address_ipv6=v6).reachable_at(ipv6=wants_v6) == chosen


def test_paths_of_replicas():
    path = ServingPath.parse("/bz-1/service/demo_x/north:blue/ps:3/07")
    assert path is not None
    assert (path.bzid, path.base_name, path.location, path.task, path.replica) == (
        "bz-1",
        "demo_x",
        "north:blue",
        "ps:3",
        7,
    )
    assert path.below("/bz-1/service") == "/bz-1/service/demo_x/north:blue/ps:3/7"
    entry = ServingPath.parse("/b/service/m/entry:0/00000000012")
    assert entry is not None
    assert entry.location is None
    assert entry.below("/b/service") == "/b/service/m/entry:0/00000000012"
    above = ServingPath.parse("/b/service/m/dense:0")
    assert above is not None
    assert above.replica is None
    for wrong in ("/b/service/m", "/b/service/m/ps:x/0", "/b/services/m/ps:0/0", "/b/service/m/north/ps:0/0"):
        assert ServingPath.parse(wrong) is None


# ---- the cluster view ----------------------------------------------------------------------------------------------


class Growing:
    """A directory that knows more at every look."""

    def __init__(self, *states: Mapping[str, Mapping[int, str]]) -> None:
        self.states = list(states)

    def query(self, role: str) -> Mapping[int, str]:
        return self.states[0].get(role, {})

    def sleep(self, seconds: float) -> None:
        if len(self.states) > 1:
            self.states.pop(0)


def builder(directory: Growing, **more) -> ViewBuilder:
    defaults = {"index": 0, "address": "chief:1", "num_workers": 3, "num_ps": 2}
    return ViewBuilder(directory=directory, sleep=directory.sleep, **{**defaults, **more})


def test_the_chief_waits_for_the_ps_it_needs_and_takes_the_first_by_index():
    missing = []
    directory = Growing({}, {PS: {2: C}}, {PS: {2: C, 0: A, 1: B}})
    view = builder(directory, waiting=missing.append).build()
    assert view.ps == (A, B)
    assert missing == [2, 1, 0]
    assert view.to_tf_config() == {
        "cluster": {"chief": ["chief:1"], "worker": ["0.0.0.0:0", "0.0.0.0:1"], "ps": [A, B]},
        "task": {"type": "chief", "index": 0},
    }


def test_a_worker_waits_for_the_chief_and_sees_the_others_as_placeholders():
    directory = Growing({PS: {0: A, 1: B}}, {PS: {0: A, 1: B}, WORKER: {0: "chief:1", 1: "other:1"}})
    view = builder(directory, index=2, address="me:1").build()
    assert view.to_tf_config() == {
        "cluster": {"chief": ["chief:1"], "worker": ["0.0.0.0:0", "me:1"], "ps": [A, B]},
        "task": {"type": "worker", "index": 1},
    }


def test_with_redundant_ps_the_choice_is_remembered_and_shared(tmp_path):
    more = {"redundant_ps": 1, "model_dir": str(tmp_path), "model": "job-1"}
    first = Growing({PS: {0: A, 2: C}, WORKER: {0: "chief:1"}})
    assert builder(first, **more).build().ps == (A, C)  # any two of three
    assert (tmp_path / "ps_cluster_dir" / "job-1").read_text() == f"{A},{C}"
    later = Growing({PS: {0: A, 1: B, 2: C}, WORKER: {0: "chief:1"}})
    assert builder(later, **more).build().ps == (A, C)  # a chief that restarts keeps it
    assert builder(later, index=1, address="me:1", **more).build().ps == (A, C)


def test_a_choice_of_another_number_of_ps_is_made_anew(tmp_path):
    (tmp_path / "ps_cluster_dir").mkdir()
    (tmp_path / "ps_cluster_dir" / "ps_info").write_text(A)
    directory = Growing({PS: {0: B, 1: C}})
    assert builder(directory, redundant_ps=1, model_dir=str(tmp_path)).build().ps == (B, C)
    assert (tmp_path / "ps_cluster_dir" / "ps_info").read_text() == f"{B},{C}"


def test_waiting_ends(tmp_path):
    seconds = iter(range(100))
    more = {"clock": lambda: float(next(seconds)), "timeout_s": 3.0}
    with pytest.raises(UnavailableError, match="1 of 2 PS"):
        builder(Growing({PS: {0: A}}), **more).build()
    with pytest.raises(UnavailableError, match="the chief is not"):
        builder(Growing({PS: {0: A, 1: B}}), index=1, **more).build()
    with pytest.raises(UnavailableError, match="has not chosen 2 PS"):
        builder(
            Growing({}), index=1, redundant_ps=1, model_dir=str(tmp_path), choice_timeout_s=5.0, clock=more["clock"]
        ).build()


@pytest.mark.parametrize("wrong", [{"index": 3}, {"num_ps": 0}, {"redundant_ps": -1}, {"redundant_ps": 1}])
def test_a_view_that_cannot_be_is_refused(wrong):
    with pytest.raises(InvalidRequestError):
        builder(Growing({}), **wrong)


# ---- failover ------------------------------------------------------------------------------------------------------


def view(*ps: str) -> ClusterView:
    return ClusterView(chief=A, ps=ps, num_workers=1, index=0, address=A)


def failover(*views: ClusterView, dead=lambda addresses: [], **more) -> Failover:
    made = iter(views)
    defaults = {"sleep": lambda seconds: None, "ping": lambda addresses, timeout_s: dead(addresses)}
    return Failover(build=lambda: next(made), **{**defaults, **more})


def attempts(*outcomes: Exception | str):
    made = iter(outcomes)

    def train(seen: ClusterView) -> str:
        outcome = next(made)
        if isinstance(outcome, Exception):
            raise outcome
        return f"{outcome} {seen.ps}"

    return train


def test_training_goes_on_with_the_new_view():
    failed = []
    run = failover(view(A), view(B), failed=failed.append)
    assert run.run(attempts(UnavailableError("gone"), "done")) == f"done {(B,)}"
    assert [str(error) for error in failed] == ["gone"]


def test_failures_without_a_change_do_not_count():
    run = failover(*[view(A)] * 50, max_retries=0)
    assert run.run(attempts(*[DeadlineExceededError("late")] * 40, "done")) == f"done {(A,)}"


def test_more_changes_than_allowed_end_it():
    run = failover(view(A), view(B), view(C), max_retries=1)
    with pytest.raises(UnavailableError, match="second"):
        run.run(attempts(UnavailableError("first"), UnavailableError("second")))


def test_other_errors_end_it_at_once():
    with pytest.raises(ClusterMismatchError):
        failover(view(A)).run(attempts(ClusterMismatchError("no")))


def test_nodes_that_do_not_answer_are_named_before_training():
    asked, failed = [], []

    def dead(addresses):
        asked.append(addresses)
        return [B] if len(asked) == 1 else []

    run = failover(view(B, C), view(C, C), dead=dead, failed=failed.append)
    assert run.run(attempts("done")) == f"done {(C, C)}"
    assert asked == [[B, C], [C, C]]  # the chief does not ask itself
    assert str(failed[0]) == f"nobody answers at {B}"


def test_options_that_may_hold_credentials_do_not_show_them():
    from trilith_services.local.processes import ProcessSpec
    from trilith_services.ps.process.server import PsOptions

    shown = [
        ProcessSpec(name="ps-0", argv=["x"], env={"ZK_AUTH": "u:s3cret"}),
        PsOptions(discovery="zk://u:s3cret@h/x"),
        ZkUrl.parse("zk://u:s3cret@h/x", {}),
    ]
    assert "s3cret" not in repr(shown)


# ---- how much is read to follow a serving model ----------------------------------------------------------------------


class FakeZk:
    """Nodes in memory that count how often they are read, in place of a session."""

    nodes: ClassVar[dict[str, bytes]] = {}
    reads: ClassVar[list[str]] = []
    watchers: ClassVar[dict[str, list[Callable[[Any], None]]]] = {}

    def __init__(self, url: ZkUrl, *, timeout_s: float, changed: Callable[[], None]) -> None:
        self.connected = threading.Event()
        self.connected.set()
        self.closed = False
        self.session = 1

    def get(self, path: str, watch: Callable[[Any], None] | None = None) -> tuple[bytes, Any]:
        self._read(path, watch)
        if path not in self.nodes:
            raise NoNodeError
        return self.nodes[path], SimpleNamespace(version=0)

    def names(self, path: str, watch: Callable[[Any], None] | None = None) -> list[str]:
        self._read(path, watch)
        below = {each[len(path) + 1 :].partition("/")[0] for each in self.nodes if each.startswith(f"{path}/")}
        if not below and path not in self.nodes:
            raise NoNodeError
        return sorted(below)

    def exists(self, path: str, watch: Callable[[Any], None] | None = None) -> None:
        self._read(path, watch)

    def _read(self, path: str, watch: Callable[[Any], None] | None) -> None:
        self.reads.append(path)
        if watch is not None:
            self.watchers.setdefault(path, []).append(watch)

    def change(self, path: str, body: bytes) -> None:
        """Set a node and tell who watches it."""
        self.nodes[path] = body
        for watch in self.watchers.pop(path, []):
            watch(SimpleNamespace(path=path))

    def reconnect(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("shards", [2, 20])
def test_a_serving_model_is_read_once_however_many_of_its_shards_are_followed(monkeypatch, shards):
    def body(shard: int, number: int) -> bytes:
        return ServingMeta(address=f"10.0.{shard}.{number}:7100", stat=ModelState.AVAILABLE).to_json()

    monkeypatch.setattr("trilith.discovery.zookeeper.ZkClient", FakeZk)
    replicas = {
        f"/t/service/clicks/ps:{shard}/{number}": body(shard, number) for shard in range(shards) for number in (0, 1)
    }
    above = {f"/t/service/clicks/ps:{shard}": b"" for shard in range(shards)}
    monkeypatch.setattr(FakeZk, "nodes", {"/t/service/clicks": b"", **above, **replicas})
    monkeypatch.setattr(FakeZk, "reads", [])
    monkeypatch.setattr(FakeZk, "watchers", {})
    listed = ListedReplicas(ServingDirectory("zk://nowhere/t", "clicks"))
    heard: dict[int, list[set[str]]] = {shard: [] for shard in range(shards)}
    stops = [
        listed.watch(shard, lambda addresses, shard=shard: heard[shard].append(set(addresses)))
        for shard in range(shards)
    ]
    assert heard == {shard: [{f"10.0.{shard}.0:7100", f"10.0.{shard}.1:7100"}] for shard in range(shards)}
    # Of each node its body and what is below it; the roots, those of containers too, once more each.
    assert len(FakeZk.reads) <= 2 * (len(replicas) + len(above)) + 8

    FakeZk.reads.clear()
    changed = "/t/service/clicks/ps:1/0"
    zk: Any = FakeZk(ZkUrl.parse("zk://nowhere/t"), timeout_s=1.0, changed=lambda: None)
    zk.change(changed, body(9, 9))
    eventually(lambda: heard[1][-1] == {"10.0.9.9:7100", "10.0.1.1:7100"})
    assert set(FakeZk.reads) == {changed}
    assert len(FakeZk.reads) <= 2
    assert all(len(told) == 1 + (shard == 1) for shard, told in heard.items()), "others heard nothing"
    for stop in stops:
        stop()
    FakeZk.reads.clear()
    zk.change(changed, body(9, 8))
    heard[0].clear()
    listed.watch(0, lambda addresses: heard[0].append(set(addresses)))  # who begins anew reads anew
    assert heard[0] == [{"10.0.0.0:7100", "10.0.0.1:7100"}]
    assert heard[1][-1] == {"10.0.9.9:7100", "10.0.1.1:7100"}
    listed.close()

"""ZooKeeper: sessions that are lost, places that are taken over, servers that die, and who may look."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import ConnectionLoss

from tests import zookeeper
from tests.waiting import eventually
from trilith.discovery import PS, WORKER
from trilith.discovery.containers import ContainerServiceInfo
from trilith.discovery.record import ClusterRecord
from trilith.discovery.serving import ServingDirectory
from trilith.discovery.serving_nodes import ModelState, ServingMeta, ServingNode, ServingNodes
from trilith.discovery.zk_directory import ZooKeeperDirectory
from trilith.discovery.zk_url import ZkUrl
from trilith.errors import (
    ClosedError,
    ClusterMismatchError,
    InvalidRequestError,
    TableExistsError,
    TableMismatchError,
    UnavailableError,
)
from trilith.tables import Sgd, table_config
from trilith_services.cli import main

A, B = "10.0.0.1:7000", "10.0.0.2:7000"
SECRET = "s3cret-pass"

Open = Callable[..., ZooKeeperDirectory]


@pytest.fixture
def open_directory(zk_url, cleanup) -> Open:
    def open_one(url: str | ZkUrl = zk_url, timeout_s: float = 20.0) -> ZooKeeperDirectory:
        directory = ZooKeeperDirectory(url, timeout_s=timeout_s)
        cleanup(directory.close)
        return directory

    return open_one


@pytest.fixture
def admin(zk_server) -> Iterator[KazooClient]:
    client = KazooClient(zk_server.host)
    client.start()
    yield client
    client.stop()
    client.close()


def expire(directory: ZooKeeperDirectory) -> None:
    """End a session behind its client's back."""
    client = directory.zookeeper._client.kazoo
    thief = KazooClient(",".join(directory.zookeeper.url.hosts), client_id=client.client_id)
    thief.start()
    thief.stop()
    thief.close()


def owner(admin: KazooClient, path: str) -> int:
    """Which session a node is of; 0 if there is no such node."""
    stat = admin.exists(path)
    return 0 if stat is None else stat.ephemeralOwner


# ---- sessions ------------------------------------------------------------------------------------------------------


def test_a_member_comes_back_when_its_session_was_lost(open_directory, admin):
    member, spectator = open_directory(), open_directory()
    member.register(PS, 0, A)
    first = member.zookeeper.session
    expire(member)
    eventually(lambda: owner(admin, f"{member.root}/ps.0") not in (0, first))
    assert owner(admin, f"{member.root}/ps.0") == member.zookeeper.session
    eventually(lambda: spectator.query(PS) == {0: A})


def test_a_spectator_whose_session_was_lost_goes_on_watching(open_directory):
    member, spectator = open_directory(), open_directory()
    heard = []
    spectator.watch(PS, heard.append)
    expire(spectator)
    member.register(PS, 0, A)
    eventually(lambda: heard[-1] == {0: A})
    member.register(PS, 0, B)
    eventually(lambda: heard[-1] == {0: B})


PROGRAM = """
import sys, time
from trilith.discovery.serving import ServingDirectory
from trilith.discovery.zk_directory import ZooKeeperDirectory
directory = ZooKeeperDirectory(sys.argv[1])
for role in ("ps", "worker"):
    directory.register(role, 0, sys.argv[2])
print("registered", flush=True)
time.sleep(600)
"""


@pytest.fixture
def process(zk_url, cleanup) -> subprocess.Popen[str]:
    """Registered as PS 0 and worker 0 at A."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, zk_url, A], stdout=subprocess.PIPE, text=True)
    cleanup(process.wait)
    cleanup(process.kill)
    cleanup(process.stdout.close)
    assert process.stdout.readline() == "registered\n"
    return process


def test_a_restart_within_the_session_timeout_takes_the_place_over_for_good(open_directory, process):
    spectator = open_directory()
    heard = []
    spectator.watch(PS, heard.append)
    process.kill()
    successor = open_directory()
    successor.register(PS, 0, A)  # the same address, and the node is still the dead session's
    successor.register(PS, 0, B)
    eventually(lambda: spectator.query(WORKER) == {})  # the dead session has expired
    eventually(lambda: spectator.query(PS) == {0: B})
    assert {} not in heard  # nobody saw the place empty


def test_who_was_paused_and_replaced_meanwhile_leaves_the_place_alone(open_directory, process):
    spectator = open_directory()
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: spectator.query(WORKER) == {})
    successor = open_directory()
    successor.register(PS, 0, B)
    heard = []
    spectator.watch(PS, heard.append)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: spectator.query(WORKER) == {0: A})  # it is back where nobody has replaced it
    assert heard[-1] == {0: B}
    assert spectator.query(PS) == {0: B}


def test_a_node_deleted_by_hand_comes_back(open_directory, admin):
    member = open_directory()
    member.register(PS, 0, A)
    admin.delete(f"{member.root}/ps.0")
    eventually(lambda: admin.exists(f"{member.root}/ps.0") is not None)


def test_nodes_look_as_other_tools_expect(open_directory, admin):
    member = open_directory()
    member.register(PS, 3, A)
    body, stat = admin.get(f"{member.root}/ps.3")
    assert body == A.encode()
    assert stat.ephemeralOwner == member.zookeeper.session


def test_a_node_that_holds_no_address_is_left_out(open_directory, admin, caplog):
    member = open_directory()
    member.register(PS, 0, A)
    admin.create(f"{member.root}/ps.1", b"\xff\xfe")
    admin.create(f"{member.root}/other", b"")
    eventually(lambda: "holds no address" in caplog.text)
    assert member.query(PS) == {0: A}


def test_a_closed_directory_says_so(open_directory):
    directory = open_directory()
    directory.close()
    with pytest.raises(ClosedError):
        directory.register(PS, 0, A)


# ---- servers that die ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Iterator[zookeeper.Ensemble]:
    with zookeeper.ensemble(tmp_path_factory.mktemp("ensemble")) as three:
        yield three


def test_members_stay_while_the_leader_changes_and_new_ones_can_register_after(three, open_directory):
    url = f"zk://{three.hosts}/trilith/leader?session_timeout=6"
    member, spectator = open_directory(url, timeout_s=60.0), open_directory(url)
    member.register(PS, 0, A)
    heard = []
    spectator.watch(PS, heard.append)
    eventually(lambda: heard[-1] == {0: A})
    session = member.zookeeper.session
    leader = three.leader()
    leader.kill()
    member.register(PS, 1, B)  # waits for the new leader
    eventually(lambda: heard[-1] == {0: A, 1: B})
    assert member.zookeeper.session == session
    assert all(0 in members for members in heard[heard.index({0: A}) :])
    leader.start()
    leader.wait()
    member.register(PS, 1, A)
    eventually(lambda: spectator.query(PS) == {0: A, 1: A})


def test_while_no_server_answers_the_last_view_stays_and_what_needs_one_fails_in_time(tmp_path, open_directory):
    with zookeeper.server(tmp_path / "own") as server:
        url = f"zk://{server.host}/trilith/outage?session_timeout={zookeeper.SESSION_S:g}"
        member = open_directory(url, timeout_s=3.0)
        member.register(PS, 0, A)
        member.register(WORKER, 0, B)
        eventually(lambda: member.query(PS) == {0: A})
        server.kill()
        with pytest.raises(UnavailableError, match=server.host):
            member.register(PS, 1, B)
        with pytest.raises(UnavailableError, match=server.host):
            member.deregister(WORKER, 0, B)
        assert member.query(PS) == {0: A}
        with pytest.raises(UnavailableError, match="no ZooKeeper at"):
            open_directory(url, timeout_s=0.3)
        server.start()
        server.wait()
        spectator = open_directory(url)
        # What could not be announced is not announced later; what could not be withdrawn is.
        eventually(lambda: (spectator.query(PS), spectator.query(WORKER)) == ({0: A}, {}) and member.zookeeper.session)


def test_servers_that_lost_their_data_hear_of_members_and_record_again(tmp_path, open_directory):
    with zookeeper.server(tmp_path / "own") as server:
        url = f"zk://{server.host}/trilith/wiped?session_timeout={zookeeper.SESSION_S:g}"
        member, spectator = open_directory(url), open_directory(url)
        member.register(PS, 0, A)
        member.agree(ClusterRecord(num_ps=1), "PS 0")
        heard = []
        eventually(lambda: spectator.query(PS) == {0: A})
        server.kill()
        server.wipe()
        server.start()
        server.wait()
        newcomer = open_directory(url)
        eventually(lambda: newcomer.query(PS) == {0: A} and newcomer.read_record() == ClusterRecord(num_ps=1))
        spectator.watch(PS, heard.append)
        member.register(PS, 1, B)
        eventually(lambda: heard[-1] == {0: A, 1: B})


# ---- who may look --------------------------------------------------------------------------------------------------


def with_credentials(url: str, credentials: str) -> str:
    return url.replace("zk://", f"zk://{credentials}@")


def test_with_credentials_nobody_else_may_read_or_write(open_directory, zk_url, admin):
    ours = open_directory(with_credentials(zk_url, f"trilith:{SECRET}"))
    ours.register(PS, 0, A)
    ours.agree(ClusterRecord(num_ps=1), "PS 0")
    for node in ("", "/ps.0", "/cluster"):
        acls, _ = (
            admin.get_acls("/trilith") if node is None else (ours.zookeeper._client.kazoo.get_acls(ours.root + node))
        )
        assert [(acl.id.scheme, acl.perms) for acl in acls] == [("digest", 31)]
    for url in (zk_url, with_credentials(zk_url, "trilith:wrong")):
        with pytest.raises(InvalidRequestError, match="are the credentials right") as caught:
            open_directory(url)
        assert "wrong" not in str(caught.value)
    same = open_directory(with_credentials(zk_url, f"trilith:{SECRET}"))
    assert same.query(PS) == {0: A}


def test_credentials_come_from_the_environment_or_a_file_too(open_directory, zk_url, monkeypatch, tmp_path):
    open_directory(with_credentials(zk_url, f"trilith:{SECRET}")).register(PS, 0, A)
    secret = tmp_path / "secret"
    secret.write_text(f"trilith:{SECRET}\n")
    assert open_directory(f"{zk_url}&auth_file={secret}").query(PS) == {0: A}
    monkeypatch.setenv("ZK_AUTH", f"trilith:{SECRET}")
    assert open_directory(zk_url).query(PS) == {0: A}


def test_credentials_are_never_shown(open_directory, zk_url, caplog, zk_server):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("kazoo").setLevel(logging.DEBUG)
    url = with_credentials(zk_url, f"trilith:{SECRET}")
    directory = open_directory(url)
    directory.register(PS, 0, A)
    directory.agree(ClusterRecord(num_ps=1), "PS 0")
    expire(directory)
    directory.register(PS, 0, B)
    shown = [repr(directory), repr(directory.zookeeper), repr(directory.zookeeper.url), str(directory.zookeeper.url)]
    for wrong in (
        f"zk://trilith:{SECRET}@127.0.0.1:1/x?session_timeout=2",  # nobody listens
        f"zk://trilith:{SECRET}@{zk_server.host}/",
        f"zk://trilith:{SECRET}/with-slash@{zk_server.host}/trilith/x",
        f"zk://trilith:{SECRET}@{zk_server.host}/x?nonsense=1",
        f"zk://{SECRET}@{zk_server.host}/x",
        f"zoo://trilith:{SECRET}@{zk_server.host}/x",
    ):
        with pytest.raises((InvalidRequestError, UnavailableError)) as caught:
            open_directory(wrong, timeout_s=0.3)
        shown += [str(caught.value), repr(caught.value)]
    assert caplog.records
    assert not [text for text in [*shown, caplog.text] if SECRET in text]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A CA, and for server and client a certificate of it with its key; the server's names 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    (folder / "both.pem").write_text((folder / "server.key").read_text() + (folder / "server.pem").read_text())
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # kazoo forgets sockets it could not use
def test_tls_with_certificates_on_both_sides(certificates, tmp_path, open_directory):
    config = f"""
serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory
ssl.keyStore.location={certificates}/both.pem
ssl.trustStore.location={certificates}/ca.pem
ssl.clientAuth=need
"""
    with zookeeper.server(tmp_path / "tls", tls=config) as server:
        bare = f"zk://{server.host}/trilith/tls?tls=1&ca={certificates}/ca.pem"
        url = f"{bare}&cert={certificates}/client.pem&key={certificates}/client.key"
        directory = open_directory(url)
        directory.register(PS, 0, A)
        eventually(lambda: directory.query(PS) == {0: A})
        assert str(directory.zookeeper.url) == url
        with pytest.raises(UnavailableError):  # no certificate of one's own
            open_directory(bare, timeout_s=1.0)
        with pytest.raises(UnavailableError, match="Hostname mismatch|doesn't match|IP address mismatch|not valid for"):
            open_directory(url.replace("127.0.0.1", "localhost"), timeout_s=5.0)


# ---- the record ----------------------------------------------------------------------------------------------------


def record(num_ps: int = 2, dim: int = 4, **features: str) -> ClusterRecord:
    return ClusterRecord(
        num_ps=num_ps,
        tables={"user": table_config("user", dim=dim, optimizer=Sgd(learning_rate=0.1)).proto},
        features=features,
    )


def test_a_record_grows_by_what_agrees_with_it(open_directory):
    one, other = open_directory(), open_directory()
    assert one.read_record() is None
    assert one.agree(record(city="user"), "PS 0") == record(city="user")
    other.agree(ClusterRecord(num_ps=2, features={"street": "user"}), "PS 1")
    assert one.read_record() == record(city="user", street="user")


def test_who_disagrees_with_the_record_is_refused_with_both_sides(open_directory):
    one, other = open_directory(), open_directory()
    one.agree(record(city="user"), "PS 0")
    with pytest.raises(ClusterMismatchError, match="recorded as 2 PS.*PS 1 has 3 PS"):
        other.agree(record(num_ps=3), "PS 1")
    with pytest.raises(
        TableMismatchError, match=r"(?s)'user'.*than PS 1 has: .*dim_size is 4 in the record, 8 asked"
    ) as caught:
        other.agree(record(dim=8), "PS 1")
    assert isinstance(caught.value, TableExistsError)
    assert isinstance(caught.value, ClusterMismatchError)
    with pytest.raises(ClusterMismatchError, match="'city' is recorded as of table 'user'; PS 1 has it of 'item'"):
        other.agree(ClusterRecord(num_ps=2, features={"city": "item"}), "PS 1")
    assert one.read_record() == record(city="user")
    one.forget()
    assert other.agree(record(num_ps=3), "PS 1") == record(num_ps=3)


def test_a_record_too_large_for_a_node_is_refused(open_directory):
    directory = open_directory()
    features = {f"{number}".zfill(200): "user" for number in range(6000)}
    with pytest.raises(InvalidRequestError, match="would hold"):
        directory.agree(record(**features), "PS 0")


# ---- serving replicas ----------------------------------------------------------------------------------------------


def test_replicas_are_seen_with_their_state_wherever_they_are(open_directory, admin):
    one, other = open_directory(), open_directory()
    serving = ServingNodes(one.zookeeper, "demo")
    heard: list[list[ServingNode]] = []
    ServingNodes(other.zookeeper, "demo").watch(heard.append)
    assert heard == [[]]
    near = serving.path("ps", 1, 0)
    far = serving.path("ps", 1, 0, idc="north", cluster="blue")
    entry = serving.path("entry", 0, 7)
    meta = ServingMeta(address="10.0.0.1:8500", stat=ModelState.LOADING, server_type="ps", task=1, replica=0)
    serving.register(near, meta)
    serving.register(far, ServingMeta(address="10.0.0.2:8500", stat=ModelState.AVAILABLE))
    serving.register(entry, ServingMeta(address="10.0.0.3:8500"))

    def seen() -> dict[tuple[str, str | None], int]:
        return {(each.path.task, each.path.location): each.meta.stat for each in heard[-1]}

    eventually(lambda: len(seen()) == 3)
    serving.register(near, ServingMeta(address="10.0.0.1:8500", stat=ModelState.AVAILABLE))
    eventually(lambda: seen() == {("ps:1", None): 30, ("ps:1", "north:blue"): 30, ("entry:0", None): 0})
    assert admin.exists(f"{one.root}/service/demo/entry:0/00000000007")
    assert admin.exists(f"{one.root}/service/demo/north:blue/ps:1/0")
    admin.create(f"{one.root}/service/demo/ps:1/5", b"{nonsense")
    serving.deregister(far)
    eventually(lambda: seen() == {("ps:1", None): 30, ("entry:0", None): 0})
    one.close()
    eventually(lambda: heard[-1] == [])


def test_containers_that_agents_bind_to_a_sub_model_are_found_too(zk_url, admin, cleanup):
    root = ZkUrl.parse(zk_url).root
    directory = ServingDirectory(zk_url, "clicks", timeout_s=20.0)
    cleanup(directory.close)
    heard, others = [], []
    directory.replicas(1).watch(heard.append, loading=True)
    directory.entries().watch(others.append)
    assert heard == [{}]
    one, two = "unknown;north;blue:pod-1", "unknown;north;blue:pod-2"
    info = ContainerServiceInfo(grpc=A, idc="north")
    admin.create(f"{root}/container_service/{one}", info.to_json(), ephemeral=True, makepath=True)
    admin.create(f"{root}/binding/clicks/ps_1:{one}", ephemeral=True, makepath=True)
    eventually(lambda: heard[-1] == {one: A})
    admin.create(f"{root}/binding/clicks/ps_1:{two}", ephemeral=True)  # its own node is still to come
    admin.create(f"{root}/binding/clicks/ps_10:{one}", ephemeral=True)
    admin.create(f"{root}/container_service/{two}", ContainerServiceInfo(grpc=B).to_json(), ephemeral=True)
    eventually(lambda: heard[-1] == {one: A, two: B})
    directory.replicas(1).announce(0, B, available=False)  # the same process
    eventually(lambda: heard[-1] == {one: A, "0": B})
    admin.delete(f"{root}/binding/clicks/ps_1:{one}")
    admin.delete(f"{root}/container_service/{two}")
    eventually(lambda: heard[-1] == {"0": B})
    admin.create(f"{root}/binding/clicks/entry:{one}", ephemeral=True)
    eventually(lambda: others[-1] == {one: A})
    assert json.loads(info.to_json()) == {
        **dict.fromkeys(("http", "archon", "agent", "debug_info")),
        "grpc": A,
        "idc": "north",
    }


def test_entries_are_numbered_by_zookeeper_and_keep_their_numbers(zk_url, admin, cleanup, capsys):
    root = ZkUrl.parse(zk_url).root
    above = f"{root}/service/clicks/entry:0"
    lists = [ServingDirectory(zk_url, "clicks", timeout_s=20.0) for _ in range(2)]
    for each in lists:
        cleanup(each.close)
    one, two = (each.entries() for each in lists)
    first, second = one.announce(None, A, available=False), two.announce(None, B, available=True)
    assert second == first + 1
    assert sorted(admin.get_children(above)) == [f"{number:011}" for number in (first, second)]
    heard = []
    one.watch(heard.append)
    assert heard == [{str(second): B}]  # the other is not to be asked yet
    assert one.announce(first, A, available=True) == first
    eventually(lambda: heard[-1] == {str(first): A, str(second): B})
    body = ServingMeta.from_json(admin.get(f"{above}/{first:011}")[0])
    assert (body.address, body.stat, body.replica, body.server_type) == (A, ModelState.AVAILABLE, first, "entry")

    with pytest.raises(SystemExit):
        main(("discovery", "show", zk_url, "--json"))
    shown = json.loads(capsys.readouterr().out)["serving"]["clicks"]
    assert shown == [
        {"task": "entry:0", "replica": number, "address": address, "state": "available"}
        for number, address in ((first, A), (second, B))
    ]

    node, session = f"{above}/{second:011}", lists[1]._directory.zookeeper.session
    expire(lists[1]._directory)
    eventually(lambda: owner(admin, node) not in (0, session))  # under its old number
    eventually(lambda: heard[-1] == {str(first): A, str(second): B})
    two.withdraw(second, B)
    third = two.announce(None, B, available=True)
    assert third > second  # nobody gets a number that another had
    one.withdraw(first, A)
    eventually(lambda: heard[-1] == {str(third): B})


def test_an_entry_whose_node_was_made_though_the_answer_was_lost_does_not_get_a_second_one(zk_url, admin, cleanup):
    directory = ZooKeeperDirectory(zk_url, timeout_s=20.0)
    cleanup(directory.close)
    client = directory.zookeeper._client
    create, lost = client.create, []

    def loses_the_first_answer(path: str, body: bytes, **how) -> str:
        made = create(path, body, **how)
        if not lost:
            lost.append(made)
            raise ConnectionLoss
        return made

    client.create = loses_the_first_answer
    held = directory.zookeeper.hold_next(f"{directory.root}/n", b"x")
    assert [held] == lost
    assert directory.zookeeper.hold_next(f"{directory.root}/n", b"x") != held
    assert len([name for name in admin.get_children(directory.root) if name.startswith("n")]) == 2

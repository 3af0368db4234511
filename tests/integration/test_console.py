"""The console in a real browser, under a fuzzer that reads its OpenAPI description, and as a process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import booleans
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

import trilith
from tests.browser import Page, open_browser
from tests.consoles import Console, open_console
from tests.served import train
from trilith.discovery.serving import ServingDirectory
from trilith.discovery.serving_nodes import ModelState, ServingMeta, ServingNodes
from trilith.discovery.zk_directory import ZooKeeperDirectory
from trilith.serving.prediction import Predictor
from trilith.tables import Adagrad, RandomUniform, Sgd
from trilith_services.local.supervisor import trilith_argv
from trilith_services.ps.process.replica_server import ReplicaOptions, ReplicaServer
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica
from trilith_services.ps.replicas.sync.options import SyncOptions
from trilith_services.serving.server import Entry, EntryOptions

EXAMPLES = 6  # of each route
IDS = np.arange(300, dtype=np.uint64)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two PS, of which the first has a serving replica, with rows in three tables."""
    replica = ReplicaServer(Replica(LocalShard(index=0, count=2, threads=1)), ReplicaOptions(replica=0))
    target = f"127.0.0.1:{replica.start('127.0.0.1:0')}"
    sync = PsOptions(sync=SyncOptions(interval_s=0.1), sync_to={"replica-0": target})
    servers = [
        ParameterServer(LocalShard(index=index, count=2, threads=1), options)
        for index, options in enumerate([sync, PsOptions()])
    ]
    address = "static://" + ",".join(f"127.0.0.1:{server.start()}" for server in servers)
    with trilith.connect(address) as client:
        users = client.table("user", dim=8, optimizer=Adagrad(), initializer=RandomUniform(-0.1, 0.1))
        users.apply_gradients(IDS, np.ones((IDS.size, 8), np.float32), request_time=int(time.time()) - 3600)
        client.table("genre", dim=2, optimizer=Sgd()).assign([1], [[1.0, -1.0]])
        client.table("a/odd:name", dim=1, optimizer=Sgd()).assign([1], [[1.0]])
        client.create_variables({"dense/bias": np.zeros(4), "<b>&amp;</b>": np.zeros(1)}, optimizer=Sgd())
    yield address
    for server in servers:
        server.stop()
    replica.stop()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with one standalone export."""
    folder = tmp_path_factory.mktemp("exports")
    with train("local://", folder / "model") as trained:
        trained.exporter().export(trained.save(), str(folder / "exports"), mode="standalone")
    return str(folder / "exports")


@pytest.fixture(scope="module")
def console(cluster: str) -> Iterator[Console]:
    with open_console(cluster) as console:
        console.until(lambda look: look["totals"]["alive"] == 2 and look["replicas"] and look["replicas"][0]["rows"])
        yield console


# ---- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def is_live(page: Page) -> None:
    page.until("document.querySelector('#live').innerText === 'live'")


def fits(page: Page) -> bool:
    """Whether nothing sticks out at the side."""
    return page.run("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_shows_the_cluster(page, console, tmp_path, width, dark) -> None:
    page.show(width=width, dark=dark)
    page.open(console.url)
    is_live(page)
    page.until("document.querySelector('main').innerText.includes('2 of 2')")
    page.until("document.querySelector('#replicas tbody tr').innerText.includes('answers')")
    text = page.text("main")
    assert page.run("document.querySelectorAll('#shards tbody tr').length") == 2
    replica = page.text("#replicas tbody tr")
    assert "replica-0" in replica
    assert [name for name in ("a/odd:name", "genre", "user") if name not in text] == []
    page.until("document.querySelector('#variables')?.innerText.includes('dense/bias')")
    assert fits(page)
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (max(int(each) for each in re.findall(r"\d+", ground)) < 64) == dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert page.complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_an_id_is_looked_up(page, console, width) -> None:
    page.show(width=width)
    page.open(console.url)
    is_live(page)
    page.run("document.querySelector('#find-table').value = 'user'; document.querySelector('#find-id').value = '8'")
    page.run("document.querySelector('#find button').click()")
    page.until("document.querySelectorAll('#row svg rect').length === 16")  # weights, and Adagrad's state
    row = page.text("#row")
    assert "PS 0" in row
    assert re.search(r"1 h \d+ m", row)  # an hour, and what the tests before this one took
    assert "adagrad norm (8)" in row
    assert "the same row" in row  # at the replica
    assert fits(page)
    page.run("document.querySelector('#find-id').value = '123456'; document.querySelector('#find button').click()")
    page.until("document.querySelector('#row').innerText.includes('no row')")


def test_a_link_leads_to_an_id(page, console) -> None:
    page.open(console.url + "/#table=genre&id=1")
    page.until("document.querySelector('#row').innerText.includes('1.414')")  # the norm


@pytest.mark.parametrize("width", [1280, 390])
def test_a_table_opens_with_plots_and_config(page, console, width) -> None:
    page.show(width=width)
    page.open(console.url)
    is_live(page)
    page.run("document.querySelector('[data-table=user] summary').click()")
    page.until("document.querySelectorAll('[data-table=user] .plot').length === 2")
    page.until("document.querySelector('[data-table=user]').innerText.includes('random_uniform')")
    text = page.text("[data-table=user]")
    assert "300 of 300 rows sampled" in text
    assert "adagrad(" in text
    assert page.run("document.querySelectorAll('[data-table=user] .plot rect').length") > 10
    assert fits(page)


def test_names_are_shown_as_text_never_as_markup(page, console) -> None:
    page.open(console.url)
    is_live(page)
    page.until("document.querySelector('#variables').innerText.includes('<b>&amp;</b>')")
    card = "document.querySelector('[data-table=\"a/odd:name\"]')"
    page.run(f"{card}.querySelector('summary').click()")
    page.until(f"{card}.innerText.includes('1 of 1 rows sampled')")
    assert page.run("fetch(document.querySelector('#variables a').href).then((answer) => answer.status)") == 200
    assert page.complaints == []


def test_the_page_follows_the_cluster_by_itself(page, console, cluster) -> None:
    page.open(console.url)
    is_live(page)
    with trilith.connect(cluster) as client:
        client.create_variables({"late": np.zeros(1)}, optimizer=Sgd())
        client.table("genre").assign([5], [[3.0, 4.0]])
        page.until("document.querySelector('[data-table=genre] summary').innerText.includes('rows\\n2')")
        client.table("genre").erase([5])
    page.until("document.querySelector('[data-table=genre] summary').innerText.includes('rows\\n1')")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_entries_are_shown_with_their_model_and_how_fresh_it_is(page, cluster, exports, tmp_path, width, dark) -> None:
    url = f"hosts://{tmp_path}/serving"
    entry = Entry(exports, EntryOptions(replica=3), listed=ServingDirectory(url, "clicks").entries())
    port = entry.start()
    page.show(width=width, dark=dark)
    try:
        with open_console(cluster, serving=url, model="clicks") as console, Predictor(url, name="clicks") as predictor:
            page.open(console.url)
            is_live(page)
            version = predictor.predict([b""] * 5).model_version

            def counted(look) -> bool:
                predictor.predict([b""] * 5)
                return look["entries"] and look["entries"][0]["requests_per_s"] > 0 and look["entries"][0]["p99_ms"]

            (shown,) = console.until(counted)["entries"]
            assert (shown["name"], shown["address"], shown["alive"]) == ("entry 3", f"127.0.0.1:{port}", True)
            assert (shown["model"], shown["mode"], shown["model_version"]) == ("deepfm", "standalone", version)
            assert shown["records_per_s"] > shown["requests_per_s"]
            assert (
                time.time() - 600 < shown["rows_as_of_unix_s"] <= shown["checkpoint_unix_s"] <= shown["loaded_unix_s"]
            )
            page.until(f"document.querySelector('#entries tbody').innerText.includes('deepfm {version}')")
            assert fits(page)
            page.screenshot(tmp_path / "page.png")
            entry.stop()
            page.until("document.querySelector('#entries-section').hidden")
    finally:
        entry.stop()
    assert page.complaints == []


def test_the_page_says_what_does_not_answer(page, tmp_path) -> None:
    with open_console(f"hosts://{tmp_path}", timeout_s=0.3) as waiting:
        page.open(waiting.url)
        page.until("document.querySelector('#problem').innerText.includes('ClusterMismatchError')")
        (tmp_path / "ps").mkdir(exist_ok=True)
        (tmp_path / "ps" / "0").write_text("127.0.0.1:1")
        page.until("document.querySelector('#shards tbody').innerText.includes('no answer')")
        page.until("document.querySelector('#totals').innerText.includes('0 of 1')")


def test_writing_is_offered_only_where_it_is_allowed(page, console, cluster) -> None:
    page.open(console.url + "/#table=user&id=8")
    page.until("document.querySelectorAll('#row svg').length > 0")
    assert page.run("document.querySelectorAll('.danger').length") == 0
    with open_console(cluster, writable=True) as writing, trilith.connect(cluster) as client:
        client.table("genre").assign([9], [[3.0, 4.0]])
        writing.until(lambda look: look["totals"]["alive"] == 2)
        page.open(writing.url + "/#table=genre&id=9")
        page.until("document.querySelector('.danger')")
        assert "writes allowed" in page.text("header")
        page.run("window.confirm = () => true; document.querySelector('.danger').click()")
        page.until("document.querySelector('#row').innerText.includes('no row')")
        assert not client.table("genre").contains([9]).any()


def test_the_api_is_described_for_people(page, console) -> None:
    page.show(width=390)
    page.open(console.url + "/docs")
    page.until("document.querySelectorAll('.route').length > 10")
    assert "/debugging/features" in page.text("main")
    assert fits(page)
    assert page.complaints == []


# ---- under a fuzzer


CHECKS = [
    checks.not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_whatever_is_asked_the_api_answers_as_it_describes(cluster, mode) -> None:
    with open_console(cluster, writable=True) as console:
        console.until(lambda look: look["totals"]["alive"] == 2)
        # A stream of events has no end.
        api = schemathesis.openapi.from_url(f"{console.url}/openapi.json").exclude(path="/api/events")
        operations = [each.ok() for each in api.get_all_operations()]
        assert len(operations) > 10
        for operation in operations:
            ask_at_random(operation, mode)


def ask_at_random(operation, mode) -> None:
    wrong = mode is GenerationMode.NEGATIVE and not operation.path.startswith("/debugging")  # those say it under 200
    wanted = [*CHECKS, negative_data_rejection] if wrong else CHECKS

    @settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), known=booleans())
    def ask(case, known) -> None:
        if known and not wrong and "table" in (case.path_parameters or {}):
            case.path_parameters["table"] = "user"  # or every name would be unknown
        case.validate_response(case.call(timeout=20), checks=wanted)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE
        # Any text is a name, so nothing can be wrong about a request that has only names.
        assert {each.name for each in operation.iter_parameters()} <= {"table", "name"}


# ---- with ZooKeeper


def test_a_cluster_and_its_serving_processes_are_found_in_zookeeper(zk_url, cleanup) -> None:
    serving_url = zk_url.replace("?", "/serving?")
    with open_console(zk_url, serving=serving_url, model="clicks") as console:
        console.until(lambda look: look["problem"])  # nobody has registered yet
        server = ParameterServer(LocalShard(index=0, count=1, threads=1), PsOptions(discovery=zk_url))
        cleanup(server.stop)
        server.start()
        console.until(lambda look: look["totals"]["alive"] == 1)
        with trilith.connect(zk_url, timeout_s=20.0) as client:
            client.table("user", dim=2, optimizer=Sgd()).assign([7], [[1.0, 2.0]])
            client.record_features({"clicked": "user"})
        found = console.debug("features", {"feature_names": ["clicked", "user"], "feature_ids": [7, 7]})
        assert found["clicked"] == found["user"]
        assert console.get("/api/tables/user")["features"] == ["clicked"]

        directory = ZooKeeperDirectory(serving_url, timeout_s=20.0)
        cleanup(directory.close)
        replicas = ServingNodes(directory.zookeeper, "clicks")
        for kind, state in (("ps", ModelState.LOADING), ("entry", ModelState.AVAILABLE)):
            meta = ServingMeta(address="127.0.0.1:1", stat=state, server_type=kind, task=0, replica=3)
            replicas.register(replicas.path(kind, 0, 3), meta)
        look = console.until(lambda look: look["replicas"] and look["entries"])
        replica, entry = look["replicas"][0], look["entries"][0]
        assert (replica["name"], replica["state"], replica["alive"]) == ("replica-3", "loading", False)
        assert (entry["name"], entry["state"], entry["alive"]) == ("entry 3", "available", False)
        replicas.deregister(replicas.path("ps", 0, 3))
        console.until(lambda look: not look["replicas"])


# ---- as a process


def test_the_console_is_a_process_that_ends_with_its_streams_open(cluster) -> None:
    process = subprocess.Popen(
        trilith_argv("console", "--cluster", cluster, "--listen", "127.0.0.1:0", "--interval=0.2", "--log-format=json"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        url = next(entry["url"] for line in process.stderr if "url" in (entry := json.loads(line)))
        console = Console(url)
        console.until(lambda look: look["totals"]["alive"] == 2)
        shown = subprocess.run(
            trilith_argv(
                "debug", "--type", "debugging_features", "--feature-name", "genre", "--feature-ids", "1,2",
                "--port", url.rpartition(":")[2],
            ),
            check=True,
            capture_output=True,
            text=True,
            timeout=240,
        ).stdout  # fmt: skip
        assert re.match(r"genre 1:\nid: 1\nnum: 1\.0\nnum: -1\.0\n", shown)
        assert shown.endswith("genre 2: Not exist\n")
        with urllib.request.urlopen(f"{url}/api/events", timeout=20) as stream:
            assert stream.readline() == b"event: look\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_bad_cluster_is_one_line_and_status_2() -> None:
    done = subprocess.run(
        trilith_argv("console", "--cluster", "nothing://here"), check=False, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'nothing://here' is no directory of a cluster")
    assert len(done.stderr.splitlines()) == 1


def test_the_pages_are_in_the_package() -> None:
    import trilith_services.console

    folder = Path(trilith_services.console.__file__).parent / "page"
    assert {path.suffix for path in folder.iterdir()} == {".html", ".css", ".js", ".svg"}

"""The whole cluster in containers: up, trained, asked for scores, a PS killed, watched by Prometheus, down again.

`make compose-check` brings docker and the images. The tests share one cluster, whose life goes on from one to the next.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import numpy as np
import pytest
from docker.models.containers import Container

import trilith
from tests.served import Load
from trilith.nn import auc
from trilith_services.demo.click_files import click_records
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.datasets import load_dataset
from trilith_services.demo.job import deepfm
from trilith_services.local.supervisor import free_ports

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
PS = ("ps-0", "ps-1")
WORKERS = ("worker-0", "worker-1")
REPLICAS = ("serving-0-a", "serving-0-b", "serving-1-a", "serving-1-b")
SERVERS = (*PS, *REPLICAS, "entry", "console")
IMAGES = {
    "TRILITH_IMAGE": "trilith:0.1",
    "ZK_IMAGE": "zookeeper:3.9.3",
    "PROMETHEUS_IMAGE": "prom/prometheus:v2.53.0",
}
ROWS = 200


def images() -> dict[str, str]:
    return {name: os.environ.get(name) or default for name, default in IMAGES.items()}


def eventually(missing: Callable[[], object], *, timeout_s: float) -> None:
    """Wait until nothing is missing; what is, is shown in the end."""
    deadline = time.monotonic() + timeout_s
    while what := missing():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def until(condition: Callable[[], object], *, timeout_s: float) -> None:
    """Wait until something is so."""
    eventually(lambda: None if condition() else "it did not happen in time", timeout_s=timeout_s)


class Stack:
    """One docker-compose project."""

    def __init__(self, engine: docker.DockerClient, command: list[str], **environment: str) -> None:
        self.engine = engine
        self.project = f"trilith-test-{os.getpid()}-{free_ports(1, keep=False)[0]}"
        ports = ("ENTRY_PORT", "ENTRY_HTTP_PORT", "CONSOLE_PORT", "PROMETHEUS_PORT")
        self.ports = dict(zip(ports, free_ports(len(ports), keep=False), strict=True))  # docker binds them its own way
        self._command = [*command, "-p", self.project]
        numbers = {name: str(port) for name, port in self.ports.items()}
        self._environment = {**os.environ, **images(), **numbers, **environment}

    def compose(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT, env={**self._environment, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def containers(self) -> dict[str, Container]:
        """By service."""
        mine = {"label": f"com.docker.compose.project={self.project}"}
        return {
            each.labels["com.docker.compose.service"]: each for each in self.engine.containers.list(True, filters=mine)
        }

    def state(self, service: str) -> dict[str, Any]:
        return self.containers()[service].attrs["State"]  # type: ignore[no-any-return]

    def address(self, service: str) -> str:
        """Of a container, as this machine reaches it."""
        (network,) = self.containers()[service].attrs["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def log(self, service: str) -> str:
        return self.containers()[service].logs().decode()  # type: ignore[no-any-return]

    def wait_healthy(self, *services: str, timeout_s: float = 180.0) -> None:
        def ill() -> dict[str, Any]:
            found = self.containers()
            health = {service: found[service].attrs["State"]["Health"] for service in services}
            return {name: each["Log"][-1:] for name, each in health.items() if each["Status"] != "healthy"}

        eventually(ill, timeout_s=timeout_s)

    def get(self, port: str, path: str, body: Any = None) -> Any:
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    def down(self) -> None:
        """Take all of it down; nothing may be left."""
        self.compose("--profile", "monitoring", "--profile", "ensemble", "down", "-v", "--remove-orphans")
        mine = {"label": f"com.docker.compose.project={self.project}"}
        assert not self.containers()
        assert not self.engine.volumes.list(filters=mine)
        assert not self.engine.networks.list(filters=mine)


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    why = ""
    try:
        client = docker.from_env(timeout=60)
        missing = [image for image in images().values() if not client.images.list(image)]
        why = f"images {missing} are not there" if missing else ""
    except docker.errors.DockerException as error:
        why = f"no docker: {error}"
    if why:
        assert os.environ.get("CI") != "true", why
        pytest.skip(f"{why} (make compose-check brings them)")
    yield client
    client.close()


@pytest.fixture(scope="module")
def command() -> list[str]:
    """Compose, of whichever version there is."""
    given = os.environ.get("COMPOSE", "").split()
    return given or (["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"])


@pytest.fixture(scope="module")
def stack(engine: docker.DockerClient, command: list[str]) -> Iterator[Stack]:
    made = Stack(engine, command, TRILITH_RUN_EPOCHS="100000")  # until a test has seen enough
    try:
        made.compose("up", "-d")
        made.compose("up", "-d", "prometheus")
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def data() -> ClickData:
    return load_dataset("movielens").test


def cluster(stack: Stack) -> dict[str, Any]:
    return stack.get("CONSOLE_PORT", "/api/cluster")["look"]  # type: ignore[no-any-return]


def step(stack: Stack) -> int:
    return int(cluster(stack)["totals"]["global_step"])


def model(stack: Stack) -> dict[str, Any]:
    return stack.get("ENTRY_HTTP_PORT", "/v1/model")  # type: ignore[no-any-return]


def events(stack: Stack, worker: str, name: str) -> list[dict[str, Any]]:
    """What a worker has written down, of one kind of event; it must be running."""
    found = stack.containers()[worker].exec_run(["cat", f"/data/workers/{worker}.jsonl"])
    assert found.exit_code == 0, found.output
    whole = found.output.decode().rpartition("\n")[0]
    return [each for each in map(json.loads, whole.splitlines()) if each["event"] == name]


def test_everything_becomes_healthy_and_no_kernel_is_compiled(stack: Stack) -> None:
    stack.wait_healthy("zk1", *SERVERS, "prometheus")
    found = stack.containers()["ps-0"].exec_run("ls /data/cache")
    assert found.exit_code == 0
    assert "kernels" not in found.output.decode().split(), "the image brings them all"


def test_containers_may_do_no_more_than_they_need(stack: Stack) -> None:
    for service, container in stack.containers().items():
        host, config = container.attrs["HostConfig"], container.attrs["Config"]
        assert config["User"].partition(":")[0] not in ("", "0", "root"), service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert not host["CapAdd"], service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["Memory"] > 0, service
        assert host["NanoCpus"] > 0, service
        assert host["PidsLimit"] > 0, service
        assert host["Init"], service
        assert [(each["Name"], each["Hard"] <= 20_000) for each in host["Ulimits"]] == [("nofile", True)], service
        assert config["Healthcheck"]["Test"], service
        assert config["Image"].rpartition(":")[2] not in ("", "latest", config["Image"]), service
        for bound in (host["PortBindings"] or {}).values():
            assert [each["HostIp"] for each in bound] == ["127.0.0.1"], service


def test_entry_gives_scores_and_takes_newer_models_over(stack: Stack, data: ClickData) -> None:
    records = click_records(data).payloads()[:ROWS]
    found = trilith.remote_predict(f"127.0.0.1:{stack.ports['ENTRY_PORT']}", records)
    assert found.scores.shape == (ROWS,)
    assert ((found.scores > 0) & (found.scores < 1)).all()
    assert np.unique(found.scores).size > ROWS // 2
    assert found.rows_as_of > 0
    body = {"examples": [b64encode(each).decode() for each in records]}
    over_http = stack.get("ENTRY_HTTP_PORT", "/v1/predict", body)
    assert len(over_http["outputs"]["click"]) == ROWS
    assert over_http["model_version"] >= found.model_version
    until(lambda: model(stack)["model_step"] > found.model_step, timeout_s=120)


def test_console_shows_the_cluster_and_a_row_of_it(stack: Stack, data: ClickData) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.ports['CONSOLE_PORT']}/", timeout=10) as reply:
        assert b"<title>" in reply.read()
    until(lambda: cluster(stack)["totals"]["alive"] == 2, timeout_s=60)
    look = cluster(stack)
    assert [each["address"] for each in look["shards"]] == ["ps-0:7000", "ps-1:7000"]
    assert {each["address"] for each in look["replicas"]} >= {f"{name}:7100" for name in REPLICAS}
    user = int(data.features["user"].values[0])
    row = stack.get("CONSOLE_PORT", f"/api/tables/features/rows/{user}")
    assert row["found"]
    assert row["owner"] == user % 2
    assert [each["found"] for each in row["replicas"]] == [True, True]


def test_a_killed_ps_comes_back_from_its_checkpoint_while_training_and_serving_go_on(
    stack: Stack, data: ClickData
) -> None:
    until(lambda: all(each["last_checkpoint"] for each in cluster(stack)["shards"]), timeout_s=180)
    before = cluster(stack)["shards"][1]
    load = Load(f"127.0.0.1:{stack.ports['ENTRY_PORT']}", click_records(data).payloads()[:8], threads=1)
    with load:
        os.kill(stack.state("ps-1")["Pid"], signal.SIGKILL)

        def back() -> bool:
            now = cluster(stack)["shards"][1]
            return now["alive"] and now["incarnation"] != before["incarnation"]

        until(back, timeout_s=180)
        came_back_at = step(stack)
        until(lambda: step(stack) > came_back_at + 100, timeout_s=180)
        for worker in WORKERS:
            until(lambda: events(stack, worker, "rows_rejoined"), timeout_s=60)  # noqa: B023
            (back,) = events(stack, worker, "rows_rejoined")
            assert back["shard"] == 1
            assert back["restored_from"].startswith("/data/model/ckpt-")
        load.more(10)
    assert load.errors == []
    shard = cluster(stack)["shards"][1]
    assert shard["restored_from"].startswith("/data/model/ckpt-")
    assert shard["rows"] > 0
    assert stack.containers()["ps-1"].attrs["RestartCount"] == 1
    for worker in WORKERS:
        assert stack.containers()[worker].attrs["RestartCount"] == 0


def test_prometheus_sees_everybody_and_every_query_of_rules_and_dashboard_has_an_answer(stack: Stack) -> None:
    def query(expression: str) -> list[dict[str, Any]]:
        found = stack.get("PROMETHEUS_PORT", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        assert found["status"] == "success", found
        return found["data"]["result"]  # type: ignore[no-any-return]

    def up() -> set[str]:
        return {each["metric"]["instance"] for each in query("up == 1")}

    eventually(lambda: {*PS, *REPLICAS, "entry"} - up(), timeout_s=120)
    groups = stack.get("PROMETHEUS_PORT", "/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, [each.get("lastError") for each in rules]
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana/dashboards/trilith.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 20
    expressions += [rule["query"] for rule in rules if rule["type"] == "recording"]
    silent = set(expressions)

    def unanswered() -> set[str]:
        silent.difference_update([each for each in silent if query(each)])
        return silent

    eventually(unanswered, timeout_s=120)


def test_rules_pass_their_own_tests(engine: docker.DockerClient) -> None:
    for arguments in ("check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"):
        engine.containers.run(
            images()["PROMETHEUS_IMAGE"],
            arguments.split(),
            entrypoint="promtool",
            working_dir="/monitoring",
            volumes=[f"{ROOT}/deploy/monitoring:/monitoring:ro"],
            remove=True,
        )


def test_in_the_end_entry_scores_as_the_trained_model_does(stack: Stack, data: ClickData) -> None:
    last = max(events(stack, worker, "step")[-1]["epoch"] for worker in WORKERS) + 2
    stack.compose("stop", *WORKERS)
    # They go on where they were, and the one that saves waits for the other one before it saves for the last time.
    stack.compose("up", "-d", "--no-deps", *WORKERS, TRILITH_RUN_EPOCHS=str(last))
    for worker in WORKERS:
        until(lambda: stack.state(worker)["Status"] == "exited", timeout_s=120)  # noqa: B023
        assert stack.state(worker)["ExitCode"] == 0, stack.log(worker)
    address = "static://" + ",".join(f"{stack.address(each)}:7000" for each in PS)
    with trilith.connect(address) as client:
        trained = client.global_step()  # as it is now; the console looks now and then
    until(lambda: model(stack)["model_step"] == trained, timeout_s=120)
    job = deepfm()
    with job.configure(job.run.overridden(sets=[f"cluster={address}", "progress=none"])):
        assert job.step_count == trained
        expected = np.concatenate([each["click"] for each in job.predict(data.columns(4096))])
    assert auc(data.labels, expected) > 0.7

    def largest_difference() -> float:
        found = trilith.remote_predict(f"127.0.0.1:{stack.ports['ENTRY_PORT']}", click_records(data).take(slice(1000)))
        return float(np.abs(found.scores - expected[:1000]).max())

    until(lambda: largest_difference() < 0.01, timeout_s=120)  # rows are served as float16


def test_sigterm_ends_every_process_well(stack: Stack) -> None:
    stack.compose("stop")
    assert {name: stack.state(name)["ExitCode"] for name in SERVERS} == dict.fromkeys(SERVERS, 0)


def test_three_zookeeper_servers_are_an_ensemble_that_services_find(
    engine: docker.DockerClient, command: list[str]
) -> None:
    three = Stack(engine, [*command, "--env-file", "deploy/ensemble.env"])
    servers = ("zk1", "zk2", "zk3")
    try:
        three.compose("up", "-d", *servers)
        three.wait_healthy(*servers)
        ask = "exec 3<>/dev/tcp/127.0.0.1/2181 && echo srvr >&3 && grep Mode <&3"
        modes = [three.containers()[each].exec_run(["bash", "-c", ask]).output.decode() for each in servers]
        assert sorted(mode.split()[1] for mode in modes) == ["follower", "follower", "leader"]
        three.compose("up", "-d", "ps-0", "ps-1")
        three.wait_healthy("ps-0", "ps-1")
        leader = servers[modes.index("Mode: leader\n")]
        os.kill(three.state(leader)["Pid"], signal.SIGKILL)
        shown = three.containers()["ps-0"].exec_run(
            ["trilith", "discovery", "show", "zk://zk1,zk2,zk3/trilith/movielens"]
        )
        assert "ps-1:7000" in shown.output.decode()
    finally:
        three.down()

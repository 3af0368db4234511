"""The console: the debugging routes, the JSON API, what it refuses, what it says when PS are away; `trilith debug`."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from google.protobuf import text_format

import trilith
from tests.consoles import Console, open_console
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.tables import Adagrad, Sgd
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.cli import main
from trilith_services.console.reader import Reader, age_histogram, norm_histogram
from trilith_services.console.sampling import Sample, quantile
from trilith_services.console.schema import number, numbers
from trilith_services.console.watcher import Watcher
from trilith_services.listening import bind_address as bind
from trilith_services.ps.process.server import ParameterServer
from trilith_services.ps.process.shard import LocalShard

IDS = np.arange(40, dtype=np.uint64)
TOP = 2**64 - 1
THEN = 1_700_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    servers = [ParameterServer(LocalShard(index=index, count=2, threads=1)) for index in range(2)]
    address = "static://" + ",".join(f"127.0.0.1:{server.start()}" for server in servers)
    with trilith.connect(address) as client:
        users = client.table("user", dim=2, optimizer=Adagrad(learning_rate=0.1, initial_accumulator_value=1.0))
        users.apply_gradients(IDS, np.ones((IDS.size, 2), np.float32), request_time=THEN)
        client.table("item", dim=3, optimizer=Sgd(learning_rate=1.0)).assign(
            [TOP], [[0.0, 1.0, 2.0]], request_time=THEN
        )
        client.create_variables({"dense/bias": np.arange(5.0), "scale": np.ones(1)}, optimizer=Sgd())
        client.global_step(set_to=77)
    yield address
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def console(cluster: str) -> Iterator[Console]:
    with open_console(cluster) as console:
        console.until(lambda look: look["totals"]["alive"] == 2)
        yield console


# ---- debugging routes


def test_debugging_variables_are_texts_by_name_and_unknown_ones_are_left_out(console) -> None:
    found = console.debug("variables", {"variable_names": ["scale", "nobody", "dense/bias"]})
    assert found == {"scale": "[1.]", "dense/bias": "[0. 1. 2. 3. 4.]"}


@pytest.mark.parametrize(
    ("route", "body"), [("variables", {}), ("features", {}), ("variables", {"variable_names": []})]
)
def test_debugging_without_names_finds_nothing(console, route, body) -> None:
    assert console.debug(route, body) == {}


def test_debugging_features_are_entry_dumps_as_text(console) -> None:
    body = {"feature_names": ["user", "item", "user", "user", "nobody"], "feature_ids": [7, "-1", "8", 999, 7]}
    found = console.debug("features", body)
    assert {feature: set(rows) for feature, rows in found.items()} == {"user": {"7", "8"}, "item": {"-1"}}
    entry = text_format.Parse(found["user"]["7"], hash_table_pb2.EntryDump())
    assert (entry.id, entry.last_update_ts_sec, len(entry.num)) == (7, THEN, 2)
    np.testing.assert_allclose(entry.opt.dump[0].adagrad.norm, [2.0, 2.0])
    assert text_format.Parse(found["item"]["-1"], hash_table_pb2.EntryDump()).id == -1


def test_debugging_ids_may_be_unsigned_and_are_echoed_as_they_were_written(console) -> None:
    found = console.debug("features", {"feature_names": ["item"], "feature_ids": [TOP]})
    assert "id: -1\n" in found["item"][str(TOP)]


def test_debugging_shows_of_a_long_variable_both_ends() -> None:
    server = ParameterServer(LocalShard(index=0, count=1, threads=1))
    address = f"static://127.0.0.1:{server.start()}"
    with trilith.connect(address) as client, open_console(address) as console:
        client.create_variables({"long": np.arange(200_000.0), "short": np.ones(1)}, optimizer=Sgd())
        console.until(lambda look: look["totals"]["alive"] == 1)
        shown = console.debug("variables", {"variable_names": ["long", "short"]})
    server.stop()
    assert shown["short"] == "[1.]"
    assert shown["long"].split()[:2] == ["[0.00000e+00", "1.00000e+00"]
    assert shown["long"].endswith("1.99999e+05]")
    assert "..." in shown["long"]
    assert len(shown["long"]) < 10_000


@pytest.mark.parametrize(
    ("route", "body", "told"),
    [
        ("features", {"feature_names": ["user"], "feature_ids": []}, "1 feature_names but 0 feature_ids"),
        (
            "features",
            {"feature_names": ["user"], "feature_ids": ["seven"]},
            "invalid literal for int()",
        ),
        (
            "features",
            {"feature_names": ["user"], "feature_ids": [1, 1.5]},
            "feature_ids.1: Value error, 1.5 is no id",
        ),
        ("features", {"feature_names": ["user"], "feature_ids": [True]}, "True is no id"),
        ("features", {"feature_names": ["user"], "feature_ids": [2**64]}, "does not fit in 64 bits"),
        ("features", {"feature_names": "user"}, "feature_names: Input should be a valid"),
        ("features", {"feature_names": ["user"] * 10_001, "feature_ids": [1] * 10_001}, "10000 are the most"),
        ("variables", {"variable_names": [1]}, "variable_names.0: Input should be a valid string"),
        ("variables", [], "Input should be an object"),
        ("variables", b"{", "Invalid JSON"),
        ("variables", b"\xff", "Invalid JSON"),
    ],
)
def test_debugging_failures_are_one_line_under_status_200(console, route, body, told) -> None:
    status, answer = console.ask(f"/debugging/{route}", "POST", body)
    assert (status, answer["status"]) == (200, "fail")
    assert answer["msg"].startswith("InvalidRequestError: ")
    assert told in answer["msg"]
    assert "\n" not in answer["msg"]


def test_a_fault_of_the_console_is_told_without_its_traceback(console, monkeypatch, caplog) -> None:
    def faulty(*given):
        raise RuntimeError("in line 7\nof something")

    monkeypatch.setattr(Reader, "values", faulty)
    answer = console.ask("/debugging/variables", "POST", {"variable_names": ["scale"]})[1]
    told = "InternalError: RuntimeError: in line 7 of something; the console's log has the traceback"
    assert answer == {"status": "fail", "msg": told}
    assert "Traceback" in caplog.text


# ---- who may ask

POSTED = ("/debugging/variables", "POST", {"variable_names": ["scale"]})


@pytest.mark.parametrize("path", ["/", "/api/cluster", "/openapi.json", "/healthz", "/page/console.js"])
@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", "10.1.2.3", "a@localhost", ""],
)
def test_a_host_that_is_not_this_machine_is_refused(console, path, host) -> None:
    status, answer = console.ask(path, Host=host)
    assert (status, answer["error"]) == (403, "InvalidRequestError")
    assert "--allowed-host" in answer["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8080", "a.localhost"])
def test_names_of_this_machine_are_answered(console, host) -> None:
    assert console.ask("/healthz", Host=host)[0] == 200


def test_further_names_are_answered_where_they_are_allowed(cluster) -> None:
    with open_console(cluster, hosts=["console.example", "fd00::1"]) as console:
        for host in ("console.example:443", "Console.Example.", "[fd00::1]:80"):
            assert console.ask("/healthz", Host=host)[0] == 200
        assert console.ask("/healthz", Host="other.example")[0] == 403


def test_health_checks_that_name_no_host_are_answered(console) -> None:
    host, _, port = console.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as stream:
        stream.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")  # as docker-compose.yml does
        assert stream.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:1", "http://localhost"])
def test_pages_of_other_origins_post_nothing(console, origin) -> None:
    status, answer = console.ask(*POSTED, Origin=origin)
    assert (status, answer["error"]) == (403, "InvalidRequestError")
    assert repr(origin) in answer["message"]


def test_the_consoles_own_page_may_post(console) -> None:
    assert console.ask(*POSTED, Origin=console.url, Sec_Fetch_Site="same-origin")[0] == 200
    assert console.ask(*POSTED, Sec_Fetch_Site="cross-site")[0] == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"]
)
def test_what_any_form_can_post_is_refused(console, kind) -> None:
    status, answer = console.ask(*POSTED, kind=kind)
    assert (status, answer["error"]) == (415, "InvalidRequestError")
    assert f"the request's content type is {kind!r}, expected 'application/json'" in answer["message"]


def test_json_may_say_its_encoding(console) -> None:
    assert console.ask(*POSTED, kind="application/json; charset=utf-8")[0] == 200


def test_a_body_beyond_all_measure_is_refused_before_it_is_read(console) -> None:
    assert console.ask(*POSTED, Content_Length=str(10**12))[0] == 413


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/api/tables/user/rows/7", {"weights": [1, 2]}),
        ("DELETE", "/api/tables/user/rows/7", None),
        ("DELETE", "/api/tables/user/expired", None),
    ],
)
def test_no_other_page_and_no_other_name_changes_anything(cluster, method, path, body) -> None:
    with open_console(cluster, writable=True) as console:
        console.until(lambda look: look["totals"]["alive"] == 2)
        assert console.ask(path, method, body, Origin="http://evil.example")[0] == 403
        # A name that was made to stand for 127.0.0.1: to the browser it is the same origin.
        assert console.ask(path, method, body, Origin="http://evil.example", Host="evil.example")[0] == 403
        assert console.get("/api/tables/user/rows/7")["found"]


# ---- the API


def test_the_cluster_is_described(console) -> None:
    look = console.until(lambda look: look["totals"]["alive"] == 2)
    overview = console.get("/api/cluster")
    assert overview["cluster"].startswith("static://")
    assert not overview["writable"]
    assert [(shard["index"], shard["alive"], shard["rows"]) for shard in look["shards"]] == [
        (0, True, 20),
        (1, True, 21),
    ]
    assert {table["name"]: table["rows_by_shard"] for table in look["tables"]} == {"item": [0, 1], "user": [20, 20]}
    assert (look["totals"]["rows"], look["totals"]["global_step"], look["problem"]) == (41, 77, None)
    assert {each["method"] for each in look["shards"][0]["latencies"]} >= {"ApplyGradients", "Stats"}


def test_rates_and_latencies_follow_what_clients_do(console, cluster) -> None:
    def busy(look) -> bool:
        client.lookup({"user": IDS})
        timed = [each for shard in look["shards"] for each in shard["latencies"] if each["method"] == "Lookup"]
        return look["totals"]["lookups_per_s"] > 0 and any(each["p99_ms"] for each in timed)

    with trilith.connect(cluster) as client:
        look = console.until(busy)
    user = next(table for table in look["tables"] if table["name"] == "user")
    assert user["lookups_per_s"] > 0
    assert user["hit_ratio"] == 1.0


def test_events_bring_every_look(console) -> None:
    with urllib.request.urlopen(console.url + "/api/events", timeout=20) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        seen = [json.loads(line[6:]) for line in (stream.readline() for _ in range(9)) if line.startswith(b"data: ")]
    assert len(seen) == 3
    assert seen[0]["unix_s"] < seen[1]["unix_s"] < seen[2]["unix_s"]


def test_tables_are_shown_with_their_configs(console) -> None:
    user = console.get("/api/tables/user")
    assert user in console.get("/api/tables")
    assert (user["dim"], user["config"]["name"]) == (2, "user")
    assert user["segments"][0]["optimizer"].startswith("adagrad(learning_rate=0.1, initial_accumulator_value=1.0")


def test_a_row_is_shown_with_owner_weights_state_and_age(console, cluster) -> None:
    row = console.get("/api/tables/user/rows/0x7")
    with trilith.connect(cluster) as client:
        weights = client.table("user").lookup([7])[0]
    np.testing.assert_array_equal(np.array(row["weights"], np.float32), weights)
    assert (row["id"], row["owner"], row["found"], row["last_update_unix_s"]) == ("7", 1, True, THEN)
    assert row["address"] == cluster.rpartition(",")[2]
    assert row["optimizers"] == [{"optimizer": "adagrad", "slots": {"norm": [2.0, 2.0]}}]
    assert abs(row["age_s"] - (time.time() - THEN)) < 60


def test_signed_and_unsigned_ids_are_the_same_row(console) -> None:
    signed, unsigned = (console.get(f"/api/tables/item/rows/{text}") for text in ("-1", TOP))
    assert signed["weights"] == unsigned["weights"] == [0.0, 1.0, 2.0]
    assert (signed["id"], signed["signed_id"], signed["owner"]) == (str(TOP), "-1", 1)


def test_an_id_without_a_row_is_not_found(console) -> None:
    row = console.get("/api/tables/user/rows/999")
    assert (row["found"], row["weights"], row["owner"], row["age_s"]) == (False, [], 1, None)


def test_the_distribution_counts_what_it_sampled(console) -> None:
    found = console.get("/api/tables/user/distribution?sample=1000")
    assert (found["rows"], found["sampled"], found["silent_shards"]) == (40, 40, [])
    assert sum(found["norms"]["counts"]) == sum(found["ages"]["counts"]) == 40
    assert console.get("/api/tables/user/distribution?sample=10")["sampled"] == 10


def test_variables_are_shown_with_their_values(console) -> None:
    assert [each["name"] for each in console.get("/api/variables")] == ["dense/bias", "scale"]
    bias = console.get("/api/variables/dense/bias")
    assert (bias["values"], bias["floats"], bias["mean"], bias["greatest"]) == ([0, 1, 2, 3, 4], 5, 2, 4)


@pytest.mark.parametrize(
    ("path", "status", "error", "told"),
    [
        ("/api/tables/nobody", 404, "UnknownTableError", "no table 'nobody'; this cluster has ['item', 'user']"),
        ("/api/tables/nobody/rows/1", 404, "UnknownTableError", "nobody"),
        ("/api/tables/nobody/distribution", 404, "UnknownTableError", "nobody"),
        ("/api/variables/nobody", 404, "UnknownVariableError", "['dense/bias', 'scale']"),
        ("/api/tables/user/rows/seven", 400, "InvalidRequestError", "path.id"),
        ("/api/tables/user/rows/18446744073709551616", 400, "InvalidRequestError", "does not fit in 64 bits"),
        ("/api/tables/user/distribution?sample=0", 400, "InvalidRequestError", "query.sample"),
        ("/nothing", 404, "InvalidRequestError", "GET /docs lists what there is"),
    ],
)
def test_failures_name_the_class_of_the_error(console, path, status, error, told) -> None:
    got, answer = console.ask(path)
    assert (got, answer["error"]) == (status, error)
    assert told in answer["message"]


@pytest.mark.parametrize("path", ["/", "/docs", "/page/style.css", "/page/console.js", "/openapi.json", "/healthz"])
def test_nothing_is_loaded_from_elsewhere(console, path) -> None:
    with urllib.request.urlopen(console.url + path, timeout=20) as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        text = response.read().decode()
    assert "https://" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


# ---- writes


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/api/tables/user/rows/7", {"weights": [1, 2]}),
        ("DELETE", "/api/tables/user/rows/7", None),
        ("DELETE", "/api/tables/user/expired", None),
    ],
)
def test_writes_are_refused_unless_allowed(console, method, path, body) -> None:
    status, answer = console.ask(path, method, body)
    assert (status, answer["error"]) == (403, "ReadOnlyError")
    assert "--allow-writes" in answer["message"]


def test_a_console_that_may_write_sets_and_deletes_rows(cluster) -> None:
    with open_console(cluster, writable=True) as console:
        console.until(lambda look: look["totals"]["alive"] == 2)
        status, row = console.ask("/api/tables/user/rows/1000", "PUT", {"weights": [0.5, -2]})
        assert (status, row["found"], row["weights"]) == (200, True, [0.5, -2.0])
        status, answer = console.ask("/api/tables/user/rows/1000", "PUT", {"weights": [1]})
        assert (status, answer["error"]) == (400, "InvalidRequestError")
        assert "1 weights for table 'user', whose rows have 2" in answer["message"]
        assert console.ask("/api/tables/user/rows/1000", "DELETE") == (200, {"rows": 1})
        assert console.ask("/api/tables/user/rows/1000", "DELETE") == (200, {"rows": 0})
        assert console.ask("/api/tables/user/expired", "DELETE") == (200, {"rows": 0})
        assert console.ask("/api/tables/nobody/expired", "DELETE")[0] == 404


# ---- when PS are away


def test_a_console_waits_for_a_cluster_and_outlives_its_ps(tmp_path) -> None:
    with open_console(f"hosts://{tmp_path}", timeout_s=0.5) as console:
        look = console.until(lambda look: look["problem"] and look["problem"]["error"] == "ClusterMismatchError")
        assert look["shards"] == []
        assert console.ask("/api/tables") == (409, look["problem"])

        store = LocalShard(index=0, count=1, threads=1)
        server = ParameterServer(store)
        port = server.start()
        (tmp_path / "ps").mkdir(exist_ok=True)
        (tmp_path / "ps" / "0").write_text(f"127.0.0.1:{port}")
        look = console.until(lambda look: look["totals"]["alive"] == 1)
        server.stop()
        look = console.until(lambda look: look["totals"]["alive"] == 0 and look["shards"])
        assert "shard 0" in look["shards"][0]["error"]
        status, answer = console.ask("/api/tables")
        assert (status, answer["error"]) == (503, "UnavailableError")
        assert (
            console.ask("/debugging/features", "POST", {"feature_names": ["a"], "feature_ids": [1]})[1]["status"]
            == "fail"
        )

        again = ParameterServer(LocalShard(index=0, count=1, threads=1))
        again.start(f"127.0.0.1:{port}")
        console.until(lambda look: look["totals"]["alive"] == 1)
        again.stop()


def test_a_cluster_that_was_made_anew_is_counted_again(cluster, tmp_path) -> None:
    first, second = cluster.removeprefix("static://").split(",")
    (tmp_path / "ps").mkdir()
    (tmp_path / "ps" / "0").write_text(first)
    with open_console(f"hosts://{tmp_path}") as console:
        console.until(lambda look: len(look["shards"]) == 1)  # which says that it is one of two
        (tmp_path / "ps" / "1").write_text(second)
        console.until(lambda look: look["totals"]["alive"] == 2)
        (tmp_path / "ps" / "0").unlink()
        look = console.until(lambda look: look["shards"][0]["address"] == "")
        assert (len(look["shards"]), look["problem"]) == (2, None)  # a PS that is not listed still belongs to it


def test_a_ps_at_anothers_place_is_told_of_and_not_asked(cluster) -> None:
    swapped = "static://" + ",".join(reversed(cluster.removeprefix("static://").split(",")))
    with open_console(swapped) as console:
        look = console.until(lambda look: look["shards"] and "by its place" in look["shards"][0]["error"])
        assert [shard["alive"] for shard in look["shards"]] == [False, False]
        assert "is shard 0 of 2, owner rule 'mod' by its place, and shard 1 of 2" in look["shards"][0]["error"]
        status, answer = console.ask("/api/tables/user/rows/7")
        assert (status, answer["error"]) == (409, "ClusterMismatchError")


def test_credentials_are_never_shown() -> None:
    with open_console("zk://user:geheim@127.0.0.1:1/trilith", timeout_s=0.3) as console:
        console.until(lambda look: look["problem"])
        for path in ("/api/cluster", "/api/tables"):
            assert "geheim" not in json.dumps(console.ask(path))
        assert "geheim" not in json.dumps(console.ask("/debugging/variables", "POST", {"variable_names": ["a"]}))


def test_replicas_are_found_in_other_directories_too(cluster, tmp_path) -> None:
    (tmp_path / "clicks-ps-1").mkdir()
    (tmp_path / "clicks-ps-1" / "4").write_text(cluster.rpartition(",")[2])  # any shard will do
    with open_console(cluster, serving=f"hosts://{tmp_path}", model="clicks") as console:
        look = console.until(lambda look: look["replicas"] and look["replicas"][-1]["alive"])
        missing, replica = look["replicas"]
        assert (missing["shard"], missing["state"], missing["alive"]) == (0, "missing", False)
        assert (replica["shard"], replica["name"], replica["alive"], replica["rows"]) == (1, "replica-4", True, 21)
        copies = console.get("/api/tables/user/rows/7")["replicas"]
        assert [(copy["name"], copy["found"], copy["largest_difference"]) for copy in copies] == [
            ("replica-4", True, 0)
        ]
        assert console.get("/api/tables/user/rows/7?replicas=false")["replicas"] == []


@pytest.mark.parametrize("url", ["nothing://", "static://nohost", "zk://"])
def test_a_url_that_can_never_be_a_cluster_is_refused_at_once(url) -> None:
    with pytest.raises(InvalidRequestError):
        Watcher(url)


@pytest.mark.parametrize("listen", ["8080", "localhost:http", "::1:8080", "127.0.0.1:99999"])
def test_listening_takes_host_and_port(listen) -> None:
    with pytest.raises(InvalidRequestError, match="is not host:port"):
        bind(listen)


def test_a_taken_port_is_told_of() -> None:
    with bind("127.0.0.1:0") as taken, pytest.raises(UnavailableError, match="cannot listen on"):
        bind(f"127.0.0.1:{taken.getsockname()[1]}")


# ---- numbers


def test_quantiles_are_found_within_their_bucket() -> None:
    bounds = [1.0, 2.0, 4.0]
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None
    assert quantile(bounds, [10, 0, 0, 0], 0.5) == 0.5
    assert quantile(bounds, [5, 0, 5, 0], 0.75) == 3.0
    assert quantile(bounds, [0, 0, 0, 7], 0.99) == 4.0


def test_a_sample_of_another_incarnation_starts_counting_anew() -> None:
    old, new = (Sample(at, ps_pb2.StatsResponse(incarnation=name)) for at, name in ((1.0, 1), (3.0, 2)))
    assert new.after(old).before is None
    assert new.after(old).rate(100, 0) == 0.0
    same = Sample(3.0, ps_pb2.StatsResponse(incarnation=1)).after(old)
    assert same.rate(100, 40) == 30.0
    assert same.after(same).rate(1, 0) == 0.0  # no time has passed


@pytest.mark.parametrize("histogram", [norm_histogram, age_histogram])
@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.25], [0.0, 1e9], [1e-30, 1.0, 1e30]])
def test_a_histogram_counts_every_value_once(histogram, values) -> None:
    found = histogram(np.array(values, np.float64))
    assert sum(found.counts) == len(values)
    assert found.edges == sorted(found.edges)
    assert len(found.edges) == (len(found.counts) + 1 if values else 0)


def test_floats_are_written_in_their_shortest_form_and_others_as_words() -> None:
    assert numbers([0.1, -1.0, float("nan"), float("inf"), -float("inf")]) == [
        0.1,
        -1.0,
        "NaN",
        "Infinity",
        "-Infinity",
    ]
    assert number(1e300) == 1e300
    assert number(float(np.float32(1e-45))) == 1e-45


# ---- trilith debug


@pytest.fixture
def debug(console, capsys):
    port = console.url.rpartition(":")[2]

    def run(*arguments: str):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["debug", "--port", port, *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def test_debug_prints_variables(debug) -> None:
    shown = debug("--type", "debugging_variables", "--variable-names", "scale,nobody")
    assert shown == (0, "scale: [1.]\nnobody: Not exist\n", "")


def test_debug_repeats_one_feature_name_for_all_ids(debug) -> None:
    status, out, _ = debug("--type", "debugging_features", "--feature_name", "user", "--feature_ids", "7,999")
    assert status == 0
    assert out.startswith("user 7:\nid: 7\nnum: ")
    assert out.endswith("user 999: Not exist\n")


def test_debug_takes_a_name_for_each_id(debug) -> None:
    status, out, _ = debug("--type", "debugging_features", "--feature-names", "user,item", "--feature-ids=7,-1")
    assert status == 0
    assert "item -1:\nid: -1\n" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--feature-name=a", "--feature-names=b", "--feature-ids=1"), "exclude each other"),
        (("--feature-names=a,b", "--feature-ids=1"), "2 feature names for 1 ids"),
        (("--feature-name=a", "--feature-ids=x"), "'x' is no id"),
    ],
)
def test_debug_refuses_what_does_not_fit(debug, arguments, told) -> None:
    status, _, err = debug("--type", "debugging_features", *arguments)
    assert status == 2
    assert told in err


@pytest.mark.parametrize("kind", ["debugging_variables", "debugging_features"])
def test_debug_with_nothing_to_ask_says_so_and_succeeds(debug, kind) -> None:
    status, out, err = debug("--type", kind)
    assert (status, out) == (0, "")
    assert "are given" in err


def test_debug_with_a_ps_away_is_one_line(capsys, tmp_path) -> None:
    (tmp_path / "ps").mkdir()
    (tmp_path / "ps" / "0").write_text("127.0.0.1:1")
    with open_console(f"hosts://{tmp_path}", timeout_s=0.5) as console:
        port = console.url.rpartition(":")[2]
        with pytest.raises(SystemExit) as ended:
            main(["debug", "--port", port, "--type", "debugging_variables", "--variable-names", "a"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the console could not answer: ")
    assert "Error: " in told.removeprefix("error: the console could not answer: ")
    assert len(told.splitlines()) == 1


def test_debug_goes_to_no_proxy(debug, monkeypatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert debug("--type", "debugging_variables", "--variable-names", "scale")[0] == 0


def test_debug_without_a_console_is_one_line(capsys) -> None:
    with bind("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as ended:
        main(["debug", "--port", str(port), "--type", "debugging_variables", "--variable-names", "a"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: no console answers at http://127.0.0.1:{port}")

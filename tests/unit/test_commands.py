"""What a person sees of the operator's commands: results, errors in one line, exit statuses."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from rich.console import Console

import trilith
import trilith.data
from trilith import checkpoint
from trilith.tables import Adagrad, Adam, Sgd
from trilith_services.cli import app, main
from trilith_services.commands import output
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard

ROOT = Path(__file__).parents[2]
IDS = np.arange(100, dtype=np.uint64)


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Output without the columns' padding."""
        return re.sub(r"[ \t]+", " ", self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        shown = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two PS in this process, with rows and a variable."""
    options = PsOptions(checkpoint_anywhere=True)
    servers = [ParameterServer(LocalShard(index=index, count=2, threads=1), options) for index in range(2)]
    address = "static://" + ",".join(f"127.0.0.1:{server.start()}" for server in servers)
    with trilith.connect(address) as client:
        fill(client)
    yield address
    for server in servers:
        server.stop()


def fill(client: trilith.Client) -> None:
    users = client.table("user", dim=2, optimizer=Adam(learning_rate=0.1))
    users.apply_gradients(IDS, np.ones((IDS.size, 2), np.float32), request_time=1_700_000_000)
    top = np.array([2**64 - 1], np.uint64)
    client.table("item", dim=3, optimizer=Sgd(learning_rate=1.0)).assign(top, np.arange(3, dtype=np.float32)[None])
    client.create_variables({"bias": np.zeros(5, np.float32)}, optimizer=Sgd())
    client.global_step(set_to=1234)


@pytest.fixture(scope="module")
def saved(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one complete and one incomplete checkpoint."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with trilith.connect(cluster) as client:
        client.save(str(directory / checkpoint.checkpoint_name(1_700_000_000_000)))
    (directory / checkpoint.checkpoint_name(1_700_000_060_000)).mkdir()
    return directory


# ---- checkpoint


def test_list_shows_complete_and_incomplete_checkpoints(run, saved) -> None:
    shown = run("checkpoint", "list", str(saved))
    assert shown.status == 0
    lines = shown.words.splitlines()
    assert lines[0].split() == ["checkpoint", "tick", "state", "step", "PS", "rows", "size"]
    assert re.search(r"ckpt-00000001700000000000 2023-.* complete 1,234 2 101 \d", lines[1])
    assert re.search(r"ckpt-00000001700000060000 2023-.* incomplete - - - -", lines[2])


def test_list_of_a_checkpoint_shows_itself(run, saved) -> None:
    shown = run("checkpoint", "list", str(saved / checkpoint.checkpoint_name(1_700_000_000_000)), "--json")
    (entry,) = json.loads(shown.out)
    assert entry["state"] == "complete"
    assert entry["global_step"] == 1234


def test_list_as_json(run, saved) -> None:
    entries = json.loads(run("checkpoint", "list", str(saved), "--json").out)
    assert [entry["state"] for entry in entries] == ["complete", "incomplete"]
    assert entries[0]["rows"] == {"item": 1, "user": 100}


def test_list_of_nothing_is_an_error_of_one_line(run, tmp_path) -> None:
    shown = run("checkpoint", "list", str(tmp_path))
    assert shown.status == 2
    assert shown.err == f"error: no checkpoints in '{tmp_path}': they are directories called ckpt-<20 digits>\n"


def test_inspect_takes_the_newest_complete_checkpoint_of_a_directory(run, saved) -> None:
    shown = run("checkpoint", "inspect", str(saved))
    assert shown.status == 0
    assert shown.out.startswith(str(saved / checkpoint.checkpoint_name(1_700_000_000_000)))
    assert "step 1,234, 2 PS" in shown.words
    assert re.search(r"item 3 sgd 0 1 .* 0 1", shown.words)
    assert re.search(r"user 2 adam 6 100 .* 50 50", shown.words)
    assert "bias 5 1 sgd" in shown.words


def test_inspect_as_json(run, saved) -> None:
    described = json.loads(run("checkpoint", "inspect", str(saved), "--json").out)
    assert [table["table"] for table in described["tables"]] == ["item", "user"]
    assert described["variables"] == [{"name": "bias", "floats": 5, "partitions": 1, "optimizer": "sgd"}]


def test_inspect_of_nothing_says_so(run, tmp_path) -> None:
    shown = run("checkpoint", "inspect", str(tmp_path / "nothing"))
    assert shown.status == 2
    assert shown.err == f"error: {tmp_path / 'nothing'}: no manifest.json: nothing is there\n"


def test_verify_says_all_good_or_names_the_damage(run, cluster, tmp_path) -> None:
    with trilith.connect(cluster) as client:
        client.save(str(tmp_path))
    shown = run("checkpoint", "verify", str(tmp_path))
    assert (shown.status, shown.out.startswith(f"{tmp_path}: 6 files")) == (0, True)
    assert shown.out.endswith("101 rows: all good\n")
    (victim,) = tmp_path.glob("table-user.00001-*")
    victim.write_bytes(victim.read_bytes()[:-8])
    shown = run("checkpoint", "verify", str(tmp_path))
    assert shown.status == 1
    assert "1 of 6 files are damaged" in shown.err
    assert victim.name in shown.err


def test_export_writes_parquet_with_a_column_per_slot(run, saved, tmp_path) -> None:
    shown = run("checkpoint", "export", str(saved), str(tmp_path / "out"))
    assert (shown.status, shown.out) == (0, f"101 rows of 2 table(s) exported to {tmp_path / 'out'}\n")
    table = pq.read_table(tmp_path / "out" / "user")
    assert table.column_names == ["id", "weights", "m", "v", "beta1_power", "beta2_power", "last_update"]
    assert sorted(table["id"].to_pylist()) == IDS.tolist()
    assert {moment.timestamp() for moment in table["last_update"].to_pylist()} == {1_700_000_000.0}
    item = pq.read_table(tmp_path / "out" / "item")
    assert item["weights"].to_pylist() == [[0.0, 1.0, 2.0]]
    assert pq.read_table(tmp_path / "out" / "variables.parquet")["name"].to_pylist() == ["bias"]


def test_export_of_an_unknown_table_names_those_there_are(run, saved, tmp_path) -> None:
    shown = run("checkpoint", "export", str(saved), str(tmp_path), "--table", "users")
    assert shown.status == 2
    assert "no table 'users'" in shown.err
    assert "['item', 'user']" in shown.err


# ---- query


def test_query_shows_owner_weights_state_and_age(run, cluster) -> None:
    shown = run("query", cluster, "user", "7")
    assert shown.status == 0
    assert re.search(r"user id 7 on PS 1 \(127\.0\.0\.1:\d+\)", shown.out)
    assert re.search(r"age 2023-\d\d-\d\d .* ago\)", shown.words)
    assert re.search(r"weights -0\.\d+ -0\.\d+ ?\n", shown.words)
    assert re.search(r"adam m 0\.\d+ 0\.\d+ ?\n adam v ", shown.words)


def test_query_takes_signed_and_hexadecimal_ids(run, cluster) -> None:
    for text in ("-1", "0xffffffffffffffff", "18446744073709551615"):
        (entry,) = json.loads(run("query", cluster, "item", text, "--json").out)
        assert (entry["id"], entry["owner"], entry["weights"]) == (2**64 - 1, 1, [0.0, 1.0, 2.0])


def test_query_of_an_id_without_row_ends_with_status_1(run, cluster) -> None:
    shown = run("query", cluster, "user", "7", "777777")
    assert shown.status == 1
    assert "no row" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CLUSTER", "nobody", "7"], "no table 'nobody'; this cluster has ['item', 'user']"),
        (["CLUSTER", "user", "seven"], "'seven' is no id; ids are numbers such as 42, -1 or 0x2a"),
        (["CLUSTER", "user", str(2**64)], "does not fit in 64 bits"),
        (
            ["localhost:1", "user", "7"],
            "'localhost:1' is no directory of a cluster; write static://host:port,host:port",
        ),
    ],
)
def test_query_errors_are_one_line(run, cluster, arguments, message) -> None:
    shown = run("query", *(cluster if argument == "CLUSTER" else argument for argument in arguments))
    assert shown.status == 2
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("width", [80, 160])
def test_query_shows_names_and_numbers_whole(run, cluster, monkeypatch, width) -> None:
    narrow = partial(Console, width=width, highlight=False)
    monkeypatch.setattr(output, "console", lambda stderr=False: narrow(stderr=stderr))
    with trilith.connect(cluster) as client:
        wide = client.table("wide", dim=16, optimizer=Adagrad(learning_rate=0.1))
        wide.apply_gradients(np.array([7], np.uint64), np.full((1, 16), 1 / 3, np.float32))
    shown = run("query", cluster, "wide", "7")
    assert "…" not in shown.out
    assert all(len(line) <= width for line in shown.out.splitlines())
    assert {"weights", "adagrad norm"} < set(re.findall(r"^  (\w+(?: \w+)?)  ", shown.out, re.MULTILINE))


# ---- top


def test_top_once_shows_shards_and_tables(run, cluster) -> None:
    shown = run("top", cluster, "--once", "--interval", "0.1")
    assert shown.status == 0
    assert "2 of 2 PS answer" in shown.out
    assert re.search(r"user 100 ", shown.words)


def test_top_shows_a_ps_that_does_not_answer_and_the_others(run, cluster) -> None:
    from trilith_services.local.supervisor import free_ports

    first, second = cluster.removeprefix("static://").split(",")
    shown = run(
        "top", f"static://{first},{second},127.0.0.1:{free_ports(1)[0]}", "--once", "--interval", "0.1", "--json"
    )
    assert shown.status == 1
    look = json.loads(shown.out)
    assert [shard["alive"] for shard in look["shards"]] == [True, True, False]
    assert look["tables"]["user"]["rows"] == 100


def test_top_leaves_columns_out_where_the_terminal_is_narrow(run, cluster, monkeypatch) -> None:
    narrow = partial(Console, width=80, highlight=False)
    monkeypatch.setattr(output, "console", lambda stderr=False: narrow(stderr=stderr))
    shown = run("top", cluster, "--once", "--interval", "0.1")
    assert "…" not in shown.out
    heading = shown.words.splitlines()[2].split()
    assert heading[:6] == ["PS", "address", "up", "step", "rows", "memory"]
    assert heading[-1] == "checkpoint"
    assert "resident" not in heading


def test_top_tells_of_ps_in_the_wrong_place(run, cluster) -> None:
    first, second = cluster.removeprefix("static://").split(",")
    shown = run("top", f"static://{second},{first}", "--once", "--interval", "0.1")
    assert f"{second} is shard 1 of 2, not 0 of 2: no client accepts that" in shown.out
    assert f"{first} is shard 0 of 2, not 1 of 2" in shown.out


# ---- bench


@pytest.mark.parametrize("verb", ["lookup", "apply", "step", "assign"])
@pytest.mark.parametrize("where", ["local", "cluster"])
def test_bench_measures_and_checks_values(run, cluster, verb, where) -> None:
    address = "local://" if where == "local" else cluster
    load = ["--ids", "300", "--dim", "2", "--batch", "64", "--threads", "2", "--seconds", "0.2"]
    shown = run("bench", address, "--verb", verb, *load, "--json")
    assert shown.status == 0
    result = json.loads(shown.out)
    assert result["calls"] > 0
    assert result["ids_per_s"] > 0
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert result["checked_values"] >= 600
    assert result["wrong_values"] == 0


def test_bench_leaves_no_rows(run, cluster) -> None:
    run("bench", cluster, "--ids", "100", "--dim", "5", "--batch", "10", "--seconds", "0.1", "--zipf", "0")
    with trilith.connect(cluster) as client:
        assert client.table("trilith_bench_d5").size() == 0


def test_bench_notices_a_wrong_value(run, monkeypatch) -> None:
    from trilith.client import Table

    honest = Table.lookup
    monkeypatch.setattr(Table, "lookup", lambda self, ids: honest(self, ids) + np.float32(0.5))
    shown = run("bench", "local://", "--ids", "100", "--dim", "2", "--batch", "10", "--seconds", "0.1")
    assert shown.status == 1
    assert "wrong" in shown.out


def test_an_error_of_one_ps_says_which(run) -> None:
    servers = [ParameterServer(LocalShard(index=k, count=2, threads=1, memory_limit_bytes=1 << 16)) for k in range(2)]
    addresses = [f"127.0.0.1:{server.start()}" for server in servers]
    try:
        shown = run("bench", f"static://{addresses[0]},{addresses[1]}", "--ids", "100000", "--dim", "4")
    finally:
        for server in servers:
            server.stop()
    assert shown.status == 2
    told = re.search(r"^error: .* new rows need .* \(raised by shard (\d) at ([\d.:]+)", shown.err, re.MULTILINE)
    assert told is not None, shown.err
    assert told[2] == addresses[int(told[1])]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--count", "2"], "--index must say which of the PS in static://a:7000,b:7001 this one is"),
        (["--index", "1", "--count", "3"], "--count 3, but static://a:7000,b:7001 has 2"),
        (["--index", "2"], "--index 2, but static://a:7000,b:7001 has 0..1"),
        (
            ["--index", "0", "--listen", "0.0.0.0:7001"],
            "PS 0 is at 0.0.0.0:7001, but static://a:7000,b:7001 has",
        ),
        (["--index", "1", "--advertise", "elsewhere"], "PS 1 is at elsewhere:7000, but static://a:7000,b:7001"),
        (["--index", "1", "--advertise", "b:7000"], "PS 1 is at b:7000, but static://a:7000,b:7001 has it at b:7001"),
    ],
)
def test_a_ps_that_contradicts_the_list_does_not_start(run, flags, why) -> None:
    shown = run("ps", "--discovery", "static://a:7000,b:7001", *flags)
    assert shown.status == 2
    assert why in shown.err


# ---- how things are said


def test_the_version_is_that_of_the_project(run) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").out == f"trilith {project['version']}\n"
    assert trilith.__version__ == project["version"]


def test_what_is_loaded_late_is_listed_all_the_same() -> None:
    for module in (trilith, trilith.data):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in dir(module))
    assert "nn" in dir(trilith)


def test_a_ps_that_would_keep_nothing_says_so(run, monkeypatch) -> None:
    monkeypatch.setattr(ParameterServer, "run", lambda self, listen, **more: 0)
    for flags, said in (([], True), (["--checkpoint-every", "60"], False)):
        shown = run("ps", "--checkpoint-dir", "/no/such", *flags)
        assert (shown.status, "give --checkpoint-every SECONDS" in shown.err) == (0, said)


def test_sizes_ages_and_counts_read_well() -> None:
    assert [output.size(n) for n in (0, 999, 1500, 2_000_000, 3.2e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3.2 GB",
        "5.0 TB",
    ]
    assert [output.age(s) for s in (0, 59, 61, 3700, 90_000, -0.5, -30)] == [
        "0s",
        "59s",
        "1m 01s",
        "1h 01m",
        "1d 01h",
        "now",
        "in 30s",
    ]
    assert output.count(1234567) == "1,234,567"
    assert output.moment(0) == "never"
    assert output.moment(1_700_000_000, now=1_700_000_061).endswith("(1m 01s ago)")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ps", "--memory-limit", "0.5"], "--memory-limit: '0.5' is not a size; write 512M, 16G or a number of bytes"),
        (["ps", "--memory-limit", "12Q"], "--memory-limit: '12Q' is not a size; write 512M, 16G or a number of bytes"),
        (["ps", "--max-message", "5G"], "--max-message: '5G' is outside 1..2047M"),
        (["ps", "--checkpoint-every", "5"], "--checkpoint-every 5 needs --checkpoint-dir"),
        (
            ["up", "--", "--data", "x"],
            "flags for workers, '--data x': say with --job what they train, as MODULE:JOB, such",
        ),
        (["up", "--workers", "2"], "--workers 2: say with --job what they train, as MODULE:JOB, such as trilith_serv"),
        (["up", "--address-file", "/no/such/a"], "--address-file /no/such/a: there is no directory /no/such"),
        (["ps", "--listen", "nonsense"], "--listen: 'nonsense' is not host:port"),
        (["serving", "entry", "--export", "x", "--http", ":70000"], "--http: ':70000' is not host:port"),
        (["data", "count", "x", "--format", "xyz"], "--format: 'xyz' is none of records, tfrecord, parquet, csv"),
        (
            ["data", "convert", "x", "-o", "y", "--to-format", "csv"],
            "--to-format: 'csv' is none of records, tfrecord, parquet",
        ),
        (["data", "count", "x", "--kind", "xyz"], "--kind: 'xyz' is none of instance, "),
        (["ps", "--index=-1"], "--index: it should be greater than or equal to 0, not '-1'; see trilith ps --help"),
        (["ps", "--log-level", "LOUD"], "--log-level: 'LOUD' is not one of 'debug', 'info', 'warning', 'error'; see"),
        (["ps", "--fast"], "No such option: --fast; see trilith ps --help"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag_and_what_would_be_right(run, arguments, says) -> None:
    shown = run(*arguments)
    assert (shown.status, shown.err.startswith(f"error: {says}")) == (2, True), shown.err
    assert shown.err.count("\n") == 1


def test_every_command_and_option_says_what_it_is() -> None:
    def check(name: str, command: click.Command) -> None:
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", "") or parameter.name == "help", (name, parameter.name)
        for child, subcommand in getattr(command, "commands", {}).items():
            check(f"{name} {child}", subcommand)

    check("trilith", typer.main.get_command(app))

"""Without an optional package: one line that names the extra which brings it, for every command and in the library."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest

import trilith
from trilith.errors import InvalidRequestError, MissingExtraError, TrilithError
from trilith.runtime.extras import missing_extra, need

connecting = importlib.import_module("trilith.connect")  # `trilith.connect` itself is the function

# As if the packages were not installed, also to those who look first.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(blocked: set[str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + textwrap.dedent(program)],
        check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "blocked", "extra"),
    [
        ("worker shop:job", "torch", "torch"),
        ("demo", "torch", "torch"),
        ("demo --export e", "safetensors", "serving"),
        ("up --job shop:job", "torch", "torch"),
        ("export here there", "torch", "serving"),
        ("export here there", "safetensors", "serving"),
        ("serving entry --export here", "torch", "serving"),
        ("serving entry --export here", "fastapi", "serving"),
        ("serving entry --export here", "uvicorn", "serving"),
        ("console --cluster static://127.0.0.1:1", "fastapi", "console"),
        ("console --cluster static://127.0.0.1:1", "uvicorn", "console"),
    ],
)
def test_a_command_without_its_extra_is_one_line(command, blocked, extra, tmp_path) -> None:
    done = run({blocked}, f"from trilith_services.cli import main; main({command.split()!r})")
    assert done.stderr == f"error: {blocked} is not installed; pip install 'trilith[{extra}]' brings it\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_a_module_that_is_met_in_the_middle_is_one_line_too() -> None:
    done = run(
        {"torch"},
        """
        from trilith_services import cli
        @cli.app.command()
        def late():
            import torch.nn
        cli.main(["late"])
        """,
    )
    assert done.stderr == "error: torch is not installed; pip install 'trilith[torch]' brings it\n"


@pytest.mark.parametrize(
    ("program", "blocked", "extra"),
    [
        ("import trilith.nn", "torch", "torch"),
        ("from trilith.nn import EmbeddingRows", "torch", "torch"),
        ("from trilith.nn.deepfm import DeepFM", "torch", "torch"),
        ("import trilith; trilith.nn", "torch", "torch"),
        ("from trilith.peers import connect_peers; connect_peers()", "torch", "torch"),
        ("import trilith.data as d; d.from_records([b'']).torch()", "torch", "torch"),
        (
            "import numpy as n, trilith.data as d; d.Ragged(n.ones(1), n.array([0, 1])).torch_offsets()",
            "torch",
            "torch",
        ),
        ("import trilith.data as d; d.read_kafka('topic')", "confluent_kafka", "data"),
        ("from trilith.nn.program import pack_weights; pack_weights({})", "safetensors", "serving"),
        ("from trilith_services.exporting import Exporter", "torch", "torch"),
    ],
)
def test_the_library_says_which_extra_is_missing(program, blocked, extra) -> None:
    done = run(
        {blocked},
        f"""
        from trilith.errors import MissingExtraError
        try:
            {program}
        except MissingExtraError as error:
            print(error, "|", error.name)
        """,
    )
    told = f"{blocked} is not installed; pip install 'trilith[{extra}]' brings it"
    assert done.stdout == f"{told} | {blocked}\n", done.stderr


def test_everything_else_works_without_extras() -> None:
    done = run(
        {"torch", "safetensors", "fastapi", "uvicorn", "starlette", "confluent_kafka"},
        """
        import trilith.data, trilith.tables
        import trilith_services.ps.process.server, trilith_services.ps.process.replica_server
        from trilith_services.cli import main
        main(["--help"])
        """,
    )
    assert done.returncode == 0, done.stderr


def test_it_is_an_import_error_of_ours() -> None:
    with pytest.raises(ImportError) as caught:
        need("numpy", "no_such_package", extra="torch")
    assert isinstance(caught.value, MissingExtraError)
    assert isinstance(caught.value, TrilithError)
    other = ModuleNotFoundError("No module named 'of_somebody'", name="of_somebody")
    assert missing_extra(other) is other


def test_without_the_services_installed_local_says_what_is_missing(monkeypatch) -> None:
    connecting._engine.cache_clear()
    monkeypatch.setattr(metadata, "entry_points", lambda **which: metadata.EntryPoints())
    with pytest.raises(InvalidRequestError, match=r"trilith\.engines.*make venv"):
        trilith.connect("local://")

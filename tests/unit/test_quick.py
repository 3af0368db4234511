"""`make quick`: no source is of no part, and what has changed leads to its part."""

from __future__ import annotations

import subprocess

import pytest

from tests.quick import ROOT, changed_files, files_of, main, parts_of

# What is of all parts, or of none.
APART = {"client/trilith/py.typed", "services/trilith_services/py.typed"}


def test_every_source_is_of_a_part() -> None:
    files = [
        str(path.relative_to(ROOT))
        for root in ("client", "services", "protos")
        for path in (ROOT / root).rglob("*.p*")
        if "__pycache__" not in path.parts
    ]
    assert len(files) > 200
    assert [each for each in files if each not in APART and not parts_of([each])] == []


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["services/trilith_services/ps/engine/table.py"], ["engine"]),
        (
            ["services/trilith_services/ps/replicas/sync/target.py", "client/trilith/rpc/remote.py"],
            ["client", "serving"],
        ),
        (["client/trilith/data/scan/wire.py"], ["data"]),
        (["client/trilith/nn/dense.py", "services/trilith_services/demo/job.py"], ["nn"]),
        (["services/trilith_services/commands/ps.py"], ["ops"]),
        (["client/trilith/estimator/saving.py", "tests/unit/test_estimator_config.py"], ["estimator"]),
        (["tests/unit/test_table.py", "README.md"], ["engine"]),
        (["docs/data.md"], []),
    ],
)
def test_what_has_changed_leads_to_its_part(files, parts) -> None:
    assert parts_of(files) == parts


def test_of_a_part_its_own_tests_are_run_and_those_of_none() -> None:
    names = [path.name for path in files_of(["engine"])]
    assert {"test_table.py", "test_conventions.py", "test_snapshot.py"} <= set(names)
    assert "test_dataset.py" not in names
    # Whoever is of no part is run with each.
    assert [path.name for path in files_of([])] == ["test_contributing.py", "test_conventions.py", "test_house.py"]


def test_what_has_changed_since_main_is_found(tmp_path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    for name in ("same", "committed", "edited"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "1")
    git("checkout", "-qb", "work")
    (tmp_path / "committed").write_text("2")
    git("commit", "-qam", "2")
    (tmp_path / "edited").write_text("2")
    (tmp_path / "new").write_text("2")
    assert changed_files(tmp_path) == ["committed", "edited", "new"]


def test_a_part_that_is_none_is_refused(capsys) -> None:
    assert main(["engines"]) == 2
    assert "no part 'engines'; there are engine, data, client, serving, nn, estimator, ops" in capsys.readouterr().err

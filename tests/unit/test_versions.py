"""Which versions of an export are loaded and answer: policies, pins, withdrawals, and what is let go."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.served import Trained, train
from trilith.data.records import Kind, Records
from trilith.errors import CheckpointError, ClosedError, InvalidRequestError, UnavailableError
from trilith.serving.exports import list_versions
from trilith.serving.published import PUBLISHED, Published, pin, read_published, withdraw
from trilith_services.cli import app
from trilith_services.serving.models import Models
from trilith_services.serving.versions import VersionPolicy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trained, Path]]:
    """A trained model, and four versions of its export: 1 to 4."""
    place = tmp_path_factory.mktemp("versions")
    with train("local://", place / "model") as trained:
        done = trained.exporter().export(trained.save(), str(place / "made"), mode="standalone")
        for number in (1, 2, 3, 4):
            shutil.copytree(done.path, place / "exports" / str(number))
        yield trained, place / "exports"


@pytest.fixture
def base(made, tmp_path) -> Path:
    shutil.copytree(made[1], tmp_path / "exports")
    return tmp_path / "exports"


def models(base: Path, version: str = "latest") -> Models:
    return Models(str(base), policy=VersionPolicy.parse(version))


def state(found: Models) -> tuple[int, list[int]]:
    """The version in use, and all that are loaded."""
    return found.current.version if found.current is not None else 0, [each.version for each in found.loaded]


def score(found: Models, version: int = 0) -> float:
    with found.use(version) as loaded:
        return float(loaded.model.predict(Records.of([b""], Kind.EXAMPLE))["click"][0])


@pytest.mark.parametrize("text", ["latest", "keep:3", "17"])
def test_a_policy_reads_as_it_is_written(text):
    assert str(VersionPolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "newest", "keep", "keep:0", "keep:x", "0", "-1", ":3", "keep:keep:2", "²", "1.5"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(InvalidRequestError, match="is none of latest, keep:N"):
        VersionPolicy.parse(text)


def test_one_version_is_loaded_or_the_newest_ones_and_requests_may_name_them(base):
    found = models(base, "keep:2")
    assert found.refresh()
    assert state(found) == (4, [4, 3])
    assert score(found, 3) == score(found)
    with pytest.raises(InvalidRequestError, match=r"version 2 is not loaded; 3, 4 is \(4 is in use\)"):
        score(found, 2)
    shutil.copytree(base / "1", base / "5")
    assert found.refresh()
    assert state(found) == (5, [5, 4])
    found.close()
    with pytest.raises(UnavailableError):
        score(found, 5)

    fixed = models(base, "2")
    assert fixed.refresh()
    assert state(fixed) == (2, [2])
    assert not fixed.refresh()
    shutil.rmtree(base / "2")
    assert not fixed.refresh()
    assert state(fixed) == (2, [2])
    assert fixed.load_error == f"version 2 is gone from {base}; it goes on"
    fixed.close()

    nothing = models(base, "9")
    assert not nothing.refresh()
    assert "no export" in nothing.unready
    assert "--version 9, which is not there" in nothing.unready
    nothing.close()


def test_versions_that_fail_do_not_count_and_the_next_older_ones_take_their_place(base):
    (base / "4" / "weights.safetensors").write_bytes(b"half")
    found = models(base, "keep:2")
    assert found.refresh()
    assert state(found) == (3, [3, 2])
    assert "version 4: " in found.load_error
    assert list(found.failed) == [4]
    shutil.rmtree(base / "4")
    shutil.copytree(base / "1", base / "4")
    found.refresh()  # changed
    found.refresh()  # and at rest
    assert (state(found), found.load_error) == ((4, [4, 3]), "")
    found.close()


def test_a_version_that_is_let_go_leaves_memory_when_its_last_request_has_ended(base):
    found = models(base, "keep:2")
    assert found.refresh()
    with found.use(3) as old:
        model, rows = weakref.ref(old.model), old.rows
        assert rows is not None
        shutil.copytree(base / "1", base / "5")
        assert found.refresh()
        assert state(found) == (5, [5, 4])
        assert len(old.model.predict(Records.of([b""], Kind.EXAMPLE))["click"]) == 1, "it ends what it has begun"
    with pytest.raises(ClosedError):
        rows.stats()
    del old, rows
    gc.collect()
    assert model() is None
    found.close()


@pytest.mark.parametrize("version", ["latest", "keep:2"])
def test_a_pin_has_an_older_version_answer_until_it_is_taken_back(base, version):
    found = models(base, version)
    assert found.refresh()
    pin(str(base), 1)
    assert found.refresh()
    assert state(found) == (1, [1] if version == "latest" else [4, 3, 1])
    shutil.copytree(base / "1", base / "5")
    assert not found.refresh(), "newer ones wait"
    assert (found.current.version, found.load_error) == (1, "")
    pin(str(base), 0)
    assert found.refresh()
    assert found.current.version == 5
    found.close()


def test_a_pin_to_a_version_that_cannot_be_loaded_leaves_the_present_one_and_says_so(base):
    found = models(base)
    assert found.refresh()
    (base / "2" / "weights.safetensors").write_bytes(b"half")
    pin(str(base), 2)
    assert not found.refresh()
    assert state(found) == (4, [4])
    assert found.load_error.startswith(f"{base} is pinned to version 2: version 2: ")
    fresh = models(base)
    assert not fresh.refresh(), "one that starts now takes none that nobody chose"
    assert state(fresh) == (0, [])
    for each in (found, fresh):
        each.close()


def test_a_version_that_is_withdrawn_gives_way_and_comes_back(base):
    found = models(base)
    assert found.refresh()
    withdraw(str(base), 4)
    assert found.refresh()
    assert state(found) == (3, [3])
    assert found.load_error == "version 4 is withdrawn; version 3 is served instead"
    withdraw(str(base), 4, undo=True)
    assert found.refresh()
    assert (state(found), found.load_error) == ((4, [4]), "")
    for number in (1, 2, 3, 4):
        withdraw(str(base), number)
    assert not found.refresh()
    assert state(found) == (4, [4])
    assert found.load_error == "version 4 is withdrawn; it goes on as long as there is no other"
    found.close()


def test_what_is_said_of_versions_is_checked_and_damage_changes_nothing(base):
    with pytest.raises(InvalidRequestError, match="has no version 9; there is 1, 2, 3, 4"):
        pin(str(base), 9)
    withdraw(str(base), 2)
    with pytest.raises(InvalidRequestError, match="version 2 of .* is withdrawn; publish it again before"):
        pin(str(base), 2)
    assert pin(str(base), 3) == read_published(str(base)) == Published(pinned=3, withdrawn=(2,))
    with pytest.raises(InvalidRequestError, match="is pinned to version 3; pin another one, or none, before"):
        withdraw(str(base), 3)
    found = models(base)
    assert found.refresh()
    (base / PUBLISHED).write_text('{"format": "trilith-published", "pinned": "x"}')
    with pytest.raises(CheckpointError, match="damaged"):
        read_published(str(base))
    assert not found.refresh()
    assert found.current.version == 3
    assert "damaged" in found.load_error
    found.close()


def test_a_version_of_another_model_is_refused(base):
    found = models(base)
    assert found.refresh()
    model = json.loads((base / "4" / "model.json").read_text())
    assert model["name"] == "deepfm"
    with train("local://", base.parent / "other") as other:
        version = other.exporter("cvr").export(other.save(), str(base), mode="standalone").version
    assert not found.refresh()
    assert state(found) == (4, [4])
    assert f"version {version}: it is of model 'cvr', this entry serves 'deepfm'" in found.load_error
    found.close()


def test_a_pinned_version_is_not_pruned(made, base):
    pin(str(base), 2)
    trained, _ = made
    done = trained.exporter().export(trained.save(), str(base), mode="standalone", keep=1)
    assert list_versions(str(base)) == [2, done.version]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serving", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_versions_are_listed_pinned_and_withdrawn_by_commands(base):
    assert run("pin", str(base), "2") == "pin: version 2 answers\n"
    assert run("withdraw", str(base), "4") == "withdraw: version 4 is served no more\n"
    (base / "1" / "manifest.json").write_text("{}")
    found = json.loads(run("versions", str(base), "--json"))
    assert [(each["version"], each["state"]) for each in found] == [(4, "withdrawn"), (3, ""), (2, "pinned"), (1, "")]
    assert found[0]["mode"] == "standalone"
    assert "no manifest of an export" in found[3]["error"]
    assert "withdrawn" in run("versions", str(base))
    assert run("pin", str(base), "latest") == "pin: none, the newest version answers\n"
    assert run("withdraw", str(base), "4", "--undo") == "withdraw: version 4 may be served again\n"
    assert read_published(str(base)) == Published()
    result = CliRunner().invoke(app, ["serving", "pin", str(base), "newest"])
    assert isinstance(result.exception, InvalidRequestError)

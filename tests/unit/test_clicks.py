"""Click data in memory, made up or of MovieLens, which is parsed from a tiny archive in either layout."""

from __future__ import annotations

import subprocess
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.quality import test_models
from trilith.data import read
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_services.demo import movielens
from trilith_services.demo.click_files import click_records, store_clicks
from trilith_services.demo.clicks import ClickData, split
from trilith_services.demo.datasets import load_dataset
from trilith_services.demo.movielens import MovieLensUnavailableError
from trilith_services.demo.synthetic import make_clicks, zipf_ids

# 875747190 is 1997-10-01 23:13:10 UTC.
SITE = {
    "u.data": "2\t1\t4\t875747190\n1\t2\t3\t875747190\n1\t1\t5\t875740000\n",
    "u.user": "1|24|M|technician|85711\n2|53|F|other|T8H1N\n",
    "u.item": (
        "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "2|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    ),
}
PACKAGE = {
    "ml-100k.inter": (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "2\t1\t4\t875747190\n1\t2\t3\t875747190\n1\t1\t5\t875740000\n"
    ),
    "ml-100k.user": "user_id\tage\tgender\toccupation\tzip\n1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\tT8H1N\n",
    "ml-100k.item": (
        "item_id\ttitle\tyear\tclass\n1\tToy Story\t1995\tAnimation Children's Comedy\n2\tunkonwn\tunkonwn\tunknown\n"
    ),
}


def archive(path: Path, files: dict[str, str], folder: str) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, text in files.items():
            out.writestr(folder + name, text)
    return path


@pytest.mark.parametrize(
    ("files", "folder"), [(SITE, "ml-100k/"), (PACKAGE, "recbole/dataset_example/ml-100k/"), (PACKAGE, "")]
)
def test_both_layouts_of_the_archive_give_the_same_samples(tmp_path, files, folder):
    data = movielens.parse(archive(tmp_path / "a.zip", files, folder))
    assert data.labels.tolist() == [1, 0, 1]
    assert tuple(data.features) == movielens.FEATURES
    values = {name: (ragged.values & np.uint64((1 << 48) - 1)).tolist() for name, ragged in data.features.items()}
    slots = {name: set((ragged.values >> np.uint64(48)).tolist()) for name, ragged in data.features.items()}
    assert slots == {name: {slot} for slot, name in enumerate(movielens.FEATURES, start=1)}
    assert values == {
        "user": [2, 1, 1],
        "item": [1, 2, 1],
        "age": [53, 24, 24],
        "gender": [0, 1, 1],
        "occupation": [movielens.OCCUPATIONS.index(name) for name in ("other", "technician", "technician")],
        "zip": [int("T8H", 36), int("857", 36), int("857", 36)],
        "year": [1995, 0, 1995],
        "genres": [3, 4, 5, 0, 3, 4, 5],
        "hour": [23, 23, 21],
    }
    assert data.features["genres"].row_splits.tolist() == [0, 3, 4, 7]


def test_what_is_not_movielens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        movielens.parse(archive(tmp_path / "a.zip", {"x": ""}, ""))
    unknown_user = {**SITE, "u.data": "9\t1\t4\t875747190\n"}
    with pytest.raises(ValueError, match="user"):
        movielens.parse(archive(tmp_path / "b.zip", unknown_user, ""))
    with pytest.raises(ValueError, match="empty"):
        movielens.parse(archive(tmp_path / "c.zip", {**SITE, "u.data": ""}, ""))


def test_a_cached_archive_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TRILITH_CACHE", str(tmp_path))
    monkeypatch.setattr(movielens.urllib.request, "urlopen", None)
    monkeypatch.setattr(movielens.subprocess, "run", None)
    archive(tmp_path / movielens.ARCHIVE, PACKAGE, "")
    parts = load_dataset("movielens")
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 3


def no_site(*args, **kwargs):
    raise urllib.error.URLError("no route")


def test_the_package_serves_when_the_site_cannot_be_reached(tmp_path, monkeypatch):
    def pip(command, **kwargs):
        wheel = Path(command[command.index("--dest") + 1]) / "recbole-1.whl"
        archive(wheel, PACKAGE, "recbole/dataset_example/ml-100k/")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(movielens.urllib.request, "urlopen", no_site)
    monkeypatch.setattr(movielens.subprocess, "run", pip)
    lines: list[str] = []
    found = movielens.fetch(tmp_path / "cache", report=lines.append)
    assert len(movielens.parse(found)) == 3
    assert any("no route" in line for line in lines)
    assert [path.name for path in found.parent.iterdir()] == [movielens.ARCHIVE]


@pytest.mark.parametrize(
    "pip",
    [
        lambda command, **_: SimpleNamespace(returncode=1, stderr="no such package"),
        lambda command, **_: (_ for _ in ()).throw(subprocess.TimeoutExpired(command, 1)),
    ],
)
def test_without_any_source_the_error_says_what_was_tried(tmp_path, monkeypatch, pip):
    monkeypatch.setattr(movielens.urllib.request, "urlopen", no_site)
    monkeypatch.setattr(movielens.subprocess, "run", pip)
    with pytest.raises(MovieLensUnavailableError, match=r"no route.*pip download recbole"):
        movielens.fetch(tmp_path, report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_does_not_become_the_cache(tmp_path, monkeypatch):
    class Page:
        headers = {"Content-Length": "4"}  # noqa: RUF012 - as the library has it
        chunks = [b"<a>", b""]  # noqa: RUF012

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def read(self, size):
            return self.chunks.pop(0)

    monkeypatch.setattr(movielens.urllib.request, "urlopen", lambda *args, **kwargs: Page())
    monkeypatch.setattr(movielens.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1, stderr=""))
    with pytest.raises(MovieLensUnavailableError, match="zip"):
        movielens.fetch(tmp_path, report=lambda line: None)
    assert not (tmp_path / movielens.ARCHIVE).exists()


def test_the_split_is_fixed_by_its_seed_and_loses_nothing():
    data = ClickData(np.zeros(100, np.float32), {"a": Ragged.of_singles(np.arange(100))})
    one, two, other = split(data, 1), split(data, 1), split(data, 2)
    parts = [part.features["a"].values.tolist() for part in (one.train, one.validation, one.test)]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(100))
    assert parts[0] == two.train.features["a"].values.tolist()
    assert parts[0] != other.train.features["a"].values.tolist()


def test_samples_are_taken_and_batched_with_their_lists():
    data = ClickData(
        np.arange(5, dtype=np.float32), {"g": Ragged(np.arange(6, dtype=np.uint64), np.array([0, 2, 2, 3, 5, 6]))}
    )
    picked = data.take(np.array([3, 1, 0]))
    assert picked.labels.tolist() == [3, 1, 0]
    assert picked.features["g"].values.tolist() == [3, 4, 0, 1]
    assert picked.features["g"].row_splits.tolist() == [0, 2, 2, 4]
    assert [len(batch) for batch in data.batches(2)] == [2, 2, 1]
    assert [batch.labels.tolist() for batch in data.batches(2, order=np.array([4, 0, 1]))] == [[4, 0], [1]]
    assert data.vocabulary()["g"].tolist() == [0, 1, 2, 3, 4, 5]


def test_inconsistent_samples_are_refused():
    with pytest.raises(InvalidRequestError, match="2 samples"):
        ClickData(np.zeros(3, np.float32), {"a": Ragged.of_singles([1, 2])})
    with pytest.raises(InvalidRequestError, match="row_splits"):
        ClickData(np.zeros(1, np.float32), {"a": Ragged(np.zeros(3, np.uint64), np.array([0, 2]))})


def test_without_data_quality_is_left_out_but_fails_in_ci(monkeypatch) -> None:
    def no_data(**options):
        raise movielens.MovieLensUnavailableError("no data")

    monkeypatch.setattr(movielens, "fetch", no_data)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no data; with CI=true that is no reason to skip"):
        test_models.require_movielens()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no data"):
        test_models.require_movielens()


def test_made_up_clicks_are_decided_by_their_seed():
    one, two, other = make_clicks(50, seed=1), make_clicks(50, seed=1), make_clicks(50, seed=2)
    np.testing.assert_array_equal(one.labels, two.labels)
    for name in one.features:
        np.testing.assert_array_equal(one.features[name].values, two.features[name].values)
    assert any((one.features[name].values != other.features[name].values).any() for name in ("user", "item"))
    with pytest.raises(InvalidRequestError):
        make_clicks(0)


def test_zipf_ids_favour_few():
    ids = zipf_ids(np.random.default_rng(0), (10_000,), 1000)
    counts = np.sort(np.bincount(ids, minlength=1000))[::-1]
    assert counts[:10].sum() > 10 * counts[500:510].sum()


def test_data_is_named_or_refused():
    assert len(load_dataset("synthetic:100").train) == 80
    for name in ("synthetic:", "synthetic:3", "movielens:5", "imagenet"):
        with pytest.raises(InvalidRequestError, match="movielens"):
            load_dataset(name)


def test_samples_are_written_to_files_once_and_all_of_them(tmp_path):
    data = make_clicks(100, seed=1)
    pattern = store_clicks(data, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pb")}
    assert store_clicks(data, tmp_path) == pattern
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    assert store_clicks(make_clicks(100, seed=2), tmp_path) != pattern
    assert [payload for records in read(pattern, kind="example").batch(7) for payload in records.payloads()] == list(
        click_records(data).payloads()
    )

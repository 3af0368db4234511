"""Which files a path, pattern or URL stands for."""

from __future__ import annotations

import logging
import os
import pathlib
import zipfile

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import trilith.data
from trilith.data import Records
from trilith.data.formats.files import expand_glob, match_files
from trilith.errors import DataError, InvalidRequestError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with trilith.data.open_writer(str(folder / "written"), format="tfrecord") as out:
            out.write(Records.of([name.encode()], "plaintext"))
        os.rename(folder / "written", path)
    return folder


def read(pattern, **options):
    return [payload.decode() for payload in trilith.data.read(pattern, format="tfrecord", kind="plaintext", **options)]


ODD = [
    "run [v2]",
    "what?",
    "a*b",
    "a#b%20c::d é",
    "[!x]",
    "tab\there",
    "100%",
    "dt=2024-01-01",
    "~x",
    "file:",
    "a{b,c}",
]


@pytest.mark.parametrize("name", ODD)
def test_names_that_exist_are_meant_themselves(tmp_path, name):
    make(tmp_path, f"{name}/p0.{name}", f"{name}/p1", "other/p0")
    folder = f"{tmp_path}/{name}"
    assert read(f"{folder}/p0.{name}") == [f"{name}/p0.{name}"]
    assert read(f"{folder}/p*") == [f"{name}/p0.{name}", f"{name}/p1"]
    assert read(folder) == [f"{name}/p0.{name}", f"{name}/p1"]
    assert read(f"{tmp_path}/{'?' * len(name)}/p1") == [f"{name}/p1"]


@pytest.mark.parametrize("name", ["run [v2]", "what?", "a*b", "a#b%20c"])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_names_that_exist_are_meant_themselves_in_urls(tmp_path, name, scheme):
    make(tmp_path, f"{name}/p[0]", f"{name}/p1", "run v/p1")
    root = f"file://{tmp_path}"
    if scheme == "memory":
        files = fsspec.filesystem("memory")
        root = f"memory://{tmp_path.name}-{abs(hash(name))}"
        for path in tmp_path.glob("*/*"):
            files.pipe(f"{root}/{path.relative_to(tmp_path)}", path.read_bytes())
    assert read(f"{root}/{name}/p[0]") == [f"{name}/p[0]"]
    assert read(f"{root}/{name}/p*") == [f"{name}/p1", f"{name}/p[0]"]
    assert read(f"{root}/{name}") == [f"{name}/p1", f"{name}/p[0]"]


def test_a_pattern_that_is_also_the_name_of_an_empty_folder(tmp_path):
    make(tmp_path, "v1/p0", "v2/p0")
    (tmp_path / "v[12]").mkdir()
    assert read(f"{tmp_path}/v[12]/p*") == ["v1/p0", "v2/p0"]


SPARK = ["part-0", "part-1", "_SUCCESS", "._SUCCESS.crc", ".part-0.crc", "_temporary/0/part-9", ".hidden/part-8"]


@pytest.mark.parametrize("scheme", ["", "file://", "local://", "memory"])
@pytest.mark.parametrize("pattern", ["out", "out/", "out/*", "out/**", "o*", "out/part-*", "*/*"])
def test_what_is_left_beside_data_is_left_out(tmp_path, scheme, pattern):
    make(tmp_path / "out", *SPARK)
    root = f"{scheme}{tmp_path}"
    if scheme == "memory":
        root = f"memory://{tmp_path.name}"
        for path in filter(pathlib.Path.is_file, tmp_path.rglob("*")):
            fsspec.filesystem("memory").pipe(f"{root}/{path.relative_to(tmp_path)}", path.read_bytes())
    assert read(f"{root}/{pattern}") == ["part-0", "part-1"]


def test_what_is_hidden_can_be_named(tmp_path):
    make(tmp_path / "_out", *SPARK)
    assert read(f"{tmp_path}/_out/_S*") == ["_SUCCESS"]
    assert read(f"{tmp_path}/_out/.p*") == [".part-0.crc"]
    assert read(f"{tmp_path}/_out/_SUCCESS") == ["_SUCCESS"]
    assert read(f"{tmp_path}/_out/_temporary/*/*") == ["_temporary/0/part-9"]
    assert read(f"{tmp_path}/_out") == ["part-0", "part-1"]


PARTITIONS = ["dt=1/hour=0/p0", "dt=1/hour=1/p0", "dt=2/hour=0/p0", "_day=3/p0"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_partitions(tmp_path, scheme):
    make(tmp_path, *PARTITIONS, "_SUCCESS")
    root = f"{scheme}{tmp_path}"
    assert read(root) == sorted(PARTITIONS)
    assert read(f"{root}/dt=1") == PARTITIONS[:2]
    assert read(f"{root}/dt=*") == PARTITIONS[:3]
    assert read(f"{root}/dt=*/hour=0") == [PARTITIONS[0], PARTITIONS[2]]
    assert read(f"{root}/dt=1/**/p*") == PARTITIONS[:2]
    assert read(f"{root}/**/p0") == sorted(PARTITIONS)


def test_files_hide_the_folders_beside_them(tmp_path):
    make(tmp_path, "p0", "old/p1")
    assert read(f"{tmp_path}/*") == ["p0"]


class Host(LocalFileSystem):
    """As HDFS, SFTP and FTP do it: the path has no host, the URL does."""

    protocol = "hosty"

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        if path.startswith("hosty://"):
            return "/" + path.split("://", 1)[1].partition("/")[2]
        return super()._strip_protocol(path)

    def unstrip_protocol(self, name):
        return "hosty://elsewhere" + self._strip_protocol(name)


class Account(LocalFileSystem):
    """As Azure does it: part of the host becomes part of the path."""

    protocol = "accounty"

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        if path.startswith("accounty://"):
            host, _, rest = path.split("://", 1)[1].partition("/")
            return f"/{host.partition('@')[0].replace('.', '/')}/{rest}"
        return super()._strip_protocol(path)


@pytest.fixture(autouse=True)
def schemes():
    fsspec.register_implementation("hosty", Host, clobber=True)
    fsspec.register_implementation("accounty", Account, clobber=True)


def test_urls_keep_their_host(tmp_path):
    make(tmp_path, "in/p0", "in/p1")
    root = f"hosty://namenode:8020{tmp_path}/in"
    assert expand_glob(f"{root}/p*") == [f"{root}/p0", f"{root}/p1"]
    assert read(f"{root}/p*") == read(root) == ["in/p0", "in/p1"]
    place = f"{tmp_path}/in".strip("/").replace("/", ".")
    found = expand_glob(f"accounty://{place}@account.net/p*")
    assert found == [f"accounty://{place}@account.net/p{k}" for k in range(2)]


def test_chains_of_urls(tmp_path):
    make(tmp_path, "in/p0", "in/p1", "in/_SUCCESS")
    for archive in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / archive, "w") as out:
            for name in ("in/p0", "in/p1", "in/_SUCCESS"):
                out.write(tmp_path / name, name)
    place = f"file://{tmp_path}/a.zip"
    assert expand_glob(f"zip://in/*::{place}") == [f"zip://in/p0::{place}", f"zip://in/p1::{place}"]
    assert read(f"zip://in/*::{place}") == read(f"zip://in::{place}") == ["in/p0", "in/p1"]
    assert read(f"zip://in/p0::file://{tmp_path}/*.zip") == ["in/p0", "in/p0"]
    assert read(f"simplecache::file://{tmp_path}/in/p*") == ["in/p0", "in/p1"]
    assert read(f"simplecache::zip://in/*::{place}") == ["in/p0", "in/p1"]


def test_files_are_written_where_they_are_called(tmp_path):
    for name in ODD:
        place = tmp_path / "out" / name / f"p {name}"
        place.parent.mkdir(parents=True)
        with trilith.data.open_writer(place, format="tfrecord") as out:
            out.write(Records.of([b"x"], "plaintext"))
        assert os.listdir(place.parent) == [f"p {name}"]
        assert read(place) == ["x"]


def test_paths_are_strings_or_not(tmp_path, monkeypatch):
    make(tmp_path, "p0", "p1")
    assert read(tmp_path / "p0") == read([tmp_path / "p0"]) == ["p0"]
    assert read(tmp_path / "p*") == read(tmp_path) == ["p0", "p1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/p*") == read("~") == ["p0", "p1"]
    assert read("~/p0") == ["p0"]
    with trilith.data.open_records("~/p0", format="tfrecord", kind="plaintext") as reader:
        assert len(next(reader)) == 1
    with trilith.data.open_records(tmp_path / "p0", format="tfrecord", kind="plaintext") as reader:
        assert len(next(reader)) == 1
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "~/p9")
    assert read("~/p9") == ["~/p9"]
    assert read("p?") == ["p0", "p1"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_that_is_named_and_not_there_is_no_file_less(tmp_path, scheme):
    make(tmp_path, "p0", "p1")
    names = [f"{scheme}{tmp_path}/{name}" for name in ("p0", "gone", "p1")]
    with pytest.raises(InvalidRequestError, match="gone: no such file"):
        read(names)
    iterator = trilith.data.read(names, format="tfrecord", kind="plaintext", on_error="skip").iterate()
    assert (list(iterator), iterator.losses.records) == ([b"p0", b"p1"], 1)
    assert "gone: no such file" in iterator.losses.messages[0]


def test_nothing_that_matches_is_told_as_it_was_looked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=rf"no file matches 'x/\*.pb' \(looked for as '{tmp_path}/x/\*.pb'\)"):
        match_files("x/*.pb")
    with pytest.raises(DataError, match=r"no file matches '~/x' \(looked for as '/nowhere/x'\)"):
        match_files("~/x")
    with pytest.raises(DataError, match="a folder without files"):
        match_files(str(tmp_path / "none"))
    for url in ("memory://nothing/*.pb", f"file://{tmp_path}/*.pb", f"zip://*.pb::file://{tmp_path}/z.zip"):
        with pytest.raises(DataError, match=f"no file matches '{url[:6]}"):
            match_files(url)
    with pytest.raises(InvalidRequestError, match="nonsense://.*cannot be looked at"):
        match_files("nonsense://x/*.pb")
    make(tmp_path, "p0")
    with caplog.at_level(logging.WARNING, "trilith.data"):
        assert match_files(["p0", "q*"]) == ["p0"]
    assert "no file matches 'q*'" in caplog.text
    assert os.path.isdir("none")

"""Checkpoint directories: a manifest makes a checkpoint complete, and damage has a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trilith import checkpoint
from trilith.checkpoint import FileRecord, Part
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder, absolute


def write_parts(path: str, count: int = 2, *, step: int = 7, rows: int = 3) -> list[Part]:
    folder = Folder(path)
    parts = []
    for index in range(count):
        name = checkpoint.file_name("rows", "user", index, count, "0badcafe")
        folder.write(name, b"x" * (10 + index))
        file = FileRecord(name=name, kind="rows", bytes=10 + index, crc32c=index, table="user", rows=rows)
        part = Part(
            shard_index=index,
            shard_count=count,
            global_step=step + index,
            incarnation=(1 << 63) + index,
            finished_unix_s=5.5,
            files=(file,),
        )
        checkpoint.write_part(folder, part)
        parts.append(part)
    return parts


def complete(path: str, count: int = 2) -> None:
    checkpoint.write_manifest(path, write_parts(path, count))


def test_a_manifest_reads_back_what_was_written(tmp_path: Path) -> None:
    parts = write_parts(str(tmp_path))
    checkpoint.write_manifest(str(tmp_path), parts[::-1], clock=lambda: 99.0)
    manifest = checkpoint.read_manifest(str(tmp_path))
    assert manifest.parts == tuple(parts)
    assert manifest.created_unix_s == 99.0
    assert manifest.global_step == 7  # PS 0's
    assert manifest.rows() == {"user": 6}
    assert manifest.bytes == 21


def test_any_fsspec_url_is_a_path() -> None:
    url = "memory://checkpoints/ckpt-00000000000000000005"
    complete(url)
    assert [info.number for info in checkpoint.list_checkpoints("memory://checkpoints")] == [5]
    assert checkpoint.read_manifest(url).shard_count == 2


def test_parts_are_collected_only_when_all_are_there(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_parts(str(tmp_path), 2)
    assert checkpoint.collect_parts(folder, 3) is None
    assert [part.shard_index for part in checkpoint.collect_parts(folder, 2) or []] == [0, 1]


def test_a_manifest_of_half_a_cluster_is_refused(tmp_path: Path) -> None:
    parts = write_parts(str(tmp_path))
    with pytest.raises(CheckpointError, match="not one whole cluster"):
        checkpoint.write_manifest(str(tmp_path), parts[:1])
    with pytest.raises(CheckpointError, match="not one whole cluster"):
        checkpoint.write_manifest(str(tmp_path), [])


def test_a_manifest_is_refused_where_the_files_cannot_be_seen(tmp_path: Path) -> None:
    parts = write_parts(str(tmp_path / "here"))
    with pytest.raises(
        CheckpointError, match="cannot be seen from this process; save to a path that all processes share"
    ):
        checkpoint.write_manifest(str(tmp_path / "elsewhere"), parts)


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write_parts(str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"no manifest\.json: it is a checkpoint that was never finished, or none"
    ):
        checkpoint.read_manifest(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no manifest\.json: nothing is there"):
        checkpoint.read_manifest(str(tmp_path / "nothing"))


def test_the_parent_of_checkpoints_is_told_apart_from_a_checkpoint(tmp_path: Path) -> None:
    complete(str(tmp_path / checkpoint.checkpoint_name(4)))
    with pytest.raises(CheckpointError, match=r"name one, such as .*ckpt-00000000000000000004"):
        checkpoint.read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:40], "damaged"),
        (lambda text: text.replace('"global_step": 7', '"global_step": 8'), "does not match its checksum"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2; this program reads version 1"),
        (lambda text: json.dumps({"format": "other"}), "not a file of format"),
        (lambda text: "[]", "not a file of format"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, damage, message) -> None:
    complete(str(tmp_path))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read_manifest(str(tmp_path))
    assert str(manifest) in str(caught.value)


def test_the_newest_complete_checkpoint_is_found_past_incomplete_ones(tmp_path: Path) -> None:
    assert checkpoint.newest_complete(str(tmp_path / "absent")) is None
    for number in (1, 2, 30):
        complete(str(tmp_path / checkpoint.checkpoint_name(number)))
    write_parts(str(tmp_path / checkpoint.checkpoint_name(31)))
    (tmp_path / "unrelated").mkdir()
    newest = checkpoint.newest_complete(str(tmp_path))
    assert newest is not None
    assert newest.number == 30
    assert [(info.number, info.complete) for info in checkpoint.list_checkpoints(str(tmp_path))] == [
        (1, True),
        (2, True),
        (30, True),
        (31, False),
    ]


def test_prune_keeps_the_newest_complete_ones_and_what_is_being_written(tmp_path: Path) -> None:
    for number in (1, 3, 4):
        complete(str(tmp_path / checkpoint.checkpoint_name(number)))
    for number in (2, 5):
        write_parts(str(tmp_path / checkpoint.checkpoint_name(number)))
    gone = checkpoint.prune(str(tmp_path), keep=2)
    assert [path[-1] for path in gone] == ["1", "2"]
    assert [info.number for info in checkpoint.list_checkpoints(str(tmp_path))] == [3, 4, 5]


def test_a_file_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("kept", b"old")

    def fail() -> None:
        with folder.create("kept") as handle:
            handle.write(b"new")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert folder.names() == ["kept"]
    assert folder.read("kept") == b"old"


def test_table_names_become_safe_file_names() -> None:
    assert checkpoint.file_name("rows", "a/b:c", 1, 12, "00ff00ff") == "table-a%2Fb%3Ac.00001-of-00012.00ff00ff.arrow"
    assert checkpoint.file_name("variables", "", 0, 1, "00ff00ff") == "variables.00000-of-00001.00ff00ff.arrow"


@pytest.mark.parametrize("url", ["nosuch://bucket/ckpt", "dropbox://folder/ckpt"])
def test_a_url_that_cannot_be_opened_is_refused_in_words(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is no directory or URL that fsspec can open"):
        Folder(url)


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("ckpt") == str(tmp_path / "ckpt")
    assert absolute("s3://bucket/ckpt") == "s3://bucket/ckpt"

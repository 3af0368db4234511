"""Checkpoint directories: a manifest makes a checkpoint complete, and damage has a name."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from trilith import checkpoint
from trilith.checkpoint import FileRecord, Part, marks
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


@pytest.mark.parametrize("url", ["nosuch://bucket/ckpt", "dropbox://folder/ckpt", "github://a/b", "a\0b"])
def test_a_url_that_cannot_be_opened_is_refused_in_words(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is no directory or URL"):
        Folder(url)


def test_a_url_whose_server_is_away_is_an_error_of_checkpoints() -> None:
    with pytest.raises(CheckpointError, match=r"^zip::file:///nowhere/a\.zip cannot be opened: .*No such file"):
        Folder("zip::file:///nowhere/a.zip")


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("ckpt") == str(tmp_path / "ckpt")
    assert absolute("s3://bucket/ckpt") == "s3://bucket/ckpt"


@pytest.fixture
def bucket() -> Iterator[dict[str, bytes]]:
    """A store of objects whose files appear when they are closed, as S3's do; answers to oss://."""
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    objects: dict[str, bytes] = {}

    class File(AbstractBufferedFile):
        def _upload_chunk(self, final: bool = False) -> bool:
            if final:
                objects[self.path] = self.buffer.getvalue()
            return final

        def _fetch_range(self, start: int, end: int) -> bytes:
            return objects[self.path][start:end]

    class Bucket(AbstractFileSystem):
        protocol = "oss"

        def _open(self, path: str, mode: str = "rb", **options: Any) -> File:
            return File(self, path, mode, **options)

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            if path not in objects:
                raise FileNotFoundError(path)
            return {"name": path, "size": len(objects[path]), "type": "file"}

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

        def _rm(self, path: str) -> None:
            del objects[path]

    fsspec.register_implementation("oss", Bucket, clobber=True)
    yield objects
    Bucket.clear_instance_cache()


def test_a_file_of_an_object_store_that_fails_halfway_is_never_uploaded(bucket: dict[str, bytes]) -> None:
    folder = Folder("oss://bucket/ckpt")
    folder.write("kept", b"old")

    def fail(name: str) -> None:
        with folder.create(name) as handle:
            handle.write(b"half")
            raise RuntimeError("disk")

    for name in ("kept", "fresh"):
        with pytest.raises(RuntimeError, match="disk"):
            fail(name)
    gc.collect()  # a file that is forgotten closes itself
    assert bucket == {"bucket/ckpt/kept": b"old"}


def test_what_is_held_used_or_being_written_is_not_pruned(tmp_path: Path) -> None:
    names = {number: str(tmp_path / checkpoint.checkpoint_name(number)) for number in range(1, 9)}
    for number in (1, 2, 3, 7, 8):
        complete(names[number])
    for number in (4, 5, 6):
        write_parts(names[number])
    Folder(names[4]).write(checkpoint.saving_name(1, 2, "0000aaaa"), b"")  # of a process that lives
    Folder(names[5]).write(checkpoint.saving_name(1, 2, "0000bbbb"), b"")  # of one that is gone
    checkpoint.write_holder(str(tmp_path), 1, 2, "0000aaaa")
    with checkpoint.hold(names[1]):
        checkpoint.prune(str(tmp_path), keep=1, used=[names[2]])
    left = [info.number for info in checkpoint.list_checkpoints(str(tmp_path))]
    assert left == [1, 2, 4, 8]
    checkpoint.prune(str(tmp_path), keep=1, used=[names[2]])
    assert [info.number for info in checkpoint.list_checkpoints(str(tmp_path))] == [2, 4, 8], "held no longer"


def test_a_reader_that_never_came_back_holds_for_a_while_only(tmp_path: Path) -> None:
    for number in (1, 2):
        complete(str(tmp_path / checkpoint.checkpoint_name(number)))
    hold = checkpoint.hold(str(tmp_path / checkpoint.checkpoint_name(1)), clock=lambda: 1000.0)
    hold.__enter__()
    assert checkpoint.prune(str(tmp_path), keep=1, clock=lambda: 1000.0 + marks.HELD_S - 1) == []
    assert len(checkpoint.prune(str(tmp_path), keep=1, clock=lambda: 1001.0 + marks.HELD_S)) == 1


def test_only_what_could_be_pruned_is_held(tmp_path: Path) -> None:
    for name, count in (("mine", 0), (checkpoint.checkpoint_name(1), 1)):
        with checkpoint.hold(str(tmp_path / name)):
            assert len(Folder(str(tmp_path / name)).names()) == count


def test_the_complete_checkpoint_of_the_highest_step_stays(tmp_path: Path) -> None:
    for number, step in ((1, 7), (2, 900), (3, 0), (4, 0), (5, 0)):
        path = str(tmp_path / checkpoint.checkpoint_name(number))
        checkpoint.write_manifest(path, write_parts(path, step=step))
    checkpoint.prune(str(tmp_path), keep=2)
    assert [info.number for info in checkpoint.list_checkpoints(str(tmp_path))] == [2, 4, 5]


def test_parts_of_earlier_versions_are_read(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    old = write_parts(str(tmp_path), 2)  # without a life in their names
    assert checkpoint.collect_parts(folder, 2) == old
    checkpoint.write_part(folder, replace(old[1], life="0000aaaa", global_step=99))
    collected = checkpoint.collect_parts(folder, 2)
    assert collected is not None
    assert [part.global_step for part in collected] == [7, 99]
    assert checkpoint.collect_parts(folder, 2, lives={1: "0000bbbb"}) is None


def test_a_checkpoint_is_as_of_when_its_first_part_was_begun(tmp_path: Path) -> None:
    parts = write_parts(str(tmp_path))  # finished at 5.5
    old = checkpoint.write_manifest(str(tmp_path), parts)
    assert old.as_of_unix_s == 5.5, "the best that is known of earlier versions' parts"
    checkpoint.write_manifest(str(tmp_path), [replace(parts[0], began_unix_s=2.5), replace(parts[1], began_unix_s=4.0)])
    assert checkpoint.read_manifest(str(tmp_path)).as_of_unix_s == 2.5

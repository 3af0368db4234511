"""What Save and Restore may name: checkpoints below one directory, whatever way there is written."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

import trilith
from trilith.errors import InvalidRequestError
from trilith_proto import ps_pb2, ps_pb2_grpc
from trilith_services.ps.checkpoint.root import CheckpointRoot
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard


@pytest.mark.parametrize(
    "asked", ["nightly", "a/b", "a/../nightly", "{root}/nightly", "file://{root}/nightly", "{root}"]
)
def test_names_below_the_root_are_taken(tmp_path: Path, asked: str) -> None:
    root = CheckpointRoot(root=str(tmp_path))
    found = Path(root.resolve(asked.format(root=tmp_path)))
    assert found == tmp_path or tmp_path in found.parents


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "..",
        "../beside",
        "a/../../beside",
        "/etc/passwd",
        "/etc/there-is-no-such-file",
        "{root}-beside",
        "{root}/../beside",
        "link/x",
        "{root}/link",
        "file:///etc/passwd",
        "local:///etc",
        "memory://x",
        "s3://bucket/x",
        "ftp://169.254.169.254/x",
        "zip::ftp://host/x.zip",
        "zip://a::{root}/x.zip",
        "simplecache::s3://bucket/x",
        "x\0y",
    ],
)
@pytest.mark.parametrize("with_root", [True, False])
def test_everything_else_is_refused_alike(tmp_path: Path, asked: str, with_root: bool) -> None:
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    refusals = r"is not below|has no --checkpoint-root|the name of a checkpoint is needed"
    with pytest.raises(InvalidRequestError, match=refusals):
        CheckpointRoot(root=str(inside) if with_root else None).resolve(asked.format(root=inside))


def test_below_a_url_names_are_compared_as_they_are() -> None:
    root = CheckpointRoot(root="s3://bucket/model/")
    assert root.resolve("nightly") == "s3://bucket/model/nightly"
    assert root.resolve("s3://bucket/model/nightly") == "s3://bucket/model/nightly"
    for asked in ("s3://bucket/other", "s3://bucket/model/../x", "s3://bucket/model2/x", "gs://bucket/model/x", "/x"):
        with pytest.raises(InvalidRequestError, match="is not below --checkpoint-root"):
            root.resolve(asked)


def test_with_the_flag_any_path_is_taken(tmp_path: Path) -> None:
    root = CheckpointRoot(root=str(tmp_path), anywhere=True)
    assert root.resolve("/elsewhere") == "/elsewhere"
    assert root.resolve("s3://bucket/x") == "s3://bucket/x"
    assert root.resolve("nightly") == str(tmp_path / "nightly")


@pytest.mark.parametrize("flags", [{}, {"checkpoint_dir": "root"}, {"checkpoint_root": "root"}])
def test_a_ps_neither_writes_nor_reads_elsewhere_and_tells_nothing_of_what_is_there(tmp_path: Path, flags) -> None:
    options = PsOptions(**{name: str(tmp_path / value) for name, value in flags.items()})
    store = LocalShard(threads=1)
    server = ParameterServer(store, options)
    try:
        address = f"127.0.0.1:{server.start('127.0.0.1:0')}"
        with grpc.insecure_channel(address) as channel:
            stub = ps_pb2_grpc.ParameterServerStub(channel)
            said = set()
            for path in (tmp_path / "beside", Path("/etc"), Path("/no-such-place")):
                for call, request in ((stub.Save, ps_pb2.SaveRequest), (stub.Restore, ps_pb2.RestoreRequest)):
                    with pytest.raises(grpc.RpcError) as caught:
                        call(request(path=str(path)))
                    said.add(str(caught.value.details()).replace(str(path), "PATH"))
        assert len(said) == 1
        assert not (tmp_path / "beside").exists()
        with trilith.connect(f"static://{address}") as client:
            if flags:
                client.save(str(tmp_path / "root" / "mine"))
                assert client.restore(str(tmp_path / "root" / "mine")) == 0
            with pytest.raises(InvalidRequestError, match="--checkpoint-root"):
                client.save(str(tmp_path / "mine"))
    finally:
        server.stop()

"""The disk cache of compiled kernels."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 (what a planted file would be)

import pytest

from trilith.ops import jit


@pytest.fixture
def compiled():
    """Compiles one kernel, as a new process would."""
    before = jit.KERNELS[:]

    def double(number):
        return number * 2

    def compile_anew():
        kernel = jit.kernel("int64(int64)")(double)
        jit.warm(kernel)
        assert kernel(21) == 42

    yield compile_anew
    jit.KERNELS[:] = before


@pytest.mark.skipif(jit.JIT_DISABLED, reason="nothing is compiled")
def test_kernels_that_an_image_brings_are_read_and_not_compiled_again(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRILITH_CACHE", str(tmp_path / "image"))
    compiled()
    (entry,) = (tmp_path / "image" / "kernels").iterdir()
    monkeypatch.setenv("TRILITH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("TRILITH_KERNELS", str(entry.parent))
    compiled()
    assert not (tmp_path / "own").exists()
    entry.write_bytes(b"damaged")
    compiled()
    assert [each.name for each in (tmp_path / "own" / "kernels").iterdir()] == [entry.name]


@pytest.mark.skipif(jit.JIT_DISABLED, reason="nothing is compiled")
@pytest.mark.parametrize(
    "make_foreign",
    [
        pytest.param(lambda entry: entry.chmod(0o620), id="writable-by-the-group"),
        pytest.param(lambda entry: entry.chmod(0o602), id="writable-by-all"),
        pytest.param(lambda entry: os.chown(entry, 12345, -1), id="of-another-owner"),
    ],
)
def test_kernels_that_others_can_have_written_are_never_loaded(compiled, tmp_path, monkeypatch, make_foreign):
    """They are pickles: to load one is to run what it says."""
    monkeypatch.setenv("TRILITH_CACHE", str(tmp_path))
    compiled()
    (entry,) = (tmp_path / "kernels").iterdir()
    ran = tmp_path / "ran"
    entry.write_bytes(pickle.dumps(Planted(str(ran))))
    try:
        make_foreign(entry)
    except PermissionError:
        pytest.skip("only root gives files away")
    compiled()
    assert not ran.exists()
    assert entry.stat().st_uid == os.geteuid(), "what was compiled anew has taken its place"
    entry.write_bytes(pickle.dumps(Planted(str(ran))))
    compiled()
    assert ran.exists(), "one of this user is loaded"


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

"""The disk cache of compiled kernels."""

from __future__ import annotations

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

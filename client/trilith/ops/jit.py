"""Compilation of kernels: one decorator for all of them, and an on-disk cache that processes can share.

Numba's own cache keeps an index file per function, and two processes that compile at once can leave an index that names
the wrong code. Here an entry is one file whose name is a digest of everything the machine code depends on, written to a
temporary name and renamed: a reader sees a whole entry or none, and no writer can spoil another's. A container image
brings entries of its own in $TRILITH_KERNELS, which is only read.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config as numba_config
from numba.core.caching import _Cache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

from trilith.runtime.waiting import Wait

__all__ = ["COMPILING", "JIT_DISABLED", "KERNELS", "cache_directory", "inlined", "kernel", "part", "warm"]

_LOG = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])

JIT_DISABLED: bool = bool(numba_config.DISABLE_JIT)
"""NUMBA_DISABLE_JIT=1: kernels are the plain Python functions, for breakpoints and coverage."""

KERNELS: list[Callable[..., Any]] = []
"""Every function made by `kernel`, for the conventions test."""

COMPILING: AbstractContextManager[Any] = global_compiler_lock
"""Held while a kernel is compiled or loaded; who changes what kernels see, as `torch.export` does, holds it too."""

if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread compiles would find the lock held for ever, and LLVM amid something.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def cache_directory() -> Path:
    """Where compiled kernels are kept: $TRILITH_CACHE/kernels, else ~/.cache/trilith/kernels (or $XDG_CACHE_HOME's)."""
    root = os.environ.get("TRILITH_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trilith"
    return base / "kernels"


def inlined(function: _F) -> _F:
    """Mark a helper that kernels call; it is compiled into each of them."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)  # type: ignore[no-any-return]


def kernel(signature: str, *, variant: str = "") -> Callable[[_F], _F]:
    """Make a compiled function out of a plain one.

    The function releases the GIL, divides like NumPy and never reorders floating-point arithmetic. It is compiled at
    the first call or by `warm`, from the disk cache where possible.

    Args:
        signature: Numba types of the arguments, such as "void(int64, float32)". Callers must pass exactly these.
        variant: What tells functions apart that one factory makes from one source.
    """

    def decorate(function: _F) -> _F:
        KERNELS.append(function)
        if JIT_DISABLED:
            return function
        dispatcher = numba.njit(**_OPTIONS)(function)
        dispatcher._cache = _KernelCache(function, variant)
        dispatcher._compiler.compile = _say_compiling(dispatcher._compiler.compile)
        dispatcher.trilith_signature = signature
        return dispatcher  # type: ignore[no-any-return]

    return decorate


def part(*, inline: bool = True) -> Callable[[_F], _F]:
    """Mark a helper that only kernels call, where there are many that call each other.

    Numba turns every helper into machine code of its own, with all it calls inside: for a scanner of forty functions
    that is a minute. A part is typed and linked, and optimised with the kernel that it ends up in.

    Args:
        inline: Inline it wherever it is called, else where LLVM finds that worth it.
    """

    def decorate(function: _F) -> _F:
        if JIT_DISABLED:
            return function
        dispatcher = numba.njit(forceinline=inline, pipeline_class=_PartCompiler, **_OPTIONS)(function)
        resolve = dispatcher.get_call_template

        def add_overload(result: CompileResult) -> None:
            # Numba finds the code of a call by the entry point; a part has none, any unique object will do.
            result = result._replace(entry_point=result.library)
            dispatcher.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
            dispatcher.overloads[tuple(result.signature.args)] = result

        def get_call_template(args: Any, kws: Any) -> Any:
            # A constant is a number like any other, not a type that asks for a compilation of its own.
            return resolve(tuple(map(numba.types.unliteral, args)), kws)

        dispatcher.add_overload = add_overload
        dispatcher.get_call_template = get_call_template
        return dispatcher  # type: ignore[no-any-return]

    return decorate


class _PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that is linked into kernels and never runs by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class _PartCompiler(Compiler):  # type: ignore[misc]
    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals_: Any
    ) -> None:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals_)

    def compile_extra(self, func: Callable[..., Any]) -> CompileResult:
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


def warm(*kernels: Callable[..., Any]) -> None:
    """Compile kernels for their declared signatures, or load them from the cache."""
    for each in kernels:
        if not JIT_DISABLED:
            each.compile(each.trilith_signature)  # type: ignore[attr-defined]


class _KernelCache(_Cache):  # type: ignore[misc]
    """One file per compiled overload, named by content."""

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        source = Path(function.__code__.co_filename)
        self._identity = (
            function.__module__,
            function.__qualname__,
            variant,
            numba.__version__,
            _fingerprint(source.parent),
            _fingerprint(Path(__file__).parent),
        )
        self._name = function.__name__
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(cache_directory())

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        if not self._enabled:
            return None
        target_context.refresh()
        name = self._entry(sig, target_context.codegen())
        for directory in (cache_directory(), os.environ.get("TRILITH_KERNELS") or os.devnull):
            try:
                return CompileResult._rebuild(target_context, *pickle.loads(_read_own(Path(directory, name))))
            except OSError:
                continue
            except Exception:  # a damaged entry of any kind is a miss; the compiled result will replace it
                continue
        return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        if not self._enabled or data.library.has_dynamic_globals:
            return
        path = cache_directory() / self._entry(sig, data.codegen)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(dumps(data._reduce()))
            os.replace(temporary, path)
        except OSError:
            # No home, a read-only root file system, a full disk: compile at every start instead.
            self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Numba calls this on recompile; entries are named by content, so none is ever stale."""

    def _entry(self, sig: Any, codegen: Any) -> str:
        digest = hashlib.sha256(repr((self._identity, sig, codegen.magic_tuple())).encode()).hexdigest()
        return f"{self._name}-{digest[:32]}.bin"


def _read_own(path: Path) -> bytes:
    """A file's bytes, if nobody but this user and root can have written them: they are unpickled and run.

    Raises:
        PermissionError: Somebody else owns it or may write to it.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            _warn_of_others(path.parent)
            raise PermissionError(f"{path} is another user's, or others may write to it")
        return file.read()


@functools.cache
def _warn_of_others(directory: Path) -> None:
    _LOG.warning(
        "compiled kernels in %s belong to another user, or others may write to them: they are not loaded, and compiled "
        "anew; $TRILITH_CACHE names another directory",
        directory,
    )


_compiled_s: list[float] = []
"""Seconds that each kernel took which this process has compiled."""


def _say_compiling(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's compilation of one kernel, all of which are one waiting: it is done once, one after another."""

    def compile_and_say(*given: Any) -> Any:
        began = time.perf_counter()
        what = f"kernels to be compiled for this processor, once for all; they are kept in {cache_directory()}"
        with Wait(what, most="a minute or two in all", so_far_s=sum(_compiled_s)):
            result = compile_(*given)
        _compiled_s.append(time.perf_counter() - began)
        return result

    return compile_and_say


@functools.cache
def _fingerprint(folder: Path) -> str:
    """Digest of the sources of `folder`: kernels inline helpers from their whole package."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()

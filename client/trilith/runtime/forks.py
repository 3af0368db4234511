"""What a forked process makes anew: gRPC itself, and whatever has threads, connections, locks or an identity."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import weakref
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, Protocol

from trilith.errors import UnavailableError

__all__ = ["Forked", "keep_for_ever", "renew_grpc", "renew_in_children"]


class Forked(Protocol):
    """What is told when it finds itself in a forked child."""

    def after_fork(self) -> None:
        """Begin anew: threads are gone, locks may be held for ever, connections and identity are the parent's.

        Connections are not to be closed, as that would end the parent's; see `keep_for_ever`. Must not wait.
        """


class _Grpc:
    """Whether gRPC has to begin anew."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stale = False


_HOLDERS: weakref.WeakSet[Forked] = weakref.WeakSet()
_KEPT: list[object] = []
_GRPC = _Grpc()


def renew_in_children(holder: Forked) -> None:
    """Call `holder.after_fork()` in every process that is forked from this one, while the holder lives."""
    _HOLDERS.add(holder)


def keep_for_ever(*objects: object) -> None:
    """Keep what belongs to the parent from being collected, which might say goodbye over the parent's connections."""
    _KEPT.extend(objects)


def renew_grpc() -> None:
    """Give gRPC a fresh beginning if this process was forked from one in which it was in use.

    Its threads are gone, and the sockets and the epoll instance it knows are the parent's, with whatever lock another
    thread held at the fork: a call in the child would wait until its deadline, or disturb the parent. gRPC's own
    handlers put that right only where no thread was in a call. So the child loads the extension once more, from a copy,
    which shares no state with the first, and has grpc's Python part use it. Takes about 30 ms, once in a child.

    Raises:
        UnavailableError: It cannot be loaded again.
    """
    if not _GRPC.stale:
        return
    with _GRPC.lock:
        if not _GRPC.stale:
            return
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        try:
            fresh = _load_copy(cygrpc.__name__, cygrpc.__file__)
        except (OSError, ImportError) as error:
            raise UnavailableError(
                f"gRPC cannot begin anew in this process, which was forked from one that used it ({error});"
                " connect in the child only, or start it with spawn instead of fork"
            ) from None
        # grpc's modules look names up in this one at every use.
        vars(cygrpc).update({name: value for name, value in vars(fresh).items() if not name.startswith("__")})
        _GRPC.stale = False


def _load_copy(name: str, path: str) -> Any:
    """Load an extension module from a copy of its file, which the linker takes for another library."""
    known = sys.modules[name]
    try:
        if hasattr(os, "memfd_create"):
            return _load(name, path, os.memfd_create(name), "/proc/self/fd/{fd}")
        fd, copy = tempfile.mkstemp(suffix=".so")
        try:
            return _load(name, path, fd, copy)
        finally:
            os.unlink(copy)
    finally:
        sys.modules[name] = known


def _load(name: str, path: str, fd: int, copy: str) -> Any:
    with open(fd, "wb") as to, open(path, "rb") as source:
        while block := source.read(1 << 20):
            to.write(block)
        to.flush()
        loader = ExtensionFileLoader(name, copy.format(fd=fd))
        spec = spec_from_file_location(name, loader.path, loader=loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
    return module


def _after_fork() -> None:
    _GRPC.lock = threading.Lock()
    _GRPC.stale = "grpc._cython.cygrpc" in sys.modules
    for holder in list(_HOLDERS):
        holder.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

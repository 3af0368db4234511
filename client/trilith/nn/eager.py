"""Methods that talk to a cluster stay outside of the graphs that torch.compile makes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["outside_graphs"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graphs(method: Callable[_P, _R], *, inside: bool = False) -> Callable[_P, _R]:
    """Have torch.compile break its graph around a method rather than go into numpy, kernels' addresses and sockets.

    As `torch.compiler.disable`, which however imports the compiler, for a second, also where nothing is compiled.

    Args:
        method: Runs as it is written.
        inside: Whether modules that it calls are compiled all the same.
    """
    disabled: Callable[_P, _R] | None = None

    @functools.wraps(method)
    def eager(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return method(*args, **kwargs)
            disabled = torch.compiler.disable(method, recursive=not inside)
        return disabled(*args, **kwargs)

    return eager

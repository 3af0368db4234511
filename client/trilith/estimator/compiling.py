"""Compiled: a task's dense part by torch.compile, for batches of any size, without compiling in the middle of a run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from trilith.errors import InvalidRequestError
from trilith.estimator.features import Inputs
from trilith.estimator.task import Task

__all__ = ["Compiled"]

_WARM_UP = 3
"""Batches of training, and of evaluation, for which something may be compiled."""


class Compiled:
    """Calls a task's model; the task itself stays as it is, so that exports, copies and names of its state do.

    The number of samples is left open in what is compiled. Where torch has decided otherwise, for a batch that is far
    smaller, say, than those before, a batch after the first ones runs as it is written rather than be compiled for.

    Args:
        task: Built.

    Raises:
        InvalidRequestError: There is no compiler, or torch is too old.
    """

    def __init__(self, task: Task) -> None:
        if not hasattr(torch.compiler, "set_stance"):
            raise InvalidRequestError(f"compile=true needs torch 2.6 or newer, this is {torch.__version__}")
        if (why := _missing_compiler()) is not None:
            raise InvalidRequestError(f"compile=true: {why}; install g++, or say compile=false")
        self._task = task
        with _quiet():
            self._forward: Callable[[Inputs], Any] = torch.compile(task)
        self._calls: Counter[tuple[bool, bool]] = Counter()

    def outputs(self, x: Inputs) -> dict[str, Tensor]:
        """What `Task.outputs` gives."""
        kind = self._task.training, torch.is_grad_enabled()
        self._calls[kind] += 1
        for tensor in _tensors(x):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        warm = self._calls[kind] > _WARM_UP
        around: AbstractContextManager[Any] = torch.compiler.set_stance("eager_on_recompile") if warm else _quiet()
        with around:
            return self._task.outputs(x, self._forward)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's compiler warns of itself for: its own old parts, and that vectors are no leaves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.", DeprecationWarning)
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def _tensors(x: Inputs) -> list[Tensor]:
    return [tensor for value in x.values() for tensor in (value if isinstance(value, tuple) else (value,))]


def _missing_compiler() -> str | None:
    """What torch says where it finds no C++ compiler."""
    with _quiet():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).splitlines()[0]
    return None

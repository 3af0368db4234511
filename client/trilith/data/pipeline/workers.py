"""Where this process stands among the workers of a torch DataLoader, and what travels to one that is spawned."""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

from trilith.errors import InvalidRequestError

__all__ = ["check_travels", "torch_worker"]


def torch_worker() -> tuple[int, int]:
    """This process's index among the workers of a torch DataLoader, and their number; (0, 1) outside of one."""
    if "torch" not in sys.modules:
        return 0, 1
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def check_travels(function: Callable[..., Any], step: str) -> None:
    """Refuse a function that cannot be pickled, by the name of the step that holds it.

    Args:
        function: What the step calls.
        step: Name of the step.
    """
    if "cloudpickle" in sys.modules and get_spawning_popen() is None:
        return  # which may be what pickles, and takes any function
    try:
        ForkingPickler.dumps(function)
    except Exception as error:  # noqa: BLE001 - whatever the function holds may raise anything
        raise InvalidRequestError(
            f"{step} holds {function!r}, which cannot be sent to another process ({error}): define a function at the "
            "top of a module instead of a lambda or a local one, or start workers with "
            "multiprocessing_context='fork'"
        ) from None

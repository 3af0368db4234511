"""What the services register under the entry-point group `trilith.engines`: the client library imports none of them."""

from __future__ import annotations

from typing import Any

from trilith.errors import InvalidRequestError

__all__ = ["registered"]


def registered(name: str, what: str, who: str) -> Any:
    """The class that is registered under a name.

    Args:
        name: Of the entry point.
        what: How a message calls it, such as "no engine".
        who: What needs it, in the message.

    Raises:
        InvalidRequestError: Nothing is registered so.
    """
    from importlib.metadata import entry_points

    found = entry_points(group="trilith.engines", name=name)
    if not found:
        raise InvalidRequestError(
            f"{what} is registered under the entry-point group 'trilith.engines': {who} the trilith wheel, or a "
            "checkout installed by `make venv`, not its folders on PYTHONPATH alone"
        )
    return found[name].load()

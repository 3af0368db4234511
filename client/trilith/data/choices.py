"""Arguments that are one of a few words."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Literal, TypeAlias

from trilith.errors import InvalidRequestError

__all__ = ["Choice", "OnError", "check_on_error"]

OnError: TypeAlias = Literal["raise", "skip"]
"""What to do about damaged records: raise `DataError` for the first, or leave them out and count them."""


class Choice(StrEnum):
    """A word out of those its subclass lists; any other is refused, in a message that lists them."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        noun = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        raise InvalidRequestError(f"{value!r} is no {noun}; there are {[str(each) for each in cls]}")


def check_on_error(on_error: str) -> None:
    """Refuse what is no `OnError`."""
    if on_error not in ("raise", "skip"):
        raise InvalidRequestError(f"on_error={on_error!r} is neither 'raise' nor 'skip'")

"""From JSON to a dataclass whose types and own rules hold: pydantic, loaded where something is first read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["read_json"]

_T = TypeVar("_T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def read_json(kind: Callable[..., _T], raw: bytes | str) -> _T:
    """The dataclass that an object of JSON describes; nothing is converted, and fields it does not know are left out.

    Raises:
        ValueError: A field is missing, of another type, or refused by the class; the message names it.
    """
    from pydantic import ValidationError

    try:
        value: _T = _adapter(kind).validate_json(raw, strict=True)
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_url=False)[:3]]
        raise ValueError("; ".join(f"{where}: {what}" if where else what for where, what in wrong)) from None
    return value

"""Bodies of ZooKeeper nodes that other software reads and writes too: a JSON object, a field for each attribute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from trilith.errors import InvalidRequestError

__all__ = ["NodeBody"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBody:
    """What a node says; a subclass has the fields, in the order they are written in, and a default for each."""

    describes: ClassVar[str]
    """What the node stands for."""

    def to_json(self) -> bytes:
        """The body, nulls included."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Read a body; fields this version does not know are left out.

        Raises:
            InvalidRequestError: It is no JSON object.
        """
        try:
            content: dict[str, Any] = json.loads(body)
            return cls(**{name: value for name, value in content.items() if name in cls.__slots__})
        except (ValueError, TypeError, AttributeError):
            raise InvalidRequestError(f"{body[:200]!r} does not describe a {cls.describes}") from None

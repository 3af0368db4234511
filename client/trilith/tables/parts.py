"""The common shape of optimizer, initializer and compressor wrappers: a frozen dataclass that becomes a message."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Generic, TypeVar

from google.protobuf.message import Message

from trilith.errors import InvalidRequestError
from trilith.tables.ranges import check_value

__all__ = ["Part", "part_proto"]

_M = TypeVar("_M", bound=Message)


class Part(Generic[_M]):
    """One choice of a config's `type`.

    Subclasses are frozen dataclasses. Each attribute becomes the message field of the same name (or of the name that
    `renamed` gives); None leaves the field unset, so the message's own default holds.
    """

    __slots__ = ()

    config: ClassVar[type[Any]]
    """The message with the `type` oneof."""
    kind: ClassVar[str]
    """The member of that oneof."""
    renamed: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        described = self.config.DESCRIPTOR.fields_by_name[self.kind].message_type.fields_by_name
        for name, value in self._values().items():
            check_value(type(self).__name__, name, described[self.renamed.get(name, name)], value)

    def as_proto(self) -> _M:
        """The message, a fresh one each time."""
        proto: _M = self.config()
        chosen = getattr(proto, self.kind)
        chosen.SetInParent()
        for name, value in self._values().items():
            setattr(chosen, self.renamed.get(name, name), value)
        return proto

    def _values(self) -> dict[str, Any]:
        """What is set, by attribute."""
        pairs = ((each.name, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in pairs if value is not None}


def part_proto(part: Part[_M] | _M, config: type[_M]) -> _M:
    """The message of a wrapper, or a copy of a ready message."""
    if isinstance(part, Part):
        proto = part.as_proto()
        if isinstance(proto, config):
            return proto
    elif isinstance(part, config):
        copy = config()
        copy.CopyFrom(part)
        return copy
    raise InvalidRequestError(f"{part!r} is neither a {config.__name__} nor a wrapper that makes one")

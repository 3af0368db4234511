"""Options as dataclass fields that say what their flags are: commands make flags of them, and configs of the flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields
from typing import Any

__all__ = ["flags_of", "like", "option"]


def option(default: Any, about: str, *, least: float | None = None, name: str = "", **how: Any) -> Any:
    """A field that is a flag.

    Args:
        default: Where the flag is left out.
        about: What it says in --help.
        least: The smallest number.
        name: The flag's, if it is not the field's.
        **how: What else `typer.Option` takes.
    """
    return field(default=default, metadata={"flag": name, "how": {"help": about, "min": least, **how}})


def like(config: type[Any], name: str, **changed: Any) -> Any:
    """A field that is the same flag as another config's; `changed` may have another default."""
    (same,) = (each for each in fields(config) if each.name == name)
    return field(**{"default": same.default, "metadata": same.metadata, **changed})


def flags_of(config: Any) -> Iterator[tuple[str, Field[Any]]]:
    """The fields of a dataclass that are flags, each with the flag's name."""
    for each in fields(config):
        if "flag" in each.metadata:
            yield each.metadata["flag"] or "--" + each.name.replace("_", "-"), each

"""Where the calls Save and Restore may make a PS write and read: below one directory, unless its operator says more."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass

from trilith.errors import InvalidRequestError
from trilith.folder import absolute

__all__ = ["CheckpointRoot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRoot:
    """The directory or URL below which callers may name checkpoints.

    Attributes:
        root: Directory or URL; None: there is none.
        anywhere: Whether callers may name any other path and URL, too, as this process may read and write them.
    """

    root: str | None = None
    anywhere: bool = False

    def resolve(self, asked: str) -> str:
        """The path that a caller means: below the root, whether it names it from there or whole.

        Raises:
            InvalidRequestError: It is elsewhere. The message is the same whether anything is there or not.
        """
        if not asked or "\0" in asked:
            raise InvalidRequestError(f"path {asked!r}: the name of a checkpoint is needed")
        found = self._below(asked)
        if found is not None:
            return found
        if self.anywhere:
            return asked
        if self.root is None:
            raise InvalidRequestError(
                f"path {asked!r}: this PS has no --checkpoint-root to save below and restore from; start it with one, "
                "with --checkpoint-dir, or with --checkpoint-anywhere"
            )
        raise InvalidRequestError(
            f"path {asked!r} is not below --checkpoint-root {self.root}; name one that is, or start the PS with "
            "another root, or with --checkpoint-anywhere"
        )

    def _below(self, asked: str) -> str | None:
        if self.root is None:
            return None
        root = _plain(absolute(self.root))
        if "://" in root:
            return _below_url(root.rstrip("/"), asked)
        name = _plain(asked)
        if "://" in name or "::" in name:
            return None
        # Links are followed first: what counts is where bytes would go.
        root = os.path.realpath(root)
        path = os.path.realpath(os.path.join(root, name))
        return path if path == root or path.startswith(root.rstrip("/") + "/") else None


def _plain(path: str) -> str:
    """A file's URL as its path."""
    for prefix in ("file://", "local://"):
        if path.startswith(prefix + "/"):
            return path.removeprefix(prefix)
    return path


def _below_url(root: str, asked: str) -> str | None:
    if "::" in asked or "\\" in asked or any(part in (".", "..") for part in asked.split("/")):
        return None
    if "://" not in asked and not asked.startswith("/"):
        return posixpath.join(root, asked)
    return asked if asked == root or asked.startswith(root + "/") else None

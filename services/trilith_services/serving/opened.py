"""OpenedExport: one version of an export, loaded into this process as an entry loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trilith.data.records import Records
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith.serving.exports import MODEL, ModelConfig, entry_base, list_versions, read_export, read_file
from trilith_services.serving.loading import Loader
from trilith_services.serving.replica_lists import open_replica_list
from trilith_services.serving.warm_up import WarmUp

__all__ = ["OpenedExport"]

_LOOKUP_S = 30.0


class OpenedExport:
    """Scores records as an entry with this export does.

    Args:
        path: A version of an export, or a directory of them: its newest.
        replicas: Where the rows of a distributed export are: a directory's URL, or SHARD=host:port each; as of
            `trilith serving entry --replicas`.

    Attributes:
        path: Of the version.
        version: Its number.
        step: Of the checkpoint that it was made of.

    Raises:
        CheckpointError: There is no version, or it is damaged.
        InvalidRequestError: It is distributed, and nobody said where its replicas are.
    """

    def __init__(self, path: str, *, replicas: Sequence[str] = ()) -> None:
        self.path, self.version = _version_of(path)
        listed = open_replica_list(replicas, _model_of(self.path)) if replicas else None
        self._loader = Loader(listed, timeout_s=_LOOKUP_S, threads=None, warm_up=WarmUp())
        try:
            self._loaded = self._loader.load(self.path, self.version)
        except BaseException:
            self._loader.close()
            raise
        self.step = self._loaded.manifest.step

    def predict(self, records: Records, *, signature: str = "") -> dict[str, npt.NDArray[np.float32]]:
        """By output float32[n, ...], for Examples or Instances."""
        return self._loaded.model.predict(records, signature=signature)

    def close(self) -> None:
        """Let go of its rows."""
        self._loaded.close()
        self._loader.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Close."""
        self.close()


def _model_of(path: str) -> str:
    """Name of an export's model."""
    folder = Folder(path)
    return ModelConfig.from_json(read_file(folder, read_export(path), MODEL), folder.path(MODEL)).name


def _version_of(path: str) -> tuple[str, int]:
    """The folder of a version and its number."""
    url = Folder(path).url.rstrip("/")
    name = url.rpartition("/")[2]
    if name.isdigit():
        return url, int(name)
    base = entry_base(url)
    versions = list_versions(base)
    if not versions:
        raise CheckpointError(f"{path} is no version of an export, and has none")
    return f"{base}/{versions[-1]}", versions[-1]

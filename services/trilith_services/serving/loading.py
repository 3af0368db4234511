"""Loader: from the folder of an export to a version in memory, which was run before anybody asks for it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np

from trilith.client import Client
from trilith.connect import connect
from trilith.data.records import Kind, Records
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.nn.serving import Lookup, ServedModel, load_model
from trilith.serving.exports import ROWS, WARM_UP, ExportManifest, ModelConfig, read_file
from trilith_services.serving.replica_lists import ReplicaList
from trilith_services.serving.replicas import ShardedReplicas
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.warm_up import WarmUp, read_warm_up

__all__ = ["Loaded", "Loader"]

log = logging.getLogger(__name__)

_WARM_SIZES = (1, 256)
_WARM_UP_S = 30.0  # for the rows of one warm-up request


@dataclass(slots=True, eq=False)
class Loaded:
    """One version, in memory.

    Attributes:
        model: Scores records.
        manifest: Of its export; its version is the folder's number, whatever an export that was copied says of itself.
        loaded_unix_s: When.
        rows: The client of a standalone export's own rows.
        users: Requests it is at work for.
        records: That it has scored.
        retired: Whether it is to go when nobody uses it any more.
    """

    model: ServedModel
    manifest: ExportManifest
    loaded_unix_s: float
    rows: Client | None = None
    users: int = 0
    records: int = 0
    retired: bool = field(default=False)

    @property
    def version(self) -> int:
        """Number of the folder it was loaded from."""
        return self.manifest.version

    def close(self) -> None:
        """Let go of its rows."""
        if self.rows is not None:
            self.rows.close()


class Loader:
    """Loads versions.

    Args:
        listed: Where the replicas are that distributed exports look rows up at; closed in the end.
        timeout_s: Deadline of a lookup that has none.
        threads: That standalone rows are read with; None: one per core.
        warm_up: What every version scores first.

    Attributes:
        replicas: Those that distributed exports look rows up at; None before the first such export.
    """

    def __init__(self, listed: ReplicaList | None, *, timeout_s: float, threads: int | None, warm_up: WarmUp) -> None:
        self.replicas: ShardedReplicas | None = None
        self._listed = listed
        self._timeout_s = timeout_s
        self._threads = threads
        self._warm_up = warm_up

    def load(self, path: str, version: int, *, model: str = "") -> Loaded:
        """Load the export in a folder and run it once.

        Args:
            path: The folder.
            version: What it is called.
            model: Name that its model must have; empty: any will do.

        Raises:
            TrilithError: It is damaged, of another model, or does not run.
        """
        own: list[Client] = []

        def rows(config: ModelConfig, manifest: ExportManifest) -> Lookup:
            if manifest.mode == "standalone":
                client = connect("local://", threads=self._threads)
                own.append(client)
                client.restore(Folder(path).child(ROWS).url)
                return lambda ids, timeout_s: client.lookup(ids, timeout_s=timeout_s)
            return self._replicas_of(config).lookup_for(config)

        try:
            served, manifest = load_model(path, rows)
            if manifest.shard >= 0:
                raise CheckpointError(f"{path} holds rows of shard {manifest.shard}, no model")
            if model and served.config.name != model:
                raise InvalidRequestError(
                    f"it is of model {served.config.name!r}, this entry serves {model!r}: another model is another "
                    "entry's, with a directory of its own"
                )
            _warm(served)
            asked = self._warm_up.run(served, _requests(path, manifest), timeout_s=_WARM_UP_S)
            if asked:
                log.info("warmed up", extra={"version": version, "requests": asked})
        except BaseException:
            for client in own:
                client.close()
            raise
        if manifest.version != version:
            log.info("an export was copied", extra={"version": version, "was": manifest.version})
            manifest = replace(manifest, version=version)
        return Loaded(served, manifest, time.time(), own[0] if own else None)

    def _replicas_of(self, config: ModelConfig) -> ShardedReplicas:
        if self._listed is None:
            raise InvalidRequestError("a distributed export needs to know where its serving replicas are")
        if self.replicas is None:
            self.replicas = ShardedReplicas(self._listed, config.num_ps, timeout_s=self._timeout_s)
        elif self.replicas.count != config.num_ps:
            raise InvalidRequestError(
                f"the export is of {config.num_ps} PS, the replicas in use are of {self.replicas.count}; "
                "start another entry"
            )
        return self.replicas

    def close(self) -> None:
        """Close the connections to replicas."""
        if self.replicas is not None:
            self.replicas.close()
        if self._listed is not None:
            self._listed.close()


def _requests(path: str, manifest: ExportManifest) -> list[PredictBody]:
    """Those that an export carries."""
    if WARM_UP not in manifest.files:
        return []
    folder = Folder(path)
    try:
        return read_warm_up(read_file(folder, manifest, WARM_UP), WARM_UP)
    except InvalidRequestError as error:
        raise CheckpointError(str(error)) from None


def _warm(model: ServedModel) -> None:
    """Run the model on records that hold nothing: kernels are compiled and torch has planned before anybody waits."""
    for kind in (Kind.EXAMPLE, Kind.INSTANCE):
        for size in _WARM_SIZES:
            records = Records.of([b""] * size, kind)
            scores = model.predict(records, on_unknown=lambda records, counts: None)
            if any(len(values) != size for values in scores.values()):
                shapes = {name: values.shape for name, values in scores.items()}
                raise CheckpointError(f"the model gives {shapes} for {size} records")
            if any(not np.isfinite(values).all() for values in scores.values()):
                log.warning("the model gives no finite scores for empty records")

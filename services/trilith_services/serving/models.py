"""Models: the newest export of a base directory, loaded, and swapped for a newer one while requests run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from trilith.client import Client
from trilith.connect import connect
from trilith.data.records import Kind, Records
from trilith.errors import CheckpointError, InvalidRequestError, TrilithError, UnavailableError
from trilith.exports import ROWS, ExportManifest, ModelConfig, entry_base, list_versions
from trilith.folder import Folder
from trilith.nn.serving import Lookup, ServedModel, load_model
from trilith_services.serving.replica_lists import ReplicaList
from trilith_services.serving.replicas import ShardedReplicas

__all__ = ["Loaded", "Models"]

log = logging.getLogger(__name__)

_WARM_SIZES = (1, 256)


@dataclass(slots=True, eq=False)
class Loaded:
    """One version, in memory.

    Attributes:
        model: Scores records.
        manifest: Of its export.
        loaded_unix_s: When.
        rows: The client of a standalone export's own rows.
        users: Requests it is at work for.
        retired: Whether it is to go when nobody uses it any more.
    """

    model: ServedModel
    manifest: ExportManifest
    loaded_unix_s: float
    rows: Client | None = None
    users: int = 0
    retired: bool = field(default=False)


class Models:
    """Keeps the newest version of an export loaded.

    A newer one is loaded beside it, run once, and then takes its place for the requests that begin from then on; those
    that are on their way end with the version they began with.
    """

    def __init__(
        self,
        base: str,
        *,
        listed: ReplicaList | None = None,
        timeout_s: float = 1.0,
        threads: int | None = None,
        loaded: Callable[[Loaded], None] = lambda loaded: None,
    ) -> None:
        """Load nothing yet.

        Args:
            base: Directory or URL of the exports.
            listed: Where the replicas are that distributed exports look rows up at.
            timeout_s: Deadline of a lookup that has none.
            threads: That standalone rows are read with; None: one per core.
            loaded: Told of every version that takes over.
        """
        self.base = base
        self.replicas: ShardedReplicas | None = None
        self.load_error = ""
        self._listed = listed
        self._timeout_s = timeout_s
        self._threads = threads
        self._loaded = loaded
        self._lock = threading.Lock()
        self._current: Loaded | None = None
        self._refused: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def as_of(self) -> float:
        """Up to when the rows in use are fresh, in Unix seconds; 0: not known."""
        current = self._current
        if current is None:
            return 0.0
        if current.rows is not None:
            return current.manifest.checkpoint_unix_s
        return self.replicas.as_of if self.replicas is not None else 0.0

    @property
    def current(self) -> Loaded | None:
        """The version in use; None before the first."""
        return self._current

    @contextmanager
    def use(self) -> Iterator[Loaded]:
        """The version in use, which stays as long as the body needs it.

        Raises:
            UnavailableError: None is loaded.
        """
        with self._lock:
            current = self._current
            if current is None:
                raise UnavailableError(f"no export of {self.base} is loaded: {self.load_error or 'there is none yet'}")
            current.users += 1
        try:
            yield current
        finally:
            with self._lock:
                current.users -= 1
                ended = current.retired and not current.users
            if ended:
                _close(current)

    def refresh(self) -> bool:
        """Load the newest version if it is newer than the one in use; whether it was.

        A version that cannot be loaded is not tried again.
        """
        root = entry_base(self.base)
        versions = list_versions(root)
        newest = versions[-1] if versions else 0
        current = self._current
        if not newest or newest in self._refused or (current is not None and newest <= current.manifest.version):
            return False
        started = time.perf_counter()
        try:
            fresh = self._load(Folder(root).child(str(newest)).url)
        except Exception as error:  # the present version goes on, whatever is wrong with this one
            if not isinstance(error, TrilithError):
                log.exception("version %d cannot be loaded", newest)
            self._refused[newest] = self.load_error = f"version {newest}: {error}"
            log.error("export not loaded: %s", self.load_error)
            return False
        self.load_error = ""
        with self._lock:
            before, self._current = self._current, fresh
            if before is not None:
                before.retired = True
            idle = before is not None and not before.users
        if before is not None and idle:
            _close(before)
        log.info(
            "model loaded",
            extra={
                "model": fresh.model.config.name,
                "version": newest,
                "step": fresh.manifest.step,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )
        self._loaded(fresh)
        return True

    def _load(self, path: str) -> Loaded:
        own: list[Client] = []

        def rows(config: ModelConfig, manifest: ExportManifest) -> Lookup:
            if manifest.mode == "standalone":
                client = connect("local://", threads=self._threads)
                own.append(client)
                client.restore(Folder(path).child(ROWS).url)
                return lambda ids, timeout_s: client.lookup(ids, timeout_s=timeout_s)
            return self._replicas_of(config).lookup_for(config)

        try:
            model, manifest = load_model(path, rows)
            if manifest.shard >= 0:
                raise CheckpointError(f"{path} holds rows of shard {manifest.shard}, no model")
            _warm(model)
        except BaseException:
            for client in own:
                client.close()
            raise
        return Loaded(model, manifest, time.time(), own[0] if own else None)

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

    def follow(self, every_s: float) -> None:
        """Refresh again and again on a thread."""

        def run() -> None:
            while not self._stop.wait(every_s):
                try:
                    self.refresh()
                except Exception:
                    log.exception("cannot look for newer exports in %s", self.base)

        self._thread = threading.Thread(target=run, name="model-versions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Forget everything."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            _close(current)
        if self.replicas is not None:
            self.replicas.close()
        if self._listed is not None:
            self._listed.close()


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


def _close(loaded: Loaded) -> None:
    if loaded.rows is not None:
        loaded.rows.close()

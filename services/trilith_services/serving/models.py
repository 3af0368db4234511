"""Models: the newest export of a base directory that loads, swapped for a newer one while requests run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from trilith.client import Client
from trilith.connect import connect
from trilith.data.records import Kind, Records
from trilith.errors import CheckpointError, InvalidRequestError, TrilithError, UnavailableError
from trilith.folder import Folder
from trilith.nn.serving import Lookup, ServedModel, load_model
from trilith.serving.exports import ROWS, ExportManifest, ModelConfig, entry_base, list_versions
from trilith_services.serving.replica_lists import ReplicaList
from trilith_services.serving.replicas import ShardedReplicas

__all__ = ["Loaded", "Models"]

log = logging.getLogger(__name__)

_WARM_SIZES = (1, 256)
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0


@dataclass(slots=True, eq=False)
class Loaded:
    """One version, in memory.

    Attributes:
        model: Scores records.
        manifest: Of its export; its version is the folder's number, whatever an export that was copied says of itself.
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


Stamps = dict[str, tuple[str, ...]]


@dataclass(slots=True, eq=False)
class _Failed:
    """A version that could not be loaded.

    Attributes:
        why: What was wrong.
        tried: Its files, as they were when it was tried.
        seen: Its files, as they were at the last look.
        pause_s: From one attempt to the next, if nothing changes.
        due: When it is tried again, by the clock.
    """

    why: str
    tried: Stamps
    seen: Stamps
    pause_s: float
    due: float


class Models:
    """Keeps the newest version of an export loaded.

    A newer one is loaded beside it, run once, and then takes its place for the requests that begin from then on; those
    that are on their way end with the version they began with. If the version in use is taken away, the newest of the
    others takes its place; if there are none, it goes on. A version that cannot be loaded is tried again when its files
    have changed and are at rest, and otherwise after pauses that grow.
    """

    def __init__(
        self,
        base: str,
        *,
        listed: ReplicaList | None = None,
        timeout_s: float = 1.0,
        threads: int | None = None,
        loaded: Callable[[Loaded], None] = lambda loaded: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load nothing yet.

        Args:
            base: Directory or URL of the exports.
            listed: Where the replicas are that distributed exports look rows up at.
            timeout_s: Deadline of a lookup that has none.
            threads: That standalone rows are read with; None: one per core.
            loaded: Told of every version that takes over.
            clock: Seconds.
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
        self._clock = clock
        self._failed: dict[int, _Failed] = {}
        self._gone = 0  # version that was in use when it was taken away, until another is newer or it is back
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

    @property
    def unready(self) -> str:
        """Why requests cannot be answered; empty if they can."""
        current = self._current
        if current is None:
            return f"no export of {self.base} is loaded: {self.load_error or 'there is none yet'}"
        if current.rows is None and self.replicas is not None:
            return self.replicas.missing()
        return ""

    @contextmanager
    def use(self) -> Iterator[Loaded]:
        """The version in use, which stays as long as the body needs it.

        Raises:
            UnavailableError: None is loaded.
        """
        with self._lock:
            current = self._current
            if current is None:
                raise UnavailableError(self.unready)
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
        """Load the newest version that can be, unless it is the one in use; whether one was loaded.

        `load_error` says afterwards why the newest is not in use, if it is not.

        Raises:
            InvalidRequestError: The base directory is none that could be opened.
        """
        try:
            root = entry_base(self.base)
            versions = list_versions(root)
        except InvalidRequestError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever file system; it may pass
            self._tell(f"{self.base} cannot be listed: {type(error).__name__}: {error}", warn=True)
            return False
        for version in self._failed.keys() - set(versions):
            del self._failed[version]
        current = self._current
        used = current.manifest.version if current is not None else 0
        fresh = None
        for version in reversed(versions):
            if version == used:
                break
            if (fresh := self._try(root, version)) is not None:
                break
        if used and used not in versions:
            self._gone = used
        if self._gone and (self._gone in versions or (fresh is not None and fresh.manifest.version > self._gone)):
            self._gone = 0
        used = fresh.manifest.version if fresh is not None else used
        self._tell(self._why_not_newest(used), warn=bool(self._gone))
        if fresh is not None:
            self._take_over(fresh)
        return fresh is not None

    def _try(self, root: str, version: int) -> Loaded | None:
        """Load a version, if it is time to; None if that does not work."""
        folder = Folder(root).child(str(version))
        known = self._failed.get(version)
        stamps: Stamps = {}
        try:
            stamps = folder.stamps()
            if known is not None:
                changed = stamps != known.tried and stamps == known.seen  # and nobody is at work on them
                known.seen = stamps
                if not changed and self._clock() < known.due:
                    return None
            started = time.perf_counter()
            fresh = self._load(folder.url, version)
        except Exception as error:  # the present version goes on, whatever is wrong with this one
            why = f"version {version}: {error}"
            again = known is not None and known.why == why
            if not isinstance(error, TrilithError | OSError):
                log.error("version %d cannot be loaded", version, exc_info=None if again else error)
            pause_s = _FIRST_PAUSE_S if known is None else min(2 * known.pause_s, _LONGEST_PAUSE_S)
            self._failed[version] = _Failed(why, stamps, stamps, pause_s, self._clock() + pause_s)
            if not again:
                log.error("export not loaded: %s", why)
            return None
        self._failed.pop(version, None)
        log.info(
            "model loaded",
            extra={
                "model": fresh.model.config.name,
                "version": version,
                "step": fresh.manifest.step,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )
        return fresh

    def _why_not_newest(self, used: int) -> str:
        newer = [self._failed[version].why for version in sorted(self._failed, reverse=True) if version > used]
        if self._gone and self._gone == used:
            newer.append(f"version {used} is gone from {self.base}; it goes on as long as there is no other")
        elif self._gone:
            newer.append(f"version {self._gone} is gone from {self.base}; version {used} is served instead")
        return "; ".join(newer)

    def _tell(self, why: str, *, warn: bool) -> None:
        if warn and why != self.load_error:
            log.warning("%s", why)
        self.load_error = why

    def _take_over(self, fresh: Loaded) -> None:
        with self._lock:
            before, self._current = self._current, fresh
            if before is not None:
                before.retired = True
            idle = before is not None and not before.users
        if before is not None and idle:
            _close(before)
        self._loaded(fresh)

    def _load(self, path: str, version: int) -> Loaded:
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
        if manifest.version != version:
            log.info("an export was copied", extra={"version": version, "was": manifest.version})
            manifest = replace(manifest, version=version)
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

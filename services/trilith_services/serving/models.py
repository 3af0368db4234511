"""Models: the versions of an export that are loaded, and which of them answers; swapped while requests run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trilith.errors import DeadlineExceededError, InvalidRequestError, TrilithError, UnavailableError
from trilith.folder import Folder
from trilith.serving.exports import entry_base, list_versions
from trilith.serving.published import Published, read_published
from trilith_services.serving.loading import Loaded, Loader
from trilith_services.serving.replica_lists import ReplicaList
from trilith_services.serving.replicas import ShardedReplicas
from trilith_services.serving.versions import Plan, VersionPolicy
from trilith_services.serving.warm_up import WarmUp

__all__ = ["Models"]

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0


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
    """Keeps versions of an export loaded, as a policy and what is published of them say.

    A newer one is loaded beside those that are there, run once, and then takes the place of the one in use for the
    requests that begin from then on; those that are on their way end with the version they began with. If the version
    in use is taken away or withdrawn, the newest of the others takes its place; if there are none, it goes on. A
    version that cannot be loaded is tried again when its files have changed and are at rest, and otherwise after pauses
    that grow.
    """

    def __init__(
        self,
        base: str,
        *,
        policy: VersionPolicy | None = None,
        warm_up: WarmUp | None = None,
        listed: ReplicaList | None = None,
        timeout_s: float = 1.0,
        threads: int | None = None,
        loaded: Callable[[Loaded], None] = lambda loaded: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load nothing yet.

        Args:
            base: Directory or URL of the exports.
            policy: Which versions; None: the newest.
            warm_up: What each scores before it answers, beside what its export says.
            listed: Where the replicas are that distributed exports look rows up at.
            timeout_s: Deadline of a lookup that has none.
            threads: That standalone rows are read with; None: one per core.
            loaded: Told of every version that was loaded.
            clock: Seconds.
        """
        self.base = base
        self.policy = policy or VersionPolicy()
        self.published = Published()
        self.load_error = ""
        self._loader = Loader(listed, timeout_s=timeout_s, threads=threads, warm_up=warm_up or WarmUp())
        self._told = loaded
        self._lock = threading.Lock()
        self._current: Loaded | None = None
        self._loaded: dict[int, Loaded] = {}
        self._clock = clock
        self._failed: dict[int, _Failed] = {}
        self._gone = 0  # version that was in use when it was taken away, until another is newer or it is back
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def replicas(self) -> ShardedReplicas | None:
        """Those that rows are looked up at; None without a distributed export."""
        return self._loader.replicas

    def as_of(self, loaded: Loaded | None) -> float:
        """Up to when the rows of a version are fresh, in Unix seconds; 0: not known."""
        if loaded is None:
            return 0.0
        if loaded.rows is not None:
            return loaded.manifest.checkpoint_unix_s
        return self.replicas.as_of if self.replicas is not None else 0.0

    @property
    def current(self) -> Loaded | None:
        """The version in use; None before the first."""
        return self._current

    @property
    def loaded(self) -> list[Loaded]:
        """All that are, newest first."""
        with self._lock:
            return [self._loaded[version] for version in sorted(self._loaded, reverse=True)]

    @property
    def failed(self) -> dict[int, str]:
        """Why versions that are there are not loaded, by number."""
        return {version: each.why for version, each in sorted(self._failed.items(), reverse=True)}

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
    def use(self, version: int = 0) -> Iterator[Loaded]:
        """A version, which stays as long as the body needs it; 0 is the one in use.

        Raises:
            UnavailableError: None is loaded.
            InvalidRequestError: That one is not.
        """
        with self._lock:
            found = self._loaded.get(version) if version else self._current
            if found is None:
                raise self._missing(version)
            found.users += 1
        try:
            yield found
        finally:
            with self._lock:
                found.users -= 1
                ended = found.retired and not found.users
            if ended:
                found.close()

    def _missing(self, version: int) -> TrilithError:
        if self._current is None:
            return UnavailableError(self.unready)
        there = ", ".join(map(str, sorted(self._loaded)))
        return InvalidRequestError(f"version {version} is not loaded; {there} is ({self._current.version} is in use)")

    def refresh(self) -> bool:
        """Load what shall be and is not, and let go of the rest; whether another version answers now.

        `load_error` says afterwards why the one that should answer does not, if so.

        Raises:
            InvalidRequestError: The base directory is none that could be opened.
        """
        try:
            root = entry_base(self.base)
            versions = list_versions(root)
            self.published = read_published(self.base)
        except InvalidRequestError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever file system; it may pass
            self._tell(f"{self.base} cannot be listed: {type(error).__name__}: {error}", warn=True)
            return False
        plan = self.policy.plan(versions, self.published)
        for version in self._failed.keys() - set(plan.there):
            del self._failed[version]
        held = self._hold(root, plan)
        before = self._current
        after = self._chosen(plan, held)
        used = before.version if before is not None else 0
        if used and used not in plan.there:
            self._gone = used
        if self._gone and (self._gone in plan.there or (after is not None and after.version > self._gone)):
            self._gone = 0
        used = after.version if after is not None else 0
        self._tell(self._why_not(used, plan, versions), warn=bool(self._gone))
        self._keep(held, after)
        return after is not before

    def _hold(self, root: str, plan: Plan) -> dict[int, Loaded]:
        """The versions that shall be loaded and can be."""
        held: dict[int, Loaded] = {}
        newest = 0
        for version in (plan.pinned, *plan.there):
            if version not in plan.there or version in held or (newest >= plan.keep and version != plan.pinned):
                continue
            found = self._loaded.get(version) or self._try(root, version)
            if found is not None:
                held[version] = found
                newest += version != plan.pinned or plan.pinned in plan.there[: plan.keep]
        return held

    def _chosen(self, plan: Plan, held: dict[int, Loaded]) -> Loaded | None:
        """Which version answers."""
        if plan.pinned:
            return held.get(plan.pinned, self._current)  # no other takes the place of one that somebody has chosen
        return held[max(held)] if held else self._current

    def _keep(self, held: dict[int, Loaded], chosen: Loaded | None) -> None:
        """Have `chosen` answer, and `held` beside it; what is neither goes when nobody uses it any more."""
        with self._lock:
            gone = [each for each in self._loaded.values() if each.version not in held and each is not chosen]
            self._current = chosen
            self._loaded = held if chosen is None else {**held, chosen.version: chosen}
            for each in gone:
                each.retired = True
            idle = [each for each in gone if not each.users]
        for each in idle:
            each.close()
        for each in gone:
            log.info("version let go", extra={"version": each.version})

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
            model = self._current.model.config.name if self._current is not None else ""
            fresh = self._loader.load(folder.url, version, model=model)
        except Exception as error:  # the present version goes on, whatever is wrong with this one
            why = f"version {version}: {error}"
            again = known is not None and known.why == why
            if not isinstance(error, TrilithError | OSError):
                log.error("version %d cannot be loaded", version, exc_info=None if again else error)
            # Replicas that are not there yet are no fault of a version: it is wanted as soon as they are.
            elsewhere = isinstance(error, UnavailableError | DeadlineExceededError)
            pause_s = _FIRST_PAUSE_S if known is None or elsewhere else min(2 * known.pause_s, _LONGEST_PAUSE_S)
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
        self._told(fresh)
        return fresh

    def _why_not(self, used: int, plan: Plan, versions: list[int]) -> str:
        """Why the version that should answer does not, where that is so."""
        if plan.pinned and plan.pinned != used:
            how = f"--version {plan.pinned}" if self.policy.only else f"{self.base} is pinned to version {plan.pinned}"
            if plan.pinned in self._failed:
                return f"{how}: {self._failed[plan.pinned].why}"
            return f"{how}, which is {'withdrawn' if plan.pinned in versions else 'not there'}"
        newer = [] if plan.pinned else [why for version, why in self.failed.items() if version > used]
        gone = f"version {self._gone} is {'withdrawn' if self._gone in versions else f'gone from {self.base}'}"
        if self._gone and self._gone == used:
            newer.append(f"{gone}; it goes on{'' if plan.pinned else ' as long as there is no other'}")
        elif self._gone:
            newer.append(f"{gone}; version {used} is served instead")
        return "; ".join(newer)

    def _tell(self, why: str, *, warn: bool) -> None:
        if warn and why != self.load_error:
            log.warning("%s", why)
        self.load_error = why

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
            loaded, self._loaded, self._current = self._loaded, {}, None
        for each in loaded.values():
            each.close()
        self._loader.close()

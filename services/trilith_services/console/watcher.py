"""Watcher: looks at a cluster again and again, keeps what it saw, and tells those who listen."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trilith.discovery.urls import open_directory
from trilith.discovery.zk_url import ZkUrl
from trilith.errors import TrilithError, UnavailableError
from trilith.serving.prediction import Predictor
from trilith_proto import ps_pb2
from trilith_services.console.connections import Connections
from trilith_services.console.members import Members
from trilith_services.console.sampling import (
    EntrySample,
    PsSample,
    Sample,
    add_up,
    entry_state,
    missing_replicas,
    replica_state,
    shard_state,
    table_states,
)
from trilith_services.console.schema import EntryServer, Look, Point, Replica, Shard
from trilith_services.console.serving_list import ServingList, ServingProcess
from trilith_services.http.failures import Failure

__all__ = ["WatchOptions", "Watcher"]

log = logging.getLogger(__name__)

_RECOUNT_EVERY = 5  # looks


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """How to look.

    Attributes:
        interval_s: Seconds from one look to the next; rates are over this time.
        timeout_s: Seconds that a person's call gets.
        history: Looks remembered.
        serving: Directory of the serving processes; None: replicas are those that PS know of.
        model: Serving model under which it lists them.
        features: Table by feature, where the cluster has no record of them.
    """

    interval_s: float = 2.0
    timeout_s: float = 5.0
    history: int = 300
    serving: str | None = None
    model: str = "model"
    features: Mapping[str, str] = field(default_factory=dict)


class Watcher:
    """Looks on a thread of its own. Neither a cluster that is not there yet nor one that went away ends it."""

    def __init__(self, url: str, options: WatchOptions | None = None) -> None:
        """Take note of where the cluster is.

        Raises:
            InvalidRequestError: `url`, or the serving directory's, is no such URL.
        """
        self.url = url
        self.options = options or WatchOptions()
        for place in (url, self.options.serving):
            if place is not None:
                _check_url(place)
        self._lock = threading.Lock()
        self._members: Members | None = None
        self._serving: ServingList | None = None
        self._problem: TrilithError = UnavailableError("the console has not found the cluster yet")
        self._look = Look(unix_s=time.time(), problem=_failure(self._problem))
        self._history: deque[Point] = deque(maxlen=self.options.history)
        self._listeners: list[Callable[[Look | None], None]] = []
        self._samples: dict[tuple[int, str], PsSample] = {}
        self._entries: Connections[str, Predictor] = Connections(lambda address: Predictor([address]), Predictor.close)
        self._entry_samples: dict[str, EntrySample] = {}
        self._answers: dict[int, ps_pb2.DescribeResponse] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trilith-watcher", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    @property
    def members(self) -> Members:
        """The cluster.

        Raises:
            TrilithError: It has not been found; why.
        """
        with self._lock:
            if self._members is None:
                raise type(self._problem)(str(self._problem))
            return self._members

    @property
    def look(self) -> Look:
        """What was seen last."""
        with self._lock:
            return self._look

    @property
    def history(self) -> list[Point]:
        """What was seen before, oldest first."""
        with self._lock:
            return list(self._history)

    def listen(self, listener: Callable[[Look | None], None]) -> Callable[[], None]:
        """Call `listener` with every new look, and None after the last, until the returned function is called.

        Calls come from the watcher's thread and must not block.
        """
        with self._lock:
            self._listeners.append(listener)
        if self._stopping.is_set():
            listener(None)

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    def dismiss(self) -> None:
        """Tell all who listen that there will be no more looks."""
        self._stopping.set()
        self._notify(None)

    def close(self) -> None:
        """Stop looking, and close connections."""
        self.dismiss()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            members, self._members = self._members, None
            serving, self._serving = self._serving, None
            self._problem = UnavailableError("the console is stopping")
        for opened in (members, serving, self._entries):
            if opened is not None:
                opened.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        looks = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                look = self._next(recount=looks % _RECOUNT_EVERY == _RECOUNT_EVERY - 1)
            except TrilithError as error:
                look = self._lost(error)
            except Exception:
                log.exception("a look at the cluster failed")
                look = self._lost(UnavailableError("the console could not look at the cluster; its log says why"))
            looks += 1
            self._keep(look)
            self._stopping.wait(max(self.options.interval_s - (time.monotonic() - started), 0.05))

    def _lost(self, error: TrilithError) -> Look:
        with self._lock:
            self._problem = error
        return Look(unix_s=time.time(), problem=_failure(error))

    def _keep(self, look: Look) -> None:
        with self._lock:
            self._look = look
            if look.problem is None:
                self._history.append(Point(unix_s=look.unix_s, **look.totals.model_dump()))
        self._notify(look)

    def _notify(self, look: Look | None) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener(look)

    def _next(self, *, recount: bool) -> Look:
        members = self._open()
        if recount and self._has_changed(members):
            with self._lock:
                self._members = None
            members.close()
            self._samples, self._answers = {}, {}
            members = self._open()
        samples, shards = self._look_at_shards(members)
        listed = self._serving.read(members.count) if self._serving is not None else []
        replicas = self._look_at_replicas(members, samples, listed)
        entries = self._look_at_entries(members, listed)
        replicas += missing_replicas(members.count, replicas, entries)
        return Look(
            unix_s=time.time(),
            totals=add_up(shards, replicas),
            shards=shards,
            replicas=sorted(replicas, key=lambda replica: (replica.shard, replica.name)),
            entries=entries,
            tables=table_states(samples, members.count),
        )

    def _has_changed(self, members: Members) -> bool:
        """Whether the cluster was made anew, with another number of PS."""
        try:
            count = members.recount()
        except TrilithError:
            return False  # the directory is away, or a PS is missing from it at the moment
        if count != members.count:
            log.info("the cluster has another number of PS", extra={"ps": count, "before": members.count})
        return count != members.count

    def _open(self) -> Members:
        timeout = self.options.timeout_s
        if self._serving is None and self.options.serving is not None:
            serving = ServingList(self.options.serving, self.options.model, timeout_s=timeout)
            with self._lock:
                self._serving = serving
        with self._lock:
            members = self._members
        if members is None:
            members = Members(self.url, timeout_s=timeout, features=self.options.features)
            with self._lock:
                self._members = members
        return members

    @property
    def _answer_s(self) -> float:
        """Seconds in which a process must answer a look."""
        return min(max(self.options.interval_s, 0.5), 2.0)

    @property
    def _answers_by(self) -> float:
        """When a process that is asked now must have answered."""
        return time.monotonic() + self._answer_s

    def _look_at_shards(self, members: Members) -> tuple[dict[int, PsSample], list[Shard]]:
        def ask(index: int) -> PsSample:
            shard = members.shards[index].until(self._answers_by)
            stats = shard.stats()
            known = self._answers.get(index)
            if known is None or known.incarnation != stats.incarnation:
                known = shard.describe()
                self._answers[index] = known
            if wrong := members.check_identity(index, known):
                raise UnavailableError(wrong)
            return Sample(time.monotonic(), stats)

        samples: dict[int, PsSample] = {}
        shards = []
        addresses = members.addresses()
        for index, answer in members.each(range(members.count), ask).items():
            if isinstance(answer, TrilithError):
                shards.append(Shard(index=index, address=addresses[index], alive=False, error=str(answer)))
                continue
            samples[index] = self._remember((index, ""), answer)
            shards.append(shard_state(index, addresses[index], samples[index], self._answers[index]))
        return samples, shards

    def _look_at_replicas(
        self, members: Members, samples: dict[int, PsSample], listed: list[ServingProcess]
    ) -> list[Replica]:
        targets = {
            (index, target.address): (target, sample)
            for index, sample in samples.items()
            for target in sample.stats.sync_targets
        }
        nodes = {(node.shard, node.address): node for node in listed if node.server_type == "ps"}
        known = sorted(targets.keys() | nodes.keys())
        members.replicas.keep(known)

        def ask(key: tuple[int, str]) -> PsSample:
            _check_announced(key[1])
            return Sample(time.monotonic(), members.replicas.get(key).until(self._answers_by).stats())

        answers = members.each(known, ask)
        found = []
        for key, answer in answers.items():
            own = str(answer) if isinstance(answer, TrilithError) else self._remember(key, answer)
            found.append(replica_state(key[0], targets.get(key), nodes.get(key), own))
        return found

    def _look_at_entries(self, members: Members, listed: list[ServingProcess]) -> list[EntryServer]:
        nodes = [node for node in listed if node.server_type != "ps"]
        self._entries.keep(node.address for node in nodes)

        def ask(address: str) -> EntrySample:
            _check_announced(address)
            return Sample(time.monotonic(), self._entries.get(address).status(timeout_s=self._answer_s))

        answers = members.each(dict.fromkeys(node.address for node in nodes), ask)
        samples = {
            address: answer.after(self._entry_samples.get(address))
            for address, answer in answers.items()
            if not isinstance(answer, TrilithError)
        }
        self._entry_samples = samples
        return [entry_state(node, samples.get(node.address) or str(answers[node.address])) for node in nodes]

    def _remember(self, key: tuple[int, str], sample: PsSample) -> PsSample:
        sample = sample.after(self._samples.get(key))
        self._samples[key] = sample
        return sample


def _failure(error: TrilithError) -> Failure:
    return Failure(error=type(error).__name__, message=str(error))


def _check_announced(address: str) -> None:
    if not address:
        raise UnavailableError("it has announced no address")


def _check_url(url: str) -> None:
    """Raise on a URL that will never be one of a directory; ZooKeeper need not be there yet."""
    if url.startswith("zk://"):
        ZkUrl.parse(url)
    elif not url.startswith(("hosts://", "mlp://")):
        open_directory(url).close()

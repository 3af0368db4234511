"""ReplicaSet: the serving replicas of one shard as one shard: load spread over them, dead ones left out."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from trilith.batches import Batches, TableInfo
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.errors import (
    ClosedError,
    ClusterMismatchError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ShardRestartedError,
    TrilithError,
    UnavailableError,
)
from trilith.nn.serving import Lookup
from trilith.routing import OWNER_RULE
from trilith.rpc.remote import RemoteShard
from trilith.serving.exports import ModelConfig
from trilith.shard import FloatArray, IdPart
from trilith_proto import ps_pb2, serving_pb2
from trilith_services.serving.replica_lists import ReplicaList

__all__ = ["ReplicaSet", "ShardedReplicas"]

log = logging.getLogger(__name__)

_PROBE_EVERY_S = 0.5
_PROBE_S = 1.0
_ATTEMPT_SHARE = 0.4
"""Of the time that is left, what one replica gets while there are others to ask."""
_PAUSE_S = 0.02  # between two rounds over replicas that all failed
_TELLING_S = 0.05
"""A deadline nearer than this that passes says something of the caller, not of the replica."""
# Another replica may do better; whatever else is raised is the caller's own, and the same everywhere.
_ELSEWHERE = (
    UnavailableError,
    DeadlineExceededError,
    OverloadedError,
    InternalError,
    ClusterMismatchError,
    ShardRestartedError,
    ClosedError,
)


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica, and what is known of it."""

    address: str
    shard: RemoteShard
    in_flight: int = 0
    suspect: bool = False
    as_of: float = 0.0
    lookups: int = 0
    failures: int = 0
    error: str = ""


@dataclass(slots=True)
class _Books:
    """The replicas of one shard by address, and those that were the last to be listed, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    replicas: dict[str, _Replica] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    closed: bool = False


class ReplicaSet:
    """The replicas of one shard. Thread-safe.

    A lookup goes to the replica with the fewest on their way. One that fails is left alone until a probe finds it well
    again; while it has not failed yet but does not answer either, it gets a share of the time only, and then another
    is asked. If all fail they are asked again until the deadline. What a caller did wrong is told at once, and is not
    held against a replica; neither is a queue that is full, or a deadline that was too near.
    """

    def __init__(self, index: int, count: int, config: ClientConfig) -> None:
        """Know no replica yet.

        Args:
            index: The shard.
            count: How many shards there are.
            config: How to talk to replicas; `timeout_s` is the deadline of a lookup that has none.
        """
        self.index, self.count = index, count
        # One attempt each: whom to ask next is decided here.
        self._one_attempt = ClientConfig(
            timeout_s=config.timeout_s, retry_first_s=1e9, max_message_bytes=config.max_message_bytes
        )
        self._timeout_s = config.timeout_s
        self._books = _Books()

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Ask these replicas from now on."""
        wanted = dict.fromkeys(addresses)
        with self._books.lock:
            if self._books.closed:
                return
            known = self._books.replicas
            if known and not wanted:
                self._books.missed = list(known)
            gone = [known.pop(address) for address in list(known) if address not in wanted]
            for address in wanted:
                if address not in known:
                    shard = RemoteShard(partial(str, address), self._one_attempt, index=self.index)
                    known[address] = _Replica(address, shard)
        if gone or wanted:
            log.info("replicas", extra={"shard": self.index, "addresses": list(wanted)})
        for replica in gone:
            replica.shard.close()

    # ---- Shard, as far as a Cluster needs it -------------------------------------------------------------------------

    def describe(self, *, timeout_s: float | None = None) -> ps_pb2.DescribeResponse:
        """Say which shard this is, whoever may answer for it."""
        return ps_pb2.DescribeResponse(
            shard_index=self.index, shard_count=self.count, owner_rule=OWNER_RULE, incarnation=1
        )

    def lookup(
        self, parts: Sequence[IdPart], *, float16: bool = False, timeout_s: float | None = None
    ) -> list[FloatArray]:
        """See `Shard`.

        Raises:
            UnavailableError: There are no replicas, or none answered.
            TrilithError: The first that answered refuses the request.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        failed: dict[_Replica, TrilithError] = {}
        while True:
            replica, others = self._choose(failed)
            left = deadline - time.monotonic()
            if replica is None:
                if left <= _PAUSE_S:
                    raise self._nobody(failed)
                time.sleep(_PAUSE_S)
                failed.clear()
                continue
            attempt_s = max(left * (_ATTEMPT_SHARE if others else 1.0), 0.001)
            try:
                rows = replica.shard.lookup(parts, float16=float16, timeout_s=attempt_s)
            except _ELSEWHERE as error:
                hurried = isinstance(error, DeadlineExceededError) and attempt_s < _TELLING_S
                self._done(replica, error, suspect=not hurried and not isinstance(error, OverloadedError | ClosedError))
                failed[replica] = error
                if deadline - time.monotonic() <= 0:
                    raise self._nobody(failed) from None
            except BaseException:
                self._done(replica, None)
                raise
            else:
                self._done(replica, None)
                return rows

    def _choose(self, failed: Mapping[_Replica, TrilithError]) -> tuple[_Replica | None, bool]:
        """The replica to ask, counted as busy, and whether there are others."""
        with self._books.lock:
            if self._books.closed:
                raise ClosedError("the replicas were closed")
            left = [each for each in self._books.replicas.values() if each not in failed]
            if not left:
                return None, False
            well = [each for each in left if not each.suspect]
            chosen = min(well or left, key=lambda each: (each.in_flight, random.random()))
            chosen.in_flight += 1
            return chosen, len(left) > 1

    def _done(self, replica: _Replica, error: TrilithError | None, *, suspect: bool = False) -> None:
        with self._books.lock:
            replica.in_flight -= 1
            replica.lookups += 1
            if error is None:
                replica.suspect, replica.error = False, ""
                return
            replica.failures += 1
            if not suspect:
                return
            new, replica.suspect, replica.error = not replica.suspect, True, str(error)
        if new:
            log.warning("replica left alone: %s", error, extra={"shard": self.index, "address": replica.address})

    def _nobody(self, failed: Mapping[_Replica, TrilithError]) -> TrilithError:
        if not failed:
            with self._books.lock:
                known = list(self._books.replicas)
            why = f"{len(known)} do not answer: {', '.join(known)}" if known else "none is listed"
            return UnavailableError(f"no replica of shard {self.index} of {self.count}: {why}")
        reasons = "; ".join(f"{replica.address}: {error}" for replica, error in failed.items())
        return UnavailableError(f"no replica of shard {self.index} of {self.count} answered: {reasons}")

    # ---- probing -----------------------------------------------------------------------------------------------------

    def probe(self, run: Callable[[Callable[[], None]], object]) -> None:
        """Ask every replica how it is, each by handing `run` something to do."""
        with self._books.lock:
            replicas = list(self._books.replicas.values())
        for replica in replicas:
            run(partial(self._probe, replica))

    def _probe(self, replica: _Replica) -> None:
        try:
            if not replica.as_of or replica.suspect:
                self._check(replica.shard.describe(timeout_s=_PROBE_S))
            stats = replica.shard.stats(timeout_s=_PROBE_S)
            replica.shard.global_step(timeout_s=_PROBE_S)  # like lookups, refused by one that is not filled yet
        except TrilithError as error:
            with self._books.lock:
                replica.suspect, replica.error = True, str(error)
            return
        with self._books.lock:
            replica.as_of = stats.replica.as_of
            was, replica.suspect, replica.error = replica.suspect, False, ""
        if was:
            log.info("replica is well", extra={"shard": self.index, "address": replica.address})

    def _check(self, answer: ps_pb2.DescribeResponse) -> None:
        if (answer.shard_index, answer.shard_count) != (self.index, self.count):
            raise UnavailableError(
                f"it is shard {answer.shard_index} of {answer.shard_count}, not {self.index} of {self.count}"
            )

    @property
    def as_of(self) -> float:
        """Up to when every replica that is asked is fresh; 0: not known."""
        with self._books.lock:
            times = [each.as_of for each in self._books.replicas.values() if not each.suspect]
        return min(times, default=0.0)

    def status(self) -> list[serving_pb2.ReplicaStatus]:
        """What is known of each; if none is listed, of those that were, or of one without an address."""
        with self._books.lock:
            if not self._books.replicas:
                missed = self._books.missed or [""]
                why = "no replica of this shard is listed" + (" any more" if self._books.missed else "")
                return [serving_pb2.ReplicaStatus(shard=self.index, address=each, error=why) for each in missed]
            return [
                serving_pb2.ReplicaStatus(
                    shard=self.index,
                    address=each.address,
                    healthy=not each.suspect,
                    rows_as_of=each.as_of,
                    lookups=each.lookups,
                    failures=each.failures,
                    error=each.error,
                )
                for each in self._books.replicas.values()
            ]

    def close(self) -> None:
        """Close all connections."""
        with self._books.lock:
            self._books.closed = True
            replicas = list(self._books.replicas.values())
            self._books.replicas.clear()
        for replica in replicas:
            replica.shard.close()


class ShardedReplicas:
    """The replicas of all shards of a model, followed where they are listed and probed in the background."""

    def __init__(self, listed: ReplicaList, count: int, *, timeout_s: float = 1.0) -> None:
        """Follow `listed`, whose closing is the caller's business.

        Args:
            listed: Who the replicas are.
            count: How many shards there are.
            timeout_s: Deadline of a lookup that has none.
        """
        config = ClientConfig(timeout_s=timeout_s)
        self.count = count
        self._sets = [ReplicaSet(index, count, config) for index in range(count)]
        # Each answers for itself, so nothing is sent here.
        self._cluster = Cluster(self._sets, config)  # type: ignore[arg-type]  # reading verbs only
        self._stop = threading.Event()
        self._unwatch = [listed.watch(index, self._sets[index].set_addresses) for index in range(count)]
        self._probes = ThreadPoolExecutor(8, "replica-probe")
        self.probe()
        self._thread = threading.Thread(target=self._probe_on, name="replica-probes", daemon=True)
        self._thread.start()

    def lookup_for(self, model: ModelConfig) -> Lookup:
        """How a model looks its rows up."""
        infos = {table.name: TableInfo(table, model.dim_of(table.name), None) for table in model.tables}
        return Batches(self._cluster, infos.__getitem__).lookup

    @property
    def as_of(self) -> float:
        """Up to when the rows are fresh, over all shards; 0: not known."""
        return min(each.as_of for each in self._sets)

    def status(self) -> list[serving_pb2.ReplicaStatus]:
        """What is known of each replica."""
        return [status for each in self._sets for status in each.status()]

    def missing(self) -> str:
        """The first shard that nobody answers for, and why; empty if there is a replica of each that does."""
        for index, each in enumerate(self._sets):
            status = each.status()
            if not any(replica.healthy for replica in status):
                reasons = "; ".join(f"{replica.address}: {replica.error}".removeprefix(": ") for replica in status)
                return f"no replica of shard {index} of {self.count} answers: {reasons}"
        return ""

    def probe(self) -> None:
        """Ask every replica how it is, and wait for the answers."""
        asked: list[Callable[[], object]] = []
        for each in self._sets:
            each.probe(lambda work: asked.append(self._probes.submit(work).result))
        for wait in asked:
            wait()

    def _probe_on(self) -> None:
        while not self._stop.wait(_PROBE_EVERY_S):
            self.probe()

    def close(self) -> None:
        """Stop following and probing, and close all connections."""
        for stop in self._unwatch:
            stop()
        self._stop.set()
        self._thread.join()
        self._probes.shutdown()
        for each in self._sets:
            each.close()

"""ReplicaSet: the serving replicas of one shard as one shard; ShardedReplicas: those of all shards."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

from trilith.batches import Batches, TableInfo
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.errors import (
    ClusterMismatchError,
    InternalError,
    ShardRestartedError,
    TrilithError,
    UnavailableError,
)
from trilith.nn.serving import Lookup
from trilith.routing import OWNER_RULE
from trilith.rpc.balancer import PROBE_EVERY_S, PROBE_S, Balancer, Member
from trilith.rpc.remote import RemoteShard
from trilith.serving.exports import ModelConfig
from trilith.shard import FloatArray, IdPart, InProcess
from trilith_proto import ps_pb2, serving_pb2
from trilith_services.serving.replica_lists import ReplicaList

__all__ = ["ReplicaSet", "ShardedReplicas"]

log = logging.getLogger(__name__)

# Another replica may do better after these too; whatever else is raised is the caller's own, and the same everywhere.
_ELSEWHERE = (InternalError, ClusterMismatchError, ShardRestartedError)


@dataclass(slots=True, eq=False)
class _Connection:
    """To one replica; its rows are fresh up to `as_of`, in Unix seconds, 0: not known."""

    shard: RemoteShard
    as_of: float = 0.0


class ReplicaSet(InProcess):
    """The replicas of one shard as one shard, which a balancer spreads lookups over. Thread-safe."""

    def __init__(self, index: int, count: int, config: ClientConfig) -> None:
        """Know no replica yet.

        Args:
            index: The shard.
            count: How many shards there are.
            config: How to talk to replicas; `timeout_s` is the deadline of a lookup that has none.
        """
        self.index, self.count = index, count
        # One attempt each: whom to ask next is decided here.
        one_attempt = ClientConfig(
            timeout_s=config.timeout_s, retry_first_s=1e9, max_message_bytes=config.max_message_bytes
        )
        self._timeout_s = config.timeout_s
        self._deadline: float | None = None
        self._balancer = Balancer(
            f"replica of shard {index}",
            lambda address: _Connection(RemoteShard(partial(str, address), one_attempt, index=index)),
            lambda connection: connection.shard.close(),
            elsewhere=_ELSEWHERE,
        )
        self._missed: list[str] = []  # who was listed last, when nobody is any more

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Ask these replicas from now on."""
        wanted = list(dict.fromkeys(addresses))
        known = [member.address for member in self._balancer.members]
        if known and not wanted:
            self._missed = known
        if known or wanted:
            log.info("replicas", extra={"shard": self.index, "addresses": wanted})
        self._balancer.set_addresses(wanted)

    # ---- Shard, as far as a Cluster needs it -------------------------------------------------------------------------

    def until(self, deadline: float) -> Self:
        """See `Shard`; the replicas are the same."""
        bound = copy.copy(self)
        bound._deadline = deadline
        return bound

    def describe(self) -> ps_pb2.DescribeResponse:
        """Say which shard this is, whoever may answer for it."""
        return ps_pb2.DescribeResponse(
            shard_index=self.index, shard_count=self.count, owner_rule=OWNER_RULE, incarnation=1
        )

    def lookup(self, parts: Sequence[IdPart], *, float16: bool = False) -> list[FloatArray]:
        """See `Shard`.

        Raises:
            UnavailableError: There are no replicas, or none answered.
            TrilithError: The first that answered refuses the request.
        """
        return self._balancer.call(
            lambda member, attempt_s: _within(attempt_s, member).lookup(parts, float16=float16),
            self._timeout_s if self._deadline is None else self._deadline - time.monotonic(),
            self._nobody,
        )

    def _nobody(self, failures: Mapping[Member[_Connection], TrilithError]) -> TrilithError:
        nobody = f"no replica of shard {self.index} of {self.count}"
        if failures:
            reasons = "; ".join(f"{member.address}: {error}" for member, error in failures.items())
            return UnavailableError(f"{nobody} answered: {reasons}")
        known = [member.address for member in self._balancer.members]
        why = f"{len(known)} do not answer: {', '.join(known)}" if known else "none is listed"
        return UnavailableError(f"{nobody}: {why}")

    # ---- probing -----------------------------------------------------------------------------------------------------

    def probe(self, run: Callable[[Callable[[], None]], object]) -> None:
        """Ask every replica how it is, each by handing `run` something to do."""
        for member in self._balancer.members:
            run(partial(self._probe, member))

    def _probe(self, member: Member[_Connection]) -> None:
        connection = member.connection
        try:
            if not connection.as_of or member.suspect:
                self._check(_within(PROBE_S, member).describe())
            stats = _within(PROBE_S, member).stats()
            _within(PROBE_S, member).global_step()  # like lookups, refused by one that is not filled yet
        except TrilithError as error:
            self._balancer.probed(member, error)
            return
        connection.as_of = stats.replica.as_of
        self._balancer.probed(member, None)

    def _check(self, answer: ps_pb2.DescribeResponse) -> None:
        if (answer.shard_index, answer.shard_count) != (self.index, self.count):
            raise UnavailableError(
                f"it is shard {answer.shard_index} of {answer.shard_count}, not {self.index} of {self.count}"
            )

    @property
    def as_of(self) -> float:
        """Up to when every replica that is asked is fresh; 0: not known."""
        return min((member.connection.as_of for member in self._balancer.members if not member.suspect), default=0.0)

    def status(self) -> list[serving_pb2.ReplicaStatus]:
        """What is known of each; if none is listed, of those that were, or of one without an address."""
        members = self._balancer.members
        if not members:
            why = "no replica of this shard is listed" + (" any more" if self._missed else "")
            return [
                serving_pb2.ReplicaStatus(shard=self.index, address=address, error=why)
                for address in self._missed or [""]
            ]
        return [
            serving_pb2.ReplicaStatus(
                shard=self.index,
                address=member.address,
                healthy=not member.suspect,
                rows_as_of=member.connection.as_of,
                lookups=member.requests,
                failures=member.failures,
                error=member.error,
            )
            for member in members
        ]

    def close(self) -> None:
        """Close all connections."""
        self._balancer.close()


def _within(seconds: float, member: Member[_Connection]) -> RemoteShard:
    """The replica, for calls that begin now and end after so many seconds."""
    return member.connection.shard.until(time.monotonic() + seconds)


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
        return min(shard.as_of for shard in self._sets)

    def status(self) -> list[serving_pb2.ReplicaStatus]:
        """What is known of each replica."""
        return [status for shard in self._sets for status in shard.status()]

    def missing(self) -> str:
        """The first shard that nobody answers for, and why; empty if there is a replica of each that does."""
        for index, shard in enumerate(self._sets):
            status = shard.status()
            if not any(replica.healthy for replica in status):
                reasons = "; ".join(f"{replica.address}: {replica.error}".removeprefix(": ") for replica in status)
                return f"no replica of shard {index} of {self.count} answers: {reasons}"
        return ""

    def probe(self) -> None:
        """Ask every replica how it is, and wait for the answers."""
        asked: list[Callable[[], object]] = []
        for shard in self._sets:
            shard.probe(lambda work: asked.append(self._probes.submit(work).result))
        for wait in asked:
            wait()

    def _probe_on(self) -> None:
        while not self._stop.wait(PROBE_EVERY_S):
            self.probe()

    def close(self) -> None:
        """Stop following and probing, and close all connections."""
        for stop in self._unwatch:
            stop()
        self._stop.set()
        self._thread.join()
        self._probes.shutdown()
        for shard in self._sets:
            shard.close()

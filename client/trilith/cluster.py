"""All shards of a cluster as one client sees them: who they are, which writes they got, and calls to many at once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from trilith.config import ClientConfig
from trilith.errors import (
    ClosedError,
    ClusterMismatchError,
    DeadlineExceededError,
    InDoubtError,
    InvalidRequestError,
    MemoryLimitError,
    QueueFullError,
    ReadOnlyError,
    ShardRestartedError,
    TableExistsError,
    TrilithError,
    Unfinished,
    UnknownQueueError,
    UnknownTableError,
    UnknownVariableError,
)
from trilith.routing import OWNER_RULE
from trilith.rpc.identity import Identity
from trilith.runtime.forks import renew_in_children
from trilith.shard import Shard, Write
from trilith_proto import ps_pb2

__all__ = ["Cluster", "Rejoined", "Writes"]

_T = TypeVar("_T")

_MAX_THREADS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoined:
    """A shard that came back in a new incarnation.

    Attributes:
        index: Which shard.
        restored_from: The checkpoint it started from; empty if it started with nothing.
        restored_step: The model's step in that checkpoint.
        known_step: The step this client last knew: how far back the shard went is the difference.
        missing_tables: Tables this client uses that the shard came back without.
        missing_variables: The same for dense variables.
    """

    index: int
    restored_from: str
    restored_step: int
    known_step: int
    missing_tables: tuple[str, ...] = ()
    missing_variables: tuple[str, ...] = ()


class Writes:
    """The names of one call's writes, by shard and in order: a call that is made again finds the same."""

    def __init__(self, name: Callable[[int], Write]) -> None:
        """`name` makes the next one for a shard."""
        self._name = name
        self._named: dict[int, list[Write]] = {}

    def of(self, index: int, number: int = 0) -> Write:
        """The write of this number to a shard. Calls for one shard come one at a time."""
        named = self._named.setdefault(index, [])
        while len(named) <= number:
            named.append(self._name(index))
        return named[number]


class Cluster:
    """The shards of one cluster, in order. Thread-safe.

    Calls to several shards run on a thread pool, one of them in the caller's thread; a single one never leaves it.
    Sequences of writes count per shard, so that a PS sees those of one client without gaps.
    """

    def __init__(self, shards: Sequence[Shard], config: ClientConfig, *, part: tuple[int, int] | None = None) -> None:
        """Meet the shards.

        Args:
            shards: All of them, in order.
            config: How to talk to them.
            part: The one shard given is that of this index, of so many; whoever calls routes ids to it.

        Raises:
            ClusterMismatchError: A shard is not who the order of `shards` says it is.
        """
        self.shards = tuple(shards)
        self._part = part
        self.count = len(self.shards)
        self.config = config
        self.remote = all(shard.remote for shard in shards)
        self.float16 = config.float16 and self.remote
        self.step = 0
        self._known = [0] * self.count
        self._closed = ""
        self._process = os.getpid()
        self._begin([0.0] * self.count)
        renew_in_children(self)
        answers = self.describe()
        self._check_identity(answers)
        for index, answer in enumerate(answers):
            self._adopt(index, answer)
        self.step = answers[0].global_step

    def _begin(self, shard_times: Sequence[float]) -> None:
        """Take an identity for writes to each shard, and no threads yet."""
        self._identities = [Identity(self._origin(index), time) for index, time in enumerate(shard_times)]
        self._pool_lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def after_fork(self) -> None:
        """A child is a client of its own; a shard within the parent's process stays there, with the parent's threads.

        Both would count the same sequences otherwise, and a PS would take the writes of one for repeats of the other's.
        """
        self._begin([identity.shard_time for identity in self._identities])
        if not self.remote and not self._closed:
            self._closed = (
                f"this cluster is embedded in process {self._process}, from which this one was forked: its threads and"
                " locks are not here; open one after the fork, or have both connect to `trilith ps`"
            )

    # ---- identity ----------------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """host:port of every shard that is reached over the network."""
        return [shard.address for shard in self.shards if shard.remote]

    def describe(self, *, timeout_s: float | None = None) -> list[ps_pb2.DescribeResponse]:
        """What every shard says about itself."""
        return self.everywhere(lambda _, shard: shard.describe(), timeout_s=timeout_s)

    def check_incarnations(self, answers: Sequence[ps_pb2.DescribeResponse], *, reading: bool = False) -> None:
        """Raise ShardRestartedError if a shard is no longer in the incarnation that this client knows.

        Args:
            answers: Of all shards.
            reading: Nothing is to be written; does not raise where the client was opened to accept restarts.
        """
        if reading and self.config.on_restart == "accept":
            return
        changed = [i for i, answer in enumerate(answers) if answer.incarnation != self._known[i]]
        if changed:
            raise ShardRestartedError(
                f"{_shards(changed)} restarted since this client met the cluster;"
                " Client.rejoin() accepts the present state"
            )

    def rejoin(
        self,
        tables: Sequence[ps_pb2.TableConfig],
        variables: Mapping[str, Sequence[int]],
        *,
        recreate_tables: bool = False,
    ) -> list[Rejoined]:
        """Adopt the incarnations of shards that restarted.

        Args:
            tables: Tables the client uses.
            variables: Per dense variable the owner of each partition.
            recreate_tables: Create tables that a shard came back without; otherwise nothing is adopted.

        Raises:
            ShardRestartedError: A shard came back without tables.
        """
        answers = self.describe()
        self._check_identity(answers)
        back = [
            self._rejoined(index, answer, {table.name for table in tables}, variables)
            for index, answer in enumerate(answers)
            if answer.incarnation != self._known[index]
        ]
        for shard in back:
            if shard.missing_tables and not recreate_tables:
                raise ShardRestartedError(
                    f"shard {shard.index} came back without tables {list(shard.missing_tables)}; restore a checkpoint,"
                    " or rejoin(recreate_tables=True) to begin them anew"
                )
        for shard in back:
            self._adopt(shard.index, answers[shard.index])
            lost = [table for table in tables if table.name in shard.missing_tables]
            if lost:
                deadline = time.monotonic() + self.config.create_timeout_s
                self.shards[shard.index].until(deadline).create_tables(lost, self.write(shard.index))
        return back

    def _rejoined(
        self, index: int, answer: ps_pb2.DescribeResponse, tables: set[str], variables: Mapping[str, Sequence[int]]
    ) -> Rejoined:
        held = {(spec.name, spec.partition) for spec in answer.variables}
        lost = {
            name
            for name, owners in variables.items()
            if any(owner == index and (name, partition) not in held for partition, owner in enumerate(owners))
        }
        return Rejoined(
            index=index,
            restored_from=answer.restored_from,
            restored_step=answer.restored_step,
            known_step=self.step,
            missing_tables=tuple(sorted(tables - {table.name for table in answer.tables})),
            missing_variables=tuple(sorted(lost)),
        )

    def _adopt(self, index: int, answer: ps_pb2.DescribeResponse) -> None:
        self._known[index] = answer.incarnation
        self._identities[index].renew(answer.unix_time)
        self.shards[index].adopt(answer.incarnation)

    def _check_identity(self, answers: Sequence[ps_pb2.DescribeResponse]) -> None:
        wrong = []
        for index, answer in enumerate(answers):
            at, of = self._part or (index, self.count)
            ours = f"{at} of {of}, owner rule {OWNER_RULE!r}"
            theirs = f"{answer.shard_index} of {answer.shard_count}, owner rule {answer.owner_rule!r}"
            if ours != theirs:
                shard = self.shards[index]
                where = f"{shard.address} " if shard.remote else ""
                wrong.append(f"{where}is shard {ours} by this client's list, and shard {theirs} by its own account")
        if wrong:
            raise ClusterMismatchError("; ".join(wrong))

    # ---- writes ------------------------------------------------------------------------------------------------------

    def write(
        self,
        index: int,
        *,
        global_step: int = 0,
        advance: int = 0,
        request_time: int = 0,
        allow_non_finite: bool = False,
    ) -> Write:
        """Name the next write to a shard. Shard 0 alone advances the step counter: its counter is the model's."""
        return self._identities[index].write(
            incarnation=self._known[index],
            global_step=global_step,
            advance=0 if index else advance,
            request_time=request_time,
            allow_non_finite=allow_non_finite,
        )

    def hear_step(self, step: int) -> None:
        """Know that the model's step is at least `step`: what answers say may arrive in another order."""
        self.step = max(self.step, step)

    def writes(self, **options: Any) -> Writes:
        """Names for the writes of one call; keywords as for `write`."""
        return Writes(lambda index: self.write(index, **options))

    def _origin(self, index: int) -> int:
        """A shard's index in the cluster."""
        return index if self._part is None else self._part[0]

    def restore(
        self,
        path: str,
        variables: ps_pb2.VariableSources | None = None,
        step: int | None = None,
        *,
        timeout_s: float,
    ) -> list[ps_pb2.RestoreResponse]:
        """Have every shard restore a checkpoint, whatever became of it so far, and adopt what it is then."""
        answers = self.describe()
        self._check_identity(answers)

        def call(index: int, shard: Shard) -> ps_pb2.RestoreResponse:
            answer = answers[index]
            write = Identity(self._origin(index), answer.unix_time).write(incarnation=answer.incarnation)
            return shard.restore(path, write, variables, step)

        replies = self.everywhere(call, timeout_s=timeout_s)
        for index, (answer, reply) in enumerate(zip(answers, replies, strict=True)):
            answer.incarnation = reply.incarnation
            self._adopt(index, answer)
        self.step = replies[0].global_step
        return replies

    # ---- calls -------------------------------------------------------------------------------------------------------

    def everywhere(self, call: Callable[[int, Shard], _T], *, timeout_s: float | None = None) -> list[_T]:
        """Call every shard; results in shard order."""
        return list(self.fan_out(range(self.count), call, timeout_s=timeout_s).values())

    def fan_out(
        self,
        indexes: Iterable[int],
        call: Callable[[int, Shard], _T],
        *,
        timeout_s: float | None = None,
        writes: bool = False,
    ) -> dict[int, _T]:
        """Call some shards, all at once, under one deadline.

        Args:
            indexes: Which shards, ascending.
            call: Takes a shard's index and the shard, whose calls end at the deadline.
            timeout_s: Seconds for all; None takes the client's own.
            writes: The call is a write whose names stay the same when it is made again.

        Returns:
            Results by shard index.

        Raises:
            TrilithError: The first failure by shard index, after every call has ended; of a write that others may have
                done, `unfinished` says which have.
        """
        if self._closed:
            raise ClosedError(self._closed)
        timeout = self.config.timeout_s if timeout_s is None else timeout_s
        if not timeout > 0:
            raise InvalidRequestError(f"timeout_s={timeout} is not above 0")
        deadline = time.monotonic() + timeout
        chosen = list(indexes)
        if len(chosen) == 1:  # no hop to another thread
            try:
                return {chosen[0]: self._call(chosen[0], call, deadline)}
            except TrilithError as error:
                if writes:
                    self._leave_unfinished(error, {chosen[0]: error}, (), call)
                raise

        def run(index: int) -> _T:
            if time.monotonic() >= deadline:
                raise unsent(index)
            return self._call(index, call, deadline)

        def unsent(index: int) -> DeadlineExceededError:
            error = DeadlineExceededError(
                f"shard {index}: nothing was sent within {timeout:.3g} s; calls of other threads were before it"
            )
            error.sent = False
            return error

        def result(index: int) -> _T:
            if index not in futures:
                return run(index)
            try:
                return futures[index].result(max(deadline - time.monotonic(), 0.0))
            except TimeoutError:
                if futures[index].cancel():  # no thread has begun with it
                    raise unsent(index) from None
                return futures[index].result()  # it ends at the same deadline

        futures = {index: self._submit(run, index) for index in chosen[1:]}
        results: dict[int, _T] = {}
        failures: dict[int, Exception] = {}
        for index in chosen:
            try:
                results[index] = result(index)
            except Exception as error:  # noqa: BLE001 (raised below, when every call has ended)
                failures[index] = error
        if failures:
            gravest = _gravest(list(failures.values()))
            if writes and isinstance(gravest, TrilithError):
                self._leave_unfinished(gravest, failures, tuple(results), call)
            raise gravest
        return results

    def _leave_unfinished(
        self,
        error: TrilithError,
        failures: Mapping[int, Exception],
        done: tuple[int, ...],
        call: Callable[[int, Shard], object],
    ) -> None:
        """Have the error say what became of its write, if one can go on with it."""
        unknown = tuple(index for index, failure in failures.items() if _may_be_done(failure))
        refused = tuple(index for index in failures if index not in unknown)
        if unknown or (done and refused):
            error.unfinished = Unfinished(
                done=done,
                refused=refused,
                unknown=unknown,
                again=lambda timeout_s: self.fan_out(sorted(failures), call, timeout_s=timeout_s, writes=True),
            )
            error.add_note(str(error.unfinished))

    def _call(self, index: int, call: Callable[[int, Shard], _T], deadline: float) -> _T:
        try:
            return call(index, self.shards[index].until(deadline))
        except InDoubtError:
            # The shard has forgotten this client's id: writes to come get another one, which it can tell to be new.
            with contextlib.suppress(TrilithError):
                self._identities[index].renew(self.shards[index].describe().unix_time)
            raise

    def _submit(self, run: Callable[[int], _T], index: int) -> Future[_T]:
        with self._pool_lock:
            if self._closed:
                raise ClosedError(self._closed)
            if self._pool is None:
                threads = min(_MAX_THREADS, 4 * self.count)
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="trilith-call")
            return self._pool.submit(run, index)

    def close(self) -> None:
        """Close every shard."""
        with self._pool_lock:
            if self._closed:
                return
            self._closed = "the client was closed"
            pool = self._pool
        for shard in self.shards:
            shard.close()
        if pool is not None:
            pool.shutdown(wait=False)


# What a shard raises before it has changed anything; of a write that ended otherwise nobody knows.
_NOT_DONE = (
    InvalidRequestError,
    MemoryLimitError,
    QueueFullError,
    ReadOnlyError,
    TableExistsError,
    UnknownQueueError,
    UnknownTableError,
    UnknownVariableError,
)


def _may_be_done(failure: Exception) -> bool:
    if isinstance(failure, TrilithError) and failure.partly_done:
        return True
    sent = failure.sent if isinstance(failure, DeadlineExceededError) else True
    return sent and not isinstance(failure, _NOT_DONE)


def _gravest(failures: Sequence[Exception]) -> Exception:
    """The failure to raise of several: a restart says most about what is left, otherwise the first."""
    chosen = next((error for error in failures if isinstance(error, ShardRestartedError)), failures[0])
    if len(failures) > 1 and isinstance(chosen, TrilithError):
        chosen.add_note(f"{len(failures)} shards failed in this call")
    return chosen


def _shards(indexes: Sequence[int]) -> str:
    return f"shard {indexes[0]}" if len(indexes) == 1 else f"shards {', '.join(map(str, indexes))}"

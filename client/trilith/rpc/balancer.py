"""Balancer: which of several servers that do the same is asked next, and what is held against those that fail."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from trilith.errors import ClosedError, DeadlineExceededError, OverloadedError, TrilithError, UnavailableError

__all__ = ["PROBE_EVERY_S", "PROBE_S", "Balancer", "Member"]

log = logging.getLogger(__name__)

PROBE_EVERY_S = 0.5
"""From one question how a member is to the next."""
PROBE_S = 1.0
"""How long its answer may take."""
_PAUSE_S = 0.02  # between two rounds over members that all failed
_TELLING_S = 0.05
"""A deadline nearer than this that passes says something of the caller, not of the member."""
_ATTEMPT_SHARE = 0.4
"""Of the time that is left, what one member gets while there are others to ask."""
_ELSEWHERE = (UnavailableError, OverloadedError, DeadlineExceededError)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Member(Generic[T]):
    """One server.

    Attributes:
        address: host:port.
        connection: To it.
        in_flight: Requests that it has not answered.
        suspect: Whether it failed last; it is left alone while others are well.
        error: What it failed with, while it is suspect.
        requests: That it was given and has done with.
        failures: Of these, those that it failed.
        listed: Whether it is still among those to be asked.
        probe_after: When it may be asked again how it is, by the monotonic clock.
    """

    address: str
    connection: T
    in_flight: int = 0
    suspect: bool = False
    error: str = ""
    requests: int = 0
    failures: int = 0
    listed: bool = True
    probe_after: float = 0.0


class Balancer(Generic[T]):
    """Gives each request to the member with the fewest on their way. Thread-safe.

    One that fails is left alone until a probe finds it well again; while it has not failed yet but does not answer
    either, it gets a share of the time only, and then another is asked. If all fail they are asked again until the
    deadline. What a caller did wrong is raised at once, and is not held against a member; neither is a queue that is
    full, or a deadline that was too near.
    """

    def __init__(
        self,
        what: str,
        connect: Callable[[str], T],
        disconnect: Callable[[T], None],
        *,
        probe: Callable[[Member[T]], None] | None = None,
        elsewhere: tuple[type[TrilithError], ...] = (),
    ) -> None:
        """Know no member yet.

        Args:
            what: The members are, for messages: "entry".
            connect: Opens a connection to host:port, without waiting.
            disconnect: Closes it.
            probe: Begins to ask a suspect member how it is, and sees to it that `probed` is told; must not wait. None:
                somebody else probes.
            elsewhere: Errors, besides those of a server that is away, overloaded or silent, after which another member
                may do better.
        """
        self._what = what
        self._connect, self._disconnect = connect, disconnect
        self._probe = probe
        self._elsewhere: tuple[type[TrilithError], ...] = (*_ELSEWHERE, *elsewhere)
        self._lock = threading.Lock()
        self._members: dict[str, Member[T]] = {}
        self._closed = False

    @property
    def members(self) -> list[Member[T]]:
        """Who is to be asked."""
        with self._lock:
            return list(self._members.values())

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Ask these from now on; what is on its way to others is answered."""
        wanted = dict.fromkeys(addresses)
        with self._lock:
            if self._closed:
                return
            gone = [self._members.pop(address) for address in list(self._members) if address not in wanted]
            for address in wanted:
                if address not in self._members:
                    self._members[address] = Member(address, self._connect(address))
            for member in gone:
                member.listed = False
            idle = [member for member in gone if not member.in_flight]
        for member in idle:
            self._disconnect(member.connection)

    def call(
        self,
        attempt: Callable[[Member[T], float], R],
        timeout_s: float,
        nobody: Callable[[Mapping[Member[T], TrilithError]], TrilithError],
    ) -> R:
        """What the first member that answers gives.

        Args:
            attempt: Asks a member, within so many seconds.
            timeout_s: For all attempts together.
            nobody: What to raise when that is over, from what each member failed with, the latest last.

        Raises:
            ClosedError: The balancer was closed.
            TrilithError: What a member refuses the request with, or what `nobody` says.
        """
        deadline = time.monotonic() + timeout_s
        tried: set[Member[T]] = set()
        failures: dict[Member[T], TrilithError] = {}
        while True:
            member, others = self._choose(tried)
            left = deadline - time.monotonic()
            if member is None:
                if left <= _PAUSE_S:
                    raise nobody(failures)
                time.sleep(_PAUSE_S)
                tried.clear()
                continue
            attempt_s = max(left * (_ATTEMPT_SHARE if others else 1.0), 0.001)
            try:
                reply = attempt(member, attempt_s)
            except self._elsewhere as error:
                too_near = isinstance(error, DeadlineExceededError) and attempt_s < _TELLING_S
                self._done(member, error, suspect=not too_near and not isinstance(error, OverloadedError))
                # What came before a deadline says more than the deadline.
                if member not in failures or not isinstance(error, DeadlineExceededError):
                    failures.pop(member, None)
                    failures[member] = error
            except BaseException:
                self._done(member, None)
                raise
            else:
                self._done(member, None)
                return reply
            if time.monotonic() >= deadline:
                raise nobody(failures)
            tried.add(member)

    def _choose(self, tried: set[Member[T]]) -> tuple[Member[T] | None, bool]:
        """The member to ask, counted as busy, and whether there are others that have not failed either."""
        now = time.monotonic()
        due: list[Member[T]] = []
        with self._lock:
            if self._closed:
                raise ClosedError(f"the connections to every {self._what} were closed")
            members = self._members.values()
            if self._probe is not None:
                due = [member for member in members if member.suspect and member.probe_after <= now]
            for member in due:
                member.probe_after = now + PROBE_EVERY_S + PROBE_S
            left = [member for member in members if member not in tried]
            best = [member for member in left if not member.suspect] or left
            chosen = min(best, key=lambda member: (member.in_flight, random.random()), default=None)
            if chosen is not None:
                chosen.in_flight += 1
        if self._probe is not None:
            for member in due:
                self._probe(member)
        return chosen, len(best) > 1

    def _done(self, member: Member[T], failure: TrilithError | None, *, suspect: bool = False) -> None:
        with self._lock:
            member.in_flight -= 1
            member.requests += 1
            member.failures += failure is not None
            new = self._judge(member, failure) if failure is None or suspect else False
            ended = not member.listed and not member.in_flight
        if new:
            log.warning("%s left alone: %s", self._what, failure, extra={"address": member.address})
        if ended:
            self._disconnect(member.connection)

    def probed(self, member: Member[T], failure: TrilithError | None) -> None:
        """Say how a member is: what is wrong with it, None if nothing is."""
        with self._lock:
            was = member.suspect
            self._judge(member, failure)
            member.probe_after = time.monotonic() + PROBE_EVERY_S
        if was and failure is None:
            log.info("%s is well", self._what, extra={"address": member.address})

    def _judge(self, member: Member[T], failure: TrilithError | None) -> bool:
        """Whether it has become suspect just now."""
        new = failure is not None and not member.suspect and not self._closed
        member.suspect, member.error = failure is not None, "" if failure is None else str(failure)
        if new:
            member.probe_after = time.monotonic() + PROBE_EVERY_S
        return new

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            members = list(self._members.values())
            self._members.clear()
        for member in members:
            self._disconnect(member.connection)

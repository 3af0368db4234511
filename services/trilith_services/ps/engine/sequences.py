"""Sequences: which writes a PS has already done, so that a client may repeat one after a lost answer."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trilith.errors import InDoubtError, InternalError, InvalidRequestError, OverloadedError, TrilithError
from trilith.shard import Write

__all__ = ["Sequences"]

_Result = TypeVar("_Result")

_MAX_AGE_S = 3600.0
_CLIENT_BYTES = 800  # what an entry takes beyond its results and its bits
_RESULT_BYTES = 200  # what a small result takes
_UNSAID = 4096  # how far back a client that does not say what is open may repeat


@dataclass(frozen=True, slots=True)
class _Done:
    """What a write gave that was done.

    Attributes:
        result: Its answer, or the error that it ended with after it had begun to change things.
        size: Bytes that keeping it takes.
        failed: Whether `result` is an error.
        slots: Slots of the id space for which it was done; empty: all that this shard owns.
    """

    result: Any = None
    size: int = 0
    failed: bool = False
    slots: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Client:
    """One client's writes: bits for those from `base` on that were done, and what those gave that gave something."""

    base: int  # nobody will send a sequence below
    started: int  # when it took its id, Unix microseconds; 0: it did not say
    done: int = 0
    lost: int = 0  # of those, what they gave is not kept
    answers: dict[int, _Done] = field(default_factory=dict)
    running: dict[int, threading.Event] = field(default_factory=dict)
    answer_bytes: int = 0


class Sequences:
    """Runs each (client, origin, sequence) once; thread-safe.

    What is promised: a write that was done is never done again, and one that was not is never refused as done.
    The state of a client is a bit for each sequence from the lowest that it says is open, and their answers. All is
    bounded: `window` sequences of a client above its lowest open one, those beyond being refused as overload until
    older ones have ended; `max_clients`, of which those idle for longest are forgotten; `answer_bytes` of answers of
    one client, and `max_bytes` of everything, beyond which an answer is dropped, or a client forgotten. A repetition
    whose answer was dropped, and the first write of a client that may have been forgotten, raise InDoubtError and do
    nothing. A client that is not known may have been forgotten if it took its id longer ago than an hour, or no later
    than one that was; ids are dated by this PS's own clock, so clocks of clients do not matter.

    It is in memory only: a restore empties it, and the incarnation changes with it.
    """

    def __init__(
        self,
        *,
        window: int = 1 << 17,
        max_clients: int = 1 << 16,
        answer_bytes: int = 4 << 20,
        max_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._window = window
        self._max_clients = max_clients
        self._answer_bytes = answer_bytes
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: OrderedDict[tuple[int, int], _Client] = OrderedDict()
        self._bytes = 0
        self._forgotten = 0  # the latest start of a client that was forgotten
        self._forgot_undated = False

    @property
    def memory_bytes(self) -> int:
        """Bytes that this takes, about."""
        return self._bytes

    def once(
        self, write: Write, work: Callable[[], _Result], *, check: Callable[[], object] | None = None
    ) -> tuple[_Result, bool]:
        """Do `work` unless this write was done before.

        A repetition that arrives while the first is under way waits for it.

        Args:
            write: Whose identity counts.
            work: If there is a `check`, what it raises is remembered and raised again: it had begun to change things.
                Without one, work that raises has done nothing, and may be repeated.
            check: Raises whatever can be known beforehand; the write was not done then, and may be repeated.

        Returns:
            The result, and whether it is that of an earlier call.

        Raises:
            InDoubtError: It cannot be told whether it was done, or what it gave; nothing was done now.
        """
        if write.client_id == 0:
            if check is not None:
                check()
            return work(), False
        key, sequence = (write.client_id, write.origin), write.sequence
        while True:
            with self._lock:
                client = self._of(key, write)
                if (client.done >> (sequence - client.base)) & 1:
                    return _answer(client, write), True
                running = client.running.get(sequence)
                if running is None:
                    mine = client.running[sequence] = threading.Event()
                    break
            running.wait()
        begun = False
        outcome: _Done | None = None
        try:
            if check is not None:
                check()
                begun = True
            result = work()
            outcome = _Done(result, _size_of(result))
            return result, False
        except BaseException as error:
            if begun:
                outcome = _Done(error, _RESULT_BYTES, failed=True)
            raise
        finally:
            with self._lock:
                client.running.pop(sequence, None)
                if outcome is not None:
                    self._note(key, write, outcome)
            mine.set()

    def clear(self) -> None:
        """Forget every client: what they had done is gone with the content."""
        with self._lock:
            self._clients.clear()
            self._bytes = 0

    # ---- inside; the lock is held ------------------------------------------------------------------------------------

    def _of(self, key: tuple[int, int], write: Write) -> _Client:
        """The client of a write that may be looked up or done."""
        sequence, lowest = write.sequence, write.lowest_open
        if lowest > sequence:
            raise InvalidRequestError(f"write {sequence} is below the lowest open one, {lowest}")
        client = self._clients.get(key)
        if client is None:
            self._refuse_forgotten(write)
            self._make_room()
            base = lowest or max(0, sequence - _UNSAID)
            client = self._clients[key] = _Client(base, write.client_started)
            self._bytes += _CLIENT_BYTES
        else:
            self._clients.move_to_end(key)
            self._close_below(client, lowest or max(0, sequence - _UNSAID))
        if sequence < client.base:
            raise InDoubtError(
                f"write {sequence} of client {write.client_id:#x}: the client had said that it would send none below "
                f"{client.base} any more; whether it was done before is not known, and it was not done now"
            )
        if sequence - client.base >= self._window:
            raise OverloadedError(
                f"write {sequence} of client {write.client_id:#x}: write {client.base} is still open, and at most "
                f"{self._window} younger ones may pass it"
            )
        return client

    def _refuse_forgotten(self, write: Write) -> None:
        started = write.client_started
        if started == 0:
            gone = self._forgot_undated
        else:
            gone = started <= self._forgotten or abs(1e-6 * started - self._clock()) > _MAX_AGE_S
        if gone:
            raise InDoubtError(
                f"write {write.sequence} of client {write.client_id:#x}, which is not known here and may have been "
                "forgotten: whether the write was done before is not known, and it was not done now"
            )

    def _close_below(self, client: _Client, lowest: int) -> None:
        if lowest <= client.base:
            return
        self._bytes -= _bits_bytes(client)
        client.done >>= lowest - client.base
        client.lost >>= lowest - client.base
        client.base = lowest
        self._bytes += _bits_bytes(client)
        if client.answers:
            for sequence in [answered for answered in client.answers if answered < lowest]:
                self._drop(client, sequence)

    def _drop(self, client: _Client, sequence: int) -> None:
        size = client.answers.pop(sequence).size
        client.answer_bytes -= size
        self._bytes -= size

    def _note(self, key: tuple[int, int], write: Write, outcome: _Done) -> None:
        client = self._clients.get(key)
        if client is None:  # a restore, which emptied all this, is remembered in what comes after it
            client = self._clients[key] = _Client(write.sequence, write.client_started)
            self._bytes += _CLIENT_BYTES
        place = write.sequence - client.base
        if place < 0:
            return  # given up meanwhile; it will be refused as such
        self._bytes -= _bits_bytes(client)
        client.done |= 1 << place
        self._bytes += _bits_bytes(client)
        if outcome.result is not None:
            client.answers[write.sequence] = outcome
            client.answer_bytes += outcome.size
            self._bytes += outcome.size
            while client.answer_bytes > self._answer_bytes:
                old = next(iter(client.answers))
                client.lost |= 1 << (old - client.base)
                self._drop(client, old)
        while self._bytes > self._max_bytes and self._forget_one():
            pass

    def _make_room(self) -> None:
        """Have room for one more client."""
        while len(self._clients) >= self._max_clients:
            if not self._forget_one():
                raise OverloadedError(f"{len(self._clients)} clients have writes under way; no more can be remembered")

    def _forget_one(self) -> bool:
        """Forget the client that has been idle for longest; false if none is idle."""
        key = next((key for key, client in self._clients.items() if not client.running), None)
        if key is None:
            return False
        client = self._clients.pop(key)
        self._bytes -= _CLIENT_BYTES + _bits_bytes(client) + client.answer_bytes
        self._forgotten = max(self._forgotten, client.started)
        self._forgot_undated |= client.started == 0
        return True


def _answer(client: _Client, write: Write) -> Any:
    """What a write gave that was done before."""
    name = f"write {write.sequence} of client {write.client_id:#x}"
    if (client.lost >> (write.sequence - client.base)) & 1:
        raise InDoubtError(f"{name} was done before, and not again now; its answer was too large to be kept")
    answer = client.answers.get(write.sequence)
    if answer is None or not answer.failed:
        return None if answer is None else answer.result
    error = answer.result
    text = f"{error} (so {name} ended, half done perhaps; it was not done again)"
    raise type(error)(text) if isinstance(error, TrilithError) else InternalError(f"{type(error).__name__}: {text}")


def _bits_bytes(client: _Client) -> int:
    return (client.done.bit_length() + client.lost.bit_length()) >> 3


def _size_of(result: Any) -> int:
    """Bytes that keeping a result takes, about."""
    size = getattr(result, "nbytes", None)
    if size is None and hasattr(result, "ByteSize"):
        size = result.ByteSize()
    if size is None and isinstance(result, (list, dict)):
        size = 100 * len(result)
    return _RESULT_BYTES + int(size or 0)

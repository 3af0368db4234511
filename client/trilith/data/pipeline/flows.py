"""Flows: one stream of records cut into several by data source, and several made one."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trilith.data.choices import OnError
from trilith.data.fids import data_source_key
from trilith.data.pipeline.division import divides_itself, open_divided
from trilith.data.pipeline.nodes import Context, Node
from trilith.data.pipeline.stages import Stage, State, Striding
from trilith.data.records import Kind, Records
from trilith.data.samples.rewrite import rewrite
from trilith.errors import DataError, InvalidRequestError

__all__ = ["Flow", "FlowSplitter", "with_source_names"]

_PATIENCE_S = 60.0


class FlowSplitter:
    """Deals the records of one pipeline to flows by their data source key; every flow keeps their order.

    The pipeline is read once, by whichever flow finds its queue empty. A flow whose queue is full makes the others wait
    until it is read, so flows that are read one after another in one thread must fit into their queues.

    Args:
        nodes: The pipeline.
        names: Data sources, one per flow.
        max_queue_size: Records that a flow's queue may hold when another flow needs more.
        unknown: What happens to records of another source: "raise" a DataError, or "drop" them.
    """

    def __init__(
        self,
        nodes: tuple[Node, ...],
        names: Sequence[str],
        *,
        max_queue_size: int = 1024,
        unknown: Literal["raise", "drop"] = "raise",
    ) -> None:
        keys = [data_source_key(name) for name in names]
        if len(set(keys)) != len(keys) or not keys:
            raise InvalidRequestError(f"flows {list(names)} must be one or more, with different keys; they have {keys}")
        if max_queue_size < 1:
            raise InvalidRequestError(f"max_queue_size={max_queue_size} is below 1")
        if unknown not in ("raise", "drop"):
            raise InvalidRequestError(f"unknown={unknown!r}: 'raise' or 'drop'")
        self.nodes = nodes
        self._names = list(names)
        self._keys = np.array(keys, np.uint32)
        self._limit = max_queue_size
        self._raises = unknown == "raise"
        self._begin()

    def _begin(self) -> None:
        """Have nothing read yet, in this process."""
        self._process = os.getpid()
        self._lock = threading.Condition()
        self._queues: list[deque[Records]] = [deque() for _ in self._names]
        self._waiting = [0] * len(self._names)
        self._open = [False] * len(self._names)
        self._joined: set[int] = set()
        self._upstream: Stage | None = None
        self._ended: BaseException | None = None
        self._reading = False

    def __getstate__(self) -> dict[str, Any]:
        """What is to be split, not how far it has been."""
        run = ("_process", "_lock", "_queues", "_waiting", "_open", "_joined", "_upstream", "_ended", "_reading")
        return {name: value for name, value in self.__dict__.items() if name not in run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state)
        self._begin()

    def join(self, flow: int, context: Context) -> None:
        """Begin to read a flow; one that was read before begins another pass over all of them."""
        if self._process != os.getpid():
            self._begin()  # forked: files and threads are the parent's
        with self._lock:
            if flow in self._joined and any(self._open):
                reading = [name for name, open_ in zip(self._names, self._open, strict=True) if open_]
                raise InvalidRequestError(
                    f"flow {self._names[flow]!r} was begun before, and flows {reading} are still being read"
                )
            if flow in self._joined:
                self._reset()
            if not self._joined:
                self._upstream, self._ended = open_divided(self.nodes, context), None
            self._joined.add(flow)
            self._open[flow] = True

    def leave(self, flow: int) -> None:
        """Stop reading a flow; what waits for flows that nobody has read yet stays."""
        with self._lock:
            self._open[flow] = False
            self._queues[flow].clear()
            self._waiting[flow] = 0
            if len(self._joined) == len(self._names) and not any(self._open):
                self._reset()
            self._lock.notify_all()

    def _reset(self) -> None:
        upstream, self._upstream = self._upstream, None
        self._joined.clear()
        for number, queue in enumerate(self._queues):
            queue.clear()
            self._waiting[number] = 0
        if upstream is not None:
            upstream.close()

    def next(self, flow: int) -> Records:
        """The next records of a flow."""
        with self._lock:
            while True:
                if self._queues[flow]:
                    records = self._queues[flow].popleft()
                    self._waiting[flow] -= len(records)
                    self._lock.notify_all()
                    return records
                if self._ended is not None:
                    if isinstance(self._ended, StopIteration):
                        raise StopIteration
                    raise self._ended
                if self._reading or max(self._waiting) >= self._limit:
                    self._wait()
                    continue
                self._reading = True
                upstream = self._upstream
                self._lock.release()
                try:
                    found = self._read(upstream)
                finally:
                    self._lock.acquire()
                    self._reading = False
                    self._lock.notify_all()
                if isinstance(found, BaseException):
                    self._ended = found
                else:
                    self._deal(found)

    def _wait(self) -> None:
        """Wait until a record was read or taken; a full flow that nobody comes to read is an error, not a hang."""
        if self._lock.wait(timeout=_PATIENCE_S) or self._reading:
            return
        for flow, waiting in enumerate(self._waiting):
            if waiting >= self._limit and not self._open[flow]:
                raise InvalidRequestError(
                    f"{waiting} records wait for flow {self._names[flow]!r}, which nobody reads: read all flows at the "
                    f"same time, or raise max_queue_size, {self._limit}"
                )

    @staticmethod
    def _read(upstream: Stage | None) -> Records | BaseException:
        if upstream is None:
            return StopIteration()
        try:
            records: Records = next(upstream)
        except StopIteration:
            return StopIteration()  # the one caught would keep the frames of whoever reads
        except BaseException as error:  # noqa: BLE001 - raised in every flow
            return error
        return records

    def _deal(self, records: Records) -> None:
        if self._raises:
            stray = np.flatnonzero(~np.isin(records.source_keys, self._keys))
            if stray.size:
                row = int(stray[0])
                self._ended = DataError(
                    f"{records.where(row)}: data source key {records.source_keys[row]} is none of {self._names}"
                )
                records = records.take(slice(0, row))
        for flow, key in enumerate(self._keys):
            mine = records.take(records.source_keys == key)
            if len(mine) and (self._open[flow] or flow not in self._joined):
                self._queues[flow].append(mine.compact())
                self._waiting[flow] += len(mine)


class _FlowStage:
    """One reader of a flow."""

    def __init__(self, splitter: FlowSplitter, flow: int, context: Context) -> None:
        self._splitter: FlowSplitter | None = splitter
        self._flow = flow
        splitter.join(flow, context)

    def __next__(self) -> Records:
        if self._splitter is None:
            raise StopIteration
        return self._splitter.next(self._flow)

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None:
        raise InvalidRequestError("a flow of split records has no position of its own; save that of what is split")

    def close(self) -> None:
        splitter, self._splitter = self._splitter, None
        if splitter is not None:
            splitter.leave(self._flow)


@dataclass(frozen=True, slots=True, eq=False)
class Flow(Node):
    """One flow of a splitter, as a source."""

    splitter: FlowSplitter
    flow: int
    on_error: OnError = "raise"

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`; flows of one splitter may need different shares, so each takes its own of all records."""
        index, count = context.worker
        if count == 1 or divides_itself(self.splitter.nodes):
            return _FlowStage(self.splitter, self.flow, context)
        alone = dataclasses.replace(context, worker=(0, 1))
        return Striding(_FlowStage(self.splitter, self.flow, alone), index, count)


def with_source_names(records: Records) -> Records:
    """Instances or Examples with line_id.data_source_name "data_source" and their data source key."""
    if records.kind not in (Kind.INSTANCE, Kind.EXAMPLE) or not len(records):
        return records
    keys, place = np.unique(records.source_keys, return_inverse=True)
    names: list[Any] = [f"data_source{key}".encode() for key in keys.tolist()]
    values = np.empty(len(records), object)
    values[:] = [names[index] for index in place.tolist()]
    return rewrite(records, line_id={"data_source_name": values})

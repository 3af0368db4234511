"""The ParameterServer service in front of any Shard: unpack, call, count, pack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol, cast

import grpc
import numpy as np

from trilith.errors import InvalidRequestError, UnavailableError
from trilith.rpc import wire
from trilith.shard import FloatArray, IdPart, Shard, Write
from trilith_proto import ps_pb2
from trilith_services.grpc.rpc import rpc
from trilith_services.grpc.serve import Method
from trilith_services.ps.checkpoint.root import CheckpointRoot
from trilith_services.ps.process.metrics import Metrics

__all__ = ["ParameterServerServicer"]


class _HasDim(Protocol):
    @property
    def dim(self) -> int: ...


class _LooksUpInPlace(Protocol):
    """What a shard may offer beyond `Shard`: rows written where the reply needs them."""

    def table(self, name: str) -> _HasDim: ...

    def lookup_into(self, parts: Sequence[IdPart], outs: Sequence[FloatArray]) -> None: ...


class ParameterServerServicer:
    """Methods named as in ps.proto. Those that carry arrays take and return bytes, laid out by `wire`."""

    def __init__(
        self,
        shard: Shard,
        metrics: Metrics,
        *,
        queued: Callable[[], int] = lambda: 0,
        add_stats: Callable[[ps_pb2.StatsResponse], None] = lambda stats: None,
        paths: CheckpointRoot | None = None,
    ) -> None:
        """Serve `shard`; calls are refused until `ready` is set.

        Args:
            shard: Whose rows are served.
            metrics: Where calls are counted.
            queued: How many calls wait, for Stats.
            add_stats: Puts into Stats what the shard does not know.
            paths: What Save and Restore may name; None: nothing.
        """
        self._shard = shard
        self._in_place = cast(_LooksUpInPlace, shard) if hasattr(shard, "lookup_into") else None
        self._metrics = metrics
        self._queued = queued
        self._add_stats = add_stats
        self._paths = paths or CheckpointRoot()
        self.ready = False

    # ---- what `rpc` needs --------------------------------------------------------------------------------------------

    @property
    def observer(self) -> Metrics:
        """Who is told about every call."""
        return self._metrics

    @property
    def incarnation(self) -> int:
        """The shard's incarnation, which a restore changes."""
        return self._shard.incarnation

    def admit(self, method: str) -> None:
        """Refuse calls before the shard is restored and compiled."""
        if not self.ready:
            raise UnavailableError(f"{method}: this PS is still starting")

    def methods(self) -> dict[str, Method]:
        """Every method of the service; those that carry arrays without the library's (de)serialisation."""
        found = {}
        for method in ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"].methods:
            name = method.name.removesuffix("Stream")
            found[method.name] = Method(
                call=getattr(self, name),
                parse=None if name in _RAW else getattr(ps_pb2, method.input_type.name).FromString,
                serialize=None if name in _RAW_REPLY else _serialize,
                control=name in _CONTROL,
                long=name in _LONG,
                stream=method.name != name,
            )
        return found

    # ---- the cluster -------------------------------------------------------------------------------------------------

    @rpc
    def Describe(self, request: ps_pb2.DescribeRequest, context: grpc.ServicerContext) -> ps_pb2.DescribeResponse:
        """Say which shard this is."""
        reply = self._shard.describe()
        reply.version = _version()
        return reply

    @rpc
    def Stats(self, request: ps_pb2.StatsRequest, context: grpc.ServicerContext) -> ps_pb2.StatsResponse:
        """Counters and sizes."""
        return self.stats()

    def stats(self) -> ps_pb2.StatsResponse:
        """The shard's numbers with those of the server around it."""
        reply = self._shard.stats()
        self._metrics.add_methods(reply)
        reply.queued_requests = self._queued()
        self._add_stats(reply)
        return reply

    @rpc
    def CreateTables(
        self, request: ps_pb2.CreateTablesRequest, context: grpc.ServicerContext
    ) -> ps_pb2.CreateTablesResponse:
        """Create tables."""
        self._shard.create_tables(request.tables, _write(request))
        return ps_pb2.CreateTablesResponse(incarnation=self.incarnation)

    @rpc
    def Save(self, request: ps_pb2.SaveRequest, context: grpc.ServicerContext) -> ps_pb2.SaveResponse:
        """Write this shard's files of a checkpoint."""
        return self._shard.save(self._paths.resolve(request.path), _write(request))

    @rpc
    def Restore(self, request: ps_pb2.RestoreRequest, context: grpc.ServicerContext) -> ps_pb2.RestoreResponse:
        """Replace the shard's content."""
        return self._shard.restore(self._paths.resolve(request.path), _write(request))

    # ---- rows --------------------------------------------------------------------------------------------------------

    @rpc
    def Lookup(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer with one row per id."""
        parts, dims, float16 = wire.unpack_lookup_request(request)
        if self._in_place is None:
            rows = self._shard.lookup(parts, float16=float16)
            _check_dims(parts, dims, [block.shape[1] for block in rows])
            reply, outs = wire.new_lookup_response(
                self.incarnation, parts, [block.shape[1] for block in rows], float16=float16
            )
            for out, block in zip(outs, rows, strict=True):
                out[:] = block
        else:
            held = [self._in_place.table(part.table).dim for part in parts]
            _check_dims(parts, dims, held)
            reply, outs = wire.new_lookup_response(self.incarnation, parts, held, float16=float16)
            self._in_place.lookup_into(parts, outs)
        self._metrics.carried("Lookup", sum([part.ids.size for part in parts]), len(request), len(reply))
        return reply

    def _update(self, name: str, call: Callable[..., None], request: bytes) -> ps_pb2.UpdateResponse:
        parts, write = wire.unpack_update_request(request)
        call(parts, write)
        self._metrics.carried(name, sum(part.ids.size for part in parts), len(request), 0)
        return ps_pb2.UpdateResponse(incarnation=self.incarnation)

    @rpc
    def ApplyGradients(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.UpdateResponse:
        """Take optimizer steps."""
        return self._update("ApplyGradients", self._shard.apply_gradients, request)

    @rpc
    def Assign(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.UpdateResponse:
        """Set weights."""
        return self._update("Assign", self._shard.assign, request)

    @rpc
    def AssignAdd(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.UpdateResponse:
        """Add to weights."""
        return self._update("AssignAdd", self._shard.assign_add, request)

    @rpc
    def Reinitialize(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Reset rows."""
        part, write = wire.unpack_ids(request)
        reply = wire.pack_statuses(self.incarnation, self._shard.reinitialize(part, write))
        self._metrics.carried("Reinitialize", part.ids.size, len(request), len(reply))
        return reply

    @rpc
    def Contains(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Say which ids have rows."""
        part, _ = wire.unpack_ids(request)
        reply = wire.pack_statuses(self.incarnation, self._shard.contains(part).view(np.int8))
        self._metrics.carried("Contains", part.ids.size, len(request), len(reply))
        return reply

    @rpc
    def LookupEntries(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.EntriesResponse:
        """Answer with whole entries."""
        part, _ = wire.unpack_ids(request)
        entries = self._shard.lookup_entries(part)
        self._metrics.carried("LookupEntries", part.ids.size, len(request), 0)
        return ps_pb2.EntriesResponse(incarnation=self.incarnation, entries=entries)

    @rpc
    def DumpEntries(
        self, request: ps_pb2.DumpEntriesRequest, context: grpc.ServicerContext
    ) -> ps_pb2.DumpEntriesResponse:
        """One page of a table."""
        page = self._shard.dump_entries(
            request.table, part=request.part, parts=request.parts, limit=request.limit, offset=request.offset
        )
        return ps_pb2.DumpEntriesResponse(incarnation=self.incarnation, offset=page.offset, entries=page.entries)

    @rpc
    def Erase(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.CountsResponse:
        """Delete rows."""
        part, write = wire.unpack_ids(request)
        rows = self._shard.erase(part, write)
        self._metrics.carried("Erase", part.ids.size, len(request), 0)
        return ps_pb2.CountsResponse(incarnation=self.incarnation, rows={part.table: rows})

    @rpc
    def Evict(self, request: ps_pb2.EvictRequest, context: grpc.ServicerContext) -> ps_pb2.CountsResponse:
        """Delete expired rows."""
        rows = self._shard.evict(request.tables, _write(request), now=request.now)
        return ps_pb2.CountsResponse(incarnation=self.incarnation, rows=rows)

    @rpc
    def Clear(self, request: ps_pb2.ClearRequest, context: grpc.ServicerContext) -> ps_pb2.CountsResponse:
        """Drop all rows of tables."""
        rows = self._shard.clear(request.tables, _write(request))
        return ps_pb2.CountsResponse(incarnation=self.incarnation, rows=rows)

    # ---- dense variables ---------------------------------------------------------------------------------------------

    @rpc
    def CreateVariables(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.CreateVariablesResponse:
        """Create partitions."""
        header, initial = wire.unpack_create_variables(request)
        created = self._shard.create_variables(header.variables, initial, _write(header))
        return ps_pb2.CreateVariablesResponse(incarnation=self.incarnation, created=created)

    @rpc
    def PullVariables(self, request: ps_pb2.PullVariablesRequest, context: grpc.ServicerContext) -> bytes:
        """Answer with values."""
        refs = [(ref.name, ref.partition) for ref in request.partitions]
        values, step = self._shard.pull_variables(refs) if refs else ([], self._shard.global_step())
        return wire.pack_pulled(self.incarnation, refs, values, step)

    @rpc
    def ApplyDenseGradients(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.UpdateResponse:
        """Step partitions."""
        parts, write, rate = wire.unpack_dense_update(request)
        self._shard.apply_dense_gradients(parts, write, learning_rate=rate)
        return ps_pb2.UpdateResponse(incarnation=self.incarnation)

    @rpc
    def AssignVariables(self, request: bytes, context: grpc.ServicerContext) -> ps_pb2.UpdateResponse:
        """Set partitions."""
        parts, write, _ = wire.unpack_dense_update(request)
        self._shard.assign_variables(parts, write)
        return ps_pb2.UpdateResponse(incarnation=self.incarnation)

    @rpc
    def GlobalStep(self, request: ps_pb2.GlobalStepRequest, context: grpc.ServicerContext) -> ps_pb2.GlobalStepResponse:
        """Read, set or advance the step."""
        action = request.WhichOneof("action")
        step = self._shard.global_step(
            advance=request.advance if action == "advance" else None,
            set_to=request.set if action == "set" else None,
            write=_write(request),
        )
        return ps_pb2.GlobalStepResponse(incarnation=self.incarnation, global_step=step)

    # ---- queues ------------------------------------------------------------------------------------------------------

    @rpc
    def CreateQueue(
        self, request: ps_pb2.CreateQueueRequest, context: grpc.ServicerContext
    ) -> ps_pb2.CreateQueueResponse:
        """Create a queue."""
        created = self._shard.create_queue(request.name, request.elements, _write(request), capacity=request.capacity)
        return ps_pb2.CreateQueueResponse(incarnation=self.incarnation, created=created)

    @rpc
    def Enqueue(self, request: ps_pb2.EnqueueRequest, context: grpc.ServicerContext) -> ps_pb2.EnqueueResponse:
        """Append to a queue."""
        self._shard.enqueue(request.queue, request.elements, _write(request))
        return ps_pb2.EnqueueResponse(incarnation=self.incarnation)

    @rpc
    def Dequeue(self, request: ps_pb2.DequeueRequest, context: grpc.ServicerContext) -> ps_pb2.DequeueResponse:
        """Lease an element."""
        given = self._shard.dequeue(
            request.queues,
            request.worker,
            _write(request),
            lease_s=request.lease_s,
            claim=request.claim,
        )
        return ps_pb2.DequeueResponse(
            incarnation=self.incarnation,
            queue=given.queue,
            element=given.element,
            lease=given.lease,
            exhausted=given.exhausted,
        )

    @rpc
    def Acknowledge(
        self, request: ps_pb2.AcknowledgeRequest, context: grpc.ServicerContext
    ) -> ps_pb2.AcknowledgeResponse:
        """Take an element as done."""
        held = self._shard.acknowledge(
            request.worker,
            request.lease,
            _write(request),
            queue=request.queue,
            elements=request.elements,
        )
        return ps_pb2.AcknowledgeResponse(incarnation=self.incarnation, held=held)

    @rpc
    def HoldLeases(self, request: ps_pb2.HoldLeasesRequest, context: grpc.ServicerContext) -> ps_pb2.HoldLeasesResponse:
        """Prolong or end leases."""
        leases = self._shard.hold_leases(request.worker, request.lease_s, _write(request))
        return ps_pb2.HoldLeasesResponse(incarnation=self.incarnation, leases=leases)


_RAW = frozenset(
    {
        "Lookup",
        "ApplyGradients",
        "Assign",
        "AssignAdd",
        "Reinitialize",
        "Contains",
        "LookupEntries",
        "Erase",
        "CreateVariables",
        "ApplyDenseGradients",
        "AssignVariables",
    }
)
_RAW_REPLY = frozenset({"Lookup", "Reinitialize", "Contains", "PullVariables"})
# Needed when all else waits, and quick; on threads of their own.
_CONTROL = frozenset({"Describe", "Stats"})
# Few, but they compile kernels or go through all rows; on other threads, so that nobody waits for them but each other.
_LONG = frozenset({"CreateTables", "CreateVariables", "Save", "Restore", "Evict", "Clear"})


@functools.cache
def _version() -> str:
    try:
        return metadata.version("trilith")
    except metadata.PackageNotFoundError:  # run from a source tree
        return ""


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]


def _write(request: Any) -> Write:
    """The write that a request is, as far as its fields `write` and `incarnation` say."""
    return wire.unpack_write(request.write, request.incarnation)


def _check_dims(parts: Sequence[IdPart], asked: Sequence[int], held: Sequence[int]) -> None:
    for part, dim, right in zip(parts, asked, held, strict=True):
        if dim not in (0, right):
            raise InvalidRequestError(f"table {part.table!r} has rows of {right} floats, dim={dim} was asked for")

"""The ParameterServer service in front of a shard, made of the table of verbs: unpack, call, count, pack."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import grpc

from trilith.errors import InvalidRequestError, ShardRestartedError, UnavailableError
from trilith.rpc import wire
from trilith.shard import IdPart, ServedShard, Write
from trilith.verbs import VERBS, Verb
from trilith_proto import ps_pb2
from trilith_services.grpc.rpc import guarded
from trilith_services.grpc.serve import Method
from trilith_services.ps.checkpoint.root import CheckpointRoot
from trilith_services.ps.process.metrics import Metrics

__all__ = ["ParameterServerServicer"]


class ParameterServerServicer:
    """Answers every verb by the shard's method of its name, but for those with a method of their own here."""

    def __init__(
        self,
        shard: ServedShard,
        metrics: Metrics,
        *,
        queued: Callable[[], int] = lambda: 0,
        add_stats: Callable[[ps_pb2.StatsResponse], None] = lambda stats: None,
        paths: CheckpointRoot | None = None,
        shut_down: Callable[[], None] | None = None,
    ) -> None:
        """Serve `shard`; calls are refused until `ready` is set.

        Args:
            shard: Whose rows are served.
            metrics: Where calls are counted.
            queued: How many calls wait, for Stats.
            add_stats: Puts into Stats what the shard does not know.
            paths: What Save and Restore may name; None: nothing.
            shut_down: Ends the process, for the run whose own it is; None: no client may.
        """
        self._shard = shard
        self._metrics = metrics
        self._queued = queued
        self._add_stats = add_stats
        self._paths = paths or CheckpointRoot()
        self._shut_down = shut_down
        self._own: dict[str, Callable[..., Any]] = {
            "Describe": self.describe,
            "Stats": self.stats,
            "Save": self.save,
            "Restore": self.restore,
            "Shutdown": self.shutdown,
        }
        self.ready = False
        self.saved = "", 0.0
        """The newest checkpoint whose part a client had written: its path, and when, Unix seconds."""

    # ---- what `guarded` needs ----------------------------------------------------------------------------------------

    @property
    def observer(self) -> Metrics:
        """Who is told about every call."""
        return self._metrics

    @property
    def incarnation(self) -> int:
        """The shard's incarnation, which a restore changes."""
        return self._shard.incarnation

    def admit(self, method: str) -> None:
        """Refuse calls before the shard is restored and compiled; its process may end before."""
        if not self.ready and method != "Shutdown":
            raise UnavailableError(f"{method}: this PS is still starting")

    # ---- calls: bytes in, bytes out ----------------------------------------------------------------------------------

    def methods(self) -> dict[str, Method]:
        """Every method of the service."""
        found = {}
        for name, verb in VERBS.items():
            call = partial(guarded(name, _lookup if name == "Lookup" else partial(_answer, verb)), self)
            found[name] = Method(call=call, control=verb.control, long=verb.long)
            if verb.streamed:
                found[f"{name}Stream"] = Method(call=call, stream=True)
        return found

    def answer(self, verb: Verb[..., Any], request: bytes) -> bytes:
        """Answer one request of any verb but Lookup."""
        arguments = verb.unpack(request)
        method = self._own.get(verb.name) or verb.of(self._shard)
        result = method(**arguments)
        reply = verb.answer(self.incarnation, result, arguments)
        if verb.carries_ids:
            self._count(verb.name, arguments["parts"] if "parts" in arguments else [arguments["part"]], request, reply)
        return reply

    def lookup(self, request: bytes) -> bytes:
        """Answer a Lookup: the shard writes rows where the reply has them."""
        parts, dims, float16 = wire.unpack_lookup_request(request)
        held = self._shard.dims(parts)
        for part, dim, right in zip(parts, dims, held, strict=True):
            if dim not in (0, right):
                raise InvalidRequestError(f"table {part.table!r} has rows of {right} floats, dim={dim} was asked for")
        reply, outs = wire.new_lookup_response(self.incarnation, parts, held, float16=float16)
        self._shard.lookup_into(parts, outs)
        self._count("Lookup", parts, request, reply)
        return reply

    def _count(self, name: str, parts: Sequence[IdPart], request: bytes, reply: bytes) -> None:
        self._metrics.carried(name, sum([part.ids.size for part in parts]), len(request), len(reply))

    # ---- what the shard alone cannot answer --------------------------------------------------------------------------

    def describe(self) -> ps_pb2.DescribeResponse:
        """Say which shard this is, of which version."""
        reply = self._shard.describe()
        reply.version = _version()
        reply.owned = self._shut_down is not None
        return reply

    def stats(self) -> ps_pb2.StatsResponse:
        """The shard's numbers with those of the server around it."""
        reply = self._shard.stats()
        self._metrics.add_methods(reply)
        reply.queued_requests = self._queued()
        self._add_stats(reply)
        return reply

    def save(self, path: str, write: Write) -> ps_pb2.SaveResponse:
        """Write this shard's files of a checkpoint, where it may write."""
        where = self._paths.resolve(path)
        began = time.perf_counter()
        try:
            reply = self._shard.save(where, write)
        except ShardRestartedError:
            raise  # nothing was tried: the client is to see that rows are others first
        except Exception:
            self._metrics.checkpointed(time.perf_counter() - began, 0, succeeded=False)
            raise
        self._metrics.checkpointed(time.perf_counter() - began, sum(file.bytes for file in reply.files), succeeded=True)
        self.saved = where, time.time()
        return reply

    def restore(
        self, path: str, write: Write, variables: ps_pb2.VariableSources | None, global_step: int | None
    ) -> ps_pb2.RestoreResponse:
        """Replace the shard's content by what it may read."""
        return self._shard.restore(self._paths.resolve(path), write, variables, global_step)

    def shutdown(self) -> None:
        """End the process, if it is one run's own."""
        if self._shut_down is None:
            raise InvalidRequestError(
                "no client may shut this PS down, as others may use it; `trilith ps --owned` starts one that is a run's"
            )
        self._shut_down()


def _answer(
    verb: Verb[..., Any], servicer: ParameterServerServicer, request: bytes, context: grpc.ServicerContext
) -> bytes:
    return servicer.answer(verb, request)


def _lookup(servicer: ParameterServerServicer, request: bytes, context: grpc.ServicerContext) -> bytes:
    return servicer.lookup(request)


@functools.cache
def _version() -> str:
    try:
        return metadata.version("trilith")
    except metadata.PackageNotFoundError:  # run from a source tree
        return ""

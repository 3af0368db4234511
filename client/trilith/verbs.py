"""The verbs of a PS, one entry each, of which both sides are made: `RemoteShard` here, the servicer there.

A verb is one RPC of ps.proto and one method of `Shard`, of the same name. What an entry does not say is as follows. The
fields of the request are the arguments of the method, and `write` with `incarnation` is the argument `write`; the reply
holds nothing but the incarnation. A call is sent again, with the same bytes, while the PS is away or overloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from trilith.rpc import wire
from trilith.shard import ANY_WRITE, Dequeued, EntryPage, Float32Array, Shard, Write
from trilith_proto import ps_pb2

__all__ = ["SERVICE", "VERBS", "Verb", "Verbs"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PROTO = ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"]
SERVICE = _PROTO.full_name


class Verb(Generic[_P, _R]):
    """One verb. Read from an object of a class that has it, it is the method: `remote.lookup(...)` calls `remote.call`.

    Attributes:
        name: Of the RPC, "ApplyGradients".
        method: Of the method of `Shard`, "apply_gradients".
        pack: From the method's arguments to the request.
        unpack: From the request to the method's arguments, by name.
        answer: From the incarnation, what the method returned and its arguments to the reply.
        result: From the reply to the incarnation and what the method returns.
        streamed: Offered as a stream too, which saves most of what a small call costs.
        reads: Changes nothing, so a replica answers it, and a client that accepts restarts does not notice one. The
            step counter is read where it is not given a write's name.
        carries_ids: Its ids and bytes are counted.
        control: Quick and needed when all else waits: the PS has threads of their own for such verbs.
        long: Takes minutes, compiling kernels or going through all rows; on other threads of the PS.
        awaited: Somebody waits for it from the first attempt on, and is told so.
        patient: May take as long as it is given; once the PS is away, no longer than other calls.
        any_incarnation: Its answer may come from another incarnation than the known one.
    """

    def __init__(
        self,
        method: Callable[Concatenate[Shard, _P], _R],
        *,
        returns: str | type = "",
        renamed: Mapping[str, str] | None = None,
        pack: Callable[..., bytes] | None = None,
        unpack: Callable[[bytes], tuple[Any, ...]] | None = None,
        answer: Callable[[int, Any, Mapping[str, Any]], bytes] | None = None,
        result: Callable[[bytes], tuple[int, Any]] | None = None,
        streamed: bool = False,
        reads: bool = False,
        carries_ids: bool = False,
        control: bool = False,
        long: bool = False,
        awaited: bool = False,
        patient: bool = False,
        any_incarnation: bool = False,
    ) -> None:
        """Make an entry.

        Args:
            method: Of `Shard`.
            returns: Where the reply has what the method returns: the name of a field; a class that is made of the
                fields of the same names; or the class of the reply, which then is what the method returns.
            renamed: Field of the request by argument, where their names differ.
            pack: As the attribute, for requests that are more than fields.
            unpack: From the request to the method's arguments, in order.
            answer: As the attribute, for replies that are more than fields.
            result: As the attribute.
            streamed: As the attribute; so are all that follow.
            reads: See above.
            carries_ids: See above.
            control: See above.
            long: See above.
            awaited: See above.
            patient: See above.
            any_incarnation: See above.
        """
        self.method = method.__name__
        self.name = "".join(word.capitalize() for word in self.method.split("_"))
        rpc = _PROTO.methods_by_name[self.name]
        self.request: type[Message] = getattr(ps_pb2, rpc.input_type.name)
        self.reply: type[Message] = getattr(ps_pb2, rpc.output_type.name)
        self.parameters = tuple(inspect.signature(method).parameters)[1:]
        self._fields = {each: (renamed or {}).get(each, each) for each in self.parameters if each != "write"}
        self._returns = returns
        self._unpack_arguments = unpack
        self.pack = pack or self._pack_fields
        self.unpack = self._unpack_fields if unpack is None else self._unpack_in_order
        self.answer = answer or self._answer_fields
        self.result = result or self._result_of_fields
        self.streamed, self.reads, self.carries_ids = streamed, reads, carries_ids
        self.control, self.long = control, long
        self.awaited, self.patient, self.any_incarnation = awaited, patient, any_incarnation

    @overload
    def __get__(self, remote: None, owner: type[Verbs]) -> Verb[_P, _R]: ...
    @overload
    def __get__(self, remote: Verbs, owner: type[Verbs]) -> Callable[_P, _R]: ...
    def __get__(self, remote: Verbs | None, owner: type[Verbs]) -> Verb[_P, _R] | Callable[_P, _R]:
        """The method of `remote`, or, read from a class, the verb itself."""
        return self if remote is None else partial(remote.call, self)

    def of(self, shard: Shard) -> Callable[_P, _R]:
        """The method of `shard` that this verb calls."""
        return getattr(shard, self.method)  # type: ignore[no-any-return]

    def _pack_fields(self, *args: Any, **kwargs: Any) -> bytes:
        arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
        write: Write = arguments.pop("write", ANY_WRITE)
        request: Any = self.request(**{self._fields[each]: value for each, value in arguments.items()})
        if write is not ANY_WRITE:
            request.incarnation = write.incarnation
            if (identity := wire.write_id(write)) is not None:
                request.write.CopyFrom(identity)
        return request.SerializeToString()  # type: ignore[no-any-return]

    def _unpack_fields(self, data: bytes) -> dict[str, Any]:
        request: Any = wire.parse(self.request, data)
        arguments = {each: _given(request, field) for each, field in self._fields.items()}
        if "write" in self.parameters:
            arguments["write"] = wire.unpack_write(request.write, request.incarnation)
        return arguments

    def _unpack_in_order(self, data: bytes) -> dict[str, Any]:
        assert self._unpack_arguments is not None
        return dict(zip(self.parameters, self._unpack_arguments(data), strict=False))

    def _answer_fields(self, incarnation: int, result: Any, arguments: Mapping[str, Any]) -> bytes:
        if self._returns is self.reply:
            return result.SerializeToString()  # type: ignore[no-any-return]
        if isinstance(self._returns, str):
            values = {self._returns: result} if self._returns else {}
        else:
            values = {each.name: getattr(result, each.name) for each in fields(self._returns)}
        return self.reply(incarnation=incarnation, **values).SerializeToString()

    def _result_of_fields(self, data: bytes) -> tuple[int, Any]:
        reply: Any = self.reply.FromString(data)
        if self._returns is self.reply:
            return reply.incarnation, reply
        if not self._returns:
            return reply.incarnation, None
        if isinstance(self._returns, str):
            return reply.incarnation, _plain(getattr(reply, self._returns))
        values = {each.name: _plain(getattr(reply, each.name)) for each in fields(self._returns)}
        return reply.incarnation, self._returns(**values)


def _given(request: Any, field: str) -> Any:
    """A field's value; None if it is one of a choice that was not taken."""
    chosen = request.DESCRIPTOR.fields_by_name[field].containing_oneof is None or request.HasField(field)
    return getattr(request, field) if chosen else None


def _plain(value: Any) -> Any:
    """A list or a dict of what a message has as its own kind of them; anything else as it is."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return list(value) if isinstance(value, MutableSequence) else value


# ---- messages that are more than fields: arrays, as `wire` lays them out ---------------------------------------------


def _answer_statuses(incarnation: int, statuses: npt.NDArray[Any], arguments: Mapping[str, Any]) -> bytes:
    return wire.pack_statuses(incarnation, statuses.view(np.int8))


def _result_of_contains(data: bytes) -> tuple[int, npt.NDArray[np.bool_]]:
    incarnation, statuses = wire.unpack_statuses(data)
    return incarnation, statuses.view(np.bool_)


def _answer_erase(incarnation: int, rows: int, arguments: Mapping[str, Any]) -> bytes:
    counts = {arguments["part"].table: rows}
    return ps_pb2.CountsResponse(incarnation=incarnation, rows=counts).SerializeToString()


def _result_of_erase(data: bytes) -> tuple[int, int]:
    reply = ps_pb2.CountsResponse.FromString(data)
    return reply.incarnation, sum(reply.rows.values())


def _unpack_create_variables(data: bytes) -> tuple[Sequence[ps_pb2.VariableSpec], list[Float32Array], Write]:
    header, initial = wire.unpack_create_variables(data)
    return header.variables, initial, wire.unpack_write(header.write, header.incarnation)


def _pack_refs(refs: Sequence[tuple[str, int]]) -> bytes:
    request = ps_pb2.PullVariablesRequest()
    for name, partition in refs:
        request.partitions.add(name=name, partition=partition)
    return request.SerializeToString()


def _unpack_refs(data: bytes) -> tuple[list[tuple[str, int]]]:
    return ([(ref.name, ref.partition) for ref in wire.parse(ps_pb2.PullVariablesRequest, data).partitions],)


def _answer_pulled(incarnation: int, pulled: tuple[Sequence[Float32Array], int], arguments: Mapping[str, Any]) -> bytes:
    return wire.pack_pulled(incarnation, arguments["refs"], *pulled)


def _result_of_pulled(data: bytes) -> tuple[int, tuple[list[Float32Array], int]]:
    incarnation, values, step = wire.unpack_pulled(data)
    return incarnation, (values, step)


class Verbs:
    """The table: every verb, as a method that goes by `call`. It makes a class a `Shard`, but for what a shard says."""

    def call(self, verb: Verb[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Do what `verb` means."""
        raise NotImplementedError

    describe = Verb(
        Shard.describe, returns=ps_pb2.DescribeResponse, reads=True, control=True, awaited=True, any_incarnation=True
    )
    stats = Verb(Shard.stats, returns=ps_pb2.StatsResponse, reads=True, control=True)
    create_tables = Verb(Shard.create_tables, renamed={"configs": "tables"}, long=True, awaited=True)
    save = Verb(Shard.save, returns=ps_pb2.SaveResponse, long=True, patient=True)
    restore = Verb(Shard.restore, returns=ps_pb2.RestoreResponse, long=True, patient=True, any_incarnation=True)
    shutdown = Verb(Shard.shutdown, control=True, any_incarnation=True)

    lookup = Verb(
        Shard.lookup,
        pack=wire.pack_lookup_request,  # what answers it, the servicer has: rows go straight into the reply
        result=wire.unpack_lookup_response,
        streamed=True,
        reads=True,
        carries_ids=True,
    )
    apply_gradients = Verb(
        Shard.apply_gradients,
        pack=wire.pack_update_request,
        unpack=wire.unpack_update_request,
        returns="global_step",
        streamed=True,
        carries_ids=True,
    )
    assign = Verb(Shard.assign, pack=wire.pack_update_request, unpack=wire.unpack_update_request, carries_ids=True)
    assign_add = Verb(
        Shard.assign_add, pack=wire.pack_update_request, unpack=wire.unpack_update_request, carries_ids=True
    )
    reinitialize = Verb(
        Shard.reinitialize,
        pack=wire.pack_ids,
        unpack=wire.unpack_ids,
        answer=_answer_statuses,
        result=wire.unpack_statuses,
        carries_ids=True,
    )
    contains = Verb(
        Shard.contains,
        pack=wire.pack_ids,
        unpack=wire.unpack_ids,
        answer=_answer_statuses,
        result=_result_of_contains,
        reads=True,
        carries_ids=True,
    )
    lookup_entries = Verb(
        Shard.lookup_entries,
        pack=wire.pack_ids,
        unpack=wire.unpack_ids,
        returns="entries",
        reads=True,
        carries_ids=True,
    )
    erase = Verb(
        Shard.erase,
        pack=wire.pack_ids,
        unpack=wire.unpack_ids,
        answer=_answer_erase,
        result=_result_of_erase,
        carries_ids=True,
    )
    dump_entries = Verb(Shard.dump_entries, returns=EntryPage, reads=True)
    evict = Verb(Shard.evict, returns="rows", long=True)
    clear = Verb(Shard.clear, returns="rows", long=True)

    create_variables = Verb(
        Shard.create_variables,
        pack=wire.pack_create_variables,
        unpack=_unpack_create_variables,
        returns="created",
        long=True,
    )
    pull_variables = Verb(
        Shard.pull_variables,
        pack=_pack_refs,
        unpack=_unpack_refs,
        answer=_answer_pulled,
        result=_result_of_pulled,
        streamed=True,
        reads=True,
    )
    apply_dense_gradients = Verb(
        Shard.apply_dense_gradients,
        pack=wire.pack_dense_update,
        unpack=wire.unpack_dense_update,
        returns="global_step",
        streamed=True,
    )
    assign_variables = Verb(Shard.assign_variables, pack=wire.pack_dense_update, unpack=wire.unpack_dense_update)
    global_step = Verb(Shard.global_step, renamed={"set_to": "set"}, returns="global_step", reads=True)

    create_queue = Verb(Shard.create_queue, returns="created")
    enqueue = Verb(Shard.enqueue)
    dequeue = Verb(Shard.dequeue, returns=Dequeued)
    acknowledge = Verb(Shard.acknowledge, returns="held")
    hold_leases = Verb(Shard.hold_leases, returns="leases")


VERBS: Mapping[str, Verb[..., Any]] = {each.name: each for each in vars(Verbs).values() if isinstance(each, Verb)}
"""By the name of the RPC."""

"""The table of verbs: it has what ps.proto and `Shard` have, and what one side packs the other unpacks."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from trilith.errors import InvalidRequestError
from trilith.rpc.remote import RemoteShard
from trilith.shard import ANY_WRITE, DensePart, Dequeued, EntryPage, IdPart, InProcess, Shard, UpdatePart, Write
from trilith.verbs import VERBS, Verbs
from trilith_proto import ps_pb2
from trilith_services.ps.process.shard import LocalShard

WRITE = Write(client_id=7, sequence=3, lowest_open=2, client_started=5, origin=1, incarnation=9)
IDS = np.array([1, 2**63], np.uint64)
ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
PART = IdPart("t", IDS)
UPDATE = {"parts": [UpdatePart("t", IDS, ROWS)], "write": WRITE}
DENSE = {"parts": [DensePart("w", 1, ROWS[0])], "write": WRITE}

# Per verb, arguments in order, what its method returns, and what arrives of that, if it is not the same.
CALLS = {
    "Describe": ({}, ps_pb2.DescribeResponse(shard_index=3)),
    "Stats": ({}, ps_pb2.StatsResponse(memory_bytes=3)),
    "CreateTables": ({"configs": [ps_pb2.TableConfig(name="t")], "write": WRITE}, None),
    "Save": ({"path": "there", "write": WRITE}, ps_pb2.SaveResponse(global_step=3)),
    "Restore": ({"path": "there", "write": WRITE}, ps_pb2.RestoreResponse(global_step=3)),
    "Shutdown": ({}, None),
    "ApplyGradients": (UPDATE, 9),
    "Assign": (UPDATE, None),
    "AssignAdd": (UPDATE, None),
    "Reinitialize": ({"part": PART, "write": WRITE}, np.array([1, 0], np.int8)),
    "Contains": ({"part": PART}, np.array([True, False])),
    "LookupEntries": ({"part": PART}, [b"one", b""]),
    "Erase": ({"part": PART, "write": WRITE}, 2),
    "DumpEntries": ({"table": "t", "part": 1, "parts": 2, "limit": 3, "offset": 4}, EntryPage([b"one"], 5)),
    "Evict": ({"tables": ["t"], "write": WRITE, "now": 5}, {"t": 2}),
    "Clear": ({"tables": ["t"], "write": WRITE}, {"t": 2}),
    "CreateVariables": (
        {"specs": [ps_pb2.VariableSpec(name="w", size=3)], "initial": [ROWS[0]], "write": WRITE},
        [True],
    ),
    "PullVariables": ({"refs": [("w", 1)]}, ([ROWS[0]], 8)),
    "ApplyDenseGradients": ({**DENSE, "learning_rate": 0.5}, 9),
    "AssignVariables": (DENSE, None),
    "GlobalStep": ({"advance": 2, "set_to": None, "write": WRITE}, 8),
    "CreateQueue": ({"name": "q", "elements": ["a"], "write": WRITE, "capacity": 4}, True),
    "Enqueue": ({"queue": "q", "elements": ["a"], "write": WRITE}, None),
    "Dequeue": (
        {"queues": ["q"], "worker": "w", "write": WRITE, "lease_s": 1.5, "claim": "a"},
        Dequeued("q", "a", 4, False),
    ),
    "Acknowledge": ({"worker": "w", "lease": 4, "write": WRITE, "queue": "q", "elements": ["b"]}, True),
    "HoldLeases": ({"worker": "w", "lease_s": 1.5, "write": WRITE}, 2),
}


def test_the_table_has_every_rpc_and_says_which_are_streamed() -> None:
    rpcs = {method.name for method in ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"].methods}
    assert rpcs == {*VERBS, *(f"{name}Stream" for name, verb in VERBS.items() if verb.streamed)}
    assert {*CALLS, "Lookup"} == set(VERBS)


def test_a_shard_has_the_verbs_and_what_shards_in_this_process_are_given() -> None:
    said = {name for name in vars(Shard) if not name.startswith("_")} - {"incarnation", "close"}
    assert said == {verb.method for verb in VERBS.values()} | {
        name for name in vars(InProcess) if not name.startswith("_")
    }


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_shard_in_this_process_takes_the_arguments_that_the_seam_names(verb) -> None:
    of_seam, of_store = (inspect.signature(getattr(kind, verb.method)).parameters for kind in (Shard, LocalShard))
    assert {name: each.default for name, each in of_seam.items()} == {
        name: each.default for name, each in of_store.items()
    }


@pytest.mark.parametrize("name", CALLS)
def test_what_one_side_packs_the_other_unpacks(name) -> None:
    verb, (arguments, returned) = VERBS[name], CALLS[name]
    positional = [value for each, value in arguments.items() if each in _positional(verb)]
    keywords = {each: value for each, value in arguments.items() if each not in _positional(verb)}
    unpacked = verb.unpack(verb.pack(*positional, **keywords))
    assert set(unpacked) == set(verb.parameters)
    for each, value in arguments.items():
        np.testing.assert_equal(_comparable(unpacked[each]), _comparable(value))
    incarnation, result = verb.result(verb.answer(77, returned, unpacked))
    assert incarnation in (77, 0)  # a reply that the method returns has its own
    np.testing.assert_equal(_comparable(result), _comparable(returned))


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if name != "Lookup"])
def test_what_is_no_message_is_refused_as_such(name) -> None:
    if not VERBS[name].request.DESCRIPTOR.fields:
        return
    with pytest.raises(InvalidRequestError, match="bytes are not a"):
        VERBS[name].unpack(b"\xff\xff\xff no message")


def test_read_from_a_class_a_verb_is_itself_and_from_an_object_a_method() -> None:
    made = []

    class Recording(RemoteShard):
        def __init__(self) -> None:
            """No connection."""

        def call(self, verb, /, *args, **kwargs):
            made.append((verb.name, args, kwargs))

    assert Verbs.enqueue is VERBS["Enqueue"]
    Recording().enqueue("q", ["a"], ANY_WRITE)
    Recording().global_step(advance=2)
    assert made == [("Enqueue", ("q", ["a"], ANY_WRITE), {}), ("GlobalStep", (), {"advance": 2})]


def _positional(verb):
    found = inspect.signature(getattr(Shard, verb.method)).parameters.values()
    return {each.name for each in found if each.kind is each.POSITIONAL_OR_KEYWORD}


def _comparable(value):
    """Lists for a message's own kind of them, and tuples for parts."""
    if isinstance(value, IdPart):
        return tuple(value)
    if isinstance(value, UpdatePart | DensePart):
        return [getattr(value, name) for name in value.__slots__]
    if (
        not isinstance(value, str | bytes | np.ndarray | tuple)
        and hasattr(value, "__len__")
        and not hasattr(value, "keys")
    ):
        return [_comparable(each) for each in value]
    return value

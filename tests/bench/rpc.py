"""One PS behind gRPC, through the public client: against a gRPC call that only moves the bytes, and against `take`.

Client, PS and identity server are three processes with the allocator tuned and the same gRPC settings. An identity call
sends as many bytes of ids and rows as the call it stands for, and gets as many back, and looks at none of them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.draws import Keys, Zipf
from tests.bench.harness import Benchmark, Context, Crew, Entry, Side, higher, interleave, lower
from tests.bench.identity import Identity, RawSocket, identity_server
from tests.bench.processes import EXPERIMENTS, parameter_servers

__all__ = ["BENCHMARKS"]

_DIM = 16
_TABLE = "bench"
_ID_BYTES = 8
_ROW_BYTES = 4 * _DIM
_FLIGHTS = 4
_TIMEOUT_S = 120.0  # the first table may have to wait for a compiler

Float32Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Cluster:
    """A filled table behind one PS, and what it holds.

    Attributes:
        client: Of the PS.
        keys: Ids by row number.
        array: W, float32[rows, 16]: what each row was set to.
    """

    client: Any
    keys: Keys
    array: Float32Array

    def lookup(self, ids: Any) -> Float32Array:
        """Through the client, the same way a trainer does."""
        rows: Float32Array = self.client.lookup({_TABLE: ids})[_TABLE]
        return rows

    def check(self, rows: Rows) -> None:
        """The PS must answer with what it was given."""
        np.testing.assert_array_equal(self.lookup(self.keys.ids[rows]), self.array[rows])


@contextmanager
def _cluster(context: Context) -> Iterator[_Cluster]:
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)  # read when grpc is imported, below
    import trilith
    from trilith.tables import Adagrad, Zeros

    rows = context.sizes.rpc_rows
    keys = Keys(rows)
    array = np.random.default_rng(7).random((rows, _DIM), np.float32)  # before the allocator is tuned: plain memory
    context.progress("starting a PS", 0, 1)
    with parameter_servers(1) as (address, _), trilith.connect(address, timeout_s=_TIMEOUT_S) as client:
        client.table(_TABLE, dim=_DIM, optimizer=Adagrad(), initializer=Zeros(), initial_capacity=rows)
        for start in range(0, rows, context.sizes.batch):
            context.progress("filling the table", start, rows)
            part = slice(start, start + context.sizes.batch)
            client.assign({_TABLE: (keys.ids[part], array[part])})
        cluster = _Cluster(client, keys, array)
        cluster.check(keys.uniform(1000)[0])
        yield cluster


@contextmanager
def _identity(sent: int, received: int) -> Iterator[tuple[Callable[[], object], RawSocket]]:
    """The reference call of these sizes, over gRPC and over TCP."""
    with identity_server() as (grpc_port, tcp_port):
        identity = Identity(grpc_port)
        request = identity.request(sent, received)
        if len(identity.call(request)) != received:
            raise AssertionError("the identity server answers wrongly")
        raw = RawSocket(tcp_port, sent, received)
        yield partial(identity.call, request), raw
        raw.close()
        identity.close()


def lookup(context: Context) -> list[Entry]:
    """Distinct ids, one call at a time."""
    sizes = context.sizes
    batch = min(sizes.batch, sizes.rpc_rows)
    with _cluster(context) as cluster, _identity(_ID_BYTES * batch, _ROW_BYTES * batch) as (identity, raw):

        def candidate() -> Callable[[], object]:
            return partial(cluster.lookup, cluster.keys.distinct(batch)[1])

        sides: tuple[Side, ...] = (lambda: identity, candidate, lambda: raw.call)
        seconds = interleave(context, "identity, lookup and socket in turn", sizes.rpc_calls, *sides)
        cluster.check(cluster.keys.distinct(batch)[0])
    rates = [batch / float(np.median(each)) for each in seconds]
    return [
        higher("rpc.lookup.d16", rates[1], rates[0], "ids/s", 0.45),
        higher("rpc.lookup.d16.socket", rates[1], rates[2], "ids/s", None),
    ]


def lookup_in_flight(context: Context) -> list[Entry]:
    """Distinct ids, four threads that call all the time."""
    sizes = context.sizes
    batch = min(sizes.batch, sizes.rpc_rows)
    calls = sizes.flight_calls
    seconds: tuple[list[float], list[float]] = ([], [])
    with (
        _cluster(context) as cluster,
        _identity(_ID_BYTES * batch, _ROW_BYTES * batch) as (identity, _),
        Crew(_FLIGHTS) as crew,
    ):

        def reference() -> Callable[[], object]:
            return lambda: [identity() for _ in range(calls)]

        def candidate() -> Callable[[], object]:
            batches = [cluster.keys.distinct(batch)[1] for _ in range(calls)]
            return lambda: [cluster.lookup(ids) for ids in batches]

        for round_ in range(-2, sizes.flights):
            context.progress("identity and lookup in turn, four in flight", max(round_, 0), sizes.flights)
            for side, kept in zip((reference, candidate), seconds, strict=True):
                passed = crew.run(*(side() for _ in range(_FLIGHTS)))
                if round_ >= 0:
                    kept.append(passed)
    ids = batch * calls * _FLIGHTS
    rates = [ids / float(np.median(each)) for each in seconds]
    return [higher("rpc.lookup.d16.x4", rates[1], rates[0], "ids/s", 0.5)]


def apply(context: Context) -> list[Entry]:
    """An adagrad step on distinct ids, acknowledged."""
    sizes = context.sizes
    batch = min(sizes.batch, sizes.rpc_rows)
    grads = np.random.default_rng(8).normal(size=(batch, _DIM)).astype(np.float32)
    with _cluster(context) as cluster, _identity((_ID_BYTES + _ROW_BYTES) * batch, 16) as (identity, _):

        def candidate() -> Callable[[], object]:
            return partial(cluster.client.apply_gradients, {_TABLE: (cluster.keys.distinct(batch)[1], grads)})

        seconds = interleave(context, "identity and step in turn", sizes.rpc_calls, lambda: identity, candidate)
    rates = [batch / float(np.median(each)) for each in seconds]
    return [higher("rpc.apply.d16", rates[1], rates[0], "ids/s", 0.36)]


def small(context: Context) -> list[Entry]:
    """A few ids, against an empty call: what the client and the PS add to gRPC's own latency."""
    sizes = context.sizes
    with _cluster(context) as cluster, identity_server() as (port, _):
        identity = Identity(port)

        def candidate() -> Callable[[], object]:
            return partial(cluster.lookup, cluster.keys.few(sizes.small_ids)[1])

        seconds = interleave(
            context, "empty call and lookup in turn", sizes.small_calls, lambda: partial(identity.call, b""), candidate
        )
        identity.close()
    micros = [1e6 * float(np.median(each)) for each in seconds]
    return [lower("rpc.lookup.small", micros[1], micros[0], "us a call", 1.25)]


def _paired(draw: Callable[[], Rows], *sides: Callable[[Rows], Callable[[], object]]) -> list[Side]:
    """Sides that all see the same fresh batches."""
    waiting: list[deque[Rows]] = [deque() for _ in sides]

    def make(number: int) -> Side:
        def side() -> Callable[[], object]:
            if not waiting[number]:
                rows = draw()
                for queue in waiting:
                    queue.append(rows)
            return sides[number](waiting[number].popleft())

        return side

    return [make(number) for number in range(len(sides))]


def against_take(context: Context) -> list[Entry]:
    """One client, one PS, no other call: Zipf and distinct ids, read, and read then stepped; against take of the same.

    The reference knows its rows by number and has them in its own memory; the ratio is the price of a server.
    """
    sizes = context.sizes
    batch = min(sizes.batch, sizes.rpc_rows)
    zipf = Zipf(sizes.rpc_rows, sizes.zipf_exponent)
    out = np.empty((batch, _DIM), np.float32)
    grads = np.random.default_rng(8).normal(size=(batch, _DIM)).astype(np.float32)
    entries = []
    with _cluster(context) as cluster:

        def take(rows: Rows) -> Callable[[], object]:
            return partial(np.take, cluster.array, rows, axis=0, out=out, mode="clip")

        def read(rows: Rows) -> Callable[[], object]:
            return partial(cluster.lookup, cluster.keys.ids[rows])

        def read_and_step(rows: Rows) -> Callable[[], object]:
            ids = cluster.keys.ids[rows]

            def work() -> None:
                cluster.lookup(ids)
                cluster.client.apply_gradients({_TABLE: (ids, grads)})

            return work

        cases: tuple[tuple[str, Callable[[], Rows], Callable[[Rows], Callable[[], object]], float], ...] = (
            ("rpc.lookup.zipf", lambda: zipf.draw(batch), read, 0.35),
            ("rpc.lookup.distinct", lambda: cluster.keys.distinct(batch)[0], read, 0.2),
            ("rpc.step.zipf", lambda: zipf.draw(batch), read_and_step, 0.14),
        )
        for name, draw, work, target in cases:
            seconds = interleave(context, f"take and {name} in turn", sizes.rpc_calls, *_paired(draw, take, work))
            rates = [batch / float(np.median(each)) for each in seconds]
            entries.append(higher(name, rates[1], rates[0], "ids/s", target))
            if work is read:
                cluster.check(draw())
    return entries


BENCHMARKS = (
    Benchmark(("rpc.lookup.d16", "rpc.lookup.d16.socket"), lookup),
    Benchmark(("rpc.lookup.d16.x4",), lookup_in_flight),
    Benchmark(("rpc.apply.d16",), apply),
    Benchmark(("rpc.lookup.small",), small),
    Benchmark(("rpc.lookup.zipf", "rpc.lookup.distinct", "rpc.step.zipf"), against_take),
)

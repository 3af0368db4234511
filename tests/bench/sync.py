"""Parameter sync: how late a serving replica is, and what it costs the training PS to keep it fresh.

PS, replica and trainer are processes of their own. Lag is the time from the acknowledgement of a step to the moment at
which a lookup at the replica first sees it: every step adds one to the row of an id that is looked up all the time.

Cost is what a PS with a target uses more processor time than one without, for the same writes, per million rows that
arrive. Its reference is the processor time of a process that passes as many bytes through identity calls, in messages
of the same size, and gets them back; a note says what sending alone takes. The other end's time is on neither side.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.draws import Keys
from tests.bench.harness import Benchmark, Context, Entry, lower
from tests.bench.identity import Identity, identity_server
from tests.bench.processes import EXPERIMENTS, Child, trilith_process

__all__ = ["BENCHMARKS"]

_DIM = 16
_TABLE = "bench"
_TIMEOUT_S = 120.0
_TOUCHED_PER_S = 200_000
_STEPS_PER_S = 20
_BUSY = 0.6  # of a core
_POLL_S = 0.004
_PATIENCE_S = 60.0
_MESSAGE_BYTES = 4 << 20

Ids = npt.NDArray[np.uint64]


class _Replica:
    """A serving replica, asked without the client's checks of a cluster."""

    def __init__(self, port: int) -> None:
        from trilith.config import ClientConfig
        from trilith.rpc.remote import RemoteShard

        self._shard = RemoteShard(lambda: f"127.0.0.1:{port}", ClientConfig(timeout_s=_TIMEOUT_S))

    def value(self, key: np.uint64) -> float:
        """First weight of a row."""
        from trilith.shard import IdPart

        return float(self._shard.lookup([IdPart(_TABLE, np.array([key]))])[0][0, 0])

    def wait_fresh(self, when: float) -> Any:
        """Its stats, once it has everything acknowledged before `when`."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            stats = self._shard.stats().replica
            if stats.as_of > when:
                return stats
            if time.monotonic() > deadline:
                raise AssertionError(f"the replica is {when - stats.as_of:.1f} s behind")
            time.sleep(0.02)

    def close(self) -> None:
        """Close the connection."""
        self._shard.close()


@contextmanager
def _training(*options: str) -> Iterator[tuple[Child, Any]]:
    """A training PS and a client of it."""
    os.environ.setdefault("GRPC_EXPERIMENTS", EXPERIMENTS)  # read when grpc is imported, below
    import trilith

    ps = trilith_process("ps", "--threads", "1", *options)
    try:
        port = ps.wait_for(message="serving")["port"]
        with trilith.connect(f"static://127.0.0.1:{port}", timeout_s=_TIMEOUT_S) as client:
            yield ps, client
    finally:
        ps.stop()


@contextmanager
def _replica_process() -> Iterator[tuple[Child, int]]:
    """A serving replica and its port; it serves when it has been filled."""
    replica = trilith_process("serving", "ps", "--threads", "1")
    try:
        yield replica, replica.wait_for(message="listening")["port"]
    finally:
        replica.stop()


def _fill(context: Context, client: Any, ids: Ids, initial: Any) -> None:
    from trilith.tables import Sgd

    client.table(_TABLE, dim=_DIM, optimizer=Sgd(learning_rate=1.0), initializer=initial, initial_capacity=len(ids))
    for start in range(0, len(ids), 65_536):
        context.progress("filling the table", start, len(ids))
        part = ids[start : start + 65_536]
        client.assign({_TABLE: (part, np.zeros((len(part), _DIM), np.float32))})


class _Watch:
    """Looks one row of the replica up again and again, and notes when its value changed."""

    def __init__(self, replica: _Replica, key: np.uint64) -> None:
        self._replica, self._key = replica, key
        self._stop = threading.Event()
        self.seen: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = 0.0
        while not self._stop.wait(_POLL_S):
            value = self._replica.value(self._key)
            if value != last:
                last = value
                self.seen.append((time.perf_counter(), value))

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()


def lag(context: Context) -> list[Entry]:
    """Steps at a steady pace, and when each one is seen at the replica."""
    from trilith.tables import Zeros

    sizes = context.sizes
    keys = Keys(sizes.sync_rows)
    rng = np.random.default_rng(3)
    order = rng.permutation(len(keys.ids) - 1) + 1  # id 0 of the keys is the one that is watched
    batch = min(_TOUCHED_PER_S // _STEPS_PER_S, len(order))
    grads = rng.normal(size=(batch + 1, _DIM)).astype(np.float32)
    grads[0] = -1.0
    with (
        _replica_process() as (_, port),
        _training("--sync-to", f"bench=127.0.0.1:{port}", "--sync-every", "0.5") as (_, client),
    ):
        _fill(context, client, keys.ids, Zeros())
        replica = _Replica(port)
        replica.wait_fresh(time.time())
        watch = _Watch(replica, keys.ids[0])
        acknowledged = []
        steps = round(sizes.sync_seconds * _STEPS_PER_S)
        started, burnt = time.perf_counter(), time.process_time()
        at = 0
        for step in range(steps):
            context.progress("steps at a steady pace", step, steps)
            rows = order[np.arange(at, at + batch) % len(order)]
            at += batch
            ids = np.concatenate([keys.ids[:1], keys.ids[rows]])
            client.lookup({_TABLE: ids})
            client.apply_gradients({_TABLE: (ids, grads)})
            acknowledged.append(time.perf_counter())
            due = (step + 1) / _STEPS_PER_S
            while time.process_time() - burnt < _BUSY * due and time.perf_counter() - started < due:
                grads[1:].sum()  # what a model would do meanwhile
            time.sleep(max(0.0, started + due - time.perf_counter()))
        pace = batch * steps / (time.perf_counter() - started)
        replica.wait_fresh(time.time())
        time.sleep(20 * _POLL_S)
        watch.stop()
        replica.close()
    when = np.array([each[0] for each in watch.seen])
    value = np.array([each[1] for each in watch.seen])
    if not len(value) or value[-1] != steps or (np.diff(value) < 0).any():
        raise AssertionError(f"the replica ended at step {value[-1:]} instead of {steps}")
    lags = when[np.searchsorted(value, np.arange(1, steps + 1))] - np.array(acknowledged)
    context.note(f"sync.lag: {pace:,.0f} distinct ids a second were touched")
    p50, p99 = np.percentile(lags, [50, 99])
    return [lower("sync.lag.p50", float(p50), 1.0, "s", 1.0), lower("sync.lag.p99", float(p99), 2.0, "s", 1.0)]


def cost(context: Context) -> list[Entry]:
    """Processor time of a PS with a target and of one without, and of identity calls."""
    from trilith.tables import Zeros

    sizes = context.sizes
    keys = Keys(sizes.sync_rows)
    values = np.random.default_rng(8).normal(size=(65_536, _DIM)).astype(np.float32)
    spent: dict[str, list[float]] = {"synced": [], "alone": [], "identity": [], "sending": []}

    def write(client: Any) -> None:
        for start in range(0, len(keys.ids), len(values)):
            part = keys.ids[start : start + len(values)]
            client.assign({_TABLE: (part, values[: len(part)])})

    with (
        _replica_process() as (_, port),
        _training("--sync-to", f"bench=127.0.0.1:{port}", "--sync-every", "0.5") as (synced, with_target),
        _training() as (alone, without),
        identity_server() as (grpc_port, _),
    ):
        for client in (with_target, without):
            _fill(context, client, keys.ids, Zeros())
        replica = _Replica(port)
        before = replica.wait_fresh(time.time())
        identity = Identity(grpc_port)
        for round_ in range(-1, sizes.sync_rounds):
            context.progress("with a target, without, identity in turn", max(round_, 0), sizes.sync_rounds)
            sent = with_target.stats()[0].sync_targets[0].bytes
            cpu = synced.cpu_s()
            write(with_target)
            after = replica.wait_fresh(time.time())
            used = {"synced": synced.cpu_s() - cpu}
            sent = with_target.stats()[0].sync_targets[0].bytes - sent
            million = (after.rows - before.rows) / 1e6
            if million < len(keys.ids) / 1e6:
                raise AssertionError(f"{million} million rows arrived")
            before = after
            cpu = alone.cpu_s()
            write(without)
            used["alone"] = alone.cpu_s() - cpu
            for name, back in (("identity", _MESSAGE_BYTES), ("sending", 16)):
                request = identity.request(_MESSAGE_BYTES, back)
                cpu = time.process_time()
                for _ in range(round(sent / _MESSAGE_BYTES)):
                    identity.call(request)
                used[name] = time.process_time() - cpu
            if round_ >= 0:
                for name, seconds in used.items():
                    spent[name].append(seconds / million)
        identity.close()
        replica.close()
    medians = {name: float(np.median(each)) for name, each in spent.items()}
    synced_s, alone_s, identity_s = (medians[name] for name in ("synced", "alone", "identity"))
    sending = (synced_s - alone_s) / medians["sending"]
    context.note(f"sync.cost: {sending:.2f} times what sending the bytes without an echo takes")
    return [lower("sync.cost", synced_s - alone_s, identity_s, "CPU-s per million rows", 3.0)]


BENCHMARKS = (Benchmark(("sync.lag.p50", "sync.lag.p99"), lag), Benchmark(("sync.cost",), cost))

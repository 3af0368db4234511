"""From an address to a Client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from trilith.config import ClientConfig, OnRestart, prepare_grpc
from trilith.errors import InvalidRequestError
from trilith.runtime.registered import registered

if TYPE_CHECKING:
    from trilith.client import Client
    from trilith.discovery.members import Members
    from trilith.rpc.remote import RemoteShard
    from trilith.shard import Shard

__all__ = ["connect", "open_part"]


def connect(
    address: str,
    *,
    num_ps: int | None = None,
    timeout_s: float = 30.0,
    create_timeout_s: float = 180.0,
    float16: bool = False,
    max_message_bytes: int | None = None,
    chunk_bytes: int | None = None,
    retry_first_s: float | None = None,
    retry_max_s: float | None = None,
    keepalive_s: float | None = None,
    on_restart: OnRestart = "raise",
    tune_allocator: bool | None = None,
    model_name: str = "",
    threads: int | None = None,
    memory_limit_bytes: int | None = None,
) -> Client:
    """Open a cluster, checking that every PS is who the address says it is.

    The first call of a process sets gRPC's variables (see `trilith.config`) unless they are set or gRPC is in use.

    Args:
        address: "static://host:port,host:port" for PS processes, shard 0 first; "local://" for one in this process;
            "zk://host:2181/path", "hosts:///directory", "tf-config://" or "mlp://" for a directory where they are
            found, and followed when they move (see `trilith.discovery.urls`).
        num_ps: How many PS the cluster has, if known; a cluster of another number is refused. ZooKeeper knows.
        timeout_s: Deadline of a call, retries included; what is in this process answers without one.
        create_timeout_s: Deadline of creating a table, for which a PS may have to compile kernels.
        float16: Rows and gradients travel as float16.
        max_message_bytes: Largest message sent or accepted, 256 MiB if None; larger batches travel as several.
        chunk_bytes: Cut batches into messages of at most this many bytes of arrays; None: as large as messages may be.
        retry_first_s: Pause before the first retry, 0.05 if None; doubles from then on, with jitter.
        retry_max_s: Longest pause between retries, 1 if None.
        keepalive_s: How often a silent connection is probed, 10 if None.
        on_restart: What a read does that meets a PS which restarted: "raise" ShardRestartedError, or "accept" what it
            has now, for clients that only read. Writes raise it until `Client.rejoin` either way.
        tune_allocator: Keep glibc in this process from returning large buffers to the kernel after every call, which
            more than doubles throughput and holds on to freed memory; None does.
        model_name: What this client's lookups are timed under; see `trilith.runtime.timers`.
        threads: Of the engine; None: as many as this process may use.
        memory_limit_bytes: The engine's hard limit; None or 0 is none.

    `threads` and `memory_limit_bytes` are for "local://" only; what says how messages travel (`float16`,
    `max_message_bytes`, `chunk_bytes`, `retry_first_s`, `retry_max_s`, `keepalive_s`, `tune_allocator`) is not for it.

    Raises:
        ClusterMismatchError: The list is in the wrong order, or not of the right length; or the cluster's record in
            ZooKeeper says something else.
        UnavailableError: A PS, or the directory, cannot be reached within the deadline.
        InvalidRequestError: An option does not apply to this kind of cluster, or no engine is installed for local://.
    """
    if not isinstance(address, str):
        raise InvalidRequestError(f"address {address!r} is a {type(address).__name__}, it must be a str")
    prepare_grpc()
    # Heavy imports wait until somebody connects: `import trilith` is light.
    from trilith.client import Client
    from trilith.cluster import Cluster

    travel = {
        "max_message_bytes": max_message_bytes,
        "chunk_bytes": chunk_bytes,
        "retry_first_s": retry_first_s,
        "retry_max_s": retry_max_s,
        "keepalive_s": keepalive_s,
    }
    given: dict[str, Any] = {name: value for name, value in travel.items() if value is not None}
    config = ClientConfig(
        timeout_s=timeout_s,
        create_timeout_s=create_timeout_s,
        float16=float16,
        on_restart=on_restart,
        model_name=model_name,
        **given,
    )
    if address.startswith("local://"):
        if address != "local://":
            raise InvalidRequestError(f"{address!r}: local:// takes nothing after it")
        if num_ps not in (None, 1):
            raise InvalidRequestError(f"num_ps={num_ps}: local:// is one shard")
        given |= {"float16": True} if float16 else {}
        given |= {} if tune_allocator is None else {"tune_allocator": tune_allocator}
        for name, value in given.items():
            raise InvalidRequestError(f"{name}={value}: local:// is in this process, where nothing travels")
        return Client(Cluster([_engine()(threads=threads, memory_limit_bytes=memory_limit_bytes or 0)], config))
    for name, value in (("threads", threads), ("memory_limit_bytes", memory_limit_bytes)):
        if value is not None:
            flag = "--threads" if name == "threads" else "--memory-limit"
            raise InvalidRequestError(f"{name}={value} is for local:// only; a PS takes {flag} when it is started")
    return _connect_remote(address, config, num_ps, tune_allocator is not False)


def _connect_remote(address: str, config: ClientConfig, num_ps: int | None, tune_allocator: bool) -> Client:
    """Open a cluster of processes; what a pickled client is made of again, wherever it is unpickled."""
    from trilith.discovery.members import Members
    from trilith.discovery.urls import open_directory
    from trilith.ops import memory

    prepare_grpc()
    if tune_allocator:
        memory.tune_allocator()
    started = time.monotonic()
    timeout_s = config.timeout_s
    members = Members(lambda: open_directory(address, timeout_s=timeout_s))
    try:
        client = _open(members, config, num_ps, max(timeout_s - (time.monotonic() - started), 0.1))
    except BaseException:
        members.close()
        raise
    client.opened_by = (_connect_remote, (address, config, num_ps, tune_allocator))
    return client


def open_part(
    index: int, count: int, *, threads: int | None = None, memory_limit_bytes: int = 0
) -> tuple[Client, Shard]:
    """Make one shard of a cluster in this process: a client that talks to it alone, and the shard.

    Args:
        index: Which shard.
        count: Of how many.
        threads: Of the engine; None: one per core.
        memory_limit_bytes: The engine's hard limit; 0 is none.
    """
    prepare_grpc()
    from trilith.client import Client
    from trilith.cluster import Cluster

    shard = _engine()(index=index, count=count, threads=threads, memory_limit_bytes=memory_limit_bytes)
    return Client(Cluster([shard], ClientConfig(), part=(index, count))), shard


@cache
def _engine() -> Callable[..., Shard]:
    """What makes a shard in this process, as the services register it: `trilith.connect` does not import them."""
    make: Callable[..., Shard] = registered("local", "no engine", "local:// needs")
    return make


def _open(members: Members, config: ClientConfig, num_ps: int | None, timeout_s: float) -> Client:
    from trilith.client import Client
    from trilith.cluster import Cluster
    from trilith.discovery.members import count_ps, wait_for_ps
    from trilith.rpc.remote import RemoteShard

    deadline = time.monotonic() + timeout_s
    directory = members.directory
    count = count_ps(directory, num_ps=num_ps, timeout_s=timeout_s)
    wait_for_ps(directory, count, timeout_s=max(deadline - time.monotonic(), 0.1))
    shards = [RemoteShard(partial(members.resolve, index), config, index=index) for index in range(count)]
    try:
        cluster = Cluster(shards, config)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    # A call that hangs at an address where the PS no longer is would otherwise do so until its deadline.
    members.follow(partial(_follow, shards))
    return Client(cluster, members=members)


def _follow(shards: list[RemoteShard], members: Mapping[int, str]) -> None:
    for index, shard in enumerate(shards):
        if index in members:
            shard.follow()

"""From an address to a Client."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from trilith.config import MAX_MESSAGE_BYTES, ClientConfig, prefer_fast_grpc
from trilith.errors import ClusterMismatchError, InvalidRequestError

if TYPE_CHECKING:
    from trilith.client import Client
    from trilith.discovery import Directory

__all__ = ["connect"]


def connect(
    address: str,
    *,
    timeout_s: float = 30.0,
    create_timeout_s: float = 180.0,
    float16: bool = False,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    chunk_bytes: int | None = None,
    tune_allocator: bool = True,
    threads: int | None = None,
    memory_limit_bytes: int = 0,
) -> Client:
    """Open a cluster, checking that every PS is who the address says it is.

    The first call of a process sets GRPC_EXPERIMENTS (see `trilith.config`) unless it is set or gRPC is in use already.

    Args:
        address: "static://host:port,host:port" for PS processes, shard 0 first; "local://" for one in this process.
        timeout_s: Deadline of a call, retries included.
        create_timeout_s: Deadline of creating a table, for which a PS may have to compile kernels.
        float16: Rows and gradients travel as float16.
        max_message_bytes: Largest message sent or accepted; larger batches travel as several.
        chunk_bytes: Cut batches into messages of at most this many bytes of arrays; None: as large as messages may be.
        tune_allocator: Keep glibc in this process from returning large buffers to the kernel after every call, which
            more than doubles throughput and holds on to freed memory. For remote clusters only.
        threads: "local://" only: threads of the engine; None: one per core.
        memory_limit_bytes: "local://" only: the engine's hard limit; 0 is none.

    Raises:
        ClusterMismatchError: The list is in the wrong order, or not of the right length.
        UnavailableError: A PS cannot be reached within the deadline.
    """
    prefer_fast_grpc()
    # Heavy imports wait until somebody connects: `import trilith` is light.
    from trilith.client import Client
    from trilith.cluster import Cluster

    config = ClientConfig(
        timeout_s=timeout_s,
        create_timeout_s=create_timeout_s,
        float16=float16,
        max_message_bytes=max_message_bytes,
        chunk_bytes=chunk_bytes,
    )
    scheme, separator, rest = address.partition("://")
    if not separator:
        raise InvalidRequestError(f"{address!r} is no cluster address; write static://host:port,… or local://")
    if scheme == "local":
        if rest:
            raise InvalidRequestError(f"{address!r}: local:// takes nothing after it")
        from trilith_services.ps.store import Store

        return Client(Cluster([Store(threads=threads, memory_limit_bytes=memory_limit_bytes)], config))
    if scheme != "static":
        raise InvalidRequestError(f"{address!r}: unknown scheme {scheme!r}; there are static:// and local://")
    from trilith.discovery.static import StaticDirectory
    from trilith.ops import memory

    if tune_allocator:
        memory.tune_allocator()
    return _open(StaticDirectory.parse(rest), config)


def _open(directory: Directory, config: ClientConfig) -> Client:
    from trilith.client import Client
    from trilith.cluster import Cluster
    from trilith.discovery import PS
    from trilith.remote import RemoteShard

    found = directory.query(PS)
    if sorted(found) != list(range(len(found))):
        raise ClusterMismatchError(f"the directory lists PS {sorted(found)}, which is not 0 up to their number")

    shards = [RemoteShard(partial(_address, directory, index), config, index=index) for index in range(len(found))]
    try:
        cluster = Cluster(shards, config)
    except BaseException:
        for shard in shards:
            shard.close()
        directory.close()
        raise
    return Client(cluster, on_close=directory.close)


def _address(directory: Directory, index: int) -> str:
    from trilith.discovery import PS
    from trilith.errors import UnavailableError

    found = directory.query(PS).get(index)
    if found is None:
        raise UnavailableError(f"no PS {index} in the directory at the moment")
    return found

"""Clusters inside the test process: embedded, or PS with real gRPC servers on free ports."""

from __future__ import annotations

import trilith
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith_services.grpc.serve import Limits
from trilith_services.local.supervisor import free_ports
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard

SHAPES = {"embedded": 0, "1-ps": 1, "3-ps": 3}


class LocalCluster:
    """A cluster of one of `SHAPES`; `connect` gives clients of it.

    Args:
        shape: Key of SHAPES.
        wrap: Puts something in front of each shard.
        limits: Of the servers.
        **store_options: For every shard.
    """

    def __init__(self, shape, *, wrap=lambda store: store, limits=None, **store_options):
        self.shape = shape
        self._count = max(1, SHAPES[shape])
        self._wrap = wrap
        self._options = PsOptions(limits=limits or Limits(), checkpoint_anywhere=True)
        self._store_options = store_options
        self.stores = [self._store(i) for i in range(self._count)]
        self.servers = []
        self.ports = []
        if self.remote:
            self.ports = free_ports(self._count)  # which stay theirs while one is down
            for store, port in zip(self.stores, self.ports, strict=True):
                self.servers.append(ParameterServer(wrap(store), self._options))
                self.servers[-1].start(f"127.0.0.1:{port}")

    @property
    def remote(self):
        return SHAPES[self.shape] > 0

    @property
    def address(self):
        return "static://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def _store(self, index, **options):
        return LocalShard(index=index, count=self._count, threads=2, **self._store_options | options)

    def connect(self, **options):
        if self.remote:
            return trilith.connect(self.address, **options)
        return Client(Cluster([self._wrap(self.stores[0])], ClientConfig(**options)))

    def kill(self, index):
        """End a PS without ceremony."""
        self.servers[index].stop(0.0)

    def restart(self, index, prepare=lambda store: None):
        """Start an empty PS where one was killed; `prepare` may fill its store."""
        self.stores[index] = self._store(index)
        prepare(self.stores[index])
        self.servers[index] = ParameterServer(self._wrap(self.stores[index]), self._options)
        self.servers[index].start(f"127.0.0.1:{self.ports[index]}")

    def close(self):
        for server in self.servers:
            server.stop(0.0)
        for store in self.stores:
            store.close()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.close()

"""The worker process: connects, joins the other workers if training is synchronous, trains, and stops on SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from prometheus_client import start_http_server
from torch import distributed

from trilith.client import Client
from trilith.connect import connect
from trilith.discovery.zk_url import redact
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.nn import pick_device
from trilith.peers import PeerClient, connect_peers
from trilith.runtime.machine import cores
from trilith.runtime.waiting import Wait
from trilith_services.demo.clicks import Parts
from trilith_services.demo.datasets import load_dataset, training_files
from trilith_services.grpc.listening import LOOPBACK, warn_if_exposed
from trilith_services.worker.events import Emit, EventLog
from trilith_services.worker.trainer import Trainer, WorkerConfig

__all__ = ["Follower", "WorkerOptions", "backends", "run_worker", "use_threads"]

log = logging.getLogger(__name__)

Follower = Callable[[Parts], AbstractContextManager[Emit]]
"""Given the data, opens what is told of a worker's events and closed at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Where a worker process finds what it needs.

    Attributes:
        cluster: Address of the cluster, as `trilith.connect` takes it; empty: the workers hold the rows themselves and
            exchange them, each step together.
        data: Name of the data, as `load_dataset` takes it.
        events: File that events are appended to; empty for none.
        master: host:port where rank 0 meets the others, for all-reduce.
        threads: torch threads; 0 shares the cores among the workers.
        timeout_s: How long a call waits for a PS that is away.
        model_name: What lookups are timed under.
        update_queue: Without PS: updates that may wait at their owner after they have travelled.
        metrics_port: Port where this process's timers are served for Prometheus; None: nowhere, 0: any free one.
        metrics_host: Where that port is.
    """

    cluster: str = field(default="", repr=False)  # it may hold credentials
    data: str = "movielens"
    events: str = ""
    master: str = ""
    threads: int = 0
    timeout_s: float = 120.0
    model_name: str = ""
    update_queue: int = 0
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK


def run_worker(options: WorkerOptions, config: WorkerConfig, *, follower: Follower | None = None) -> int:
    """Train; returns the exit status, 0 also when SIGTERM or SIGINT ended it early.

    Args:
        options: Where things are.
        config: What to do.
        follower: Is told of events too.

    Raises:
        TrilithError: The cluster, the data or the options are not usable.
    """
    if not options.cluster and config.dense != "allreduce":
        raise InvalidRequestError("workers without PS take every step together: dense parameters are all-reduced")
    if options.cluster and (config.lookup_queue or options.update_queue):
        raise InvalidRequestError("the queues of an exchange are for workers that hold the rows, which have no cluster")
    if not options.cluster and config.state_file:
        raise InvalidRequestError("workers without PS go on from their checkpoint; a position of one rank is of no use")
    if config.dense == "allreduce" and not options.master:
        raise InvalidRequestError("training together needs to know where rank 0 is: give --master host:port")
    use_threads(options.threads or max(1, cores() // config.world_size))
    finished = False
    with _stop_on_signal() as stop, _events(options.events) as write, _metrics(options):
        parts = load_dataset(options.data, report=log.info)
        samples = training_files(parts)
        with (follower or _nobody)(parts) as tell, _group(options, config), _client(options, config) as client:

            def emit(event: dict[str, Any]) -> None:
                write(event)
                tell(event)

            trainer = Trainer(config, client, parts, emit, samples=samples)
            stop.begin()
            finished = trainer.run(stop.is_set)
    log.info("done" if finished else "stopped before the end, as asked")
    return 0


def use_threads(count: int) -> None:
    """How many threads torch computes with in this process."""
    torch.set_num_threads(count)


class _Stop:
    """What SIGTERM and SIGINT do: they end training after its step, and the waiting that comes before at once."""

    def __init__(self) -> None:
        self._begun = False
        self._asked = False

    def begin(self) -> None:
        """Training is about to begin; it asks `is_set`."""
        self._begun = True

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._asked

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._begun:
            raise KeyboardInterrupt


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """What to ask whether SIGTERM or SIGINT have come; leaves quietly where one has ended the waiting."""
    stop = _Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    except KeyboardInterrupt:
        if not stop.is_set():
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nobody(parts: Parts) -> AbstractContextManager[Emit]:
    del parts
    return nullcontext(lambda event: None)


@contextmanager
def _events(path: str) -> Iterator[EventLog]:
    events = EventLog(path or os.devnull)
    try:
        yield events
    finally:
        events.close()


@contextmanager
def _metrics(options: WorkerOptions) -> Iterator[None]:
    """Serves the timers of this process, the client's lookups among them."""
    host, port = options.metrics_host, options.metrics_port
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, host)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    warn_if_exposed("metrics", host, server.server_port)
    log.info("metrics", extra={"port": server.server_port})
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _client(options: WorkerOptions, config: WorkerConfig) -> Client | PeerClient:
    """The cluster, or what the workers are one themselves with, as far as their last checkpoint goes."""
    if options.cluster:
        log.info("looking for the cluster", extra={"cluster": redact(options.cluster), "timeout_s": options.timeout_s})
        return connect(options.cluster, timeout_s=options.timeout_s, model_name=options.model_name)
    peers = connect_peers(pick_device(config.device).type, threads=1, update_queue=options.update_queue)
    restored = peers.restore_newest(config.model_dir) if config.model_dir else ""
    if restored:
        log.info("restored", extra={"path": restored, "step": peers.global_step()})
    return peers


def backends(device: str) -> str:
    """What a process group needs for tensors of the CPU and of a device."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


@contextmanager
def _group(options: WorkerOptions, config: WorkerConfig) -> Iterator[None]:
    """The process group of synchronous training."""
    if config.dense != "allreduce":
        yield
        return
    timeout_s = max(options.timeout_s, 60.0)
    with Wait(f"all {config.world_size} workers to meet at {options.master}", most=timeout_s):
        distributed.init_process_group(
            backends(pick_device(config.device).type),
            init_method=f"tcp://{options.master}",
            rank=config.rank,
            world_size=config.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    try:
        yield
    finally:
        distributed.destroy_process_group()

"""The worker process: connects, joins the other workers if training is synchronous, trains, and stops on SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from prometheus_client import REGISTRY
from torch import distributed

from trilith.connect import connect
from trilith.discovery.zk_url import redact
from trilith.nn import pick_device
from trilith.peers import connect_peers
from trilith.rows import Rows
from trilith.runtime.machine import cores
from trilith.runtime.waiting import Wait
from trilith_services.http.metrics import MetricsServer
from trilith_services.worker.config import Mode, WorkerConfig
from trilith_services.worker.events import Emit, EventLog
from trilith_services.worker.task import Task
from trilith_services.worker.trainer import Trainer

__all__ = ["Follower", "backends", "run_worker", "use_threads"]

log = logging.getLogger(__name__)

Follower = Callable[[Task], AbstractContextManager[Emit]]
"""Given the task, opens what is told of a worker's events and closed at the end."""


def run_worker(config: WorkerConfig, load: Callable[[], Task], *, follower: Follower | None = None) -> int:
    """Train; returns the exit status, 0 also when SIGTERM or SIGINT ended it early.

    Args:
        config: What to do, and where things are.
        load: Gives what to train; it may take its time.
        follower: Is told of events too.

    Raises:
        TrilithError: The cluster, the data or the options are not usable.
    """
    config.check_places()
    use_threads(config.threads or max(1, cores() // config.world_size))
    finished = False
    with _stop_on_signal() as stop, _events(config.events) as write, _metrics(config):
        task = load()
        with (follower or _nobody)(task) as tell, _group(config), _client(config, task.name) as client:

            def emit(event: dict[str, Any]) -> None:
                write(event)
                tell(event)

            trainer = Trainer(config, client, task, emit)
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


def _nobody(task: Task) -> AbstractContextManager[Emit]:
    del task
    return nullcontext(lambda event: None)


@contextmanager
def _events(path: str) -> Iterator[EventLog]:
    events = EventLog(path or os.devnull)
    try:
        yield events
    finally:
        events.close()


@contextmanager
def _metrics(config: WorkerConfig) -> Iterator[None]:
    """Serves the timers of this process, the client's lookups among them."""
    host, port = config.metrics_host, config.metrics_port
    if port is None:
        yield
        return
    server = MetricsServer(REGISTRY, host, port, ready=lambda: True)
    try:
        yield
    finally:
        server.stop()


def _client(config: WorkerConfig, model_name: str) -> Rows:
    """The cluster, or what the workers are one themselves with, as far as their last checkpoint goes."""
    if config.mode == Mode.ps:
        log.info("looking for the cluster", extra={"cluster": redact(config.cluster), "timeout_s": config.timeout_s})
        return connect(config.cluster, timeout_s=config.timeout_s, model_name=model_name)
    peers = connect_peers(pick_device(config.device).type, threads=1, update_queue=config.update_queue)
    restored = peers.restore_newest(config.model_dir) if config.model_dir else ""
    if restored:
        log.info("restored", extra={"path": restored, "step": peers.global_step()})
    return peers


def backends(device: str) -> str:
    """What a process group needs for tensors of the CPU and of a device."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


@contextmanager
def _group(config: WorkerConfig) -> Iterator[None]:
    """The process group of synchronous training."""
    if not config.synchronous:
        yield
        return
    timeout_s = max(config.timeout_s, 60.0)
    with Wait(f"all {config.world_size} workers to meet at {config.master}", most=timeout_s):
        distributed.init_process_group(
            backends(pick_device(config.device).type),
            init_method=f"tcp://{config.master}",
            rank=config.rank,
            world_size=config.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    try:
        yield
    finally:
        distributed.destroy_process_group()

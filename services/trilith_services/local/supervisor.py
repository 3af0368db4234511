"""Local processes of one run: prefixed logs, restarts for what dies, and a clean end.

with Supervisor(console, log_dir) as supervisor, StopRequest() as stop:
    cluster = PsCluster(supervisor, count=2, checkpoint_dir="ckpt")
    cluster.start(cancelled=lambda: stop)
    supervisor.start(ProcessSpec(name="worker-0", argv=[...], restart="on-failure"))
    while supervisor.running(prefix="worker-") and not stop.wait(0.2):
        supervisor.poll()
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.text import Text

from trilith.discovery.zk_url import AUTH_VARIABLE, ZkUrl
from trilith.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from trilith.rpc.channels import open_channel
from trilith.runtime.waiting import Wait
from trilith_services.local.processes import Ended, Process, ProcessSpec, Restart, describe_status

__all__ = [
    "Ended",
    "ProcessSpec",
    "PsCluster",
    "StopRequest",
    "Supervisor",
    "describe_status",
    "free_ports",
    "is_serving",
    "trilith_argv",
]

# Exit status of a command that ends with an error of its own. A server meets it before it serves, when it was given
# something it cannot work with, such as a damaged checkpoint; for a worker it may just be a PS that was away.
REFUSED = 2
# Somebody told it to leave, maybe before it could listen.
_ASKED = frozenset({0, -signal.SIGTERM, 128 + signal.SIGTERM})
_HEALTH_BYTES = 1 << 20
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


class Supervisor:
    """Starts processes, copies their output with a coloured prefix, restarts what dies, and stops everything.

    A process that dies `max_deaths` times within `death_window_s` ends the run: `poll` raises UnavailableError with the
    tail of its log. Call `start` and `poll` from one thread that lives as long as the processes shall, the main one:
    the kernel ends them when that thread ends. Not thread-safe otherwise.
    """

    def __init__(
        self,
        console: Console | None = None,
        log_dir: str | Path | None = None,
        *,
        grace_s: float = 20.0,
        max_deaths: int = 3,
        death_window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.log_dir = Path(tempfile.mkdtemp(prefix="trilith-logs-") if log_dir is None else log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._grace_s = grace_s
        self._max_deaths = max_deaths
        self._death_window_s = death_window_s
        self._clock = clock
        self._processes: dict[str, Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, spec: ProcessSpec) -> None:
        """Start a process; its log is `<log_dir>/<name>.log`, appended to."""
        old = self._processes.get(spec.name)
        if old is not None:
            if old.reap() is None:
                raise InvalidRequestError(f"process {spec.name!r} is running already")
            old.close()
        colour = _COLOURS[len(self._processes) % len(_COLOURS)]
        log = (self.log_dir / f"{spec.name}.log").open("ab")
        self._processes[spec.name] = Process(spec, log, self._printer(spec.name, colour))

    def _printer(self, name: str, colour: str) -> Callable[[str], None]:
        prefix = Text(f"{name:<9}| ", style=colour)

        def show(line: str) -> None:
            self.console.print(prefix + Text.from_ansi(line), soft_wrap=True, highlight=False)

        return show

    def say(self, message: str, *, style: str = "bold") -> None:
        """Print a line of the supervisor's own."""
        self.console.print(Text(f"{'trilith':<9}| ", style="bold") + Text(message, style=style), soft_wrap=True)

    def running(self, prefix: str = "") -> list[str]:
        """Names of the processes that have not ended."""
        return [
            name
            for name, process in self._processes.items()
            if name.startswith(prefix) and process.status is None and process.popen.poll() is None
        ]

    def pid(self, name: str) -> int:
        """Process id, of the present one if it was restarted."""
        return self._process(name).popen.pid

    def tail(self, name: str) -> list[str]:
        """The last lines it printed."""
        return list(self._process(name).tail)

    def status(self, name: str) -> int | None:
        """Exit status, None while it runs."""
        return self._process(name).reap()

    def signal(self, name: str, number: int) -> None:
        """Send a signal."""
        self._process(name).signal(number)

    def poll(self) -> list[Ended]:
        """See who has ended since the last call, and restart those whose spec says so.

        Raises:
            UnavailableError: A process that should be running keeps dying, or refused to start (exit status 2).
        """
        ended: list[Ended] = []
        for name, process in self._processes.items():
            if process.status is not None:
                continue  # known already
            status = process.reap()
            if status is None:
                continue
            again = process.spec.restart == "always" or (process.spec.restart == "on-failure" and status not in _ASKED)
            if again:
                self._count_death(process, status)
                self.say(f"{name} {describe_status(status)}; starting it again", style="bold yellow")
                process.start()
            ended.append(Ended(name=name, status=status, restarted=again, tail=tuple(process.tail)))
        return ended

    def _count_death(self, process: Process, status: int) -> None:
        name, now = process.spec.name, self._clock()
        process.deaths.append(now)
        while now - process.deaths[0] > self._death_window_s:
            process.deaths.popleft()
        if status == REFUSED and process.spec.health:
            raise UnavailableError(f"{name} refused to run (status {REFUSED})\n{self._last_lines(name)}")
        if len(process.deaths) >= self._max_deaths:
            raise UnavailableError(
                f"{name} keeps dying: {len(process.deaths)} times within {self._death_window_s:g} s, "
                f"at last it {describe_status(status)}\n{self._last_lines(name)}"
            )

    def _last_lines(self, name: str) -> str:
        lines = [f"  {line}" for line in self.tail(name)[-15:]] or ["  (it printed nothing)"]
        return "\n".join([f"the end of {self.log_dir / name}.log:", *lines])

    def wait_serving(
        self,
        names: Iterable[str] | None = None,
        *,
        timeout_s: float = 180.0,
        cancelled: Callable[[], object] = lambda: False,
    ) -> bool:
        """Wait until the named processes (all that have a health address) report SERVING.

        Returns:
            False if `cancelled` said so before.

        Raises:
            UnavailableError: One of them died instead.
            DeadlineExceededError: One of them is still not serving.
        """
        wanted = [name for name, process in self._processes.items() if process.spec.health] if names is None else names
        deadline = self._clock() + timeout_s
        for name in wanted:
            process = self._process(name)
            left = f"{timeout_s:g} s at most; its log is {self.log_dir / name}.log"
            with Wait(f"{name} to serve on {process.spec.health}", most=left, say=self.say) as waiting:
                while not is_serving(process.spec.health):
                    if cancelled():
                        waiting.end(came=False)
                        return False
                    self._check_preparing(process, timeout_s if self._clock() > deadline else None)
                    time.sleep(0.05)
        return True

    def _check_preparing(self, process: Process, waited_s: float | None) -> None:
        name = process.spec.name
        for ended in self.poll():
            if ended.name == name and not ended.restarted:
                raise UnavailableError(f"{name} {ended.how} before it served\n{self._last_lines(name)}")
        if process.status is not None:
            raise UnavailableError(f"{name} {describe_status(process.status)}\n{self._last_lines(name)}")
        if waited_s is not None:
            raise DeadlineExceededError(
                f"{name} is not serving on {process.spec.health} after {waited_s:g} s\n{self._last_lines(name)}"
            )

    def stop(self, names: Iterable[str] | None = None) -> None:
        """End the named processes: SIGTERM at once to each, SIGKILL to what is left after the grace period.

        Without names, all of them: first those that are no servers, so that none sees its PS go.
        """
        if names is None:
            for servers in (False, True):
                self.stop([name for name, process in self._processes.items() if bool(process.spec.health) is servers])
            return
        chosen = [self._process(name) for name in names]
        for process in chosen:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        try:
            for process in chosen:
                try:
                    process.popen.wait(max(deadline - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    self.say(
                        f"{process.spec.name} did not stop within {self._grace_s:g} s; killing it", style="bold red"
                    )
                    process.kill()
        finally:
            for process in chosen:
                process.kill()  # also when somebody has lost patience with this loop
                process.close()

    def _process(self, name: str) -> Process:
        if name not in self._processes:
            raise InvalidRequestError(f"no process {name!r}; there are {sorted(self._processes)}")
        return self._processes[name]


class PsCluster:
    """The PS processes of one local cluster, each on its own free port for as long as the run lasts."""

    def __init__(
        self,
        supervisor: Supervisor,
        count: int,
        *,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every_s: float | None = None,
        restore_from: str | None = None,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        discovery: str | None = None,
    ) -> None:
        if count < 1:
            raise InvalidRequestError(f"a cluster of {count} PS; at least 1 is needed")
        self.endpoints = [f"{host}:{port}" for port in free_ports(count, host)]
        self.env = dict(env or {})
        self._supervisor = supervisor
        self._arguments = [*arguments]
        self._discovery = discovery
        if discovery is not None:
            self._discovery = self._without_credentials(discovery)
            self._arguments += ["--discovery", self._discovery]
        if checkpoint_dir is not None:
            self._arguments += ["--checkpoint-dir", str(checkpoint_dir)]
            if checkpoint_every_s is not None:
                self._arguments += ["--checkpoint-every", f"{checkpoint_every_s:g}"]
        if restore_from is not None:
            self._arguments += ["--restore-from", restore_from]
        # Without a checkpoint a restarted PS would be empty, and its clients would rightly refuse it.
        self._restart: Restart = "never" if checkpoint_dir is None and restore_from is None else "always"

    @property
    def address(self) -> str:
        """What `trilith.connect` takes, in a process that has `env`."""
        return self._discovery or "static://" + ",".join(self.endpoints)

    def _without_credentials(self, discovery: str) -> str:
        """The URL for command lines, which anybody may read; what nobody may is put into `env`."""
        if discovery.startswith("hosts://"):
            return discovery
        url = ZkUrl.parse(discovery)
        if url.credentials is not None:
            self.env[AUTH_VARIABLE] = url.credentials
        return str(url.public)

    @property
    def names(self) -> list[str]:
        """Process names by shard index."""
        return [f"ps-{index}" for index in range(len(self.endpoints))]

    def start(self, *, timeout_s: float = 180.0, cancelled: Callable[[], object] = lambda: False) -> bool:
        """Start all and wait until they serve; False if `cancelled` said so before."""
        for index, (name, endpoint) in enumerate(zip(self.names, self.endpoints, strict=True)):
            argv = trilith_argv("ps", "--index", str(index), "--count", str(len(self.endpoints)), "--listen", endpoint)
            spec = ProcessSpec(
                name=name, argv=[*argv, *self._arguments], env=self.env, restart=self._restart, health=endpoint
            )
            self._supervisor.start(spec)
        return self._supervisor.wait_serving(self.names, timeout_s=timeout_s, cancelled=cancelled)


class StopRequest:
    """While entered, SIGINT and SIGTERM ask for an orderly end instead of making one; a third one is obeyed at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._count = 0
        self._event = threading.Event()
        self._old: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.signal = self.signal or number
        self._event.set()
        if self._count >= 3:
            raise KeyboardInterrupt

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody asks for the end, at most so long."""
        return self._event.wait(timeout_s)

    def __bool__(self) -> bool:
        return self._event.is_set()


def is_serving(endpoint: str, *, timeout_s: float = 0.5) -> bool:
    """Whether the gRPC health service at host:port says SERVING, asked for at most `timeout_s`."""
    with open_channel(endpoint, max_message_bytes=_HEALTH_BYTES, own_connection=True) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def free_ports(count: int, host: str = "127.0.0.1", *, keep: bool = True) -> list[int]:
    """Ports nobody listens on, below the range the kernel takes for outgoing connections.

    In that range a client that keeps dialling a PS that is down may one day connect to itself and hold the port.

    Args:
        count: How many.
        host: Where they are free.
        keep: Until this process ends the ports stay bound by sockets that never listen. Servers, which reuse addresses,
            may bind them beside that; others who look for free ports pass them over, also before a server listens and
            while it starts anew.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found: list[int] = []
    for port in random.Random().sample(range(20_000, 32_000), 2_000):
        keeper = socket.socket(family, socket.SOCK_STREAM)
        try:
            keeper.bind((host, port))
        except OSError:
            keeper.close()
            continue
        if keep:
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.detach()  # left open, for the kernel to close with the process
        else:
            keeper.close()
        found.append(port)
        if len(found) == count:
            return found
    raise UnavailableError(f"no {count} free ports on {host} between 20000 and 32000")


def trilith_argv(*arguments: str) -> list[str]:
    """The command line of this installation's `trilith`."""
    return [sys.executable, "-m", "trilith_services", *arguments]

"""One child process: its command, its output copied line by line, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Literal

__all__ = ["DIE_WITH_PARENT", "Ended", "Process", "ProcessSpec", "Restart", "describe_status"]

Restart = Literal["never", "on-failure", "always"]

TAIL_LINES = 40

# Asks the kernel for SIGTERM when the supervisor dies, whatever kills it, then becomes the command. A tiny program
# instead of a preexec_fn, which may deadlock in a process that has threads.
DIE_WITH_PARENT = """
import ctypes, os, sys
parent = int(sys.argv[1])
try:
    ctypes.CDLL(None).prctl(1, 15)
except (OSError, AttributeError):
    pass
if os.getppid() != parent:
    sys.exit(143)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to run.

    Attributes:
        name: Prefix of its log lines and name of its log file, such as "ps-0".
        argv: The command.
        env: Variables added to this process's own.
        restart: When to start it again after it ended by itself; status 0 and death by SIGTERM are no failure. A
            server (with `health`) that ends with status 2 refuses to run, and is not started again.
        health: host:port whose gRPC health service says SERVING when it is ready; empty if it has none.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # credentials may be among them
    restart: Restart = "never"
    health: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process ended by itself.

    Attributes:
        name: Its spec's name.
        status: Exit status; minus the signal if one killed it.
        restarted: Whether it has been started again.
        tail: Its last lines.
    """

    name: str
    status: int
    restarted: bool
    tail: tuple[str, ...]

    @property
    def how(self) -> str:
        """In words."""
        return describe_status(self.status)


class Process:
    """A running process, the thread that copies its output, and when it died before."""

    def __init__(self, spec: ProcessSpec, log: IO[bytes], show: Callable[[str], None]) -> None:
        self.spec = spec
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.deaths: deque[float] = deque()
        self.status: int | None = None
        self._log = log
        self._show = show
        self.start()

    def start(self) -> None:
        """Start or start again; later lines go to the same log."""
        self.status = None
        self.popen = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid()), *self.spec.argv],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C on the terminal reaches the supervisor only, which stops things in order
        )
        self._reader = threading.Thread(target=self._copy, args=(self.popen.stdout,), daemon=True)
        self._reader.start()

    def _copy(self, output: IO[bytes]) -> None:
        with output:
            for raw in output:
                self._log.write(raw)
                self._log.flush()
                line = raw.decode(errors="replace").rstrip("\r\n")
                self.tail.append(line)
                self._show(line)

    def reap(self) -> int | None:
        """Exit status if it has ended, its output copied."""
        if self.status is None and (status := self.popen.poll()) is not None:
            # A grandchild may hold the pipe open; what the process itself wrote is there at once.
            self._reader.join(timeout=1.0)
            self.status = status
        return self.status

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to all it started too."""
        try:
            if group:
                os.killpg(self.popen.pid, number)
            elif self.popen.poll() is None:
                self.popen.send_signal(number)
        except (ProcessLookupError, PermissionError):
            pass

    def kill(self) -> None:
        """End it, and all it started, at once; nothing happens if it has ended."""
        if self.popen.poll() is None:
            self.signal(signal.SIGKILL, group=True)
            self.popen.wait()
        self.reap()

    def close(self) -> None:
        """Close the log."""
        self._log.close()


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"

"""Processes that benchmarks talk to: PS, the identity server, workers; started, awaited and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

__all__ = ["EXPERIMENTS", "Child", "parameter_servers", "python_module", "trilith_process"]

EXPERIMENTS = "-event_engine_client,-event_engine_listener"
"""What `trilith` sets for every process it starts; set here for the client and the identity server as well, because the
reference has to be as fast as it can be."""

_START_S = 120.0
_STOP_S = 15.0


class Child:
    """A process that reports by JSON objects, one a line; other lines are remembered for when it fails."""

    def __init__(self, command: Sequence[str], *, reports: str = "stdout", env: dict[str, str] | None = None) -> None:
        """Start `command`, which reports on "stdout" or "stderr"."""
        self._command = " ".join(command)
        own = reports == "stdout"
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if own else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if own else subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_EXPERIMENTS": EXPERIMENTS, **(env or {})},
        )
        self._stream = self.process.stdout if own else self.process.stderr
        self._tail: deque[str] = deque(maxlen=30)
        self._reports: deque[dict[str, Any]] = deque()
        self._news = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, timeout_s: float = _START_S, **fields: Any) -> dict[str, Any]:
        """The next report that has these fields; RuntimeError with the output's tail if there will be none."""

        def found() -> dict[str, Any] | None:
            while self._reports:
                report = self._reports.popleft()
                if all(report.get(name) == value for name, value in fields.items()):
                    return report
            return None

        with self._news:
            report = found()
            while report is None:
                if self._ended or not self._news.wait(timeout_s):
                    raise RuntimeError(f"{self._command} never reported {fields}:\n{''.join(self._tail)}")
                report = found()
            return report

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def cpu_s(self) -> float:
        """Seconds of processor time used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        """End it, by force if it does not end by itself."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self._stream is not None
        for line in self._stream:
            with self._news:
                self._tail.append(line)
                with contextlib.suppress(json.JSONDecodeError):
                    report = json.loads(line)
                    if isinstance(report, dict):
                        self._reports.append(report)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of the tests with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def trilith_process(*arguments: str) -> Child:
    """A `trilith` server on a free port, which reports its log."""
    serve = "from trilith_services.cli import main; main()"
    where = ("--listen", "127.0.0.1:0", "--log-format", "json")
    return Child([sys.executable, "-c", serve, *arguments, *where], reports="stderr")


@contextlib.contextmanager
def parameter_servers(count: int) -> Iterator[tuple[str, list[Child]]]:
    """Run a cluster of `trilith ps` processes; gives its address and the processes."""
    servers: list[Child] = []
    with contextlib.ExitStack() as stack:
        for index in range(count):
            server = trilith_process("ps", "--index", str(index), "--count", str(count))
            stack.callback(server.stop)
            servers.append(server)
        ports = [server.wait_for(message="serving")["port"] for server in servers]
        yield f"static://{','.join(f'127.0.0.1:{port}' for port in ports)}", servers

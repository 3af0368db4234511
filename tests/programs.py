"""`trilith` processes by name, for tests that kill them and start them again."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.waiting import eventually
from trilith_services.local.supervisor import free_ports, is_serving, trilith_argv

__all__ = ["PATIENCE_S", "Processes"]

PATIENCE_S = 240.0


class Processes:
    """Servers, each with a port of its own for good and one thread."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._arguments: dict[str, tuple[str, ...]] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}

    def start(self, name: str, *arguments: str) -> str:
        """Start it, without arguments as it was started before; returns its address at once."""
        arguments = self._arguments[name] = arguments or self._arguments[name]
        address = f"127.0.0.1:{self.ports.setdefault(name, free_ports(1)[0])}"
        with (self._logs / f"{name}.log").open("ab") as log:
            argv = trilith_argv(*arguments, "--listen", address, "--threads", "1")
            self.running[name] = subprocess.Popen(argv, stdout=log, stderr=log)
        return address

    def wait(self, *names: str) -> None:
        """Wait until they serve."""
        for name in names:
            eventually(lambda: self._serves(name), timeout_s=PATIENCE_S)  # noqa: B023

    def _serves(self, name: str) -> bool:
        assert self.running[name].poll() is None, self.log(name)
        return is_serving(f"127.0.0.1:{self.ports[name]}", timeout_s=2.0)

    def log(self, name: str) -> str:
        """What it has said."""
        return (self._logs / f"{name}.log").read_text()

    def end(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send it a signal that ends it; returns its exit status."""
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(120)

    def close(self) -> None:
        """End all."""
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait(120)

"""Real ZooKeeper servers for tests, out of Debian's libzookeeper-java; alone, or several as an ensemble."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.absent import absent
from tests.waiting import eventually
from trilith_services.local.processes import DIE_WITH_PARENT
from trilith_services.local.supervisor import free_ports

JARS = Path("/usr/share/java")
NEEDED = ("zookeeper.jar", "slf4j-simple.jar", "netty-codec.jar", "netty-resolver.jar")
SESSION_S = 2.0  # twice the tick is the least that a server grants


def missing() -> str:
    """What this machine lacks to run ZooKeeper; empty if nothing."""
    if shutil.which("java") is None:
        return "no java (Debian: apt-get install default-jre-headless)"
    lacking = [name for name in NEEDED if not (JARS / name).exists()]
    return f"no {', '.join(lacking)} in {JARS} (Debian: apt-get install libzookeeper-java)" if lacking else ""


def require_zookeeper() -> None:
    """Skip the test, or fail it in CI, where nothing may be left out, if ZooKeeper cannot run here."""
    if why := missing():
        absent(why)


class Server:
    """One server process; `start` after `kill` goes on with its data."""

    def __init__(self, directory: Path, *, number: int = 1, peers: dict[int, str] | None = None, tls: str = "") -> None:
        """Write its config.

        Args:
            directory: Its data and log.
            number: Its id in the ensemble.
            peers: host:port:port by id, of an ensemble.
            tls: Lines of the config that make its port a TLS one; empty: plain.
        """
        directory.mkdir()
        self.number = number
        self.port = free_ports(1)[0]
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._plain_port = free_ports(1)[0] if tls else self.port
        lines = [
            "tickTime=1000",
            "initLimit=10",
            "syncLimit=3",
            f"dataDir={directory}",
            "clientPortAddress=127.0.0.1",
            f"clientPort={self._plain_port}",
            "admin.enableServer=false",
            "4lw.commands.whitelist=srvr",
            *(f"server.{peer}={where}" for peer, where in (peers or {}).items()),
        ]
        if tls:
            lines += [f"secureClientPort={self.port}", tls]
        (directory / "zoo.cfg").write_text("\n".join(lines) + "\n")
        (directory / "myid").write_text(str(number))

    @property
    def host(self) -> str:
        """Its address for clients."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; `wait` until it serves."""
        argv = [
            # It ends with the tests, whatever ends these.
            *(sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid())),
            "java",
            *("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"),
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            *("-cp", ":".join(str(JARS / name) for name in NEEDED)),
            "org.apache.zookeeper.server.quorum.QuorumPeerMain",
            str(self._directory / "zoo.cfg"),
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def mode(self) -> str:
        """standalone, leader or follower; empty while it does not serve."""
        try:
            with socket.create_connection(("127.0.0.1", self._plain_port), timeout=1.0) as connection:
                connection.sendall(b"srvr")
                answer = b""
                while chunk := connection.recv(4096):
                    answer += chunk
        except OSError:
            return ""
        return next((line[6:] for line in answer.decode().splitlines() if line.startswith("Mode: ")), "")

    def wait(self) -> None:
        """Wait until it serves."""
        assert self._process is not None
        eventually(lambda: self.mode() or self._died(), timeout_s=120.0)

    def _died(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"ZooKeeper ended: {(self._directory / 'log').read_text()[-2000:]}")
        return False

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wipe(self) -> None:
        """Delete the data of a server that does not run."""
        shutil.rmtree(self._directory / "version-2")

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def server(directory: Path, *, tls: str = "") -> Iterator[Server]:
    """A server by itself."""
    require_zookeeper()
    single = Server(directory, tls=tls)
    try:
        single.start()
        single.wait()
        yield single
    finally:
        single.kill()


class Ensemble:
    """Three servers, of which one leads."""

    def __init__(self, directory: Path) -> None:
        """Make them; `start` starts them."""
        ports = free_ports(6)
        peers = {number: f"127.0.0.1:{ports[2 * number - 2]}:{ports[2 * number - 1]}" for number in (1, 2, 3)}
        self.servers = [Server(directory / f"zk{number}", number=number, peers=peers) for number in peers]

    @property
    def hosts(self) -> str:
        """Their addresses for clients."""
        return ",".join(server.host for server in self.servers)

    def start(self) -> None:
        """Start all, and wait until they serve."""
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait()

    def leader(self) -> Server:
        """The one that leads."""
        found: list[Server] = []
        eventually(lambda: found.extend(server for server in self.servers if server.mode() == "leader") or found)
        return found[0]

    def kill(self) -> None:
        """End all."""
        for server in self.servers:
            server.kill()


@contextmanager
def ensemble(directory: Path) -> Iterator[Ensemble]:
    """Three servers."""
    require_zookeeper()
    three = Ensemble(directory)
    try:
        three.start()
        yield three
    finally:
        three.kill()

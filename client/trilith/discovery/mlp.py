"""A cluster described by MLP_* environment variables, and by OMPI_* where mpirun starts the workers."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping

from trilith.discovery import PS
from trilith.discovery.addresses import is_listening, join_address, own_host, split_address
from trilith.discovery.watchers import Watchers
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.runtime.waiting import Wait

__all__ = ["MlpDirectory", "MlpEnvironment"]

DEFAULT_PORT = 2222
_CAPTURED = ("MLP_", "MPI_")
_LOCAL = frozenset({"local", "localhost", "127.0.0.1", "0.0.0.0"})


class MlpEnvironment:
    """What the variables say, read once.

    Under mpirun (role WORKER and OMPI_COMM_WORLD_RANK set) the workers are the ranks: worker r runs on host
    r // local size, at the port of MLP_WORKER_0_PORT plus r.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Capture the variables of `environ`, or of this process."""
        environ = os.environ if environ is None else environ
        self._variables = {name: _bare(value) for name, value in environ.items() if name.startswith(_CAPTURED)}
        self._mpi = {
            name: int(value)
            for name, value in environ.items()
            if re.fullmatch(r"OMPI_COMM_WORLD_\w+", name) and value.strip().isdigit()
        }
        self.own_host = own_host(environ)

    @property
    def available(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._variables) and bool(self.roles)

    @property
    def roles(self) -> tuple[str, ...]:
        """Upper-case names of the roles that have a count."""
        found = [name.split("_") for name in self._variables]
        return tuple(sorted(parts[1] for parts in found if len(parts) == 3 and parts[2] == "NUM"))

    @property
    def role(self) -> str:
        """Own role, upper-case."""
        return self._variables.get("MLP_ROLE", "").upper()

    @property
    def mpi(self) -> bool:
        """Whether mpirun started this process."""
        return self.role == "WORKER" and "OMPI_COMM_WORLD_RANK" in self._mpi

    @property
    def says_index(self) -> bool:
        """Whether the variables say which member of its role this process is; `index` is 0 where they do not."""
        return self.mpi or bool(self._variables.get("MLP_ROLE_INDEX"))

    @property
    def index(self) -> int:
        """Own index."""
        return self._mpi["OMPI_COMM_WORLD_RANK"] if self.mpi else self._number("MLP_ROLE_INDEX", 0)

    @property
    def port(self) -> int:
        """Own port; 0 if none is declared."""
        return self._number("MLP_PORT", 0) + (self.index if self.mpi else 0)

    def count(self, role: str) -> int:
        """How many members a role has; 0 for one that is not there."""
        if self.mpi and role.upper() == "WORKER":
            return self._mpi.get("OMPI_COMM_WORLD_SIZE", 1)
        return self._number(f"MLP_{role.upper()}_NUM", 0)

    def host(self, role: str, index: int, *, primary: bool = True) -> str:
        """Declared host of a member; the primary one, where there are two, unless told otherwise."""
        stem = f"MLP_{role.upper()}_{self._machine(role, index)}"
        names = ("PRIMARY_HOST", "HOST") if primary else ("HOST", "PRIMARY_HOST")
        return next((host for name in names if (host := self._variables.get(f"{stem}_{name}"))), "")

    def declared_port(self, role: str, index: int) -> int:
        """Declared port of a member, 2222 if there is none."""
        if self.mpi and role.upper() == "WORKER":
            return self._number("MLP_WORKER_0_PORT", DEFAULT_PORT) + index
        return self._number(f"MLP_{role.upper()}_{index}_PORT", DEFAULT_PORT)

    def address(self, role: str, index: int) -> str:
        """host:port of a member; empty if it has no host."""
        host = self.host(role, index)
        return join_address(host, self.declared_port(role, index)) if host else ""

    def _machine(self, role: str, index: int) -> int:
        if self.mpi and role.upper() == "WORKER":
            return index // max(self._mpi.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1), 1)
        return index

    def _number(self, name: str, default: int) -> int:
        text = self._variables.get(name, "")
        if not text:
            return default
        if not text.isdigit():
            raise InvalidRequestError(f"{name}={text!r} is no number")
        return int(text)


class MlpDirectory:
    """The members that the environment declares, less those that were deregistered here.

    Registering and deregistering change this process's view only.
    """

    def __init__(self, environment: MlpEnvironment | None = None, *, wait_s: float = 3600.0) -> None:
        """Take what is declared.

        Args:
            environment: The variables; None reads this process's.
            wait_s: How long the first `query` of the PS waits until each accepts connections; 0: it does not.

        Raises:
            InvalidRequestError: No role is declared.
        """
        self.environment = MlpEnvironment() if environment is None else environment
        if not self.environment.available:
            raise InvalidRequestError("no MLP_<ROLE>_NUM is set: mlp:// needs the cluster in MLP_* variables")
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._away: set[tuple[str, int]] = set()
        self._seen: set[str] = set()
        self._watched: dict[str, Watchers[int, str]] = {}
        self._closed = threading.Event()

    def register(self, role: str, index: int, address: str) -> None:
        """List a member again.

        Raises:
            InvalidRequestError: It is not the member that the environment declares.
        """
        self._check(role, index, address)
        with self._lock:
            self._away.discard((role, index))
        self._publish(role)

    def deregister(self, role: str, index: int, address: str) -> None:
        """List a member no longer.

        Raises:
            InvalidRequestError: It is not the member that the environment declares.
        """
        self._check(role, index, address)
        with self._lock:
            self._away.add((role, index))
        self._publish(role)

    def query(self, role: str) -> Mapping[int, str]:
        """Return address by index; the first time for the PS, when each accepts connections.

        Raises:
            UnavailableError: A PS does not within the time.
        """
        found = self._listed(role)
        if role == PS and self._wait_s > 0:
            self._wait_listening(found)
        return found

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Call `changed` now and whenever something is registered or deregistered here."""
        with self._lock:
            away = set(self._away)
            watchers = self._watched.setdefault(role, Watchers(self._listed(role, away)))
        return watchers.add(changed)

    def close(self) -> None:
        """End a `query` that waits."""
        self._closed.set()

    @property
    def server_type(self) -> str:
        """Own role, as the directory calls it."""
        return self.environment.role.lower()

    @property
    def index(self) -> int:
        """Own index."""
        return self.environment.index

    def _publish(self, role: str) -> None:
        with self._lock:
            watchers = self._watched.get(role)
        if watchers is not None:
            watchers.publish(self._listed(role))

    def _listed(self, role: str, away: set[tuple[str, int]] | None = None) -> dict[int, str]:
        if away is None:
            with self._lock:
                away = set(self._away)
        everyone = {index: self.environment.address(role, index) for index in range(self.environment.count(role))}
        return {index: address for index, address in everyone.items() if address and (role, index) not in away}

    def _check(self, role: str, index: int, address: str) -> None:
        environment = self.environment
        count = environment.count(role)
        if not 0 <= index < count:
            raise InvalidRequestError(f"{role} {index} is not declared: MLP_{role.upper()}_NUM is {count}")
        host, port = split_address(address)
        declared = environment.declared_port(role, index)
        if port != declared:
            raise InvalidRequestError(f"{role} {index} at {address}: the declared port is {declared}")
        hosts = {environment.host(role, index), environment.host(role, index, primary=False), environment.own_host}
        if host not in _LOCAL | hosts:
            raise InvalidRequestError(
                f"{role} {index} at {address}: the declared hosts are {sorted(filter(None, hosts))}"
            )

    def _wait_listening(self, found: Mapping[int, str]) -> None:
        deadline = time.monotonic() + self._wait_s
        for index, address in found.items():
            if address in self._seen:
                continue
            with Wait(f"PS {index} at {address}", most=self._wait_s):
                self._wait_until_listening(index, address, deadline)

    def _wait_until_listening(self, index: int, address: str, deadline: float) -> None:
        while address not in self._seen:
            if is_listening(address, timeout_s=1.0):
                self._seen.add(address)
            elif time.monotonic() > deadline:
                raise UnavailableError(f"PS {index} at {address} accepts no connection within {self._wait_s:g} s")
            elif self._closed.wait(0.1):
                return


def _bare(value: str) -> str:
    """Without blanks around it, and without one layer of quotes."""
    value = value.strip()
    for quote in ('"', "'"):
        if len(value) >= 2 and value[0] == value[-1] == quote:
            return value[1:-1]
    return value

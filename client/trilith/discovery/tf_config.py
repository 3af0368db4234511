"""A cluster described by TF_CONFIG, as Kubeflow's and other schedulers set it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from trilith.discovery import PS, WORKER
from trilith.discovery.addresses import check_address
from trilith.errors import InvalidRequestError

__all__ = ["TfConfigDirectory"]

_CHIEF = "chief"


class TfConfigDirectory:
    """The members that `{"cluster": {role: [address, …]}, "task": {"type": …, "index": …}}` names; they never change.

    A chief, where there is one, is worker 0, and the workers count from 1.
    """

    def __init__(self, text: str) -> None:
        """Take the JSON text.

        Raises:
            InvalidRequestError: It is not such a text.
        """
        try:
            config = json.loads(text)
        except ValueError as error:
            raise InvalidRequestError(f"TF_CONFIG is not JSON: {error}") from None
        cluster = config.get("cluster") if isinstance(config, dict) else None
        if not isinstance(cluster, dict):
            raise InvalidRequestError(f'TF_CONFIG has no "cluster" of addresses by role: {text[:200]}')
        self._cluster = {role: _addresses(role, listed) for role, listed in cluster.items()}
        task = config.get("task") or {}
        if not isinstance(task, dict):
            raise InvalidRequestError(f'TF_CONFIG: "task" is {{"type": …, "index": …}}, not {task!r}')
        self._type = str(task.get("type", ""))
        self._has_index = task.get("index") is not None
        try:
            self._index = int(task.get("index") or 0)
        except (TypeError, ValueError):
            raise InvalidRequestError(f"TF_CONFIG: task index {task.get('index')!r} is no number") from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> TfConfigDirectory:
        """Read $TF_CONFIG."""
        text = (os.environ if environ is None else environ).get("TF_CONFIG", "")
        if not text.strip():
            raise InvalidRequestError("TF_CONFIG is not set: tf-config:// needs the cluster as JSON in it")
        return cls(text)

    @property
    def server_type(self) -> str:
        """Own role; a chief is a worker."""
        return WORKER if self._type == _CHIEF else self._type

    @property
    def says_index(self) -> bool:
        """Whether the text says which member of its role this process is; `index` is 0 where it does not."""
        return bool(self._type) and self._has_index

    @property
    def index(self) -> int:
        """Own index among the members of the own role."""
        return self._index + 1 if self._type == WORKER and _CHIEF in self._cluster else self._index

    @property
    def address(self) -> str:
        """Own address.

        Raises:
            InvalidRequestError: The task is not part of the cluster.
        """
        listed = self._cluster.get(self._type, [])
        if not 0 <= self._index < len(listed):
            raise InvalidRequestError(
                f"TF_CONFIG: task {self._type!r} {self._index} is not in the cluster, which has "
                + str({role: len(addresses) for role, addresses in self._cluster.items()})
            )
        return listed[self._index]

    def register(self, role: str, index: int, address: str) -> None:
        """Do nothing: the scheduler has placed everybody."""

    def deregister(self, role: str, index: int, address: str) -> None:
        """Do nothing: the list does not shrink."""

    def query(self, role: str) -> Mapping[int, str]:
        """Return address by index.

        Raises:
            InvalidRequestError: The role is neither "ps" nor "worker".
        """
        if role == PS:
            return dict(enumerate(self._cluster.get(PS, [])))
        if role == WORKER:
            return dict(enumerate([*self._cluster.get(_CHIEF, []), *self._cluster.get(WORKER, [])]))
        raise InvalidRequestError(f"TF_CONFIG tells of roles {PS!r} and {WORKER!r}, not of {role!r}")

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Call `changed` once; nothing changes afterwards."""
        changed(self.query(role))
        return lambda: None

    def close(self) -> None:
        """Hold nothing, release nothing."""


def _addresses(role: str, listed: Any) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(address, str) for address in listed):
        raise InvalidRequestError(f"TF_CONFIG: role {role!r} must be a list of host:port, not {listed!r}")
    return [check_address(address) for address in listed]

"""ClusterView: chief, workers and PS as one training process sees them, and how it goes on when a PS moves or dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from trilith.discovery import PS, WORKER, Directory
from trilith.discovery.addresses import is_listening
from trilith.errors import (
    ClusterMismatchError,
    DeadlineExceededError,
    InvalidRequestError,
    TrilithError,
    UnavailableError,
)
from trilith.folder import Folder

__all__ = ["ClusterView", "Failover", "ViewBuilder", "dead_nodes"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_CHOICES = "ps_cluster_dir"
_DEFAULT_MODEL = "ps_info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Who one training process needs to know: the chief and the PS.

    Attributes:
        chief: Address of worker 0.
        ps: Addresses of the PS, by index.
        num_workers: How many workers there are, the chief included.
        index: Own index among the workers; 0 is the chief.
        address: Own address.
    """

    chief: str
    ps: tuple[str, ...]
    num_workers: int
    index: int
    address: str

    def to_tf_config(self) -> dict[str, Any]:
        """The view in the form of TF_CONFIG; other workers, whom nobody needs to reach, are placeholders."""
        workers = [f"0.0.0.0:{number}" for number in range(self.num_workers - 1)]
        if self.index:
            workers[self.index - 1] = self.address
        task = {"type": WORKER, "index": self.index - 1} if self.index else {"type": "chief", "index": 0}
        return {"cluster": {"chief": [self.chief], "worker": workers, "ps": list(self.ps)}, "task": task}


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewBuilder:
    """Makes the view of one worker, waiting for those it needs.

    With redundant PS, training starts with the first `num_ps` that are there; which these are is remembered beside the
    model, so that all workers, and a chief that restarts, use the same.

    Attributes:
        directory: Where members are found.
        index: Own index among the workers; 0 is the chief.
        address: Own address.
        num_workers: How many workers there are, the chief included.
        num_ps: How many PS are needed.
        redundant_ps: How many more are started.
        model_dir: Directory or URL of the model; needed with redundant PS.
        model: Name of the model, for the file with the choice.
        poll_s: Seconds between looks.
        timeout_s: How long to wait for the chief and the PS; None: for ever.
        choice_timeout_s: How long a worker waits for the chief's choice among redundant PS.
        waiting: Told how many PS are missing at every look; 0 when waiting is over.
        clock: Seconds.
        sleep: Waits so many seconds.
    """

    directory: Directory
    index: int
    address: str
    num_workers: int
    num_ps: int
    redundant_ps: int = 0
    model_dir: str = ""
    model: str = ""
    poll_s: float = 5.0
    timeout_s: float | None = None
    choice_timeout_s: float = 1800.0
    waiting: Callable[[int], None] = lambda missing: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_workers:
            raise InvalidRequestError(f"worker {self.index} is outside 0..{self.num_workers - 1}")
        if self.num_ps < 1 or self.redundant_ps < 0:
            raise InvalidRequestError(
                f"{self.num_ps} PS and {self.redundant_ps} redundant; at least 1 and 0 are needed"
            )
        if self.redundant_ps and not self.model_dir:
            raise InvalidRequestError("redundant PS need a model_dir, where the choice among them is remembered")

    def build(self) -> ClusterView:
        """Wait until the view is complete.

        Raises:
            UnavailableError: Somebody is missing when the time is over.
        """
        chief = self._ps_of_chief if self.index == 0 else self._ps_of_worker
        ps = chief()
        if len(ps) != self.num_ps:
            raise ClusterMismatchError(f"the cluster view has {len(ps)} PS, {list(ps)}; {self.num_ps} are needed")
        address = self.address if self.index == 0 else self._chief()
        return ClusterView(
            chief=address, ps=tuple(ps), num_workers=self.num_workers, index=self.index, address=self.address
        )

    def _ps_of_chief(self) -> list[str]:
        if not self.redundant_ps:
            return self._discovered()
        chosen = self._read_choice()
        if len(chosen) == self.num_ps:
            return chosen
        chosen = self._discovered()
        Folder(self._choice_folder).write(self._choice_name, ",".join(chosen).encode())
        return chosen

    def _ps_of_worker(self) -> list[str]:
        if not self.redundant_ps:
            return self._discovered()
        chosen: list[str] = []

        def complete() -> bool:
            nonlocal chosen
            chosen = self._read_choice()
            return len(chosen) == self.num_ps

        self._poll(complete, self.choice_timeout_s, lambda: f"the chief has not chosen {self.num_ps} PS")
        return chosen

    def _discovered(self) -> list[str]:
        """The first PS by index, when there are enough."""
        found: Mapping[int, str] = {}

        def complete() -> bool:
            nonlocal found
            found = self.directory.query(PS)
            self.waiting(max(self.num_ps - len(found), 0))
            return len(found) >= self.num_ps

        self._poll(complete, self.timeout_s, lambda: f"{len(found)} of {self.num_ps} PS are in the directory")
        return [found[index] for index in sorted(found)][: self.num_ps]

    def _chief(self) -> str:
        found: Mapping[int, str] = {}

        def complete() -> bool:
            nonlocal found
            found = self.directory.query(WORKER)
            return 0 in found

        self._poll(complete, self.timeout_s, lambda: "the chief is not in the directory")
        return found[0]

    def _poll(self, complete: Callable[[], bool], timeout_s: float | None, why: Callable[[], str]) -> None:
        started = self.clock()
        while not complete():
            waited = self.clock() - started
            if timeout_s is not None and waited >= timeout_s:
                raise UnavailableError(f"{why()} after {waited:.3g} s")
            self.sleep(self.poll_s)

    @property
    def _choice_folder(self) -> str:
        return f"{self.model_dir.rstrip('/')}/{_CHOICES}"

    @property
    def _choice_name(self) -> str:
        return self.model or _DEFAULT_MODEL

    def _read_choice(self) -> list[str]:
        folder = Folder(self._choice_folder)
        if not folder.exists(self._choice_name):
            return []
        return [address for address in folder.read(self._choice_name).decode().strip().split(",") if address]


def dead_nodes(addresses: Iterable[str], *, timeout_s: float = 1.0, threads: int = 10) -> list[str]:
    """Those of the addresses at which nobody accepts a connection within the time, asked at once."""
    asked = list(addresses)

    def alive(address: str) -> bool:
        try:
            return is_listening(address, timeout_s=timeout_s)
        except TrilithError:
            return False  # not even an address

    with ThreadPoolExecutor(max(min(threads, len(asked)), 1), thread_name_prefix="trilith-ping") as pool:
        return [address for address, is_alive in zip(asked, pool.map(alive, asked), strict=True) if not is_alive]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """Repeats training when the cluster has failed it, each time with a view made anew.

    Deadlines, unavailability and nodes that do not answer are survived; anything else ends training. Only a failure
    after which the view is another one counts as a retry: while nothing changes, there is nothing to go on with.

    Attributes:
        build: Makes the view.
        max_retries: How many changes of the view are survived.
        retry_wait_s: Seconds between a failure and the next look.
        ping_timeout_s: How long chief and PS may take to accept a connection before each attempt.
        failed: Told of every failure survived.
        ping: Returns those of the addresses that accept no connection.
        sleep: Waits so many seconds.
    """

    build: Callable[[], ClusterView]
    max_retries: int = 6
    retry_wait_s: float = 30.0
    ping_timeout_s: float = 60.0
    failed: Callable[[Exception], None] = lambda error: None
    ping: Callable[..., list[str]] = dead_nodes
    sleep: Callable[[float], None] = time.sleep

    def run(self, train: Callable[[ClusterView], _T]) -> _T:
        """Call `train` until it returns.

        Raises:
            UnavailableError: The view has changed more than `max_retries` times; or DeadlineExceededError, likewise.
        """
        view = self.build()
        retries = 0
        while True:
            try:
                self._check_alive(view)
                return train(view)
            except (UnavailableError, DeadlineExceededError) as error:
                log.warning("training was interrupted: %s", error)
                self.failed(error)
                self.sleep(self.retry_wait_s)
                fresh = self.build()
                if fresh == view:
                    continue
                view = fresh
                retries += 1
                if retries > self.max_retries:
                    raise

    def _check_alive(self, view: ClusterView) -> None:
        others = [address for address in (view.chief, *view.ps) if address != view.address]
        dead = self.ping(others, timeout_s=self.ping_timeout_s)
        if dead:
            raise UnavailableError(f"nobody answers at {', '.join(dead)}")

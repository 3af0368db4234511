"""Worker identity: which of how many processes this one is, by what launchers and schedulers say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

from trilith.discovery import PS, WORKER
from trilith.discovery.addresses import check_address, join_address
from trilith.discovery.mlp import MlpEnvironment
from trilith.discovery.tf_config import TfConfigDirectory
from trilith.errors import InvalidRequestError

__all__ = ["COMPLETIONS", "Source", "WorkerIdentity"]

Source: TypeAlias = Literal["arguments", "torchrun", "mpi", "mlp", "tf-config", "kubernetes", "alone"]
"""Who said it: arguments or flags; RANK; OMPI_*; MLP_*; TF_CONFIG; JOB_COMPLETION_INDEX; nobody."""

COMPLETIONS = "JOB_COMPLETIONS"
"""Environment variable with the number of completions of an indexed Kubernetes Job.

Kubernetes itself says only which one a pod is (JOB_COMPLETION_INDEX), so the pod's template sets this one to what
`completions` is; WORLD_SIZE, as torch's examples for Kubernetes have it, is taken too.
"""

_COUNTS = ("PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Of launchers that are not read: above 1 they say that there are several processes."""

_Default = TypeVar("_Default")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """Which of how many this process is.

    Attributes:
        rank: Number of this process among those of its task, from 0.
        world_size: How many there are.
        local_rank: Number among those on this machine, from 0.
        local_world_size: How many are on this machine, as far as known.
        master: host:port where rank 0 meets the others; empty where nobody said it.
        task: What this process is in the job: "worker" for those that train; TF_CONFIG and MLP_* also have "ps",
            "evaluator" and others.
        members: host:port of the job's processes by task, as far as known; a chief is worker 0.
        source: Who said so.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: str = ""
    task: str = WORKER
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    source: Source = "alone"

    def __post_init__(self) -> None:
        for rank, size in (("rank", "world_size"), ("local_rank", "local_world_size")):
            number, count = getattr(self, rank), getattr(self, size)
            if not 0 <= number < count:
                raise InvalidRequestError(f"{rank}={number} is outside 0..{size} - 1, with {size}={count}")
        if self.local_world_size > self.world_size:
            raise InvalidRequestError(
                f"local_world_size={self.local_world_size} is above world_size={self.world_size}: of all workers, no "
                "more can be on this machine"
            )
        if self.master:
            try:
                check_address(self.master)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"master={self.master!r}: {error}") from None

    @property
    def chief(self) -> bool:
        """Whether this is the worker that saves, exports and waits for the others: rank 0."""
        return self.task == WORKER and self.rank == 0

    @classmethod
    def find(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        local_rank: int | None = None,
        local_world_size: int | None = None,
        master: str = "",
    ) -> WorkerIdentity:
        """Ask the arguments, then the environment; the first that knows decides.

        The order is: rank and world_size; torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; OMPI_COMM_WORLD_*
        of mpirun; MLP_*; TF_CONFIG; JOB_COMPLETION_INDEX with `COMPLETIONS`. Arguments replace what the environment
        says one by one: a world_size alone goes with the JOB_COMPLETION_INDEX of Kubernetes, a master with anything.

        Args:
            environ: Environment variables; None: this process's.
            rank: As the attribute.
            world_size: As the attribute.
            local_rank: As the attribute.
            local_world_size: As the attribute.
            master: As the attribute; else MASTER_ADDR and MASTER_PORT, else where the cluster's worker 0 is.

        Raises:
            InvalidRequestError: Something says that there are several processes and nothing which one this is (it is
                never taken for the only one), or what is said is impossible. The message names the variables.
        """
        environ = os.environ if environ is None else environ
        environ = {name: value.strip() for name, value in environ.items() if value.strip()}
        found = _by_arguments(rank, world_size)
        for ask in () if found else (_torchrun, _mpi, _mlp, _tf_config, _kubernetes):
            found = ask(environ, world_size)
            if found:
                break
        if found is None:
            _refuse_hints(environ, rank, world_size)
            found = cls()
        found = replace(found, master=master or found.master or _rendezvous(environ))
        if rank is not None:
            found = replace(found, rank=rank)
        if world_size is not None and world_size != found.world_size:
            found = replace(found, world_size=world_size)
        if local_rank is not None or local_world_size is not None:
            own = found.local_rank if local_rank is None else local_rank
            count = max(own + 1, found.local_world_size) if local_world_size is None else local_world_size
            found = replace(found, local_rank=own, local_world_size=count)
        return found


# ---- who says it, first come first served --------------------------------------------------------------------------


def _by_arguments(rank: int | None, world_size: int | None) -> WorkerIdentity | None:
    if rank is None or world_size is None:
        return None
    return WorkerIdentity(rank=rank, world_size=world_size, source="arguments")


def _torchrun(environ: Mapping[str, str], world_size: int | None) -> WorkerIdentity | None:
    if "RANK" not in environ:
        return None
    size = _number(environ, "WORLD_SIZE", world_size)
    if size is None:
        raise _incomplete("RANK", environ, "WORLD_SIZE, how many there are")
    local = _number(environ, "LOCAL_RANK", 0)
    count = _number(environ, "LOCAL_WORLD_SIZE", local + 1)
    return _made(
        "torchrun",
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        environ,
        _number(environ, "RANK", 0),
        size,
        local_rank=local,
        local_world_size=count,
    )


def _mpi(environ: Mapping[str, str], world_size: int | None) -> WorkerIdentity | None:
    stem = "OMPI_COMM_WORLD_"
    rank, size = _number(environ, stem + "RANK", None), _number(environ, stem + "SIZE", world_size)
    if rank is None or size is None:
        if rank is None and (size is None or stem + "SIZE" not in environ):
            return None
        missing = "RANK, which one this is" if rank is None else "SIZE, how many there are"
        raise _incomplete(stem + ("SIZE" if rank is None else "RANK"), environ, stem + missing)
    local = _number(environ, stem + "LOCAL_RANK", 0)
    count = _number(environ, stem + "LOCAL_SIZE", local + 1)
    found = _made(
        "mpi",
        [stem + each for each in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        environ,
        rank,
        size,
        local_rank=local,
        local_world_size=count,
    )
    mlp = MlpEnvironment(environ)
    return replace(found, **_of_mlp(mlp)) if mlp.mpi and mlp.available else found


def _mlp(environ: Mapping[str, str], world_size: int | None) -> WorkerIdentity | None:
    mlp = MlpEnvironment(environ)
    counts = {role: mlp.count(role) for role in ("chief", WORKER, PS) if mlp.count(role)}
    if not counts:
        if mlp.role and "MLP_ROLE_INDEX" in environ and world_size is None:
            raise _incomplete("MLP_ROLE_INDEX", environ, f"MLP_{mlp.role}_NUM, how many there are")
        return None
    role = mlp.role.lower()
    names = ["MLP_ROLE", "MLP_ROLE_INDEX", *(f"MLP_{each.upper()}_NUM" for each in counts)]
    if not role:
        if sum(counts.values()) == 1:
            return None
        raise _incomplete(names[2], environ, "MLP_ROLE and MLP_ROLE_INDEX, which one this is")
    size = mlp.count(role)
    if size > 1 and not mlp.says_index:
        raise _incomplete(f"MLP_{role.upper()}_NUM", environ, "MLP_ROLE_INDEX, which one this is")
    chiefs = counts.get("chief", 0)
    if role == "chief":
        rank, size, role = mlp.index, chiefs + counts.get(WORKER, 0), WORKER
    elif role == WORKER:
        rank, size = mlp.index + chiefs, size + chiefs
    else:
        rank = mlp.index
    return replace(_made("mlp", names, environ, rank, max(size, 1), task=role), **_of_mlp(mlp))


def _of_mlp(mlp: MlpEnvironment) -> dict[str, Any]:
    """What else MLP_* variables tell: everybody's address, and so where worker 0 is."""
    members = {
        role: tuple(mlp.address(each, index) for each in roles for index in range(mlp.count(each)))
        for role, roles in ((WORKER, ("chief", WORKER)), (PS, (PS,)))
    }
    known = {role: addresses for role, addresses in members.items() if addresses and all(addresses)}
    return {"members": known, "master": known.get(WORKER, ("",))[0]}


def _tf_config(environ: Mapping[str, str], world_size: int | None) -> WorkerIdentity | None:
    if "TF_CONFIG" not in environ:
        return None
    config = TfConfigDirectory.from_environment(environ)
    members = {role: tuple(config.query(role).values()) for role in (WORKER, PS)}
    members = {role: addresses for role, addresses in members.items() if addresses}
    several = sum(map(len, members.values())) > 1
    task = config.server_type or WORKER
    size = len(members.get(task, ())) or 1
    if (not config.server_type and several) or (size > 1 and not config.says_index):
        raise _incomplete("TF_CONFIG", environ, 'its "task", {"type": …, "index": …}, which one this is')
    # An evaluator is one of its own, whatever the list says.
    rank = config.index if task in members else 0
    master = members.get(WORKER, ("",))[0]
    found = _made("tf-config", ["TF_CONFIG"], environ, rank, size, task=task, master=master)
    return replace(found, members=members)


def _kubernetes(environ: Mapping[str, str], world_size: int | None) -> WorkerIdentity | None:
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    counts = {name: _number(environ, name, 0) for name in (COMPLETIONS, "WORLD_SIZE") if name in environ}
    if world_size is not None:
        counts = {"world_size": world_size}
    if not counts:
        raise _incomplete("JOB_COMPLETION_INDEX", environ, f"{COMPLETIONS}, the job's number of completions")
    if len(set(counts.values())) > 1:
        raise InvalidRequestError(f"{_shown(counts)}: they say differently how many workers there are")
    return _made(
        "kubernetes",
        ["JOB_COMPLETION_INDEX", *counts],
        environ,
        _number(environ, "JOB_COMPLETION_INDEX", 0),
        next(iter(counts.values())),
    )


# ---- small parts ---------------------------------------------------------------------------------------------------


def _made(
    source: Source,
    names: Sequence[str],
    environ: Mapping[str, str],
    rank: int,
    size: int,
    *,
    local_rank: int = 0,
    local_world_size: int = 1,
    task: str = WORKER,
    master: str = "",
) -> WorkerIdentity:
    """An identity, or an error that names the variables which make it impossible."""
    try:
        return WorkerIdentity(
            rank=rank,
            world_size=size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            task=task,
            master=master,
            source=source,
        )
    except InvalidRequestError as error:
        said = _shown({name: environ[name] for name in names if name in environ})
        raise InvalidRequestError(f"{said}: {error}") from None


def _number(environ: Mapping[str, str], name: str, default: _Default) -> int | _Default:
    """A variable as a number."""
    text = environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequestError(f"{name}={text!r} is no number from 0")
    return int(text)


def _rendezvous(environ: Mapping[str, str]) -> str:
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if not host:
        return ""
    if not port:
        raise InvalidRequestError(f"MASTER_ADDR={host} is set and MASTER_PORT is not: say which port rank 0 listens on")
    return join_address(host, _number(environ, "MASTER_PORT", 0))


def _refuse_hints(environ: Mapping[str, str], rank: int | None, world_size: int | None) -> None:
    """Refuse to be alone where something speaks of several."""
    if rank is not None or (world_size or 1) > 1:
        said, missing = (f"rank={rank}", "world_size") if rank is not None else (f"world_size={world_size}", "rank")
        raise InvalidRequestError(f"{said} without {missing}: nothing says {_which(rank is None)}; give both")
    counts = {name: environ[name] for name in ("WORLD_SIZE", COMPLETIONS, *_COUNTS) if name in environ}
    several = {name: text for name, text in counts.items() if text != "1"}
    others = {name: environ[name] for name in ("LOCAL_RANK", "MASTER_ADDR") if name in environ}
    if not several and (not others or counts):
        return
    raise InvalidRequestError(
        f"{_shown(several or others)}: a job of several processes, and nothing says which one this is. torchrun sets "
        "RANK and WORLD_SIZE, mpirun OMPI_COMM_WORLD_RANK and _SIZE; else give rank and world_size, or unset this"
    )


def _which(one: bool) -> str:
    return "which one this is" if one else "how many there are"


def _incomplete(name: str, environ: Mapping[str, str], missing: str) -> InvalidRequestError:
    text = environ[name] if len(environ[name]) <= 80 else f"{environ[name][:80]}…"
    return InvalidRequestError(f"{name}={text} is set without {missing}: this process is not taken for the only one")


def _shown(variables: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())

"""The workers of a job as local processes: their command lines, each with who it is and where the others are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trilith.errors import InvalidRequestError
from trilith_services.local.processes import ProcessSpec, Restart
from trilith_services.local.supervisor import Supervisor, free_ports, trilith_argv

__all__ = ["check_free", "start_workers"]

_DECIDED = ("cluster", "rank", "world_size", "local_rank", "local_world_size", "master", "shut_down_ps")
"""Fields of a run that whoever starts the workers knows better than anybody else."""


def check_free(sets: Iterable[str]) -> None:
    """Refuse "name=value" of a field that `start_workers` decides.

    Raises:
        InvalidRequestError: There is one.
    """
    for each in sets:
        if each.partition("=")[0] in _DECIDED:
            raise InvalidRequestError(f"--set {each}: whoever starts all workers decides that; leave it out")


def start_workers(
    supervisor: Supervisor,
    job: str,
    count: int,
    *,
    cluster: str,
    sets: Sequence[str] = (),
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    restart: Restart = "on-failure",
) -> None:
    """Start `trilith worker JOB` as worker-0, worker-1 and so on.

    Args:
        supervisor: Watches them.
        job: MODULE:JOB.
        count: How many.
        cluster: Address of the PS, or peers://.
        sets: "name=value" of fields of the job's run.
        arguments: Further flags of `trilith worker`.
        env: Variables added to this process's own.
        restart: When one is started again.
    """
    # Whoever starts the workers has started the PS, too, and ends them.
    where = [f"cluster={cluster}", "shut_down_ps=false", f"world_size={count}", f"local_world_size={count}"]
    if count > 1:
        where.append(f"master=127.0.0.1:{free_ports(1)[0]}")
    for rank in range(count):
        words = [*sets, *where, f"rank={rank}", f"local_rank={rank}"]
        flags = [flag for word in words for flag in ("--set", word)]
        argv = trilith_argv("worker", job, *flags, *arguments)
        supervisor.start(ProcessSpec(name=f"worker-{rank}", argv=argv, env=env or {}, restart=restart))

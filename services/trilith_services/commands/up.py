"""`trilith up`: a whole cluster on this machine, supervised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilith_services.commands import output
from trilith_services.commands.flags import CheckpointRoot, expanded, size
from trilith_services.commands.jobs import RunFlags, refuse_alone

if TYPE_CHECKING:
    from trilith_services.local.supervisor import Ended, PsCluster, StopRequest, Supervisor

__all__ = ["register"]

POLL_S = 0.1


def register(app: typer.Typer) -> None:
    """Add the `up` command."""
    app.command()(expanded(up))


def up(
    *,
    context: typer.Context,
    worker_args: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further flags of `trilith worker MODULE:JOB` that every worker gets, after --.", metavar="WORKER_ARGS"
        ),
    ] = None,
    ps: Annotated[int, typer.Option("--ps", metavar="N", help="PS processes.", min=1)] = 2,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Worker processes of the job.",
            min=0,
            show_default="1 with --job, else 0",
        ),
    ] = None,
    job: Annotated[
        str,
        typer.Option(
            metavar="MODULE:JOB",
            help="What the workers train: an Estimator, as `trilith worker` names it; left out: only the PS, until "
            "Ctrl-C.",
        ),
    ] = "",
    run: RunFlags,
    discovery: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Directory to register the PS in, such as zk://host:2181/trilith/demo; left out: a static list.",
        ),
    ] = None,
    checkpoint_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Directory or URL to restore from and to write checkpoints to; a PS that dies comes back from them. "
            "With --job these are the job's own, in its model_dir.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between checkpoints; 0: only at the end.", min=0.0)
    ] = 60.0,
    checkpoint_root: CheckpointRoot = None,
    memory_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            callback=size,
            help="Memory for tables, filters, variables and queues of each PS; 0: no limit but the cgroup's.",
        ),
    ] = "0",
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where each process's log is kept; left out: a temporary directory."),
    ] = None,
    address_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cluster's address is written here once it serves, for scripts."),
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long processes get to stop before they are killed.", min=0.0)
    ] = 30.0,
) -> None:
    """Run a cluster on this machine until its workers are done, or until Ctrl-C.

    Starts the PS on free ports, waits until they serve, then starts the workers: `trilith worker MODULE:JOB` with your
    --set, --config and WORKER_ARGS, and with which worker each is. Every line of output is shown with its process's
    name and kept in a log. The workers end as a job ends: after its last save, and then the PS are stopped.

    A PS that dies is started again on its port and restores the newest checkpoint; without a model_dir, or
    --checkpoint-dir, its rows would be gone, so the run ends. A worker that fails is started again, and goes on where
    it was saved; one that ends well has left. What dies three times within a minute ends the run, with the end of its
    log and exit status 2.
    """
    workers = (1 if job else 0) if workers is None else workers
    from trilith.errors import InvalidRequestError
    from trilith_services.local.supervisor import PsCluster, StopRequest, Supervisor

    console = output.console(stderr=True)
    if not job:
        refuse_alone(context, "sets", "config")
        if workers or worker_args:
            what = f"--workers {workers}" if workers else f"flags for workers, {' '.join(worker_args or [])!r}"
            raise InvalidRequestError(
                f"{what}: say with --job what they train, as MODULE:JOB, such as trilith_services.demo.job:deepfm"
            )
    elif not workers:
        raise InvalidRequestError(f"--job {job}, but no workers are started: leave out --workers 0")
    elif checkpoint_dir is not None:
        raise InvalidRequestError(f"a job saves into its model_dir: write --set model_dir={checkpoint_dir}")
    if address_file is not None:
        if not address_file.absolute().parent.is_dir():
            raise InvalidRequestError(f"--address-file {address_file}: there is no directory {address_file.parent}")
        address_file.unlink(missing_ok=True)  # nobody shall read the last run's
    model_dir, decided = _prepared(job, run, ps + workers) if job else (None, [])
    with StopRequest() as stop, Supervisor(console, log_dir, grace_s=grace) as supervisor:
        cluster = PsCluster(
            supervisor,
            ps,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every_s=checkpoint_every,
            restore_from=model_dir,
            arguments=[
                *("--memory-limit", memory_limit),
                *(() if checkpoint_root is None else ("--checkpoint-root", checkpoint_root)),
            ],
            discovery=discovery,
        )
        supervisor.say(f"starting {ps} PS on 127.0.0.1, for this machine alone", style="")
        supervisor.say(f"logs are in {supervisor.log_dir}", style="")
        if cluster.start(cancelled=lambda: bool(stop)):
            _announce(supervisor, cluster, alone=not job)
            if address_file is not None:
                _write_whole(address_file, cluster.address + "\n")
            if job:
                _start_job(supervisor, cluster, job, workers, run, decided, worker_args or [])
            _watch(supervisor, stop, workers)
        supervisor.say("stopping", style="")


def _prepared(job: str, flags: RunFlags, processes: int) -> tuple[str | None, list[str]]:
    """Where the job's checkpoints go, which is where the PS come back from; None: nowhere. And what its run is told.

    What is wrong with a job is found out here, before anything has been started.
    """
    from trilith.folder import Folder, absolute
    from trilith.runtime.machine import cores
    from trilith_services.local.workers import check_free

    check_free(flags.sets or ())
    run = flags.job(job).run
    # A worker that takes all cores, as it does by itself, would wait for those that the PS have.
    decided = [] if run.threads else [f"threads={max(1, cores() // processes)}"]
    if not run.model_dir:
        return None, decided
    Folder(run.model_dir).check_writable()
    model_dir = absolute(run.model_dir)
    return model_dir, [*decided, f"model_dir={model_dir}"]


def _start_job(
    supervisor: Supervisor,
    cluster: PsCluster,
    job: str,
    workers: int,
    flags: RunFlags,
    decided: list[str],
    arguments: list[str],
) -> None:
    from trilith_services.local.workers import start_workers

    start_workers(
        supervisor,
        job,
        workers,
        cluster=cluster.address,
        sets=[*(flags.sets or ()), *decided],
        arguments=[*(["--config", flags.config] if flags.config else []), *arguments],
        env=cluster.env,
    )


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears with its content."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


def _announce(supervisor: Supervisor, cluster: PsCluster, *, alone: bool) -> None:
    supervisor.say(f"cluster: {cluster.address}", style="bold green")
    supervisor.say(f"watch it:  trilith top {cluster.address}", style="")
    if alone:
        supervisor.say(f'use it:    trilith.connect("{cluster.address}")', style="")
        supervisor.say("Ctrl-C stops it", style="")


def _watch(supervisor: Supervisor, stop: StopRequest, workers: int) -> None:
    """Supervise until all workers are done or somebody asks for the end."""
    while not stop.wait(POLL_S):
        for ended in supervisor.poll():
            _judge(supervisor, ended)
        if workers and not supervisor.running(prefix="worker-"):
            supervisor.say("all workers are done")
            return


def _judge(supervisor: Supervisor, ended: Ended) -> None:
    from trilith.errors import UnavailableError

    if ended.restarted:
        return
    if ended.name.startswith("ps-"):
        tail = "\n".join(f"  {line}" for line in ended.tail[-15:])
        raise UnavailableError(
            f"{ended.name} {ended.how}, and its rows are gone: a job with a model_dir, or --checkpoint-dir, survives "
            f"that\n{tail}"
        )
    supervisor.say(f"{ended.name} has left", style="")

"""Who a worker is, by every launcher's variables; its device; and the process group that it begins and ends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch
from torch import distributed

from trilith.errors import DeadlineExceededError, InvalidRequestError
from trilith.estimator.group import backends, local_device, process_group
from trilith.estimator.identity import WorkerIdentity

A, B, C = "a:2222", "b:2222", "c:2222"
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MLP = {
    "MLP_ROLE": "worker",
    "MLP_ROLE_INDEX": "1",
    "MLP_WORKER_NUM": "2",
    "MLP_WORKER_0_HOST": "a",
    "MLP_WORKER_1_HOST": "b",
    "MLP_PS_NUM": "1",
    "MLP_PS_0_HOST": "c",
}


def tf_config(task: object, **cluster: list[str]) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, **({"task": task} if task else {})})}


def who(**said: object) -> WorkerIdentity:
    return WorkerIdentity(**said)


CASES = {
    "alone": ({}, who()),
    "blank variables": ({"RANK": "", "TF_CONFIG": " "}, who()),
    "one of one": ({"WORLD_SIZE": "1"}, who()),
    "torchrun": (
        TORCHRUN,
        who(rank=3, world_size=4, local_rank=1, local_world_size=2, master="a:29500", source="torchrun"),
    ),
    "kubeflow's PyTorchJob has no local rank": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "1"},
        who(rank=1, world_size=2, master="[fd00::1]:1", source="torchrun"),
    ),
    "mpirun": (MPI, who(rank=2, world_size=4, local_world_size=2, source="mpi")),
    "mpirun of one": ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, who(source="mpi")),
    "mpirun with a master": (
        {**MPI, "MASTER_ADDR": "a", "MASTER_PORT": "7"},
        who(rank=2, world_size=4, local_world_size=2, master="a:7", source="mpi"),
    ),
    "mpirun on MLP": (
        {**MPI, **MLP},
        who(
            rank=2,
            world_size=4,
            local_world_size=2,
            master=A,
            source="mpi",
            members={"worker": (A, "a:2223", "b:2224", "b:2225"), "ps": (C,)},
        ),
    ),
    "MLP worker": (MLP, who(rank=1, world_size=2, master=A, source="mlp", members={"worker": (A, B), "ps": (C,)})),
    "MLP PS": (
        {**MLP, "MLP_ROLE": "PS", "MLP_ROLE_INDEX": "0"},
        who(task="ps", master=A, source="mlp", members={"worker": (A, B), "ps": (C,)}),
    ),
    "MLP worker beside a chief": (
        {**MLP, "MLP_CHIEF_NUM": "1", "MLP_CHIEF_0_HOST": "c"},
        who(rank=2, world_size=3, master=C, source="mlp", members={"worker": (C, A, B), "ps": (C,)}),
    ),
    "MLP chief": (
        {**MLP, "MLP_CHIEF_NUM": "1", "MLP_CHIEF_0_HOST": "c", "MLP_ROLE": "chief", "MLP_ROLE_INDEX": "0"},
        who(rank=0, world_size=3, master=C, source="mlp", members={"worker": (C, A, B), "ps": (C,)}),
    ),
    "MLP alone": ({"MLP_WORKER_NUM": "1"}, who()),
    "TF_CONFIG chief": (
        tf_config({"type": "chief", "index": 0}, chief=[A], worker=[B], ps=[C]),
        who(world_size=2, master=A, source="tf-config", members={"worker": (A, B), "ps": (C,)}),
    ),
    "TF_CONFIG worker beside a chief": (
        tf_config({"type": "worker", "index": 0}, chief=[A], worker=[B]),
        who(rank=1, world_size=2, master=A, source="tf-config", members={"worker": (A, B)}),
    ),
    "TF_CONFIG PS": (
        tf_config({"type": "ps", "index": 1}, worker=[A], ps=[B, C]),
        who(rank=1, world_size=2, task="ps", master=A, source="tf-config", members={"worker": (A,), "ps": (B, C)}),
    ),
    "TF_CONFIG evaluator": (
        tf_config({"type": "evaluator", "index": 0}, worker=[A, B]),
        who(task="evaluator", master=A, source="tf-config", members={"worker": (A, B)}),
    ),
    "TF_CONFIG of one": (
        tf_config(None, worker=[A]),
        who(master=A, source="tf-config", members={"worker": (A,)}),
    ),
    "kubernetes": (
        {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"},
        who(rank=2, world_size=3, source="kubernetes"),
    ),
    "kubernetes as torch's examples have it": (
        {"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "29500"},
        who(world_size=3, master="job-0.job:29500", source="kubernetes"),
    ),
    "the first that knows": (
        {**TORCHRUN, **MPI, **MLP, **tf_config(None, worker=[A, B]), "JOB_COMPLETION_INDEX": "9"},
        who(rank=3, world_size=4, local_rank=1, local_world_size=2, master="a:29500", source="torchrun"),
    ),
    "mpirun before MLP's index": (
        {**MPI, "JOB_COMPLETION_INDEX": "1"},
        who(rank=2, world_size=4, local_world_size=2, source="mpi"),
    ),
}


@pytest.mark.parametrize(("environ", "wanted"), CASES.values(), ids=CASES)
def test_a_worker_knows_itself_by_its_variables(environ, wanted):
    assert WorkerIdentity.find(environ) == wanted


@pytest.mark.parametrize(
    ("arguments", "environ", "wanted"),
    [
        ({"rank": 1, "world_size": 2}, {}, who(rank=1, world_size=2, source="arguments")),
        ({"rank": 1, "world_size": 2}, TORCHRUN, who(rank=1, world_size=2, master="a:29500", source="arguments")),
        ({"rank": 0, "world_size": 2, "master": B}, {}, who(world_size=2, master=B, source="arguments")),
        ({"master": B}, MPI, who(rank=2, world_size=4, local_world_size=2, master=B, source="mpi")),
        ({"world_size": 4}, {"JOB_COMPLETION_INDEX": "3"}, who(rank=3, world_size=4, source="kubernetes")),
        (
            {"rank": 1, "world_size": 4, "local_rank": 1},
            {},
            who(rank=1, world_size=4, local_rank=1, local_world_size=2, source="arguments"),
        ),
        ({"world_size": 1}, {}, who()),
    ],
)
def test_arguments_come_before_the_environment(arguments, environ, wanted):
    assert WorkerIdentity.find(environ, **arguments) == wanted


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "1"}, "RANK=1 is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: a job of several"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: a job of several"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "MASTER_ADDR=a"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: rank=2 is outside"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "without OMPI_COMM_WORLD_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "without OMPI_COMM_WORLD_SIZE"),
        ({"MLP_WORKER_NUM": "2"}, "MLP_WORKER_NUM=2 is set without MLP_ROLE and MLP_ROLE_INDEX"),
        ({"MLP_WORKER_NUM": "2", "MLP_ROLE": "WORKER"}, "without MLP_ROLE_INDEX"),
        ({"MLP_WORKER_NUM": "2", "MLP_ROLE": "WORKER", "MLP_ROLE_INDEX": "2"}, "MLP_ROLE_INDEX=2, MLP_WORKER_NUM=2"),
        ({"MLP_ROLE": "WORKER", "MLP_ROLE_INDEX": "1"}, "without MLP_WORKER_NUM"),
        (tf_config(None, worker=[A, B]), 'without its "task"'),
        (tf_config({"type": "worker"}, worker=[A, B]), 'without its "task"'),
        (tf_config({"type": "worker", "index": 5}, worker=[A, B]), "rank=5 is outside"),
        (tf_config(["worker", 1], worker=[A, B]), '"task" is'),
        ({"TF_CONFIG": "{"}, "TF_CONFIG is not JSON"),
        ({"JOB_COMPLETION_INDEX": "0"}, "without JOB_COMPLETIONS"),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2", "WORLD_SIZE": "3"}, "differently"),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "2"}, "JOB_COMPLETION_INDEX=2, JOB_COMPLETIONS=2"),
        ({"JOB_COMPLETIONS": "2"}, "JOB_COMPLETIONS=2: a job of several"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4"),
    ],
)
def test_one_of_several_is_never_taken_for_the_only_one(environ, named):
    with pytest.raises(InvalidRequestError) as error:
        WorkerIdentity.find(environ)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 1}, "rank=1 without world_size"),
        ({"rank": 0}, "rank=0 without world_size"),
        ({"world_size": 2}, "world_size=2 without rank"),
        ({"rank": 2, "world_size": 2}, "rank=2 is outside"),
        ({"rank": 0, "world_size": 2, "master": "a"}, "master='a'"),
        ({"rank": 0, "world_size": 2, "local_world_size": 3}, "local_world_size=3 is above"),
    ],
)
def test_impossible_arguments_are_refused(arguments, named):
    with pytest.raises(InvalidRequestError, match=named):
        WorkerIdentity.find({}, **arguments)


def test_only_worker_0_is_the_chief():
    assert who().chief
    assert not who(rank=1, world_size=2).chief
    assert not who(task="evaluator").chief


# ---- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "local_rank", "asked", "wanted"),
    [
        (0, 0, {}, "cpu"),
        (2, 1, {}, "cuda:1"),
        (2, 1, {"device": "cpu"}, "cpu"),
        (2, 1, {"device": "cuda"}, "cuda:1"),
        (2, 1, {"device": "cuda:0"}, "cuda:0"),
        (2, 1, {"device": "cuda", "use_gpu": False}, "cpu"),
        (2, 3, {"processes_per_gpu": 2}, "cuda:1"),
        (1, 3, {"device": "cpu"}, "cpu"),
    ],
)
def test_a_local_rank_has_its_gpu(monkeypatch, gpus, local_rank, asked, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    identity = who(rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4)
    assert local_device(identity, **asked) == torch.device(wanted)


@pytest.mark.parametrize(
    ("gpus", "asked", "named"),
    [
        (0, {"device": "cuda"}, "no CUDA device"),
        (1, {}, "local rank 1 would have GPU 1, and this process sees 1 GPU"),
        (2, {"device": "cuda:7"}, "sees 2 GPUs"),
        (1, {"device": "tpu-9"}, "device='tpu-9'"),
        (1, {"processes_per_gpu": 0}, "processes_per_gpu=0"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, gpus, asked, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InvalidRequestError, match=named):
        local_device(who(rank=1, world_size=2, local_rank=1, local_world_size=2), **asked)


def test_gpus_exchange_over_nccl():
    assert backends(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"
    assert backends(torch.device("cpu")) == "gloo"


# ---- the process group ---------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


def test_a_process_alone_meets_nobody_and_a_group_begins_once():
    with process_group(who(), CPU):
        with process_group(who(), CPU):
            ones = torch.ones(2)
            distributed.all_reduce(ones)
            assert ones.tolist() == [1, 1]
        assert distributed.is_initialized()
        with pytest.raises(InvalidRequestError, match="begun as rank 0 of 1, and this process is rank 1 of 2"):
            with process_group(who(rank=1, world_size=2, master=A), CPU):
                pass
    assert not distributed.is_initialized()


def test_who_does_not_know_the_master_is_refused():
    with pytest.raises(InvalidRequestError, match="MASTER_ADDR"):
        with process_group(who(rank=1, world_size=2), CPU):
            pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_waiting_for_others_ends():
    with pytest.raises(DeadlineExceededError, match="rank 0: not all of 2 workers met"):
        with process_group(who(world_size=2, master=f"127.0.0.1:{free_port()}"), CPU, timeout_s=1):
            pass


_PROGRAM = """
import sys, torch
from torch import distributed
from trilith.estimator.group import local_device, process_group
from trilith.estimator.identity import WorkerIdentity
who = WorkerIdentity.find()
with process_group(who, local_device(who, "cpu"), timeout_s=60):
    total = torch.tensor([float(who.rank + 1)])
    distributed.all_reduce(total)
    print(f"{who.source} {who.rank} {who.world_size} {total.item():g}", flush=True)
"""


def test_workers_that_torchrun_starts_meet(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert sorted(done.stdout.splitlines()) == ["torchrun 0 2 3", "torchrun 1 2 3"], done.stderr

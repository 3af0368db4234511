"""What a checkpoint holds of a job beside its rows: dense values and buffers, optimizer, positions, random numbers.

They are files in the directory of a checkpoint, written before its manifest, which alone makes a checkpoint of it:

    job.json                         step, event time, settings, names and CRC-32C of the files below; by the chief
    job.dense.safetensors            parameters and buffers of the task; by the chief
    job.optimizer.safetensors        state of a torch optimizer, where one steps dense parameters; by the chief
    job.rank-00000-of-00002.json     position in the data, event time, random numbers; by every rank

No pickle is written or read.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from trilith.data.pipeline.positions import from_json, to_json
from trilith.errors import CheckpointError
from trilith.estimator.job_files import JOB
from trilith.folder import Folder

__all__ = [
    "Job",
    "RankState",
    "dense_state",
    "has_rank",
    "is_job",
    "pack_rank",
    "read_job",
    "read_rank",
    "rng_state",
    "set_rng_state",
    "unpack_rank",
    "write_job",
    "write_rank",
]

_DENSE, _OPTIMIZER = "job.dense.safetensors", "job.optimizer.safetensors"
_FORMAT, _VERSION = "trilith.job", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all ranks of a job share.

    Attributes:
        step: Steps that the cluster had counted.
        world_size: Ranks that wrote.
        task: Name of the task's class, for messages.
        tables: By name the floats of a row, segment by segment: of the bias, where there is one, and of the vector.
        texts: Features whose ids came as text.
        event_time: The latest time of the samples that any rank had learned from, Unix seconds; None: none was known.
        run: Settings of the run, without secrets.
        dense: Parameters and buffers by name.
        optimizer: `state_dict` of the torch optimizer; empty without one.
        stepped: Parameters that an optimizer steps, in the order in which that state numbers them.
    """

    step: int
    world_size: int
    task: str
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    event_time: int | None = None
    run: dict[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    optimizer: Mapping[str, Any] = field(default_factory=dict, repr=False)
    stepped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """Where one rank is.

    Attributes:
        epoch: Pass over the data.
        batches: Batches of it that are done.
        steps: Steps of this rank in all.
        samples: Samples of this rank in all.
        event_time: The latest time of the samples that were learned from, Unix seconds; of ranks in step all have the
            latest of all. None: none was known.
        source: Position in the data as its iterator says it; None: batches are counted and skipped.
        rng: Of random numbers, see `rng_state`.
        scaler: State of the gradient scaler; empty without one.
        callbacks: State of the callbacks, by name.
    """

    epoch: int = 0
    batches: int = 0
    steps: int = 0
    samples: int = 0
    event_time: int | None = None
    source: dict[str, Any] | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)


def dense_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a task by name, on the CPU; rows are elsewhere."""
    found = module.state_dict()
    return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}


def is_job(path: str) -> bool:
    """Whether a checkpoint holds a job's state."""
    return Folder(path).exists(JOB)


def write_job(path: str, job: Job) -> None:
    """Write what all ranks share; by the chief."""
    folder = Folder(path)
    numbers, tensors = _flat(job.optimizer)
    files = {_DENSE: save(dict(job.dense))}
    if job.optimizer:
        files[_OPTIMIZER] = save(tensors)
    for name, content in files.items():
        folder.write(name, content)
    body = {name: value for name, value in asdict(_without_tensors(job)).items() if name not in ("dense", "optimizer")}
    body |= {"optimizer": numbers, "files": {name: _crc(content) for name, content in files.items()}}
    folder.write(JOB, json.dumps({"format": _FORMAT, "version": _VERSION, **body}, indent=1).encode() + b"\n")


def read_job(path: str) -> Job:
    """What `write_job` wrote.

    Raises:
        CheckpointError: It is missing, damaged, or of a version that this program does not know.
    """
    folder = Folder(path)
    where = folder.path(JOB)
    try:
        body = json.loads(folder.read(JOB))
        if body.get("format") != _FORMAT or body.get("version") != _VERSION:
            raise CheckpointError(
                f"{where}: format {body.get('format')!r}, version {body.get('version')!r} is not known"
            )
        dense = load(_checked(folder, body["files"], _DENSE))
        optimizer: Mapping[str, Any] = {}
        if _OPTIMIZER in body["files"]:
            optimizer = _deep(body["optimizer"], load(_checked(folder, body["files"], _OPTIMIZER)))
        return Job(
            step=int(body["step"]),
            world_size=int(body["world_size"]),
            task=str(body["task"]),
            tables={str(name): tuple(map(int, floats)) for name, floats in body.get("tables", {}).items()},
            texts=tuple(map(str, body.get("texts", ()))),
            event_time=body.get("event_time"),
            run=dict(body["run"]),
            dense=dense,
            optimizer=optimizer,
            stepped=tuple(map(str, body.get("stepped", ()))),
        )
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing; the checkpoint holds rows and no job") from None
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever reading a damaged file raises
        raise CheckpointError(f"{where}: damaged ({type(error).__name__}: {error})") from None


def pack_rank(state: RankState) -> dict[str, Any]:
    """Where a rank is, as JSON has it."""
    return asdict(state) | {"source": None if state.source is None else to_json(state.source)}


def unpack_rank(packed: Mapping[str, Any]) -> RankState:
    """What `pack_rank` packed.

    Raises:
        ValueError: It is something else.
        TypeError: So it is.
    """
    source = packed.get("source")
    return RankState(**{**packed, "source": None if source is None else from_json(source)})


def has_rank(path: str, rank: int, world_size: int) -> bool:
    """Whether a checkpoint says where a rank is."""
    return Folder(path).exists(_rank_name(rank, world_size))


def write_rank(path: str, rank: int, world_size: int, state: RankState) -> None:
    """Write where a rank is."""
    body = {"format": _FORMAT, "version": _VERSION, **pack_rank(state)}
    Folder(path).write(_rank_name(rank, world_size), json.dumps(body).encode() + b"\n")


def read_rank(path: str, rank: int, world_size: int) -> RankState:
    """What `write_rank` wrote.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    folder = Folder(path)
    where = folder.path(_rank_name(rank, world_size))
    try:
        body = json.loads(folder.read(_rank_name(rank, world_size)))
        if body.pop("format") != _FORMAT or body.pop("version") != _VERSION:
            raise ValueError(f"not of format {_FORMAT!r}, version {_VERSION}")
        return unpack_rank(body)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing; the checkpoint is of another number of ranks") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: damaged ({error})") from None


# ---- random numbers --------------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """The generators that a training loop draws from: torch's, NumPy's and Python's global ones."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state of whoever uses it
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _packed(torch.get_rng_state()),
        "numpy": [str(kind), base64.b64encode(np.asarray(keys).tobytes()).decode(), *rest],
        "python": [version, list(numbers), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_packed(torch.cuda.get_rng_state())]  # of this process's GPU; others are other ranks'
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `rng_state` was taken; what it lacks stays as it is."""
    if "torch" in state:
        torch.set_rng_state(_unpacked(state["torch"]))
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), np.uint32), *rest))  # noqa: NPY002
    if "python" in state:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpacked(state["cuda"][0]))


def _packed(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpacked(state: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(state), np.uint8).copy())


# ---- files -----------------------------------------------------------------------------------------------------------


def _rank_name(rank: int, world_size: int) -> str:
    return f"job.rank-{rank:05d}-of-{world_size:05d}.json"


def _without_tensors(job: Job) -> Job:
    return replace(job, dense={}, optimizer={})


def _flat(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """An optimizer's state as JSON whose tensors are named, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"$tensor": name}
        if isinstance(value, Mapping):
            return {"$map": [[key, walk(each, f"{name}/{key}")] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            parts = [walk(each, f"{name}/{place}") for place, each in enumerate(value)]
            return {"$tuple": parts} if isinstance(value, tuple) else parts
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(f"the optimizer's state has a {type(value).__name__} at {name}, which is not kept")

    return walk(dict(state), "optimizer"), tensors


def _deep(found: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_flat`."""
    if isinstance(found, list):
        return [_deep(each, tensors) for each in found]
    if isinstance(found, Mapping):
        if "$tensor" in found:
            return tensors[found["$tensor"]]
        if "$tuple" in found:
            return tuple(_deep(each, tensors) for each in found["$tuple"])
        return {key: _deep(each, tensors) for key, each in found["$map"]}
    return found


def _checked(folder: Folder, files: Mapping[str, int], name: str) -> bytes:
    content = folder.read(name)
    if _crc(content) != files[name]:
        raise CheckpointError(f"{folder.path(name)}: damaged: its content does not match its checksum")
    return content


def _crc(content: bytes) -> int:
    import google_crc32c

    return int(google_crc32c.value(content))

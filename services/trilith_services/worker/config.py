"""What one worker does and where it finds what it needs, as fields of which the flags of `trilith worker` are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trilith.discovery.urls import CLUSTER_FORMS
from trilith.errors import InvalidRequestError
from trilith_services.listening import LOOPBACK
from trilith_services.options import flags_of, option

__all__ = ["Dense", "Mode", "WorkerConfig"]


class Mode(StrEnum):
    """Where embedding rows live."""

    ps = "ps"
    all_to_all = "all-to-all"


class Dense(StrEnum):
    """Where dense parameters live."""

    ps = "ps"
    allreduce = "allreduce"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Options of one worker, each explained where it is declared.

    Asynchronous runs may have fewer or more workers at a time than `world_size` says. Rank 0 validates and saves. What
    `prefetch` and `async_push` cost in staleness is written in `trilith.pipelining`; with both 0 every step sees all
    steps before it.
    """

    cluster: str = option("", f"The cluster, for --mode ps: {CLUSTER_FORMS}.", metavar="URL", secret=True)
    mode: Mode = option(Mode.ps, "ps: rows on the PS; all-to-all: in the workers, who take each step together.")
    rank: int = option(0, "This worker's number, from 0.", least=0, metavar="N")
    world_size: int = option(1, "Workers, and so shards that the data is cut into.", least=1, metavar="N")
    batch_size: int = option(512, "Samples per step.", least=1, metavar="N")
    epochs: int = option(0, "Passes over the shard; 0: the model's own number.", least=0, metavar="N")
    steps: int = option(0, "End after so many steps of this worker; 0: no limit.", least=0, metavar="N")
    seed: int = option(0, "Decides initial values and the order of samples.", least=0, metavar="N")
    dense: Dense = option(Dense.ps, "ps: dense parameters on the PS, asynchronous; allreduce: synchronous.")
    master: str = option("", "Where rank 0 is, for allreduce and all-to-all.", metavar="HOST:PORT")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one, else cpu.", metavar="DEVICE")
    threads: int = option(0, "torch threads; 0: the cores shared by the workers.", least=0, metavar="N")
    model_dir: str = option(
        "",
        "Directory or URL for rank 0's checkpoints, below the PS's --checkpoint-root; one whose newest checkpoint is "
        "ahead of the cluster is refused.",
        metavar="DIR",
    )
    save_every: int = option(
        0,
        "Steps of all workers between checkpoints; 0: one soon after the start, if there is none yet.",
        least=0,
        metavar="N",
    )
    prefetch: int = option(0, "Batches whose rows are looked up ahead; 0: exact order.", least=0, metavar="N")
    async_push: int = option(0, "Updates that may be on their way; 0: wait for each.", least=0, metavar="N")
    lookup_queue: int = option(0, "all-to-all: batches whose rows are found and wait to travel.", least=0, metavar="N")
    update_queue: int = option(
        0, "all-to-all: updates that have travelled and wait to be applied.", least=0, metavar="N"
    )
    clip_norm: float = option(
        0.0, "Bound on the norm of a step's gradients, of rows and dense ones; 0: none.", least=0, metavar="NORM"
    )
    validate: bool = option(True, "Rank 0 scores the validation part after every epoch.")
    events: str = option("", "Progress is appended here, a JSON object per line.", metavar="FILE")
    state_file: str = option("", "Remembers the position in the data, to go on there.", metavar="FILE", name="--state")
    timeout_s: float = option(
        120.0, "How long to wait for a PS that is away.", least=0.1, metavar="SECONDS", name="--timeout"
    )
    metrics_port: int | None = None
    """Where the timers of this process are served for Prometheus; None: nowhere, 0: any free port."""
    metrics_host: str = LOOPBACK

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InvalidRequestError(f"rank={self.rank} is outside 0..{self.world_size - 1}, world_size - 1")
        for _, each in flags_of(self):
            least, value = each.metadata["how"]["min"], getattr(self, each.name)
            if least is not None and value < least:
                raise InvalidRequestError(f"{each.name}={value} is below {least}")
        if self.save_every and not self.model_dir:
            raise InvalidRequestError(f"save_every={self.save_every} needs a model directory")

    @property
    def synchronous(self) -> bool:
        """Whether the workers take every step together: always where they hold the rows."""
        return self.mode == Mode.all_to_all or self.dense == Dense.allreduce

    def check_places(self) -> None:
        """Refuse a worker that would not find its cluster or the others.

        Raises:
            InvalidRequestError: Something is missing, or is for the other mode; it names the flag.
        """
        if self.mode == Mode.ps:
            if not self.cluster:
                raise InvalidRequestError(
                    "--cluster is left out; --mode ps needs it, such as static://host:port,host:port"
                )
            if self.lookup_queue or self.update_queue:
                raise InvalidRequestError(
                    "the queues of an exchange are for workers that hold the rows, which have no cluster"
                )
        elif self.cluster:
            raise InvalidRequestError(f"--cluster {self.cluster}: --mode all-to-all has no PS; leave it out")
        elif self.state_file:
            raise InvalidRequestError(
                "workers without PS go on from their checkpoint; a position of one rank is of no use"
            )
        if self.synchronous and not self.master:
            what = "--mode all-to-all" if self.mode == Mode.all_to_all else "--dense allreduce"
            raise InvalidRequestError(f"{what} needs to know where rank 0 is: give --master host:port")

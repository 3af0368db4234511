"""Position: how far a worker is in its shard, kept in a file so that one that is started again goes on there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from trilith.errors import InvalidRequestError
from trilith_services.worker.config import WorkerConfig

__all__ = ["Position"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where in its shard a worker is: `batch` batches of epoch `epoch` are done, and `steps` in all."""

    epoch: int = 0
    batch: int = 0
    steps: int = 0

    @classmethod
    def load(cls, path: str, config: WorkerConfig | None = None) -> Position:
        """Read what `save` wrote; the start if there is no such file.

        Raises:
            InvalidRequestError: It counts other batches than `config` has, or is none.
        """
        if not path:
            return cls()
        try:
            body = json.loads(Path(path).read_text())
            place = cls(*(int(body[name]) for name in ("epoch", "batch", "steps")))
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"--state {path} does not say where a worker is ({error!r}); delete it to begin at the first sample"
            ) from None
        for name, value in _order_of_samples(config).items():
            if body.get(name, value) != value:
                raise InvalidRequestError(
                    f"--state {path} counts batches of {name} {body[name]}, this run has {name} {value}: it would "
                    "leave out samples never trained on; keep the flag, or delete the file to begin at the first"
                )
        return place

    def save(self, path: str, config: WorkerConfig | None = None) -> None:
        """Write in one step, with what the order of samples depends on."""
        if path:
            fresh = Path(f"{path}.{os.getpid()}")
            fresh.write_text(json.dumps(asdict(self) | _order_of_samples(config)))
            fresh.replace(path)


def _order_of_samples(config: WorkerConfig | None) -> dict[str, int]:
    if config is None:
        return {}
    names = ("rank", "world_size", "batch_size", "seed")
    return {name: getattr(config, name) for name in names}

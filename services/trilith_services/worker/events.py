"""What a training run says about itself: one JSON object per event, for displays and tests to read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["Emit", "EventLog", "Tail"]

Emit = Callable[[dict[str, Any]], None]
"""Takes an event: "event" says which, the rest depends on it."""


class EventLog:
    """Appends events to a file, a line each; lines appear whole."""

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def __call__(self, event: dict[str, Any]) -> None:
        """Write one event with its time, Unix seconds."""
        self._file.write(json.dumps({"time": self._clock(), **event}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tail:
    """Reads what an EventLog has written since the last look; the file need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New events, oldest first."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

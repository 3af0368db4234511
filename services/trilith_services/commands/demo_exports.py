"""What `trilith demo --export` does: every checkpoint that is saved becomes an export, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from trilith.errors import TrilithError

if TYPE_CHECKING:
    from trilith_services.worker.models import ModelSettings

__all__ = ["DemoExports"]


class DemoExports:
    """Exports the newest checkpoint it was told of; those that it has no time for are left out."""

    def __init__(
        self,
        directory: str,
        mode: Literal["distributed", "standalone"],
        settings: ModelSettings,
        features: Iterable[str],
        say: Callable[[str], None],
    ) -> None:
        """Begin to wait for checkpoints.

        Args:
            directory: Where exports go.
            mode: Where their rows are.
            settings: The model.
            features: Names of its features.
            say: Is told of exports that fail.
        """
        from trilith_services.exporting import reference_exporter

        self._directory, self._mode, self._say = directory, mode, say
        self._exporter = reference_exporter(settings, features)
        self._news = threading.Condition()
        self._next = ""
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="demo-exports", daemon=True)
        self._thread.start()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take note of a worker's event, if it is a checkpoint."""
        if event.get("event") == "saved":
            with self._news:
                self._next = event["path"]
                self._news.notify()

    def finish(self, checkpoint: str) -> str:
        """Export the last checkpoint; returns where to."""
        self.stop()
        return self._exporter.export(checkpoint, self._directory, mode=self._mode).path

    def stop(self) -> None:
        """End after what is under way."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._next or self._stopped)
                if self._stopped:
                    return
                checkpoint, self._next = self._next, ""
            try:
                self._exporter.export(checkpoint, self._directory, mode=self._mode)
            except TrilithError as error:  # such as a checkpoint that is old enough to be gone by now
                self._say(f"not exported: {error}")

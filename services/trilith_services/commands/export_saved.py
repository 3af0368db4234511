"""What `--export` of the demo and of a worker does: every checkpoint that is saved becomes an export, on a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from trilith.errors import TrilithError

if TYPE_CHECKING:
    from trilith_services.exporting import Exporter

__all__ = ["ExportSaved"]


class ExportSaved:
    """Exports the newest checkpoint it was told of; those that it has no time for are left out."""

    def __init__(
        self,
        directory: str,
        mode: Literal["distributed", "standalone"],
        exporter: Exporter,
        say: Callable[[str], None],
    ) -> None:
        """Begin to wait for checkpoints.

        Args:
            directory: Where exports go.
            mode: Where their rows are.
            exporter: Of the model.
            say: Is told of exports that fail.
        """
        self._directory, self._mode, self._say = directory, mode, say
        self._exporter = exporter
        self._news = threading.Condition()
        self._next = ""
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="export-saved", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take note of a worker's event, if it is a checkpoint."""
        if event.get("event") == "saved":
            with self._news:
                self._next = event["path"]
                self._news.notify()

    def finish(self, checkpoint: str) -> str:
        """Export the last checkpoint, whatever came before it; returns where to."""
        with self._news:
            self._next = ""
        self.stop()
        return self._exporter.export(checkpoint, self._directory, mode=self._mode).path

    def stop(self) -> None:
        """End after the newest checkpoint."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._next or self._stopped)
                checkpoint, self._next = self._next, ""
            if not checkpoint:
                return
            try:
                self._exporter.export(checkpoint, self._directory, mode=self._mode)
            except TrilithError as error:  # such as a checkpoint that is old enough to be gone by now
                self._say(f"not exported: {error}")

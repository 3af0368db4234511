"""Shows training as it goes, by the events that runs write down: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from trilith.estimator import Callback, Step
from trilith.estimator.events import Event

__all__ = ["LOOK_S", "TrainingView"]

LOOK_S = 0.5
"""Seconds between two steps that a run should write down for the bars to move."""


class _Tail:
    """Reads what was appended to a file of JSON lines since the last look; the file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New objects, oldest first."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except FileNotFoundError:
            return []
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class TrainingView:
    """Follows one or several trainers by their files of events, as `trilith.estimator.JsonLines` writes them.

    Args:
        console: Where to show them.
        files: By name of the trainer, the chief's first: what all of them say it says.
        total_steps: That each of them will have done in the end.
        clock: Source of seconds.
        every_s: Seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        console: Console,
        files: Mapping[str, Path],
        total_steps: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = 2.0,
    ) -> None:
        self._console = console
        self._tails = {name: _Tail(path) for name, path in files.items()}
        self._total_steps = total_steps
        self._clock = clock
        self._every_s = every_s
        self._latest: dict[str, dict[str, Any]] = {}
        self._paces: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # on a narrow terminal the bar gives way
            TextColumn("loss {task.fields[loss]:<6}  auc {task.fields[auc]:<6}  {task.fields[rate]:>6} samples/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self.stopped = False
        """Whether a trainer ended before its end."""
        self.exported = ""
        """Path of the newest export."""

    def __enter__(self) -> Self:
        self._progress.start()
        for name in self._tails:
            self._tasks[name] = self._progress.add_task(
                f"{name:<9}", total=self._total_steps, loss="-", auc="-", rate="-"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @property
    def samples_per_s(self) -> float:
        """What the trainers that are done say, added up: of each from its first step to its last."""
        return sum(self._rates.values())

    def look(self) -> None:
        """Show what is new."""
        for name, tail in self._tails.items():
            for event in tail.read():
                self._take(name, event)

    def callback(self) -> Callback:
        """Looks now and then, for a run in this process; its `look` at the end is the caller's."""
        return _Looks(self)

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _take(self, name: str, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "step":
            self._step(name, event)
        elif kind == "rows_rejoined":
            self.say(
                f"{name}: PS {event['shard']} is back from {event['restored_from'] or 'nothing'}, "
                f"{event['steps_back']} steps earlier (step {event['restored_step']}); going on"
            )
        elif kind == "stopped":
            self.stopped = True
        elif kind == "done":
            self._rates[name] = event["samples_per_s"]
            self._progress.update(self._tasks[name], rate=f"{event['samples_per_s']:,.0f}")
        elif name == next(iter(self._tails)):
            self._chief(kind, event)

    def _chief(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "evaluated":
            score = _shown(event["metrics"].get("valid/click/auc"))
            self.say(f"epoch {event['epoch']}: auc {score} on the validation part")
        elif kind == "save_failed":
            self.say(f"checkpoint failed: {event['error']}")
        elif kind == "exported":
            self.exported = event["path"]

    def _step(self, name: str, event: dict[str, Any]) -> None:
        before = self._latest.get(name)
        samples, passed = event["samples"], event["time"] - (before["time"] if before else event["time"])
        if before and passed > 0 and samples >= before["samples"]:  # else it has been started again
            self._paces[name] = (samples - before["samples"]) / passed
        self._latest[name] = event
        self._progress.update(
            self._tasks[name],
            completed=event["own_step"],
            loss=_shown(event["loss"]),
            auc=_shown(event["metrics"].get("click/auc")),
            rate=f"{self._paces[name]:,.0f}" if name in self._paces else "-",
        )
        now = self._clock()
        if self._console.is_terminal or now - self._last_line < self._every_s:
            return
        self._last_line = now
        latest = list(self._latest.values())
        steps, total = sum(each["own_step"] for each in latest), self._total_steps * len(self._tails)
        loss, score = _mean(each["loss"] for each in latest), _mean(each["metrics"].get("click/auc") for each in latest)
        rate = f"  {sum(self._paces.values()):,.0f} samples/s" if self._paces else ""
        self.say(f"step {steps:,} of {total:,}  loss {_shown(loss)}  auc {_shown(score)}{rate}")


class _Looks(Callback):
    """Has a view look when something happens; of steps, which are many, now and then."""

    def __init__(self, view: TrainingView) -> None:
        self._view = view
        self._looked = 0.0

    def on(self, event: Event) -> None:
        """Look."""
        now = time.monotonic()
        if not isinstance(event, Step) or now - self._looked >= LOOK_S:
            self._looked = now
            self._view.look()


def _mean(values: Any) -> float | None:
    """Of the numbers among them; None where there are none."""
    there = [each for each in values if each is not None]
    return sum(there) / len(there) if there else None


def _shown(value: float | None) -> str:
    """What is not defined, such as an AUC without positives, is a dash."""
    return "-" if value is None else f"{value:.4f}"

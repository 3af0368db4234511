"""Shows training as it goes: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["TrainingView"]


class TrainingView:
    """Takes events of one or several trainers and keeps the figures that matter.

    Args:
        console: Where to show them.
        names: Of the trainers; event["rank"] counts into them.
        clock: Source of Unix seconds, for events that carry no time.
        every_s: Seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        console: Console,
        names: Sequence[str],
        *,
        clock: Callable[[], float] = time.time,
        every_s: float = 2.0,
    ) -> None:
        self._console = console
        self._names = list(names)
        self._clock = clock
        self._every_s = every_s
        self._latest: dict[int, dict[str, Any]] = {}
        self._totals: dict[int, int] = {}
        self._last_line = 0.0
        self.first_start: float | None = None
        self.last_end: float | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # on a narrow terminal the bar gives way
            TextColumn("loss {task.fields[loss]:<6}  auc {task.fields[auc]:<6}  {task.fields[rate]:>6} samples/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        for rank, name in enumerate(self._names):
            self._tasks[rank] = self._progress.add_task(f"{name:<9}", total=None, loss="-", auc="-", rate="-")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @property
    def samples(self) -> int:
        """Samples trained so far, by all."""
        return sum(int(latest["samples"]) for latest in self._latest.values())

    @property
    def samples_per_s(self) -> float:
        """Samples per second of wall clock from the first trainer's start to the last one's end."""
        if self.first_start is None:
            return 0.0
        end = self._clock() if self.last_end is None else self.last_end
        return self.samples / max(end - self.first_start, 1e-9)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event."""
        rank, kind = int(event["rank"]), event["event"]
        moment = float(event.get("time") or self._clock())
        if kind == "start":
            self.first_start = moment if self.first_start is None else min(moment, self.first_start)
            self._totals[rank] = int(event["total_steps"])
            self._progress.update(self._tasks[rank], total=self._totals[rank])
        elif kind == "progress":
            self._latest[rank] = event
            self._show(rank, event)
        elif kind in ("done", "stopped"):
            self.last_end = moment if self.last_end is None else max(moment, self.last_end)
        elif kind == "validation":
            self.say(f"epoch {event['epoch']}: auc {event['auc']:.4f} on the validation part")
        elif kind == "rejoined":
            self.say(
                f"{self._names[rank]}: PS {event['shard']} is back from {event['restored_from'] or 'nothing'}, "
                f"{event['steps_back']} steps earlier (step {event['restored_step']}); going on"
            )
        elif kind == "save_failed":
            self.say(f"checkpoint failed: {event['error']}")

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _show(self, rank: int, event: dict[str, Any]) -> None:
        self._progress.update(
            self._tasks[rank],
            completed=event["steps"],
            loss=f"{event.get('loss', 0.0):.4f}",
            auc=f"{event.get('auc', 0.5):.4f}",
            rate=f"{event['samples_per_s']:,.0f}",
        )
        now = self._clock()
        if self._console.is_terminal or now - self._last_line < self._every_s:
            return
        self._last_line = now
        latest = list(self._latest.values())
        steps, total = sum(int(one["steps"]) for one in latest), sum(self._totals.values())
        loss = sum(one.get("loss", 0.0) for one in latest) / len(latest)
        score = sum(one.get("auc", 0.5) for one in latest) / len(latest)
        rate = sum(one["samples_per_s"] for one in latest)
        self.say(f"step {steps:,} of {total:,}  loss {loss:.4f}  auc {score:.4f}  {rate:,.0f} samples/s")

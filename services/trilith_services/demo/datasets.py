"""Data by name, as the command line gives it."""

from __future__ import annotations

from collections.abc import Callable

from trilith.errors import InvalidRequestError
from trilith_services.demo import movielens
from trilith_services.demo.click_files import ClickFiles, store_clicks
from trilith_services.demo.clicks import Parts, split
from trilith_services.demo.synthetic import make_clicks

__all__ = ["load_dataset", "training_files"]


def load_dataset(name: str, *, report: Callable[[str], None] | None = None) -> Parts:
    """Return the data that `name` stands for, the same in every process.

    Args:
        name: "movielens", or "synthetic:SAMPLES".
        report: Is told what is being fetched.
    """
    kind, _, size = name.partition(":")
    if kind == "movielens" and not size:
        return movielens.load(report=report)
    if kind == "synthetic" and size.isdigit() and int(size) >= 10:
        return split(make_clicks(int(size)), seed=0)
    raise InvalidRequestError(f"data {name!r} is neither 'movielens' nor 'synthetic:SAMPLES' with at least 10 samples")


def training_files(parts: Parts) -> ClickFiles:
    """The training samples as files of Examples in the cache, written if they are not there."""
    return store_clicks(parts.train, movielens.cache_dir() / "samples")

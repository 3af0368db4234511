"""Small operators over any elements: looking one ahead, and windows of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from trilith.data.records import Records
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged

__all__ = ["cache_one", "merge_batches", "merged_window"]

_T = TypeVar("_T")


def cache_one(elements: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
    """Each element, and whether it is the last one; looks one element ahead."""
    iterator = iter(elements)
    try:
        element = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield element, False
        element = following
    yield element, True


def merged_window(batches: Iterable[Any], size: int = 2, *, drop_remainder: bool = True) -> Iterator[Any]:
    """Every `size` consecutive batches as one.

    Args:
        batches: Arrays, `Ragged`s, `Records`, lists, or dicts or tuples of them; the first axis is the batch's.
        size: Batches of a window.
        drop_remainder: Whether a last window that is not full is dropped.
    """
    if size < 1:
        raise InvalidRequestError(f"size={size} is below 1")
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, size)):
        if len(window) == size or not drop_remainder:
            yield merge_batches(window)


def merge_batches(batches: list[Any]) -> Any:
    """Several batches of the same structure as one, joined along their first axis."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {name: merge_batches([batch[name] for batch in batches]) for name in first}
    if isinstance(first, Records):
        return Records.concatenate(batches)
    if isinstance(first, Ragged):
        splits = [np.zeros(1, np.int64)]
        for each in batches:
            splits.append(each.row_splits[1:] - each.row_splits[0] + splits[-1][-1])
        values = [each.values[each.row_splits[0] : each.row_splits[-1]] for each in batches]
        return Ragged(np.concatenate(values), np.concatenate(splits))
    if isinstance(first, np.ndarray):
        return np.concatenate(batches)
    if isinstance(first, tuple):
        return tuple(merge_batches(list(parts)) for parts in zip(*batches, strict=True))
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(batches))
    raise InvalidRequestError(f"batches of {type(first).__name__} cannot be merged")

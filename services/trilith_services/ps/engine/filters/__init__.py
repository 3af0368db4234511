"""Occurrence filters: which new ids have been seen often enough to get a row.

A filter decides in input order and counts as it decides. With threshold t an id passes from its (t + 1)-th occurrence
on; t = 0 passes everything and counts nothing. Counts saturate at 15, so a threshold above 15 never passes.
"""

from __future__ import annotations

from trilith.errors import InvalidRequestError
from trilith_proto import ps_pb2
from trilith_services.ps.engine.filters.probabilistic import ProbabilisticFilter
from trilith_services.ps.engine.filters.sliding import DEFAULT_CAPACITY, DEFAULT_SPLITS, SlidingFilter
from trilith_services.ps.engine.filters.thresholds import OccurrenceFilter, Thresholds

__all__ = [
    "DEFAULT_CAPACITY",
    "DEFAULT_SPLITS",
    "OccurrenceFilter",
    "ProbabilisticFilter",
    "SlidingFilter",
    "Thresholds",
    "make_filter",
]


def make_filter(config: ps_pb2.TableConfig) -> OccurrenceFilter | None:
    """The filter that a table's config asks for, None if none."""
    kinds = ps_pb2.TableConfig.FilterKind
    if config.filter == kinds.NO_FILTER:
        return None
    thresholds = Thresholds.of(config.occurrence_thresholds)
    if config.filter == kinds.SLIDING:
        return SlidingFilter(
            config.filter_capacity or DEFAULT_CAPACITY, config.filter_splits or DEFAULT_SPLITS, thresholds=thresholds
        )
    if config.filter in {kinds.PROBABILISTIC, kinds.PROBABILISTIC_EQUAL}:
        equal = config.filter == kinds.PROBABILISTIC_EQUAL
        return ProbabilisticFilter(thresholds, equal=equal, seed=config.seed)
    raise InvalidRequestError(f"table {config.name!r}: filter {config.filter} is none of {list(kinds.keys())}")

"""Area under the ROC curve, exact."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError

__all__ = ["auc"]


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the chance that a random positive scores above a random negative, ties counting one half.

    Args:
        labels: Numbers [n], positive where > 0.5.
        scores: Floats [n]; only their order matters.

    Returns:
        A number in 0..1; 0.5 when only one class is present, which orders nothing.

    Raises:
        InvalidRequestError: The lengths differ, a score or label is NaN, or labels and scores changed places: the
            scores are all 0 or 1, and the labels are not.
    """
    given = np.asarray(labels).reshape(-1)
    positive = given > 0.5
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if positive.size != values.size:
        raise InvalidRequestError(f"{positive.size} labels but {values.size} scores")
    if np.isnan(values).any():
        raise InvalidRequestError("a score is NaN, so the samples cannot be ordered")
    if given.dtype.kind == "f" and np.isnan(given).any():
        raise InvalidRequestError("a label is NaN, which is neither positive nor negative")
    if np.isin(values, (0, 1)).all() and given.dtype.kind == "f" and (given != np.trunc(given)).any():
        raise InvalidRequestError(
            "all scores are 0 or 1 and the labels are not: auc(labels, scores) takes labels first"
        )
    positives = int(positive.sum())
    negatives = positive.size - positives
    if positives == 0 or negatives == 0:
        return 0.5
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Ranks from 1; equal scores share the mean of theirs.
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))

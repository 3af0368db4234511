"""When a row counts as zero: squared norms, and equality up to the last bits of a float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["almost_equal", "norm_square"]

_EPSILON = float(np.finfo(np.float32).eps)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_ULPS = 2


def norm_square(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32[...]: the squared Euclidean norm over the last axis of float32[..., d]."""
    squares: npt.NDArray[np.float32] = np.square(values).sum(axis=-1, dtype=np.float32)
    return squares


def almost_equal(x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether float32 values differ by at most two units in the last place, or by less than any normal float32."""
    left, right = np.asarray(x, np.float64), np.asarray(y, np.float64)
    difference = np.abs(left - right)
    near: npt.NDArray[np.bool_] = (difference <= _EPSILON * np.abs(left + right) * _ULPS) | (
        difference < _SMALLEST_NORMAL
    )
    return near

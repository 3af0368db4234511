"""Delay compensation: what a gradient would have been, had its worker read today's weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["delay_compensated"]

Floats = npt.NDArray[np.float32]


def delay_compensated(grads: Floats, weights: Floats, latest: Floats, lambda_: float) -> Floats:
    """G + λ g⊙g⊙(w − w_latest) for float32[n, dim], a new array.

    Args:
        grads: What the worker computed.
        weights: What the rows are now.
        latest: What the worker had read.
        lambda_: Strength; 0 leaves the gradients as they are.
    """
    compensated: Floats = grads + np.float32(lambda_) * grads * grads * (weights - latest)
    return compensated

"""Random batches: distinct ids that fill 64 bits, uniform, distinct and Zipf draws of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Keys", "Zipf", "spread"]

UInt64Array = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def spread(start: int, stop: int) -> UInt64Array:
    """uint64[stop - start]: the ids of rows start..stop-1, distinct over all rows (splitmix64, a bijection)."""
    z = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Keys:
    """The ids of rows 0..rows-1 and draws from them. A draw gives row numbers, which `take` reads, and their ids."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.ids = spread(0, rows)
        self._rng = np.random.default_rng(seed)

    def uniform(self, count: int) -> tuple[Rows, UInt64Array]:
        """`count` rows, each equally likely; a few may repeat."""
        rows = self._rng.integers(0, self.ids.size, count)
        return rows, self.ids[rows]

    def distinct(self, count: int) -> tuple[Rows, UInt64Array]:
        """`count` different rows in random order."""
        rows = self._rng.choice(self.ids.size, min(count, self.ids.size), replace=False)
        return rows, self.ids[rows]

    def few(self, count: int) -> tuple[Rows, UInt64Array]:
        """`count` different rows without a pass over all of them."""
        rows = np.unique(self._rng.integers(0, self.ids.size, 2 * count))
        chosen = self._rng.permutation(rows)[:count]
        return chosen, self.ids[chosen]


class Zipf:
    """Rows whose frequencies fall as rank ** -exponent; a row's rank says nothing about its number."""

    def __init__(self, rows: int, exponent: float, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
        self._bounds = np.cumsum(weights) / weights.sum()
        self._rows = self._rng.permutation(rows)

    def draw(self, count: int) -> Rows:
        """int64[count], repeats and all."""
        ranks = np.searchsorted(self._bounds, self._rng.random(count))
        found: Rows = self._rows[np.minimum(ranks, self._rows.size - 1)]
        return found

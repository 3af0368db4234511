"""Made-up clicks with something to learn in them: for tests and benchmarks, any size, no download."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.data.fids import make_fid_v2
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_services.demo.clicks import ClickData
from trilith_services.demo.movielens import FEATURES

__all__ = ["make_clicks", "zipf_ids"]


def zipf_ids(
    rng: np.random.Generator, shape: tuple[int, ...], vocabulary: int, exponent: float = 1.05
) -> npt.NDArray[np.int64]:
    """Draw ids int64[*shape] in 0..vocabulary-1, ranked at random, whose frequencies fall as rank ** -exponent."""
    weights = np.arange(1, vocabulary + 1, dtype=np.float64) ** -exponent
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(shape))
    return rng.permutation(vocabulary)[np.minimum(ranks, vocabulary - 1)]


def make_clicks(
    samples: int,
    *,
    features: int = 9,
    vocabulary: int = 1000,
    exponent: float = 1.05,
    seed: int = 0,
) -> ClickData:
    """Draw samples whose click chance is a planted factorization machine over their ids.

    Args:
        samples: How many.
        features: How many, with names of MovieLens'; the genres are among them, 0 to 3 of a sample.
        vocabulary: Distinct ids per feature.
        exponent: Of the Zipf law that ids follow.
        seed: Decides everything.
    """
    if samples < 1 or not 2 <= features <= len(FEATURES) or vocabulary < 1:
        raise InvalidRequestError(
            f"samples={samples}, features={features}, vocabulary={vocabulary}: at least 1, 2..{len(FEATURES)}, 1"
        )
    singles = [name for name in FEATURES if name != "genres"][: features - 1]
    names = [name for name in FEATURES if name in (*singles, "genres")]
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.6, (features, vocabulary))
    vectors = rng.normal(0, 0.4, (features, vocabulary, 3))
    logits = np.zeros(samples)
    summed = np.zeros((samples, 3))
    columns: dict[str, Ragged[np.uint64]] = {}
    for index, name in enumerate(names):
        if name == "genres":
            lengths = rng.integers(0, 4, samples)
            splits = np.zeros(samples + 1, np.int64)
            np.cumsum(lengths, out=splits[1:])
            ids = zipf_ids(rng, (int(splits[-1]),), vocabulary, exponent)
            np.add.at(logits, np.repeat(np.arange(samples), lengths), weights[index, ids] / np.repeat(lengths, lengths))
            columns[name] = Ragged(make_fid_v2(index + 1, ids), splits)
            continue
        ids = zipf_ids(rng, (samples,), vocabulary, exponent)
        logits += weights[index, ids] + (summed * vectors[index, ids]).sum(1)
        summed += vectors[index, ids]
        columns[name] = Ragged.of_singles(make_fid_v2(index + 1, ids))
    labels = rng.random(samples) < 1 / (1 + np.exp(-logits))
    return ClickData(labels.astype(np.float32), columns)

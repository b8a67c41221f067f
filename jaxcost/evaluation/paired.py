"""Two models on the same examples: by how much one is worse, and whether by chance; and how far confidence is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy  # which reads its parts, slow ones, as they are named

_AT_ONCE = 1 << 23
"""Numbers that are drawn at once: the memory that a comparison takes, whatever the number of examples."""


@dataclasses.dataclass(frozen=True)
class Paired:
    """The mean of what the second model loses more than the first."""

    difference: float
    """Per target, in the unit of the losses."""
    low: float
    high: float
    """95 % interval of it, by the percentile bootstrap over examples (Efron and Tibshirani 1993, chapter 13)."""
    p_value: float
    """Two-sided, of a permutation test that flips the sign of each example's sum (Fisher 1935)."""


def paired(differences_E: np.ndarray, counts_E: np.ndarray, resamples: int, seed: int = 0) -> Paired:
    """Compares two models by what each example's targets lose more under the second.

    Targets of one example, such as the tokens of a window, depend on each other: examples are what is drawn again.

    Args:
      differences_E: float (examples,), sums over the example's targets.
      counts_E: how many targets each has, at least 1.
      resamples: of the bootstrap and of the permutation test, which is exact where there are fewer permutations.
      seed: of both.

    Raises:
      ValueError: there is no example.
    """
    if not len(differences_E):
        raise ValueError("There are no examples to compare two models on.")
    counts_E = np.asarray(counts_E, np.float64)
    mean = float(np.sum(differences_E) / np.sum(counts_E))
    if len(differences_E) < 2 or not np.any(differences_E):
        return Paired(mean, mean, mean, 1.0)

    def ratio(differences, counts, axis=-1):
        return np.sum(differences, axis=axis) / np.sum(counts, axis=axis)

    batch = max(1, _AT_ONCE // len(differences_E))
    drawn = scipy.stats.bootstrap(
        (differences_E, counts_E),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=batch,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    flipped = scipy.stats.permutation_test(
        (differences_E,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    interval = drawn.confidence_interval
    return Paired(mean, float(interval.low), float(interval.high), float(flipped.pvalue))


def corrected(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests together, by Holm's method (Holm 1979, A Simple Sequentially Rejective Multiple Test
    Procedure), in the order given."""
    order = np.argsort(p_values, kind="stable")
    found, worst = [1.0] * len(order), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[place]))
        found[place] = float(worst)
    return found


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error and, for each bin of equal width, `count`, mean `confidence` and `accuracy`.

    ECE = Σ count/N · |accuracy - confidence| (Guo et al. 2017, arXiv:1706.04599); empty bins have zeros.
    """
    place_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    count = np.bincount(place_N, minlength=bins)
    shared = np.maximum(count, 1)
    confidence = np.bincount(place_N, confidence_N, minlength=bins) / shared
    accuracy = np.bincount(place_N, right_N, minlength=bins) / shared
    error = float(np.sum(count * np.abs(accuracy - confidence)) / max(1, len(confidence_N)))
    rows = [
        {"count": int(n), "confidence": float(c), "accuracy": float(a)}
        for n, c, a in zip(count, confidence, accuracy, strict=True)
    ]
    return error, rows
